"""Convolutions on CPUs with less to multiply and less to move, forwards and backwards.

Less to multiply: Winograd's algorithm, F(4x4, 3x3) and its like for other filters, as Lavin and Gray describe it ("Fast
Algorithms for Convolutional Neural Networks", 2015). oneDNN, which torch computes convolutions with on CPUs, does not
have it for float32; cuDNN does. Results differ from a direct convolution's by float32 rounding, some 1e-5 of the
largest, and in a picture's even parts from place to place. Where a network chooses among numbers afterwards
(`igstore.acceleration.choices`), the forward pass is direct.

Less to move: an activation, a sum or a batch norm beside a convolution is computed as the convolution reads or writes,
so that its numbers pass through memory once; `igstore.acceleration.fusion` finds them.

The kernel is compiled when igstore is installed. Without a compiler, or on a processor that lacks the instructions
(AVX2 with FMA on x86, NEON on ARM), convolutions stay torch's. ``IGSTORE_KERNELS=0`` rules the kernel out.
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
from torch.overrides import handle_torch_function, has_torch_function

from igstore.acceleration.choices import called_before_choices
from igstore.errors import ModelError
from igstore.machine import kernels_allowed
from igstore.models import input_sizes, is_plain, replace

logger = logging.getLogger(__name__)

try:
    from igstore.acceleration import _convolutions
except ImportError:  # there was no compiler
    _convolutions = None  # type: ignore[assignment,unused-ignore]
_COMPILED = _convolutions is not None
# output channels that the kernel works on together; 0 where the processor lacks the instructions
_GROUP = _convolutions.GROUP if _COMPILED else 0

# Taps of filters (y, x) that the kernel has. Along an axis of one tap there is nothing to save.
_TAPS = {(1, 1), (3, 3), (1, 3), (3, 1), (5, 5), (1, 7), (7, 1)}
# By taps along an axis, the points of interpolation beside 0 and infinity, each with its negative. A tile has as many
# products as there are points, and 4 outputs.
_POINTS: dict[int, tuple[float, ...]] = {3: (1, 2), 5: (1, 2, 0.5), 7: (1, 2, 0.5, 1.25)}
_CHANNELS = 16  # the kernel wants channels in multiples of these
# Multiplications saved, below which transforms cost more: tiles at the edge may be mostly empty.
_LEAST_SAVING = 2.0
_UNBOUNDED = (-math.inf, math.inf)
_FEWEST_PIXELS = 16  # below this, of filters with one tap, reading filters takes longer than multiplying by them


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
    """Whether the kernel was compiled, this processor has its instructions, and the user has not ruled it out."""
    return _GROUP > 0 and kernels_allowed()


class Convolution(nn.Module):
    """What a `torch.nn.Conv2d` computes, and what surrounds it, for float32 on a CPU; with no gradients to its weights.

    Of x and an addend of the output's shape it gives ``clamp(convolution(a) + addend, *bounds)``, where ``a`` is x, or
    ``relu(scale x + shift)`` where there is a scale.

    Parameters
    ----------
    convolution
        One that `fits`; its weights must not change afterwards. Transformed, they take up to four times their memory,
        once for the forward and once for the backward pass.
    direct, before_choices
        As the attributes.

    Attributes
    ----------
    direct
        Whether to compute the forward pass without Winograd's algorithm, so that equal numbers stay equal. The
        backward pass is linear: there rounding decides nothing.
    before_choices
        Whether a network that calls it goes on to choose among numbers; see `igstore.acceleration.choices`.
    bounds
        (low, high) of the outputs, which may be infinite: (0, inf) is a ReLU.
    scale, shift
        Of each input channel, (channel,), or None. Of filters of one tap alone, without a stride.
    passes_on
        Whether x is returned too. What else reads x reads that, and its gradient is added in the backward pass here.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, convolution: nn.Conv2d, *, direct: bool = False, before_choices: bool = False) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.bias = convolution.bias
        self.taps = list(convolution.kernel_size)
        self.stride = list(convolution.stride)
        self.padding = [int(n) for n in convolution.padding]
        self.bounds = _UNBOUNDED
        self.register_buffer("scale", None)
        self.register_buffer("shift", None)
        self.passes_on = False
        self.before_choices = before_choices
        self._direct = direct
        self._filters: Tensor | None = None
        self._backward_filters: Tensor | None = None

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(image, channel, y, x), as `torch.nn.Conv2d`; with x itself, if that is passed on."""
        return convolve(x, addend, self)

    @property
    def bounded(self) -> bool:
        """Whether the outputs are clamped."""
        return self.bounds != _UNBOUNDED

    @property
    def direct(self) -> bool:
        """See above; may be set."""
        return self._direct

    @direct.setter
    def direct(self, direct: bool) -> None:
        self._direct = direct
        self._filters = None

    def filters(self) -> Tensor:
        """Transformed filters of the forward pass, made when they are first wanted."""
        if self._filters is None:
            self._filters = grouped(self.weight) if self.direct else transformed(self.weight)
        return self._filters

    def backward_filters(self) -> Tensor:
        """Those of the backward pass, a convolution with turned filters that swaps what channels go in and out."""
        if self._backward_filters is None:
            self._backward_filters = transformed(self.weight.flip(2, 3).transpose(0, 1))
        return self._backward_filters


def convolve(x: Tensor, addend: Tensor | None, module: Convolution) -> Tensor | tuple[Tensor, Tensor]:
    """The forward pass of `module`; a `TorchFunctionMode` sees it as it sees torch's own functions."""
    if has_torch_function((x, addend)):
        return handle_torch_function(convolve, (x, addend), x, addend, module)
    return _Convolution.apply(x, addend, module)  # type: ignore[no-any-return]


class _Convolution(Function):
    @staticmethod
    def forward(context: Any, x: Tensor, addend: Tensor | None, module: Convolution) -> Tensor | tuple[Tensor, Tensor]:
        context.set_materialize_grads(False)
        context.module, context.shape = module, x.shape
        outputs, _ = _operation(
            x[..., :: module.stride[0], :: module.stride[1]],
            module.filters(),
            len(module.weight),
            module.taps,
            module.padding,
            direct=module.direct,
            bias=module.bias,
            addend=addend,
            bounds=module.bounds,
            scale=module.scale,
            shift=module.shift,
        )
        # where outputs are at their bounds, no gradient passes; of a ReLU of x, x tells
        context.save_for_backward(outputs if module.bounded else None, x if module.scale is not None else None)
        return (outputs, x) if module.passes_on else outputs

    @staticmethod
    def backward(
        context: Any, gradient: Tensor | None, passed_on: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if gradient is None:
            return passed_on, None, None
        module: Convolution = context.module
        outputs, x = context.saved_tensors
        strided = module.stride != [1, 1]
        has_addend = context.needs_input_grad[1]
        keeps_gated = has_addend and outputs is not None
        if keeps_gated and module.taps != [1, 1]:  # whose tiles overlap
            gradient = torch.ops.aten.hardtanh_backward(gradient, outputs, *module.bounds)
            outputs, keeps_gated = None, False
        at_input, gated = _operation(
            gradient,
            module.backward_filters(),
            module.weight.shape[1],
            module.taps,
            [taps - 1 - n for taps, n in zip(module.taps, module.padding, strict=True)],
            gate=outputs,
            gate_bounds=module.bounds,
            keeps_gated=keeps_gated,
            scale=module.scale,
            shift=module.shift,
            rectified=x,
            addend=None if strided else passed_on,
        )
        if strided:
            at_input = _spread(at_input, module.stride, context.shape, passed_on)
        at_addend = gated if keeps_gated else gradient
        return at_input, at_addend if has_addend else None, None


def _spread(gradient: Tensor, stride: Sequence[int], shape: torch.Size, addend: Tensor | None) -> Tensor:
    """`gradient` at every stride-th pixel of a tensor of `shape`, zeros between them; added to `addend`."""
    if addend is None:
        spread = _empty(shape, gradient).zero_()
    else:
        spread = addend.clone(memory_format=torch.channels_last)
    spread[..., :: stride[0], :: stride[1]] += gradient
    return spread


# An operation of torch's, so that what torch does with tensors that hold no numbers works here too.
_NAME = "igstore::convolve"
_SIGNATURE = """(
    Tensor x, Tensor filters, int out_channels, int[] taps, int[] padding, *, bool direct=False, Tensor? bias=None,
    Tensor? addend=None, float[]? bounds=None, Tensor? gate=None, float[]? gate_bounds=None, bool keeps_gated=False,
    Tensor? scale=None, Tensor? shift=None, Tensor? rectified=None
) -> (Tensor, Tensor)"""
torch.library.define(_NAME, _SIGNATURE.replace("\n", " "))
_operation: Callable[..., tuple[Tensor, Tensor]] = torch.ops.igstore.convolve.default


def _results(
    x: Tensor,
    filters: Tensor,
    out_channels: int,
    taps: list[int],
    padding: list[int],
    *,
    keeps_gated: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The outputs and, where they are kept, the gated inputs; not filled yet."""
    sides = [size + 2 * n - k + 1 for size, n, k in zip(x.shape[2:], padding, taps, strict=True)]
    outputs = _empty((len(x), out_channels, *sides), x)
    return outputs, torch.empty_like(x, memory_format=torch.channels_last) if keeps_gated else x.new_empty(0)


def _convolve(
    x: Tensor,
    filters: Tensor,
    out_channels: int,
    taps: list[int],
    padding: list[int],
    *,
    direct: bool = False,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    bounds: list[float] | None = None,
    gate: Tensor | None = None,
    gate_bounds: list[float] | None = None,
    keeps_gated: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    rectified: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As igstore/acceleration/_convolutions.cpp says."""
    channels = filters.shape[2]
    expected = _filters_shape(channels, out_channels, taps, direct)
    if filters.shape != expected:
        raise ModelError(f"expected filters of shape {expected}, not {tuple(filters.shape)}")
    if x.dtype != torch.float32 or x.ndim != 4 or x.shape[1] != channels:
        raise ModelError(
            f"a convolution takes float32 (image, {channels}, y, x); it is given {x.dtype} of shape {tuple(x.shape)}"
        )
    x = x.contiguous(memory_format=torch.channels_last)
    outputs, gated = _results(x, filters, out_channels, taps, padding, keeps_gated=keeps_gated)
    if outputs.numel() == 0:
        return outputs, gated
    for tensor, shape in ((addend, outputs.shape), (rectified, outputs.shape), (gate, x.shape)):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape != shape):
            raise ModelError(f"expected float32 of shape {tuple(shape)}, not {tensor.dtype} of {tuple(tensor.shape)}")
    as_images = [
        tensor if tensor is None else tensor.contiguous(memory_format=torch.channels_last)
        for tensor in (gate, rectified, addend)
    ]
    gate, rectified, addend = as_images
    count, _, height, width = x.shape
    taps_y, taps_x = taps
    padding_y, padding_x = padding
    gate_low, gate_high = gate_bounds or _UNBOUNDED
    low, high = bounds or _UNBOUNDED
    _convolutions.convolve(
        x.data_ptr(),
        filters.data_ptr(),
        outputs.data_ptr(),
        _address(gate),
        _address(gated if keeps_gated else None),
        _address(scale),
        _address(shift),
        _address(rectified),
        _address(bias),
        _address(addend),
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
        direct,
        gate_low,
        gate_high,
        low,
        high,
    )
    return outputs, gated


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


torch.library.register_fake(_NAME, _results)
torch.library.impl(_NAME, "CPU", _convolve)


def transformed(weight: Tensor) -> Tensor:
    """``G g G^T`` of every filter: of (out, in, y, x) float32 (product, group, in, out of the group).

    The last group is filled up with zeros.
    """
    both = torch.kron(*map(_filter_transform, weight.shape[2:]))  # (product, tap)
    by_tap = weight.detach().permute(2, 3, 1, 0).flatten(0, 1).flatten(1)  # (tap, in x out)
    products = (both @ by_tap.double()).float().view(-1, *weight.shape[1::-1])
    return _in_groups(products).transpose(1, 2).contiguous()


def grouped(weight: Tensor) -> Tensor:
    """Filters (out, in, y, x) as they are, in the order of a direct convolution: (group, tap, in, out of the group).

    The last group is filled up with zeros.
    """
    by_tap = weight.detach().permute(2, 3, 1, 0).flatten(0, 1)  # (tap, in, out)
    return _in_groups(by_tap).permute(2, 0, 1, 3).contiguous()


def _filters_shape(channels: int, out_channels: int, taps: Sequence[int], direct: bool) -> tuple[int, ...]:
    """Of what `grouped` or `transformed` give."""
    groups = -(-out_channels // _GROUP)
    if direct:
        return groups, math.prod(taps), channels, _GROUP
    return math.prod(tile(n)[1] for n in taps), groups, channels, _GROUP


def _in_groups(filters: Tensor) -> Tensor:
    """(place, in, out) as (place, in, group, out of the group)."""
    n_out = filters.shape[2]
    filled = functional.pad(filters, (0, -n_out % _GROUP))
    return filled.view(*filters.shape[:2], -1, _GROUP)


def fits(convolution: nn.Module, height: int, width: int) -> bool:
    """Whether the kernel can, and should, compute `convolution` of inputs of this size."""
    # not its subclasses, which may do more than it does
    if type(convolution) is not nn.Conv2d or not is_plain(convolution, [nn.Conv2d]):
        return False
    if convolution.weight.dtype != torch.float32:
        return False
    taps, padding = convolution.kernel_size, convolution.padding
    plain = (convolution.dilation, convolution.groups) == ((1, 1), 1)
    channels = (convolution.in_channels, convolution.out_channels)
    if taps not in _TAPS or not plain or any(n % _CHANNELS for n in channels):
        return False
    if isinstance(padding, str) or convolution.padding_mode != "zeros":
        return False
    if any(n >= k for n, k in zip(padding, taps, strict=True)):  # the backward pass would have to cut
        return False
    if taps == (1, 1):
        return height * width >= _FEWEST_PIXELS
    if convolution.stride != (1, 1):
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


def use_convolutions(network: nn.Module, image: Tensor) -> None:
    """Replace the convolutions of `network` that the kernel computes sooner, in place; for images of this size.

    Forwards they are all direct. `image` is (1, channel, y, x), on a CPU.
    """
    if not _COMPILED and kernels_allowed():
        logger.warning(
            "gradients take up to 2.6 times as long as they need: igstore was installed without a C++ compiler; "
            "install it again where there is one (g++ or clang++)"
        )
    if not available():
        return
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    before = called_before_choices(network, image, convolutions)
    for module, sizes in input_sizes(network, image, convolutions).items():
        if sizes and all(fits(module, *size) for size in sizes):
            replace(network, module, Convolution(module, direct=True, before_choices=module in before))


def use_winograd(network: nn.Module) -> None:
    """Let the `Convolution`s of `network` go by Winograd's algorithm forwards too, where nothing chooses afterwards."""
    for module in network.modules():
        if isinstance(module, Convolution):
            module.direct = module.before_choices
