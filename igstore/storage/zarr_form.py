"""A store as Zarr lays it out in files: attributes, records, per-image variables, shards of image-shaped arrays.

A raw shard whose inner chunks are complete and in order is one run of bytes: its index is checked once, and a local
file is mapped into memory. Of any other raw or zstd shard the index says where each image is, and neighbours are read
in one go. What is compressed otherwise goes through zarr-python, which needs a folder.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
from numpy.typing import NDArray

from igstore.errors import DamagedStoreError, StoreNotFoundError
from igstore.files import NOT_THERE, LocalFiles, Part, Recorded, Source, map_array, parse_json, reading
from igstore.storage import layout
from igstore.storage.arrays import ImageArray, Recording
from igstore.storage.zarr_metadata import ArrayMetadata, array_metadata

_ROOT = "zarr.json"
_CHECKSUM_BYTES = 4  # of a shard's index
_ENTRY_BYTES = 16  # of it for an image: offset and length, both uint64
_ABSENT = np.iinfo(np.uint64).max  # the offset and the length of a chunk that was not written
_MANY = 256  # small files at a time, so that what is read is bounded by what is there


class ZarrForm:
    """What the files of a store hold; picklable.

    Parameters
    ----------
    source
        Where they are.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.where = source.where

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "where": self.where}  # what was read is read again in each process

    def attributes(self) -> dict[str, Any]:
        """Those of the root group.

        Raises
        ------
        StoreNotFoundError
            There is no Zarr group.
        DamagedStoreError
            Its metadata cannot be read.
        """
        try:
            document = self._root
        except NOT_THERE:
            document = {}
        if document.get("node_type") != "group":
            raise StoreNotFoundError(
                f"there is no store at {self.where}; `igstore build --model NAME --data PATH --store STORE` makes one"
            )
        attributes = document.get("attributes", {})
        if not isinstance(attributes, dict):
            raise DamagedStoreError(f"{self.where}/{_ROOT} has no attributes")
        return attributes

    def rankings(self) -> list[str]:
        """The names of what is in the group ``ranks``."""
        if isinstance(self.source, LocalFiles):
            ranks = self.source.root / "ranks"
            with reading(ranks), suppress(*NOT_THERE):
                return sorted(name for name in os.listdir(ranks) if (ranks / name / _ROOT).is_file())
            return []
        parts = [name.split("/") for name in self._consolidated]
        return sorted(name for group, *rest in parts if group == "ranks" and len(rest) == 1 for name in rest)

    @property
    def said(self) -> Mapping[str, str]:
        """As `igstore.files.Source.said`."""
        return self.source.said

    def records(self, names: Sequence[str]) -> list[bytes | None]:
        """Records, by name of file; None for those that are not there."""
        return self.source.read_many(names)

    def is_plain(self, file: str) -> bool:
        """As `igstore.files.Source.is_plain`."""
        return self.source.is_plain(file)

    def problem(self, file: str, recorded: Recorded) -> str:
        """Why a file is not the one that was recorded, in words that follow its name; "" where it is."""
        return self.source.problem(file, recorded)

    def image_array(self, name: str, recorded: Recording) -> ZarrArray:
        """An array whose first dimension is image, such as ``attribution`` or ``ranks/positive-3/rank``.

        Raises
        ------
        StoreNotFoundError
            There is no such array.
        """
        return ZarrArray(self, name, recorded)

    def scalars(
        self, name: str, variable: layout.Variable, shards: Iterable[int], *, shard_size: int, recorded: Recording
    ) -> Iterator[tuple[int, NDArray[Any] | None]]:
        """The values (image,) of a per-image variable in some shards, as long as a whole one; None where missing.

        What comes from afar must be what `recorded` says, of shards that it knows.

        Raises
        ------
        DamagedStoreError
            The array is not laid out so, or what is there is not the values of a shard.
        StoreNotFoundError
            There is no such array.
        """
        dtype = variable.numpy_dtype
        array = self.metadata(name)
        if array.dtype != dtype or array.chunks != (shard_size,) or array.encoding != "plain":
            raise DamagedStoreError(
                f"{self.where}/{name} is {array.dtype} {array.shape}; it must be {dtype}, plain, in chunks of "
                f"{shard_size}"
            )
        left = iter(shards)
        while some := list(itertools.islice(left, _MANY)):
            names = [layout.shard_file(name, shard, 1) for shard in some]
            records = [] if isinstance(self.source, LocalFiles) else list(map(recorded, some))
            were = [record and record["files"].get(file) for file, record in zip(names, records, strict=False)]
            for shard, file, content in zip(some, names, self.source.read_many(names, were), strict=True):
                with reading(f"{self.where}/{file}"):
                    values = None if content is None else _values(content, dtype, shard_size)
                yield shard, values

    def has_shards(self, name: str, variable: layout.Variable, n_images: int, shard_size: int) -> bool:
        """Whether a per-image variable is there for so many images, going by the sizes of its files alone."""
        left = iter(range(layout.shard_count(n_images, shard_size)))
        n_bytes = 0
        while some := list(itertools.islice(left, _MANY)):
            sizes = self.source.sizes([layout.shard_file(name, shard, 1) for shard in some])
            if None in sizes:
                return False
            n_bytes += sum(size or 0 for size in sizes)
        return n_bytes >= n_images * variable.numpy_dtype.itemsize

    def metadata(self, name: str) -> ArrayMetadata:
        """What the metadata of an array say."""
        try:
            document = self._document(name)
        except NOT_THERE as error:
            raise StoreNotFoundError(f"{self.where} has no array {name}") from error
        with reading(f"{self.where}/{name}"):
            return array_metadata(document)

    def _document(self, name: str) -> dict[str, Any]:
        """The metadata of an array. Who cannot list files goes by the copy in the root's, and saves a request."""
        if isinstance(self.source, LocalFiles):
            return self._json(f"{name}/{_ROOT}")
        if name not in self._consolidated:
            raise FileNotFoundError(name)
        return self._consolidated[name]

    @cached_property
    def _consolidated(self) -> dict[str, dict[str, Any]]:
        found = self._root.get("consolidated_metadata")
        documents = found.get("metadata") if isinstance(found, dict) else None
        if not isinstance(documents, dict) or not all(isinstance(one, dict) for one in documents.values()):
            raise DamagedStoreError(
                f"{self.where}/{_ROOT} holds no copy of the others' metadata, which readers from afar need; "
                "run `igstore build` again where the store was made, and copy it again"
            )
        return documents

    @cached_property
    def _root(self) -> dict[str, Any]:
        return self._json(_ROOT)

    def _json(self, file: str) -> dict[str, Any]:
        with reading(f"{self.where}/{file}"):
            document = parse_json(self.source.read(file))
            if not isinstance(document, dict):
                raise TypeError(f"it is a {type(document).__name__}")
            return document


class ZarrArray(ImageArray):
    """An image-shaped array in Zarr's files.

    Parameters
    ----------
    form, name, recorded
        The store, and as `ImageArray`.
    """

    def __init__(self, form: ZarrForm, name: str, recorded: Recording) -> None:
        self._source = form.source
        self._indices: dict[int, NDArray[np.uint64]] = {}
        array = form.metadata(name)
        self._encoding = array.encoding
        super().__init__(form.where, name, array.shape, array.dtype, array.chunks[0], recorded)
        self._image_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize

    def _new_map(self, shard: int, recorded: Recorded) -> NDArray[Any] | None:
        if self._encoding != "raw":
            return None
        with self._reading(shard):
            path = self._source.path(self._file(shard), recorded)
            if path is None:
                return None
            index, count = self._index(shard, recorded), self._count(shard)
            starts = np.arange(count, dtype=np.uint64) * np.uint64(self._image_bytes)
            is_one_run = (index[:, 0] == starts).all()
            return map_array(path, self.dtype, 0, (count, *self.shape[1:])) if is_one_run else None

    def _read_unmapped(self, shard: int, within: NDArray[np.int64], recorded: Recorded) -> NDArray[Any]:
        with self._reading(shard):
            if self._encoding in ("raw", "zstd"):
                return self._read_chunks(shard, within, recorded)
            return self._read_through_zarr(shard, within)

    def _read_chunks(self, shard: int, within: NDArray[np.int64], recorded: Recorded) -> NDArray[Any]:
        """Images by where the shard's index says that they are."""
        index = self._index(shard, recorded)
        parts = _runs(index[np.unique(within)].astype(np.int64), self._source.gap)
        contents = self._source.read_parts(self._file(shard), parts, recorded)
        starts = np.array([first for first, _ in parts])
        result = np.zeros((len(within), *self.shape[1:]), self.dtype)
        flat = result.reshape(len(within), -1).view(np.uint8)  # (image, byte)
        for place, (offset, length) in enumerate(index[within].tolist()):
            run = int(np.searchsorted(starts, offset, side="right")) - 1
            chunk = memoryview(contents[run])[offset - starts[run] :][:length]
            self._decode(chunk, flat[place])
        return result

    def _decode(self, chunk: memoryview, out: NDArray[np.uint8]) -> None:
        if self._encoding == "zstd":
            numcodecs.Zstd().decode(chunk, out)  # refuses what would not fit
        else:
            out[...] = np.frombuffer(chunk, np.uint8)

    def _index(self, shard: int, recorded: Recorded) -> NDArray[np.uint64]:
        """Where each image of a shard begins, and how long it is: uint64 (image, 2), within the file."""
        if shard not in self._indices:
            file = self._file(shard)
            size = self._source.size(file, recorded)
            n_bytes = self.shard_size * _ENTRY_BYTES
            end = size - n_bytes - _CHECKSUM_BYTES  # of the images
            if end < 0:
                raise ValueError(f"it has {size} bytes, fewer than its index")
            (content,) = self._source.read_parts(file, [(end, size)], recorded)
            if google_crc32c.value(content[:n_bytes]) != int.from_bytes(content[n_bytes:], "little"):
                raise ValueError("its index has changed since it was written")
            index = np.frombuffer(content, "<u8", 2 * self._count(shard)).reshape(-1, 2)
            offset, length = index.T
            if (offset == _ABSENT).any():
                raise ValueError("its index lacks images, though the shard is finished")
            if (offset > end).any() or (length > np.uint64(end) - offset).any():
                raise ValueError("its index points out of it")
            if self._encoding == "raw" and (length != self._image_bytes).any():
                raise ValueError(f"its index says that images have other than {self._image_bytes} bytes")
            self._indices[shard] = index
        return self._indices[shard]

    def _read_through_zarr(self, shard: int, within: NDArray[np.int64]) -> NDArray[Any]:
        if not isinstance(self._source, LocalFiles):
            raise DamagedStoreError(
                f"{self.where} is compressed in a way that is only read from a folder; copy the store, or have it "
                "exported with --compress zstd"
            )
        import zarr  # takes long to load, and seldom reads

        array = zarr.open_array(self._source.root / self.name, mode="r", zarr_format=3)
        first = shard * self.shard_size
        # runs of neighbours in one request each
        runs = np.split(within, np.flatnonzero(np.diff(within) != 1) + 1)
        found = np.concatenate([np.asarray(array[first + run[0] : first + run[-1] + 1]) for run in runs])
        return np.ascontiguousarray(found)  # zarr-python may be configured to give another order

    @contextmanager
    def _reading(self, shard: int) -> Iterator[None]:
        what = f"shard {shard} of {self.name} in {self._source.where}"
        try:
            with reading(what):
                yield
        except NOT_THERE as error:
            raise DamagedStoreError(
                f"{what}: its file {self._file(shard)} is missing, though its record says that it was written; "
                "run the build again to repair it"
            ) from error


def _runs(chunks: NDArray[np.int64], gap: int) -> list[Part]:
    """Parts of a file that hold all chunks (chunk, [offset, length]), neighbours in one."""
    runs: list[Part] = []
    for offset, length in chunks[np.argsort(chunks[:, 0], kind="stable")].tolist():
        if runs and offset <= runs[-1][1] + gap:
            runs[-1] = (runs[-1][0], max(runs[-1][1], offset + length))
        else:
            runs.append((offset, offset + length))
    return runs


def _values(content: bytes, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """What a chunk of a per-image variable holds, (image,)."""
    if dtype.kind == "T":
        # checked first, because the decoder sets aside as much as a chunk says that it holds
        if int.from_bytes(content[:4], "little") != count:
            raise ValueError(f"it says that it holds {int.from_bytes(content[:4], 'little')} strings, not {count}")
        return np.asarray(numcodecs.VLenUTF8().decode(content)).astype(dtype)
    values = np.frombuffer(content, dtype.newbyteorder("<"))
    if len(values) != count:
        raise ValueError(f"it holds {len(values)} values, not {count}")
    return values
