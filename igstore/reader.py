"""Reading a store: its settings, its records, and any images of any array, as fast as the disk allows.

A raw shard whose inner chunks are complete and in order is one run of bytes: its index is checked once and the file is
mapped into memory. Anything else (compressed, incomplete) goes through zarr-python. Nothing here writes or needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.errors
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from igstore import layout
from igstore.errors import DamagedStoreError, StoreNotFoundError
from igstore.schema import NOT_BUILT, BuildSpec

_INDEX_CHECKSUM_BYTES = 4
_INDEX_ENTRY_BYTES = 16  # offset and length, both uint64


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
        self.shape: tuple[int, ...] = array.shape
        self.dtype = np.dtype(array.dtype)
        self.shard_size: int = (array.shards or array.chunks)[0]
        self._is_raw = _is_raw(array)

    @cached_property
    def _array(self) -> zarr.Array[Any]:
        try:
            array = zarr.open_array(self.root / self.name, mode="r", zarr_format=3)
        except (FileNotFoundError, zarr.errors.NodeNotFoundError, zarr.errors.ContainsGroupError) as error:
            raise StoreNotFoundError(f"{self.root} has no array {self.name}") from error
        return array

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
        pieces = []
        try:
            # runs of neighbours in one request each
            for run in np.split(within, np.flatnonzero(np.diff(within) != 1) + 1):
                pieces.append(np.asarray(self._array[first + run[0] : first + run[-1] + 1]))
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise DamagedStoreError(f"shard {shard} of {self.name} in {self.root} cannot be read: {error}") from error
        return np.concatenate(pieces)

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
        count, image_bytes = hi - lo, int(np.prod(self.shape[1:])) * self.dtype.itemsize
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


class _Sharded:
    """A group of arrays written shard by shard, and the records that say which shards are done."""

    def __init__(self, root: Path, *, ranking: str | None, n_images: int, shard_size: int) -> None:
        self.root = root
        self.n_images = n_images
        self.shard_size = shard_size
        self._ranking = ranking
        self._arrays: dict[str, ImageArray] = {}

    @property
    def n_shards(self) -> int:
        return layout.shard_count(self.n_images, self.shard_size)

    @cached_property
    def records(self) -> dict[int, dict[str, Any]]:
        """The record of every finished shard, by its number."""
        return {shard: record for shard in range(self.n_shards) if (record := self.record(shard)) is not None}

    def record(self, shard: int) -> dict[str, Any] | None:
        """The record of one shard as it is now, or None if the shard is not finished."""
        record = read_record(self.root, shard, self._ranking)
        # a short last shard is finished only as long as it is the last
        is_whole = record and record["images"] == list(layout.shard_bounds(shard, self.n_images, self.shard_size))
        return record if is_whole else None

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
            path = f"ranks/{self._ranking}/{name}" if self._ranking else name
            self._arrays[name] = ImageArray(self.root, path, self._is_done)
        return self._arrays[name]


class RankingReader(_Sharded):
    """One ranking of a store: arrays ``rank`` and ``share``, (image, block_y, block_x).

    Ranks of maps that have since been replaced are not finished ones.
    """

    def __init__(self, store: StoreReader, name: str) -> None:
        super().__init__(store.root, ranking=name, n_images=store.n_images, shard_size=store.shard_size)
        self.name = name
        self._store = store

    def record(self, shard: int) -> dict[str, Any] | None:
        """As the store's `record`."""
        record, built = super().record(shard), self._store.records.get(shard)
        is_of_these_maps = (
            record and built and record.get("attribution_sha256") == self._store.attribution_sha256(built)
        )
        return record if is_of_these_maps else None


class StoreReader(_Sharded):
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
    """

    def __init__(self, path: str | Path) -> None:
        root = Path(path)
        try:
            group = zarr.open_group(root, mode="r", zarr_format=3)
        except (FileNotFoundError, NotADirectoryError, zarr.errors.NodeNotFoundError, zarr.errors.ContainsArrayError):
            raise StoreNotFoundError(
                f"there is no store at {root}; make one with `igstore build --model NAME --data PATH --store {root}`"
            ) from None
        self.attributes: dict[str, Any] = dict(group.attrs)
        self.spec = BuildSpec.from_attributes(self.attributes)
        super().__init__(root, ranking=None, n_images=int(self.attributes["n_images"]), shard_size=self.spec.shard_size)
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
            try:
                values = np.asarray(zarr.open_array(self.root / name, mode="r")[: self.n_images])
            except (FileNotFoundError, zarr.errors.NodeNotFoundError) as error:
                raise StoreNotFoundError(f"{self.root} has no array {name}") from error
            if name not in layout.LISTED:
                fill = layout.variables(self.spec)[name].fill_value
                for shard in self.missing_shards:
                    values[slice(*layout.shard_bounds(shard, self.n_images, self.shard_size))] = fill
            self._scalars[name] = values
        return self._scalars[name]

    @property
    def status(self) -> NDArray[np.uint8]:
        """uint8 (image,): 0 not built, 1 built, 2 failed."""
        return self.scalars("status")

    @property
    def failed(self) -> dict[str, str]:
        """Why each failed image failed, by its id."""
        return {name: why for _, record in sorted(self.records.items()) for name, why in record["failed"].items()}

    @property
    def not_built(self) -> NDArray[np.int64]:
        """Indices of the images that no finished shard holds."""
        return np.flatnonzero(self.status == NOT_BUILT)

    @property
    def rankings(self) -> list[str]:
        """Names of the rankings that the store has, finished or not."""
        return sorted(path.parent.name for path in (self.root / "ranks").glob("*/zarr.json"))

    def attribution_sha256(self, record: dict[str, Any]) -> str:
        """The checksum of the maps of the shard that `record` is of."""
        n_dims = len(layout.variables(self.spec)["attribution"].dims)
        return str(record["files"][layout.shard_file("attribution", record["shard"], n_dims)]["sha256"])

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


def read_record(root: Path, shard: int, ranking: str | None = None) -> dict[str, Any] | None:
    """The record of a shard, or None if the shard is not done.

    Raises
    ------
    DamagedStoreError
        The record is there and is not one.
    """
    path = root / layout.record_file(shard, ranking)
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise DamagedStoreError(f"{path} is not a record ({error}); delete it, and run the build again") from error
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict) or "images" not in record:
        raise DamagedStoreError(f"{path} is not a record; delete it, and run the build again")
    return record
