"""Whether shards are what their records say: the records' own seals, and every byte of every file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from igstore import files
from igstore.cli import Progress
from igstore.errors import DamagedStoreError
from igstore.machine import usable_cores
from igstore.storage.concurrency import hold, writing
from igstore.storage.reader import Sharded, StoreReader

_MOST_THREADS = 8  # so many files at a time, so that a file server has something to do
_PATIENCE = 3.0  # seconds before the progress is shown


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a store; as a string, one line.

    Attributes
    ----------
    problem
        What, in words that follow the file's name.
    file
        Where, relative to the store's root.
    shard, array
        The shard and the array that it is about, if it is about one; a ranking's is called ``ranks/<name>/<array>``.
    is_missing
        Something is not there yet, rather than damaged.
    is_unread
        It could not be looked at, so nothing is known of it.
    """

    problem: str
    file: str
    shard: int | None = None
    array: str | None = None
    is_missing: bool = False
    is_unread: bool = False

    def __str__(self) -> str:
        shard = None if self.shard is None else f"shard {self.shard}"
        where = " of ".join(filter(None, (shard, self.array))) or "store"
        return f"{where}: {self.file} {self.problem}"


def check_shards(
    group: Sharded, shards: Sequence[int] | None = None, *, label: str, show_progress: bool = False
) -> Iterator[list[Finding]]:
    """For each shard of a store or of a ranking, in order, what is wrong with its record and its files.

    Parameters
    ----------
    group
        A `StoreReader` or `RankingReader`.
    shards
        Their numbers; None is all.
    label, show_progress
        What to call it on a progress bar, and whether to show one.
    """
    shards = range(group.n_shards) if shards is None else shards
    sizes = [last - first for first, last in map(group.bounds, shards)]
    threads = ThreadPoolExecutor(min(_MOST_THREADS, usable_cores()), "check")
    with Progress(sum(sizes), label=label, show=show_progress, patience=_PATIENCE) as progress, threads:
        for size, findings in zip(sizes, threads.map(partial(check_shard, group), shards), strict=True):
            progress.advance(size)
            yield findings


def check_shard(group: Sharded, shard: int) -> list[Finding]:
    """What is wrong with the record and the files of one shard; one finding that is missing, where it is not done.

    Raises
    ------
    AccessError, UnreachableError
        Something of it cannot be looked at.
    """
    record_file, expected = group.record_file(shard), group.shard_files(shard)
    if not group.form.is_plain(record_file):
        return [Finding("is not a regular file", record_file, shard)]
    try:
        record = group.any_record(shard)
    except DamagedStoreError:
        return [Finding("is not the record of a shard", record_file, shard)]
    if record is None or record["images"] != list(group.bounds(shard)):
        return [Finding("is not there: the shard is not finished", record_file, shard, is_missing=True)]
    findings = []
    if not files.is_sealed(record):
        findings.append(Finding("has changed since it was written", record_file, shard))
    if isinstance(group, StoreReader) and record.get("settings") != group.spec.to_attributes():
        findings.append(Finding("is of a shard that was made with other settings", record_file, shard))
    for array, file in expected.items():
        problem = group.form.problem(file, record["files"][file])
        if problem:
            findings.append(Finding(problem, file, shard, group.array_path(array)))
    return findings


def withdraw_damaged(
    group: Sharded, shards: Sequence[int] | None = None, *, label: str, show_progress: bool = False
) -> list[Finding]:
    """Take away the records of damaged shards, which are then as good as never made; returns what was wrong.

    Parameters are those of `check_shards`.
    """
    shards = range(group.n_shards) if shards is None else shards
    withdrawn = []
    for shard, findings in zip(
        shards, check_shards(group, shards, label=label, show_progress=show_progress), strict=True
    ):
        if _are_damage(findings):
            with hold(group.root) as folder, writing(folder):
                # again, because another process may just have been writing the shard anew
                if _are_damage(findings := check_shard(group, shard)):
                    folder.remove(group.record_file(shard))
                    withdrawn += findings
    return withdrawn


def _are_damage(findings: list[Finding]) -> bool:
    return any(not finding.is_missing for finding in findings)
