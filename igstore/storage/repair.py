"""Putting right what is damaged in a store, or taking it back so that it is made again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igstore.building.parts import Part
from igstore.errors import SettingsMismatchError, UserError
from igstore.images import ImageList
from igstore.schema import BuildSpec
from igstore.storage import files
from igstore.storage.integrity import withdraw_damaged
from igstore.storage.reader import StoreReader
from igstore.storage.store import finish_store, lay_out_store, read_json

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
    root = read_json(path / "zarr.json")
    own = root.get("attributes") if isinstance(root, dict) else None
    if isinstance(own, dict) and files.is_sealed(own):
        n_images, attributes = own.get("n_images"), own
        try:
            if BuildSpec.from_attributes(own) != spec:
                return
        except SettingsMismatchError:
            return
        if own.get("omitted"):
            raise UserError(f"{path} is a thin copy of a store, and only whole ones are built on; give the whole store")
    else:
        n_images = _recorded_images(path, spec)
        attributes = {**(own if isinstance(own, dict) else {}), **attributes}
        if not n_images:
            return  # nothing says that this is such a store; opening it says what is wrong
        logger.warning("%s is damaged: writing it again", path / "zarr.json")
    lay_out_store(path, spec, image_ids=images.ids[:n_images], labels=images.labels[:n_images], attributes=attributes)
    store = StoreReader(path)
    shards = part.shards(store.n_shards)
    damaged = withdraw_damaged(store, shards, label="checking", show_progress=show_progress)
    for finding in damaged:
        logger.warning("%s; building the shard again", finding)
    if damaged and store.attributes["complete"]:
        finish_store(path, {"complete": False})


def _recorded_images(path: Path, spec: BuildSpec) -> int:
    """How many images a store has at least, by the records of shards that were made with `spec`; 0 without any."""
    records = [read_json(file) for file in path.glob("records/*.json")]
    ours = [record for record in records if isinstance(record, dict) and record.get("settings") == spec.to_attributes()]
    return max((record["images"][1] for record in ours if files.is_sealed(record)), default=0)
