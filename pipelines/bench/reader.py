"""Reading masked images, and what masks are made of, against what one would use instead, and against np.memmap.

In one torch thread, so that items a second without workers are items a second and core; only igstore's batches, which
read the next batch in a thread of their own, take up to two.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igstore import cli
from igstore.machine import find_device
from igstore.storage import StoreReader, layout
from pipelines.bench import fixtures, machine, output, rounds, sources
from pipelines.bench.sources import BATCH, Batches, Data, Order

_CACHES = ("warm", "cold") if hasattr(os, "posix_fadvise") else ("warm",)
_MOST_PASSES = 20  # over the images, in a run from a warm cache


def order_of(kind: str, n_images: int, n_items: int) -> Order:
    """Positions to read: ``sequential`` or ``random``, every image once before any comes again."""
    if kind == "sequential":
        return np.arange(n_items, dtype=np.int64) % n_images
    random = np.random.default_rng(0)
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

    Returns
    -------
    One row for each setting: ``reads`` (masked or raw), ``order``, ``workers``, ``cache``, ``rounds``, and by source
    ``items`` (in a run) and ``items_per_s``.
    """
    groups = {"masked": sources.MASKED, "raw": sources.RAW}
    settings = list(itertools.product(groups, ("sequential", "random"), workers, _CACHES))
    rates = {name: _rate(batches, data) for group in groups.values() for name, batches in group.items()}
    n_images = len(data.images)
    paths = [data.store, data.copies, data.folder]
    rows = []
    for reads, kind, n_workers, cache in settings:
        is_plain = kind == "sequential" and n_workers == 0
        names = [name for name in groups[reads] if is_plain or name not in sources.IN_ORDER_ONLY]
        most = n_images if cache == "cold" else _MOST_PASSES * n_images
        items = {
            name: int(np.clip(rates[name] * _run_seconds(n_workers), min(BATCH, n_images), most)) for name in names
        }
        timed = rounds.take_turns(
            {
                name: partial(exhaust, groups[reads][name], data, order_of(kind, n_images, items[name]), n_workers)
                for name in names
            },
            repeats=repeats,
            seconds=seconds / len(settings),
            before=(lambda _: drop_from_cache(paths)) if cache == "cold" else (lambda _: None),
        )
        setting = {"reads": reads, "order": kind, "workers": n_workers, "cache": cache, "rounds": timed.count}
        rows.append({**setting, "items": items, "items_per_s": {n: items[n] / timed.median(n) for n in names}})
    return rows


def _run_seconds(workers: int) -> float:
    """What a run from a warm cache should take; processes take their time to start."""
    return 1.5 if workers else 0.5


def _rate(batches: Batches, data: Data) -> float:
    """Items a second of a first look, the second one of two."""
    trial = order_of("sequential", len(data.images), min(BATCH, len(data.images)))
    for _ in range(2):
        started = time.perf_counter()
        exhaust(batches, data, trial, 0)
    return len(trial) / (time.perf_counter() - started)


def ratio(rows: Sequence[dict[str, Any]], source: str, other: str, **setting: Any) -> float | None:
    """How many times as fast one source is as another in such a setting as ``order="random"``; None if not measured."""
    for row in rows:
        rates = row["items_per_s"]
        if {source, other} <= set(rates) and all(row[name] == value for name, value in setting.items()):
            return float(rates[source] / rates[other])
    return None


def _tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Items a second as one table for each group of sources, a column for each source."""
    lines = []
    for reads, group in (("masked", sources.MASKED), ("raw", sources.RAW)):
        shown = [
            {name: row[name] for name in ("reads", "order", "workers", "cache")}
            | {name: row["items_per_s"].get(name) for name in group}
            for row in rows
            if row["reads"] == reads
        ]
        lines += ["items a second", *output.table(shown), ""]
    return lines


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
    cli.say(*_tables(rows))
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
