"""Points of a straight line through a network, as references and differences: what makes gradients along a path cheap.

Integrated Gradients evaluate a network at points ``x(alpha) = b + alpha (x - b)``. Rounding to 16 bits on the way forward
changes which units are active, and a map never forgets that. But neighbouring points hardly differ. Some of them, the
*references*, are evaluated as exactly as in float32; what the others hold anywhere in the network is written as

    value = (1 - t) value of the reference before + t value of the reference after + difference

and only the difference is rounded to float16 and multiplied. Where no unit between two references switches, networks of
ReLUs are linear and the difference is 0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# From one reference to the next there are at most so many points, and so much of the way.
_POINTS, _WAY = 7, 0.15


@dataclass(frozen=True)
class Batch:
    """How the points of a batch are represented: references first, then the points between them.

    Attributes
    ----------
    order
        Of the points as they come, int64 (point,): references first.
    before, after, between
        Of each point that is no reference the references around it, int32, and how far it is from the first to the
        second, float32 in [0, 1].
    begin
        Of each interval between two references that has points, the first of these, int32; and how many there are.
    """

    order: Tensor
    before: Tensor
    after: Tensor
    between: Tensor
    begin: Tensor

    @property
    def n_differences(self) -> int:
        """How many points are not references."""
        return len(self.before)

    @property
    def n_references(self) -> int:
        """How many points are references."""
        return len(self.order) - len(self.before)

    def __len__(self) -> int:
        return len(self.order)

    def line(self, references: Tensor) -> Tensor:
        """Where the straight lines between references, (reference, ...), pass the other points."""
        first, last = references[self.before.long()], references[self.after.long()]
        return first + self.between.view(-1, *(1,) * (references.ndim - 1)) * (last - first)


def _references(alphas: NDArray[np.float64]) -> list[int]:
    """Which of the points at increasing alphas are references: the first, the last and enough between."""
    chosen = [0]
    for h in range(1, len(alphas)):
        if h - chosen[-1] > _POINTS or alphas[h] - alphas[chosen[-1]] > _WAY + 1e-9:
            chosen.append(h - 1 if h - 1 > chosen[-1] else h)
    return chosen if chosen[-1] == len(alphas) - 1 else [*chosen, len(alphas) - 1]


def batch_of(alphas: Sequence[NDArray[np.float64]], device: torch.device) -> Batch:
    """The `Batch` of some images' points, each image's in the order of its alphas, which increase."""
    references: list[int] = []
    others: list[tuple[int, int, int, float]] = []  # point, references around it, how far
    place = 0
    for some in alphas:
        chosen = _references(some)
        for first, last in zip(chosen, chosen[1:], strict=False):
            at = len(references) + chosen.index(first)
            for h in range(first + 1, last):
                between = (some[h] - some[first]) / (some[last] - some[first])
                others.append((place + h, at, at + 1, float(between)))
        references += [place + h for h in chosen]
        place += len(some)
    begins = [n for n, one in enumerate(others) if n == 0 or one[1] != others[n - 1][1]] + [len(others)]
    return Batch(
        order=torch.tensor([*references, *(one[0] for one in others)], device=device),
        before=torch.tensor([one[1] for one in others], dtype=torch.int32, device=device),
        after=torch.tensor([one[2] for one in others], dtype=torch.int32, device=device),
        between=torch.tensor([one[3] for one in others], dtype=torch.float32, device=device),
        begin=torch.tensor(begins, dtype=torch.int32, device=device),
    )


def interpolated(start: Tensor, difference: Tensor, image: Tensor, alpha: Tensor) -> Tensor:
    """``start[image] + alpha difference[image]`` of points, of float32 (image, ...) laid out alike.

    `image` is int64 and `alpha` float32, both (point,).
    """
    if use_kernels(start.device):
        from igstore.engine import line_kernels as kernels

        found = torch.empty_strided((len(image), *start.shape[1:]), start.stride(), device=start.device)
        size = start[0].numel()
        kernels.interpolate[(-(-size // _BLOCK), len(image))](start, difference, image, alpha, found, size, BLOCK=_BLOCK)
        return found
    return torch.addcmul(start[image], alpha.view(-1, *(1,) * (start.ndim - 1)), difference[image])


def weighted_sums(gradient: Tensor, order: Tensor, begin: Tensor, weight: Tensor) -> Tensor:
    """Of each image i the sum over j of ``weight[j] gradient[order[j]]``, j from begin[i] to begin[i + 1].

    Always in that order. Gradients are (point, y, x, channel) and the sums float32 (image, y, x, channel).
    """
    gradient = gradient.contiguous()
    if use_kernels(gradient.device):
        from igstore.engine import line_kernels as kernels

        sums = torch.empty((len(begin) - 1, *gradient.shape[1:]), device=gradient.device)
        size = sums[0].numel()
        grid = (-(-size // _BLOCK), len(sums))
        kernels.weighted_sum[grid](gradient, order, begin, weight, sums, size, BLOCK=_BLOCK)
        return sums
    places = begin.tolist()
    parts = [slice(first, last) for first, last in zip(places, places[1:], strict=False)]
    weight = weight.view(-1, 1, 1, 1)
    return torch.stack([(weight[part] * gradient[order[part]].float()).sum(dim=0) for part in parts])


def packed(passes: Tensor) -> Tensor:
    """Truths (..., channel) as bytes (..., channel / 8), the first channel being the lowest bit."""
    bits = torch.nn.functional.pad(passes.to(torch.uint8), (0, -passes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=passes.device)).sum(dim=-1, dtype=torch.uint8)


def unpacked(bits: Tensor, channels: int) -> Tensor:
    """The reverse of `packed`: 0 or 1, uint8 (..., channel)."""
    spread = (bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return spread.flatten(-2)[..., :channels]


def empty_passes(batch: Batch, height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Room for where gradients pass, as `packed` has it: (point, y, x, channel / 8)."""
    return torch.empty((len(batch), height, width, -(-channels // 8)), dtype=torch.uint8, device=device)


def gated(gradient: Tensor, passes: Tensor) -> Tensor:
    """Gradients (point, y, x, channel), float16, 0 where they do not pass."""
    if use_kernels(gradient.device):
        from igstore.engine import line_kernels as kernels

        out = torch.empty(gradient.shape, dtype=torch.float16, device=gradient.device)
        channels = gradient.shape[3]
        rows = gradient.numel() // channels
        launch_rows(
            kernels.affine_backward, rows, channels, gradient, out, out, passes, out, rows, channels,
            row_of(gradient), 0, row_of(passes), HAS_SCALE=False, HAS_ADDEND=False, HAS_ACTIVE=True,
        )  # fmt: skip
        return out
    return gradient * unpacked(passes, gradient.shape[3])


@dataclass
class Value:
    """What a batch holds somewhere in a network.

    Attributes
    ----------
    pair
        Of references, float16 (reference, y, x, 2, channel): the value rounded, and what that left.
    difference
        Of the other points, float16 (point, y, x, channel).
    """

    pair: Tensor
    difference: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(y, x, channel)."""
        return tuple(self.difference.shape[1:])


def split(values: Tensor) -> Tensor:
    """Float32 (..., channel) as float16 pairs (..., 2, channel)."""
    high = values.half()
    return torch.stack([high, (values - high.float()).half()], dim=-2)


def joined(pair: Tensor) -> Tensor:
    """Float16 pairs (..., 2, channel) as float32 (..., channel)."""
    return pair[..., 0, :].float() + pair[..., 1, :].float()


def use_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels compute on `device`: CUDA's, or any under Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def launch_rows(kernel: Any, rows: int, channels: int, *arguments: object, **settings: object) -> None:
    """Launch a kernel whose programs have some rows and some channels of them."""
    columns = min(128, max(16, triton_power(channels)))
    shape = (2048 // columns, columns)
    kernel[(-(-rows // shape[0]), -(-channels // shape[1]))](*arguments, **settings, BR=shape[0], BC=shape[1])


def triton_power(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def row_of(tensor: Tensor | None) -> int:
    """Numbers from pixel to pixel in memory, of (point, y, x, ...), pixels being dense; 0 of None."""
    if tensor is None:
        return 0
    # of a dimension of one there is no telling what its stride says
    dimension = next((one for one in (2, 1, 0) if tensor.shape[one] > 1), 2)
    return tensor.stride(dimension)


_BLOCK = 1024  # numbers that a program of other kernels works on


def empty_value(batch: Batch, height: int, width: int, channels: int, device: torch.device) -> Value:
    """A `Value` not filled yet."""
    return Value(
        torch.empty((batch.n_references, height, width, 2, channels), dtype=torch.float16, device=device),
        torch.empty((batch.n_differences, height, width, channels), dtype=torch.float16, device=device),
    )


def represent(values: Tensor, batch: Batch, scale: float = 1.0) -> Value:
    """Float32 (point, y, x, channel), in the batch's order, times `scale`, as a `Value`."""
    if use_kernels(values.device):
        from igstore.engine import line_kernels as kernels

        points, height, width, channels = values.shape
        values = values.contiguous()
        found = empty_value(batch, height, width, channels, values.device)
        rows = points * height * width
        launch_rows(
            kernels.represent, rows, channels, values, found.pair, found.difference,
            batch.before, batch.after, batch.between, batch.n_references, rows, height * width, channels, scale,
        )  # fmt: skip
        return found
    references, others = (values * scale).tensor_split([batch.n_references])
    return Value(split(references), (others - batch.line(references)).half())


def materialise(value: Value, batch: Batch, scale: float = 1.0) -> Tensor:
    """A `Value` times `scale` as float32 (point, y, x, channel), in the batch's order."""
    if use_kernels(value.pair.device):
        from igstore.engine import line_kernels as kernels

        height, width, channels = value.shape
        found = torch.empty((len(batch), height, width, channels), device=value.pair.device)
        rows = len(batch) * height * width
        launch_rows(
            kernels.materialise, rows, channels, *value.arguments, found,
            batch.before, batch.after, batch.between, batch.n_references, rows, height * width, channels,
            *value.strides, scale, HAS_DIFFERENCE=value.difference is not None,
        )  # fmt: skip
        return found
    references = joined(value.pair)
    others = batch.line(references)
    if value.difference is not None:
        others = others + value.difference
    return scale * torch.cat([references, others])


def interpolated(start: Tensor, difference: Tensor, image: Tensor, alpha: Tensor) -> Tensor:
    """``start[image] + alpha difference[image]``, float32, of (image, ...), image being int64 and alpha float32 (point,)."""
    if use_kernels(start.device):
        from igstore.engine import line_kernels as kernels

        found = torch.empty_strided((len(image), *start.shape[1:]), start.stride(), device=start.device)
        size = start[0].numel()
        kernels.interpolate[(-(-size // _BLOCK), len(image))](start, difference, image, alpha, found, size, BLOCK=_BLOCK)
        return found
    return torch.addcmul(start[image], alpha.view(-1, *(1,) * (start.ndim - 1)), difference[image])


def add_weighted(sums: Tensor, gradient: Tensor, order: Tensor, begin: Tensor, weight: Tensor) -> None:
    """``sums[i] += sum over j of weight[j] gradient[order[j]]``, j from begin[i] to begin[i + 1]; always in that order.

    Sums are float32 (image, ...), gradients (point, ...), laid out alike.
    """
    if use_kernels(sums.device):
        from igstore.engine import line_kernels as kernels

        size = sums[0].numel()
        grid = (-(-size // _BLOCK), len(sums))
        kernels.weighted_sum[grid](gradient, order, begin, weight, sums, size, BLOCK=_BLOCK)
        return
    places = begin.tolist()
    for image, (first, last) in enumerate(zip(places, places[1:], strict=False)):
        factors = weight[first:last].view(-1, *(1,) * (sums.ndim - 1))
        sums[image] += (factors * gradient[order[first:last]].float()).sum(dim=0)


@dataclass
class Value:
    """What a batch holds somewhere in a network.

    Attributes
    ----------
    pair
        Of references, float16 (reference, y, x, 2, channel): the value rounded, and what that left.
    difference
        Of the other points, float16 (point, y, x, channel); None where they are on the lines.
    """

    pair: Tensor
    difference: Tensor | None
    room: Value | None = None  # of which this is the first channels, and whose others are free

    @property
    def shape(self) -> tuple[int, int, int]:
        """(y, x, channel)."""
        return self.pair.shape[1], self.pair.shape[2], self.pair.shape[4]

    @property
    def arguments(self) -> tuple[Tensor, Tensor]:
        """The tensors as kernels take them: for no differences, any."""
        return self.pair, self.pair if self.difference is None else self.difference

    @property
    def strides(self) -> tuple[int, int, int]:
        """Numbers from pixel to pixel in `pair`, from the high to the low halves, from pixel to pixel in `difference`."""
        return row_of(self.pair), self.pair.stride(3), row_of(self.difference)


def split(values: Tensor) -> Tensor:
    """Float32 (..., channel) as float16 pairs (..., 2, channel)."""
    high = values.half()
    return torch.stack([high, (values - high.float()).half()], dim=-2)


def joined(pair: Tensor) -> Tensor:
    """Float16 pairs (..., 2, channel) as float32 (..., channel)."""
    return pair[..., 0, :].float() + pair[..., 1, :].float()
