"""Images of an array, whatever form the store has: any of them, in any order, from shards that are finished."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igstore.errors import DamagedStoreError
from igstore.files import Recorded
from igstore.storage import layout

Recording = Callable[[int], dict[str, Any] | None]  # the record of a shard, None where it is not finished

_MOST_MAPS = 128  # of an array at once: systems limit how many a process may have, and how much they may span


class ImageArray(ABC):
    """One array of a store whose first dimension is image; picklable.

    Parameters
    ----------
    store
        Where the store is.
    name
        The array's name in it, such as ``attribution`` or ``ranks/positive-3/rank``.
    shape, dtype, shard_size
        Of all of it, and how many images a shard has.
    recorded
        The record of a shard that may be read.
    """

    def __init__(
        self,
        store: str,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        shard_size: int,
        recorded: Recording,
    ) -> None:
        self.name = name
        self.where = f"{store}/{name}"
        self.shape = shape
        self.dtype = dtype
        self.shard_size = shard_size
        self._store = store
        self._recorded = recorded
        self._maps: dict[int, NDArray[Any] | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # a map is made again in each process

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
        AccessError
            The system does not let it be read.
        """
        if isinstance(images, slice):
            wanted = np.arange(*images.indices(len(self)))
        else:
            wanted = np.asarray(images if isinstance(images, np.ndarray) else list(images), dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"images {wanted.min()} to {wanted.max()} of {self.name}, which has {len(self)}")
        shards = wanted // self.shard_size
        touched = np.unique(shards).tolist()
        if len(touched) == 1:  # as most batches are, and then nothing is copied twice
            return self._read_shard(touched[0], wanted - touched[0] * self.shard_size)
        result = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        for shard in touched:
            places = np.flatnonzero(shards == shard)
            result[places] = self._read_shard(shard, wanted[places] - shard * self.shard_size)
        return result

    def shard(self, shard: int) -> NDArray[Any]:
        """All images of a shard, (image, ...), not to be written to: where it is one run of bytes, mapped into memory.

        Raises
        ------
        DamagedStoreError, AccessError
            As `read`.
        """
        mapped = self._map(shard)
        return self._read_shard(shard, np.arange(self._count(shard))) if mapped is None else mapped

    def _count(self, shard: int) -> int:
        first, last = layout.shard_bounds(shard, len(self), self.shard_size)
        return last - first

    def _file(self, shard: int) -> str:
        return layout.shard_file(self.name, shard, len(self.shape))

    def _record_of_file(self, shard: int) -> Recorded:
        """Size and checksum of a shard's file; a shard that has none must not be read."""
        record = self._recorded(shard)
        if record is None:
            raise DamagedStoreError(
                f"shard {shard} of {self.name} in {self._store} is not finished; `igstore info {self._store}` says "
                "what is missing"
            )
        recorded: Recorded = record["files"][self._file(shard)]
        return recorded

    def _map(self, shard: int) -> NDArray[Any] | None:
        """The shard mapped into memory, (image, ...), or None where it is not one run of bytes on this machine."""
        recorded = self._record_of_file(shard)
        try:
            mapped = self._maps.pop(shard)
        except KeyError:  # or another thread has it in hand, and then there are two for a moment
            mapped = self._new_map(shard, recorded)
        self._maps[shard] = mapped  # the last one, being the one used last
        if len(self._maps) > _MOST_MAPS:
            for least_used in list(self._maps)[:-_MOST_MAPS]:
                self._maps.pop(least_used, None)
        return mapped

    def _read_shard(self, shard: int, within: NDArray[np.int64]) -> NDArray[Any]:
        mapped = self._map(shard)
        if mapped is None:
            return self._read_unmapped(shard, within, self._record_of_file(shard))
        if (np.diff(within) == 1).all():
            return np.array(mapped[within[0] : within[-1] + 1])  # a run is copied twice as fast as a selection
        return np.asarray(mapped[within])

    @abstractmethod
    def _new_map(self, shard: int, recorded: Recorded) -> NDArray[Any] | None:
        """As `_map`."""

    @abstractmethod
    def _read_unmapped(self, shard: int, within: NDArray[np.int64], recorded: Recorded) -> NDArray[Any]:
        """Images of a shard that cannot be mapped, by their places in it."""
