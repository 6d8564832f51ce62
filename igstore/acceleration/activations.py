"""Activations, and batch norms that could not be folded, with less to keep for the backward pass; the same numbers."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import Function

from igstore.models import is_plain, replace, timm_layers


class Clamp(nn.Module):
    """``min(max(x, low), high)``: a ReLU6, or a hard tanh.

    torch's own keeps a copy of what it overwrites for its backward pass, to see where that was within the bounds; the
    result tells as well.
    """

    def __init__(self, low: float, high: float, inplace: bool) -> None:
        super().__init__()
        self.low, self.high, self.inplace = low, high, inplace

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape; in place where that was asked for and torch would not mind."""
        # of a view torch would have to tell the base; a leaf may not be overwritten
        inplace = self.inplace and not x._is_view() and not (x.is_leaf and x.requires_grad)
        return _Clamp.apply(x, self.low, self.high, inplace)  # type: ignore[no-any-return]


class _Clamp(Function):
    @staticmethod
    def forward(context: Any, x: Tensor, low: float, high: float, inplace: bool) -> Tensor:
        if inplace:
            context.mark_dirty(x)
        result = x.clamp_(low, high) if inplace else x.clamp(low, high)
        context.save_for_backward(result)
        context.bounds = low, high
        return result

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (result,) = context.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, result, *context.bounds), None, None, None


def keep_results(network: nn.Module) -> None:
    """Replace the ReLU6 and hard tanh modules of `network` by ones that keep their results alone, in place."""
    for module in list(network.modules()):
        # not subclasses, which may do more
        is_exact = type(module) in (nn.ReLU6, nn.Hardtanh) and is_plain(module, [nn.Hardtanh])
        if is_exact and isinstance(module, nn.Hardtanh):
            replace(network, module, Clamp(module.min_val, module.max_val, module.inplace))


class ScaleAndShift(nn.Module):
    """``scale x + shift`` of (image, channel, y, x), both a number a channel: a batch norm in evaluation mode.

    The backward pass of torch's batch norm reads what it normalised, which only its parameters' gradients need.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else shift + norm.bias
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """One multiplication a number, forwards and backwards."""
        return torch.addcmul(self.shift, x, self.scale)


def simplify_batch_norm(network: nn.Module) -> None:
    """Replace the batch norms of `network` that could not be folded, in place."""
    for norm in list(network.modules()):
        if is_fixed(norm):
            replace(network, norm, nn.Sequential(ScaleAndShift(norm), after(norm)))


def is_fixed(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether it is a batch norm, and multiplies and adds the same whatever the batch."""
    return (
        isinstance(norm, nn.BatchNorm2d)
        and is_plain(norm, [nn.BatchNorm2d, *timm_layers("BatchNormAct2d")])
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
    )


def after(norm: nn.BatchNorm2d) -> nn.Module:
    """What a batch norm leaves behind when it goes: nothing, or the activation that timm's batch norms end with."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    tail = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    return nn.Sequential(*tail)
