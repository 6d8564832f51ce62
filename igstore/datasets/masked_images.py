"""From a store to masked images: what views, data sets and batches share. Needs no torch.

`MaskedImages` reads ranks, shares and pixels, and makes what `igstore.masks.MaskOptions` ask for. Images are numbered
as in the store.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from igstore import masks
from igstore.datasets.pixels import PixelSource, find_pixels, open_pixels
from igstore.errors import StoreNotFoundError, UserError
from igstore.masks import FILLS, Bools, FillContext, MaskOptions, Pixels, Ranks, Shares, block_grid, expand
from igstore.schema import BUILT, IMAGE
from igstore.storage import RankingReader, StoreReader

Images = NDArray[np.int64]


def _names(where: Any) -> list[Any] | None:
    """What an array calls its values: an xarray coordinate, a pandas index that is more than numbers in order."""
    if IMAGE in getattr(where, "coords", ()):
        return list(np.atleast_1d(where.coords[IMAGE].values).tolist())
    if hasattr(where, "iloc") and not np.array_equal(where.index, np.arange(len(where))):
        return list(where.index)
    return None


class MaskedImages:
    """The masks and the masked pixels of a store's built images.

    It pickles as paths and URLs and opens what it needs when it needs it, in each process anew.

    Parameters
    ----------
    store
        Path or URL of a store, or a `StoreReader`.
    images
        Where the pixels are, for a store without: the path of the images or of a store that has their pixels, an
        `ImageList`, or a `StoreReader`.

    Raises
    ------
    UserError
        There is no such store, or nothing in it is built.
    """

    def __init__(self, store: str | os.PathLike[str] | StoreReader, images: Any = None) -> None:
        self.reader = StoreReader.of(store)
        self._form = self.reader.form
        self._images = find_pixels(images)
        if not len(self.built):
            raise UserError(f"no image of {self.where} is built yet; run `igstore build` with its settings to go on")

    def __getstate__(self) -> dict[str, Any]:
        return {"_form": self._form, "_images": self._images}

    @cached_property
    def reader(self) -> StoreReader:
        """The store."""
        return StoreReader(self._form)

    @property
    def where(self) -> str:
        """The store's path or URL."""
        return self._form.where

    @cached_property
    def built(self) -> Images:
        """int64: the images that are built, in order."""
        return np.flatnonzero(self.reader.status == BUILT)

    @cached_property
    def _pixels(self) -> PixelSource:
        return open_pixels(self.reader, self._images)

    @cached_property
    def _rankings(self) -> dict[str, RankingReader]:
        return {}

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pixels."""
        return self.reader.spec.preprocessing.crop

    def select(self, where: ArrayLike | None) -> Images:
        """int64: the built images where `where`, bool (image,) over all images of the store, is true; None is all.

        What names its images, as xarray's arrays and pandas' columns may, is taken by their ids, in any order.

        Raises
        ------
        UserError
            `where` is of another dtype or length, or of other images.
        """
        if where is None:
            return self.built
        names = _names(where)
        chosen = np.asarray(where) if names is None else self._by_id(np.asarray(where), names)
        if chosen.dtype != np.bool_ or chosen.shape != (self.reader.n_images,):
            raise UserError(
                f"where is {chosen.dtype} of shape {chosen.shape}; it must be bool of shape ({self.reader.n_images},): "
                f"one value for each image of {self.where}, built or not"
            )
        return np.flatnonzero(chosen & (self.reader.status == BUILT))

    def _by_id(self, values: NDArray[Any], names: list[Any]) -> NDArray[Any]:
        """Values of named images in the order of the store, False for those that are not named and not built."""
        number = {image_id: image for image, image_id in enumerate(self.reader.image_ids)}
        missing = set(number) - set(names)
        strange = [name for name in names if name not in number]
        if strange or len(set(names)) < len(names) or any(self.reader.status[number[one]] == BUILT for one in missing):
            what = f"{strange[0]!r}, which {self.where} does not have" if strange else "not each of its images once"
            raise UserError(
                f"where names {what}; its names must be the store's image ids, such as {self.reader.image_ids[0]!r}, "
                "or give a plain array, in the order of the store"
            )
        in_order = np.zeros(len(number), values.dtype)
        in_order[[number[name] for name in names]] = values
        return in_order

    def check(self, *cells: MaskOptions) -> None:
        """Raise `StoreNotFoundError`, naming the command to run, unless every built image has the ranks they need."""
        for options in cells:
            self._ranking(options)

    def check_pixels(self) -> None:
        """Raise `UserError` unless there are pixels of every built image; see `igstore.datasets.open_pixels`."""
        _ = self._pixels

    def class_lists(self) -> tuple[list[str], list[str]]:
        """Class names and wnids by class index; empty where the store does not know them."""
        attributes = self.reader.attributes
        return attributes.get("class_names", []), attributes.get("wnids", [])

    def _ranking(self, options: MaskOptions) -> RankingReader:
        name = options.ranking
        if name not in self._rankings:
            ranking = self.reader.ranking(name)
            unranked = self.reader.records.keys() - ranking.records.keys()
            if unranked:
                raise StoreNotFoundError(
                    f"the ranking {name} of {self.where} lacks {len(unranked)} of the {len(self.reader.records)} "
                    f"shards that are built, or is older than they are; run `igstore rank {self.where} "
                    f"--score {options.score} --block {options.block}`"
                )
            self._rankings[name] = ranking
        return self._rankings[name]

    def ids(self, images: Images) -> list[str]:
        """The ids of these images."""
        every = self.reader.image_ids
        return [every[image] for image in images.tolist()]

    def pixels(self, images: Images) -> Pixels:
        """uint8 (image, channel, y, x): the unmasked pixels."""
        return self._pixels.read(images)

    def ranks(self, images: Images, options: MaskOptions) -> tuple[Ranks, Shares]:
        """Rank and share, (image, block_y, block_x) each, in the ranking that `options` ask for."""
        ranking = self._ranking(options)
        return ranking.array("rank").read(images), ranking.array("share").read(images)

    def random_ranks(self, images: Images, options: MaskOptions) -> Ranks | None:
        """The ranks (image, block_y, block_x) of the random order; None for the order of attribution."""
        if options.order != "random":
            return None
        return masks.random_ranks(self.ids(images), block_grid(*self.size, options.block), options.seed)

    def masks(self, images: Images, options: MaskOptions) -> Bools:
        """bool (image, y, x), True where visible."""
        rank, share = self.ranks(images, options)
        blocks = masks.visible_blocks(rank, share, options, self.random_ranks(images, options))
        return expand(blocks, *self.size, options.block)

    def fill(self, images: Images, pixels: Pixels, options: MaskOptions) -> Pixels:
        """What the hidden ones of these images' pixels become: uint8, broadcastable to `pixels`.

        The colour of ``mean`` is that of the model that made the store.
        """
        context = FillContext(self.reader.spec.preprocessing.mean, self.ids(images), options.seed)
        return FILLS[options.fill](pixels, context)

    def masked(self, images: Images, options: MaskOptions) -> tuple[Pixels, Bools]:
        """Masked pixels, uint8 (image, channel, y, x), and their masks, bool (image, y, x)."""
        pixels, visible = self.pixels(images), self.masks(images, options)
        return masks.apply(pixels, visible, self.fill(images, pixels, options)), visible
