"""Putting right what is damaged in a store, or taking it back so that it is made again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igstore import files
from igstore.building.parts import Part
from igstore.errors import SettingsMismatchError, UserError
from igstore.images import ImageList
from igstore.schema import BuildSpec
from igstore.storage import (
    LISTED,
    Contents,
    StoreReader,
    bring_about,
    contents,
    finish_store,
    read_json,
    withdraw_damaged,
)

logger = logging.getLogger(__name__)


def repair_store(
    path: Path,
    spec: BuildSpec,
    images: ImageList,
    attributes: Mapping[str, Any],
    *,
    part: Part,
    show_progress: bool = False,
) -> None:
    """Put right what is damaged in a store of `spec`; a store of other settings is left alone.

    Metadata and lists of images are written again. Of a damaged shard the record is taken away, so that the shard is
    not finished any more: whoever builds goes on with it. Where nothing is damaged, nothing is written.

    Parameters
    ----------
    path, spec
        The store, and what it was made with.
    images
        The whole list that it was made from.
    attributes
        Those that a new store is given, in case its own are damaged.
    part
        Whose shards to check.

    Raises
    ------
    UserError
        It is a thin copy of such a store.
    """

    def wanted() -> Contents | None:
        said = _said(path, spec, attributes)
        if said is None or not 1 <= said[0] <= len(images):
            return None  # not such a store; opening it says what it is, or what is wrong
        ids, labels = images.ids[: said[0]], images.labels[: said[0]]
        return contents(path, spec, image_ids=ids, labels=labels, attributes=said[1])

    if wanted() is None:
        return
    bring_about(path, wanted)
    store = StoreReader(path)
    shards = part.shards(store.n_shards)
    damaged = withdraw_damaged(store, shards, label="checking", show_progress=show_progress)
    for finding in damaged:
        logger.warning("%s; building the shard again", finding)
    if damaged and store.attributes.get("complete"):
        finish_store(path, {"complete": False})


def _said(path: Path, spec: BuildSpec, attributes: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]] | None:
    """How many images a store of `spec` lists, and its attributes; None where it is none.

    Where its own attributes are damaged, the number is the largest that anything in it speaks of, and what they lack is
    taken from `attributes`.
    """
    root = read_json(path / "zarr.json")
    own = root.get("attributes") if isinstance(root, dict) else None
    if isinstance(own, dict) and files.is_sealed(own):
        try:
            if BuildSpec.from_attributes(own) != spec:
                return None
        except SettingsMismatchError:
            return None
        if own.get("omitted"):
            raise UserError(f"{path} is a thin copy of a store, and only whole ones are built on; give the whole store")
        n_images = own.get("n_images")
        return (n_images, own) if type(n_images) is int else None
    records = [read_json(file) for file in path.glob("records/*.json")]
    ours = [record for record in records if isinstance(record, dict) and record.get("settings") == spec.to_attributes()]
    ends = [record["images"][1] for record in ours if files.is_sealed(record)]
    if not ends:
        return None
    arrays = [read_json(path / name / "zarr.json") for name in LISTED]
    shapes = [array.get("shape") for array in arrays if isinstance(array, dict)]
    ends += [shape[0] for shape in shapes if isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int]
    logger.warning("%s is damaged: writing it again", path / "zarr.json")
    return max(ends), {**(own if isinstance(own, dict) else {}), **attributes}
