"""What the benchmarks attribute: real images where there are any, else smooth made-up ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from igstore.images import find_images, prepare
from igstore.schema import Preprocessing


def pictures(data: str | None, preprocessing: Preprocessing, n: int) -> NDArray[np.uint8]:
    """uint8 (image, channel, y, x): `n` images spread evenly over those at the path `data`, or made up without one.

    Raises
    ------
    UserError
        There are no images at `data`.
    """
    if data is None:
        return smooth_pictures(n, preprocessing.crop)
    found = find_images(Path(data))
    places = np.unique(np.linspace(0, len(found) - 1, n).astype(int))
    return np.stack([prepare(found.read(place), preprocessing) for place in places.tolist()])


def smooth_pictures(n: int, crop: tuple[int, int], *, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 (image, 3, y, x): coarse random colours, blended bicubically; white noise is unlike any photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    height, width = crop
    blended = [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in coarse]
    return np.stack(blended).transpose(0, 3, 1, 2)
