"""The filters of a convolution in float16: as they are for points of lines, forwards and backwards."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from igstore.acceleration.lines.points import UNBOUNDED, Bounds

CHUNK = 32  # input channels that a program of the kernel multiplies by at a time
_ROWS = 128  # output channels are filled up to a multiple of it, as many as a program has at most
_FEWEST_CHANNELS = 16  # of inputs and outputs: with fewer, most of a chunk would be empty


class Matrix(NamedTuple):
    """Filters as rows of a matrix, filled up with zeros.

    Attributes
    ----------
    values
        float16 (output channel, (tap, part, input channel)).
    taps
        (y, x).
    first
        (y, x) of the first output pixel that these filters compute.
    padding
        (y, x): how many pixels before an output's place the first tap reads.
    """

    values: Tensor
    taps: tuple[int, int]
    first: tuple[int, int]
    padding: tuple[int, int]


class LineConvolution(nn.Module):
    """What a `torch.nn.Conv2d` that `fits` computes, with a sum and a clamp after it, for points of lines.

    Of values x and an addend it gives ``clamp(convolution(x) + addend, *bounds)``. Called, it computes that in float32.

    Parameters
    ----------
    convolution
        Its weights must not change afterwards.

    Attributes
    ----------
    bounds
        (low, high) of the outputs, which may be infinite: (0, inf) is a ReLU.
    high, low
        The weights divided by a power of two, `scale`, as pairs of float16, (out, in, y, x).
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self.taps = (convolution.kernel_size[0], convolution.kernel_size[1])
        self.stride = convolution.stride[0]
        self.padding = (int(convolution.padding[0]), int(convolution.padding[1]))
        self.bounds = UNBOUNDED
        weight = convolution.weight.detach()
        # near 1 float16 is at its best
        self.scale = 2.0 ** math.frexp(float(weight.abs().max()))[1]
        scaled = weight / self.scale
        self.high = scaled.half()
        self.low = (scaled - self.high.float()).half()
        self._matrices: dict[str, list[Matrix]] = {}
        self.set_scales((1.0, 1.0), (1.0, 1.0))

    def set_scales(self, values: tuple[float, float], gradients: tuple[float, float]) -> None:
        """Say by what values, and gradients, are multiplied where they are held: at the inputs and at the outputs."""
        at_input, at_output = values
        self.forward_scale = self.scale * at_output / at_input
        self.backward_scale = self.scale * gradients[0] / gradients[1]
        self.scaled_bias = None if self.bias is None else self.bias.detach().float() * at_output
        self.scaled_bounds: Bounds = (self.bounds[0] * at_output, self.bounds[1] * at_output)

    @property
    def bounded(self) -> bool:
        """Whether the outputs are clamped."""
        return self.bounds != UNBOUNDED

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Of float32 (image, channel, y, x)."""
        outputs = functional.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        outputs = outputs if addend is None else outputs + addend
        return outputs.clamp(*self.bounds) if self.bounded else outputs

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """(y, x) of the outputs of inputs of this size."""
        y, x = (
            (side + 2 * n - k) // self.stride + 1
            for side, n, k in zip((height, width), self.padding, self.taps, strict=True)
        )
        return y, x

    def matrices(self, kind: str) -> list[Matrix]:
        """What is multiplied by, in one or several launches.

        Parameters
        ----------
        kind
            ``references``: pairs, whose products are high by high, low by high, and high by low; ``others``: the high
            halves; ``backward``: those turned, input channels as outputs, one matrix for each phase of the stride.
        """
        if kind not in self._matrices:
            if kind == "backward":
                self._matrices[kind] = [self._phase(y, x) for y in range(self.stride) for x in range(self.stride)]
            else:
                parts = [self.high, self.high, self.low] if kind == "references" else [self.high]
                self._matrices[kind] = [Matrix(_rows(parts), self.taps, (0, 0), self.padding)]
        return self._matrices[kind]

    def _phase(self, y: int, x: int) -> Matrix:
        """The filters by which outputs reach input pixels (y, x), (y + stride, x), and so on."""
        taps, padding = [], []
        for phase, n, k in zip((y, x), self.padding, self.taps, strict=True):
            first = (phase + n) % self.stride
            chosen = range(first, k, self.stride)
            taps.append(list(chosen))
            padding.append(len(chosen) - 1 - (phase + n - first) // self.stride)
        # an input pixel is reached by its last tap from the first output
        turned = self.high.transpose(0, 1)[:, :, taps[0]][:, :, :, taps[1]].flip(2, 3)
        return Matrix(_rows([turned]), (len(taps[0]), len(taps[1])), (y, x), (padding[0], padding[1]))


def _rows(parts: list[Tensor]) -> Tensor:
    """Parts of filters, float16 (out, in, y, x), as rows (out, (tap, part, in)) of a matrix."""
    stacked = torch.stack(parts, dim=1)  # (out, part, in, y, x)
    n_out, _, n_in = stacked.shape[:3]
    stacked = functional.pad(stacked, (0, 0, 0, 0, 0, -n_in % CHUNK, 0, 0, 0, -n_out % _ROWS))
    return stacked.permute(0, 3, 4, 1, 2).flatten(1).contiguous()


def fits(convolution: nn.Module) -> bool:
    """Whether `LineConvolution` can, and should, compute what `convolution` does."""
    # not its subclasses, which may do more than it does
    if type(convolution) is not nn.Conv2d or convolution.weight.dtype != torch.float32:
        return False
    plain = (convolution.dilation, convolution.groups) == ((1, 1), 1) and convolution.padding_mode == "zeros"
    even = convolution.stride[0] == convolution.stride[1] and not isinstance(convolution.padding, str)
    return plain and even and min(convolution.in_channels, convolution.out_channels) >= _FEWEST_CHANNELS
