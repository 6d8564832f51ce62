"""Masked images in batches on a device: each image is read and moved once, for any number of masks and networks.

The device does what is to be done for each mask: which blocks are visible, the fill, the normalisation. What comes out
has the same bits as the items of `MaskedImageNet`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from igstore.datasets.masked_images import Images, MaskedImages
from igstore.datasets.pixels import resize
from igstore.errors import UserError
from igstore.machine import freed_memory_kept, fresh_torch
from igstore.masks import MaskOptions, block_grid, visible_blocks
from igstore.models import look_up, normalisation_table, normalise
from igstore.schema import Preprocessing, several, whole_number
from igstore.storage import StoreReader

Tensors = dict[tuple[Any, ...], Tensor]  # what a batch is made of, by kind and by what else it depends on


class MaskedBatches:
    """A store's built images in order, in batches; a thread reads the next batch while this one is worked on.

    ::

        cells = [MaskOptions(p=p, keep=keep) for p in (90, 70, 50, 30) for keep in ("top", "bottom")]
        for batch in MaskedBatches(store, cells, device="cuda"):
            for cell in cells:
                logits = network(batch.masked(cell))

    Parameters
    ----------
    store
        Path or URL of a store, or a `StoreReader`.
    cells
        The masks that will be asked for.
    networks
        How each network other than the store's own model wants its input. Where its `crop` is of another size than the
        store's, the unmasked pixels are resized to it (bilinear, antialiased) and then filled, and the mask is brought
        to it by nearest neighbour. Its `resize` and `interpolation` do not matter here.
    images
        Where the pixels are, for a store without: the path of the images or of a store that has their pixels, an
        `ImageList`, or a `StoreReader`.
    where
        bool (image,) over all images of the store: only these. Values that name their images may be in any order.
    device
        Where the tensors are to be.
    batch_size
        Images in a batch; the last one may have fewer.

    Raises
    ------
    UserError
        As `MaskedImageNet`.

    >>> cell = MaskOptions(p=50, keep="top")
    >>> [tuple(batch.masked(cell).shape) for batch in MaskedBatches("toy.zarr", [cell], batch_size=3)]
    [(3, 3, 24, 24), (1, 3, 24, 24)]
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
        batch_size = whole_number("batch_size", batch_size, 1)
        cells = several("cells", cells, MaskOptions, "MaskOptions")
        networks = several("networks", networks, Preprocessing, "a Preprocessing")
        self._source = MaskedImages(store, images)
        self._source.check(*cells)
        self._source.check_pixels()
        self._cells = tuple(cells)
        self._networks = (self._source.reader.spec.preprocessing, *networks)  # the store's own model is the first
        self._sizes = {network.crop for network in self._networks}
        self._device = _device(device)
        chosen = self._source.select(where)
        self._runs = [chosen[first : first + batch_size] for first in range(0, len(chosen), batch_size)]

    def __len__(self) -> int:
        return len(self._runs)

    def __repr__(self) -> str:
        n_images = sum(map(len, self._runs))
        cells = f"{len(self._cells)} mask{'s' * (len(self._cells) != 1)}"
        return f"<MaskedBatches: {n_images} images of {self._source.where} in {len(self)} batches, {cells}>"

    def __iter__(self) -> Iterator[MaskedBatch]:
        constants = _Constants(self._cells, self._networks, self._device)
        loading: deque[tuple[Images, Future[Tensors]]] = deque()
        # batches are of one size, and so is their memory
        with freed_memory_kept(), ThreadPoolExecutor(1, "batches") as thread:
            for run in self._runs:
                loading.append((run, thread.submit(self._load, run)))
                if len(loading) > 1:
                    yield self._batch(*loading.popleft(), constants)
            while loading:
                yield self._batch(*loading.popleft(), constants)

    def _batch(self, images: Images, loaded: Future[Tensors], constants: _Constants) -> MaskedBatch:
        tensors = {key: tensor.to(self._device, non_blocking=True) for key, tensor in loaded.result().items()}
        labels = self._source.reader.scalars("label")[images]
        return MaskedBatch(images, labels, tensors, constants)

    def _load(self, images: Images) -> Tensors:
        """Everything that the cells need of these images, on the CPU, each thing once."""
        tensors: Tensors = {}
        pixels = self._source.pixels(images)
        for size in self._sizes:
            tensors["pixels", size] = torch.from_numpy(resize(pixels, size))
        for cell in self._cells:
            if ("rank", cell.ranking) not in tensors:
                rank, share = self._source.ranks(images, cell)
                tensors["rank", cell.ranking] = torch.from_numpy(rank.astype(np.int32))  # torch's uint16 does little
                tensors["share", cell.ranking] = torch.from_numpy(share)
            if ("random", cell.block, cell.seed) not in tensors:
                random = self._source.random_ranks(images, cell)
                if random is not None:
                    tensors["random", cell.block, cell.seed] = torch.from_numpy(random.astype(np.int32))
            for size in self._sizes:
                if ("fill", cell.fill, cell.seed, size) not in tensors:
                    fill = self._source.fill(images, tensors["pixels", size].numpy(), cell)
                    tensors["fill", cell.fill, cell.seed, size] = torch.from_numpy(fill)
        if self._device.type == "cuda":
            return {key: tensor.pin_memory() for key, tensor in tensors.items()}
        return tensors


class _Places(NamedTuple):
    """Where the pixels of a network's input are among the blocks of a ranking; tensors on the device."""

    pixels: tuple[Tensor, Tensor]  # int64 (y,) and (x,): the row and the column of blocks that a pixel belongs to
    sizes: Tensor  # int64 (block_y, block_x): how many pixels belong to a block
    n_pixels: int


class _Constants:
    """What all batches have in common, on the device: to give it numbers, the host would wait for it each time.

    Attributes
    ----------
    own
        How the store's own model wants its input.
    tables
        For each network, what `normalisation_table` says.
    places
        For each size of blocks and of inputs.
    """

    def __init__(self, cells: Sequence[MaskOptions], networks: Sequence[Preprocessing], device: torch.device) -> None:
        self.own = networks[0]
        self.tables = {network: normalisation_table(network).to(device) for network in networks}
        self.places: dict[tuple[int, tuple[int, int]], _Places] = {}
        for block in {cell.block for cell in cells}:
            for crop in {network.crop for network in networks}:
                down, across = (nearest(own, wanted) // block for own, wanted in zip(self.own.crop, crop, strict=True))
                grid = block_grid(*self.own.crop, block)
                heights, widths = (np.bincount(one, minlength=n) for one, n in zip((down, across), grid, strict=True))
                self.places[block, crop] = _Places(
                    (torch.from_numpy(down).to(device), torch.from_numpy(across).to(device)),
                    torch.from_numpy(np.outer(heights, widths)).to(device),
                    len(down) * len(across),
                )


class MaskedBatch:
    """Some images and what it takes to show them under every mask. Made by `MaskedBatches`.

    Every `network` below is one of those that `MaskedBatches` was given; None is the store's own model.

    Attributes
    ----------
    images
        int64 (image,): their numbers in the store.
    labels
        int32 (image,): their class indices, -1 where unknown.
    """

    def __init__(
        self,
        images: Images,
        labels: NDArray[np.int32],
        tensors: Tensors,
        constants: _Constants,
    ) -> None:
        self.images = images
        self.labels = labels
        self._tensors = tensors
        self._constants = constants
        self._normalised: Tensors = {}

    def __len__(self) -> int:
        return len(self.images)

    @fresh_torch()
    def unmasked(self, network: Preprocessing | None = None) -> Tensor:
        """float32 (image, 3, y, x): the network's input, nothing hidden."""
        network = self._known(network)
        return self._normalise(("pixels", network.crop), network)

    @fresh_torch()
    def masked(self, cell: MaskOptions, network: Preprocessing | None = None) -> Tensor:
        """float32 (image, 3, y, x): the network's input, what the mask hides being filled.

        The colour of the fill ``mean`` is that of the model that made the store; every other fill is made from the
        pixels at the network's size.
        """
        network = self._known(network)
        blocks = self._visible_blocks(cell)
        down, across = self._constants.places[cell.block, network.crop].pixels
        mask = blocks.index_select(1, down).index_select(2, across)  # (image, y, x)
        # normalising pixels and fill before they are put together does it once for all masks, and changes no bit
        fill = self._normalise(("fill", cell.fill, cell.seed, network.crop), network)
        return torch.where(mask[:, None], self.unmasked(network), fill)

    @fresh_torch()
    def visible(self, cell: MaskOptions, network: Preprocessing | None = None) -> Tensor:
        """float64 (image,), 0 to 1: the share of the network's input pixels that the mask leaves visible, exact."""
        blocks = self._visible_blocks(cell)
        places = self._constants.places[cell.block, self._known(network).crop]
        n_visible = (blocks * places.sizes).sum(dim=(1, 2))
        return n_visible.double() / places.n_pixels

    def _known(self, network: Preprocessing | None) -> Preprocessing:
        if network is not None and network not in self._constants.tables:
            raise UserError(f"{network} is not among the networks that MaskedBatches was given")
        return network or self._constants.own

    def _visible_blocks(self, cell: MaskOptions) -> Tensor:
        """bool (image, block_y, block_x)."""
        rank, share = (self._get(kind, cell.ranking) for kind in ("rank", "share"))
        random = self._get("random", cell.block, cell.seed) if cell.order == "random" else None
        # the formulas of igstore.masks.selection, which hold for tensors too
        blocks: Any = visible_blocks(rank, share, cell, random)  # type: ignore[arg-type]
        return torch.as_tensor(blocks)

    def _normalise(self, key: tuple[Any, ...], network: Preprocessing) -> Tensor:
        full_key = (*key, network)
        if full_key not in self._normalised:
            values, table = self._get(*key), self._constants.tables[network]
            # on a CPU arithmetic is faster than looking up, and gives the same bits
            by_arithmetic = values.device.type == "cpu"
            self._normalised[full_key] = normalise(values, network) if by_arithmetic else look_up(values, table)
        return self._normalised[full_key]

    def _get(self, *key: Any) -> Tensor:
        if key not in self._tensors:
            raise UserError(f"none of the cells that MaskedBatches was given needs {' '.join(map(str, key))}")
        return self._tensors[key]


def _device(name: Any) -> torch.device:
    try:
        return torch.device(name)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"device is {name!r:.80}; it must be one of torch's, such as cpu or cuda:0") from error


def nearest(length: int, wanted: int) -> NDArray[np.int64]:
    """For each of `wanted` pixels, which of `length` pixels of the same picture its centre falls into."""
    return (2 * np.arange(wanted) + 1) * length // (2 * wanted)
