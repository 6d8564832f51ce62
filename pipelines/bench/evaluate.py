"""All cells of an evaluation, from the store to the tables, against a bare loop of as many forward passes.

The loop runs the same network on as many batches of the same size, of images that are on the device already, and keeps
freed memory as the evaluation does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import igstore
from igstore import cli
from igstore.acceleration import accelerate
from igstore.attribution import numerics
from igstore.datasets import MaskedBatches
from igstore.machine import find_device, freed_memory_kept
from igstore.models import Classifier, load_classifier
from igstore.schema import BUILT, ForwardPrecision
from igstore.storage import StoreReader
from pipelines.bench import machine, output, rounds

_BATCH = {"cpu": 32, "cuda": 128}
# the article's tables, and their control
CELLS: dict[str, Any] = {"p": (90, 70, 50, 30), "keep": ("top", "bottom"), "order": ("attribution", "random")}


def bare_loop(
    classifier: Classifier,
    store: StoreReader,
    *,
    limit: int,
    n_passes: int,
    batch_size: int,
    device: torch.device,
    precision: ForwardPrecision,
) -> Callable[[], int]:
    """A function that shows the store's first `limit` images to the network `n_passes` times and counts the images.

    Everything is on the device before it is called.
    """
    own = classifier.preprocessing
    first = np.isin(np.arange(store.n_images), np.flatnonzero(store.status == BUILT)[:limit])
    with numerics("float32", device):
        probe = torch.zeros(1, 3, *own.crop, device=device)
        network = accelerate(classifier.network, probe, own_convolutions=precision == "float32")
    dtype = torch.float16 if precision == "float16" else torch.float32
    network.to(dtype)
    batches = [
        batch.unmasked(own).to(dtype, memory_format=torch.channels_last)
        for batch in MaskedBatches(store, [], networks=[own], where=first, device=device, batch_size=batch_size)
    ]

    def run() -> int:
        with (
            numerics("tf32" if precision == "tf32" else "float32", device),
            torch.inference_mode(),
            freed_memory_kept(),
        ):
            for _ in range(n_passes):
                for batch in batches:
                    network(batch)
        machine.synchronise(device)
        return n_passes * sum(map(len, batches))

    return run


def measure(
    classifier: Classifier,
    store: StoreReader,
    *,
    limit: int,
    device: str,
    precision: ForwardPrecision = "float32",
    batch_size: int | None = None,
    repeats: int,
    seconds: float,
) -> dict[str, Any]:
    """Time an evaluation of `CELLS` and the bare loop by turns; ``overhead`` 0.1 is 10% more than the loop."""
    on = find_device(device)
    size = _BATCH[on.type] if batch_size is None else batch_size

    def whole() -> int:
        found = igstore.evaluate(
            store.root, models=[classifier], limit=limit, device=device, batch_size=size, precision=precision, **CELLS
        )
        return len(found.rows)

    n_cells = math.prod(map(len, CELLS.values()))
    loop = bare_loop(
        classifier, store, limit=limit, n_passes=1 + n_cells, batch_size=size, device=on, precision=precision
    )
    timed = rounds.take_turns({"igstore": whole, "bare loop": loop}, repeats=repeats, seconds=seconds)
    n_forward = timed.results["bare loop"][0]
    return {
        "n_cells": n_cells,
        "n_forward_passes": n_forward,
        "batch_size": size,
        "rounds": timed.count,
        "seconds": timed.seconds,
        "images_per_s": {name: n_forward / timed.median(name) for name in timed.seconds},
        "overhead": timed.times_as_long("igstore", "bare loop") - 1,
    }


def main(argv: Sequence[str]) -> int:
    """``python -m pipelines.bench evaluate --store S [--model NAME]``."""
    parser = output.parser("evaluate", __doc__)
    parser.add_argument("--store", type=Path, required=True, help="a ranked store with pixels and labels")
    parser.add_argument("--model", help="as igstore evaluate takes it; default: the store's own")
    parser.add_argument("--weights", help="of the model; default: its own")
    parser.add_argument("--limit", type=cli.positive, default=64, metavar="N", help="only the first N images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--batch-size", type=cli.positive, metavar="N", help="images at once; default: as evaluate does"
    )
    parser.add_argument(
        "--precision", default="float32", choices=cli.choices_of(ForwardPrecision), help="as igstore evaluate takes it"
    )
    rounds.add_options(parser, seconds=150)
    options = parser.parse_args(argv)
    store = StoreReader(options.store)
    classifier = load_classifier(options.model or store.spec.model, options.weights)
    ran_on = machine.describe(find_device(options.device))
    found = measure(
        classifier,
        store,
        limit=options.limit,
        device=options.device,
        precision=options.precision,
        batch_size=options.batch_size,
        repeats=options.repeats,
        seconds=options.seconds,
    )
    cli.say(
        machine.in_words(ran_on),
        f"{classifier.name}, {found['n_cells']} cells and the unmasked images, batches of {found['batch_size']}",
        "",
    )
    cli.say(
        *output.table(
            [
                {
                    "what": name,
                    "images/s": rate,
                    "seconds": f"{min(found['seconds'][name]):.3g} to {max(found['seconds'][name]):.3g}",
                }
                for name, rate in found["images_per_s"].items()
            ]
        ),
        "",
        f"overhead {100 * found['overhead']:.1f}%, of {found['n_forward_passes']:,} forward passes",
    )
    output.say_result(
        {
            "benchmark": "evaluate",
            "machine": ran_on,
            "store": str(options.store),
            "model": classifier.name,
            "weights": classifier.weights,
            **found,
        }
    )
    return cli.DONE
