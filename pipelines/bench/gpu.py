"""Everything that a GPU is to be measured for, in parts, each a process of its own with a time limit.

A part that fails or takes too long leaves the others alone. What the parts find is in one JSON file, which is written
anew after each of them. The next part's process starts while one runs, and waits for its turn when it is ready.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import igstore
from igstore import cli
from igstore.acceleration import OnLines
from igstore.attribution import Attributor
from igstore.machine import find_device
from igstore.models import Classifier, load_classifier
from igstore.schema import Precision
from igstore.storage import StoreReader
from pipelines.bench import engine, evaluate, machine, output, peers
from pipelines.bench.pictures import pictures, smooth_pictures

_CLASSES = 10
_FOUND = "FOUND "  # begins a line of JSON among what a part prints


@dataclass(frozen=True)
class Sizes:
    """How much is measured: on a GPU, or in a rehearsal on a CPU, whose figures mean nothing."""

    models: tuple[str, ...] = ("resnet50", "efficientnet_lite0")
    others: tuple[str, ...] = ("vgg16", "densenet121", "inception_v3", "vit_b_16")
    n_steps: int = 50
    attributed: int = 40  # images of the engine's rounds
    built: int = 4000  # of a whole build
    resumed: int = 1000  # of one that is killed
    shown: int = 1024  # of an evaluation
    side: int | None = None  # of the networks' input; None is their own
    seconds: float = 12  # of a comparison


_REHEARSAL = Sizes(
    models=("resnet18",), others=("shufflenet_v2_x0_5",), n_steps=2, attributed=2, built=4, resumed=4, shown=4, side=40,
    seconds=1,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What all parts are told."""

    device: torch.device
    precision: Precision
    data: str | None
    scratch: Path
    sizes: Sizes

    def classifier(self, name: str) -> Classifier:
        """With the weights that come with it where igstore brings them, else random ones."""
        side = self.sizes.side
        return load_classifier(name, None if "lite" in name else "random:0", crop=side, resize=side)

    @functools.cached_property
    def folder(self) -> ImageFolder:
        """Labelled pictures of a photograph's size, as JPEG files."""
        root = self.scratch / "images"
        if not root.exists():
            n = self.sizes.built
            some = smooth_pictures(min(n, 250), (375, 500)).transpose(0, 2, 3, 1)
            grain = np.random.default_rng(0).integers(-12, 13, some[0].shape)  # or they would be decoded too easily
            some = np.clip(some + grain, 0, 255).astype(np.uint8)
            making = root.with_name("making")

            def write(place: int) -> None:
                file = making / f"class{place % _CLASSES}" / f"{place:06d}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(some[place % len(some)]).save(file, quality=90)

            with ThreadPoolExecutor() as threads:
                list(threads.map(write, range(n)))
            making.rename(root)
        return ImageFolder(root)

    def build(self, store: Path, limit: int | None = None) -> Path:
        """A store of the first model's maps of the folder."""
        name = self.sizes.models[0]
        igstore.build_store(
            self.classifier(name), self.folder, store, n_steps=self.sizes.n_steps, precision=self.precision,
            device=str(self.device), limit=limit, show_progress=False,
        )  # fmt: skip
        return store


def _machine(setting: Setting) -> Iterator[dict[str, Any]]:
    """What the device is, and its rates."""
    device = setting.device
    yield machine.describe(device)
    precisions: list[Precision] = ["float32", "tf32", "float16"] if device.type == "cuda" else ["float32"]
    yield {"matrix_rate": {name: machine.matrix_rate(device, name) for name in precisions}}
    yield {"copy_rate": machine.copy_rate(device)}


def _engine(setting: Setting) -> Iterator[dict[str, Any]]:
    """The engine beside captum, by turns, with the agreement of the masks."""
    for name in setting.sizes.models:
        classifier = setting.classifier(name)
        some = pictures(setting.data, classifier.preprocessing, 8)
        pixels = np.concatenate([some] * -(-setting.sizes.attributed // len(some)))[: setting.sizes.attributed]
        found = engine.compare(
            classifier, pixels, n_steps=setting.sizes.n_steps, device=setting.device, precision=setting.precision,
            repeats=3, seconds=setting.sizes.seconds,
        )  # fmt: skip
        yield {"model": name, "data": "made up" if setting.data is None else "photographs", **found}


def _networks(setting: Setting) -> Iterator[dict[str, Any]]:
    """Other networks: gradient evaluations a second, igstore's and captum's."""
    device, n_steps = setting.device, setting.sizes.n_steps
    for name in setting.sizes.others:
        classifier = setting.classifier(name)
        started = time.monotonic()
        attributor = Attributor(classifier, engine.spec(classifier, n_steps, setting.precision), device=device)
        ready = time.monotonic() - started
        rate = attributor.measure_speed()
        has_lines = isinstance(attributor.network, OnLines)
        batch_size = attributor.batch_size
        del attributor
        network = peers.network_as_it_comes(classifier, device)
        pixels = smooth_pictures(4, classifier.preprocessing.crop)
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            peers.captum(
                network, pixels, classifier.preprocessing, n_steps=n_steps, batch_size=4 * n_steps, device=device
            )
            seconds.append(time.perf_counter() - started)
        captum_rate = 4 * n_steps / min(seconds[1:])
        yield {
            "model": name, "evals_per_s": rate, "captum_evals_per_s": captum_rate,
            "speedup_vs_captum": rate / captum_rate, "has_lines": has_lines, "batch_size": batch_size,
            "seconds_until_ready": ready,
        }  # fmt: skip


def _build(setting: Setting) -> Iterator[dict[str, Any]]:
    """A whole build, from JPEG files to ranks, beside the engine's rate; how busy the device is; peak memory."""
    n, n_steps, device = setting.sizes.built, setting.sizes.n_steps, setting.device
    classifier = setting.classifier(setting.sizes.models[0])
    _ = setting.folder
    attributor = Attributor(classifier, engine.spec(classifier, n_steps, setting.precision), device=device)
    rate = statistics.median(attributor.measure_speed() for _ in range(5))
    batch_size = attributor.batch_size
    del attributor
    started = time.monotonic()
    with _utilisation(device) as busy:
        store = StoreReader(setting.build(setting.scratch / "built.zarr"))
    seconds = time.monotonic() - started
    records = [store.record(shard) for shard in range(-(-n // store.shard_size))]
    of_units = sum(record["seconds"] for record in records if record)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    yield {
        "model": classifier.name, "n_images": n, "n_steps": n_steps, "precision": setting.precision,
        "engine_evals_per_s": rate, "build_evals_per_s": n * n_steps / of_units,
        "of_engine": n * n_steps / of_units / rate, "seconds_of_units": of_units, "seconds_whole": seconds,
        "batch_size": batch_size, "peak_memory_bytes": peak, "device_busy_percent": busy(),
    }  # fmt: skip


@contextlib.contextmanager
def _utilisation(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """A function that says how busy the device was, in percent, in the busiest half of the samples of a context."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        yield lambda: None
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        samples: list[float] = []
        yield lambda: statistics.mean(sorted(samples)[len(samples) // 2 :]) if samples else None
        process.terminate()
        said, _ = process.communicate()
        samples += [float(line) for line in said.split() if line.strip().isdigit()]


def _resume(setting: Setting) -> Iterator[dict[str, Any]]:
    """A build that SIGKILL ends in the middle and that is resumed, beside one that nothing disturbed."""
    n = setting.sizes.resumed
    path = setting.scratch / "killed.zarr"
    code = "import sys; from pipelines.bench import gpu; gpu.build_alone(sys.argv[1])"
    told = json.dumps(_told(setting) | {"store": str(path), "limit": n})
    process = subprocess.Popen([sys.executable, "-c", code, told], start_new_session=True)
    while process.poll() is None and not list(path.glob("staging/*.npz")):
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = len(list(path.glob("records/*.json")))
    resumed = StoreReader(setting.build(path, limit=n))
    undisturbed = setting.scratch / "built.zarr"
    other = StoreReader(undisturbed if undisturbed.exists() else setting.build(setting.scratch / "whole.zarr", limit=n))
    places = np.arange(n)
    names = ("attribution", "pixels")
    same = {name: bool((resumed.array(name).read(places) == other.array(name).read(places)).all()) for name in names}
    scalars = ("scale", "output", "baseline_output", "completeness_error", "prediction", "target")
    same |= {name: bool((resumed.scalars(name)[:n] == other.scalars(name)[:n]).all()) for name in scalars}
    yield {"n_images": n, "finished_shards_when_killed": left, "identical": same}


def build_alone(told: str) -> None:
    """What `_resume` kills: a build in a process of its own."""
    options = json.loads(told)
    _setting(options).build(Path(options["store"]), limit=options["limit"])


def _evaluate(setting: Setting) -> Iterator[dict[str, Any]]:
    """An evaluation of all cells beside the bare loop of as many forward passes."""
    classifier = setting.classifier(setting.sizes.models[0])
    path = setting.scratch / "built.zarr"
    store = StoreReader(path if path.exists() else setting.build(setting.scratch / "shown.zarr", setting.sizes.shown))
    for precision in ("float16", "float32") if setting.device.type == "cuda" else ("float32",):
        found = evaluate.measure(
            classifier, store, limit=setting.sizes.shown, device=str(setting.device), precision=precision, repeats=3,
            seconds=setting.sizes.seconds,
        )  # fmt: skip
        yield {"precision": precision, **found}
    cells = [igstore.MaskOptions(p=p, keep=keep) for p in (90, 50) for keep in ("top", "bottom")]
    where = np.arange(len(store.status)) < min(setting.sizes.shown, 64)
    there, here = (
        igstore.MaskedBatches(store, cells, device=device, where=where) for device in (setting.device, "cpu")
    )
    equal = [
        torch.equal(one.masked(cell).cpu(), other.masked(cell))
        for one, other in zip(there, here, strict=True)
        for cell in cells
    ]
    yield {"masked_images_compared": len(equal), "equal_to_the_cpu": sum(equal)}


def _profile(setting: Setting) -> Iterator[dict[str, Any]]:
    """Which kernels the time goes to."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if setting.device.type == "cuda" else ProfilerActivity.CPU
    for name in setting.sizes.models:
        classifier = setting.classifier(name)
        spec = engine.spec(classifier, setting.sizes.n_steps, setting.precision)
        attributor = Attributor(classifier, spec, device=setting.device)
        attributor.measure_speed()
        with profile(activities=[activity]) as found:
            attributor.measure_speed()
        kind = "self_device_time_total" if setting.device.type == "cuda" else "self_cpu_time_total"
        times = sorted(((getattr(one, kind), one.count, one.key) for one in found.key_averages()), reverse=True)
        total = sum(seconds for seconds, _, _ in times) or 1
        yield {
            "model": name,
            "kernels": [
                {"kernel": key[:80], "calls": count, "share": round(seconds / total, 4)}
                for seconds, count, key in times[:15]
            ],
        }


# In order of value, each with the most seconds that it may take.
PARTS: dict[str, tuple[Callable[[Setting], Iterator[dict[str, Any]]], int]] = {
    "machine": (_machine, 40),
    "engine": (_engine, 90),
    "build": (_build, 90),
    "resume": (_resume, 70),
    "evaluate": (_evaluate, 70),
    "networks": (_networks, 120),
    "profile": (_profile, 60),
}


def _told(setting: Setting) -> dict[str, Any]:
    return {
        "device": str(setting.device), "precision": setting.precision, "data": setting.data,
        "scratch": str(setting.scratch), "rehearse": setting.sizes is _REHEARSAL,
    }  # fmt: skip


def _setting(told: dict[str, Any]) -> Setting:
    sizes = _REHEARSAL if told["rehearse"] else Sizes()
    return Setting(torch.device(told["device"]), told["precision"], told["data"], Path(told["scratch"]), sizes)


def run_part(name: str, told: str) -> None:
    """Run a part once a line comes, and print what it finds."""
    setting = _setting(json.loads(told))
    sys.stdin.readline()
    for found in PARTS[name][0](setting):
        cli.say(_FOUND + json.dumps(output.finite(found), allow_nan=False))


class _Process:
    """A part's process, ready and waiting."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name = name
        code = "import sys; from pipelines.bench import gpu; gpu.run_part(*sys.argv[1:])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, name, json.dumps(_told(setting))], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, limit: float) -> dict[str, Any]:
        """What it finds, its exit status, and how long it took."""
        started = time.monotonic()
        try:
            said, _ = self._process.communicate("go\n", timeout=limit)
            status: int | str = self._process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            said, _ = self._process.communicate()
            status = f"stopped after {limit:.0f} s"
        lines = said.splitlines()
        found = [json.loads(line.removeprefix(_FOUND)) for line in lines if line.startswith(_FOUND)]
        result = {"status": status, "seconds": round(time.monotonic() - started, 1), "found": found}
        if status != 0:
            result["said"] = [line for line in lines if not line.startswith(_FOUND)][-25:]
        return result

    def stop(self) -> None:
        """End it unheard."""
        self._process.kill()
        self._process.wait()


def main(argv: Sequence[str]) -> int:
    """``python -m pipelines.bench gpu --out DIR``."""
    parser = output.parser("gpu", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file for what is found")
    parser.add_argument("--scratch", type=Path, required=True, metavar="DIR", help="folder for images and stores")
    parser.add_argument("--data", help="folder of images for the engine; default: smooth synthetic ones")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--precision", default="mixed", choices=cli.choices_of(Precision), help="of igstore")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure")
    parser.add_argument("--seconds", type=float, default=600, help="in all")
    parser.add_argument("--rehearse", action="store_true", help="run every part in little, on a CPU")
    options = parser.parse_args(argv)
    device = torch.device("cpu") if options.rehearse else find_device(options.device)
    sizes = _REHEARSAL if options.rehearse else Sizes()
    options.scratch.mkdir(parents=True, exist_ok=True)
    setting = Setting(device, options.precision, options.data, options.scratch, sizes)
    started = time.monotonic()
    results: dict[str, Any] = {}
    waiting = [_Process(options.parts[0], setting)]
    for place, name in enumerate(options.parts):
        process = waiting.pop()
        if place + 1 < len(options.parts):
            waiting.append(_Process(options.parts[place + 1], setting))
        left = options.seconds - (time.monotonic() - started)
        if left < 5:
            process.stop()
            results[name] = {"status": "no time left"}
        else:
            results[name] = process.run(min(left, PARTS[name][1] * (5 if options.rehearse else 1)))
        options.out.write_text(json.dumps(results, indent=1))
        cli.say(f"{time.monotonic() - started:6.1f} s  {name}: {results[name]['status']}")
    return cli.DONE if all(result["status"] == 0 for result in results.values()) else cli.FAILED
