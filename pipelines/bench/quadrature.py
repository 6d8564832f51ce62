"""What a step buys: completeness error and mask IoU against gradient evaluations, for every rule.

The IoU is that of the p=50 masks with those of a much finer rule; its standard error says how far other images of the
same kind may differ. Nothing is timed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from igstore import cli
from igstore.acceleration import accelerate
from igstore.attribution import (
    METHOD_CHOICES,
    METHODS,
    Attributions,
    integrated_gradients,
    logits,
    numerics,
    read_rules,
)
from igstore.machine import find_device
from igstore.models import Classifier, load_classifier, normalise
from igstore.schema import LearnedRule
from pipelines.bench import machine, output
from pipelines.bench.agreement import mask_iou
from pipelines.bench.peers import Maps, Pixels
from pipelines.bench.pictures import pictures

_BATCH = {"cpu": 16, "cuda": 128}
_GOOD_ERROR = 0.05  # the paper that introduced Integrated Gradients asks for completeness within 5%
_GOOD_IOU = 0.9


def measure(
    classifier: Classifier,
    pixels: Pixels,
    *,
    methods: Sequence[str],
    steps: Sequence[int],
    reference_steps: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Attribute the images with every rule and number of steps; black baseline, target the predicted class.

    A file of learned rules, ``learned:FILE``, is tried with the numbers of steps that it has rules for. The reference
    is Gauss-Legendre's rule with `reference_steps`.

    Returns
    -------
    One row for each rule and number of steps: ``method``, ``n_steps``, ``completeness_error_median``,
    ``mask_iou_p50`` (the mean), ``mask_iou_p50_error`` (its standard error, NaN of one image) and ``mask_iou_p50_min``.
    """
    preprocessing = classifier.preprocessing
    inputs = normalise(torch.from_numpy(pixels).to(device), preprocessing)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    black = normalise(torch.zeros(pixels.shape, dtype=torch.uint8, device=device), preprocessing)
    black = black.contiguous(memory_format=torch.channels_last)
    with numerics("float32", device):
        network = accelerate(classifier.network, inputs[:1])
        targets = logits(network, inputs, len(inputs)).argmax(dim=1)

    def attribute(method: Any, n_steps: int) -> Attributions:
        return integrated_gradients(
            network, inputs, black, targets, method=method, n_steps=n_steps, batch_size=_BATCH[device.type]
        )

    reference = _maps(attribute("gausslegendre", reference_steps))
    rows = []
    for method in methods:
        for n_steps, quadrature in _rules(method, steps).items():
            found = attribute(quadrature, n_steps)
            iou = mask_iou(_maps(found), reference)
            rows.append(
                {
                    "method": method,
                    "n_steps": n_steps,
                    "completeness_error_median": float(np.median(found.completeness_error.cpu().numpy())),
                    "mask_iou_p50": float(iou.mean()),
                    "mask_iou_p50_error": float(iou.std(ddof=1) / len(iou) ** 0.5) if len(iou) > 1 else math.nan,
                    "mask_iou_p50_min": float(iou.min()),
                }
            )
    return rows


def _rules(method: str, steps: Sequence[int]) -> dict[int, str | LearnedRule]:
    """What `integrated_gradients` takes for the method, by number of steps."""
    if method.startswith("learned:"):
        return {len(learned.nodes): learned for learned in read_rules(method.removeprefix("learned:"))}
    return dict.fromkeys(steps, method)


def _maps(found: Attributions) -> Maps:
    maps: Maps = found.maps.cpu().numpy()
    return maps


def fewest_steps(rows: Sequence[dict[str, Any]], method: str) -> dict[str, int | None]:
    """The fewest steps measured at which a rule is good enough, by completeness and by IoU; None where none is."""
    own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["n_steps"])
    good = {
        "error_within_5_percent": [row["n_steps"] for row in own if row["completeness_error_median"] <= _GOOD_ERROR],
        "iou_of_0.9": [row["n_steps"] for row in own if row["mask_iou_p50"] >= _GOOD_IOU],
    }
    return {name: min(steps, default=None) for name, steps in good.items()}


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw both measures against the number of gradient evaluations, a line for each rule."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    error, iou = figure.subplots(1, 2)
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        steps = [row["n_steps"] for row in own]
        error.plot(steps, [row["completeness_error_median"] for row in own], marker=".", label=method)
        iou.plot(steps, [row["mask_iou_p50"] for row in own], marker=".", label=method)
    every = sorted({row["n_steps"] for row in rows})
    error.set(xscale="log", yscale="log", ylabel="completeness error, median")
    iou.set(xscale="log", ylabel="IoU of the p=50 masks, mean")
    for axes in (error, iou):
        axes.set_xlabel("gradient evaluations an image")
        axes.set_xticks(every, [str(n_steps) for n_steps in every])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    iou.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> int:
    """``python -m pipelines.bench quadrature --model NAME --data PATH``."""
    parser = output.parser("quadrature", __doc__)
    parser.add_argument("--model", default="efficientnet_lite0", help="as igstore build takes it; with real weights")
    parser.add_argument("--weights", help="as igstore build takes it; default: the model's own")
    parser.add_argument("--data", help="folder or tar of images; default: smooth synthetic ones, which say little")
    parser.add_argument("--n-images", type=cli.positive, default=4, metavar="N", help="how many of them, evenly spread")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        choices=METHOD_CHOICES,
        help="rules; learned ones on images that they were not fitted to",
    )
    parser.add_argument("--steps", type=cli.positive, nargs="+", default=[8, 16, 32, 64], metavar="M")
    parser.add_argument("--reference-steps", type=cli.positive, default=256, metavar="M", help="of gausslegendre")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="plot, such as quadrature.png or quadrature.svg")
    options = parser.parse_args(argv)
    device = find_device(options.device)
    classifier = load_classifier(options.model, options.weights)
    pixels = pictures(options.data, classifier.preprocessing, options.n_images)
    ran_on = machine.describe(device)
    cli.say(machine.in_words(ran_on), f"{options.model}, {len(pixels)} images", "")
    rows = measure(
        classifier,
        pixels,
        methods=options.methods,
        steps=sorted(set(options.steps)),
        reference_steps=options.reference_steps,
        device=device,
    )
    names = {
        "completeness_error_median": "error, median",
        "mask_iou_p50": "IoU, mean",
        "mask_iou_p50_error": "standard error",
        "mask_iou_p50_min": "IoU, lowest",
    }
    cli.say(*output.table([{names.get(name, name): value for name, value in row.items()} for row in rows]))
    if options.out:
        plot(rows, options.out, f"{options.model}, {len(pixels)} images")
        cli.say("", f"plot in {options.out}")
    output.say_result(
        {
            "benchmark": "quadrature",
            "machine": ran_on,
            "model": options.model,
            "weights": classifier.weights,
            "data": options.data or "synthetic",
            "n_images": len(pixels),
            "reference": f"gausslegendre, {options.reference_steps} steps",
            "rows": rows,
            "fewest_steps": {method: fewest_steps(rows, method) for method in options.methods},
        }
    )
    return cli.DONE
