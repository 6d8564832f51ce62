"""What `igstore.acceleration.lines.reference` computes, on CUDA devices, by the kernels of `kernels`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from igstore.acceleration.lines import kernels
from igstore.acceleration.lines.filters import CHUNK, LineConvolution, Matrix
from igstore.acceleration.lines.points import UNBOUNDED, Bounds, Points, Value, Window, empty_value

_BLOCK = 1024  # numbers that a program has, of kernels that know neither pixels nor channels
_TILE = 2048  # numbers that a program has, of kernels of rows of pixels and columns of channels


def interpolated(start: Tensor, difference: Tensor, image: Tensor, alpha: Tensor) -> Tensor:
    """As `reference.interpolated`."""
    found = torch.empty_strided((len(image), *start.shape[1:]), start.stride(), device=start.device)
    size = start[0].numel()
    grid = (-(-size // _BLOCK), len(image))
    kernels.interpolate[grid](start, difference, image, alpha, found, size, BLOCK=_BLOCK)
    return found


def weighted_sums(gradient: Tensor, order: Tensor, begin: Tensor, weights: Tensor) -> Tensor:
    """As `reference.weighted_sums`."""
    gradient = gradient.contiguous()
    sums = torch.empty((len(begin) - 1, *gradient.shape[1:]), device=gradient.device)
    size = sums[0].numel()
    kernels.weighted_sum[(-(-size // _BLOCK), len(sums))](gradient, order, begin, weights, sums, size, BLOCK=_BLOCK)
    return sums


def represent(values: Tensor, points: Points, scale: float) -> Value:
    """As `reference.represent`."""
    _, height, width, channels = values.shape
    found = empty_value(points, height, width, channels, values.device)
    _rows(kernels.represent, len(points), (height, width), channels, values.contiguous(), *_tensors(found),
          *_around(points), scale)  # fmt: skip
    return found


def materialise(value: Value, points: Points, scale: float) -> Tensor:
    """As `reference.materialise`."""
    height, width, channels = value.shape
    found = torch.empty((len(points), height, width, channels), device=value.pair.device)
    _rows(kernels.materialise, len(points), (height, width), channels, *_tensors(value), found, *_around(points),
          *_strides(value), scale, HAS_DIFFERENCE=value.difference is not None)  # fmt: skip
    return found


def affine(x: Value, scale: Tensor, shift: Tensor, bounds: Bounds, points: Points) -> tuple[Value, Tensor | None]:
    """As `reference.affine`."""
    height, width, channels = x.shape
    found = empty_value(points, height, width, channels, x.pair.device)
    passes = _empty_passes(bounds, points, height, width, channels, x.pair.device)
    _rows(kernels.affine, len(points), (height, width), channels, *_tensors(x), *_tensors(found), _or(passes, x.pair),
          scale, shift, *_around(points), *_strides(x), _row(passes), *bounds,
          HAS_DIFFERENCE=x.difference is not None, HAS_PASSES=passes is not None)  # fmt: skip
    return found, passes


def affine_backward(gradient: Tensor, scale: Tensor | None, addend: Tensor | None, passes: Tensor | None) -> Tensor:
    """As `reference.affine_backward`."""
    points, height, width, channels = gradient.shape
    out = torch.empty(gradient.shape, dtype=torch.float16, device=gradient.device)
    _rows(kernels.affine_backward, points, (height, width), channels, gradient, _or(scale, out), _or(addend, out),
          _or(passes, out), out, _row(gradient), _row(addend), _row(passes),
          HAS_SCALE=scale is not None, **_has(addend, passes))  # fmt: skip
    return out


def max_pool(x: Value, window: Window, bounds: Bounds, points: Points) -> tuple[Value, Tensor | None, Tensor]:
    """As `reference.max_pool`; the last is where in its window the largest value is, uint8 (point, y, x, channel)."""
    height, width, channels = x.shape
    sides = window.sides(height, width)
    found = empty_value(points, *sides, channels, x.pair.device)
    where = torch.empty((len(points), *sides, channels), dtype=torch.uint8, device=x.pair.device)
    passes = _empty_passes(bounds, points, *sides, channels, x.pair.device)
    _rows(kernels.max_pool, len(points), sides, channels, *_tensors(x), *_tensors(found), where, _or(passes, where),
          *_around(points), height, width, *_strides(x), _row(passes), *bounds,
          HAS_DIFFERENCE=x.difference is not None, HAS_PASSES=passes is not None, **_constants(window))  # fmt: skip
    return found, passes, where


def max_pool_backward(
    gradient: Tensor,
    where: Tensor,
    sides: tuple[int, int],
    window: Window,
    addend: Tensor | None,
    passes: Tensor | None,
) -> Tensor:
    """As `reference.max_pool_backward`."""
    points, out_height, out_width, channels = gradient.shape
    out = torch.empty((points, *sides, channels), dtype=torch.float16, device=gradient.device)
    _rows(kernels.max_pool_backward, points, sides, channels, gradient, where, _or(addend, out), _or(passes, out), out,
          out_height, out_width, _row(gradient), _row(addend), _row(passes),
          **_has(addend, passes), **_constants(window))  # fmt: skip
    return out


def mean_pool(x: Value, window: Window, points: Points) -> Value:
    """As `reference.mean_pool`."""
    height, width, channels = x.shape
    sides = window.sides(height, width)
    found = empty_value(points, *sides, channels, x.pair.device)
    _rows(kernels.mean_pool, points.n_references, sides, channels, x.pair, found.pair, height, width,
          *_strides(x)[:2], *_strides(found)[:2], PAIRS=True, **_constants(window))  # fmt: skip
    if x.difference is None:
        found.difference = None
    else:
        _rows(kernels.mean_pool, points.n_others, sides, channels, x.difference, found.difference, height, width,
              _row(x.difference), 0, _row(found.difference), 0, PAIRS=False, **_constants(window))  # fmt: skip
    return found


def mean_pool_backward(
    gradient: Tensor, sides: tuple[int, int], window: Window, addend: Tensor | None, passes: Tensor | None
) -> Tensor:
    """As `reference.mean_pool_backward`."""
    points, out_height, out_width, channels = gradient.shape
    out = torch.empty((points, *sides, channels), dtype=torch.float16, device=gradient.device)
    _rows(kernels.mean_pool_backward, points, sides, channels, gradient, _or(addend, out), _or(passes, out), out,
          out_height, out_width, _row(gradient), _row(addend), _row(passes),
          **_has(addend, passes), **_constants(window))  # fmt: skip
    return out


def convolve(x: Value, addend: Value | None, module: LineConvolution, points: Points) -> tuple[Value, Tensor | None]:
    """As `reference.convolve`."""
    height, width, _ = x.shape
    sides, channels, device = module.sides(height, width), module.out_channels, x.pair.device
    found = empty_value(points, *sides, channels, device)
    passes = _empty_passes(module.scaled_bounds, points, *sides, channels, device)
    before_clamp = torch.empty((points.n_references, *sides, channels), device=device)
    _convolve(
        kernels.REFERENCES, module, module.matrices("references")[0], x.pair, found.pair, sides,
        z=before_clamp, passes=passes, addend=None if addend is None else addend.pair,
    )  # fmt: skip
    if points.n_others:
        difference = x.difference
        if difference is None:
            difference = x.pair.new_zeros((points.n_others, *x.shape))
        _convolve(
            kernels.OTHERS, module, module.matrices("others")[0], difference, found.difference, sides,
            z=before_clamp, passes=None if passes is None else passes[points.n_references :],
            addend=None if addend is None else addend.difference, points=points,
        )  # fmt: skip
    return found, passes


def convolve_backward(
    gradient: Tensor, sides: tuple[int, int], module: LineConvolution, addend: Tensor | None, passes: Tensor | None
) -> Tensor:
    """As `reference.convolve_backward`."""
    out = torch.empty((len(gradient), *sides, module.in_channels), dtype=torch.float16, device=gradient.device)
    for matrix in module.matrices("backward"):
        height, width = (-(-(side - first) // module.stride) for side, first in zip(sides, matrix.first, strict=True))
        _convolve(kernels.BACKWARD, module, matrix, gradient, out, (height, width), passes=passes, addend=addend)
    return out


class _Tiles(NamedTuple):
    """How a launch divides its work: rows and columns a program, its warps, stages of loading, turns of finishing."""

    rows: int
    columns: int
    warps: int
    stages: int
    turns: int


def _tiles(mode: Any, channels: int, *, has_addend: bool) -> _Tiles:
    """What was fastest on an H100 and an H200 among twenty ways to divide each product of ResNet-50."""
    if has_addend and mode is kernels.BACKWARD:  # little to multiply and much to read: many small programs
        return _Tiles(64, 64, 4, 4, 1)
    if has_addend or channels <= 64:
        return _Tiles(128, 64, 4, 4, 2)
    return _Tiles(128, 128, 8, 4, 4)


def _convolve(
    mode: Any,
    module: LineConvolution,
    matrix: Matrix,
    x: Tensor,
    out: Tensor | None,
    sides: tuple[int, int],
    *,
    z: Tensor | None = None,
    passes: Tensor | None,
    addend: Tensor | None,
    points: Points | None = None,
) -> None:
    """Launch `kernels.convolve` for outputs of some sides (y, x), written to some or all pixels of `out`."""
    assert out is not None
    backward = mode is kernels.BACKWARD
    in_channels, out_channels = module.in_channels, module.out_channels
    if backward:
        in_channels, out_channels = out_channels, in_channels
    in_stride, out_stride = (1, module.stride) if backward else (module.stride, 1)
    in_sides = x.shape[1], x.shape[2]
    padded = matrix.padding != (0, 0) or any(
        (side - 1) * in_stride + k > size for side, k, size in zip(sides, matrix.taps, in_sides, strict=True)
    )
    bias = module.scaled_bias if mode is kernels.REFERENCES else None
    tiles = _tiles(mode, out_channels, has_addend=addend is not None)
    rows = len(out) * sides[0] * sides[1]
    programs = -(-rows // tiles.rows) * -(-out_channels // tiles.columns)
    before, after, between = (x, x, x) if points is None else (points.before, points.after, points.between)
    kernels.convolve[(programs,)](
        x, matrix.values, out, _or(z, x), _or(passes, x), _or(bias, x), _or(addend, x), before, after, between,
        rows, out_channels, in_channels, -(-in_channels // CHUNK), matrix.values.shape[1],
        *in_sides, *sides, out.shape[1], out.shape[2], *matrix.padding, *matrix.first,
        _row(x), _low(x), _row(out), _low(out), _row(passes), _row(addend), _low(addend),
        module.backward_scale if backward else module.forward_scale, *module.scaled_bounds,
        MODE=mode, TAPS=matrix.taps[0] * matrix.taps[1], TAPS_X=max(1, matrix.taps[1]),
        IN_STRIDE=in_stride, OUT_STRIDE=out_stride, PADDED=padded, PARTS=3 if mode is kernels.REFERENCES else 1,
        BOUNDED=module.bounded, HAS_BIAS=bias is not None, **_has(addend, passes),
        WHOLE_CHUNKS=in_channels % CHUNK == 0, BM=tiles.rows, BN=tiles.columns, BK=CHUNK, TURNS=tiles.turns,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _rows(
    kernel: Any, points: int, sides: tuple[int, int], channels: int, *arguments: object, **constants: object
) -> None:
    """Launch a kernel whose programs have some rows, which are pixels of points, and some channels of them.

    It takes the sides (y, x) of an image of its outputs, and how many channels and rows there are, last.
    """
    columns = min(128, max(16, 1 << (channels - 1).bit_length()))
    shape = _TILE // columns, columns
    rows = points * sides[0] * sides[1]
    if rows:
        grid = (-(-rows // shape[0]), -(-channels // columns))
        kernel[grid](*arguments, *sides, channels, rows, **constants, BR=shape[0], BC=columns)


def _around(points: Points) -> tuple[Tensor, Tensor, Tensor, int]:
    return points.before, points.after, points.between, points.n_references


def _tensors(value: Value) -> tuple[Tensor, Tensor]:
    """The tensors of a value; where it has no differences, some other instead."""
    return value.pair, _or(value.difference, value.pair)


def _strides(value: Value) -> tuple[int, int, int]:
    """Strides: from pixel to pixel of the pairs, from high to low halves, from pixel to pixel of the differences."""
    return _row(value.pair), _low(value.pair), _row(value.difference)


def _row(tensor: Tensor | None) -> int:
    """Numbers from pixel to pixel in memory, of (point, y, x, ...), pixels being dense; 0 of None."""
    if tensor is None:
        return 0
    # what the stride of a dimension of one is says nothing
    dimension = next((one for one in (2, 1, 0) if tensor.shape[one] > 1), 2)
    return tensor.stride(dimension)


def _low(tensor: Tensor | None) -> int:
    """Numbers from the high to the low halves of pairs; 0 where there are no pairs."""
    return tensor.stride(3) if tensor is not None and tensor.ndim == 5 else 0


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Some address for a kernel that does not look at it."""
    return other if tensor is None else tensor


def _has(addend: Tensor | None, passes: Tensor | None) -> dict[str, bool]:
    return {"HAS_ADDEND": addend is not None, "HAS_PASSES": passes is not None}


def _constants(window: Window) -> dict[str, int]:
    return {"WINDOW": window.size, "STRIDE": window.stride, "PADDING": window.padding}


def _empty_passes(
    bounds: Bounds, points: Points, height: int, width: int, channels: int, device: torch.device
) -> Tensor | None:
    """Room for where gradients pass a clamp, as `points.packed` has it, if there is one."""
    if bounds == UNBOUNDED:
        return None
    return torch.empty((len(points), height, width, -(-channels // 8)), dtype=torch.uint8, device=device)
