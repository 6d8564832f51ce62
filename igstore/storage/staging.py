"""Finished units of an unfinished shard, kept in files of their own until the shard is whole.

A unit is a few consecutive images. Units are fixed by the settings, so that a build that was killed and resumes
computes the same batches as one that was not. A unit's file is there whole or not at all, and is not part of the store.
It holds a checksum of each image's pixels instead of the pixels, which are read from the images again.
The folder that holds them, beside the locks of `igstore.storage.concurrency`, is gone when nobody is at work any more.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from igstore.files import PARTIAL, Folder, is_of_another_machine, temporaries
from igstore.masks import ranking_parts
from igstore.schema import BuildSpec

Arrays = dict[str, NDArray[Any]]

FOLDER = "staging"  # within the store's

_CHECKSUMS = "pixels_crc32c"
_DIGEST_BYTES = hashlib.sha256().digest_size

_ABANDONED_SECONDS = 3600  # an unfinished file that has not changed for so long is nobody's, whoever is at work


def _file(first: int) -> str:
    return f"{FOLDER}/{first:08d}.npz"


def save_unit(store: Folder, spec: BuildSpec, first: int, arrays: Arrays) -> None:
    """Keep the arrays of the unit, made with `spec`, whose first image is number `first`; of pixels their checksums."""
    kept = dict(arrays)
    if "pixels" in kept:
        kept[_CHECKSUMS] = _checksums(kept.pop("pixels"))
    content = BytesIO()
    np.savez(content, allow_pickle=False, **kept)
    with suppress(FileNotFoundError):  # where there are no locks, somebody may have finished the store and swept
        store.write(_file(first), content.getbuffer(), _digest(spec, content.getbuffer()))


def load_unit(
    store: Folder, spec: BuildSpec, first: int, count: int, read_pixels: Callable[[], NDArray[np.uint8]]
) -> Arrays | None:
    """The arrays of the unit that starts at image `first`.

    None unless it is there, as it was saved, of `count` images, and made with `spec`, and of the pixels that
    `read_pixels` gives, which is called where the store holds pixels.
    """
    arrays = _read_unit(store, spec, _file(first))
    if arrays is None or any(len(values) != count for values in arrays.values()):
        return None
    if spec.pixels:
        arrays["pixels"] = read_pixels()
        if not np.array_equal(arrays.pop(_CHECKSUMS, ()), _checksums(arrays["pixels"])):
            return None
    return arrays


def _checksums(pixels: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The CRC-32C of each image's pixels, (image,)."""
    return np.array([google_crc32c.value(image.tobytes()) for image in pixels], np.uint32)


def kept_images(store: Folder, spec: BuildSpec) -> int:
    """How many images the units that are there hold, of those made with `spec`."""
    kept = [_read_unit(store, spec, f"{FOLDER}/{name}") for name in units(store)]
    return sum(len(arrays["status"]) for arrays in kept if arrays is not None)


def _read_unit(store: Folder, spec: BuildSpec, name: str) -> Arrays | None:
    stored = store.read(name)  # None where it is in a finished shard meanwhile
    if stored is None:
        return None
    content, digest = memoryview(stored)[:-_DIGEST_BYTES], stored[-_DIGEST_BYTES:]
    if _digest(spec, content) != digest:
        return None
    with np.load(BytesIO(content), allow_pickle=False) as loaded:
        return dict(loaded)


def _digest(spec: BuildSpec, content: memoryview) -> bytes:
    digest = hashlib.sha256(json.dumps(spec.to_attributes()).encode())
    digest.update(content)
    return digest.digest()


def discard_units(store: Folder, first: int, last: int) -> None:
    """Forget the units of images `first` to `last` (exclusive), which are in a finished shard now."""
    for name in units(store):
        number = name.removesuffix(".npz")
        if number.isdigit() and first <= int(number) < last:
            store.remove(f"{FOLDER}/{name}")


def units(store: Folder) -> list[str]:
    """The names of the files that hold units."""
    return [name for name in store.names(FOLDER) if name.endswith(".npz")]


def leftovers(store: Path) -> list[Path]:
    """What interrupted writers left.

    Unfinished files in the store, unfinished stores beside it, rankings that there are only parts of, the staging
    folder.
    """
    unfinished = [Path(home, name) for home, _, names in os.walk(store) for name in names if name.endswith(PARTIAL)]
    of_rankings = [path for group in ("ranks", "records") for path in sorted(store.glob(f"{group}/*/"))]
    orphans = [path for path in of_rankings if _is_orphan(store, path.name)]
    return [*unfinished, *temporaries(store), *orphans, *filter(Path.exists, [store / FOLDER])]


def _is_orphan(store: Path, ranking: str) -> bool:
    return bool(ranking_parts(ranking)) and not (store / "ranks" / ranking / "zarr.json").exists()


def sweep(store: Folder, *, is_alone: bool, now: float) -> None:
    """Remove leftovers, but not the staging folder.

    Parameters
    ----------
    store
        Where to.
    is_alone
        Whether locks say that nobody else is at work. They may know nothing of other machines, and there may be none:
        what others may still be writing goes when it has not changed for an hour.
    now
        The time, in seconds since 1970, by the clock that the store's files go by.
    """
    for leftover in leftovers(store.path):
        try:
            is_old = now - leftover.stat().st_mtime > _ABANDONED_SECONDS
        except FileNotFoundError:
            continue  # somebody else sweeps, too
        if leftover == store.path / FOLDER or not (is_old or (is_alone and not is_of_another_machine(leftover))):
            continue
        if store.path in leftover.parents:
            store.remove(leftover.relative_to(store.path).as_posix())
        else:
            shutil.rmtree(leftover, ignore_errors=True)  # a store that was never finished, beside this one
