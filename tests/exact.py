"""Integrated Gradients in float64, with ties decided as in exact arithmetic, which implementations have to approach."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from igstore.models import normalise
from igstore.schema import Preprocessing


class ExactTies(TorchFunctionMode):
    """Max pooling of float64 that takes the first of those that are equal in float32.

    Where a picture is even, many numbers are equal in exact arithmetic, and by torch's rule the gradient goes to the
    first of them. In float64 they differ in the last bits, by the order of sums, and the gradient could go anywhere.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in (functional.max_pool2d, torch.max_pool2d):
            return function(*args, **kwargs)
        x, *settings = args
        kwargs.pop("return_indices", None)
        with torch._C.DisableTorchFunctionSubclass():
            rounded = x.detach().float().double()
            _, places = functional.max_pool2d_with_indices(rounded, *settings, **kwargs)
            return x.flatten(2).gather(2, places.flatten(2)).view(places.shape)


def integrated(
    network: nn.Module,
    pixels: np.ndarray,
    preprocessing: Preprocessing,
    targets: Tensor,
    n_steps: int,
    dtype: torch.dtype,
    layout: torch.memory_format = torch.contiguous_format,
) -> np.ndarray:
    """The article's rule from black, the sum over channels, one step at a time, by plain torch: (image, y, x)."""
    network = copy.deepcopy(network).to(dtype).requires_grad_(False)
    x, black = (
        normalise(torch.from_numpy(one), preprocessing).to(dtype, memory_format=layout)
        for one in (pixels, np.zeros_like(pixels))
    )
    total = torch.zeros_like(x)
    for step in range(1, n_steps + 1):
        points = (black + step / n_steps * (x - black)).requires_grad_()
        outputs = network(points.clone()).gather(1, targets[:, None])
        total += torch.autograd.grad(outputs.sum(), points)[0] / n_steps
    return ((x - black) * total).sum(dim=1).numpy()


def exactly_integrated(
    network: nn.Module, pixels: np.ndarray, preprocessing: Preprocessing, targets: Tensor, n_steps: int
) -> np.ndarray:
    """`integrated`, in float64 with exact ties."""
    with ExactTies():
        return integrated(network, pixels, preprocessing, targets, n_steps, torch.float64)
