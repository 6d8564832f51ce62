"""What `igstore.acceleration.lines.launches` computes, in torch: for processors, and to compare the kernels with.

Tensors are (point, y, x, channel). Functions that go backwards add an addend to the gradient, and let none pass where
`passes` says so (`igstore.acceleration.lines.points.packed`).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from igstore.acceleration.lines.filters import LineConvolution
from igstore.acceleration.lines.points import UNBOUNDED, Bounds, Points, Value, Window, joined, packed, split, unpacked

Clamped = tuple[Value, Tensor | None]  # a value, and where gradients pass its clamp, if it has one


def interpolated(start: Tensor, difference: Tensor, image: Tensor, alpha: Tensor) -> Tensor:
    """``start[image] + alpha difference[image]`` of points, of float32 (image, channel, y, x) laid out alike.

    `image` is int64 and `alpha` float32, both (point,).
    """
    return torch.addcmul(start[image], alpha.view(-1, 1, 1, 1), difference[image])


def weighted_sums(gradient: Tensor, order: Tensor, begin: Tensor, weights: Tensor) -> Tensor:
    """Of each image i the sum over j of ``weights[j] gradient[order[j]]``, j from begin[i] to begin[i + 1].

    Always in that order. Sums are float32 (image, y, x, channel).
    """
    places = begin.tolist()
    parts = [slice(first, last) for first, last in pairwise(places)]
    weights = weights.view(-1, 1, 1, 1)
    return torch.stack([(weights[part] * gradient[order[part]].float()).sum(dim=0) for part in parts])


def represent(values: Tensor, points: Points, scale: float) -> Value:
    """Float32 values times `scale`, references first, as a `Value`."""
    references, others = (values * scale).tensor_split([points.n_references])
    return Value(split(references), (others - points.line(references)).half())


def materialise(value: Value, points: Points, scale: float) -> Tensor:
    """A `Value` times `scale` as float32 values, references first."""
    references = joined(value.pair)
    others = points.line(references)
    if value.difference is not None:
        others = others + value.difference
    return scale * torch.cat([references, others])


def convolve(x: Value, addend: Value | None, module: LineConvolution, points: Points) -> Clamped:
    """The outputs of a convolution, with the sum and the clamp after it."""
    high, low = module.high.float(), module.low.float()
    references = module.forward_scale * _convolution(joined(x.pair), high + low, module)
    if module.scaled_bias is not None:
        references = references + module.scaled_bias
    if addend is not None:
        references = references + joined(addend.pair)
    others = points.line(references)
    if x.difference is not None:
        others = others + module.forward_scale * _convolution(x.difference.float(), high, module)
    if addend is not None and addend.difference is not None:
        others = others + addend.difference
    return _clamped(references, others, module.scaled_bounds, points)


def _convolution(x: Tensor, weight: Tensor, module: LineConvolution) -> Tensor:
    outputs = functional.conv2d(x.permute(0, 3, 1, 2), weight, None, module.stride, module.padding)
    return outputs.permute(0, 2, 3, 1)


def convolve_backward(
    gradient: Tensor, sides: tuple[int, int], module: LineConvolution, addend: Tensor | None, passes: Tensor | None
) -> Tensor:
    """The gradient at a convolution's inputs of these sides (y, x), float16."""
    with torch.enable_grad():
        inputs = gradient.new_zeros((len(gradient), *sides, module.in_channels), dtype=torch.float32).requires_grad_()
        (at_inputs,) = torch.autograd.grad(_convolution(inputs, module.high.float(), module), inputs, gradient.float())
    return _finished(module.backward_scale * at_inputs, addend, passes)


def affine(x: Value, scale: Tensor, shift: Tensor, bounds: Bounds, points: Points) -> Clamped:
    """``clamp(scale x + shift, *bounds)``, scale and shift being float32 (channel,)."""
    references = scale * joined(x.pair) + shift
    others = points.line(references)
    if x.difference is not None:
        others = others + scale * x.difference
    return _clamped(references, others, bounds, points)


def affine_backward(gradient: Tensor, scale: Tensor | None, addend: Tensor | None, passes: Tensor | None) -> Tensor:
    """``scale gradient``, float16; with no scale, of 1."""
    return _finished(gradient if scale is None else scale * gradient, addend, passes)


def max_pool(x: Value, window: Window, bounds: Bounds, points: Points) -> tuple[Value, Tensor | None, Tensor]:
    """The largest value of each window, clamped, where gradients pass, and what `max_pool_backward` has to know."""
    values = materialise(x, points, 1.0).permute(0, 3, 1, 2)
    largest, where = functional.max_pool2d(values, *window, return_indices=True)
    references, others = largest.permute(0, 2, 3, 1).tensor_split([points.n_references])
    return *_clamped(references, others, bounds, points), where


def max_pool_backward(
    gradient: Tensor,
    where: Tensor,
    sides: tuple[int, int],
    window: Window,
    addend: Tensor | None,
    passes: Tensor | None,
) -> Tensor:
    """The gradient at the inputs of these sides (y, x), float16."""
    gradient = gradient.permute(0, 3, 1, 2).float()
    spread = gradient.new_zeros((*gradient.shape[:2], sides[0] * sides[1]))
    spread.scatter_add_(2, where.flatten(2), gradient.flatten(2))
    return _finished(spread.view(*gradient.shape[:2], *sides).permute(0, 2, 3, 1), addend, passes)


def mean_pool(x: Value, window: Window, points: Points) -> Value:
    """The mean of each window, in which zeros beyond the image count."""
    difference = None if x.difference is None else _means(x.difference.float(), window).half()
    return Value(split(_means(joined(x.pair), window)), difference)


def _means(values: Tensor, window: Window) -> Tensor:
    return functional.avg_pool2d(values.permute(0, 3, 1, 2), *window).permute(0, 2, 3, 1)


def mean_pool_backward(
    gradient: Tensor, sides: tuple[int, int], window: Window, addend: Tensor | None, passes: Tensor | None
) -> Tensor:
    """The gradient at the inputs of these sides (y, x), float16."""
    with torch.enable_grad():
        inputs = gradient.new_zeros((len(gradient), *sides, gradient.shape[3]), dtype=torch.float32).requires_grad_()
        (spread,) = torch.autograd.grad(_means(inputs, window), inputs, gradient.float())
    return _finished(spread, addend, passes)


def _clamped(references: Tensor, others: Tensor, bounds: Bounds, points: Points) -> Clamped:
    """Float32 values of references and of the other points, clamped."""
    passes = None
    if bounds != UNBOUNDED:
        low, high = bounds
        every = torch.cat([references, others])
        passes = packed((every > low) & (every < high))
        references, others = references.clamp(low, high), others.clamp(low, high)
    return Value(split(references), (others - points.line(references)).half()), passes


def _finished(gradient: Tensor, addend: Tensor | None, passes: Tensor | None) -> Tensor:
    if addend is not None:
        gradient = gradient + addend
    if passes is not None:
        gradient = gradient * unpacked(passes, gradient.shape[3])
    return gradient.half().contiguous()
