"""Where the pixels of a store's images come from: the store itself, another store, or the images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from igstore.errors import ImageError, SettingsMismatchError, UserError, option
from igstore.files import is_url
from igstore.images import ImageList, as_image_list, find_images, prepare
from igstore.schema import BUILT, Preprocessing
from igstore.storage import Form, StoreReader, hdf5_layout

# What decides the pixels of an image; mean and std only come after them.
_CROP_FIELDS = ("resize", "crop", "interpolation")


class PixelSource(Protocol):
    """Anything that gives the pixels of images by their index in a store."""

    def read(self, images: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 (image, channel, y, x), in the order given."""


@dataclass(frozen=True)
class PreparedImages:
    """A `PixelSource` that decodes, resizes and crops the images again."""

    images: ImageList
    preprocessing: Preprocessing

    def read(self, images: NDArray[np.int64]) -> NDArray[np.uint8]:
        """As `PixelSource.read`; raises `ImageError` for an image that cannot be read."""
        pixels = np.empty((len(images), 3, *self.preprocessing.crop), np.uint8)
        for image, out in zip(images.tolist(), pixels, strict=True):
            try:
                out[...] = prepare(self.images.read(image), self.preprocessing)
            except ImageError as error:
                raise ImageError(f"{self.images.ids[image]}: {error}") from error
        return pixels


def find_pixels(images: Any) -> Form | ImageList | None:
    """What a user gave as `images`, looked up once: a store, a list of images, or None for nothing given.

    Parameters
    ----------
    images
        A store (its path, its URL or a `StoreReader`), a path as `find_images` takes it, or what `as_image_list` takes.

    Raises
    ------
    UserError
        Nothing of the kind.
    """
    if images is None:
        return None
    if isinstance(images, StoreReader):
        return images.form
    if isinstance(images, str | os.PathLike):
        path = Path(images).expanduser()
        if is_url(images) or (path / "zarr.json").exists() or path.suffix in hdf5_layout.SUFFIXES:
            return StoreReader(images).form
        return find_images(path.absolute())
    return as_image_list(images)


def open_pixels(store: StoreReader, images: Form | ImageList | None) -> PixelSource:
    """The pixels of a store's images, from what `find_pixels` found.

    Raises
    ------
    UserError
        There are no pixels in the store that they are wanted from, or not of every built image.
    SettingsMismatchError
        The images are others than the store's, or resized or cropped in another way.
    """
    if images is None:
        if "pixels" not in store.variables:
            raise UserError(
                f"{store.where} was made without pixels; give {option('images', 'PATH')}, the folder or tar of its "
                "images, or a "
                "store that holds the pixels of the same images"
            )
        return store.array("pixels")
    built = np.flatnonzero(store.status == BUILT)
    if isinstance(images, ImageList):
        _check_same_list(store, f"the {len(images)} images given", images.fingerprint)
        _check_all_there(built[built >= len(images)], f"the {len(images)} images given")
        return PreparedImages(images, store.spec.preprocessing)
    other = StoreReader(images)
    if "pixels" not in other.variables:
        raise UserError(f"{other.where} was made without pixels; give a store that holds them, or the images")
    _check_same_list(store, other.where, other.spec.images_fingerprint)
    for field in _CROP_FIELDS:
        ours, theirs = getattr(store.spec.preprocessing, field), getattr(other.spec.preprocessing, field)
        if ours != theirs:
            raise SettingsMismatchError(
                f"the pixels of {store.where} have {field} {ours}, those of {other.where} {theirs}; "
                "give a store of the same input, or the images themselves"
            )
    _check_all_there(np.setdiff1d(built, np.flatnonzero(other.status == BUILT)), other.where)
    return other.array("pixels")


def resize(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Pixels (image, channel, y, x) at another (height, width), by Pillow's bilinear filter, which antialiases.

    It works in integers, so every machine gives the same; torch's own filter differs by 1 here and there.
    """
    if pixels.shape[2:] == size:
        return pixels
    resized = np.empty((*pixels.shape[:2], *size), np.uint8)
    for image, out in zip(pixels, resized, strict=True):
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        out[...] = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    return resized


def _check_same_list(store: StoreReader, given: str, fingerprint: str) -> None:
    if fingerprint != store.spec.images_fingerprint:
        raise SettingsMismatchError(
            f"{given} are not the images that {store.where} was made from: the fingerprint of their ids and labels is "
            f"{fingerprint[:12]}, the store's {store.spec.images_fingerprint[:12]}; give the same images, with the "
            "same labels"
        )


def _check_all_there(missing: NDArray[np.int64], given: str) -> None:
    if len(missing):
        raise UserError(
            f"{given} lack {len(missing)} images that are built in the store, the first being image {missing[0]}; "
            "give all of them"
        )
