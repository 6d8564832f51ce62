"""The engine against captum's `IntegratedGradients`, and against what the machine could do.

Everyone gets the same uint8 pixels and returns float32 maps on the host: igstore as `igstore build` runs it, down to
the float16 map and its scale; the others as `pipelines.bench.peers` says.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from igstore import cli
from igstore.acceleration import Hoisted, accelerate, hoist_stem
from igstore.attribution import Attributor, available_memory, check_precision, gradient_bytes, numerics
from igstore.errors import UserError
from igstore.machine import find_device
from igstore.models import Classifier, load_classifier, normalise
from igstore.schema import BuildSpec, Precision
from pipelines.bench import machine, output, peers, rounds
from pipelines.bench.agreement import completeness_errors, mask_iou
from pipelines.bench.floor import Floor, count_work
from pipelines.bench.peers import Maps, Pixels
from pipelines.bench.pictures import pictures

logger = logging.getLogger(__name__)

_LARGEST_BATCH = {"cpu": 64, "cuda": 512}  # of those that are tried for captum
PEERS = {
    "captum": "captum, its best internal_batch_size",
    "captum_one_batch": "captum, all steps of an image at once, as Quantus calls it",
    "step_loop": "a loop over steps, as Tianhong Dai's implementation",
}


def compare(
    classifier: Classifier,
    pixels: Pixels,
    *,
    n_steps: int,
    device: torch.device,
    precision: Precision = "float32",
    batch_size: int | None = None,
    others: Sequence[str] = (),
    repeats: int = 3,
    seconds: float = 150,
) -> dict[str, Any]:
    """Time everyone, compare the maps with float32 captum's, and relate the speed to the floor.

    Every turn begins with one image that is not timed.

    Parameters
    ----------
    classifier, pixels, n_steps, device
        The work: uint8 (image, channel, y, x).
    precision, batch_size
        Of igstore; None sizes batches as a build does. Captum runs as it comes: on a GPU, with tf32 convolutions.
    others
        More of `PEERS` than captum.
    repeats, seconds
        As `pipelines.bench.rounds.take_turns`.
    """
    network = peers.network_as_it_comes(classifier, device)
    run_captum = functools.partial(
        peers.captum, network, preprocessing=classifier.preprocessing, n_steps=n_steps, device=device
    )
    fitting = _pairs_that_fit(classifier, network, device)
    captum_batch = best_captum_batch(classifier, network, pixels, n_steps=n_steps, device=device, fitting=fitting)
    attributor = Attributor(classifier, spec(classifier, n_steps, precision), device=device, batch_size=batch_size)
    contenders: dict[str, Callable[[Pixels], Maps]] = {
        "igstore": functools.partial(_maps, attributor),
        "captum": functools.partial(run_captum, batch_size=captum_batch),
        "captum_one_batch": functools.partial(run_captum, batch_size=n_steps),
        "step_loop": lambda pixels: peers.step_loop(
            network, pixels, classifier.preprocessing, n_steps=n_steps, device=device
        ),
    }
    if n_steps > fitting:
        logger.warning("%d steps at once do not fit into memory: captum_one_batch is left out", n_steps)
        del contenders["captum_one_batch"]
    chosen = {name: run for name, run in contenders.items() if name in ("igstore", "captum", *others)}
    timed = rounds.take_turns(
        {name: functools.partial(run, pixels) for name, run in chosen.items()},
        repeats=repeats,
        seconds=seconds,
        # or each would be charged for memory that another one's turn gave back to the system
        before=lambda name: chosen[name](pixels[:1]),
    )
    with numerics("float32", device):
        # on a CPU captum as it comes is float32 already
        reference = timed.results["captum"][0] if device.type == "cpu" else run_captum(pixels, batch_size=captum_batch)
        differences = _output_differences(network, pixels, classifier)
    evaluations = len(pixels) * n_steps
    floor = _floor(classifier, device, precision, attributor.batch_size)
    evals_per_s = evaluations / timed.median("igstore")
    maps = {name: results[0] for name, results in timed.results.items()}
    iou = mask_iou(maps["igstore"], reference)
    return {
        "precision": precision,
        "batch_size": attributor.batch_size,
        "captum_batch_size": captum_batch,
        "rounds": timed.count,
        "seconds": timed.seconds,
        "speedup_vs_captum": timed.times_as_long("captum", "igstore"),
        "speedup_vs": {name: timed.times_as_long(name, "igstore") for name in chosen if name != "igstore"},
        "mask_iou_p50": float(iou.mean()),
        "mask_iou_p50_min": float(iou.min()),
        "mask_iou_p50_of": {name: float(mask_iou(maps[name], reference).mean()) for name in chosen},
        "completeness_error_median": float(np.median(completeness_errors(maps["igstore"], differences))),
        "captum_completeness_error_median": float(np.median(completeness_errors(reference, differences))),
        "evals_per_s": evals_per_s,
        "evals_per_s_of": {name: evaluations / timed.median(name) for name in chosen},
        "flops_per_eval": floor.flops,
        "bytes_per_eval": floor.n_bytes,
        "matrix_rate": floor.matrix_rate,
        "copy_rate": floor.copy_rate,
        "limited_by": floor.limited_by,
        "limit_evals_per_s": 1 / floor.seconds,
        "fraction_of_limit": evals_per_s * floor.seconds,
    }


def spec(classifier: Classifier, n_steps: int, precision: Precision) -> BuildSpec:
    """The settings of a build that keeps no pixels."""
    return BuildSpec(
        model=classifier.name,
        weights=classifier.weights,
        weights_sha256=classifier.weights_sha256,
        preprocessing=classifier.preprocessing,
        images_fingerprint="",
        n_steps=n_steps,
        precision=precision,
        pixels=False,
    )


def _maps(attributor: Attributor, pixels: Pixels) -> Maps:
    unknown = np.full(len(pixels), -1, np.int32)
    names = [f"picture {index}" for index in range(len(pixels))]
    arrays = attributor(pixels, unknown, names, [""] * len(pixels))
    return arrays["attribution"].astype(np.float32) * arrays["scale"][:, None, None]


def _output_differences(network: nn.Module, pixels: Pixels, classifier: Classifier) -> Any:
    """f(x) - f(black) of each image's predicted class, one image at a time: float64 (image,)."""
    device = next(network.parameters()).device
    found = []
    for image in pixels:
        both = torch.from_numpy(np.stack([image, np.zeros_like(image)])).to(device)
        with torch.no_grad():
            of_image, of_black = network(normalise(both, classifier.preprocessing)).double()
        target = of_image.argmax()
        found.append(float(of_image[target] - of_black[target]))
    return np.array(found)


def _floor(classifier: Classifier, device: torch.device, precision: Precision, batch_size: int) -> Floor:
    image = torch.zeros(1, 3, *classifier.preprocessing.crop)
    accelerated = accelerate(classifier.network, image, own_convolutions=device.type == "cpu")
    network = hoist_stem(accelerated, image)
    if isinstance(network, Hoisted):  # once an image is not once a step
        image, network = network.stem(image), network.body
    item_bytes = 2 if precision in ("float16", "mixed") else 4
    flops, n_bytes = count_work(network, image.shape[1:], batch_size=batch_size, item_bytes=item_bytes)
    return Floor(flops, n_bytes, machine.matrix_rate(device, precision), machine.copy_rate(device))


# --- Captum at its best


def _pairs_that_fit(classifier: Classifier, network: nn.Module, device: torch.device) -> int:
    """How many (image, step) pairs captum may evaluate at once, so that half of the free memory holds them."""
    probe = torch.zeros(1, 3, *classifier.preprocessing.crop, device=device)
    return available_memory(device) // 2 // gradient_bytes(network, probe)


def best_captum_batch(
    classifier: Classifier, network: nn.Module, pixels: Pixels, *, n_steps: int, device: torch.device, fitting: int
) -> int:
    """The `internal_batch_size` at which captum is fastest, of those that divide the steps, or images, evenly.

    At most `fitting` pairs are tried.
    """
    candidates = candidate_batches(n_steps, len(pixels), largest=min(fitting, _LARGEST_BATCH[device.type]))

    def seconds_per_pair(batch_size: int) -> float:
        """Of all steps of an image, or of as many images as a batch holds."""
        n_images = max(1, batch_size // n_steps)
        started = time.perf_counter()
        peers.captum(
            network,
            pixels[:n_images],
            classifier.preprocessing,
            n_steps=n_steps,
            batch_size=batch_size,
            device=device,
        )
        return (time.perf_counter() - started) / (n_images * n_steps)

    seconds_per_pair(candidates[0])  # warms up
    return fastest_batch(candidates, seconds_per_pair, times=3)


def candidate_batches(n_steps: int, n_images: int, *, largest: int) -> list[int]:
    """Batch sizes worth trying, ascending: parts of an image's steps, or several images. Captum wants 2 or more."""
    parts = [-(-n_steps // count) for count in (16, 8, 4, 2, 1)]
    several = [n_steps * images for images in (2, 4, 8, 16) if images <= n_images]
    return sorted({size for size in [*parts, *several] if 2 <= size <= largest}) or [2]


def fastest_batch(candidates: Sequence[int], seconds_per_pair: Callable[[int], float], *, times: int) -> int:
    """The candidate with the least time a pair, each being tried so many times."""
    return min(candidates, key=lambda size: min(seconds_per_pair(size) for _ in range(times)))


# --- The command


def main(argv: Sequence[str]) -> int:
    """``python -m pipelines.bench engine --model NAME ...``."""
    parser = output.parser("engine", __doc__)
    parser.add_argument("--model", default="resnet50", help="as igstore build takes it")
    parser.add_argument("--weights", help="as igstore build takes it; default: the model's own")
    parser.add_argument("--data", help="folder or tar of images; default: smooth synthetic ones")
    parser.add_argument("--images", type=cli.positive, default=2, metavar="N", help="how many images")
    parser.add_argument("--n-steps", type=cli.positive, default=50, metavar="M", help="gradient evaluations an image")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", default="float32", choices=cli.choices_of(Precision), help="of igstore")
    parser.add_argument("--batch-size", type=cli.positive, metavar="N", help="of igstore; default: as a build does")
    parser.add_argument(
        "--peers", nargs="*", default=[], choices=[name for name in PEERS if name != "captum"], help="beside captum"
    )
    rounds.add_options(parser, seconds=150)
    options = parser.parse_args(argv)
    device = find_device(options.device)
    check_precision(options.precision, device)
    if options.n_steps < 2:
        raise UserError("captum wants at least 2 steps: --n-steps 2 or more")
    classifier = load_classifier(options.model, options.weights)
    pixels = pictures(options.data, classifier.preprocessing, options.images)
    ran_on = machine.describe(device)
    cli.say(machine.in_words(ran_on), f"{options.model}, {len(pixels)} images, {options.n_steps} steps", "")
    found = compare(
        classifier,
        pixels,
        n_steps=options.n_steps,
        device=device,
        precision=options.precision,
        batch_size=options.batch_size,
        others=options.peers,
        repeats=options.repeats,
        seconds=options.seconds,
    )
    labels = {"igstore": f"igstore, {options.precision}, batches of {found['batch_size']}", **PEERS}
    labels["captum"] += f" ({found['captum_batch_size']})"
    rows = [
        {
            "contender": labels[name],
            "gradients/s": rate,
            "spread": f"{min(found['seconds'][name]):.3g} to {max(found['seconds'][name]):.3g} s",
            "time / igstore's": 1.0 if name == "igstore" else found["speedup_vs"][name],
            "IoU p=50": found["mask_iou_p50_of"][name],
        }
        for name, rate in found["evals_per_s_of"].items()
    ]
    cli.say(
        *output.table(rows),
        "",
        f"floor: {found['flops_per_eval'] / 1e9:.2f} GFLOP at {found['matrix_rate'] / 1e9:,.0f} GFLOP/s, "
        f"{found['bytes_per_eval'] / 1e6:.0f} MB at {found['copy_rate'] / 1e9:.1f} GB/s: "
        f"{found['limit_evals_per_s']:,.1f} gradients/s, limited by {found['limited_by']}; "
        f"igstore is at {100 * found['fraction_of_limit']:.0f}%",
        f"completeness error, median: igstore {found['completeness_error_median']:.3g}, "
        f"float32 captum {found['captum_completeness_error_median']:.3g}",
    )
    settings = {"model": options.model, "weights": classifier.weights, "data": options.data or "synthetic"}
    output.say_result(
        {
            "benchmark": "engine",
            "machine": ran_on,
            **settings,
            "n_images": len(pixels),
            "n_steps": options.n_steps,
            **found,
        }
    )
    return cli.DONE
