"""The only writer of Zarr: make a store, make it larger, write a shard and its record, finish it.

A shard is written array by array, each file whole and atomically, and then its record; a shard without its record does
not exist. Every write covers whole shards: anything else, by two writers of one shard, would silently lose data.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import ZarrUserWarning

from igstore import files, layout
from igstore.blocks import block_grid
from igstore.errors import StoreExistsError, StoreNotFoundError, UserError
from igstore.reader import StoreReader
from igstore.schema import BLOCK_X, BLOCK_Y, IMAGE, BuildSpec

Arrays = Mapping[str, NDArray[Any]]


def create_store(
    path: Path,
    spec: BuildSpec,
    *,
    image_ids: Sequence[str],
    labels: NDArray[np.int16],
    attributes: Mapping[str, Any],
) -> None:
    """Make a store with every image listed and none built. It appears under `path` whole, or not at all.

    Parameters
    ----------
    path
        Must not exist, or be an empty folder.
    spec
        What the store is made with.
    image_ids, labels
        The images in order, and int16 (image,) class indices, -1 unknown.
    attributes
        More JSON-ready attributes of the root group.

    Raises
    ------
    StoreExistsError
        Something else is at `path`.
    UserError
        `path` cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StoreExistsError(f"{path} exists and is not a store of igstore's; give another --store, or remove it")
    making = path.with_name(f".{path.name}.{os.getpid()}{files.PARTIAL}")
    try:
        making.parent.mkdir(parents=True, exist_ok=True)
        root = zarr.create_group(making, overwrite=True, attributes={**spec.to_attributes(), **attributes})
        for name, variable in layout.variables(spec).items():
            _create_array(root, name, variable, layout.sizes(spec), len(image_ids), spec.shard_size)
        _list_images(root, image_ids, labels, first=0)
        root.attrs["n_images"] = len(image_ids)
        consolidate(making)
        making.replace(path)
    except OSError as error:
        raise UserError(f"the store cannot be made at {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def extend_store(path: Path, *, image_ids: Sequence[str], labels: NDArray[np.int16]) -> None:
    """List more images at the end of a store, which keeps what is built; a short last shard is to be built again.

    Parameters
    ----------
    path
        A store whose images are the first of `image_ids`.
    image_ids, labels
        All images, old and new.
    """
    store = StoreReader(path)
    root = _open(path)
    # the record of a shard that is short now and will not be must go first
    if store.n_images % store.shard_size:
        (path / layout.record_file(store.n_shards - 1)).unlink(missing_ok=True)
    for name in layout.variables(store.spec):
        array = _array(root, name)
        array.resize((len(image_ids), *array.shape[1:]))
    _list_images(root, image_ids, labels, first=store.n_images - store.n_images % store.shard_size)
    # readers go by this number, so it comes last; until then the arrays are only longer than it says
    root.attrs["n_images"] = len(image_ids)
    consolidate(path)


def write_shard(path: Path, spec: BuildSpec, n_images: int, shard: int, arrays: Arrays, record: dict[str, Any]) -> None:
    """Write one whole shard of the build, then its record.

    Parameters
    ----------
    path, spec, n_images
        The store.
    shard
        Its number.
    arrays
        Every variable of `layout.variables` but `layout.LISTED`, each (images of the shard, ...).
    record
        What to record besides the images and the files' checksums, which are added.

    Raises
    ------
    UserError
        An array is not exactly the shard's, in length, shape or dtype.
    StoreNotFoundError
        The store is gone.
    """
    bounds = layout.shard_bounds(shard, n_images, spec.shard_size)
    variables = layout.variables(spec)
    _write_pieces(path, "", variables, shard, bounds, arrays, path / layout.record_file(shard), record)


def create_ranking(path: Path, name: str, *, block: int, attributes: Mapping[str, Any]) -> None:
    """Make the arrays of a ranking, or make those that are there as long as the store.

    Parameters
    ----------
    path
        The store.
    name
        As `layout.ranking_name` gives it.
    block
        Side of a block in pixels.
    attributes
        JSON-ready attributes of the ranking's group.
    """
    store = StoreReader(path)
    n_y, n_x = block_grid(*store.spec.preprocessing.crop, block)
    group = _open(path).require_group(f"ranks/{name}")
    for array_name, variable in layout.rank_variables(n_y * n_x).items():
        if array_name not in group:
            sizes = {BLOCK_Y: n_y, BLOCK_X: n_x}
            _create_array(group, array_name, variable, sizes, store.n_images, store.shard_size)
        array = _array(group, array_name)
        if array.shape[0] != store.n_images:
            array.resize((store.n_images, *array.shape[1:]))
    group.attrs.update(dict(attributes))
    consolidate(path)


def write_rank_shard(
    path: Path, name: str, spec: BuildSpec, n_images: int, shard: int, arrays: Arrays, record: dict[str, Any]
) -> None:
    """Write one whole shard of the ranking `name` (``rank`` and ``share``), then its record; as `write_shard`."""
    bounds = layout.shard_bounds(shard, n_images, spec.shard_size)
    variables = layout.rank_variables(int(np.prod(arrays["rank"].shape[1:])))
    _write_pieces(
        path, f"ranks/{name}/", variables, shard, bounds, arrays, path / layout.record_file(shard, name), record
    )


def finish_store(path: Path, attributes: Mapping[str, Any]) -> None:
    """Add attributes that are known at the end, and consolidate the metadata; doing it twice is harmless."""
    _open(path).attrs.update(dict(attributes))
    consolidate(path)


def consolidate(path: Path) -> None:
    """Gather all metadata in the root's, which is where readers over HTTP look, since they cannot list."""
    with warnings.catch_warnings():
        # consolidation is not yet in the v3 standard, and `records` is not a node of the hierarchy: both are meant
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(path, zarr_format=3)


def _open(path: Path) -> zarr.Group:
    # consolidated metadata is a copy for readers; what it says of an array that has grown is old
    return zarr.open_group(path, mode="r+", zarr_format=3, use_consolidated=False)


def _create_array(
    group: zarr.Group, name: str, variable: layout.Variable, sizes: Mapping[str, int], n_images: int, shard_size: int
) -> None:
    inner = tuple(sizes[dim] for dim in variable.dims if dim != IMAGE)
    group.create_array(
        name,
        shape=(n_images, *inner),
        shards=(shard_size, *inner) if variable.is_sharded else None,
        chunks=(1, *inner) if variable.is_sharded else (shard_size,),
        dtype=variable.dtype,
        fill_value=variable.fill_value,
        compressors=None,
        filters=None,
        dimension_names=variable.dims,
        attributes={"description": variable.description},
        config={"write_empty_chunks": True},
    )


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise StoreNotFoundError(f"{group.store_path}/{name} is not an array")
    # zarr leaves out all-zero chunks unless told otherwise, and a black image would break the run of bytes
    return array.with_config({"write_empty_chunks": True})


def _list_images(root: zarr.Group, image_ids: Sequence[str], labels: NDArray[np.int16], *, first: int) -> None:
    _array(root, "image_id")[first:] = np.array(image_ids[first:], dtype=np.dtypes.StringDType())
    _array(root, "label")[first:] = labels[first:]


def _write_pieces(
    path: Path,
    prefix: str,
    variables: Mapping[str, layout.Variable],
    shard: int,
    bounds: tuple[int, int],
    arrays: Arrays,
    record_path: Path,
    record: dict[str, Any],
) -> None:
    written = {name: variable for name, variable in variables.items() if name not in layout.LISTED}
    if set(arrays) != set(written):
        raise UserError(f"a shard needs the arrays {sorted(written)}; it was given {sorted(arrays)}")
    _check_there(path)
    group = _open(path / prefix)
    targets = {name: _array(group, name) for name in written}
    first, last = bounds
    for name, target in targets.items():
        values, expected = arrays[name], (last - first, *target.shape[1:])
        if values.shape != expected or values.dtype != target.dtype:
            raise UserError(
                f"shard {shard} of {name} is {values.dtype} {values.shape}; it must be {target.dtype} {expected}: "
                "only whole shards are written"
            )
    record_path.unlink(missing_ok=True)  # from here to the end, the shard does not exist
    for name, target in targets.items():
        if target.shards:
            file = path / layout.shard_file(prefix + name, shard, target.ndim)
            files.write_atomically(file, *_raw_shard(arrays[name], target.shards[0]))
        else:
            target[first:last] = arrays[name]
    sums = {}
    for name, variable in variables.items():
        file_name = layout.shard_file(prefix + name, shard, len(variable.dims))
        files.flush(path / file_name)
        sums[file_name] = files.checksum(path / file_name)
    _check_there(path)
    files.write_json(record_path, {"shard": shard, "images": [first, last], **record, "files": sums})


def _raw_shard(values: NDArray[Any], shard_size: int) -> tuple[memoryview, bytes]:
    """What Zarr's sharding codec makes of uncompressed images (image, ...), in a tenth of its time.

    The images' bytes one after the other, then the index: an offset and a length for each, all ones for those that a
    short shard lacks, and the index's CRC-32C.
    """
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    image_bytes = values[0].nbytes
    entries = np.full((shard_size, 2), np.iinfo(np.uint64).max, "<u8")
    entries[: len(values), 0] = np.arange(len(values)) * image_bytes
    entries[: len(values), 1] = image_bytes
    index = entries.tobytes()
    return values.data, index + google_crc32c.value(index).to_bytes(4, "little")


def _check_there(path: Path) -> None:
    if not (path / "zarr.json").exists():
        raise StoreNotFoundError(f"{path} is gone: it was deleted or moved while it was being written; start again")
