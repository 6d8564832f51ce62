"""Reading masked images, and what masks are made of, against what one would use instead, and against np.memmap.

In one torch thread, so that items a second without workers are items a second and core; only igstore's batches, which
read the next batch in a thread of their own, take up to two.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igstore import cli, layout
from igstore.devices import find_device
from igstore.reader import StoreReader
from pipelines.bench import fixtures, machine, output, rounds, sources
from pipelines.bench.sources import BATCH, Batches, Data, Order

_RUN_SECONDS = 0.5  # what a run should take, of files in the page cache
_SEED = 0


def order_of(kind: str, n_images: int, n_items: int) -> Order:
    """Positions to read: ``sequential`` or ``random``, every image once before any comes again."""
    if kind == "sequential":
        return np.arange(n_items, dtype=np.int64) % n_images
    random = np.random.default_rng(_SEED)
    passes = [random.permutation(n_images) for _ in range(-(-n_items // n_images))]
    return np.concatenate(passes)[:n_items]


def drop_from_cache(folders: Sequence[Path]) -> None:
    """Ask the system to forget every file below these folders, so that the disk has to be read again.

    It keeps what a process has mapped into memory, so everything must be closed.
    """
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)  # what is not on the disk yet cannot be forgotten
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)


def exhaust(batches: Batches, data: Data, order: Order, workers: int) -> None:
    """Read everything, to the device."""
    for _ in batches(data, order, workers):
        pass
    machine.synchronise(data.device)


def measure(data: Data, *, workers: Sequence[int], repeats: int, seconds: float) -> list[dict[str, Any]]:
    """Items a second of every source, in every order, with every number of workers, from a warm and a cold cache.

    From a cold cache each image is read at most once.
    """
    items = {name: _items_for(batches, data) for name, batches in (sources.MASKED | sources.RAW).items()}
    settings = [
        (group, kind, n_workers, cache)
        for group in ("masked", "raw")
        for kind in ("sequential", "random")
        for n_workers in workers
        for cache in ("warm", "cold")
    ]
    rows = []
    for group, kind, n_workers, cache in settings:
        contenders = sources.MASKED if group == "masked" else sources.RAW
        if kind == "random" or n_workers:
            contenders = {name: run for name, run in contenders.items() if name not in sources.IN_ORDER_ONLY}
        counts = {name: items[name] if cache == "warm" else min(items[name], len(data.images)) for name in contenders}
        orders = {name: order_of(kind, len(data.images), count) for name, count in counts.items()}
        folders = [data.store, data.copies, data.folder]
        timed = rounds.take_turns(
            {name: partial(exhaust, run, data, orders[name], n_workers) for name, run in contenders.items()},
            repeats=repeats,
            seconds=seconds / len(settings),
            before=partial(drop_from_cache, folders) if cache == "cold" else lambda: None,
        )
        rows += [
            {
                "reads": group,
                "order": kind,
                "workers": n_workers,
                "cache": cache,
                "source": name,
                "items_per_s": counts[name] / timed.median(name),
                "items": counts[name],
                "rounds": timed.count,
            }
            for name in contenders
        ]
    return rows


def _items_for(batches: Batches, data: Data) -> int:
    """How many items a run should read: as many as it reads in a while, at least a batch, at most 20 passes."""
    trial = order_of("sequential", len(data.images), min(BATCH, len(data.images)))
    exhaust(batches, data, trial, 0)
    started = time.perf_counter()
    exhaust(batches, data, trial, 0)
    rate = len(trial) / (time.perf_counter() - started)
    return int(np.clip(rate * _RUN_SECONDS, len(trial), 20 * len(data.images)))


def ratio(rows: Sequence[dict[str, Any]], source: str, other: str, **setting: Any) -> float | None:
    """How many times as fast one source is as another in such a setting as ``order="random"``; None if not measured."""
    rates = {
        row["source"]: row["items_per_s"] for row in rows if all(row[name] == value for name, value in setting.items())
    }
    return rates[source] / rates[other] if source in rates and other in rates else None


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(argv: Sequence[str]) -> int:
    """``python -m pipelines.bench reader --store S``."""
    parser = output.parser("reader", __doc__)
    parser.add_argument("--store", type=Path, required=True, help="a ranked store with pixels; it is left as it is")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="the same images as ImageFolder wants them; default: JPEG files of the store's pixels, which are smaller "
        "than originals and so faster to decode",
    )
    parser.add_argument("--limit", type=cli.positive, default=2000, metavar="N", help="only the first N images")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], metavar="N", help="worker processes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where to make copies; default: the system's")
    rounds.add_options(parser, seconds=200)
    options = parser.parse_args(argv)
    device = find_device(options.device)
    reader = StoreReader(options.store)
    n_images = min(options.limit, reader.n_images)
    n_bytes = n_images * (2 * layout.image_bytes(reader.spec) + 200_000)
    with _one_thread(), fixtures.scratch(options.scratch, n_bytes) as scratch:
        ran_on = machine.describe(device)
        data = sources.prepare(options.store, scratch, limit=n_images, folder=options.images, device=device)
        cli.say(machine.in_words(ran_on), f"{len(data.images)} images of {options.store}, batches of {BATCH}", "")
        rows = measure(data, workers=options.workers, repeats=options.repeats, seconds=options.seconds)
    shown = [{name.replace("items_per_s", "items/s"): value for name, value in row.items()} for row in rows]
    cli.say(*output.table(shown))
    warm: dict[str, Any] = {"cache": "warm", "workers": 0}
    in_order = {**warm, "order": "sequential"}
    output.say_result(
        {
            "benchmark": "reader",
            "machine": ran_on,
            "store": str(options.store),
            "images": str(options.images) if options.images else "JPEG files of the store's pixels",
            "n_images": len(data.images),
            "rows": rows,
            "masked_vs_imagefolder": ratio(
                rows, "MaskedImageNet", "ImageFolder", reads="masked", order="random", **warm
            ),
            "batches_vs_imagefolder": ratio(rows, "MaskedBatches", "ImageFolder", reads="masked", **in_order),
            "device_vs_memmap": ratio(rows, "MaskedBatches, unmasked", "np.memmap", reads="raw", **in_order),
            "reader_vs_memmap": ratio(rows, "StoreReader", "np.memmap", reads="raw", order="random", **warm),
        }
    )
    return cli.DONE
