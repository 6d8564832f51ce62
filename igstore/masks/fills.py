"""How hidden pixels are filled: a registry of one function each, and the masked image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from igstore.masks.selection import Bools, Pixels, random_bytes

BLUR_SIGMA = 10.0  # pixels
BLUR_RADIUS = 40  # pixels: four sigma, where a Gaussian is cut


@dataclass(frozen=True)
class FillContext:
    """What a fill may know beside the pixels.

    Parameters
    ----------
    mean
        The model's mean colour, per channel in [0, 1], as in its normalisation.
    image_ids
        The ids of the images of this batch, in its order.
    seed
        Of whatever is random.
    """

    mean: tuple[float, ...]
    image_ids: Sequence[str]
    seed: int = 0


def black(pixels: Pixels, context: FillContext) -> Pixels:
    """0 in every channel."""
    return np.zeros((1, pixels.shape[1], 1, 1), np.uint8)


def mean(pixels: Pixels, context: FillContext) -> Pixels:
    """The model's mean colour, 255 * mean, rounded to nearest (halves up)."""
    colour = np.floor(255 * np.asarray(context.mean) + 0.5)
    return np.clip(colour, 0, 255).astype(np.uint8).reshape(1, -1, 1, 1)


def image_mean(pixels: Pixels, context: FillContext) -> Pixels:
    """Each image's own mean of each channel, rounded to nearest (halves up) in integer arithmetic."""
    n_pixels = pixels.shape[2] * pixels.shape[3]
    doubled = 2 * pixels.sum(axis=(2, 3), dtype=np.int64, keepdims=True)  # (image, channel, 1, 1)
    means: Pixels = np.floor_divide(doubled + n_pixels, 2 * n_pixels).astype(np.uint8)
    return means


def blur(pixels: Pixels, context: FillContext) -> Pixels:
    """Each image under a Gaussian of sigma 10 px; see `gaussian_blur`."""
    blurred = np.empty(pixels.shape, np.uint8)
    for image, out in zip(pixels, blurred, strict=True):  # one by one: the intermediate float64 is 16 times as large
        out[...] = gaussian_blur(image)
    return blurred


def noise(pixels: Pixels, context: FillContext) -> Pixels:
    """Uniform 0 to 255 for every pixel and channel, from the seed, the image's id and the image's shape alone.

    The bytes are SHAKE-128's, in the order channel, y, x: the same on every machine and in every version.
    """
    n_values = math.prod(pixels.shape[1:])
    filled = np.empty(pixels.shape, np.uint8)
    for image_id, image in zip(context.image_ids, filled, strict=True):
        image[...] = random_bytes("noise", context.seed, image_id, n_values).reshape(image.shape)
    return filled


# What a hidden pixel becomes, from pixels (image, channel, y, x) and a `FillContext`: uint8, of a shape that broadcasts
# to the pixels' own, so a plain colour is (1 or image, channel, 1, 1). A new fill is a function here that gives each
# image the same whatever else is in the batch.
FILLS: dict[str, Callable[[Pixels, FillContext], Pixels]] = {
    "black": black,
    "mean": mean,
    "image_mean": image_mean,
    "blur": blur,
    "noise": noise,
}


def gaussian_blur(pixels: Pixels) -> Pixels:
    """Images (..., y, x) under a Gaussian of sigma 10 px, cut at 40 px, the edges continued outwards.

    The same as ``scipy.ndimage.gaussian_filter(float, sigma=10, truncate=4, mode="nearest")`` rounded to nearest
    (halves up), but in integer arithmetic: the weights are rounded to multiples of 2**-22, so both products below are
    exact in float64 (255 * 2**44 < 2**53) and the result is the same in whatever order a processor adds.
    """
    down, across = (_blur_weights(side) for side in pixels.shape[-2:])
    sums = down @ pixels.astype(np.float64) @ across.T  # (..., y, x), in units of 2**-44
    return np.floor(sums * 2.0**-44 + 0.5).astype(np.uint8)


@lru_cache(maxsize=4)  # the sides of two image sizes
def _blur_weights(side: int) -> NDArray[np.float64]:
    """The blur along one axis as a matrix (out, in), in units of 2**-22."""
    offsets = np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    bell = np.exp(-0.5 * (offsets / BLUR_SIGMA) ** 2)
    weights = np.rint(bell / bell.sum() * 2**22)
    centres = np.arange(side)[:, np.newaxis]
    matrix = np.zeros((side, side))
    np.add.at(matrix, (centres, np.clip(centres + offsets, 0, side - 1)), weights)
    return matrix


def apply(pixels: Pixels, visible: Bools, fill_pixels: Pixels) -> Pixels:
    """The pixels where visible, the fill elsewhere: ``where(visible, pixels, fill_pixels)``.

    Parameters
    ----------
    pixels
        uint8 (image, channel, y, x).
    visible
        bool (image, y, x).
    fill_pixels
        uint8, broadcastable to `pixels`: what an entry of `FILLS` gives.

    Returns
    -------
    uint8 (image, channel, y, x), a new array.
    """
    # fill + (pixels - fill) * visible: uint8 wraps around, so this is exact, and five times faster than numpy.where
    masked = np.subtract(pixels, fill_pixels, dtype=np.uint8)
    masked *= visible[:, np.newaxis]
    masked += fill_pixels
    return masked
