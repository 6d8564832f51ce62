"""3x3 convolutions on CPUs in a quarter of the multiplications, forwards and backwards.

Winograd's algorithm F(4x4, 3x3), as Lavin and Gray describe it ("Fast Algorithms for Convolutional Neural Networks",
2015). oneDNN, which torch computes convolutions with on CPUs, does not have it for float32; cuDNN does. Results differ
from a direct convolution's by float32 rounding, some 1e-5 of the largest.

The kernel is compiled when igstore is installed. Without a compiler, or on a processor that lacks the instructions
(AVX2 with FMA on x86, NEON on ARM), convolutions stay torch's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
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
except ImportError as error:
    logger.info("3x3 convolutions stay torch's: the compiled kernel is missing (%s)", error)
    _GROUP = 0
else:
    _GROUP = _winograd.GROUP  # output channels that the kernel works on together

_TILE = 4  # side of a tile of outputs; its inputs have 6
_CHANNELS = 16  # the kernel wants channels in multiples of these
# Multiplications saved, below which transforms cost more: tiles at the edge may be mostly empty.
_LEAST_SAVING = 2.0

# G of F(4x4, 3x3), for interpolation at 0, 1, -1, 2, -2 and infinity.
_FILTER_TRANSFORM = torch.tensor(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    dtype=torch.float64,
)


def available() -> bool:
    """Whether the kernel was compiled, and this processor has the instructions for it."""
    return _GROUP > 0


class WinogradConv2d(nn.Module):
    """What a 3x3 `torch.nn.Conv2d` of stride 1 computes, for float32 on a CPU, with gradients to its input alone.

    Parameters
    ----------
    convolution
        One that `fits`; its weights must not change afterwards. Transformed, they take four times their memory,
        once for the forward and once for the backward pass.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.bias = convolution.bias
        self.padding = int(convolution.padding[0])
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
        return _operation(x, module.filters(), module.bias, len(module.weight), module.padding)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        module: WinogradConv2d = context.module
        channels = module.weight.shape[1]
        return _operation(gradient, module.backward_filters(), None, channels, 2 - module.padding), None


# An operation of torch's, so that what torch does with tensors that hold no numbers works here too.
_NAME = "igstore::winograd"
torch.library.define(_NAME, "(Tensor x, Tensor filters, Tensor? bias, int out_channels, int padding) -> Tensor")
_operation: Callable[..., Tensor] = torch.ops.igstore.winograd.default


def _outputs(x: Tensor, filters: Tensor, bias: Tensor | None, out_channels: int, padding: int) -> Tensor:
    count, _, height, width = x.shape
    shape = (count, out_channels, height + 2 * padding - 2, width + 2 * padding - 2)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _convolve(x: Tensor, filters: Tensor, bias: Tensor | None, out_channels: int, padding: int) -> Tensor:
    channels = filters.shape[2]
    if x.dtype != torch.float32 or x.ndim != 4 or x.shape[1] != channels:
        raise ModelError(
            f"a convolution takes float32 (image, {channels}, y, x); it is given {x.dtype} of shape {tuple(x.shape)}"
        )
    x = x.contiguous(memory_format=torch.channels_last)
    outputs = _outputs(x, filters, bias, out_channels, padding)
    if outputs.numel() == 0:
        return outputs
    count, _, height, width = x.shape
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
        padding,
        torch.get_num_threads(),
    )
    return outputs


torch.library.register_fake(_NAME, _outputs)
torch.library.impl(_NAME, "CPU", _convolve)


def transformed(weight: Tensor) -> Tensor:
    """``G g G^T`` of every filter: of (out, in, 3, 3) float32 (36, group, in, out of the group), as the kernel reads.

    The last group is filled up with zeros.
    """
    n_out, n_in = weight.shape[:2]
    g = _FILTER_TRANSFORM
    products = (g @ weight.detach().double() @ g.T).permute(2, 3, 1, 0).reshape(36, n_in, n_out)
    groups = -(-n_out // _GROUP)
    filled = functional.pad(products, (0, groups * _GROUP - n_out)).float()
    return filled.view(36, n_in, groups, _GROUP).transpose(1, 2).contiguous()


def fits(convolution: nn.Module, height: int, width: int) -> bool:
    """Whether the kernel can, and should, compute `convolution` of inputs of this size."""
    # not its subclasses, which may do more than it does
    if type(convolution) is not nn.Conv2d or convolution.weight.dtype != torch.float32:
        return False
    plain = (convolution.stride, convolution.dilation, convolution.groups) == ((1, 1), (1, 1), 1)
    even = convolution.padding in ((0, 0), (1, 1), (2, 2)) and convolution.padding_mode == "zeros"
    channels = (convolution.in_channels, convolution.out_channels)
    if convolution.kernel_size != (3, 3) or not plain or not even or any(n % _CHANNELS for n in channels):
        return False
    added = 2 * int(convolution.padding[0]) - 2
    # the backward pass has tiles of the inputs
    return min(_saving(height + added, width + added), _saving(height, width)) >= _LEAST_SAVING


def _saving(height: int, width: int) -> float:
    """Multiplications of a direct convolution to so many outputs, over those of Winograd's algorithm."""
    return 9 * height * width / (36 * n_tiles(height, width)) if height > 0 < width else 0.0


def n_tiles(height: int, width: int) -> int:
    """How many tiles, of 36 products each, cover so many outputs."""
    return -(-height // _TILE) * -(-width // _TILE)


def use_winograd(network: nn.Module, image: Tensor) -> None:
    """Replace the convolutions of `network` that the kernel computes sooner, in place; for images of this size.

    `image` is (1, channel, y, x), on a CPU.
    """
    if not available():
        return
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    for module, sizes in input_sizes(network, image, convolutions).items():
        if sizes and all(fits(module, *size) for size in sizes):
            replace(network, module, WinogradConv2d(module))
