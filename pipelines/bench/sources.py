"""Where masked and raw images can be read from: igstore, and what one would use instead.

Every source takes positions in a list of images, in any order, and gives batches on a device. Those in `MASKED` give
what a network is fed, float32 (image, 3, y, x), and the labels; those in `RAW` give what masks are made of: pixels,
ranks and shares. They open what they read when they are first read, so nothing is held while caches are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from igstore import MaskedImageNet
from igstore.datasets import MaskedBatch, MaskedBatches
from igstore.errors import UserError
from igstore.masks import MaskOptions
from igstore.schema import BUILT, Preprocessing
from igstore.storage import StoreReader
from pipelines.bench import fixtures

_CPU = torch.device("cpu")

BATCH = 64
MASK = MaskOptions(p=50, keep="bottom")
FIELDS = {"pixels": "pixels", "rank": f"ranks/{MASK.ranking}/rank", "share": f"ranks/{MASK.ranking}/share"}

Order = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]
Read = Callable[[Order], NDArray[Any]]


@dataclass(frozen=True)
class Data:
    """One list of images in every form that a source wants it in.

    Attributes
    ----------
    store
        Path of the ranked store, with pixels.
    images
        Which of its images, by number.
    copies
        Folder with the same images' pixels, ranks, shares and maps as plain ``.npy`` files, and in ``copy.h5``.
    folder
        Images as files, as `ImageFolder` wants them.
    places
        For each file, in `ImageFolder`'s order, its position in `images`; -1 for files of other images.
    device
        Where batches are to be.
    """

    store: Path
    images: Order
    copies: Path
    folder: Path
    places: Order
    device: torch.device

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """The store's."""
        return StoreReader(self.store).spec.preprocessing


Batches = Callable[[Data, Order, int], Iterator[Any]]


def prepare(store: Path, scratch: Path, *, limit: int, folder: Path | None = None, device: torch.device = _CPU) -> Data:
    """Lay out the first `limit` built images of a store for every source, below `scratch`.

    Parameters
    ----------
    folder
        Images as `ImageFolder` wants them, with the names that the store has; None makes JPEG files of the pixels.

    Raises
    ------
    UserError
        The store lacks pixels or ranks, or no image of the folder is in the store.
    """
    reader = StoreReader(store)
    images = np.flatnonzero(reader.status == BUILT)[:limit]
    ranking = reader.ranking(MASK.ranking)
    arrays = {"attribution": reader.array("attribution"), "pixels": reader.array("pixels")}
    arrays |= {name: ranking.array(name) for name in ("rank", "share")}
    with h5py.File(scratch / "copy.h5", "w") as hdf5:
        for name, array in arrays.items():
            shape = (len(images), *array.shape[1:])
            plain = np.lib.format.open_memmap(scratch / f"{name}.npy", mode="w+", dtype=array.dtype, shape=shape)
            dataset = hdf5.create_dataset(name, shape, array.dtype)
            for first in range(0, len(images), BATCH):
                batch = slice(first, first + BATCH)
                plain[batch] = array.read(images[batch])
                dataset[batch] = plain[batch]
            plain.flush()
    if folder is None:
        folder = scratch / "jpeg"
        for first in range(0, len(images), BATCH):
            fixtures.write_jpegs(arrays["pixels"].read(images[first : first + BATCH]), folder / "all", first=first)
        places = np.arange(len(images))
    else:
        places = _places(folder, reader, images)
    if not (places >= 0).any():
        raise UserError(f"no file below {folder} has the name of an image of {store}")
    return Data(store, images, scratch, folder, places, device)


def _places(folder: Path, reader: StoreReader, images: Order) -> Order:
    """For each file of a folder, the position in `images` of the image that it is; -1 for those that are not there."""
    position = {reader.image_ids[image]: place for place, image in enumerate(images.tolist())}
    return np.array([position.get(Path(path).stem, -1) for path, _ in ImageFolder(folder).samples])


# --- Masked images


def _loaded(dataset: Dataset[Any], data: Data, order: Order, workers: int, collate: Any = None) -> Iterator[Any]:
    """What a DataLoader makes of a data set, the first part of each item on the device."""
    batches = [order[first : first + BATCH].tolist() for first in range(0, len(order), BATCH)]
    for batch in DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate):
        yield batch[0].to(data.device), *batch[1:]


def masked_imagenet(data: Data, order: Order, workers: int) -> Iterator[Any]:
    """igstore's data set in a DataLoader."""
    dataset = MaskedImageNet(data.store, p=MASK.p, keep=MASK.keep, where=_where(data))
    return _loaded(dataset, data, order, workers)


def masked_batches(data: Data, order: Order, workers: int) -> Iterator[Any]:
    """igstore's batches: masked and normalised on the device, read by a thread of their own."""
    return ((batch.masked(MASK), batch.labels) for batch in _batches(data, len(order)))


def image_folder(data: Data, order: Order, workers: int) -> Iterator[Any]:
    """torchvision's `ImageFolder` with the usual transforms; nothing is masked."""
    steps = [*_to_tensor(data.preprocessing), transforms.Normalize(data.preprocessing.mean, data.preprocessing.std)]
    files = np.flatnonzero(data.places >= 0)
    dataset = ImageFolder(data.folder, transforms.Compose(steps))
    return _loaded(dataset, data, files[order % len(files)], workers)


def _to_tensor(preprocessing: Preprocessing) -> list[Any]:
    steps = [transforms.CenterCrop(preprocessing.crop), transforms.ToTensor()]
    if preprocessing.resize is None:
        return steps
    return [transforms.Resize(preprocessing.resize, InterpolationMode(preprocessing.interpolation)), *steps]


class _ArgsortDataset(Dataset[tuple[Tensor, int]]):
    """As ROAD's data set: an image file, its stored map, an argsort of it, and the mask, for each item anew."""

    def __init__(self, data: Data) -> None:
        self._images = ImageFolder(data.folder, transforms.Compose(_to_tensor(data.preprocessing)))
        self._normalise = transforms.Normalize(data.preprocessing.mean, data.preprocessing.std)
        self._maps_path = data.copies / "attribution.npy"
        self._places = data.places
        self._maps: NDArray[np.float16] | None = None

    def __getitem__(self, file: int) -> tuple[Tensor, int]:
        if self._maps is None:
            self._maps = np.load(self._maps_path, mmap_mode="r")
        image, label = self._images[file]
        attribution = torch.from_numpy(self._maps[self._places[file]].astype(np.float32))
        order = torch.argsort(attribution.flatten(), descending=True)
        visible = torch.ones(order.numel())
        visible[order[: int(order.numel() * MASK.p / 100)]] = 0
        return self._normalise(image * visible.view(attribution.shape)), label


def per_item_argsort(data: Data, order: Order, workers: int) -> Iterator[Any]:
    """Image files and an argsort of each one's stored map, as ROAD's data set does it."""
    files = np.flatnonzero(data.places >= 0)
    return _loaded(_ArgsortDataset(data), data, files[order % len(files)], workers)


# --- What masks are made of


class _RawDataset(Dataset[Arrays]):
    """Batches of pixels, ranks and shares, by the readers that `opens` makes of `data` in each process."""

    def __init__(self, data: Data, opens: Callable[[Data], Mapping[str, Read]]) -> None:
        self._data, self._opens = data, opens
        self._readers: Mapping[str, Read] | None = None

    def __getitems__(self, positions: Sequence[int]) -> Arrays:
        if self._readers is None:
            self._readers = self._opens(self._data)
        return {name: read(np.asarray(positions)) for name, read in self._readers.items()}


def _to_tensors(arrays: Arrays) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays.values()]


def _raw(opens: Callable[[Data], Mapping[str, Read]]) -> Batches:
    def batches(data: Data, order: Order, workers: int) -> Iterator[list[Tensor]]:
        for tensors in _loaded(_RawDataset(data, opens), data, order, workers, _to_tensors):
            yield [tensor.to(data.device) for tensor in tensors]

    return batches


def _store_reader(data: Data) -> Mapping[str, Read]:
    """igstore's reader."""
    reader = StoreReader(data.store)
    arrays = {"pixels": reader.array("pixels")}
    arrays |= {name: reader.ranking(MASK.ranking).array(name) for name in ("rank", "share")}
    return {name: _of_images(array.read, data.images) for name, array in arrays.items()}


def _memmap(data: Data) -> Mapping[str, Read]:
    """Plain files as memory maps: the limit."""
    return {name: np.load(data.copies / f"{name}.npy", mmap_mode="r").__getitem__ for name in FIELDS}


def _hdf5(data: Data) -> Mapping[str, Read]:
    """The same arrays in an HDF5 file, by h5py."""
    file = h5py.File(data.copies / "copy.h5")
    return {name: _item_by_item(file[name]) for name in FIELDS}


def _zarr(data: Data) -> Mapping[str, Read]:
    """The store's arrays by zarr-python."""
    arrays = {name: zarr.open_array(data.store / path, mode="r") for name, path in FIELDS.items()}
    return {name: _of_images(_item_by_item(array), data.images) for name, array in arrays.items()}


def _of_images(read: Read, images: Order) -> Read:
    return lambda positions: read(images[positions])


def _item_by_item(array: Any) -> Read:
    """Indexing as users do it: a slice for a run of neighbours, else one by one (lists of indices are slower)."""

    def read(positions: Order) -> NDArray[Any]:
        if (np.diff(positions) == 1).all():
            return np.asarray(array[int(positions[0]) : int(positions[-1]) + 1])
        return np.stack([array[int(position)] for position in positions])

    return read


def raw_batches(data: Data, order: Order, workers: int) -> Iterator[MaskedBatch]:
    """igstore's batches on the device, before anything is masked."""
    return _batches(data, len(order))


def _batches(data: Data, n_items: int) -> Iterator[MaskedBatch]:
    """The images in order, from the start again as often as it takes."""
    batches = MaskedBatches(data.store, [MASK], where=_where(data), device=data.device, batch_size=BATCH)
    while n_items > 0:
        for batch in batches:
            yield batch
            n_items -= len(batch)
            if n_items <= 0:
                return


def _where(data: Data) -> NDArray[np.bool_]:
    return np.isin(np.arange(StoreReader(data.store).n_images), data.images)


# Ways to read images: (data, positions in order, worker processes) to batches on the device.
MASKED: dict[str, Batches] = {
    "MaskedImageNet": masked_imagenet,
    "MaskedBatches": masked_batches,
    "ImageFolder": image_folder,
    "per-item argsort": per_item_argsort,
}
RAW: dict[str, Batches] = {
    "MaskedBatches, unmasked": raw_batches,
    "StoreReader": _raw(_store_reader),
    "np.memmap": _raw(_memmap),
    "h5py": _raw(_hdf5),
    "zarr": _raw(_zarr),
}
# These give images in the order of the store, without worker processes.
IN_ORDER_ONLY = ("MaskedBatches", "MaskedBatches, unmasked")
