"""The floor under a gradient evaluation: what it must compute and move, over what the machine computes and moves.

Counted in the matrix operations alone (convolutions, linear layers, attention): everything else can be fused into them.
Each reads its operands once and writes its result once, forwards and again backwards to the input; weights are shared
by a batch. No program that runs a network layer by layer does less.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from igstore.acceleration import convolutions

_aten = torch.ops.aten
_convolve = torch.ops.igstore.convolve
_MATRIX_OPERATIONS = (
    _aten.convolution,
    _aten.convolution_backward,
    _aten.mm,
    _aten.addmm,
    _aten.bmm,
    _aten.baddbmm,
    _convolve,
)


@dataclass(frozen=True)
class Floor:
    """The least time of one gradient evaluation, and where it comes from.

    Attributes
    ----------
    flops, n_bytes
        Floating-point operations, and bytes moved, of one evaluation.
    matrix_rate, copy_rate
        The machine's, of both, a second.
    """

    flops: float
    n_bytes: float
    matrix_rate: float
    copy_rate: float

    @property
    def seconds(self) -> float:
        """The larger of the two times: arithmetic and copies can overlap."""
        return max(self.flops / self.matrix_rate, self.n_bytes / self.copy_rate)

    @property
    def limited_by(self) -> str:
        """``arithmetic`` or ``memory``."""
        return "arithmetic" if self.flops / self.matrix_rate >= self.n_bytes / self.copy_rate else "memory"


def count_work(network: nn.Module, shape: Sequence[int], *, batch_size: int, item_bytes: int) -> tuple[int, float]:
    """Floating-point operations and bytes of one gradient evaluation, by shapes alone; nothing is computed.

    Parameters
    ----------
    network
        As it is evaluated: folded layers count as folded. Its parameters must be frozen.
    shape
        Of one of its inputs: (channel, y, x).
    batch_size
        Evaluations that share one reading of the weights.
    item_bytes
        Of one number.
    """
    shapes_only = copy.deepcopy(network).to("meta")
    image = torch.empty(1, *shape, device="meta", requires_grad=True)

    def evaluate() -> None:
        torch.autograd.grad(shapes_only(image.clone()).sum(), image)

    evaluate()  # what is made once does not count
    counted = []
    numbers_of = dict.fromkeys(_MATRIX_OPERATIONS, _numbers) | {_convolve: _convolve_numbers}
    for mapping in ({_convolve: _convolve_flops}, numbers_of):
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            evaluate()
        by_operation = counter.get_flop_counts()["Global"]
        counted.append(sum(by_operation.get(operation, 0) for operation in _MATRIX_OPERATIONS))
    flops, numbers = counted
    weights = sum(parameter.numel() for parameter in network.parameters() if parameter.ndim > 1)
    # they were counted forwards and backwards
    return flops, item_bytes * (numbers - 2 * weights * (1 - 1 / batch_size))


def _numbers(*operands: Any, out_shape: Any, **_: Any) -> int:
    """Numbers that an operation reads and writes, from the shapes of its tensors."""
    is_backward_of_convolution = isinstance(out_shape, tuple) and not isinstance(out_shape, torch.Size)
    if is_backward_of_convolution:
        output_gradient, _input, weight = operands[:3]  # the input itself matters to the weights' gradient alone
        shapes = [output_gradient, weight, out_shape[0]]
    else:
        shapes = [out_shape, *(operand for operand in operands if isinstance(operand, torch.Size))]
    return sum(map(prod, shapes))


def _convolve_flops(*operands: Any, out_shape: Any, direct: bool = False, **_: Any) -> int:
    """Of the products alone: a multiplication and an addition each."""
    x, _filters, out_channels, taps, _padding = operands
    outputs, _gated = out_shape
    products = prod(outputs[2:]) * prod(taps) if direct else convolutions.n_products(outputs[2:], taps)
    return int(2 * x[0] * x[1] * out_channels * products)


def _convolve_numbers(*operands: Any, out_shape: Any, **_: Any) -> int:
    """Transformed filters could be made of the fewer numbers that they stand for."""
    x, _filters, out_channels, taps, _padding = operands
    outputs, _gated = out_shape
    return int(prod(x) + prod(outputs) + prod(taps) * x[1] * out_channels)
