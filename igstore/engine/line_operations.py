"""Batch norms, clamps and pooling of points of a straight line (`igstore.engine.line`)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from igstore.engine.line import (
    Batch,
    Value,
    empty_passes,
    empty_value,
    joined,
    launch_rows,
    materialise,
    packed,
    row_of,
    split,
    unpacked,
    use_kernels,
)

# Of the gradient at the outputs, already gated, an addend and where gradients pass the clamp of the inputs: the gradient at
# the inputs, float16 (point, y, x, channel).
Back = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]

UNBOUNDED = (-math.inf, math.inf)


def clamped(
    references: Tensor, others: Tensor, bounds: tuple[float, float], batch: Batch
) -> tuple[Value, Tensor | None]:
    """Float32 values of references and of the other points, clamped, and where gradients pass: `packed`, or None."""
    active = None
    if bounds != UNBOUNDED:
        low, high = bounds
        every = torch.cat([references, others])
        active = packed((every > low) & (every < high))
        references, others = references.clamp(low, high), others.clamp(low, high)
    return Value(split(references), (others - batch.line(references)).half()), active


def _finished(result: Tensor, addend: Tensor | None, gate: Tensor | None) -> Tensor:
    if addend is not None:
        result = result + addend
    if gate is not None:
        result = result * unpacked(gate, result.shape[3])
    return result.half().contiguous()


def _gate_arguments(out: Tensor, addend: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    return out if gate is None else gate, out if addend is None else addend


def _gate_settings(addend: Tensor | None, gate: Tensor | None) -> dict[str, bool]:
    return {"HAS_ACTIVE": gate is not None, "HAS_ADDEND": addend is not None}




class Operation:
    """From a value to another one, channel by channel."""

    # Whether the outputs are as large as the inputs, so that what they are multiplied by may be the same.
    keeps_size = True

    def set_scales(self, values: tuple[float, float], gradients: tuple[float, float]) -> None:
        """Say by how much values, and gradients, are multiplied where they are held: at the inputs and at the outputs."""

    def outputs(self, x: Value, batch: Batch) -> tuple[Value, Tensor | None, Back]:
        """The outputs, where gradients pass their clamp (`packed`, or None), and the way back."""
        raise NotImplementedError


class Affine(Operation):
    """``clamp(scale x + shift, *bounds)``, scale and shift being float32 (channel,)."""

    def __init__(self, scale: Tensor, shift: Tensor, bounds: tuple[float, float], *, keeps_size: bool) -> None:
        self._scale, self._shift, self._bounds = scale, shift, bounds
        self.keeps_size = keeps_size
        self.set_scales((1.0, 1.0), (1.0, 1.0))

    def clamp(self, bounds: tuple[float, float]) -> None:
        """Have the outputs clamped."""
        self._bounds = self.bounds = bounds

    def set_scales(self, values: tuple[float, float], gradients: tuple[float, float]) -> None:
        at_input, at_output = values
        self.scale, self.shift = self._scale * (at_output / at_input), self._shift * at_output
        self.bounds = (self._bounds[0] * at_output, self._bounds[1] * at_output)
        self.backward_scale = self._scale * (gradients[0] / gradients[1])

    def outputs(self, x: Value, batch: Batch) -> tuple[Value, Tensor | None, Back]:
        if use_kernels(x.pair.device):
            return self._launch(x, batch)
        references = self.scale * joined(x.pair) + self.shift
        others = batch.line(references)
        if x.difference is not None:
            others = others + self.scale * x.difference
        value, active = clamped(references, others, self.bounds, batch)

        def back(gradient: Tensor, addend: Tensor | None, gate: Tensor | None) -> Tensor:
            return _finished(self.backward_scale * gradient, addend, gate)

        return value, active, back

    def _launch(self, x: Value, batch: Batch) -> tuple[Value, Tensor | None, Back]:
        from igstore.engine import line_kernels as kernels

        height, width, channels = x.shape
        found = empty_value(batch, height, width, channels, x.pair.device)
        shape = (len(batch), height, width, channels)
        active = None
        if self.bounds != UNBOUNDED:
            active = empty_passes(batch, height, width, channels, x.pair.device)
        rows = len(batch) * height * width
        launch_rows(
            kernels.affine, rows, channels, *x.arguments, *found.arguments,
            x.pair if active is None else active, self.scale, self.shift,
            batch.before, batch.after, batch.between, batch.n_references, rows, height * width, channels,
            *x.strides, row_of(active), *self.bounds,
            HAS_DIFFERENCE=x.difference is not None, HAS_ACTIVE=active is not None,
        )  # fmt: skip

        def back(gradient: Tensor, addend: Tensor | None, gate: Tensor | None) -> Tensor:
            out = torch.empty(shape, dtype=torch.float16, device=gradient.device)
            passes, added = _gate_arguments(out, addend, gate)
            launch_rows(
                kernels.affine_backward, rows, channels, gradient, self.backward_scale, added, passes, out,
                rows, channels, row_of(gradient), row_of(addend), row_of(gate), HAS_SCALE=True,
                **_gate_settings(addend, gate),
            )  # fmt: skip
            return out

        return found, active, back


class MaxPool(Operation):
    """The largest value of each window, clamped; zeros of padding never count."""

    def __init__(self, window: int, stride: int, padding: int) -> None:
        self.window, self.stride, self.padding = window, stride, padding
        self.clamp(UNBOUNDED)

    def clamp(self, bounds: tuple[float, float]) -> None:
        """Have the outputs clamped."""
        self._bounds = self.bounds = bounds

    def set_scales(self, values: tuple[float, float], gradients: tuple[float, float]) -> None:
        self.bounds = (self._bounds[0] * values[1], self._bounds[1] * values[1])

    def outputs(self, x: Value, batch: Batch) -> tuple[Value, Tensor | None, Back]:
        if use_kernels(x.pair.device):
            return self._launch(x, batch)
        height, width, channels = x.shape
        values = materialise(x, batch).permute(0, 3, 1, 2)
        largest, indices = functional.max_pool2d(values, self.window, self.stride, self.padding, return_indices=True)
        references, others = largest.permute(0, 2, 3, 1).tensor_split([batch.n_references])
        value, active = clamped(references, others, self.bounds, batch)

        def back(gradient: Tensor, addend: Tensor | None, gate: Tensor | None) -> Tensor:
            gradient = gradient.permute(0, 3, 1, 2).float().flatten(2)
            spread = gradient.new_zeros((len(gradient), channels, height * width))
            spread.scatter_add_(2, indices.flatten(2), gradient)
            return _finished(spread.view(len(gradient), channels, height, width).permute(0, 2, 3, 1), addend, gate)

        return value, active, back

    def _launch(self, x: Value, batch: Batch) -> tuple[Value, Tensor | None, Back]:
        from igstore.engine import line_kernels as kernels

        height, width, channels = x.shape
        device = x.pair.device
        sides = _sides(height, width, self)
        found = empty_value(batch, *sides, channels, device)
        where = torch.empty((len(batch), *sides, channels), dtype=torch.uint8, device=device)
        active = None
        if self.bounds != UNBOUNDED:
            active = empty_passes(batch, *sides, channels, device)
        rows = len(batch) * sides[0] * sides[1]
        settings = {"WINDOW": self.window, "STRIDE": self.stride, "PADDING": self.padding}
        launch_rows(
            kernels.max_pool, rows, channels, *x.arguments, *found.arguments, where, where if active is None else active,
            batch.before, batch.after, batch.between, batch.n_references, rows, height, width, *sides, channels,
            *x.strides, row_of(active), *self.bounds,
            HAS_DIFFERENCE=x.difference is not None, HAS_ACTIVE=active is not None, **settings,
        )  # fmt: skip

        def back(gradient: Tensor, addend: Tensor | None, gate: Tensor | None) -> Tensor:
            out = torch.empty((len(batch), height, width, channels), dtype=torch.float16, device=device)
            passes, added = _gate_arguments(out, addend, gate)
            rows = len(batch) * height * width
            launch_rows(
                kernels.max_pool_backward, rows, channels, gradient, where, passes, added, out,
                rows, height, width, *sides, channels, row_of(gradient), row_of(addend), row_of(gate),
                **_gate_settings(addend, gate), **settings,
            )  # fmt: skip
            return out

        return found, active, back


class MeanPool(Operation):
    """The mean of each window, in which zeros of padding count."""

    def __init__(self, window: int, stride: int, padding: int) -> None:
        self.window, self.stride, self.padding = window, stride, padding

    def outputs(self, x: Value, batch: Batch) -> tuple[Value, Tensor | None, Back]:
        if use_kernels(x.pair.device):
            return self._launch(x, batch)
        height, width, channels = x.shape

        def pooled(values: Tensor) -> Tensor:
            values = functional.avg_pool2d(values.permute(0, 3, 1, 2).float(), self.window, self.stride, self.padding)
            return values.permute(0, 2, 3, 1)

        difference = None if x.difference is None else pooled(x.difference).half()
        value = Value(split(pooled(joined(x.pair))), difference)

        def back(gradient: Tensor, addend: Tensor | None, gate: Tensor | None) -> Tensor:
            like = gradient.new_zeros((len(gradient), channels, height, width), dtype=torch.float32)
            spread = torch.ops.aten.avg_pool2d_backward(
                gradient.permute(0, 3, 1, 2).float(), like, [self.window] * 2, [self.stride] * 2, [self.padding] * 2,
                False, True, None,
            )  # fmt: skip
            return _finished(spread.permute(0, 2, 3, 1), addend, gate)

        return value, None, back

    def _launch(self, x: Value, batch: Batch) -> tuple[Value, Tensor | None, Back]:
        from igstore.engine import line_kernels as kernels

        height, width, channels = x.shape
        sides = _sides(height, width, self)
        found = empty_value(batch, *sides, channels, x.pair.device)
        settings = {"WINDOW": self.window, "STRIDE": self.stride, "PADDING": self.padding}
        pixels = sides[0] * sides[1]
        sizes = (height, width, *sides, channels)
        launch_rows(
            kernels.mean_pool, batch.n_references * pixels, channels, x.pair, found.pair, batch.n_references * pixels,
            *sizes, *x.strides[:2], *found.strides[:2], PAIRS=True, **settings,
        )  # fmt: skip
        if x.difference is None:
            found.difference = None
        elif found.difference is not None and batch.n_differences:
            launch_rows(
                kernels.mean_pool, batch.n_differences * pixels, channels, x.difference, found.difference,
                batch.n_differences * pixels, *sizes, x.strides[2], 0, found.strides[2], 0, PAIRS=False, **settings,
            )  # fmt: skip

        def back(gradient: Tensor, addend: Tensor | None, gate: Tensor | None) -> Tensor:
            out = torch.empty((len(batch), height, width, channels), dtype=torch.float16, device=gradient.device)
            passes, added = _gate_arguments(out, addend, gate)
            rows = len(batch) * height * width
            launch_rows(
                kernels.mean_pool_backward, rows, channels, gradient, passes, added, out, rows, *sizes,
                row_of(gradient), row_of(addend), row_of(gate), **_gate_settings(addend, gate), **settings,
            )  # fmt: skip
            return out

        return found, None, back


def _sides(height: int, width: int, pool: MaxPool | MeanPool) -> tuple[int, int]:
    y, x = ((size + 2 * pool.padding - pool.window) // pool.stride + 1 for size in (height, width))
    return y, x
