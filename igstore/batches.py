"""Masked images in batches on a device: each image is read and moved once, for any number of masks and networks.

The device does what is done for every mask: which blocks are visible, the fill and the normalisation. What comes out
has the same bits as the items of `MaskedImageNet`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from igstore.errors import UserError
from igstore.masking import Images, MaskedImages, MaskOptions
from igstore.masks import visible_blocks
from igstore.normalisation import Normaliser
from igstore.reader import StoreReader
from igstore.schema import Preprocessing

Size = tuple[int, int]


@dataclass
class _Loaded:
    """What a batch needs, by what it depends on."""

    ranks: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # ranking -> int32 rank, float32 share
    random_ranks: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (block, seed) -> int32
    pixels: dict[Size, Tensor] = field(default_factory=dict)  # uint8 (image, channel, y, x)
    fills: dict[tuple[str, int, Size], Tensor] = field(default_factory=dict)  # (fill, seed, size) -> uint8, broadcastable

    def to(self, device: torch.device) -> _Loaded:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return _Loaded(
            {key: (move(rank), move(share)) for key, (rank, share) in self.ranks.items()},
            {key: move(rank) for key, rank in self.random_ranks.items()},
            {key: move(pixels) for key, pixels in self.pixels.items()},
            {key: move(fill) for key, fill in self.fills.items()},
        )


class MaskedBatches:
    """Iterates over a store's built images in order, in batches.

    A thread reads the next batch while the device works on this one::

        cells = [MaskOptions(p=p, keep=keep) for p in (90, 70, 50, 30) for keep in ("top", "bottom")]
        for batch in MaskedBatches(store, cells, device="cuda"):
            for cell in cells:
                logits = network(batch.masked(cell))

    Parameters
    ----------
    store
        Path of a store, or a reader of it.
    cells
        The masks that will be asked for.
    networks
        What else than the store's own model the images are shown to: the `Preprocessing` of each. Where its crop is of
        another size than the store's, the unmasked pixels are resized to it (bilinear, antialiased), and then filled;
        the mask is brought to it by nearest neighbour. Its own resize and interpolation are not used.
    images, where
        As `MaskedImageNet`.
    device
        Where the tensors are.
    batch_size
        Images in a batch; the last one may be smaller.

    Raises
    ------
    UserError
        As `MaskedImageNet`.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | StoreReader,
        cells: Sequence[MaskOptions],
        *,
        networks: Sequence[Preprocessing] = (),
        images: Any = None,
        where: ArrayLike | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1 image")
        self._source = MaskedImages(store, images)
        self._source.check_pixels()
        for cell in cells:
            self._source.check(cell)
        self.own = self._source.reader.spec.preprocessing
        self._cells = tuple(cells)
        self._sizes = {self.own.crop, *(network.crop for network in networks)}
        self._device = torch.device(device)
        indices = self._source.select(where)
        self._runs = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[MaskedBatch]:
        labels = self._source.reader.scalars("label")
        waiting: deque[Future[_Loaded]] = deque()
        with ThreadPoolExecutor(1, "batches") as thread:
            for run in [*self._runs[:1], None]: ...
