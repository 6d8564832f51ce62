"""Convolutions on CPUs in a fraction of the multiplications, forwards and backwards.

Winograd's algorithm, F(4x4, 3x3) and its like for other filters, as Lavin and Gray describe it ("Fast Algorithms for
Convolutional Neural Networks", 2015). oneDNN, which torch computes convolutions with on CPUs, does not have it for
float32; cuDNN does. Results differ from a direct convolution's by float32 rounding, some 1e-5 of the largest.

The kernel is compiled when igstore is installed. Without a compiler, or on a processor that lacks the instructions
(AVX2 with FMA on x86, NEON on ARM), convolutions stay torch's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch  # before the kernel, which shares its threads
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function_unary

from igstore.engine.modules import input_sizes, replace
from igstore.errors import ModelError

logger = logging.getLogger(__name__)

try:
    from igstore.engine import _winograd
except ImportError:  # there was no compiler
    _winograd = None  # type: ignore[assignment,unused-ignore]
_COMPILED = _winograd is not None
# output channels that the kernel works on together; 0 where the processor lacks the instructions
_GROUP = _winograd.GROUP if _COMPILED else 0

# Taps of filters (y, x) that the kernel has. Along an axis of one tap there is nothing to save.
_TAPS = {(3, 3), (1, 3), (3, 1), (5, 5), (1, 7), (7, 1)}
# By taps along an axis, the points of interpolation beside 0 and infinity, each with its negative. A tile has as many
# products as there are points, and 4 outputs.
_POINTS: dict[int, tuple[float, ...]] = {3: (1, 2), 5: (1, 2, 0.5), 7: (1, 2, 0.5, 1.25)}
_CHANNELS = 16  # the kernel wants channels in multiples of these
# Multiplications saved, below which transforms cost more: tiles at the edge may be mostly empty.
_LEAST_SAVING = 2.0


def tile(taps: int) -> tuple[int, int]:
    """Outputs and products of a tile along an axis on which filters have so many taps."""
    return (1, 1) if taps == 1 else (4, taps + 3)


def _filter_transform(taps: int) -> Tensor:
    """G of the algorithm, float64 (product, tap): filters as polynomials, at the points of interpolation."""
    if taps == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    points = [0.0, *(sign * point for point in _POINTS[taps] for sign in (1, -1))]
    rows = [
        [point**tap / math.prod(point - other for other in points if other != point) for tap in range(taps)]
        for point in points
    ]
    at_infinity = [float(tap == taps - 1) for tap in range(taps)]
    return torch.tensor([*rows, at_infinity], dtype=torch.float64)


def available() -> bool:
    """Whether the kernel was compiled, and this processor has the instructions for it."""
    return _GROUP > 0


class WinogradConv2d(nn.Module):
    """What a `torch.nn.Conv2d` of stride 1 computes, for float32 on a CPU, with gradients to its input alone.

    Parameters
    ----------
    convolution
        One that `fits`; its weights must not change afterwards. Transformed, they take up to four times their memory,
        once for the forward and once for the backward pass.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.bias = convolution.bias
        self.taps = list(convolution.kernel_size)
        self.padding = [int(n) for n in convolution.padding]
        self._filters: Tensor | None = None
        self._backward_filters: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(image, channel, y, x), as `torch.nn.Conv2d`."""
        return convolve(x, self)

    def filters(self) -> Tensor:
        """Transformed filters of the forward pass, made when they are first wanted."""
        if self._filters is None:
            self._filters = transformed(self.weight)
        return self._filters

    def backward_filters(self) -> Tensor:
        """Those of the backward pass, a convolution with turned filters that swaps what channels go in and out."""
        if self._backward_filters is None:
            self._backward_filters = transformed(self.weight.flip(2, 3).transpose(0, 1))
        return self._backward_filters


def convolve(x: Tensor, module: WinogradConv2d) -> Tensor:
    """The forward pass of `module`; a `TorchFunctionMode` sees it as it sees torch's own functions."""
    if has_torch_function_unary(x):
        return handle_torch_function(convolve, (x,), x, module)
    return _Convolution.apply(x, module)  # type: ignore[no-any-return]


class _Convolution(Function):
    @staticmethod
    def forward(context: Any, x: Tensor, module: WinogradConv2d) -> Tensor:
        context.module = module
        return _operation(x, module.filters(), module.bias, len(module.weight), module.taps, module.padding)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        module: WinogradConv2d = context.module
        channels = module.weight.shape[1]
        padding = [taps - 1 - n for taps, n in zip(module.taps, module.padding, strict=True)]
        return _operation(gradient, module.backward_filters(), None, channels, module.taps, padding), None


# An operation of torch's, so that what torch does with tensors that hold no numbers works here too.
_NAME = "igstore::winograd"
_SIGNATURE = "(Tensor x, Tensor filters, Tensor? bias, int out_channels, int[] taps, int[] padding) -> Tensor"
torch.library.define(_NAME, _SIGNATURE)
_operation: Callable[..., Tensor] = torch.ops.igstore.winograd.default


def _outputs(
    x: Tensor, filters: Tensor, bias: Tensor | None, out_channels: int, taps: list[int], padding: list[int]
) -> Tensor:
    sides = [size + 2 * n - k + 1 for size, n, k in zip(x.shape[2:], padding, taps, strict=True)]
    shape = (len(x), out_channels, *sides)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _convolve(
    x: Tensor, filters: Tensor, bias: Tensor | None, out_channels: int, taps: list[int], padding: list[int]
) -> Tensor:
    channels = filters.shape[2]
    if x.dtype != torch.float32 or x.ndim != 4 or x.shape[1] != channels:
        raise ModelError(
            f"a convolution takes float32 (image, {channels}, y, x); it is given {x.dtype} of shape {tuple(x.shape)}"
        )
    x = x.contiguous(memory_format=torch.channels_last)
    outputs = _outputs(x, filters, bias, out_channels, taps, padding)
    if outputs.numel() == 0:
        return outputs
    count, _, height, width = x.shape
    taps_y, taps_x = taps
    padding_y, padding_x = padding
    _winograd.convolve(
        x.data_ptr(),
        filters.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        outputs.data_ptr(),
        count,
        height,
        width,
        channels,
        out_channels,
        taps_y,
        taps_x,
        padding_y,
        padding_x,
        torch.get_num_threads(),
    )
    return outputs


torch.library.register_fake(_NAME, _outputs)
torch.library.impl(_NAME, "CPU", _convolve)


def transformed(weight: Tensor) -> Tensor:
    """``G g G^T`` of every filter: of (out, in, y, x) float32 (product, group, in, out of the group).

    The last group is filled up with zeros.
    """
    n_out, n_in, *taps = weight.shape
    y, x = map(_filter_transform, taps)
    products = (y @ weight.detach().double() @ x.T).permute(2, 3, 1, 0).reshape(-1, n_in, n_out)
    groups = -(-n_out // _GROUP)
    filled = functional.pad(products, (0, groups * _GROUP - n_out)).float()
    return filled.view(-1, n_in, groups, _GROUP).transpose(1, 2).contiguous()


def fits(convolution: nn.Module, height: int, width: int) -> bool:
    """Whether the kernel can, and should, compute `convolution` of inputs of this size."""
    # not its subclasses, which may do more than it does
    if type(convolution) is not nn.Conv2d or convolution.weight.dtype != torch.float32:
        return False
    taps, padding = convolution.kernel_size, convolution.padding
    plain = (convolution.stride, convolution.dilation, convolution.groups) == ((1, 1), (1, 1), 1)
    channels = (convolution.in_channels, convolution.out_channels)
    if taps not in _TAPS or not plain or any(n % _CHANNELS for n in channels):
        return False
    if isinstance(padding, str) or convolution.padding_mode != "zeros":
        return False
    if any(n >= k for n, k in zip(padding, taps, strict=True)):  # the backward pass would have to cut
        return False
    sizes = [(size, size + 2 * n - k + 1) for size, n, k in zip((height, width), padding, taps, strict=True)]
    inputs, outputs = zip(*sizes, strict=True)  # the backward pass has tiles of the inputs
    return min(_saving(outputs, taps), _saving(inputs, taps)) >= _LEAST_SAVING


def _saving(sides: Sequence[int], taps: Sequence[int]) -> float:
    """Multiplications of a direct convolution to outputs of such sides, over those of Winograd's algorithm."""
    return math.prod(sides) * math.prod(taps) / n_products(sides, taps) if min(sides) > 0 else 0.0


def n_products(sides: Sequence[int], taps: Sequence[int]) -> int:
    """Multiplications to outputs (y, x) of such sides, for each channel in and out."""
    axes = zip(sides, map(tile, taps), strict=True)
    return math.prod(-(-side // outputs) * products for side, (outputs, products) in axes)


def use_winograd(network: nn.Module, image: Tensor) -> None:
    """Replace the convolutions of `network` that the kernel computes sooner, in place; for images of this size.

    `image` is (1, channel, y, x), on a CPU.
    """
    if not _COMPILED:
        logger.warning(
            "convolutions take up to twice the time they need: igstore was installed without a C++ compiler; "
            "install it again where there is one (g++ or clang++)"
        )
    if not available():
        return
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    for module, sizes in input_sizes(network, image, convolutions).items():
        if sizes and all(fits(module, *size) for size in sizes):
            replace(network, module, WinogradConv2d(module))
