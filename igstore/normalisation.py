"""From uint8 pixels to a network's input, with the bits that torchvision's ``ToTensor`` and ``Normalize`` give."""

from __future__ import annotations

import torch
from torch import Tensor

from igstore.schema import Preprocessing


class Normaliser:
    """``(pixels / 255 - mean) / std`` per channel, in float32 on the CPU.

    Parameters
    ----------
    preprocessing
        Its `mean` and `std` are used.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._mean = torch.tensor(preprocessing.mean).view(3, 1, 1)
        self._std = torch.tensor(preprocessing.std).view(3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Float32 of the same shape, from uint8 (..., 3, y, x)."""
        return pixels.float().div_(255).sub_(self._mean).div_(self._std)

    def table(self) -> Tensor:
        """float32 (3, 256): what each pixel value becomes in each channel.

        Other devices round divisions in ways of their own; looking a value up gives the CPU's bits on any of them.
        """
        return self(torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)).view(3, 256)
