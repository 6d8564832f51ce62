"""Finished units of an unfinished shard, kept in files of their own until the shard is whole.

A unit is a few consecutive images. Units are fixed by the settings, so that a build that was killed and goes on
computes the same batches as one that was not. A unit's file is there whole or not at all, and is not part of the store.
"""

from __future__ import annotations

import shutil
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igstore.files import write_atomically

Arrays = dict[str, NDArray[Any]]


def _folder(store: Path) -> Path:
    return store / "staging"


def _file(store: Path, first: int) -> Path:
    return _folder(store) / f"{first:08d}.npz"


def save_unit(store: Path, first: int, arrays: Arrays) -> None:
    """Keep the arrays of the unit whose first image is number `first`."""
    content = BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    write_atomically(_file(store, first), content.getvalue())


def load_unit(store: Path, first: int, count: int) -> Arrays | None:
    """The arrays of the unit that starts at image `first`; None unless it is there, whole, and of `count` images."""
    try:
        with np.load(_file(store, first), allow_pickle=False) as content:
            arrays = dict(content)  # reading checks the CRC of each
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
    return arrays if all(len(values) == count for values in arrays.values()) else None


def discard_units(store: Path, first: int, last: int) -> None:
    """Forget the units of images `first` to `last` (exclusive), which are in a finished shard now."""
    for path in _folder(store).glob("*.npz"):
        if path.stem.isdigit() and first <= int(path.stem) < last:
            path.unlink(missing_ok=True)


def sweep(store: Path) -> None:
    """Remove the staging folder and whatever interrupted writers left in the store."""
    shutil.rmtree(_folder(store), ignore_errors=True)
    for leftover in store.rglob("*.partial*"):
        leftover.unlink(missing_ok=True)
