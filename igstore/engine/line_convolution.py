"""Convolutions of points of a straight line (`igstore.engine.line`), with the sum and the activation that follow them.

On a CUDA device they are Triton kernels (`igstore.engine.line_kernels`); in torch's own operations, which say what the
kernels compute, they run anywhere.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from igstore.engine.line import Batch, Value, empty_passes, empty_value, joined, row_of, unpacked, use_kernels
from igstore.engine.line_operations import UNBOUNDED, clamped

_LEAST_CHUNK = 16  # input channels that the tensor cores multiply together


class Filters(NamedTuple):
    """Filters as rows of a matrix, zeros where rows and chunks are filled up.

    Attributes
    ----------
    matrix
        float16 (output channel, (tap, part, input channel)).
    taps
        (y, x).
    first, padding
        (y, x): the first output pixel that these filters compute, and how far before it the first tap reads.
    chunk
        Input channels are filled up to a multiple of it.
    """

    matrix: Tensor
    taps: tuple[int, int]
    first: tuple[int, int]
    padding: tuple[int, int]
    chunk: int


def _matrix(parts: list[Tensor], chunk: int) -> Tensor:
    """Parts (out, in, y, x) of filters, float16, as rows (out, (tap, part, in)); to a multiple of 256 rows."""
    stacked = torch.stack(parts, dim=1)  # (out, part, in, y, x)
    n_out, _, n_in = stacked.shape[:3]
    stacked = functional.pad(stacked, (0, 0, 0, 0, 0, -n_in % chunk, 0, 0, 0, -n_out % 256))
    return stacked.permute(0, 3, 4, 1, 2).flatten(1).contiguous()


def _chunk(channels: int) -> int:
    return next((size for size in (64, 32) if channels % size == 0), 64 if channels > 96 else 32)


class LineConvolution(nn.Module):
    """What a `torch.nn.Conv2d` without groups or dilation computes, and a sum and a clamp after it.

    Of `igstore.engine.line` values x and an addend it gives ``clamp(convolution(x) + addend, *bounds)``.

    Parameters
    ----------
    convolution
        Its weights must not change afterwards.

    Attributes
    ----------
    bounds
        (low, high) of the outputs, which may be infinite: (0, inf) is a ReLU.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        weight = convolution.weight.detach()
        self.weight = convolution.weight
        self.bias = convolution.bias
        self.stride = convolution.stride
        self.padding = tuple(int(n) for n in convolution.padding)
        self.bounds = UNBOUNDED
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        # powers of two bring the weights near 1, where float16 is at its best
        self.scale = 2.0 ** math.frexp(float(weight.abs().max()))[1]
        scaled = weight / self.scale
        self.high = scaled.half()
        self.low = (scaled - self.high.float()).half()
        self._filters: dict[str, list[Filters]] = {}
        self.set_scales((1.0, 1.0), (1.0, 1.0))

    def set_scales(self, values: tuple[float, float], gradients: tuple[float, float]) -> None:
        """Say by how much values, and gradients, are multiplied where they are held: at the inputs and at the outputs."""
        at_input, at_output = values
        self.forward_scale = self.scale * at_output / at_input
        self.backward_scale = self.scale * gradients[0] / gradients[1]
        self.scaled_bias = None if self.bias is None else self.bias.detach().float() * at_output
        self.scaled_bounds = (self.bounds[0] * at_output, self.bounds[1] * at_output)

    @property
    def bounded(self) -> bool:
        """Whether the outputs are clamped."""
        return self.bounds != UNBOUNDED

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """In float32, (image, channel, y, x): for tracing a network's shapes."""
        outputs = functional.conv2d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]
        outputs = outputs if addend is None else outputs + addend
        return outputs.clamp(*self.bounds) if self.bounded else outputs

    # --- In torch

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Of (point, y, x, channel), float32."""
        x = x.float().permute(0, 3, 1, 2)
        return functional.conv2d(x, weight, None, self.stride, self.padding).permute(0, 2, 3, 1)  # type: ignore[arg-type]

    def outputs(self, x: Value, addend: Value | None, batch: Batch) -> tuple[Value, Tensor | None]:
        """The value of the outputs, and where gradients pass the clamp: `packed`, or None."""
        if use_kernels(x.pair.device):
            return self._launch_forward(x, addend, batch)
        references = self.forward_scale * self._convolve(joined(x.pair), self.high.float() + self.low.float())
        if self.scaled_bias is not None:
            references = references + self.scaled_bias
        if addend is not None:
            references = references + joined(addend.pair)
        others = batch.line(references)
        if x.difference is not None:
            others = others + self.forward_scale * self._convolve(x.difference, self.high.float())
        if addend is not None and addend.difference is not None:
            others = others + addend.difference
        return clamped(references, others, self.scaled_bounds, batch)

    def gradient(
        self, gradient: Tensor, shape: tuple[int, int], addend: Tensor | None, active: Tensor | None
    ) -> Tensor:
        """The gradient at the inputs, (point, y, x, channel) of `shape` (y, x), from that at the outputs; float16.

        To it is added an addend; where `active` is 0, it becomes 0.
        """
        if use_kernels(gradient.device):
            return self._launch_backward(gradient, shape, addend, active)
        size = (len(gradient), self.in_channels, *shape)
        at_input = torch.nn.grad.conv2d_input(
            size, self.high.float(), gradient.permute(0, 3, 1, 2).float(), self.stride, self.padding
        ).permute(0, 2, 3, 1)
        at_input = self.backward_scale * at_input
        if addend is not None:
            at_input = at_input + addend
        if active is not None:
            at_input = at_input * unpacked(active, self.in_channels)
        return at_input.half()

    # --- By Triton's kernels

    def filters(self, kind: str) -> list[Filters]:
        """What a kind of launches multiplies by; ``backward`` ones once for each phase of a stride."""
        if kind not in self._filters:
            self._filters[kind] = list(self._make_filters(kind))
        return self._filters[kind]

    def _make_filters(self, kind: str) -> Any:
        taps = (self.high.shape[2], self.high.shape[3])
        if kind != "backward":
            parts = [self.high, self.high, self.low] if kind == "reference" else [self.high]
            chunk = _chunk(self.in_channels)
            yield Filters(_matrix(parts, chunk), taps, (0, 0), self.padding, chunk)
            return
        turned = self.high.transpose(0, 1)
        chunk = _chunk(self.out_channels)
        for y in range(self.stride[0]):
            for x in range(self.stride[1]):
                # of an input pixel in this phase, the taps by which outputs reach it, the last one first
                chosen = [
                    range((phase + n) % stride, k, stride)
                    for phase, n, stride, k in zip((y, x), self.padding, self.stride, taps, strict=True)
                ]
                some = turned[:, :, list(chosen[0])][:, :, :, list(chosen[1])].flip(2, 3)
                padding = [
                    len(one) - 1 - (phase + n - (phase + n) % stride) // stride
                    for phase, n, stride, one in zip((y, x), self.padding, self.stride, chosen, strict=True)
                ]
                sizes = (len(chosen[0]), len(chosen[1]))
                yield Filters(_matrix([some], chunk), sizes, (y, x), (padding[0], padding[1]), chunk)

    def _launch_forward(self, x: Value, addend: Value | None, batch: Batch) -> tuple[Value, Tensor | None]:
        from igstore.engine import line_kernels as kernels

        device, n_out = x.pair.device, self.out_channels
        n_references, n_differences = batch.n_references, batch.n_differences
        height, width, _ = x.shape
        sides = [
            (size + 2 * n - k) // stride + 1
            for size, n, k, stride in zip((height, width), self.padding, self.high.shape[2:], self.stride, strict=True)
        ]
        found = empty_value(batch, sides[0], sides[1], n_out, device)
        active = None
        if self.bounded:
            active = empty_passes(batch, sides[0], sides[1], n_out, device)
        z = torch.empty((n_references, *sides, n_out), device=device) if n_differences else None
        _launch(
            kernels.REFERENCE,
            self.filters("reference")[0],
            self,
            x=x.pair,
            low=x.pair.stride(3),
            out=found.pair,
            active=active,
            z=z,
            bias=self.scaled_bias,
            addend=None if addend is None else addend.pair,
            sides=(sides[0], sides[1]),
        )
        if n_differences:
            difference = x.difference
            if difference is None:
                difference = x.pair.new_zeros((n_differences, *x.shape))
            _launch(
                kernels.DIFFERENCE,
                self.filters("difference")[0],
                self,
                x=difference,
                out=found.difference,
                active=None if active is None else active[n_references:],
                z=z,
                addend=None if addend is None else addend.difference,
                sides=(sides[0], sides[1]),
                batch=batch,
            )
        return found, active

    def _launch_backward(
        self, gradient: Tensor, shape: tuple[int, int], addend: Tensor | None, active: Tensor | None
    ) -> Tensor:
        from igstore.engine import line_kernels as kernels

        out = torch.empty((len(gradient), *shape, self.in_channels), dtype=torch.float16, device=gradient.device)
        for filters in self.filters("backward"):
            sides = [
                -(-(size - phase) // stride)
                for size, phase, stride in zip(shape, filters.first, self.stride, strict=True)
            ]
            _launch(
                kernels.BACKWARD,
                filters,
                self,
                x=gradient,
                out=out,
                active=active,
                addend=addend,
                sides=(sides[0], sides[1]),
            )
        return out


class Tiles(NamedTuple):
    """How a launch divides its work."""

    rows: int
    columns: int
    chunk: int
    warps: int
    stages: int
    turns: int
    together: bool = False  # the points between two references


def tiles(mode: Any, rows: int, columns: int, depth: int, chunk: int) -> Tiles:
    """How a product of (rows, depth) and (depth, columns) is divided."""
    if columns <= 32:
        return Tiles(128, 32, chunk, 4, 4, 1)
    if columns <= 64:
        return Tiles(128, 64, chunk, 4, 4, 2)
    return Tiles(128, 128, chunk, 8, 3, 4)


def _launch(
    mode: Any,
    filters: Filters,
    module: LineConvolution,
    *,
    x: Tensor,
    out: Tensor,
    sides: tuple[int, int],
    active: Tensor | None = None,
    z: Tensor | None = None,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    low: int = 0,
    batch: Batch | None = None,
) -> None:
    """Launch `convolve` for outputs of `sides` (y, x)."""
    from igstore.engine import line_kernels as kernels

    backward = mode is kernels.BACKWARD
    in_channels, out_channels = module.in_channels, module.out_channels
    if backward:
        in_channels, out_channels = out_channels, in_channels
    rows = len(out) * sides[0] * sides[1]
    if rows == 0:
        return
    n_taps = filters.taps[0] * filters.taps[1]
    parts = 3 if mode is kernels.REFERENCE else 1
    shape = tiles(mode, rows, out_channels, filters.matrix.shape[1], filters.chunk)
    grid = (-(-rows // shape.rows) * -(-out_channels // shape.columns),)
    in_height, in_width = x.shape[1], x.shape[2]
    strides = (1, module.stride[0]) if backward else (module.stride[0], 1)
    padded = filters.padding != (0, 0) or any(
        (side - 1) * strides[0] + k > size
        for side, k, size in zip(sides, filters.taps, (in_height, in_width), strict=True)
    )
    some = x  # stands for what there is none of
    if shape.together and batch is not None and z is not None:
        pixels = sides[0] * sides[1]
        programs = (len(batch.begin) - 1) * -(-pixels // shape.rows) * -(-out_channels // shape.columns)
        kernels.convolve_between[(programs,)](
            x, filters.matrix, out, z, some if active is None else active, some if addend is None else addend,
            batch.begin, batch.before, batch.after, batch.between,
            out_channels, in_channels, -(-in_channels // filters.chunk), filters.matrix.shape[1],
            in_height, in_width, pixels, sides[1], *filters.padding,
            row_of(x), row_of(out), row_of(active), row_of(addend), module.forward_scale, *module.scaled_bounds,
            TAPS=n_taps, TAPS_X=filters.taps[1], IN_STRIDE=strides[0], PADDED=padded, BOUNDED=module.bounded,
            HAS_ADDEND=addend is not None, HAS_ACTIVE=active is not None,
            WHOLE_CHUNKS=in_channels % filters.chunk == 0, BM=shape.rows, BN=shape.columns, BK=shape.chunk,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
        return
    bounds = module.scaled_bounds
    kernels.convolve[grid](
        x,
        filters.matrix,
        out,
        some if z is None else z,
        some if active is None else active,
        some if bias is None else bias,
        some if addend is None else addend,
        some if batch is None else batch.before,
        some if batch is None else batch.after,
        some if batch is None else batch.between,
        rows,
        out_channels,
        in_channels,
        -(-in_channels // filters.chunk),
        filters.matrix.shape[1],
        in_height,
        in_width,
        sides[0],
        sides[1],
        out.shape[1],
        out.shape[2],
        filters.padding[0],
        filters.padding[1],
        filters.first[0],
        filters.first[1],
        row_of(x),
        low,
        row_of(out),
        out.stride(3) if out.ndim == 5 else 0,
        row_of(active),
        row_of(addend),
        addend.stride(3) if addend is not None and addend.ndim == 5 else 0,
        module.backward_scale if backward else module.forward_scale,
        bounds[0],
        bounds[1],
        MODE=mode,
        TAPS=n_taps,
        TAPS_X=max(1, filters.taps[1]),
        IN_STRIDE=strides[0],
        OUT_STRIDE=strides[1],
        PADDED=padded,
        PARTS=parts,
        BOUNDED=module.bounded,
        HAS_BIAS=bias is not None,
        HAS_ADDEND=addend is not None,
        HAS_ACTIVE=active is not None,
        HAS_Z=z is not None,
        WHOLE_CHUNKS=in_channels % filters.chunk == 0,
        BM=shape.rows,
        BN=shape.columns,
        BK=shape.chunk,
        TURNS=shape.turns,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


def fits(convolution: nn.Module) -> bool:
    """Whether `LineConvolution` computes what `convolution` does."""
    # not its subclasses, which may do more than it does
    if type(convolution) is not nn.Conv2d or convolution.weight.dtype != torch.float32:
        return False
    plain = (convolution.dilation, convolution.groups) == ((1, 1), 1) and convolution.padding_mode == "zeros"
    square = convolution.stride[0] == convolution.stride[1]
    channels = (convolution.in_channels, convolution.out_channels)
    return plain and square and not isinstance(convolution.padding, str) and min(channels) >= _LEAST_CHUNK
