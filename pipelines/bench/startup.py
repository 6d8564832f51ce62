"""What one waits for, and what one needs: imports, `igstore info`, bytes on disk, the peak memory of a build."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import igstore
from igstore import cli
from igstore.schema import Preprocessing
from igstore.storage import StoreReader
from pipelines.bench import fixtures, machine, output, rounds
from pipelines.bench.fresh import in_fresh_process
from pipelines.bench.pictures import smooth_pictures

_PREPROCESSING = Preprocessing(resize=256, crop=(224, 224))
_DISTINCT = 16  # pictures; their files are repeated


def waits(store: Path, *, repeats: int, seconds: float) -> rounds.Rounds:
    """Seconds that new processes take, by turns: Python alone, imports of igstore, `igstore info` of a store."""
    commands = {
        "python": ["-c", "pass"],
        "import igstore": ["-c", "import igstore"],
        "import open_store": ["-c", "from igstore import open_store"],
        "import MaskedImageNet": ["-c", "from igstore import MaskedImageNet"],
        "igstore info": ["-m", "igstore", "info", str(store)],
    }
    return rounds.take_turns(
        {name: partial(_run_python, *arguments) for name, arguments in commands.items()},
        repeats=repeats,
        seconds=seconds,
    )


def imports_torch(store: Path) -> bool:
    """Whether reading a store's figures, as `igstore info` does, imports torch."""
    script = "import sys, igstore; igstore.store_info(sys.argv[1]); print('torch' in sys.modules)"
    return _run_python("-c", script, str(store)).strip() == "True"


def _run_python(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


def bytes_on_disk(store: Path) -> dict[str, float]:
    """Bytes an image of each array of a store, of its rankings, and of all the rest, which is metadata and scalars."""
    n_images = StoreReader(store).n_images
    found: dict[str, float] = {"attribution": 0.0, "pixels": 0.0, "ranks": 0.0, "the rest": 0.0}
    for path in store.rglob("*"):
        if path.is_file():
            part = path.relative_to(store).parts[0]
            found[part if part in found else "the rest"] += path.stat().st_size / n_images
    return found


def small_network() -> torch.nn.Module:
    """A network that costs next to nothing, so that a build is all reading and writing."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 8, stride=8),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 1000),
    ).eval()


def build(folder: str, store: str, limit: int) -> None:
    """Build a store of the first `limit` images of a folder with `small_network`, few steps each."""
    igstore.build_store(small_network(), folder, store, preprocessing=_PREPROCESSING, n_steps=4, limit=limit)


def peak_of_builds(scratch: Path, sizes: Sequence[int]) -> dict[int, int]:
    """Peak memory in bytes of builds of so many images, each in its own process; they leave ``scratch/N.zarr``."""
    folder = scratch / "images"
    photographs = smooth_pictures(_DISTINCT, (375, 500))  # as large as ImageNet's
    for first in range(0, max(sizes), _DISTINCT):
        fixtures.write_jpegs(photographs[: max(sizes) - first], folder, first=first)
    return {
        size: in_fresh_process(build, str(folder), str(scratch / f"{size}.zarr"), size).peak_bytes for size in sizes
    }


def main(argv: Sequence[str]) -> int:
    """``python -m pipelines.bench startup [--store S]``."""
    parser = output.parser("startup", __doc__)
    parser.add_argument("--store", type=Path, help="a store to look at; default: the last one built here")
    parser.add_argument(
        "--images", type=cli.positive, nargs="+", default=[1000, 3000], metavar="N", help="sizes of the builds"
    )
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where to make stores; default: the system's")
    rounds.add_options(parser, seconds=60)
    options = parser.parse_args(argv)
    ran_on = machine.describe(torch.device("cpu"))
    cli.say(machine.in_words(ran_on), "")
    with fixtures.scratch(options.scratch, 400_000 * (sum(options.images) + max(options.images))) as scratch:
        peaks = peak_of_builds(scratch, options.images)
        store = options.store or scratch / f"{options.images[-1]}.zarr"
        timed = waits(store, repeats=options.repeats, seconds=options.seconds)
        sizes = bytes_on_disk(store)
        with_torch = imports_torch(store)
    seconds = {name: timed.median(name) for name in timed.seconds}
    without_pixels = sum(sizes.values()) - sizes["pixels"]
    cli.say(
        *output.table([{"process": name, "seconds": value} for name, value in seconds.items()]),
        f"igstore info does {'' if with_torch else 'not '}import torch",
        "",
        *output.table([{"on disk": name, "bytes an image": value} for name, value in sizes.items()]),
        f"with pixels {cli.size(sum(sizes.values()))} an image, without {cli.size(without_pixels)}",
        "",
        *output.table([{"images built": size, "peak memory": cli.size(peak)} for size, peak in peaks.items()]),
    )
    result: dict[str, Any] = {
        "benchmark": "startup",
        "machine": ran_on,
        "store": str(options.store) if options.store else "synthetic",
        "python_seconds": seconds["python"],
        "import_seconds": seconds["import igstore"] - seconds["python"],
        "open_store_seconds": seconds["import open_store"] - seconds["python"],
        "dataset_seconds": seconds["import MaskedImageNet"] - seconds["python"],
        "info_seconds": seconds["igstore info"],
        "imports_torch": with_torch,
        "bytes_per_image": sum(sizes.values()),
        "bytes_per_image_without_pixels": without_pixels,
        "bytes_per_image_of": sizes,
        "build_peak_bytes": peaks,
    }
    output.say_result(result)
    return cli.DONE
