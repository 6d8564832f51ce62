"""`igstore merge`: one store out of parts that were built in different places.

The parts are made with the same settings. Either they list the same images and each has finished other shards of them,
as an array of jobs leaves them that share no file system, or they list different images. Both are the same work: every
image of the merged list is taken from a part that has it, and shards are cut anew.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igstore import cli
from igstore.cli import Progress
from igstore.errors import DamagedStoreError, SettingsMismatchError, UserError
from igstore.files import appearing
from igstore.images import fingerprint
from igstore.schema import BUILT, FAILED, NOT_BUILT, BuildSpec, as_path, several
from igstore.storage import (
    Sharded,
    StoreReader,
    check_sealed,
    check_shards,
    create_ranking,
    finish_store,
    lay_out_store,
    layout,
    own_fields,
    ranking_attributes,
    write_rank_shard,
    write_shard,
)

Arrays = dict[str, NDArray[Any]]
Images = NDArray[np.int64]

_NOWHERE = -1
_CLASS_LISTS = ("class_names", "wnids")


@dataclass(frozen=True)
class MergeSummary:
    """What `merge_stores` made.

    Parameters
    ----------
    path
        Where the merged store is.
    n_images
        How many images it lists.
    missing_shards
        Its shards that no part has finished.
    rankings
        Those that were carried over.
    unranked
        Those that some part lacks, in whole or in part, and that were left out.
    """

    path: Path
    n_images: int
    missing_shards: tuple[int, ...]
    rankings: tuple[str, ...]
    unranked: tuple[str, ...]


def merge_stores(
    stores: Sequence[str | os.PathLike[str] | StoreReader],
    out: str | os.PathLike[str],
    *,
    show_progress: bool = False,
) -> MergeSummary:
    """Make one store out of parts that were built with the same settings. It appears at `out` whole, or not at all.

    The merged store lists the images of all parts, sorted by id. An image that is finished in several parts must be the
    same in all of them, unless it has failed in some. A ranking is carried over if every part has it: ranks of an image
    do not depend on the others. Shards that no part has finished are missing from the merged store too; `igstore build`
    goes on with it. Records of shards that are put together from parts of others have the seconds of the images, by
    their share of the evaluations, and leave out how many of them are in the top 5, which is only known by shard.

    Parameters
    ----------
    stores
        The parts, two at least: paths, URLs or readers, in any form.
    out
        The folder to make; nothing must be there.
    show_progress
        A progress bar on stderr.

    Raises
    ------
    SettingsMismatchError
        The parts were made with other settings, or disagree on an image; the difference is named.
    UserError
        A part leaves out variables, or images would be lost because a shard would be finished in part.
    StoreExistsError
        There is something at `out`.
    DamagedStoreError
        A shard of a part is not what its record says; nothing damaged is passed on.
    """
    target = as_path("out", out)
    parts = several("stores", stores, str | os.PathLike | StoreReader, "paths, URLs or readers")
    readers = [StoreReader.of(store) for store in parts]
    merge = _Merge(readers)
    with appearing(target) as making:
        for store in readers:
            for group in (store, *map(store.ranking, merge.rankings)):
                _check_intact(group, show_progress=show_progress)
        merge.write(making, show_progress=show_progress)
    missing = sorted(set(range(merge.n_shards)) - set(merge.shards))
    return MergeSummary(target, len(merge.ids), tuple(missing), tuple(merge.rankings), tuple(merge.unranked))


class _Merge:
    """Where each image of the merged store comes from. What can be refused is refused when it is made.

    Attributes
    ----------
    parts
        The stores.
    ids, labels
        Of the merged list, (image,).
    places
        int64 (part, image): the number of each image in each part, -1 where it is not listed.
    status
        uint8 (part, image): its status there.
    owner
        int64 (image,): the part that it is taken from, -1 where it is not finished in any.
    shards
        Numbers of the merged store's shards that are finished.
    rankings, unranked
        Names of those that all parts have, and of those that only some have.
    """

    def __init__(self, parts: Sequence[StoreReader]) -> None:
        if len(parts) < 2:
            raise UserError("one store cannot be merged; give two or more")
        for part in parts:
            check_sealed(part)
            _check_whole(part)
            _check_settings(parts[0], part)
        self.parts = parts
        self.ids: list[str] = sorted({image_id for part in parts for image_id in part.image_ids})
        number = {image_id: image for image, image_id in enumerate(self.ids)}
        self.places = np.full((len(parts), len(self.ids)), _NOWHERE)
        self.status = np.full(self.places.shape, NOT_BUILT, np.uint8)
        for part, places, status in zip(parts, self.places, self.status, strict=True):
            images = [number[image_id] for image_id in part.image_ids]
            places[images] = np.arange(part.n_images)
            status[images] = part.status
        self.labels = self._merged_labels()
        self.owner = np.full(len(self.ids), _NOWHERE)
        for wanted in (FAILED, BUILT):  # what is built somewhere has not failed
            is_there = self.status == wanted
            self.owner = np.where(is_there.any(axis=0), is_there.argmax(axis=0), self.owner)
        self.shards = [shard for shard in range(self.n_shards) if self._is_finished(shard)]
        if not self.shards:
            raise UserError(f"no shard of {_listing(part.where for part in parts)} is finished: nothing to merge")
        names = sorted({name for part in parts for name in part.rankings})
        self.rankings = [name for name in names if all(_has_ranks(part, name) for part in parts)]
        self.unranked = [name for name in names if name not in self.rankings]

    @cached_property
    def spec(self) -> BuildSpec:
        """What the merged store is made with."""
        newest = max(part.spec.format_version for part in self.parts)
        spec = dataclasses.replace(self.parts[0].spec, format_version=newest)
        if len({part.spec.images_fingerprint for part in self.parts}) == 1:
            return spec  # parts of one list, which they may not have all of
        return dataclasses.replace(spec, images_fingerprint=fingerprint(self.ids, self.labels))

    @property
    def n_shards(self) -> int:
        """Of the merged store."""
        return layout.shard_count(len(self.ids), self.parts[0].shard_size)

    def images(self, shard: int) -> slice:
        """Those of a shard of the merged store."""
        return slice(*layout.shard_bounds(shard, len(self.ids), self.parts[0].shard_size))

    def write(self, path: Path, *, show_progress: bool) -> None:
        """Write the merged store, one shard in memory at a time."""
        total = sum(len(self.owner[self.images(shard)]) for shard in self.shards)
        with Progress(total, label="merge", show=show_progress) as progress:
            lay_out_store(path, self.spec, image_ids=self.ids, labels=self.labels, attributes=self._attributes())
            for name in self.rankings:
                score, block = self.parts[0].ranking(name).score, self.parts[0].ranking(name).block
                create_ranking(path, name, block=block, attributes=ranking_attributes(self.spec, score, block))
            rankings = {name: [part.ranking(name) for part in self.parts] for name in self.rankings}
            merged = StoreReader(path)
            for shard in self.shards:
                arrays = self._gathered(self.parts, shard)
                self._check_agreement(shard, arrays)
                images = self.images(shard)
                arrays |= layout.listed(self.spec, self.ids[images], self.labels[images])
                record = write_shard(path, self.spec, len(self.ids), shard, arrays, self._record(shard))
                tie = {"attribution_sha256": merged.attribution_sha256(record)}
                for name, groups in rankings.items():
                    fields = {**self._common_record(groups, shard), **tie}
                    write_rank_shard(path, name, shard, self._gathered(groups, shard), fields)
                progress.advance(len(arrays["status"]))
            if len(self.shards) == self.n_shards:
                finish_store(path, {"complete": True})

    def _merged_labels(self) -> NDArray[np.int32]:
        labels = np.zeros(len(self.ids), np.int32)
        given = np.full(len(self.ids), _NOWHERE)  # the part that said it
        for number, (part, places) in enumerate(zip(self.parts, self.places, strict=True)):
            listed = np.flatnonzero(places != _NOWHERE)
            own = part.scalars("label")[places[listed]]
            for image in listed[(given[listed] != _NOWHERE) & (labels[listed] != own)].tolist():
                other = self.parts[given[image]]
                raise SettingsMismatchError(
                    f"image {self.ids[image]} has label {labels[image]} in {other.where} and "
                    f"{part.scalars('label')[places[image]]} in {part.where}; parts must agree on their labels"
                )
            labels[listed], given[listed] = own, number
        return labels

    def _is_finished(self, shard: int) -> bool:
        there = self.owner[self.images(shard)] != _NOWHERE
        if there.all() or not there.any():
            return bool(there.all())
        image = self.images(shard).start + int(np.argmin(there))
        part = next(part for part, places in zip(self.parts, self.places, strict=True) if places[image] != _NOWHERE)
        raise UserError(
            f"image {self.ids[image]} of {part.where} is not finished, and its neighbours in the merged list are; go "
            "on with the `igstore build` that made that store, then merge"
        )

    def _gathered(self, groups: Sequence[Sharded], shard: int) -> Arrays:
        """The arrays of a merged shard, (image, ...), from the store or the ranking of each part."""
        images = self.images(shard)
        owner = self.owner[images]
        arrays = {}
        variables = layout.variables(self.spec) if groups is self.parts else groups[0].variables
        for name, variable in variables.items():
            if name in layout.LISTED:
                continue
            inner = [groups[0].sizes[dim] for dim in variable.dims[1:]]
            arrays[name] = np.empty((len(owner), *inner), variable.dtype)
            for number, group in enumerate(groups):
                mine = owner == number
                if mine.any():
                    arrays[name][mine] = _read(group, name, self.places[number, images][mine])
        return arrays

    def _check_agreement(self, shard: int, arrays: Arrays) -> None:
        """Raise unless images that are built in several parts are the same in all of them."""
        images = self.images(shard)
        for number, part in enumerate(self.parts):
            also = np.flatnonzero((self.status[number, images] == BUILT) & (self.owner[images] != number))
            for name, values in arrays.items():
                theirs = _read(part, name, self.places[number, images][also])
                for place, one, other in zip(also.tolist(), values[also], theirs, strict=True):
                    if not np.array_equal(one, other, equal_nan=one.dtype.kind == "f"):
                        raise self._disagreement(images.start + place, number, name)

    def _disagreement(self, image: int, number: int, name: str) -> SettingsMismatchError:
        part, owner = self.parts[number], self.parts[self.owner[image]]
        record = part.record_file(int(self.places[number, image]) // part.shard_size)
        return SettingsMismatchError(
            f"image {self.ids[image]} has another {name} in {part.where} than in {owner.where}; to take the one there, "
            f"delete {record} in {part.where}, as if the shard had not been built"
        )

    def _taken(self, shard: int) -> list[tuple[int, int, Images]]:
        """(part, shard of it, numbers of its images) for all that a merged shard is put together from."""
        images = self.images(shard)
        taken = []
        for number, part in enumerate(self.parts):
            places = self.places[number, images][self.owner[images] == number]
            shards = places // part.shard_size
            taken += [(number, one, places[shards == one]) for one in np.unique(shards).tolist()]
        return taken

    def _record(self, shard: int) -> dict[str, Any]:
        """What the record of a merged shard says of how its images were made."""
        fields = self._common_record(self.parts, shard)
        failed: dict[str, str] = {}
        evaluations, in_top5, seconds, is_whole = 0, 0, 0.0, True
        for number, of_part, places in self._taken(shard):
            part = self.parts[number]
            record, (first, last) = part.records[of_part], part.bounds(of_part)
            ids = {part.image_ids[place] for place in places.tolist()}
            failed |= {image_id: why for image_id, why in record.get("failed", {}).items() if image_id in ids}
            steps = int(part.scalars("n_steps")[places].sum())
            every = int(part.scalars("n_steps")[first:last].sum())
            evaluations += steps
            seconds += record.get("seconds", 0.0) * (steps / every if every else len(places) / (last - first))
            is_whole &= len(places) == last - first and "in_top5" in record
            in_top5 += record.get("in_top5", 0)
        fields |= {"failed": failed, "evaluations": evaluations, "seconds": round(seconds, 3), "in_top5": in_top5}
        if not is_whole:
            del fields["in_top5"]
        return fields

    def _common_record(self, groups: Sequence[Sharded], shard: int) -> dict[str, Any]:
        """What the records of all shards that a merged one is put together from say together."""
        return _together([own_fields(groups[number].records[of_part]) for number, of_part, _ in self._taken(shard)])

    def _attributes(self) -> dict[str, Any]:
        every = [part.attributes for part in self.parts]
        together = _together([{name: one[name] for name in one if name not in ("seal", "compress")} for one in every])
        seconds = sum(one.get("wall_seconds", 0.0) for one in every)
        return together | {"complete": False, "wall_seconds": seconds}


def _together(every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several JSON objects say: where they differ, strings listed, lists united, objects put together as these."""
    result: dict[str, Any] = {}
    for name in every[0]:
        values = [one[name] for one in every if name in one]
        if len(values) < len(every):
            continue
        if all(value == values[0] for value in values):
            result[name] = values[0]
        elif all(isinstance(value, str) for value in values):
            result[name] = _listing(sorted(set(values)))
        elif all(isinstance(value, list) for value in values):
            result[name] = []
            for item in itertools.chain(*values):
                if item not in result[name]:
                    result[name].append(item)
        elif all(isinstance(value, dict) for value in values):
            result[name] = _together(values)
    return result


def _listing(words: Iterable[str]) -> str:
    return ", ".join(words)


def _read(group: Sharded, name: str, numbers: Images) -> NDArray[Any]:
    """A variable of some images of a part, or of its ranking, by their numbers there."""
    if isinstance(group, StoreReader) and not group.variables[name].is_sharded:
        return group.scalars(name)[numbers]
    return group.array(name).read(numbers)


def _has_ranks(part: StoreReader, name: str) -> bool:
    """Whether a part has a ranking of everything that it has finished."""
    return name in part.rankings and part.ranking(name).records.keys() >= part.records.keys()


def _check_whole(part: StoreReader) -> None:
    if part.omitted:
        raise UserError(
            f"{part.where} was exported without {' and '.join(part.omitted)}, so that nobody can tell whether its maps "
            "agree with others; merge the whole stores, then export"
        )


def _check_settings(first: StoreReader, part: StoreReader) -> None:
    """Raise `SettingsMismatchError` unless two parts differ in their images alone."""
    of_first = {name: getattr(first.spec, name) for name in ("images_fingerprint", "format_version")}
    same_images = dataclasses.replace(part.spec, **of_first)
    differences = [*first.spec.differences(same_images)]
    for name in _CLASS_LISTS:
        one, other = first.attributes.get(name), part.attributes.get(name)
        if one != other:
            differences.append((name, one, other))
    if differences:
        listing = "; ".join(f"{name} is {one!r:.80} there and {other!r:.80} here" for name, one, other in differences)
        raise SettingsMismatchError(
            f"{part.where} was made with other settings than {first.where}: {listing}. Parts must be made with the same"
        )


def _check_intact(group: Sharded, *, show_progress: bool) -> None:
    """Raise `DamagedStoreError` unless every finished shard is what its record says."""
    shards, label = sorted(group.records), f"check {group.where}"
    for findings in check_shards(group, shards, label=label, show_progress=show_progress):
        if findings:
            raise DamagedStoreError(
                f"{group.where}: {findings[0]}; the `igstore build` that made the store repairs it, then merge"
            )


def parser() -> cli.Parser:
    """The options of the command."""
    parser = cli.Parser("merge", "Make one store out of parts that were built with the same settings elsewhere.")
    parser.add_argument("stores", metavar="STORE", nargs="+", help="paths or URLs of the parts, two at least")
    parser.add_argument("--out", metavar="STORE", required=True, help="folder of the store to make")
    return parser


def main(argv: Sequence[str]) -> int:
    """``igstore merge A B ... --out C``."""
    options, output = parser().parse(argv)
    summary = merge_stores(options.stores, options.out, show_progress=output.show_progress)
    lines = [f"{summary.path}: {summary.n_images} images, rankings {_listing(summary.rankings) or 'none'}"]
    if summary.missing_shards:
        lines.append(f"shards that no part has finished: {len(summary.missing_shards)}; `igstore build` goes on")
    if summary.unranked:
        lines.append(
            f"left out, since not all parts have them whole: {_listing(summary.unranked)}; `igstore rank` makes them"
        )
    output.summary(summary, lines)
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
