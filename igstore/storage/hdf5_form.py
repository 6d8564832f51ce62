"""A store as one HDF5 file, read: `igstore.storage.hdf5_layout` says what is in it.

Datasets are contiguous, so that the images are mapped into memory where they are in the file; h5py is asked only where
that is, and for what is small. The file is opened anew each time, so nothing of HDF5's is held in a process that forks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igstore.errors import DamagedStoreError, StoreNotFoundError, UserError
from igstore.files import Recorded, map_array, open_regular, parse_json, read_parts, reading
from igstore.storage import hdf5_layout, layout
from igstore.storage.arrays import ImageArray, Recording


class Hdf5Form:
    """What an HDF5 file of a store holds; picklable.

    Parameters
    ----------
    path
        Of the file.

    Raises
    ------
    UserError
        h5py is not installed.
    """

    said: Mapping[str, str] = {}  # no server says anything

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where = str(path)
        try:
            import h5py  # noqa: F401
        except ImportError as error:
            raise UserError(f"{path}: HDF5 needs h5py; install it with `pip install 'igstore[hdf5]'`") from error

    @contextmanager
    def _file(self) -> Iterator[Any]:
        import h5py

        # nobody writes to such a file, and there are mounts without locks
        with h5py.File(self.path, "r", locking=False) as file:
            yield file

    def attributes(self) -> dict[str, Any]:
        """Those of the root, as `ZarrForm.attributes`."""
        with reading(self.where), open(open_regular(self.path), "rb") as content:
            is_hdf5 = content.read(len(hdf5_layout.SIGNATURE)) == hdf5_layout.SIGNATURE
        if not is_hdf5:
            raise StoreNotFoundError(f"{self.where} is neither a folder nor an HDF5 file, so it is no store")
        with reading(self.where), self._file() as file:
            attributes = parse_json(file.attrs.get(hdf5_layout.ATTRIBUTES, "{}"))
            if not isinstance(attributes, dict):
                raise TypeError(f"its attributes are a {type(attributes).__name__}")
            return attributes

    @cached_property
    def shard_size(self) -> int:
        """Images of a shard, as the attributes say."""
        return int(self.attributes()["shard_size"])

    def rankings(self) -> list[str]:
        """The names of what is in the group ``ranks``."""
        import h5py

        with reading(f"{self.where}/ranks"), self._file() as file:
            if "ranks" not in file:
                return []
            if not isinstance(file.get("ranks", getlink=True), h5py.HardLink) or not isinstance(
                file["ranks"], h5py.Group
            ):
                raise TypeError("it is no group of this file")
            return sorted(file["ranks"])

    def records(self, names: Sequence[str]) -> list[bytes | None]:
        """Records, by the names that their files have in Zarr; None for those that are not there."""
        found: list[bytes | None] = []
        with reading(self.where), self._file() as file:
            texts: dict[str, list[bytes]] = {}
            for name in names:
                ranking, shard = layout.parse_record_file(name)
                dataset = hdf5_layout.records_dataset(ranking)
                if dataset not in texts:
                    texts[dataset] = _plain(file, dataset)[:].tolist() if dataset in file else []
                    if not all(isinstance(text, bytes) for text in texts[dataset]):
                        raise TypeError(f"{dataset} are no texts")
                found.append((texts[dataset][shard] or None) if shard < len(texts[dataset]) else None)
        return found

    def is_plain(self, file: str) -> bool:
        """As `ZarrForm.is_plain`; links of HDF5's are not followed anyway."""
        return True

    def problem(self, file: str, recorded: Recorded) -> str:
        """As `ZarrForm.problem`, of the piece of a dataset that such a file would hold."""
        array, shard = layout.parse_shard_file(file)
        first, last = shard * self.shard_size, (shard + 1) * self.shard_size
        try:
            with reading(f"{self.where}/{array}"), self._file() as opened:
                values = _as_texts(_plain(opened, array)[first:last])
        except DamagedStoreError as error:
            return f"cannot be read ({error})"
        return "" if hdf5_layout.piece_checksum(values) == dict(recorded) else "has changed since it was written"

    def image_array(self, name: str, recorded: Recording) -> Hdf5Array:
        """As `ZarrForm.image_array`."""
        return Hdf5Array(self, name, recorded)

    def scalars(
        self, name: str, variable: layout.Variable, shards: Iterable[int], *, shard_size: int, recorded: Recording
    ) -> Iterator[tuple[int, NDArray[Any] | None]]:
        """As `ZarrForm.scalars`, but that the last shard may be short."""
        with reading(f"{self.where}/{name}"), self._file() as file:
            dataset = self._dataset(file, name)
            for shard in shards:
                values = _as_texts(dataset[shard * shard_size : (shard + 1) * shard_size])
                if values.dtype != variable.numpy_dtype or values.ndim != 1:
                    raise TypeError(f"it is {values.dtype}, not {variable.numpy_dtype}")
                yield shard, values if len(values) else None

    def has_shards(self, name: str, variable: layout.Variable, n_images: int, shard_size: int) -> bool:
        """Whether a per-image variable is there for so many images."""
        with reading(f"{self.where}/{name}"), self._file() as file:
            dataset = self._dataset(file, name)
            n_bytes = n_images * dataset.dtype.itemsize
            is_there = dataset.id.get_storage_size() == n_bytes <= self.path.stat().st_size
            return bool(is_there and dataset.shape == (n_images,))

    def _dataset(self, file: Any, name: str) -> Any:
        if name not in file:
            raise StoreNotFoundError(f"{self.where} has no array {name}")
        return _plain(file, name)

    def extent(self, name: str) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
        """Where in the file a dataset begins, its shape and its dtype.

        Raises
        ------
        StoreNotFoundError
            There is no such array.
        DamagedStoreError
            It is not one run of bytes in the file.
        """
        with reading(f"{self.where}/{name}"), self._file() as file:
            dataset = self._dataset(file, name)
            offset, dtype, n_bytes = dataset.id.get_offset(), dataset.dtype, dataset.id.get_storage_size()
            n_expected = int(np.prod(dataset.shape, dtype=object)) * dtype.itemsize
            if offset is None or n_bytes != n_expected or offset + n_bytes > self.path.stat().st_size:
                raise ValueError("it is not one run of bytes in the file, as `igstore export` writes it")
            return int(offset), dataset.shape, dtype


class Hdf5Array(ImageArray):
    """An image-shaped dataset of an HDF5 file.

    Parameters
    ----------
    form, name, recorded
        The store, and as `ImageArray`.
    """

    def __init__(self, form: Hdf5Form, name: str, recorded: Recording) -> None:
        self._path = form.path
        self._offset, shape, dtype = form.extent(name)
        super().__init__(form.where, name, shape, dtype, form.shard_size, recorded)
        self._image_bytes = math.prod(shape[1:]) * dtype.itemsize

    def _new_map(self, shard: int, recorded: Recorded) -> NDArray[Any] | None:
        first, _ = layout.shard_bounds(shard, len(self), self.shard_size)
        with reading(self.where):
            offset = self._offset + first * self._image_bytes
            return map_array(self._path, self.dtype, offset, (self._count(shard), *self.shape[1:]))

    def _read_unmapped(self, shard: int, within: NDArray[np.int64], recorded: Recorded) -> NDArray[Any]:
        starts = self._offset + (shard * self.shard_size + within) * self._image_bytes
        with reading(self.where):
            images = read_parts(self._path, [(start, start + self._image_bytes) for start in starts.tolist()])
            return np.frombuffer(b"".join(images), self.dtype).reshape(-1, *self.shape[1:])


def _plain(file: Any, name: str) -> Any:
    """A dataset of the file itself; what a file may say of other files is not followed."""
    import h5py

    path = ""
    for part in name.split("/"):
        path = f"{path}/{part}"
        if not isinstance(file.get(path, getlink=True), h5py.HardLink):
            raise ValueError(f"{path} is a link")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external or dataset.chunks:
        raise ValueError("it is no contiguous dataset of this file")
    return dataset


def _as_texts(values: NDArray[Any]) -> NDArray[Any]:
    """Strings as NumPy has them, and numbers as they are."""
    if values.dtype.kind != "O":
        return values
    return np.array([value.decode() for value in values.tolist()], np.dtypes.StringDType())
