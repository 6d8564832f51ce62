"""From pixels to a network's input, with the bits that torchvision's ``ToTensor`` and ``Normalize`` give."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from igstore.schema import Preprocessing


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """``(pixels / 255 - mean) / std`` per channel.

    Parameters
    ----------
    pixels
        (..., 3, y, x), 0 to 255, uint8 or floating.

    Returns
    -------
    A new tensor of the same shape, on the same device; float32, or the dtype of floating pixels.
    """
    dtype = pixels.dtype if pixels.is_floating_point() else torch.float32
    mean, std = _mean_and_std(preprocessing, dtype, pixels.device)
    return pixels.to(dtype, copy=True).div_(255).sub_(mean).div_(std)


@lru_cache(64)
def _mean_and_std(preprocessing: Preprocessing, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    # kept, since the host waits for a GPU wherever it hands it numbers
    with torch.inference_mode(False):
        mean, std = (
            torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1)
            for values in (preprocessing.mean, preprocessing.std)
        )
    return mean, std


def normalisation_table(preprocessing: Preprocessing) -> Tensor:
    """float32 (3, 256): what each pixel value becomes in each channel.

    Other devices round the division in ways of their own; looking values up gives the CPU's bits on all of them.
    """
    return normalise(torch.arange(256, dtype=torch.uint8, device="cpu").expand(3, 1, 256), preprocessing).view(3, 256)


def look_up(pixels: Tensor, table: Tensor) -> Tensor:
    """What `normalise` makes of uint8 pixels (image, 3, y, x), by the table, on the table's device."""
    channels = zip(table, pixels.unbind(1), strict=True)
    looked_up = [row.index_select(0, values.flatten().int()).view(values.shape) for row, values in channels]
    return torch.stack(looked_up, dim=1)
