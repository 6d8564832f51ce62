"""Writing a store as one HDF5 file, laid out by `igstore.storage.hdf5_layout`. h5py is imported when it is needed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from igstore import files
from igstore.cli import Progress
from igstore.errors import UserError
from igstore.schema import IMAGE
from igstore.storage import hdf5_layout
from igstore.storage.copies import read_shard
from igstore.storage.layout import ranking_attributes
from igstore.storage.reader import Sharded, StoreReader

_ALIGNMENT = 4096  # bytes: datasets of that size and more begin at pages of memory
_SHARD = "shard"  # the dimension of records
_BARE_DIMENSION = "This is a netCDF dimension but not a netCDF variable.%10d"  # netCDF-4's own words


def write_hdf5(store: StoreReader, path: Path, *, progress: Progress) -> None:
    """Write a finished store as one file.

    Parameters
    ----------
    store
        As `igstore.storage.check_finished` wants it.
    path
        The file, empty.
    progress
        Counts the images.

    Raises
    ------
    UserError
        h5py is not installed.
    DamagedStoreError
        A shard is not what its record says.
    """
    rankings = [store.ranking(name) for name in store.rankings]
    for image_id in store.image_ids:
        if "\0" in image_id:
            raise UserError(f"the image id {image_id!r} has a zero byte, which HDF5's texts cannot have")
    alignment = {"alignment_threshold": _ALIGNMENT, "alignment_interval": _ALIGNMENT}
    # the oldest format in which an attribute may exceed 64 kB, as a list of class names may
    with new_file(path, libver=("v110", "v110"), **alignment) as (file, check):
        raw = {name: value for name, value in store.attributes.items() if name != "compress"}
        _lay_out(file, store, None, files.sealed(raw))
        for ranking in rankings:
            attributes = ranking_attributes(store.spec, ranking.score, ranking.block)
            _lay_out(file, ranking, ranking.name, attributes)
        for shard in range(store.n_shards):
            record = _write_shard(file, store, None, shard)
            for ranking in rankings:
                _write_shard(file, ranking, ranking.name, shard, attribution_sha256=store.attribution_sha256(record))
            check()
            first, last = store.bounds(shard)
            progress.advance(last - first)


@contextmanager
def new_file(path: Path, **options: Any) -> Iterator[tuple[Any, Callable[[], None]]]:
    """A new HDF5 file to write, as h5py has it with these `options`.

    Yields
    ------
    The file, and a function to call now and then, which raises what went wrong so far.

    Raises
    ------
    UserError
        h5py is not installed.
    OSError
        It cannot be written; a full disk among other things.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError("HDF5 needs h5py; install it with `pip install 'igstore[hdf5]'`") from error
    with _Target(path) as target:
        try:
            with h5py.File(target, "w", **options) as file:
                yield file, target.check
        finally:
            target.check()  # rather than what HDF5 says of what it does not find again


class _Target(io.FileIO):
    """A new file for HDF5 to write to, without locks.

    HDF5 is never told that something could not be written: it would crash, at the latest when it closes the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._failure: OSError | None = None

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if self._failure:
            raise self._failure

    def write(self, content: Any) -> int:
        """As `io.RawIOBase.write`; all is written, or thrown away once something could not be."""
        left = memoryview(content).cast("B")
        n_bytes = len(left)
        try:
            while left and not self._failure:
                left = left[super().write(left) :]
        except OSError as error:
            self._failure = error
        return n_bytes

    def truncate(self, size: int | None = None) -> int:
        """As `io.RawIOBase.truncate`."""
        try:
            return super().truncate(size)
        except OSError as error:
            self._failure = error
            return 0


def _lay_out(file: Any, group: Sharded, ranking: str | None, attributes: Mapping[str, Any]) -> None:
    """Make the datasets of a store or of a ranking, empty, with netCDF-4's names of dimensions."""
    import h5py

    home = file.require_group(f"ranks/{ranking}") if ranking else file
    for name, value in hdf5_layout.attribute_values(attributes).items():
        home.attrs[name] = value
    lengths = {IMAGE: group.n_images, **group.sizes}
    for name, variable in group.variables.items():
        dtype = h5py.string_dtype() if variable.dtype == "string" else np.dtype(variable.dtype).newbyteorder("<")
        dataset = file.create_dataset(group.array_path(name), [lengths[dim] for dim in variable.dims], dtype)
        dataset.attrs["description"] = variable.description
        for axis, dim in enumerate(variable.dims):
            # those of all images are the root's
            dataset.dims[axis].attach_scale(_dimension(file if dim == IMAGE else home, dim, lengths[dim]))
    records = file.create_dataset(hdf5_layout.records_dataset(ranking), (group.n_shards,), h5py.string_dtype())
    records.dims[0].attach_scale(_dimension(file["records"], _SHARD, group.n_shards))


def _dimension(group: Any, name: str, length: int) -> Any:
    """The dimension of a group, made as netCDF-4 makes those without coordinates; it takes no room."""
    if name not in group:
        scale = group.create_dataset(name, (length,), ">f4")
        scale.make_scale(_BARE_DIMENSION % length)
    return group[name]


def _write_shard(file: Any, group: Sharded, ranking: str | None, shard: int, **fields: Any) -> dict[str, Any]:
    """Write a shard's piece of every dataset, and then its record with these `fields`, which is returned."""
    record, arrays = read_shard(group, shard)
    first, last = group.bounds(shard)
    sums = {}
    for name, values in arrays.items():
        file[group.array_path(name)][first:last] = values.astype(object) if values.dtype.kind == "T" else values
        sums[group.shard_files(shard)[name]] = hdf5_layout.piece_checksum(values)
    record = files.sealed({**record, **fields, "files": sums})
    file[hdf5_layout.records_dataset(ranking)][shard] = json.dumps(record)
    return record
