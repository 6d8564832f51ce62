"""Finished units of an unfinished shard, kept in files of their own until the shard is whole.

A unit is a few consecutive images. Units are fixed by the settings, so that a build that was killed and goes on
computes the same batches as one that was not. A unit's file is there whole or not at all, and is not part of the store.
The folder that holds them, beside the locks of `igstore.storage.presence`, is gone when nobody is at work any more.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igstore.errors import StoreNotFoundError
from igstore.schema import BuildSpec
from igstore.storage.files import PARTIAL, is_of_another_machine, temporaries, write_atomically

Arrays = dict[str, NDArray[Any]]

_DIGEST_BYTES = hashlib.sha256().digest_size

_ABANDONED_SECONDS = 3600  # an unfinished file that has not changed for so long is nobody's, whoever is at work


def folder(store: Path) -> Path:
    """Where units are, relative to where the store is."""
    return store / "staging"


def make_folder(store: Path) -> Path:
    """Make the folder if it is not there; a store that was deleted does not come back by it.

    Raises
    ------
    StoreNotFoundError
        There is no store.
    """
    if not (store / "zarr.json").exists():
        raise StoreNotFoundError(f"{store} is gone: it was deleted or moved while it was being written; start again")
    folder(store).mkdir(exist_ok=True)
    return folder(store)


def _file(store: Path, first: int) -> Path:
    return folder(store) / f"{first:08d}.npz"


def save_unit(store: Path, spec: BuildSpec, first: int, arrays: Arrays) -> None:
    """Keep the arrays of the unit, made with `spec`, whose first image is number `first`."""
    content = BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    make_folder(store)
    try:
        write_atomically(_file(store, first), content.getvalue(), _digest(spec, content.getvalue()))
    except FileNotFoundError:
        # where there are no locks, somebody may have finished the store and swept: then nothing needs to be kept
        make_folder(store)


def load_unit(store: Path, spec: BuildSpec, first: int, count: int) -> Arrays | None:
    """The arrays of the unit that starts at image `first`.

    None unless it is there, as it was saved, of `count` images, and made with `spec`: somebody may have put another
    store in the place of the one that it was for.
    """
    try:
        stored = _file(store, first).read_bytes()
    except FileNotFoundError:
        return None
    content, digest = stored[:-_DIGEST_BYTES], stored[-_DIGEST_BYTES:]
    if _digest(spec, content) != digest:
        return None
    with np.load(BytesIO(content), allow_pickle=False) as loaded:
        arrays = dict(loaded)
    return arrays if all(len(values) == count for values in arrays.values()) else None


def kept_images(store: Path, spec: BuildSpec) -> int:
    """How many images the units that are there hold, of those made with `spec`."""
    count = 0
    for file in _units(store):
        try:
            stored = file.read_bytes()
        except OSError:
            continue  # it is in a finished shard meanwhile
        content, digest = stored[:-_DIGEST_BYTES], stored[-_DIGEST_BYTES:]
        if _digest(spec, content) == digest:
            with np.load(BytesIO(content), allow_pickle=False) as loaded:
                count += len(loaded["status"])
    return count


def _digest(spec: BuildSpec, content: bytes) -> bytes:
    return hashlib.sha256(json.dumps(spec.to_attributes()).encode() + content).digest()


def discard_units(store: Path, first: int, last: int) -> None:
    """Forget the units of images `first` to `last` (exclusive), which are in a finished shard now."""
    for path in _units(store):
        if path.stem.isdigit() and first <= int(path.stem) < last:
            path.unlink(missing_ok=True)


def _units(store: Path) -> list[Path]:
    # others may remove the folder at any time, which os.walk does not mind
    return [Path(home, name) for home, _, names in os.walk(folder(store)) for name in names if name.endswith(".npz")]


def leftovers(store: Path) -> list[Path]:
    """What interrupted writers left: unfinished files in the store, unfinished stores beside it, the staging folder."""
    unfinished = [Path(home, name) for home, _, names in os.walk(store) for name in names if name.endswith(PARTIAL)]
    return [*unfinished, *temporaries(store), *filter(Path.exists, [folder(store)])]


def sweep(store: Path, *, is_alone: bool, now: float) -> None:
    """Remove leftovers, but not the staging folder while there are units in it.

    Parameters
    ----------
    store
        Where the store is.
    is_alone
        Whether locks say that nobody else is at work. They may know nothing of other machines, and there may be none:
        what others may still be writing goes when it has not changed for an hour.
    now
        The time, in seconds since 1970, by the clock that the store's files go by.
    """
    for leftover in leftovers(store):
        try:
            is_old = now - leftover.stat().st_mtime > _ABANDONED_SECONDS
        except FileNotFoundError:
            continue  # somebody else sweeps, too
        if leftover == folder(store):
            if not _units(store):
                shutil.rmtree(leftover, ignore_errors=True)
        elif is_old or (is_alone and not is_of_another_machine(leftover)):
            _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
