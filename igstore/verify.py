"""`igstore verify`: whether a store is intact, byte for byte and in what it means. Nothing is written."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from igstore import cli, files
from igstore.cli import Progress, add_options
from igstore.errors import DamagedStoreError, IgstoreError, SettingsMismatchError
from igstore.files import NOT_THERE, LocalFiles, Source, is_foreign, open_source, parse_json, reading, shown
from igstore.machine import usable_cores
from igstore.schema import whole_number
from igstore.storage import (
    Finding,
    Hdf5Form,
    Problems,
    RankingReader,
    Sharded,
    StoreReader,
    ZarrForm,
    check_images,
    check_ranks,
    check_shard,
    consolidated,
    metadata,
    ranking_attributes,
    ranking_metadata,
)

if TYPE_CHECKING:
    from igstore.models import Classifier

_ROOT = "zarr.json"
_MOST_THREADS = 8
_ANY_CLASS = np.iinfo(np.int32).max + 1  # where a store does not say how many classes there are
_FEW = 10  # shards listed before "and so on"


def verify_store(
    path: str | os.PathLike[str],
    *,
    recompute: int = 0,
    images: Any = None,
    model: str | Classifier | None = None,
    weights: str | None = None,
    device: str = "auto",
    seed: int = 0,
    show_progress: bool = False,
) -> list[Finding]:
    """Everything that is wrong with a store, or not there yet; an empty list where nothing is.

    It looks at all metadata, at the record of every shard of the store and of its rankings, at every file (by the size
    and CRC-32C on record), at what the values mean (scales are powers of two, completeness errors follow from maps and
    outputs, ranks and shares from maps ...), and for files that nothing accounts for. `build_store` with the arguments
    that made the store repairs what is damaged, `rank_store` its rankings.

    Parameters
    ----------
    path
        Folder of the store.
    recompute
        How many images, chosen at random, to attribute again with the store's model and compare; needs torch, and a
        store in which nothing else is wrong.
    images, model, weights, device
        For `recompute`: the images, as `build_store` takes them, where the store has no pixels; the model, where that
        is code of somebody's own, `package.module:function`, which a store cannot choose; the file of weights, where
        there is one; and what to compute on, as `build_store` takes it.
    seed
        Of the choice of images.
    show_progress
        A progress bar on stderr.

    Raises
    ------
    StoreNotFoundError
        There is no store at `path`.
    SettingsMismatchError
        It is not a store of this format version.
    AccessError, UnreachableError
        Its metadata cannot be looked at. Shards that cannot are findings, ``is_unread``.
    UserError
        The model, weights or images for `recompute` are not at hand, or not those of the store, or must be named.

    >>> verify_store("toy.zarr")
    []
    """
    try:
        store = StoreReader.of(path)
    except (DamagedStoreError, SettingsMismatchError) as error:
        if isinstance(error, SettingsMismatchError) and not _is_unsealed(open_source(path, cache=None, options=None)):
            raise  # another version's, or nothing of igstore's
        return [Finding(f"is damaged, and nothing else can be looked at: {error}", _ROOT)]
    again = None
    if whole_number("recompute", recompute, 0):
        from igstore.building import Recomputation  # the only part that needs torch

        again = Recomputation(store, recompute, images=images, model=model, weights=weights, device=device, seed=seed)
    rankings = [store.ranking(name) for name in store.rankings]
    findings = [*_metadata_findings(store, rankings), *_list_findings(store)]
    unreadable = {finding.array for finding in findings}
    threads = ThreadPoolExecutor(min(_MOST_THREADS, usable_cores()), "verify")
    with Progress(store.n_images, label="verify", show=show_progress) as progress, threads:
        look = partial(_look, store, rankings, unreadable)
        for shard, found in enumerate(threads.map(look, range(store.n_shards))):
            findings += found
            first, last = store.bounds(shard)
            progress.advance(last - first)
    if not findings and not store.attributes.get("complete"):
        findings.append(Finding("does not say yet that the store is complete", _ROOT, is_missing=True))
    if isinstance(store.form, ZarrForm) and isinstance(
        store.form.source, LocalFiles
    ):  # nobody else can say which files there are
        reported = {finding.file for finding in findings}
        findings += [finding for finding in _orphans(store, rankings) if finding.file not in reported]
    if again is not None and not findings:
        findings += again.findings()
    return findings


def _is_unsealed(source: Source) -> bool:
    """Whether the root's metadata were igstore's, and have changed since."""
    document = _document(source, _ROOT)
    attributes = document.get("attributes") if document else None
    return not isinstance(attributes, dict) or ("seal" in attributes and not files.is_sealed(attributes))


def _document(source: Source, file: str) -> dict[str, Any] | None:
    """A JSON object in a file, None where there is none."""
    try:
        with reading(file):
            document = parse_json(source.read(file))
    except (DamagedStoreError, *NOT_THERE):
        return None
    return document if isinstance(document, dict) else None


def _metadata_findings(store: StoreReader, rankings: Sequence[RankingReader]) -> Iterator[Finding]:
    """Metadata that are not what the layout says, or not what they were when they were written."""
    expected = metadata(store.spec, store.n_images, store.attributes)
    for ranking in rankings:
        attributes = ranking_attributes(store.spec, ranking.score, ranking.block)
        expected |= ranking_metadata(
            store.spec,
            store.n_images,
            ranking.name,
            block=ranking.block,
            attributes=attributes,
            compress=store.attributes.get("compress"),
        )
    if isinstance(store.form, Hdf5Form):  # HDF5's own metadata are checked by reading through them
        if not files.is_sealed(store.attributes):
            yield Finding("has attributes that have changed since they were written", store.form.path.name)
        return
    source = store.form.source
    documents = {file: _document(source, file) for file in expected}
    for file, content in expected.items():
        found, right = documents[file], json.loads(content)
        if found is not None:
            copy = found.pop("consolidated_metadata", None)
            if file == _ROOT and copy != (
                consolidated(source.root) if isinstance(source, LocalFiles) else _copy_of(documents)
            ):
                yield Finding("holds a copy of the others' metadata that differs from them", file)
            if file == _ROOT and found.get("attributes") != right["attributes"]:
                del found["attributes"], right["attributes"]
                yield Finding("has attributes that have changed since they were written", file)
            wrong = [key for key in sorted(found.keys() | right.keys()) if found.get(key) != right.get(key)]
            problem = "; ".join(f"{key} is {found.get(key)!r:.60}, not {right.get(key)!r:.60}" for key in wrong)
        else:
            problem = "it cannot be read"
        if problem:
            array = file.removesuffix("zarr.json").rstrip("/")
            yield Finding(f"is not as it was written: {problem}", file, array=array or None)


def _copy_of(documents: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    """What the root's copy of the others' metadata must be, as `igstore.storage.consolidated` has it."""
    intact = {
        file.rpartition("/")[0]: found for file, found in documents.items() if file != _ROOT and found is not None
    }
    return {"kind": "inline", "must_understand": False, "metadata": intact}


def _list_findings(store: StoreReader) -> list[Finding]:
    """Whether the images' names are different and in order, as those of a list are."""
    try:
        if list(store.image_ids) == sorted(set(store.image_ids)):
            return []
        problem = "lists names that are not different and in order"
    except DamagedStoreError as error:
        problem = f"cannot be read: {error}"
    return [Finding(problem, "image_id/zarr.json", array="image_id")]


def _look(
    store: StoreReader, rankings: Sequence[RankingReader], unreadable: set[str | None], shard: int
) -> list[Finding]:
    """`_shard_findings`, for shards of stores that were made to mislead."""
    file = f"records/{shard:05d}.json"
    try:
        return _shard_findings(store, rankings, unreadable, shard)
    except DamagedStoreError as error:
        return [Finding(f"is not what zarr makes of such a shard: {error}", file, shard)]
    except IgstoreError as error:  # the system, or the network
        return [Finding(f"is of a shard that could not be looked at: {error}", file, shard, is_unread=True)]


def _shard_findings(
    store: StoreReader, rankings: Sequence[RankingReader], unreadable: set[str | None], shard: int
) -> list[Finding]:
    """What is wrong with a shard of the store, and then of its rankings.

    Parameters
    ----------
    unreadable
        Arrays whose values are not looked at, because their metadata are wrong.
    """
    findings = check_shard(store, shard)
    if any(finding.is_missing for finding in findings):
        return findings  # nor are there ranks
    first, last = store.bounds(shard)
    ids = list(map(str, range(first, last)) if "image_id" in unreadable else store.image_ids[first:last])
    maps, record = None, {}
    if not findings and unreadable.isdisjoint(store.variables):
        record = _record(store, shard)
        values = _values(store, shard, record)
        findings = _located(store, shard, check_images(store.spec, values, record, n_classes=_n_classes(store)))
        maps = None if findings else values.get("attribution")
    for ranking in rankings:
        found = check_shard(ranking, shard)
        sha256 = _record(ranking, shard).get("attribution_sha256") if record and not found else None
        if not found and record and sha256 != store.attribution_sha256(record):
            file = ranking.record_file(shard)
            found = [Finding("is of maps that have been replaced since", file, shard, is_missing=True)]
        if not found and unreadable.isdisjoint(map(ranking.array_path, ranking.variables)):
            problems = check_ranks(
                maps, _values(ranking, shard, _record(ranking, shard)), ids, score=ranking.score, block=ranking.block
            )
            found = _located(ranking, shard, problems)
        findings += found
    return findings


def _record(group: Sharded, shard: int) -> dict[str, Any]:
    return group.any_record(shard) or {}


def _values(group: Sharded, shard: int, record: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """All variables of a shard whose files are what they were."""
    return {name: group.values(name, shard, record) for name in group.variables}


def _n_classes(store: StoreReader) -> int:
    names = store.attributes.get("class_names")
    return len(names) if isinstance(names, list) and names else _ANY_CLASS


def _located(group: Sharded, shard: int, problems: Problems) -> list[Finding]:
    """Problems of values as findings, with what to do: their files are what was written, so nothing repairs them."""
    record = group.record_file(shard)
    where = group.shard_files(shard)
    return [
        Finding(
            f"{problem} (delete {record} to have the shard made again)",
            where.get(name, record),
            shard,
            group.array_path(name) if name else None,
        )
        for name, problem in problems
    ]


def _orphans(store: StoreReader, rankings: Sequence[RankingReader]) -> list[Finding]:
    """Files that nothing accounts for, and what is no file. Those of shards that are not finished are left alone."""
    groups: list[Sharded] = [store, *rankings]
    known = {_ROOT, "ranks/zarr.json"}
    for group in groups:
        known |= {f"{group.array_path(name)}/zarr.json" for name in group.variables}
        for shard in range(group.n_shards):
            known |= {*group.shard_files(shard).values(), group.record_file(shard)}
    known |= {f"ranks/{ranking.name}/zarr.json" for ranking in rankings}
    findings = []
    for folder, folders, names in os.walk(store.root):
        folders[:] = [name for name in folders if not is_foreign(name)]
        for name in (*folders, *(name for name in names if not is_foreign(name))):
            path = Path(folder, name)
            file = path.relative_to(store.root).as_posix()
            mode = path.lstat().st_mode
            if file == "staging" and not store.attributes.get("complete"):
                folders.remove(name)  # what an unfinished build goes on with
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                findings.append(Finding("is neither a file nor a folder", file))
            elif stat.S_ISREG(mode) and file not in known:
                was_left = file.endswith(files.PARTIAL) or file.startswith("staging/")
                why = "was left by an interrupted process" if was_left else "belongs to nothing in this store"
                findings.append(Finding(why, file))
    return findings


def describe(path: str | os.PathLike[str], findings: Sequence[Finding]) -> list[str]:
    """What `verify_store` found, as lines for people: one for each damage, what is missing together, what to do."""
    path = shown(path)
    if not findings:
        return [f"{path}: nothing wrong"]
    unread = [finding for finding in findings if finding.is_unread]
    damaged = [finding for finding in findings if not finding.is_missing and not finding.is_unread]
    lines = [str(finding) for finding in (*damaged, *unread)]
    missing: dict[str, list[int]] = {}
    for finding in findings:
        if finding.is_missing and finding.shard is not None:
            missing.setdefault(os.path.dirname(finding.file).replace("records", "ranks"), []).append(finding.shard)
        elif finding.is_missing:
            lines.append(str(finding))
    for group, shards in missing.items():
        of = "" if group == "ranks" else f" of {group}"
        lines.append(f"not finished: shard{'s' * (len(shards) > 1)} {_few(shards)}{of}")
    if unread:
        count = "1 shard" if len(unread) == 1 else f"{len(unread)} shards"
        lines.append(f"{path}: nothing is known of {count}; let this user read the files, and verify again")
    if damaged:
        repair = "`igstore build` with the arguments that made the store makes damaged shards again"
        count = "1 thing is" if len(damaged) == 1 else f"{len(damaged)} things are"
        return [*lines, f"{path}: {count} wrong; {repair}, and `igstore rank` those of rankings"]
    if unread:
        return lines
    return [*lines, f"{path}: nothing that is there is wrong; the same `igstore build`, or `igstore rank`, goes on"]


def _few(shards: Sequence[int]) -> str:
    more = f" and {len(shards) - _FEW} more" if len(shards) > _FEW else ""
    return ", ".join(map(str, shards[:_FEW])) + more


def parser() -> cli.Parser:
    """The options of the command."""
    parser = cli.Parser("verify", "Check every byte of a store against its records, and what the values mean.")
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument("--recompute", type=cli.positive, metavar="K", help="attribute K images again, and compare")
    parser.add_argument(
        "--data",
        dest="images",
        metavar="PATH",
        help="for --recompute: the images, where the store has no pixels; as for `build`",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="for --recompute: the store's model, where that is package.module:function, which a store cannot choose",
    )
    add_options(parser, "weights", help="for --recompute: the file of weights, where it does not come with the model")
    add_options(parser, "device", help="for --recompute: auto, cpu, cuda or cuda:N")
    add_options(parser, "seed", help="for --recompute: of the choice of images")
    return parser.of(verify_store)


def main(argv: Sequence[str]) -> int:
    """``igstore verify STORE``: status 0 where nothing is wrong, 1 where something is damaged or missing."""
    options, output = parser().parse(argv)
    findings = verify_store(
        options.store,
        recompute=options.recompute,
        images=options.images,
        model=options.model,
        weights=options.weights,
        device=options.device,
        seed=options.seed,
        show_progress=output.show_progress,
    )
    output.result({"store": shown(options.store), "findings": findings}, describe(options.store, findings))
    return cli.FAILED if findings else cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
