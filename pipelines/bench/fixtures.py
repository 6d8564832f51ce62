"""Stores and folders that benchmarks work on: made at full size in no time, or derived from one that is there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from igstore import cli
from igstore.errors import UserError
from igstore.schema import BUILT, BuildSpec, Preprocessing
from igstore.storage import create_store, finish_store, layout, write_shard

_ROLL = 4999  # a prime: no two shards are rolled alike


@contextmanager
def scratch(parent: Path | None, n_bytes: int) -> Iterator[Path]:
    """A folder with room for `n_bytes`, below `parent` or where temporary files go, and gone afterwards.

    Raises
    ------
    UserError
        There is not that much room.
    """
    with TemporaryDirectory(prefix="igstore-bench-", dir=parent) as folder:
        free = shutil.disk_usage(folder).free
        if free < n_bytes:
            raise UserError(
                f"{Path(folder).parent} has {cli.size(free)} free, and {cli.size(n_bytes)} are needed; "
                "give --scratch DIR"
            )
        yield Path(folder)


def synthetic_spec(*, crop: tuple[int, int] = (224, 224), shard_size: int = 500) -> BuildSpec:
    """The settings of a synthetic store, which has no pixels."""
    return BuildSpec(
        model="synthetic",
        weights="none",
        weights_sha256="0" * 64,
        preprocessing=Preprocessing(resize=None, crop=crop),
        images_fingerprint="0" * 64,
        pixels=False,
        shard_size=shard_size,
    )


def synthetic_bytes(n_images: int) -> int:
    """Bytes on disk of a synthetic store and its ranking, roughly."""
    return int(1.05 * n_images * (layout.image_bytes(synthetic_spec()) + 75 * 75 * 6))


def make_synthetic_store(
    path: Path, n_images: int, *, crop: tuple[int, int] = (224, 224), shard_size: int = 500, seed: int = 0
) -> None:
    """A store of normally distributed random maps, written as a build writes it.

    The maps of the first shard are rolled by another distance in each further one, so that no two are alike.
    """
    spec = synthetic_spec(crop=crop, shard_size=shard_size)
    labels = np.full(n_images, -1, np.int32)
    ids = [f"synthetic_{image:06d}" for image in range(n_images)]
    create_store(path, spec, image_ids=ids, labels=labels, attributes={"complete": False})
    n_first = min(n_images, shard_size)
    maps = np.random.default_rng(seed).standard_normal((n_first, *crop), np.float32)
    maps *= 1.5 / np.abs(maps).max(axis=(1, 2), keepdims=True)  # as to_float16 scales them
    first_maps = maps.astype(np.float16)
    for shard in range(layout.shard_count(n_images, shard_size)):
        first, last = layout.shard_bounds(shard, n_images, shard_size)
        arrays = layout.unbuilt(spec, last - first)
        arrays["attribution"][...] = np.roll(first_maps.reshape(n_first, -1), shard * _ROLL, axis=1).reshape(
            first_maps.shape
        )[: last - first]
        arrays["status"][...] = BUILT
        arrays |= layout.listed(spec, ids[first:last], labels[first:last])
        record = {"failed": {}, "in_top5": 0, "evaluations": 0, "batch_size": [], "seconds": 0.0, "device": "none"}
        write_shard(path, spec, n_images, shard, arrays, record)
    finish_store(path, {"complete": True})


def unranked_copy(store: Path, path: Path) -> Path:
    """A store of the same maps without their ranks, at `path`: metadata and records are copied, arrays are linked."""
    path.mkdir(parents=True)
    shutil.copy(store / "zarr.json", path)
    (path / "records").mkdir()
    for record in (store / "records").glob("*.json"):
        shutil.copy(record, path / "records")
    for array in store.glob("*/zarr.json"):
        if array.parent.name != "ranks":
            (path / array.parent.name).symlink_to(array.parent.absolute())
    return path


def write_jpegs(pixels: NDArray[np.uint8], folder: Path, *, first: int = 0) -> None:
    """Images (image, channel, y, x) as JPEG files in `folder`, in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, image in enumerate(pixels, first):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{place:06d}.JPEG", quality=90)
