"""One image as the pixels that a network is shown, resized and cropped as torchvision does, bit for bit."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from igstore.errors import ImageError
from igstore.schema import Preprocessing

_T = TypeVar("_T")


def prepare(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """The pixels that a network is shown, before normalisation.

    Equal bit for bit to torchvision's ``Resize(resize)`` and ``CenterCrop(crop)`` of a PIL image: the shorter side is
    brought to `resize` by Pillow's antialiasing filters, and what is smaller than the crop is padded with zeros.

    Parameters
    ----------
    image
        A PIL image of any size; modes other than RGB are converted.
    preprocessing
        Its `resize`, `crop` and `interpolation` are used.

    Returns
    -------
    uint8 (channel, y, x), with (y, x) = ``preprocessing.crop``.

    Raises
    ------
    ImageError
        The image is so long and narrow that its resized form exceeds Pillow's own limit of size.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")
    size = resized_size(image.size, preprocessing.resize)
    if preprocessing.resize is not None:
        if Image.MAX_IMAGE_PIXELS and math.prod(size) > 2 * Image.MAX_IMAGE_PIXELS:
            long, short = max(image.size), min(image.size)
            raise ImageError(f"too long and narrow: {long} x {short} pixels, {max(size)} long when resized")
        image = image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])
    height, width = preprocessing.crop
    top, left = _crop_start(image.height, height), _crop_start(image.width, width)
    cropped = image.crop((left, top, left + width, top + height))  # zeros outside the image
    return np.ascontiguousarray(np.asarray(cropped).transpose(2, 0, 1))  # (channel, y, x)


def resized_size(size: tuple[int, int], resize: int | None) -> tuple[int, int]:
    """The (width, height) of an image whose shorter side has been brought to `resize`; None leaves it as it is."""
    if resize is None:
        return size
    width, height = size
    longer = int(resize * max(size) / min(size))  # rounded as torchvision does
    return (longer, resize) if width > height else (resize, longer)


def _crop_start(length: int, crop: int) -> int:
    """Where a centre crop begins, negative where it is padded. torchvision rounds the two cases differently."""
    return round((length - crop) / 2) if crop <= length else -((crop - length) // 2)
