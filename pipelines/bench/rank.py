"""Ranking, from a store's maps to its ranks: images a second and peak memory, each run in a process of its own.

The peer is what one would write in NumPy: scores by a padded reshape, ranks by a stable argsort, nothing written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from igstore import cli
from igstore.building import rank_store
from igstore.masks import block_grid
from igstore.storage import StoreReader, layout
from pipelines.bench import fixtures, machine, output, rounds
from pipelines.bench.fresh import Outcome, in_fresh_process

_FULL_SIZE = (5_000, 15_000, 50_000)


def rank_plainly(store: Path) -> tuple[int, list[NDArray[np.uint16]]]:
    """Rank the 3x3 blocks of a store's maps with NumPy alone, image by image.

    Returns
    -------
    How many images, and the ranks (block_y, block_x) of those of the first shard, to compare.
    """
    reader = StoreReader(store)
    maps = reader.array("attribution")
    height, width = reader.spec.preprocessing.crop
    n_y, n_x = block_grid(height, width, 3)
    n_images = 0
    first_ranks = []
    for shard in sorted(reader.records):
        for attribution in maps.shard(shard):
            positive = np.maximum(attribution.astype(np.float64), 0)
            padded = np.pad(positive, ((0, 3 * n_y - height), (0, 3 * n_x - width)))
            scores = padded.reshape(n_y, 3, n_x, 3).sum(axis=(1, 3)).ravel()
            order = np.argsort(-scores, kind="stable")
            ranks = np.empty(scores.size, np.uint16)
            ranks[order] = np.arange(scores.size, dtype=np.uint16)
            n_images += 1
            if shard == 0:
                first_ranks.append(ranks.reshape(n_y, n_x))
    return n_images, first_ranks


def measure(store: Path, folder: Path, *, with_peer: bool, repeats: int, seconds: float) -> dict[str, Any]:
    """Rank copies of a store, which share its maps, in turn with the peer; `folder` is for the copies."""
    n_copies = 0

    def ours() -> Outcome:
        nonlocal n_copies
        n_copies += 1
        return in_fresh_process(rank_store, fixtures.unranked_copy(store, folder / f"{store.name}-{n_copies}"))

    contenders = {"igstore": ours}
    if with_peer:
        contenders["numpy"] = lambda: in_fresh_process(rank_plainly, store)
    turns = rounds.take_turns(contenders, repeats=repeats, seconds=seconds)
    outcomes = {name: results[1:] for name, results in turns.results.items()}
    # without the start of the processes
    timed = rounds.Rounds({name: [one.seconds for one in runs] for name, runs in outcomes.items()}, outcomes)
    n_images = outcomes["igstore"][0].result.ranked
    return {
        "n_images": n_images,
        "rounds": timed.count,
        "seconds": timed.seconds,
        "images_per_s": n_images / timed.median("igstore"),
        "peak_bytes": max(one.peak_bytes for one in outcomes["igstore"]),
        "numpy_images_per_s": n_images / timed.median("numpy") if with_peer else None,
        "speedup_vs_numpy": timed.times_as_long("numpy", "igstore") if with_peer else None,
    }


def main(argv: Sequence[str]) -> int:
    """``python -m pipelines.bench rank --store S | --synthetic [N ...]``."""
    parser = output.parser("rank", __doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--store", type=Path, help="a store; it is left as it is")
    which.add_argument(
        "--synthetic",
        type=cli.positive,
        nargs="*",
        metavar="N",
        help=f"synthetic stores of so many 224x224 maps; without N, {' '.join(map(str, _FULL_SIZE))}",
    )
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where to make stores; default: the system's")
    rounds.add_options(parser, seconds=60)
    options = parser.parse_args(argv)
    ran_on = machine.describe(torch.device("cpu"))
    cli.say(machine.in_words(ran_on), "")
    runs = []
    if options.store:
        n_bytes = StoreReader(options.store).n_images * 75 * 75 * 6 * (options.repeats + 1)
        with fixtures.scratch(options.scratch, n_bytes) as folder:
            runs.append(
                measure(options.store, folder, with_peer=True, repeats=options.repeats, seconds=options.seconds)
            )
        spec = StoreReader(options.store).spec
    else:
        spec = fixtures.synthetic_spec()
        for place, n_images in enumerate(sorted(options.synthetic or _FULL_SIZE)):
            with fixtures.scratch(options.scratch, fixtures.synthetic_bytes(n_images)) as folder:
                fixtures.make_synthetic_store(folder / "store", n_images)
                runs.append(
                    measure(
                        folder / "store",
                        folder,
                        with_peer=place == 0,
                        repeats=options.repeats,
                        seconds=options.seconds,
                    )
                )
    n_blocks = int(np.prod(block_grid(*spec.preprocessing.crop, 3)))
    written = n_blocks * sum(np.dtype(array.dtype).itemsize for array in layout.rank_variables(n_blocks).values())
    image_bytes = layout.unbuilt(spec, 1)["attribution"].nbytes + written
    copy_rate = machine.copy_rate(torch.device("cpu"))
    cli.say(
        *output.table(
            [
                {
                    "images": run["n_images"],
                    "images/s": run["images_per_s"],
                    "seconds": f"{min(run['seconds']['igstore']):.3g} to {max(run['seconds']['igstore']):.3g}",
                    "peak memory": cli.size(run["peak_bytes"]),
                    "NumPy, images/s": run["numpy_images_per_s"],
                    "NumPy's time / igstore's": run["speedup_vs_numpy"],
                }
                for run in runs
            ]
        ),
        "",
        f"floor: {image_bytes / 1e3:.0f} kB an image read and written at {copy_rate / 1e9:.1f} GB/s: "
        f"{copy_rate / image_bytes:,.0f} images/s",
    )
    output.say_result(
        {
            "benchmark": "rank",
            "machine": ran_on,
            "store": str(options.store) if options.store else "synthetic",
            "runs": runs,
            "bytes_per_image": image_bytes,
            "copy_rate": copy_rate,
            "limit_images_per_s": copy_rate / image_bytes,
        }
    )
    return cli.DONE
