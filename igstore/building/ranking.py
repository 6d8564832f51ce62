"""Ranking the blocks of every map of a store: scores, ranks and shares, shard by shard, with dask."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
from dask.callbacks import Callback

from igstore import __version__
from igstore.building.dask_client import connect
from igstore.cli import Progress
from igstore.errors import DamagedStoreError, UnfinishedShardError, UserError
from igstore.files import Folder
from igstore.machine import usable_cores
from igstore.masks import DEFAULT_BLOCK, check_block, rank_blocks, ranking_name
from igstore.schema import Score
from igstore.storage import (
    StoreReader,
    at_work,
    create_ranking,
    hold,
    layout,
    ranking_attributes,
    staging,
    withdraw_damaged,
    write_rank_shard,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankingSummary:
    """What a call of `rank_store` did.

    Parameters
    ----------
    name
        The ranking, such as ``positive-3``: it is the group ``ranks/<name>`` of the store.
    ranked, unchanged
        Images that were ranked now, and images whose ranks were there already.
    missing_shards
        Shards that are not built, and so have no ranks.
    """

    name: str
    ranked: int
    unchanged: int
    missing_shards: tuple[int, ...]


def rank_store(
    store: str | os.PathLike[str],
    *,
    score: Score = "positive",
    block: int = DEFAULT_BLOCK,
    scheduler: str | None = None,
    show_progress: bool = False,
) -> RankingSummary:
    """Rank the blocks of every image of a store's finished shards, into the group ``ranks/<score>-<block>``.

    Each shard is one dask task, and is kept as soon as it is finished, so the same call resumes after an interruption.
    Shards that are not built are left out; once they are, the same call ranks them. Shards that were built again since
    they were ranked are ranked again. A failed image, whose map is all zero, has its blocks in order and shares of 1.
    A map's `scale` is positive, so it changes neither ranks nor shares and is not read.

    Parameters
    ----------
    store
        Folder of the store.
    score
        What of a pixel's attribution counts: a name in `igstore.masks.blocks.SCORES`.
    block
        Side of a block in pixels.
    scheduler
        Address of a dask.distributed scheduler whose workers all see the store at the same path. None leaves the choice
        to dask: what its configuration says, else the active client, else threads of this process, two a processor.
    show_progress
        A progress bar on stderr.

    Raises
    ------
    UserError
        There is no store, none of its shards is finished, the score or block is not allowed, or no scheduler answers.
    DamagedStoreError
        A shard's file contradicts the layout, or a map is not finite.

    >>> summary = rank_store("toy.zarr", score="absolute", block=4)
    >>> summary.name, summary.ranked
    ('absolute-4', 4)
    """
    block = check_block(block)
    name = ranking_name(score, block)
    reader = StoreReader(store)
    if not reader.records:
        raise UserError(f"no shard of {reader.root} is finished: there is nothing to rank; go on with `igstore build`")
    reader.array("attribution")  # raises unless it is there, as the store lays it out, before anything is written
    sizes = {shard: record["images"][1] - record["images"][0] for shard, record in reader.records.items()}
    if name in reader.rankings:
        for finding in withdraw_damaged(reader.ranking(name), label=f"checking {name}", show_progress=show_progress):
            logger.warning("%s; ranking the shard again", finding)
    shards = _unranked(reader, name)
    ranked = sum(sizes[shard] for shard in shards)
    unchanged = sum(sizes.values()) - ranked
    with _client(scheduler) as client:
        attributes = ranking_attributes(reader.spec, score, block)
        if shards or staging.leftovers(reader.root):
            with (
                at_work(reader.root) as presence,
                Progress(ranked + unchanged, done=unchanged, label=name, show=show_progress) as progress,
            ):
                create_ranking(reader.root, name, block=block, attributes=attributes)
                # workers may have another working folder
                root = str(reader.root.absolute())
                tasks = [dask.delayed(_rank_shard)(root, name, shard, score=score, block=block) for shard in shards]
                _compute(tasks, client, progress.advance)
                presence.sweep()
        else:  # where nothing may be written, nothing need be
            create_ranking(reader.root, name, block=block, attributes=attributes)
    return RankingSummary(name, ranked, unchanged, tuple(reader.missing_shards))


def _unranked(store: StoreReader, name: str) -> list[int]:
    """Finished shards whose maps, as they are now, have no ranks."""
    done = store.ranking(name).records if name in store.rankings else {}
    return [shard for shard in store.records if shard not in done]


def _rank_shard(root: str, name: str, shard: int, *, score: str, block: int) -> int:
    """Rank one shard, from its maps to its record; returns how many images. Doing it twice is harmless."""
    with hold(Path(root)) as folder:
        while True:
            n_images, is_written = _rank_held(folder, name, shard, score=score, block=block)
            if is_written:
                return n_images


def _rank_held(folder: Folder, name: str, shard: int, *, score: str, block: int) -> tuple[int, bool]:
    """How many images a shard has, and whether the maps that were ranked are still those of the store."""
    root = folder.path
    store = StoreReader(root)
    # Read before the maps: should they be replaced meanwhile, the ranks are known to be of the old ones.
    record = store.record(shard)
    if record is None:
        raise UnfinishedShardError(f"shard {shard} of {root} is being written; rank again when the build is done")
    file = store.shard_files(shard)["attribution"]
    problem = store.form.problem(file, record["files"][file])
    if problem:
        raise DamagedStoreError(f"{store.root / file} {problem}; run the build again, which repairs it, then rank")
    maps = store.values("attribution", shard, record)  # (image, [channel,] y, x)
    try:
        ranks, shares = rank_blocks(maps, block, score)
    except UserError as error:
        raise DamagedStoreError(
            f"in {root}, from image {record['images'][0]}: {error} (delete {layout.record_file(shard)} first)"
        ) from error
    arrays = {"rank": ranks, "share": shares}
    provenance = {"attribution_sha256": store.attribution_sha256(record), "versions": {"igstore": __version__}}
    written = write_rank_shard(folder, name, shard, arrays, provenance)
    return len(maps), written is not None


@contextmanager
def _client(scheduler: str | None) -> Iterator[Any]:
    """The dask.distributed client to compute with; None where there is none."""
    if scheduler is None:
        yield _active_client()
        return
    with connect(scheduler) as client:
        yield client


def _active_client() -> Any:
    # dask, too, goes by its configuration first; a default client names itself there
    if dask.config.get("scheduler", None) not in (None, "dask.distributed", "distributed"):
        return None
    try:
        from distributed import get_client

        return get_client()
    except (ImportError, ValueError):
        return None


def _compute(tasks: Sequence[Any], client: Any, advance: Callable[[int], None]) -> None:
    """Compute the tasks, calling `advance` with each one's result when it is finished."""
    if client is None:
        # a thread that waits for the disk leaves its processor to another one
        n_threads = dask.config.get("num_workers", None) or 2 * usable_cores()
        with Callback(posttask=lambda _key, images, *_: advance(images)):
            dask.compute(*tasks, num_workers=n_threads)
        return
    from distributed import as_completed

    for _, images in as_completed(client.compute(tasks), with_results=True, loop=client.loop):
        advance(images)
