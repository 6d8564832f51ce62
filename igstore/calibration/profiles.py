"""Gradient profiles: how the maps at the points of an image's path relate to one another and to their integral.

This is the part of a calibration that takes gradients, hundreds for each image. It runs on any device, and what it
finds is small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from igstore.attribution import Nodes, rule
from igstore.masks import DEFAULT_BLOCK, block_grid

# The maps (point, y, x) at some points alpha of one image's path, whose integral over [0, 1] is the image's map.
MapsAt = Callable[[NDArray[np.float64]], Tensor]


@dataclass(frozen=True)
class Profile:
    """What a fit needs of one image.

    Attributes
    ----------
    gram
        float64 (point, point): inner products of the maps at the dense points, over that of the reference with itself.
        Maps are compared by their sums over the blocks, of the pixels with a positive attribution: masks depend on
        nothing else. 0 where the reference has no positive attribution.
    reference
        float32 (y, x): the integral by all the dense points.
    """

    gram: NDArray[np.float64]
    reference: NDArray[np.float32]


def dense_points(n_points: int) -> Nodes:
    """The points where profiles are taken, and the weights with which they make the reference."""
    return rule("quadratic_midpoint", n_points)


def profile(maps_at: MapsAt, n_points: int) -> Profile:
    """The profile of one image."""
    alphas, weights = dense_points(n_points)
    maps = maps_at(alphas)  # (point, y, x)
    reference = torch.tensordot(torch.as_tensor(weights, dtype=maps.dtype, device=maps.device), maps, dims=1)
    sums = _block_sums(maps * (reference > 0)).flatten(1).double()
    gram = (sums @ sums.T).cpu().numpy()
    size = weights @ gram @ weights
    return Profile(gram / size if size > 0 else np.zeros_like(gram), reference.float().cpu().numpy())


def path_maps(
    network: nn.Module, start: Tensor, difference: Tensor, select: Callable[[Tensor], Tensor], batch: int
) -> MapsAt:
    """The maps along the path from `start` to ``start + difference``, both (channel, y, x).

    Parameters
    ----------
    network
        Maps (point, channel, y, x) to class scores (point, class).
    select
        The attributed output (point,), from class scores.
    batch
        Points per gradient evaluation.
    """

    def maps_at(alphas: NDArray[np.float64]) -> Tensor:
        maps = []
        every = torch.as_tensor(alphas, dtype=start.dtype, device=start.device)
        for begin in range(0, len(every), batch):
            alpha = every[begin : begin + batch]
            points = start + alpha[:, None, None, None] * difference
            leaf = points.contiguous(memory_format=torch.channels_last).requires_grad_()
            (gradient,) = torch.autograd.grad(select(network(leaf)).sum(), leaf)
            maps.append((gradient * difference).sum(dim=1))
        return torch.cat(maps)

    return maps_at


def _block_sums(maps: Tensor) -> Tensor:
    """(point, y, x) to (point, block_y, block_x)."""
    height, width = maps.shape[1:]
    n_y, n_x = block_grid(height, width)
    side = DEFAULT_BLOCK
    whole = pad(maps, (0, n_x * side - width, 0, n_y * side - height))
    return whole.reshape(-1, n_y, side, n_x, side).sum(dim=(2, 4))
