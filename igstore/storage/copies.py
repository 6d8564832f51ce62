"""Stores written anew from finished shards of others: whole or thin, raw or compressed, one shard in memory at a time.

Nothing that is damaged is passed on: every file that is read is held against its record first. Records are kept, but
for the checksums, which become those of the new files; rankings stay tied to the maps that they were made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from igstore import files
from igstore.cli import Progress
from igstore.errors import DamagedStoreError, UserError
from igstore.schema import Compress
from igstore.storage import layout
from igstore.storage.layout import ranking_attributes
from igstore.storage.reader import Sharded, StoreReader
from igstore.storage.writer import create_ranking, finish_store, lay_out_store, write_rank_shard, write_shard

Record = dict[str, Any]
Arrays = dict[str, NDArray[Any]]

_FORM = ("omitted", "compress")  # attributes that are of one copy of a store, not of its contents
_OF_THE_FILES = ("shard", "images", "files", "settings", "seal")  # what writing a record adds


def write_copy(
    store: StoreReader, path: Path, *, omit: Sequence[str] = (), compress: Compress | None = None, progress: Progress
) -> None:
    """Write a store that holds the same as a finished one.

    Parameters
    ----------
    store
        As `check_finished` wants it.
    path
        Where to, an empty folder.
    omit
        Image-shaped variables to leave out, besides those that are left out already.
    compress
        How to compress image-shaped arrays, one image at a time; None leaves them raw.
    progress
        Counts the images.

    Raises
    ------
    DamagedStoreError
        A shard is not what its record says.
    """
    there = layout.variables(store.spec)
    left_out = [name for name in layout.OMISSIBLE if name in there and name in (*store.omitted, *omit)]
    create_copy(store, path, left_out, compress)
    copy, rankings = StoreReader(path), {name: store.ranking(name) for name in store.rankings}
    for shard in range(store.n_shards):
        record, arrays = read_shard(store, shard, left_out)
        kept = own_fields(record)
        if "attribution" in left_out:
            kept["attribution_sha256"] = store.attribution_sha256(record)
        written = write_shard(path, store.spec, store.n_images, shard, arrays, kept)
        for name, ranking in rankings.items():
            record, arrays = read_shard(ranking, shard)
            kept = {**own_fields(record), "attribution_sha256": copy.attribution_sha256(written)}
            write_rank_shard(path, name, shard, arrays, kept)
        first, last = store.bounds(shard)
        progress.advance(last - first)
    finish_store(path, {"complete": True})


def create_copy(store: StoreReader, path: Path, omitted: Sequence[str], compress: Compress | None) -> None:
    """Make an empty store of the same settings, images and rankings; parameters as `write_copy`."""
    attributes = {name: value for name, value in store.attributes.items() if name not in _FORM} | {"complete": False}
    if omitted:
        attributes["omitted"] = list(omitted)
    if compress:
        attributes["compress"] = compress
    lay_out_store(path, store.spec, image_ids=store.image_ids, labels=store.scalars("label"), attributes=attributes)
    for name in store.rankings:
        ranking = store.ranking(name)
        of_ranking = ranking_attributes(store.spec, ranking.score, ranking.block)
        create_ranking(path, name, block=ranking.block, attributes=of_ranking)


def check_sealed(store: StoreReader) -> None:
    """Raise `DamagedStoreError` unless a store's attributes are what they were when they were written."""
    if not files.is_sealed(store.attributes):
        raise DamagedStoreError(
            f"the attributes of {store.where} have changed since they were written; the `igstore build` that made the "
            "store repairs them"
        )


def check_finished(store: StoreReader) -> None:
    """Raise `UserError` unless every shard of a store and of its rankings is finished, saying what to run."""
    if not store.is_complete:
        raise UserError(
            f"{len(store.missing_shards)} of {store.n_shards} shards of {store.where} are not finished; run the "
            "`igstore build` that made the store again, which goes on with it, then export"
        )
    for name in store.rankings:
        ranking = store.ranking(name)
        if ranking.missing_shards:
            raise UserError(
                f"the ranking {name} of {store.where} lacks {len(ranking.missing_shards)} of {store.n_shards} shards; "
                f"run `igstore rank {store.where} --score {ranking.score} --block {ranking.block}`, then export"
            )


def read_shard(group: Sharded, shard: int, omit: Sequence[str] = ()) -> tuple[Record, Arrays]:
    """The record of a finished shard, and its arrays (image, ...) but those in `omit`.

    Raises
    ------
    DamagedStoreError
        The record is not as it was written, or a file is not the one that was recorded.
    """
    record, where = group.records[shard], group.shard_files(shard)
    wanted = [name for name in group.variables if name not in omit]
    problems = {where[name]: group.form.problem(where[name], record["files"][where[name]]) for name in wanted}
    problems[group.record_file(shard)] = "" if files.is_sealed(record) else "has changed since it was written"
    for file, problem in problems.items():
        if problem:
            raise DamagedStoreError(
                f"{group.where}/{file} {problem}; `igstore verify {group.where}` says all that is damaged, the "
                "`igstore build` that made the store repairs it"
            )
    return record, {name: group.values(name, shard, record) for name in wanted}


def own_fields(record: Record) -> Record:
    """What a record says of how its images were made, rather than of the files that hold them."""
    return {name: value for name, value in record.items() if name not in _OF_THE_FILES}
