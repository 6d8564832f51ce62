"""Gradients carried in bfloat16 through a network that is evaluated in float32.

Rounding on the way forward changes which units are active, and a map never forgets that: evaluated in bfloat16 all the
way, Integrated Gradients lose a fifth of their p=50 mask. The way back is linear: there an error stays the rounding
that it is, and the sum over steps averages it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from igstore.engine.convolutions import Convolution, convolve


class Bfloat16Backward(TorchFunctionMode):
    """Within it, backward passes of the functions that fill a network run in bfloat16; all else is as it was.

    Those are convolutions without groups, ReLU, sums, concatenations and ``addcmul``, of float32 tensors. What is none
    of them, and what has gradients to give to parameters, stays in float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rounded: dict[int, tuple[Tensor, Tensor]] = {}  # keeping the weight keeps its id unique

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        carried = _CARRIED.get(function)
        result = NotImplemented
        if carried is not None and torch.is_grad_enabled() and kwargs.keys() <= _KNOWN_BY_NAME:
            result = carried(self, function, *args, **kwargs)
        return function(*args, **kwargs) if result is NotImplemented else result

    def rounded(self, weight: Tensor) -> Tensor:
        """`weight` in bfloat16, which is made once."""
        if id(weight) not in self._rounded:
            self._rounded[id(weight)] = (weight, weight.to(torch.bfloat16))
        return self._rounded[id(weight)][1]


def _as_it_comes(context: Any, outputs: int = 1) -> None:
    """Have gradients of outputs handed over in whatever type they have; torch casts them to the outputs' by default.

    Older versions of torch always do, which costs time and changes nothing.
    """
    if hasattr(context, "set_output_grad_dtype"):
        context.set_output_grad_dtype(*(None,) * outputs)


def _differentiated(*tensors: object) -> bool:
    """All of them are float32 tensors that gradients go to."""
    return all(isinstance(one, Tensor) and one.requires_grad and one.dtype == torch.float32 for one in tensors)


def _constant(*tensors: object) -> bool:
    """None of them is a tensor that gradients go to."""
    return not any(isinstance(one, Tensor) and one.requires_grad for one in tensors)


def _may_be_changed(tensor: Tensor) -> bool:
    """In place, by a function of ours: not a view, whose base torch would have to tell."""
    return not tensor.is_leaf and not tensor._is_view()


# --- Convolution


class _Convolution(Function):
    @staticmethod
    def forward(context: Any, x: Tensor, function: Callable[[Tensor], Tensor], rounded: Tensor, *shape: Any) -> Tensor:
        _as_it_comes(context)
        context.rounded, context.shape, context.input_shape = rounded, shape, x.shape
        return function(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient.to(torch.bfloat16)
        return _convolution_backward(gradient, context.input_shape, context.rounded, *context.shape), *(None,) * 5


def _convolution_backward(
    gradient: Tensor,
    input_shape: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The gradient at the input, all in bfloat16."""
    # of the input the shape and the layout matter; its numbers are for the weight's gradient
    x = torch.empty(input_shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
    at_input: Tensor
    at_input, _, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [True, False, False]
    )
    return at_input


def _convolution(
    mode: Bfloat16Backward,
    function: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Any:
    # oneDNN takes twice as long for a depthwise one in bfloat16
    plain = x.ndim == 4 and groups == 1 and not isinstance(padding, str)
    if not plain or not _differentiated(x) or not _constant(weight, bias):
        return NotImplemented
    shape = [[size, size] if isinstance(size, int) else list(size) for size in (stride, padding, dilation)]
    return _Convolution.apply(x, lambda x: function(x, weight, bias, *shape), mode.rounded(weight), *shape)


class _OwnConvolution(Function):
    """A `Convolution`, with what surrounds it."""

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        addend: Tensor | None,
        function: Callable[..., Any],
        module: Convolution,
        rounded: Tensor,
    ) -> Any:
        _as_it_comes(context, outputs=1 + module.passes_on)
        context.set_materialize_grads(False)
        result = function(x, addend, module)
        outputs = result[0] if module.passes_on else result
        context.module, context.rounded, context.input_shape = module, rounded, x.shape
        # autograd would keep the outputs themselves
        context.inside = _between(outputs, *module.bounds) if module.bounded else None
        if module.scale is not None:
            context.save_for_backward(x)
        return result

    @staticmethod
    def backward(context: Any, gradient: Tensor | None, passed_on: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return passed_on, *(None,) * 4
        module: Convolution = context.module
        gradient = gradient.to(torch.bfloat16)
        if context.inside is not None:
            gradient = gradient * context.inside
        at_input = _convolution_backward(
            gradient, context.input_shape, context.rounded, module.stride, module.padding, [1, 1]
        )
        if module.scale is not None and module.shift is not None:
            (x,) = context.saved_tensors
            scale, shift = (one[:, None, None] for one in (module.scale, module.shift))
            at_input = at_input * ((torch.addcmul(shift, x, scale) > 0) * scale).to(torch.bfloat16)
        if passed_on is not None:
            at_input = at_input + passed_on
        return at_input, gradient if context.needs_input_grad[1] else None, None, None, None


def _between(result: Tensor, low: float, high: float) -> Tensor:
    """1 where gradients pass a clamp, and 0 where they do not, in bfloat16."""
    return ((result > low) & (result < high)).to(torch.bfloat16)


def _own_convolution(
    mode: Bfloat16Backward, function: Any, x: Tensor, addend: Tensor | None, module: Convolution
) -> Any:
    if not _differentiated(x) or (addend is not None and not _differentiated(addend)):
        return NotImplemented
    return _OwnConvolution.apply(x, addend, function, module, mode.rounded(module.weight))


# --- ReLU


class _ReLU(Function):
    @staticmethod
    def forward(context: Any, x: Tensor, inplace: bool) -> Tensor:
        _as_it_comes(context)
        if inplace:
            context.mark_dirty(x)
        result = functional.relu(x, inplace)
        context.result = result.to(torch.bfloat16)  # rounding leaves it as positive as it is
        return result

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.to(torch.bfloat16)
        return torch.ops.aten.threshold_backward(gradient, context.result, 0), None


def _relu(mode: Bfloat16Backward, function: Any, x: Tensor, inplace: bool = False) -> Any:
    if not _differentiated(x) or (inplace and not _may_be_changed(x)):
        return NotImplemented
    return _ReLU.apply(x, inplace)


# --- Sums, concatenations, multiplications


class _Sum(Function):
    @staticmethod
    def forward(context: Any, x: Tensor, y: Tensor, inplace: bool) -> Tensor:
        _as_it_comes(context)
        if not inplace:
            return x + y
        context.mark_dirty(x)
        return x.add_(y)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, gradient, None


def _sum(mode: Bfloat16Backward, function: Any, x: Any, y: Any) -> Any:
    inplace = function in (torch.Tensor.add_, torch.Tensor.__iadd__)
    if not _differentiated(x, y) or x.shape != y.shape:
        return NotImplemented
    if inplace and not _may_be_changed(x):
        return NotImplemented
    return _Sum.apply(x, y, inplace)


class _Concatenation(Function):
    @staticmethod
    def forward(context: Any, dim: int, *tensors: Tensor) -> Tensor:
        _as_it_comes(context)
        context.dim, context.sizes = dim, [tensor.shape[dim] for tensor in tensors]
        return torch.cat(tensors, dim)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *torch.split(gradient, context.sizes, context.dim)


def _concatenation(mode: Bfloat16Backward, function: Any, tensors: Any, dim: int = 0) -> Any:
    # torch skips empty tensors of one dimension among others of more
    if not _differentiated(*tensors) or len({tensor.ndim for tensor in tensors}) != 1:
        return NotImplemented
    return _Concatenation.apply(dim, *tensors)


class _Multiplication(Function):
    @staticmethod
    def forward(context: Any, shift: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        _as_it_comes(context)
        context.scale = scale.to(torch.bfloat16)
        return torch.addcmul(shift, x, scale)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        return None, gradient.to(torch.bfloat16) * context.scale, None


def _multiplication(mode: Bfloat16Backward, function: Any, shift: Tensor, x: Tensor, scale: Tensor) -> Any:
    if not _differentiated(x) or not _constant(shift, scale):
        return NotImplemented
    if torch.broadcast_shapes(shift.shape, x.shape, scale.shape) != x.shape:  # type: ignore[no-untyped-call]
        return NotImplemented
    return _Multiplication.apply(shift, x, scale)


# With any other argument named, a call is left to torch.
_KNOWN_BY_NAME = frozenset({"bias", "stride", "padding", "dilation", "groups", "inplace", "dim"})
_CARRIED: dict[Any, Callable[..., Any]] = {
    functional.conv2d: _convolution,  # which is torch.conv2d
    convolve: _own_convolution,
    functional.relu: _relu,
    torch.relu: _relu,
    torch.add: _sum,
    torch.Tensor.add: _sum,
    torch.Tensor.__add__: _sum,
    torch.Tensor.add_: _sum,
    torch.Tensor.__iadd__: _sum,
    torch.cat: _concatenation,
    torch.addcmul: _multiplication,
}
