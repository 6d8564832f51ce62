"""Reading a store: its settings, its records, and any images of any array, as fast as the disk allows.

A raw shard whose inner chunks are complete and in order is one run of bytes: its index is checked once and the file is
mapped into memory. Anything else (compressed, incomplete) goes through zarr-python. Nothing here writes or needs torch.

A store may come from anywhere. Nothing in it is run, no path is taken from its contents, what it says of itself is held
against the files that are there before memory is set aside for it, and whatever is wrong is an error of igstore's own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.errors
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from igstore import layout
from igstore.blocks import block_grid
from igstore.errors import DamagedStoreError, IgstoreError, StoreNotFoundError
from igstore.schema import BLOCK_X, BLOCK_Y, NOT_BUILT, BuildSpec

_INDEX_CHECKSUM_BYTES = 4
_INDEX_ENTRY_BYTES = 16  # offset and length, both uint64

_NOT_THERE = (
    FileNotFoundError,
    NotADirectoryError,
    zarr.errors.NodeNotFoundError,
    zarr.errors.ContainsArrayError,
    zarr.errors.ContainsGroupError,
)


@contextmanager
def _reading(what: str | Path) -> Iterator[None]:
    """Whatever zarr raises of contents that are not what they should be comes out as `DamagedStoreError`."""
    try:
        yield
    except (IgstoreError, *_NOT_THERE):
        raise
    except Exception as error:  # zarr and its codecs raise almost anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DamagedStoreError(f"{what} cannot be read: {reason}") from error


class ImageArray:
    """One array of a store whose first dimension is image; opened when first read, and picklable.

    Parameters
    ----------
    root, name
        The store's folder, and the array's name in it, such as ``attribution`` or ``ranks/positive-3/rank``.
    is_done
        Whether a shard may be read.

    Raises
    ------
    StoreNotFoundError
        The store has no such array.
    """

    def __init__(self, root: Path, name: str, is_done: Callable[[int], bool]) -> None:
        self.root = root
        self.name = name
        self._is_done = is_done
        self._maps: dict[int, NDArray[Any] | None] = {}
        array = self._array
        with _reading(self.root / self.name):
            self.shape: tuple[int, ...] = array.shape
            self.dtype = np.dtype(array.dtype)
            self.shard_size: int = (array.shards or array.chunks)[0]
            self._is_raw = _is_raw(array)

    @cached_property
    def _array(self) -> zarr.Array[Any]:
        try:
            with _reading(self.root / self.name):
                return zarr.open_array(self.root / self.name, mode="r", zarr_format=3)
        except _NOT_THERE as error:
            raise StoreNotFoundError(f"{self.root} has no array {self.name}") from error

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_array", None)  # zarr arrays and memory maps are opened again in each process
        return state | {"_maps": {}}

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, images: Iterable[int] | NDArray[np.integer[Any]] | slice) -> NDArray[Any]:
        """The array's values for some images, in the order given: (len(images), ...).

        Raises
        ------
        IndexError
            An index is below 0 or not below the number of images.
        DamagedStoreError
            An image's shard is not finished, or its file contradicts the layout.
        """
        if isinstance(images, slice):
            wanted = np.arange(*images.indices(len(self)))
        else:
            wanted = np.asarray(images if isinstance(images, np.ndarray) else list(images), dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"images {wanted.min()} to {wanted.max()} of {self.name}, which has {len(self)}")
        result = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        shards = wanted // self.shard_size
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            result[places] = self._read_shard(shard, wanted[places] - shard * self.shard_size)
        return result

    def shard(self, shard: int) -> NDArray[Any]:
        """All images of a shard, (image, ...), not to be written to: where it is one run of bytes, a memory map.

        Raises
        ------
        DamagedStoreError
            As `read`.
        """
        first, last = layout.shard_bounds(shard, len(self), self.shard_size)
        mapped = self._map(shard)
        return self._read_shard(shard, np.arange(last - first)) if mapped is None else mapped

    def _read_shard(self, shard: int, within: NDArray[np.int64]) -> NDArray[Any]:
        mapped = self._map(shard)
        if mapped is not None:
            return mapped[within]
        first = shard * self.shard_size
        with _reading(f"shard {shard} of {self.name} in {self.root}"):
            # runs of neighbours in one request each
            runs = np.split(within, np.flatnonzero(np.diff(within) != 1) + 1)
            return np.concatenate([np.asarray(self._array[first + run[0] : first + run[-1] + 1]) for run in runs])

    def _map(self, shard: int) -> NDArray[Any] | None:
        """The shard as a memory map (image, ...), or None where it is not one run of bytes."""
        if not self._is_done(shard):
            raise DamagedStoreError(
                f"shard {shard} of {self.name} in {self.root} is not finished; "
                f"`igstore info {self.root}` says what is missing"
            )
        if shard not in self._maps:
            self._maps[shard] = self._checked_map(shard) if self._is_raw else None
        return self._maps[shard]

    def _checked_map(self, shard: int) -> NDArray[Any] | None:
        path = self.root / layout.shard_file(self.name, shard, len(self.shape))
        lo, hi = layout.shard_bounds(shard, len(self), self.shard_size)
        count, image_bytes = hi - lo, math.prod(self.shape[1:]) * self.dtype.itemsize
        index_bytes = self.shard_size * _INDEX_ENTRY_BYTES + _INDEX_CHECKSUM_BYTES
        try:
            if path.stat().st_size != count * image_bytes + index_bytes:
                return None
            index = np.fromfile(path, "<u8", 2 * count, offset=count * image_bytes).reshape(count, 2)
            in_order = (index[:, 0] == np.arange(count) * image_bytes).all() and (index[:, 1] == image_bytes).all()
            return np.memmap(path, self.dtype, "r", shape=(count, *self.shape[1:])) if in_order else None
        except FileNotFoundError as error:
            raise DamagedStoreError(
                f"{path} is missing, though its record says that it was written; run the build again to repair it"
            ) from error


def _is_raw(array: zarr.Array[Any]) -> bool:
    """Whether complete shards of this array are the images' bytes one after the other, then the index."""
    plain = BytesCodec()
    inner = BytesCodec(endian=None) if array.dtype.itemsize == 1 else plain  # single bytes have no order
    expected = ShardingCodec(
        chunk_shape=(1, *array.shape[1:]), codecs=(inner,), index_codecs=(plain, Crc32cCodec()), index_location="end"
    )
    return getattr(array.metadata, "codecs", None) == (expected,)


class Sharded:
    """A group of arrays written shard by shard, and the records that say which shards are done.

    Attributes
    ----------
    root
        The store's folder.
    n_images, shard_size
        As the store says.
    variables, sizes
        What the arrays must be, by name, and the lengths of their dimensions apart from the images'.
    """

    def __init__(
        self,
        root: Path,
        *,
        ranking: str | None,
        n_images: int,
        shard_size: int,
        variables: Mapping[str, layout.Variable],
        sizes: Mapping[str, int],
    ) -> None:
        self.root = root
        self._ranking = ranking
        self.n_images = n_images
        self.shard_size = shard_size
        self.variables = variables
        self.sizes = sizes
        self._arrays: dict[str, ImageArray] = {}

    @property
    def n_shards(self) -> int:
        """Shards in all, finished or not."""
        return layout.shard_count(self.n_images, self.shard_size)

    def bounds(self, shard: int) -> tuple[int, int]:
        """First image of a shard, and the one after its last."""
        return layout.shard_bounds(shard, self.n_images, self.shard_size)

    def array_path(self, name: str) -> str:
        """Where an array is, relative to the store's root."""
        return f"ranks/{self._ranking}/{name}" if self._ranking else name

    def record_path(self, shard: int) -> Path:
        """Where the record of a shard is, if it is finished."""
        return self.root / layout.record_file(shard, self._ranking)

    def shard_files(self, shard: int) -> dict[str, str]:
        """The files that a shard consists of, relative to the store's root, by variable."""
        return {
            name: layout.shard_file(self.array_path(name), shard, len(variable.dims))
            for name, variable in self.variables.items()
        }

    @cached_property
    def records(self) -> dict[int, dict[str, Any]]:
        """The record of every finished shard, by its number."""
        return {shard: record for shard in range(self.n_shards) if (record := self.record(shard)) is not None}

    def record(self, shard: int) -> dict[str, Any] | None:
        """The record of one shard as it is now, or None if the shard is not finished.

        Raises
        ------
        DamagedStoreError
            The record is there and is not one.
        """
        record = read_record(self.record_path(shard), shard, self.shard_files(shard).values())
        # a short last shard is finished only as long as it is the last
        return record if record and record["images"] == list(self.bounds(shard)) else None

    def _is_done(self, shard: int) -> bool:
        return shard in self.records

    @property
    def missing_shards(self) -> list[int]:
        """Shards that are not finished."""
        return [shard for shard in range(self.n_shards) if shard not in self.records]

    def array(self, name: str) -> ImageArray:
        """An array of this group, refusing shards that are not done.

        Raises
        ------
        StoreNotFoundError
            There is no such array.
        """
        if name not in self._arrays:
            array = ImageArray(self.root, self.array_path(name), self._is_done)
            if name in self.variables:
                self._check(array, self.variables[name])
            self._arrays[name] = array
        return self._arrays[name]

    def _check(self, array: ImageArray, variable: layout.Variable) -> None:
        inner = tuple(self.sizes[dim] for dim in variable.dims[1:])
        is_right = (
            array.dtype == variable.numpy_dtype and array.shape[1:] == inner and array.shard_size == self.shard_size
        )
        if not is_right or len(array) < self.n_images:
            raise DamagedStoreError(
                f"{array.root / array.name} is {array.dtype} {array.shape} in shards of {array.shard_size}; it must be "
                f"{variable.dtype} {(self.n_images, *inner)} in shards of {self.shard_size}"
            )


class RankingReader(Sharded):
    """One ranking of a store: arrays ``rank`` and ``share``, (image, block_y, block_x).

    Ranks of maps that have since been replaced are not finished ones.
    """

    def __init__(self, store: StoreReader, name: str) -> None:
        parts = layout.ranking_parts(name)
        if parts is None:
            raise StoreNotFoundError(f"{name!r} is not the name of a ranking; it must be like positive-3")
        self.score, self.block = parts
        height, width = store.spec.preprocessing.crop
        n_y, n_x = block_grid(height, width, self.block)
        super().__init__(
            store.root,
            ranking=name,
            n_images=store.n_images,
            shard_size=store.shard_size,
            variables=layout.rank_variables(n_y * n_x),
            sizes={BLOCK_Y: n_y, BLOCK_X: n_x},
        )
        self.name = name
        self._store = store

    def record(self, shard: int) -> dict[str, Any] | None:
        """As the store's `record`."""
        record, built = super().record(shard), self._store.records.get(shard)
        is_of_these_maps = (
            record and built and record.get("attribution_sha256") == self._store.attribution_sha256(built)
        )
        return record if is_of_these_maps else None


class StoreReader(Sharded):
    """A store opened for reading; picklable, safe to use after fork.

    Parameters
    ----------
    path
        The store's folder.

    Raises
    ------
    StoreNotFoundError
        There is no Zarr group at `path`.
    SettingsMismatchError
        It is not a store of this format version.
    DamagedStoreError
        Its metadata cannot be read, or it does not hold as many images as it says.
    """

    def __init__(self, path: str | Path) -> None:
        root = Path(path)
        try:
            with _reading(root / "zarr.json"):
                group = zarr.open_group(root, mode="r", zarr_format=3, use_consolidated=False)
                self.attributes: dict[str, Any] = dict(group.attrs)
        except _NOT_THERE:
            raise StoreNotFoundError(
                f"there is no store at {root}; make one with `igstore build --model NAME --data PATH --store {root}`"
            ) from None
        self.spec = BuildSpec.from_attributes(self.attributes)
        for name in ("class_names", "wnids"):
            names = self.attributes.get(name, [])
            if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
                raise DamagedStoreError(f"{root / 'zarr.json'}: {name} is {names!r:.80}, no list of names")
        super().__init__(
            root,
            ranking=None,
            n_images=_count_images(root, self.attributes.get("n_images"), self.spec.shard_size),
            shard_size=self.spec.shard_size,
            variables=layout.variables(self.spec),
            sizes=layout.sizes(self.spec),
        )
        self._scalars: dict[str, NDArray[Any]] = {}

    @property
    def is_complete(self) -> bool:
        """Whether every shard is finished."""
        return not self.missing_shards

    @cached_property
    def image_ids(self) -> tuple[str, ...]:
        """The id of every image, in order."""
        return tuple(self.scalars("image_id").tolist())

    def scalars(self, name: str) -> NDArray[Any]:
        """A per-image variable, (image,), whole; images of unfinished shards hold the "not built" values."""
        if name not in self._scalars:
            values = self._read_scalars(name)
            if name not in layout.LISTED:
                for shard in self.missing_shards:
                    values[slice(*self.bounds(shard))] = self.variables[name].fill_value
            self._scalars[name] = values
        return self._scalars[name]

    def _read_scalars(self, name: str) -> NDArray[Any]:
        try:
            with _reading(self.root / name):
                array = zarr.open_array(self.root / name, mode="r", zarr_format=3)
                dtype = self.variables[name].numpy_dtype
                if array.ndim != 1 or array.shape[0] < self.n_images or array.dtype != dtype:
                    raise ValueError(f"it is {array.dtype} {array.shape}, not {dtype} {(self.n_images,)}")
                if dtype.kind == "T":
                    self._check_counts(name)
                return np.asarray(array[: self.n_images])
        except _NOT_THERE as error:
            raise StoreNotFoundError(f"{self.root} has no array {name}") from error

    def _check_counts(self, name: str) -> None:
        """Raise unless each chunk of strings says that it holds as many as it must: zarr sets aside what it says."""
        for shard in range(self.n_shards):
            file = self.root / self.shard_files(shard)[name]
            with file.open("rb") as chunk:
                count = int.from_bytes(chunk.read(4), "little")
            if count != self.shard_size:
                raise ValueError(f"{file} says that it holds {count} strings, not {self.shard_size}")

    @property
    def status(self) -> NDArray[np.uint8]:
        """uint8 (image,): 0 not built, 1 built, 2 failed."""
        return self.scalars("status")

    @property
    def failed(self) -> dict[str, str]:
        """Why each failed image failed, by its id."""
        records = [self.records[shard] for shard in sorted(self.records)]
        return {name: why for record in records for name, why in record.get("failed", {}).items()}

    @property
    def not_built(self) -> NDArray[np.int64]:
        """Indices of the images that no finished shard holds."""
        return np.flatnonzero(self.status == NOT_BUILT)

    @property
    def rankings(self) -> list[str]:
        """Names of the rankings that the store has, finished or not."""
        names = sorted(path.parent.name for path in (self.root / "ranks").glob("*/zarr.json"))
        return [name for name in names if layout.ranking_parts(name)]

    def attribution_sha256(self, record: dict[str, Any]) -> str:
        """The checksum of the maps of the shard that `record` is of."""
        return str(record["files"][self.shard_files(record["shard"])["attribution"]]["sha256"])

    def ranking(self, name: str) -> RankingReader:
        """A ranking such as ``positive-3``.

        Raises
        ------
        StoreNotFoundError
            The store does not have it; the message says how to make it.
        """
        if name not in self.rankings:
            score, _, block = name.rpartition("-")
            raise StoreNotFoundError(
                f"{self.root} has no ranking {name} (it has {', '.join(self.rankings) or 'none'}); "
                f"make it with `igstore rank {self.root} --score {score} --block {block}`"
            )
        return RankingReader(self, name)


def _count_images(root: Path, n_images: object, shard_size: int) -> int:
    """The number of images that a store says it lists, if it has as many labels.

    Memory for whatever there is one of an image is bounded by it, and so by what is on the disk.
    """
    try:
        with os.scandir(root / "label" / "c") as entries:
            sizes = [entry.stat().st_size for entry in entries]
    except OSError:
        sizes = []
    if (
        type(n_images) is not int
        or not 1 <= n_images <= sum(sizes) // np.dtype(np.int16).itemsize
        or layout.shard_count(n_images, shard_size) > len(sizes)
    ):
        raise DamagedStoreError(f"{root} says that it lists {n_images!r:.20} images, but it has not as many labels")
    return n_images


def read_record(path: Path, shard: int, files: Iterable[str]) -> dict[str, Any] | None:
    """The record of a shard at `path`, or None if there is none.

    Raises
    ------
    DamagedStoreError
        What is there is not the record of that shard, which consists of `files`.
    """
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedStoreError(f"{path} is not a record ({error}); run the build again to repair it") from error
    mistake = layout.record_mistake(record, shard, files)
    if mistake:
        raise DamagedStoreError(f"{path} is not a record ({mistake}); run the build again to repair it")
    return dict(record)
