"""Points of straight lines, and what they hold in a network: exactly at some, as differences from lines at the others.

    value = (1 - t) value of the reference before + t value of the reference after + difference

Rounding to 16 bits on the way forward changes which units are active, and that shows in a map for good. References are
kept as pairs of float16 numbers, which are as good as float32. What remains for the other points is small, and is
rounded to float16. Where no unit between two references switches, a network of ReLUs is linear, and nothing remains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# From one reference to the next there are at most so many points, and so much of the line.
_MOST_POINTS, _MOST_WAY = 7, 0.15

Bounds = tuple[float, float]
UNBOUNDED: Bounds = (float("-inf"), float("inf"))


@dataclass(frozen=True)
class Points:
    """The points of a batch: references first, then the points between them.

    Attributes
    ----------
    order
        From here to the points as they were given, image by image and by increasing alpha: int64 (point,).
    before, after, between
        Of each point that is no reference, the references around it, int32, and how far it is from the first to the
        second, float32 in [0, 1].
    """

    order: Tensor
    before: Tensor
    after: Tensor
    between: Tensor

    def __len__(self) -> int:
        return len(self.order)

    @property
    def n_references(self) -> int:
        """How many points are references."""
        return len(self.order) - len(self.before)

    @property
    def n_others(self) -> int:
        """How many points are not."""
        return len(self.before)

    def line(self, references: Tensor) -> Tensor:
        """Where the straight lines between references, (reference, ...), pass the other points, (point, ...)."""
        first, last = references[self.before.long()], references[self.after.long()]
        return first + self.between.view(-1, *(1,) * (references.ndim - 1)) * (last - first)


def points_of(alphas: Sequence[NDArray[np.float64]], device: torch.device) -> Points:
    """The points of some images, each at its own alphas, which increase."""
    references: list[int] = []
    others: list[tuple[int, int, int, float]] = []  # a point, the references around it, and how far it is between them
    begin = 0
    for some in alphas:
        chosen = _references(some)
        for place, (first, last) in enumerate(pairwise(chosen), len(references)):
            for h in range(first + 1, last):
                between = float((some[h] - some[first]) / (some[last] - some[first]))
                others.append((begin + h, place, place + 1, between))
        references += [begin + h for h in chosen]
        begin += len(some)
    return Points(
        order=torch.tensor([*references, *(one[0] for one in others)], device=device),
        before=torch.tensor([one[1] for one in others], dtype=torch.int32, device=device),
        after=torch.tensor([one[2] for one in others], dtype=torch.int32, device=device),
        between=torch.tensor([one[3] for one in others], dtype=torch.float32, device=device),
    )


def _references(alphas: NDArray[np.float64]) -> list[int]:
    """Which of the points at increasing alphas are references: the first, the last and enough between."""
    chosen = [0]
    for h in range(1, len(alphas)):
        way = alphas[h] - alphas[chosen[-1]]
        if h - chosen[-1] > _MOST_POINTS or way > _MOST_WAY + 1e-9:
            chosen.append(max(h - 1, chosen[-1] + 1))
    return chosen if chosen[-1] == len(alphas) - 1 else [*chosen, len(alphas) - 1]


@dataclass
class Value:
    """What points hold somewhere in a network.

    Attributes
    ----------
    pair
        Of references, float16 (reference, y, x, 2, channel): the value rounded, and what the rounding left.
    difference
        Of the other points, float16 (point, y, x, channel); None where they are on the lines.
    room
        A value of which this one is the first channels, and whose further channels are free.
    """

    pair: Tensor
    difference: Tensor | None
    room: Value | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(y, x, channel)."""
        return self.pair.shape[1], self.pair.shape[2], self.pair.shape[4]


def empty_value(points: Points, height: int, width: int, channels: int, device: torch.device) -> Value:
    """A `Value` that is not filled yet."""
    return Value(
        torch.empty((points.n_references, height, width, 2, channels), dtype=torch.float16, device=device),
        torch.empty((points.n_others, height, width, channels), dtype=torch.float16, device=device),
    )


def split(values: Tensor) -> Tensor:
    """Float32 (..., channel) as pairs of float16, (..., 2, channel)."""
    high = values.half()
    return torch.stack([high, (values - high.float()).half()], dim=-2)


def joined(pair: Tensor) -> Tensor:
    """Pairs of float16, (..., 2, channel), as float32 (..., channel)."""
    return pair[..., 0, :].float() + pair[..., 1, :].float()


def packed(passes: Tensor) -> Tensor:
    """Truths (..., channel) as bytes (..., channel / 8), the first channel being the lowest bit."""
    bits = torch.nn.functional.pad(passes.to(torch.uint8), (0, -passes.shape[-1] % 8))
    bits = bits.view(*bits.shape[:-1], -1, 8) << torch.arange(8, dtype=torch.uint8, device=passes.device)
    return bits.sum(dim=-1, dtype=torch.uint8)


def unpacked(bits: Tensor, channels: int) -> Tensor:
    """The reverse of `packed`: 0 or 1, uint8 (..., channel)."""
    spread = (bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return spread.flatten(-2)[..., :channels]


class Window(NamedTuple):
    """Windows of pooling: how large they are, how far apart, and how far they reach beyond the image; in pixels."""

    size: int
    stride: int
    padding: int

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """How many windows an image has, (y, x)."""
        y, x = ((side + 2 * self.padding - self.size) // self.stride + 1 for side in (height, width))
        return y, x
