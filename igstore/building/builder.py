"""Carrying out a build: make room for it, have what is missing attributed, finish.

What was finished and has been damaged since is found by its checksums, and built again. Who attributes is somebody
else's business: a worker here (`worker`), several processes (`processes`), a cluster's workers (`cluster`). Several
jobs may each build a part; whichever finds all shards done finishes the store.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from igstore import machine
from igstore.building.parts import Part
from igstore.building.plan import Build
from igstore.building.ranking import rank_store
from igstore.building.repair import repair_store
from igstore.building.worker import Advance, Report, Workers
from igstore.cli import Progress
from igstore.errors import (
    IgstoreError,
    SettingsMismatchError,
    StoreExistsError,
    UnfinishedShardError,
    UserError,
    option,
)
from igstore.files import temporary_name
from igstore.storage import StoreReader, at_work, check_there, create_store, extend_store, finish_store, staging

logger = logging.getLogger(__name__)

Hire = Callable[[Build], AbstractContextManager[Workers]]


def run_build(
    build: Build,
    hire: Hire,
    *,
    part: Part,
    rank: bool,
    scheduler: str | None,
    overwrite: bool,
    show_progress: bool,
) -> None:
    """Carry out a planned build.

    Parameters
    ----------
    build
        What to build.
    hire
        Gives those who attribute, in a context; called only if there is something to do.
    part
        Which of the shards. The store is finished and ranked once all parts are there.
    rank, overwrite, show_progress
        As `build_store`.
    scheduler
        Where to rank, as `rank_store`.
    """
    started = time.monotonic()
    if not overwrite and build.path.is_dir():
        repair_store(build.path, build.spec, build.images, _attributes(build), part=part, show_progress=show_progress)
    there = None if overwrite else begun_store(build)
    if there is None or build.n_images > there.n_images or _unfinished(there, part):
        with hire(build) as workers:
            _make_room(build, overwrite=overwrite)
            _attribute(build, workers, part, show_progress=show_progress)
    seconds = time.monotonic() - started
    if staging.leftovers(build.path) or not StoreReader(build.path).attributes.get("complete"):
        with at_work(build.path) as presence:
            _conclude(build, seconds, rank=rank, scheduler=scheduler, show_progress=show_progress)
            store = StoreReader(build.path)
            if store.is_complete:
                staging.discard_units(presence.folder, 0, store.n_images)  # kept by others, of shards that we finished
            presence.sweep()
    else:  # it may be where nothing can be written
        _conclude(build, seconds, rank=rank, scheduler=scheduler, show_progress=show_progress)


def begun_store(build: Build) -> StoreReader | None:
    """The store that an earlier run of this build began; None where there is none yet.

    Raises
    ------
    SettingsMismatchError
        It was made with other settings.
    """
    if not (build.path / "zarr.json").exists():
        return None
    store = StoreReader(build.path)
    differences = store.spec.differences(build.spec)
    if differences:
        listing = "; ".join(f"{name} is {theirs} there and {ours} here" for name, theirs, ours in differences)
        raise SettingsMismatchError(
            f"{build.path} was made with other settings: {listing}. Give the same, another {option('store')}, or "
            f"{option('overwrite')}"
        )
    return store


def _unfinished(store: StoreReader, part: Part) -> list[int]:
    """The part's shards that are not finished, or in which images failed."""
    return [
        shard for shard in part.shards(store.n_shards) if shard not in store.records or store.records[shard]["failed"]
    ]


def _make_room(build: Build, *, overwrite: bool) -> None:
    """Create the store, or extend the one that was begun."""
    path, images = build.path, build.images.head(build.n_images)
    if overwrite and (path / "zarr.json").exists():
        StoreReader(path)  # raises where this is not a store, so that nothing else is ever removed
        with at_work(path) as presence:
            if presence.others:
                raise UserError(
                    f"{path} is not overwritten: somebody is at work there ({', '.join(presence.others)}); "
                    "wait for them, or end that first"
                )
            target = path.resolve()  # of a link, which stays, and leads to the new store
            target.rename(aside := temporary_name(target))
            shutil.rmtree(aside)
    if not (path / "zarr.json").exists():
        try:
            create_store(path, build.spec, image_ids=images.ids, labels=images.labels, attributes=_attributes(build))
        except StoreExistsError:
            if begun_store(build) is None:
                raise
            # somebody else began the same build at the same time
    elif len(images) > StoreReader(path).n_images:
        extend_store(path, image_ids=images.ids, labels=images.labels)


def _attributes(build: Build) -> dict[str, Any]:
    """What a new store says of itself, besides its settings."""
    return {
        "complete": False,
        "wall_seconds": 0.0,
        "class_names": list(build.images.class_names or ()),
        "wnids": list(build.images.wnids or ()),
        **machine.versions(),
    }


def _attribute(build: Build, workers: Workers, part: Part, *, show_progress: bool) -> None:
    """Have the part's unfinished shards built, saying how far that is."""
    store = StoreReader(build.path)
    shards = _unfinished(store, part)
    images, to_do = (
        sum(last - first for first, last in map(store.bounds, some)) for some in (part.shards(store.n_shards), shards)
    )
    label = build.spec.model if part.is_whole else f"{build.spec.model} {part}"
    with (
        at_work(build.path) as presence,
        Progress(images, done=images - to_do, label=label, show=show_progress) as progress,
    ):
        if presence.others and part.is_whole:
            logger.warning(
                "somebody else is at work at %s: %s; going on beside them, and a shard is written by whoever has it "
                "first",
                build.path,
                ", ".join(presence.others),
            )
        workers.attribute(shards, _reporting_to(progress))
        store = check_there(presence.folder, build.spec, store.n_images)
        left = [shard for shard in shards if store.record(shard) is None]
    if left:  # taken back by somebody who found it damaged, or never written by a worker that gave up
        raise IgstoreError(
            f"{len(left)} of {len(shards)} shards were not finished; run the same command again to go on"
        )


def _reporting_to(progress: Progress) -> Report:
    """Counts images, gradient evaluations and completeness errors, and shows them."""
    started = time.monotonic()
    evaluations, errors = 0, np.zeros(0, np.float32)

    def report(advance: Advance) -> None:
        nonlocal evaluations, errors
        if advance.evaluations is None:
            progress.skip(advance.n_images)
            return
        evaluations += advance.evaluations
        errors = np.append(errors, advance.errors)
        rate = evaluations / (time.monotonic() - started)
        median = f"{np.median(errors):.3f}" if len(errors) else "-"
        work = f"{rate:.1f} gradients/s, median completeness error {median}"
        progress.advance(advance.n_images, work if evaluations else "")  # imported maps take none, nor need be complete

    return report


def _final_attributes(store: StoreReader, *, seconds: float) -> dict[str, Any]:
    """What a store says of itself once it is complete, and `seconds` more were spent on it."""
    if store.attributes.get("complete"):
        return {}  # another process was faster
    devices = {record["device"] for record in store.records.values() if "device" in record}
    return {
        "complete": True,
        "device": ", ".join(sorted(devices)),
        "wall_seconds": round(store.attributes.get("wall_seconds", 0.0) + seconds, 1),
        **machine.versions(),
    }


def _conclude(build: Build, seconds: float, *, rank: bool, scheduler: str | None, show_progress: bool) -> None:
    """If all shards are finished, say so in the store, and rank it; doing it twice is harmless."""
    store = StoreReader(build.path)
    if not store.is_complete:
        return
    if not store.attributes.get("complete"):
        finish_store(build.path, partial(_final_attributes, seconds=seconds))
    if rank and build.spec.reduce != "none":
        try:
            rank_store(build.path, scheduler=scheduler, show_progress=show_progress)
        except UnfinishedShardError as error:
            # without locks, two may write a shard at once; the last to have done so finds all shards done, and ranks
            logger.warning("%s: left to whoever writes it", error)
