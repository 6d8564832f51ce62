"""The only writer of Zarr: make a store, make it larger, put it right, write a shard and its record, finish it.

A shard is written array by array, each file whole and atomically, and then its record; a shard without its record does
not exist. Every write covers whole shards: anything else, by two writers of one shard, would silently lose data.

Metadata and lists of images are files of which it is known what they must hold, so that to make, to extend and to
repair a store is the same work: to write those that hold something else. Whoever writes holds the store's folder, so
that nothing gets into another store that has taken its place, and has others wait; what was read before is read again.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from igstore import files
from igstore.errors import DamagedStoreError, StoreExistsError, StoreNotFoundError, UserError, option
from igstore.files import MOST_METADATA, NOT_THERE, Folder, parse_json, read_whole, reading
from igstore.masks import block_grid, ranking_parts
from igstore.schema import BLOCK_X, BLOCK_Y, IMAGE, BuildSpec, Compress
from igstore.storage import layout
from igstore.storage.concurrency import check_in_place, gone, hold, replaced, writing
from igstore.storage.reader import Sharded, StoreReader
from igstore.storage.zarr_metadata import ZSTD, array_document, group_document

Arrays = Mapping[str, NDArray[Any]]
Record = dict[str, Any]
Contents = dict[str, bytes]  # what files must hold, by name

_ROOT = "zarr.json"
_RANK_ARRAYS = ("/rank/zarr.json", "/share/zarr.json")


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
        Must not exist, or be an empty folder, or a link to either.
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
    target = path.resolve()
    making = files.temporary_name(target)
    try:
        making.mkdir(parents=True)
        lay_out_store(making, spec, image_ids=image_ids, labels=labels, attributes=attributes)
        making.replace(target)
        files.flush_names(target.parent)
    except OSError as error:
        if path.exists() and any(path.iterdir()):
            raise StoreExistsError(f"{path} has been made by another process meanwhile") from error
        raise UserError(f"the store cannot be made at {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def lay_out_store(
    path: Path, spec: BuildSpec, *, image_ids: Sequence[str], labels: NDArray[np.int32], attributes: Mapping[str, Any]
) -> None:
    """Write those metadata and lists of images that are not there or not right; parameters as `create_store`.

    It waits for nobody: the folder is one that nobody else knows of.
    """
    with hold(path) as folder:
        _put(folder, contents(path, spec, image_ids=image_ids, labels=labels, attributes=attributes))


def extend_store(path: Path, *, image_ids: Sequence[str], labels: NDArray[np.int32]) -> None:
    """List more images at the end of a store, which keeps what is built; a short last shard is to be built again.

    A store that lists as many already, because another process was faster, is left as it is.

    Parameters
    ----------
    path
        A store whose images are the first of `image_ids`.
    image_ids, labels
        All images, old and new.
    """
    with hold(path) as folder, writing(folder):
        store = StoreReader(path)
        if store.n_images >= len(image_ids):
            return
        # the record of a shard that is short now and will not be must go first
        if store.n_images % store.shard_size:
            folder.remove(layout.record_file(store.n_shards - 1))
        attributes = {**store.attributes, "complete": False}
        _put(folder, contents(path, store.spec, image_ids=image_ids, labels=labels, attributes=attributes))


def bring_about(path: Path, wanted: Callable[[], Contents | None]) -> None:
    """Write those files of metadata and of lists of images that do not hold what they must.

    Where nothing is wrong nothing is written, and nobody waits: it may be where nothing can be.

    Parameters
    ----------
    path
        The store.
    wanted
        Gives what files must hold, from the store as it is when it is called; None leaves all as it is.
    """
    first = wanted()
    if first is None or not _wrong(path, first):
        return
    with hold(path) as folder, writing(folder):
        if now := wanted():
            _put(folder, now)


def _put(folder: Folder, wanted: Contents) -> None:
    wrong = _wrong(folder.path, wanted)
    check_in_place(folder)
    # readers go by the root's number of images, so it comes last; until then the arrays are only longer than it says
    for name, content in wrong.items():
        _write(folder, name, content)


def _write(folder: Folder, name: str, *pieces: bytes | memoryview) -> None:
    """Write a file of a store; nothing else has business there."""
    try:
        folder.write(name, *pieces)
    except IsADirectoryError:
        folder.remove(name)
        folder.write(name, *pieces)


def _wrong(path: Path, wanted: Contents) -> Contents:
    """Those files that hold something else than is wanted; the root's metadata come last, with a copy of all others."""
    others = {name: content for name, content in wanted.items() if name != _ROOT}
    wrong = {name: content for name, content in others.items() if not _holds(path / name, content)}
    root = json.loads(wanted[_ROOT]) if _ROOT in wanted else read_json(path / _ROOT)
    root["consolidated_metadata"] = consolidated(path, wrong)
    if read_json(path / _ROOT) != root:
        wrong[_ROOT] = (json.dumps(root, indent=1, allow_nan=False) + "\n").encode()
    return wrong


def _holds(file: Path, content: bytes) -> bool:
    if file.name == _ROOT:
        return bool(read_json(file) == json.loads(content))
    try:
        with reading(file):
            return read_whole(file, len(content)) == content
    except (DamagedStoreError, *NOT_THERE):
        return False


def contents(
    path: Path, spec: BuildSpec, *, image_ids: Sequence[str], labels: NDArray[np.int32], attributes: Mapping[str, Any]
) -> Contents:
    """What all metadata and lists of images of a store must hold; parameters as `create_store`."""
    wanted = metadata(spec, len(image_ids), attributes)
    compress = attributes.get("compress")
    for group in (path / "ranks").glob(f"*/{_ROOT}"):
        name = group.parent.name
        parts = ranking_parts(name)
        if parts:
            ranks = ranking_metadata(spec, len(image_ids), name, block=parts[1], attributes={}, compress=compress)
            wanted |= {name: content for name, content in ranks.items() if name.endswith(_RANK_ARRAYS)}
    for name, values in layout.listed(spec, image_ids, labels).items():
        for shard in range(layout.shard_count(len(image_ids), spec.shard_size)):
            of_shard = slice(*layout.shard_bounds(shard, len(image_ids), spec.shard_size))
            file = layout.shard_file(name, shard, 1)
            wanted[file] = _chunk(values[of_shard], spec.shard_size, layout.variables(spec)[name])
    return wanted


def write_shard(
    store: Path | Folder,
    spec: BuildSpec,
    n_images: int,
    shard: int,
    arrays: Arrays,
    record: Record,
    *,
    instead_of: Record | None = None,
    given_up: threading.Event | None = None,
) -> Record:
    """Write one whole shard of the build, then its record.

    Parameters
    ----------
    store, spec, n_images
        The store, by its path or held.
    shard
        Its number.
    arrays
        Every variable of the store, each (images of the shard, ...).
    record
        What to record besides the images, the settings, how many maps are 0 everywhere and the files' checksums, which
        are added.
    instead_of
        The record that the shard has, as far as the caller knows; None where it is not finished. Where it has another
        one by now, because somebody else was faster, nothing is written.
    given_up
        As `igstore.storage.concurrency.writing`.

    Returns
    -------
    The record that the shard has now.

    Raises
    ------
    UserError
        An array is not exactly the shard's, in length, shape or dtype.
    StoreNotFoundError
        The store is gone, or another is in its place.
    """
    counted = {"zero_maps": layout.zero_maps(arrays)} if "attribution" in arrays else {}
    recorded = {**record, **counted, "settings": spec.to_attributes()}
    with _held(store) as folder, writing(folder, given_up=given_up):
        group = check_there(folder, spec, n_images)
        there = group.record(shard)
        if there is not None and there != instead_of:
            return there
        return _write_pieces(folder, group, group, shard, arrays, recorded)


@contextmanager
def _held(store: Path | Folder) -> Iterator[Folder]:
    if isinstance(store, Folder):
        yield store
    else:
        with hold(store) as folder:
            yield folder


def check_there(folder: Folder, spec: BuildSpec, n_images: int) -> StoreReader:
    """The store in a folder that is held, if it is still the one that is being written.

    Raises
    ------
    StoreNotFoundError
        It is gone, or another is in its place.
    """
    store = _opened(folder)
    if store.spec != spec or store.n_images != n_images:
        raise replaced(folder.path)
    return store


def _check_still_there(folder: Folder, store: StoreReader, root: bytes | None) -> None:
    """As `check_there`, of a store whose metadata were `root`; where they still are, it is not opened again."""
    check_in_place(folder)
    if folder.read(_ROOT) != root:
        check_there(folder, store.spec, store.n_images)


def _opened(folder: Folder) -> StoreReader:
    check_in_place(folder)
    try:
        store = StoreReader(folder.path)
    except StoreNotFoundError:
        raise gone(folder.path) from None
    check_in_place(folder)
    return store


def create_ranking(path: Path, name: str, *, block: int, attributes: Mapping[str, Any]) -> None:
    """Make the arrays of a ranking, or make those that are there as long as the store.

    Parameters
    ----------
    path
        The store.
    name
        As `igstore.masks.ranking_name` gives it.
    block
        Side of a block in pixels.
    attributes
        JSON-ready attributes of the ranking's group.
    """

    def wanted() -> Contents:
        store = StoreReader(path)
        compress = store.attributes.get("compress")
        return ranking_metadata(store.spec, store.n_images, name, block=block, attributes=attributes, compress=compress)

    bring_about(path, wanted)


def write_rank_shard(
    store: Path | Folder,
    name: str,
    shard: int,
    arrays: Arrays,
    record: Record,
    *,
    instead_of: Record | None = None,
) -> Record | None:
    """Write one whole shard of the ranking `name` (``rank`` and ``share``), then its record; as `write_shard`.

    The record says which maps were ranked, under ``attribution_sha256``. Where the store has other maps by now, or
    none, nothing is written, and None is returned.
    """
    with _held(store) as folder, writing(folder, shared=True):
        reader = _opened(folder)
        built, group = reader.record(shard), reader.ranking(name)
        if built is None or reader.attribution_sha256(built) != record.get("attribution_sha256"):
            return None
        there = group.record(shard)
        if there is not None and there != instead_of:
            return there
        return _write_pieces(folder, reader, group, shard, arrays, record)


def finish_store(path: Path, attributes: Mapping[str, Any] | Callable[[StoreReader], Mapping[str, Any]]) -> None:
    """Add attributes that are known at the end, and consolidate the metadata; doing it twice is harmless.

    A store is only said to be ``complete`` where every shard is finished: another process may have extended it.

    Parameters
    ----------
    path
        The store.
    attributes
        What to add, or a function that gives it from the store as it is.
    """

    def wanted() -> Contents | None:
        store = StoreReader(path)
        added = attributes(store) if callable(attributes) else attributes
        if added.get("complete") and not store.is_complete:
            return None
        return {_ROOT: metadata(store.spec, store.n_images, {**store.attributes, **added})[_ROOT]}

    bring_about(path, wanted)


def consolidated(path: Path, instead: Mapping[str, bytes] | None = None) -> dict[str, Any]:
    """The copy of all other metadata that the root's must hold, in the form that zarr gives it.

    Parameters
    ----------
    path
        The store.
    instead
        What files will hold, rather than what they hold now.
    """
    groups = [path, path / "ranks", *(file.parent for file in path.glob(f"ranks/*/{_ROOT}"))]
    found = {file.relative_to(path).as_posix() for group in groups for file in group.glob(f"*/{_ROOT}")}
    will = {name: json.loads(content) for name, content in (instead or {}).items() if name.endswith(f"/{_ROOT}")}
    documents = {name: read_json(path / name) for name in found - will.keys()} | will
    intact = {
        name.removesuffix(f"/{_ROOT}"): documents[name] for name in sorted(documents) if documents[name] is not None
    }
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
    """The ``zarr.json`` of a group, of those above it and of its arrays, by name of file."""
    home = f"{group}/" if group else ""
    above = [f"{folder}/" for folder in group.split("/")[:-1]] + [""] if group else []
    documents = {f"{folder}{_ROOT}": group_document({}) for folder in above}
    documents[f"{home}{_ROOT}"] = group_document(attributes)
    for name, variable in variables.items():
        shape = [sizes[dim] for dim in variable.dims]
        documents[f"{home}{name}/{_ROOT}"] = array_document(variable, shape, shard_size, compress)
    return documents


def read_json(path: Path) -> Any:
    """What a JSON file says; None where it is not there, or not JSON."""
    try:
        with reading(path):
            return parse_json(read_whole(path, MOST_METADATA))
    except (DamagedStoreError, *NOT_THERE):
        return None


def _write_pieces(
    folder: Folder, store: StoreReader, group: Sharded, shard: int, arrays: Arrays, record: Record
) -> Record:
    """Write a shard of a store, or of one of its rankings, while others are kept from it."""
    if set(arrays) != set(group.variables):
        raise UserError(f"a shard needs the arrays {sorted(group.variables)}; it was given {sorted(arrays)}")
    first, last = group.bounds(shard)
    for name, variable in group.variables.items():
        values, expected = arrays[name], (last - first, *(group.sizes[dim] for dim in variable.dims[1:]))
        if values.shape != expected or values.dtype != variable.numpy_dtype:
            raise UserError(
                f"shard {shard} of {name} is {values.dtype} {values.shape}; it must be {variable.dtype} {expected}: "
                "only whole shards are written"
            )
    root = folder.read(_ROOT)
    folder.remove(group.record_file(shard))  # from here to the end, the shard does not exist
    sums = {}
    for name, file in group.shard_files(shard).items():
        variable = group.variables[name]
        if variable.is_sharded:
            pieces = _shard(arrays[name], group.shard_size, store.attributes.get("compress"))
        else:
            pieces = [_chunk(arrays[name], group.shard_size, variable)]
        # lists are there since the store was made; what is recorded is what they must hold, whatever became of them
        if name not in layout.LISTED or not _holds(folder.path / file, bytes(pieces[0])):
            _write(folder, file, *pieces)
        sums[file] = files.checksum_of(pieces)
    _check_still_there(folder, store, root)
    content = files.sealed({"shard": shard, "images": [first, last], **record, "files": sums})
    folder.write_json(group.record_file(shard), content)
    return content


def _shard(values: NDArray[Any], shard_size: int, compress: Compress | None) -> list[bytes | memoryview]:
    """What Zarr's sharding codec makes of images (image, ...), in a tenth of its time where they are not compressed.

    The images' bytes one after the other, each compressed by itself, then the index: an offset and a length for each,
    all ones for those that a short shard lacks, and the index's CRC-32C.
    """
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    if compress:
        codec = Zstd(**ZSTD)
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


def _chunk(values: NDArray[Any], shard_size: int, variable: layout.Variable) -> bytes:
    """What Zarr makes of one uncompressed chunk of scalars (image,): as long as every other, filled up at the end."""
    if variable.dtype == "string":
        texts = np.full(shard_size, variable.fill_value, object)
        texts[: len(values)] = values.tolist()
        return bytes(numcodecs.VLenUTF8().encode(texts))
    chunk = np.full(shard_size, variable.fill_value, variable.numpy_dtype.newbyteorder("<"))
    chunk[: len(values)] = values
    return chunk.tobytes()
