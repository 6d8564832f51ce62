"""`MaskedImageNet`: a store as a PyTorch data set of masked images."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch.utils.data import Dataset

from igstore.cli import printable
from igstore.datasets.masked_images import MaskedImages
from igstore.machine import keep_freed_memory
from igstore.masks import MaskOptions, warn_of_fractions
from igstore.models import normalise
from igstore.schema import FAILED, NOT_BUILT, Fill, Keep, Order, Score, Select
from igstore.storage import StoreReader

_KEPT = 2**29  # bytes: several batches of float32 images


class MaskedImageNet(Dataset[tuple[Any, ...]]):
    """The masked images of a store: ``(input, class index)``, or ``(input, class index, mask)``.

    It works as torchvision's data sets do, in any `DataLoader` with any number of workers started in any way: it
    pickles as a path, and each process opens the store for itself. Reading many at once (`__getitems__`, which
    `DataLoader` uses) costs less than one by one. A process that reads keeps up to 512 MiB of freed memory for the next
    batch, which makes it two to three times faster (`igstore.machine.freed_memory`).

    Parameters
    ----------
    store
        Path or URL of a store, or a `StoreReader`.
    p
        0 to 100: a percentage of the image's attribution, or of its blocks; see `select`.
    keep
        ``"top"`` shows the blocks that hold the top p%, ``"bottom"`` all others.
    select
        What p is a percentage of: ``"mass"``, the image's total score, or ``"count"``, its blocks.
    score, block
        The ranking: the score of a block (``"positive"``, ``"absolute"`` or ``"signed"``), and its side in pixels.
    fill
        What a hidden pixel becomes: ``"black"``, the model's ``"mean"`` colour, the ``"image_mean"``, a ``"blur"`` or
        ``"noise"``.
    order
        ``"attribution"``, or the control ``"random"``: as many blocks, chosen at random.
    seed
        Of the random order and of the noise.
    images
        Where the pixels are, for a store without: the path of the images or of a store that has their pixels, an
        `ImageList`, or a `StoreReader`.
    where
        bool (image,) over all images of the store, such as ``open_store(path).label == 5``: only these. A DataArray
        with the coordinate ``image``, or a pandas Series whose index is the image ids, may be in any order; anything
        else is in the store's. Images that are not built or failed are left out in any case.
    transform
        Takes the place of the normalisation: from the masked pixels, a uint8 tensor (3, y, x), to anything. By default
        they become the float32 input of the model that made the store, as ``ToTensor`` and ``Normalize`` would make it.
    target_transform
        From the class index to anything.
    return_mask
        Add the mask, a bool tensor (y, x), True where visible.

    Attributes
    ----------
    options
        The `MaskOptions`.
    indices
        int64: the number in the store of each image of the data set.
    classes, wnids
        Names and WordNet ids by class index; empty where the store does not know them.

    Raises
    ------
    UserError
        A value is not allowed, or there is no such store, ranking or pixels; the message says what to run.
    SettingsMismatchError
        `images` are others than the store's, or resized or cropped in another way.

    >>> dataset = MaskedImageNet("toy.zarr", p=50, keep="bottom", return_mask=True)
    >>> image, label, mask = dataset[3]
    >>> tuple(image.shape), label, tuple(mask.shape)
    ((3, 24, 24), 3, (24, 24))
    >>> len(MaskedImageNet("toy.zarr", where=[True, False, False, True]))
    2
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | StoreReader,
        p: float = MaskOptions.p,
        keep: Keep = MaskOptions.keep,
        *,
        select: Select = MaskOptions.select,
        score: Score = MaskOptions.score,
        block: int = MaskOptions.block,
        fill: Fill = MaskOptions.fill,
        order: Order = MaskOptions.order,
        seed: int = MaskOptions.seed,
        images: Any = None,
        where: ArrayLike | None = None,
        transform: Callable[[torch.Tensor], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        return_mask: bool = False,
    ) -> None:
        self.options = MaskOptions(
            p=p, keep=keep, select=select, score=score, block=block, fill=fill, order=order, seed=seed
        )
        warn_of_fractions(self.options)
        self._source = MaskedImages(store, images)
        self._source.check(self.options)
        self._source.check_pixels()
        self.transform = transform
        self.target_transform = target_transform
        self.return_mask = return_mask
        reader = self._source.reader
        self.indices = self._source.select(where)
        self._targets = reader.scalars("label")[self.indices]
        self.classes, self.wnids = self._source.class_lists()
        self._preprocessing = reader.spec.preprocessing
        self._description = _describe(reader)

    @property
    def targets(self) -> list[int]:
        """The class index of each image, -1 where it is unknown."""
        targets: list[int] = self._targets.tolist()
        return targets

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Class index by name and by wnid; of the two classes called crane, and the two called maillot, the first."""
        index: dict[str, int] = {}
        for names in (self.classes, self.wnids):
            for place, name in enumerate(names):
                index.setdefault(name, place)
        return index

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, ...]]:
        """The items at these positions, read in one go."""
        keep_freed_memory(_KEPT)
        positions = [range(len(self))[index] for index in indices]  # negative ones count from the end
        pixels, masks = self._source.masked(self.indices[positions], self.options)
        items = []
        for position, image, mask in zip(positions, torch.from_numpy(pixels), torch.from_numpy(masks), strict=True):
            target = int(self._targets[position])
            item = (
                normalise(image, self._preprocessing) if self.transform is None else self.transform(image),
                target if self.target_transform is None else self.target_transform(target),
            )
            items.append((*item, mask) if self.return_mask else item)
        return items

    def with_mask(self, **changes: Any) -> MaskedImageNet:
        """The same images under another mask: `p`, `keep` or any other of the `MaskOptions`. Nothing is opened again.

        Raises
        ------
        UserError
            A value is not allowed, or the store lacks the ranking.
        TypeError
            There is no such option.
        """
        sibling = copy.copy(self)
        sibling.options = dataclasses.replace(self.options, **changes)
        if "p" in changes:
            warn_of_fractions(sibling.options)
        self._source.check(sibling.options)
        return sibling

    def __repr__(self) -> str:
        lines = [
            f"Number of datapoints: {len(self)}",
            f"Root location: {self._source.where}",
            f"Mask: {self.options}",
            *self._description,
        ]
        transforms = {"Transform": self.transform, "Target transform": self.target_transform}
        lines += [f"{name}: {value!r}" for name, value in transforms.items() if value is not None]
        return "\n    ".join([f"Dataset {type(self).__name__}", *lines])


def _describe(store: StoreReader) -> list[str]:
    failed, missing = ((store.status == status).sum() for status in (FAILED, NOT_BUILT))
    left_out = [f"Left out: {failed} failed, {missing} not built"] if failed or missing else []
    return [printable(f"Made by: {store.spec.model}, weights {store.spec.weights}"), *left_out]
