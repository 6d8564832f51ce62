"""Baselines of Integrated Gradients, named in pixel space: a registry of one function each. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from igstore.masks import FILLS, FillContext
from igstore.schema import check_choice

Pixels = NDArray[np.uint8]
Values = NDArray[np.float32]


def _black(pixels: Pixels, context: FillContext) -> Values:
    return np.zeros(pixels.shape, np.float32)


def _white(pixels: Pixels, context: FillContext) -> Values:
    return np.full(pixels.shape, 255, np.float32)


def _mean(pixels: Pixels, context: FillContext) -> Values:
    """The model's mean colour, not rounded to a pixel value: captum's zero baseline on normalised input."""
    colour = (255 * np.asarray(context.mean)).astype(np.float32)
    return np.zeros(pixels.shape, np.float32) + colour[:, None, None]


def _blur(pixels: Pixels, context: FillContext) -> Values:
    return np.asarray(FILLS["blur"](pixels, context), np.float32)


def _noise(pixels: Pixels, context: FillContext) -> Values:
    return np.asarray(FILLS["noise"](pixels, context), np.float32)


BASELINES: dict[str, Callable[[Pixels, FillContext], Values]] = {
    "black": _black,
    "mean": _mean,
    "white": _white,
    "blur": _blur,
    "noise": _noise,
}


# Those that are the same for every image.
CONSTANT_BASELINES = ("black", "mean", "white")


def baseline_pixels(name: str, pixels: Pixels, *, mean: Sequence[float], image_ids: Sequence[str], seed: int) -> Values:
    """The baselines of a few images, in pixel values from 0 to 255: float32 (image, channel, y, x).

    Parameters
    ----------
    name
        A name in `BASELINES`: ``black`` 0; ``white`` 255; ``mean`` the model's mean colour; ``blur`` the image under a
        Gaussian of sigma 10 px; ``noise`` uniform, seeded by (seed, image id).
    pixels
        uint8 (image, channel, y, x).
    mean
        The model's mean per channel, in [0, 1].
    image_ids, seed
        What `noise` is drawn from, one id per image.

    Raises
    ------
    UserError
        Unknown name.
    """
    check_choice("baseline", name, BASELINES)
    return BASELINES[name](pixels, FillContext(mean=tuple(mean), image_ids=tuple(image_ids), seed=seed))
