"""The only writer of Zarr: make a store, make it larger, put it right, write a shard and its record, finish it.

A shard is written array by array, each file whole and atomically, and then its record; a shard without its record does
not exist. Every write covers whole shards: anything else, by two writers of one shard, would silently lose data.
Metadata and lists of images are written by one function that leaves alone what is right already, so that to make, to
extend and to repair a store is the same work, and doing it twice is harmless.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from igstore.blocks import block_grid
from igstore.errors import StoreExistsError, StoreNotFoundError, UserError
from igstore.schema import BLOCK_X, BLOCK_Y, IMAGE, BuildSpec, Compress
from igstore.storage import files, layout
from igstore.storage.reader import Sharded, StoreReader
from igstore.wording import option

Arrays = Mapping[str, NDArray[Any]]

_ROOT = "zarr.json"
_RANK_ARRAYS = ("/rank/zarr.json", "/share/zarr.json")

# How image-shaped arrays may be compressed, one image at a time.
_ZSTD: dict[str, Any] = {"level": 3, "checksum": False}
_COMPRESSORS = {"zstd": ZstdCodec(**_ZSTD)}


def create_store(
    path: Path,
    spec: BuildSpec,
    *,
    image_ids: Sequence[str],
    labels: NDArray[np.int32],
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
        The images in order, and int32 (image,) class indices, -1 unknown.
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
        raise StoreExistsError(
            f"{path} exists and is not a store of igstore's; give another {option('store')}, or remove it"
        )
    making = files.temporary_name(path)
    try:
        lay_out_store(making, spec, image_ids=image_ids, labels=labels, attributes=attributes)
        making.replace(path)
    except OSError as error:
        if path.exists() and any(path.iterdir()):
            raise StoreExistsError(f"{path} has been made by another process meanwhile") from error
        raise UserError(f"the store cannot be made at {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def extend_store(path: Path, *, image_ids: Sequence[str], labels: NDArray[np.int32]) -> None:
    """List more images at the end of a store, which keeps what is built; a short last shard is to be built again.

    Parameters
    ----------
    path
        A store whose images are the first of `image_ids`.
    image_ids, labels
        All images, old and new.
    """
    store = StoreReader(path)
    # the record of a shard that is short now and will not be must go first
    if store.n_images % store.shard_size:
        (path / layout.record_file(store.n_shards - 1)).unlink(missing_ok=True)
    attributes = {**store.attributes, "complete": False}
    lay_out_store(path, store.spec, image_ids=image_ids, labels=labels, attributes=attributes)


def lay_out_store(
    path: Path,
    spec: BuildSpec,
    *,
    image_ids: Sequence[str],
    labels: NDArray[np.int32],
    attributes: Mapping[str, Any],
) -> None:
    """Write those metadata and lists of images that are not there or not right; parameters as `create_store`."""
    documents = metadata(spec, len(image_ids), attributes)
    root = documents.pop(_ROOT)
    compress = attributes.get("compress")
    for folder in (path / "ranks").glob("*"):
        parts = layout.ranking_parts(folder.name)
        if parts:
            ranks = ranking_metadata(
                spec, len(image_ids), folder.name, block=parts[1], attributes={}, compress=compress
            )
            documents |= {name: content for name, content in ranks.items() if name.endswith(_RANK_ARRAYS)}
    _write_documents(path, documents)
    for name, values in (("image_id", np.array(image_ids, np.dtypes.StringDType())), ("label", labels)):
        array = zarr.open_array(path / name, mode="r+").with_config({"write_empty_chunks": True})
        for shard in range(layout.shard_count(len(image_ids), spec.shard_size)):
            of_shard = slice(*layout.shard_bounds(shard, len(image_ids), spec.shard_size))
            file = path / layout.shard_file(name, shard, 1)
            if not _holds(file, array, of_shard, values[of_shard]):
                file.unlink(missing_ok=True)  # zarr would read what it overwrites in part
                array[of_shard] = values[of_shard]
    # readers go by the root's number of images, so it comes last; until then the arrays are only longer than it says
    consolidate(path, root)


def write_shard(
    path: Path, spec: BuildSpec, n_images: int, shard: int, arrays: Arrays, record: dict[str, Any]
) -> dict[str, Any]:
    """Write one whole shard of the build, then its record, which is returned.

    Parameters
    ----------
    path, spec, n_images
        The store.
    shard
        Its number.
    arrays
        Every variable of the store but `layout.LISTED`, each (images of the shard, ...).
    record
        What to record besides the images, the settings, how many maps are 0 everywhere and the files' checksums, which
        are added.

    Raises
    ------
    UserError
        An array is not exactly the shard's, in length, shape or dtype.
    StoreNotFoundError
        The store is gone, or another is in its place.
    """
    counted = {"zero_maps": layout.zero_maps(arrays)} if "attribution" in arrays else {}
    recorded = {**record, **counted, "settings": spec.to_attributes()}
    return _write_pieces(path, spec, n_images, None, shard, arrays, recorded)


def check_there(path: Path, spec: BuildSpec, n_images: int) -> StoreReader:
    """The store at `path`, if it is still the one that is being written.

    Raises
    ------
    StoreNotFoundError
        It is gone, or another is in its place.
    """
    try:
        store = StoreReader(path)
    except StoreNotFoundError:
        raise StoreNotFoundError(
            f"{path} is gone: it was deleted or moved while it was being written; start again"
        ) from None
    if store.spec != spec or store.n_images != n_images:
        raise StoreNotFoundError(
            f"{path} is not the store that was being written: another process has replaced or extended it; "
            "run the same command again to go on with what is there"
        )
    return store


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
    documents = ranking_metadata(
        store.spec, store.n_images, name, block=block, attributes=attributes, compress=store.attributes.get("compress")
    )
    _write_documents(path, documents)
    consolidate(path)


def write_rank_shard(
    path: Path, name: str, spec: BuildSpec, n_images: int, shard: int, arrays: Arrays, record: dict[str, Any]
) -> dict[str, Any]:
    """Write one whole shard of the ranking `name` (``rank`` and ``share``), then its record; as `write_shard`."""
    return _write_pieces(path, spec, n_images, name, shard, arrays, record)


def finish_store(path: Path, attributes: Mapping[str, Any]) -> None:
    """Add attributes that are known at the end, and consolidate the metadata; doing it twice is harmless."""
    store = StoreReader(path)
    consolidate(path, metadata(store.spec, store.n_images, {**store.attributes, **attributes})[_ROOT])


def consolidate(path: Path, root: bytes | None = None) -> None:
    """Gather all metadata in the root's, which is where readers over HTTP look, since they cannot list.

    Parameters
    ----------
    path
        The store.
    root
        What the root's own metadata say from now on; None leaves them.
    """
    document = json.loads((path / _ROOT).read_bytes() if root is None else root)
    document["consolidated_metadata"] = consolidated(path)
    if read_json(path / _ROOT) != document:
        files.write_json(path / _ROOT, document)


def consolidated(path: Path) -> dict[str, Any]:
    """The copy of all other metadata that the root's must hold, in the form that zarr gives it."""
    patterns = ("*/zarr.json", "ranks/*/zarr.json", "ranks/*/*/zarr.json")
    found = [file for pattern in patterns for file in sorted(path.glob(pattern))]
    documents = {file.parent.relative_to(path).as_posix(): read_json(file) for file in found}
    intact = {name: document for name, document in documents.items() if document is not None}
    return {"kind": "inline", "must_understand": False, "metadata": intact}


def metadata(spec: BuildSpec, n_images: int, attributes: Mapping[str, Any]) -> dict[str, bytes]:
    """What the metadata of a store must say, not consolidated and without rankings: the contents of each file, by name.

    Parameters
    ----------
    spec, n_images
        The store's.
    attributes
        Of the root group, besides those that say `spec` and `n_images`. Two of them say how the arrays are laid out:
        ``omitted``, a list of variables that are left out, and ``compress``, the name of a codec.
    """
    root = files.sealed({**attributes, **spec.to_attributes(), "n_images": n_images})
    variables = layout.variables(spec, attributes.get("omitted", ()))
    sizes = {**layout.sizes(spec), IMAGE: n_images}
    return _documents("", variables, sizes, spec.shard_size, root, attributes.get("compress"))


def ranking_metadata(
    spec: BuildSpec, n_images: int, name: str, *, block: int, attributes: Mapping[str, Any], compress: Compress | None
) -> dict[str, bytes]:
    """What the metadata of a ranking must say, as `metadata`; parameters as `create_ranking`."""
    n_y, n_x = block_grid(*spec.preprocessing.crop, block)
    sizes = {IMAGE: n_images, BLOCK_Y: n_y, BLOCK_X: n_x}
    variables = layout.rank_variables(n_y * n_x)
    documents = _documents(f"ranks/{name}", variables, sizes, spec.shard_size, attributes, compress)
    del documents[_ROOT]
    return documents


def _documents(
    group: str,
    variables: Mapping[str, layout.Variable],
    sizes: Mapping[str, int],
    shard_size: int,
    attributes: Mapping[str, Any],
    compress: Compress | None,
) -> dict[str, bytes]:
    """The ``zarr.json`` of a group, of those above it and of its arrays, by name of file; made in memory."""
    memory: dict[str, Any] = {}
    made = zarr.create_group(MemoryStore(memory), path=group, attributes=dict(attributes))
    for name, variable in variables.items():
        shape = tuple(sizes[dim] for dim in variable.dims)
        made.create_array(
            name,
            shape=shape,
            shards=(shard_size, *shape[1:]) if variable.is_sharded else None,
            chunks=(1, *shape[1:]) if variable.is_sharded else (shard_size,),
            dtype=variable.dtype,
            fill_value=variable.fill_value,
            compressors=_COMPRESSORS[compress] if compress and variable.is_sharded else None,
            filters=None,
            dimension_names=variable.dims,
            attributes={"description": variable.description},
        )
    return {name: buffer.to_bytes() for name, buffer in memory.items()}


def _write_documents(path: Path, documents: Mapping[str, bytes]) -> None:
    """Write those files of metadata that do not say what they must."""
    for name, content in documents.items():
        if read_json(path / name) != json.loads(content):
            files.write_atomically(path / name, content)


def read_json(path: Path) -> Any:
    """What a JSON file says; None where it is not there, or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _holds(file: Path, array: zarr.Array[Any], images: slice, values: NDArray[Any]) -> bool:
    """Whether a piece of an array is there, in a file of its own, and equals `values`."""
    try:
        return file.exists() and np.array_equal(np.asarray(array[images]), values)
    except Exception:  # a damaged chunk makes zarr's codecs raise almost anything
        return False


def _write_pieces(
    path: Path, spec: BuildSpec, n_images: int, ranking: str | None, shard: int, arrays: Arrays, record: dict[str, Any]
) -> dict[str, Any]:
    store = check_there(path, spec, n_images)
    group: Sharded = store.ranking(ranking) if ranking else store
    written = {name: variable for name, variable in group.variables.items() if name not in layout.LISTED}
    if set(arrays) != set(written):
        raise UserError(f"a shard needs the arrays {sorted(written)}; it was given {sorted(arrays)}")
    first, last = group.bounds(shard)
    for name, variable in written.items():
        values, expected = arrays[name], (last - first, *(group.sizes[dim] for dim in variable.dims[1:]))
        if values.shape != expected or values.dtype != variable.dtype:
            raise UserError(
                f"shard {shard} of {name} is {values.dtype} {values.shape}; it must be {variable.dtype} {expected}: "
                "only whole shards are written"
            )
    record_path = path / layout.record_file(shard, ranking)
    record_path.unlink(missing_ok=True)  # from here to the end, the shard does not exist
    sums = {}
    for name, file_name in group.shard_files(shard).items():
        variable = group.variables[name]
        if name in layout.LISTED:
            files.flush(path / file_name)
            sums[file_name] = files.checksum(path / file_name)
            continue
        if variable.is_sharded:
            pieces = _shard(arrays[name], spec.shard_size, store.attributes.get("compress"))
        else:
            pieces = [_raw_chunk(arrays[name], spec.shard_size, variable)]
        files.write_atomically(path / file_name, *pieces)
        sums[file_name] = files.checksum_of(pieces)
    check_there(path, spec, n_images)
    content = files.sealed({"shard": shard, "images": [first, last], **record, "files": sums})
    files.write_json(record_path, content)
    return content


def _shard(values: NDArray[Any], shard_size: int, compress: Compress | None) -> list[bytes | memoryview]:
    """What Zarr's sharding codec makes of images (image, ...), in a tenth of its time where they are not compressed.

    The images' bytes one after the other, each compressed by itself, then the index: an offset and a length for each,
    all ones for those that a short shard lacks, and the index's CRC-32C.
    """
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    if compress:
        codec = Zstd(**_ZSTD)
        pieces = [codec.encode(image) for image in values]
        lengths = np.array([len(piece) for piece in pieces])
    else:
        pieces = [values.data]
        lengths = np.full(len(values), values[0].nbytes)
    entries = np.full((shard_size, 2), np.iinfo(np.uint64).max, "<u8")
    entries[: len(values), 0] = np.cumsum(lengths) - lengths
    entries[: len(values), 1] = lengths
    index = entries.tobytes()
    return [*pieces, index + google_crc32c.value(index).to_bytes(4, "little")]


def _raw_chunk(values: NDArray[Any], shard_size: int, variable: layout.Variable) -> bytes:
    """What Zarr makes of one uncompressed chunk of scalars (image,): as long as every other, filled up at the end."""
    chunk = np.full(shard_size, variable.fill_value, values.dtype.newbyteorder("<"))
    chunk[: len(values)] = values
    return chunk.tobytes()
