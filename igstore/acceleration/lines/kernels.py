"""Triton kernels for points of lines; `igstore.acceleration.lines.reference` says in torch what each computes.

Tensors are (point, y, x, channel), dense but for the last dimension, of which they may be a part: ``row`` is how many
numbers apart two pixels are. Offsets are 32-bit: no tensor may have 2**31 numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a launch of `convolve` computes.
REFERENCES = tl.constexpr(0)  # outputs of references, as exact as float32: three products of pairs of float16
OTHERS = tl.constexpr(1)  # outputs of the other points, from those of references and one product of differences
BACKWARD = tl.constexpr(2)  # gradients at inputs


@triton.jit
def _clamp(values, low, high, BOUNDED: tl.constexpr):
    if BOUNDED:
        values = tl.minimum(tl.maximum(values, low), high)
    return values


@triton.jit
def _packed(passes):
    """(rows, columns) of truths as bytes (rows, columns / 8), the first column being the lowest bit."""
    ROWS: tl.constexpr = passes.shape[0]
    COLUMNS: tl.constexpr = passes.shape[1]
    bits = tl.reshape(passes.to(tl.int32), (ROWS, COLUMNS // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def _unpacked(packed):
    """The reverse of `_packed`."""
    ROWS: tl.constexpr = packed.shape[0]
    BYTES: tl.constexpr = packed.shape[1]
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, BYTES * 8)) != 0


@triton.jit
def _store_passes(out, pixel, passes_row, passes, n0, N, inside):
    """Write where gradients pass, of some pixels and of channels from n0 on."""
    COLUMNS: tl.constexpr = passes.shape[1]
    byte = n0 // 8 + tl.arange(0, COLUMNS // 8)
    at = out + (pixel * passes_row)[:, None] + byte[None, :]
    tl.store(at, _packed(passes), mask=inside[:, None] & (byte * 8 < N)[None, :])


@triton.jit
def _load_passes(passes, pixel, passes_row, n0, N, inside, COLUMNS: tl.constexpr):
    byte = n0 // 8 + tl.arange(0, COLUMNS // 8)
    at = passes + (pixel * passes_row)[:, None] + byte[None, :]
    return _unpacked(tl.load(at, mask=inside[:, None] & (byte * 8 < N)[None, :], other=0))


# What changes from layer to layer without changing how addresses align.
_SIZES = "M chunks in_height in_width height width out_height out_width pad_y pad_x first_y first_x passes_row".split()


@triton.jit
def _halves(values):
    """The two halves of the columns of (rows, columns)."""
    ROWS: tl.constexpr = values.shape[0]
    COLUMNS: tl.constexpr = values.shape[1]
    return tl.split(tl.permute(tl.reshape(values, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _products(
    x_at, weight_at, iy0, ix0, inside, C, chunks, in_height, in_width, x_row, x_low,
    TAPS: tl.constexpr, TAPS_X: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr, WHOLE_CHUNKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sums of products of rows of pixels, which begin at (iy0, ix0) of the images at `x_at`, and rows of weights."""
    k = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for step in range(TAPS * PARTS * chunks):
        chunk = step % chunks
        rest = step // chunks
        tap = rest // PARTS
        c = chunk * BK + k
        iy = iy0 + tap // TAPS_X
        ix = ix0 + tap % TAPS_X
        ok = inside
        if PADDED:
            ok = ok & (iy >= 0) & (iy < in_height) & (ix >= 0) & (ix < in_width)
        at = x_at + (iy * in_width + ix) * x_row
        if PARTS == 3:
            at += tl.where(rest % 3 == 1, x_low, 0)
        if WHOLE_CHUNKS:
            a = tl.load(at[:, None] + c[None, :], mask=ok[:, None], other=0.0)
        else:
            a = tl.load(at[:, None] + c[None, :], mask=ok[:, None] & (c < C)[None, :], other=0.0)
        b = tl.load(weight_at[None, :] + (step * BK + k)[:, None])
        sums = tl.dot(a, b, sums)
    return sums


@triton.jit
def _finish(
    sums, n0, N, inside, out_pixel, ref_first, ref_last, t, out, z, passes, bias, addend,
    out_row, out_low, passes_row, addend_row, addend_low, low, high,
    MODE: tl.constexpr, BOUNDED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDEND: tl.constexpr,
    HAS_PASSES: tl.constexpr,
):  # fmt: skip
    """What becomes of some columns, from n0 on, of sums of products; they are written to memory."""
    COLUMNS: tl.constexpr = sums.shape[1]
    n = n0 + tl.arange(0, COLUMNS)
    keep = inside[:, None] & (n < N)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    if HAS_ADDEND:
        addend_at = addend + (out_pixel * addend_row)[:, None] + n[None, :]
        sums += tl.load(addend_at, mask=keep, other=0.0).to(tl.float32)
        if MODE == REFERENCES:
            sums += tl.load(addend_at + addend_low, mask=keep, other=0.0).to(tl.float32)
    out_at = out + (out_pixel * out_row)[:, None] + n[None, :]
    if MODE == BACKWARD:
        if HAS_PASSES:
            sums = tl.where(_load_passes(passes, out_pixel, passes_row, n0, N, inside, COLUMNS), sums, 0.0)
        tl.store(out_at, sums.to(tl.float16), mask=keep)
    elif MODE == REFERENCES:
        tl.store(z + (out_pixel * N)[:, None] + n[None, :], sums, mask=keep)
        if HAS_PASSES:
            _store_passes(passes, out_pixel, passes_row, (sums > low) & (sums < high), n0, N, inside)
        sums = _clamp(sums, low, high, BOUNDED)
        halves = sums.to(tl.float16)
        tl.store(out_at, halves, mask=keep)
        tl.store(out_at + out_low, (sums - halves.to(tl.float32)).to(tl.float16), mask=keep)
    else:
        z_first = tl.load(z + (ref_first * N)[:, None] + n[None, :], mask=keep, other=0.0)
        z_last = tl.load(z + (ref_last * N)[:, None] + n[None, :], mask=keep, other=0.0)
        line = z_first + t[:, None] * (z_last - z_first)
        sums += line
        if HAS_PASSES:
            _store_passes(passes, out_pixel, passes_row, (sums > low) & (sums < high), n0, N, inside)
        if BOUNDED:
            z_first = _clamp(z_first, low, high, True)
            z_last = _clamp(z_last, low, high, True)
            line = z_first + t[:, None] * (z_last - z_first)
        tl.store(out_at, (_clamp(sums, low, high, BOUNDED) - line).to(tl.float16), mask=keep)


@triton.jit(do_not_specialize=_SIZES)
def convolve(
    x,
    weight,
    out,
    z,  # pre-activation outputs of references, float32, dense: written by REFERENCES, read by OTHERS
    passes,  # bits, as out: where gradients pass; written forwards, read backwards
    bias,
    addend,
    before,  # of a difference, the references that it lies between, and where
    after,
    between,
    M,  # outputs: points times pixels
    N,  # output channels
    C,  # input channels
    chunks,  # of BK input channels
    KT,  # numbers in a row of weights
    in_height,
    in_width,
    height,  # of the outputs computed here
    width,
    out_height,  # of the outputs in memory
    out_width,
    pad_y,
    pad_x,
    first_y,
    first_x,
    x_row,
    x_low,  # distance of the low halves from the high ones
    out_row,
    out_low,
    passes_row,
    addend_row,
    addend_low,
    scale,  # of the sums
    low,
    high,
    MODE: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_X: tl.constexpr,
    IN_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,  # 3 of pairs, 1 of single halves
    BOUNDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_PASSES: tl.constexpr,
    WHOLE_CHUNKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TURNS: tl.constexpr,  # 1, 2 or 4: in how many turns outputs are finished, for want of registers
):
    """Outputs of a convolution as a product of a matrix of pixels and one of weights."""
    columns = tl.cdiv(N, BN)
    program = tl.program_id(0)
    m = (program // columns) * BM + tl.arange(0, BM)
    n0 = (program % columns) * BN
    inside = m < M
    pixels = height * width
    point = m // pixels
    pixel = m % pixels
    oy = pixel // width
    ox = pixel % width
    sums = scale * _products(
        x + point * in_height * in_width * x_row, weight + (n0 + tl.arange(0, BN)) * KT,
        oy * IN_STRIDE - pad_y, ox * IN_STRIDE - pad_x, inside, C, chunks, in_height, in_width, x_row, x_low,
        TAPS, TAPS_X, PADDED, PARTS, WHOLE_CHUNKS, BM, BN, BK,
    )  # fmt: skip
    # where the outputs are in memory
    out_pixel = (point * out_height + oy * OUT_STRIDE + first_y) * out_width + ox * OUT_STRIDE + first_x
    ref_first = out_pixel
    ref_last = out_pixel
    t = tl.zeros((BM,), tl.float32)
    if MODE == OTHERS:
        t = tl.load(between + point, mask=inside, other=0.0)
        ref_first = tl.load(before + point, mask=inside, other=0) * pixels + pixel
        ref_last = tl.load(after + point, mask=inside, other=0) * pixels + pixel
    if TURNS == 1:
        _finish(
            sums, n0, N, inside, out_pixel, ref_first, ref_last, t, out, z, passes, bias, addend,
            out_row, out_low, passes_row, addend_row, addend_low, low, high,
            MODE, BOUNDED, HAS_BIAS, HAS_ADDEND, HAS_PASSES,
        )  # fmt: skip
    else:
        halves = _halves(sums)
        for half in tl.static_range(0, 2):
            if TURNS == 2:
                _finish(
                    halves[half], n0 + half * (BN // 2), N, inside, out_pixel, ref_first, ref_last, t,
                    out, z, passes, bias, addend, out_row, out_low, passes_row, addend_row, addend_low, low, high,
                    MODE, BOUNDED, HAS_BIAS, HAS_ADDEND, HAS_PASSES,
                )  # fmt: skip
            else:
                quarters = _halves(halves[half])
                for quarter in tl.static_range(0, 2):
                    _finish(
                        quarters[quarter], n0 + (2 * half + quarter) * (BN // 4), N, inside, out_pixel, ref_first,
                        ref_last, t, out, z, passes, bias, addend, out_row, out_low, passes_row, addend_row,
                        addend_low, low, high, MODE, BOUNDED, HAS_BIAS, HAS_ADDEND, HAS_PASSES,
                    )  # fmt: skip


# --- Kernels whose programs have some rows, the pixels of points, and some channels of them. The last arguments are
# the sides of an image of rows, and how many channels and rows there are.

_ROWS = "n_references height width rows in_height in_width passes_row".split()


@triton.jit
def _rows_and_channels(rows, C, BR: tl.constexpr, BC: tl.constexpr):
    """A program's rows; its first channel, and all of them; and which rows, and which of both, are there."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    n0 = tl.program_id(1) * BC
    c = n0 + tl.arange(0, BC)
    inside = row < rows
    return row, n0, c, inside, inside[:, None] & (c < C)[None, :]


@triton.jit
def _around(before, after, between, point, n_references, inside):
    """Of points: whether they are references, their places among the others, and the references around them.

    A reference has itself on both sides.
    """
    is_reference = point < n_references
    place = tl.where(is_reference, 0, point - n_references)
    others = inside & (point >= n_references)
    first = tl.where(is_reference, point, tl.load(before + place, mask=others, other=0))
    last = tl.where(is_reference, point, tl.load(after + place, mask=others, other=0))
    return is_reference, place, first, last, tl.load(between + place, mask=others, other=0.0)


@triton.jit
def _load_pair(pair, pixel, pair_row, pair_low, c, ok):
    """Float32 (row, channel) of pairs at a pixel of each row."""
    at = pair + (pixel * pair_row)[:, None] + c[None, :]
    high = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    return high + tl.load(at + pair_low, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _store_value(values, line, pair, difference, row, pixel_of_other, is_reference, c, C, ok):
    """Write values (row, channel): references as pairs, others as differences from the line between references."""
    halves = values.to(tl.float16)
    at = pair + (row * 2 * C)[:, None] + c[None, :]
    references = ok & is_reference[:, None]
    tl.store(at, halves, mask=references)
    tl.store(at + C, (values - halves.to(tl.float32)).to(tl.float16), mask=references)
    at = difference + (pixel_of_other * C)[:, None] + c[None, :]
    tl.store(at, (values - line).to(tl.float16), mask=ok & (is_reference == 0)[:, None])


@triton.jit
def _finish_gradient(
    values, addend, passes, out, addend_row, passes_row, row, n0, c, C, inside, ok,
    HAS_ADDEND: tl.constexpr, HAS_PASSES: tl.constexpr,
):  # fmt: skip
    """Write gradients (row, channel), with the addend, where they pass."""
    COLUMNS: tl.constexpr = values.shape[1]
    if HAS_ADDEND:
        values += tl.load(addend + (row * addend_row)[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32)
    if HAS_PASSES:
        values = tl.where(_load_passes(passes, row, passes_row, n0, C, inside, COLUMNS), values, 0.0)
    tl.store(out + (row * C)[:, None] + c[None, :], values.to(tl.float16), mask=ok)


@triton.jit(do_not_specialize=_ROWS)
def represent(
    x, pair, difference, before, after, between, n_references, scale, height, width, C, rows,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Float32 values, dense, times a scale as pairs and differences."""
    row, _, c, inside, ok = _rows_and_channels(rows, C, BR, BC)
    pixels = height * width
    pixel = row % pixels
    is_reference, place, first, last, t = _around(before, after, between, row // pixels, n_references, inside)
    values = tl.load(x + (row * C)[:, None] + c[None, :], mask=ok, other=0.0) * scale
    others = ok & (is_reference == 0)[:, None]
    first_value = tl.load(x + ((first * pixels + pixel) * C)[:, None] + c[None, :], mask=others, other=0.0) * scale
    last_value = tl.load(x + ((last * pixels + pixel) * C)[:, None] + c[None, :], mask=others, other=0.0) * scale
    line = first_value + t[:, None] * (last_value - first_value)
    _store_value(values, line, pair, difference, row, place * pixels + pixel, is_reference, c, C, ok)


@triton.jit(do_not_specialize=_ROWS)
def materialise(
    pair, difference, out, before, after, between, n_references, pair_row, pair_low, difference_row, scale,
    height, width, C, rows,
    HAS_DIFFERENCE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Pairs and differences times a scale as float32 values."""
    row, _, c, inside, ok = _rows_and_channels(rows, C, BR, BC)
    pixels = height * width
    pixel = row % pixels
    is_reference, place, first, last, t = _around(before, after, between, row // pixels, n_references, inside)
    first_value = _load_pair(pair, first * pixels + pixel, pair_row, pair_low, c, ok)
    last_value = _load_pair(pair, last * pixels + pixel, pair_row, pair_low, c, ok)
    values = first_value + t[:, None] * (last_value - first_value)
    if HAS_DIFFERENCE:
        at = difference + ((place * pixels + pixel) * difference_row)[:, None] + c[None, :]
        values += tl.load(at, mask=ok & (is_reference == 0)[:, None], other=0.0).to(tl.float32)
    tl.store(out + (row * C)[:, None] + c[None, :], values * scale, mask=ok)


@triton.jit(do_not_specialize=_ROWS)
def affine(
    pair, difference, out_pair, out_difference, passes, channel_scale, channel_shift,
    before, after, between, n_references, pair_row, pair_low, difference_row, passes_row, low, high,
    height, width, C, rows,
    HAS_DIFFERENCE: tl.constexpr, HAS_PASSES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``clamp(scale x + shift)`` of values, and where gradients pass."""
    row, n0, c, inside, ok = _rows_and_channels(rows, C, BR, BC)
    pixels = height * width
    pixel = row % pixels
    is_reference, place, first, last, t = _around(before, after, between, row // pixels, n_references, inside)
    scale = tl.load(channel_scale + c, mask=c < C, other=0.0)[None, :]
    shift = tl.load(channel_shift + c, mask=c < C, other=0.0)[None, :]
    first_value = scale * _load_pair(pair, first * pixels + pixel, pair_row, pair_low, c, ok) + shift
    last_value = scale * _load_pair(pair, last * pixels + pixel, pair_row, pair_low, c, ok) + shift
    values = first_value + t[:, None] * (last_value - first_value)
    if HAS_DIFFERENCE:
        at = difference + ((place * pixels + pixel) * difference_row)[:, None] + c[None, :]
        values += scale * tl.load(at, mask=ok & (is_reference == 0)[:, None], other=0.0).to(tl.float32)
    if HAS_PASSES:
        _store_passes(passes, row, passes_row, (values > low) & (values < high), n0, C, inside)
    first_value = _clamp(first_value, low, high, HAS_PASSES)
    last_value = _clamp(last_value, low, high, HAS_PASSES)
    values = _clamp(values, low, high, HAS_PASSES)
    line = first_value + t[:, None] * (last_value - first_value)
    _store_value(values, line, out_pair, out_difference, row, place * pixels + pixel, is_reference, c, C, ok)


@triton.jit(do_not_specialize=_ROWS)
def affine_backward(
    gradient, channel_scale, addend, passes, out, gradient_row, addend_row, passes_row, height, width, C, rows,
    HAS_SCALE: tl.constexpr, HAS_ADDEND: tl.constexpr, HAS_PASSES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients times the scale of their channel."""
    row, n0, c, inside, ok = _rows_and_channels(rows, C, BR, BC)
    values = tl.load(gradient + (row * gradient_row)[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32)
    if HAS_SCALE:
        values *= tl.load(channel_scale + c, mask=c < C, other=0.0)[None, :]
    _finish_gradient(
        values, addend, passes, out, addend_row, passes_row, row, n0, c, C, inside, ok, HAS_ADDEND, HAS_PASSES
    )


@triton.jit(do_not_specialize=_ROWS)
def max_pool(
    pair, difference, out_pair, out_difference, where, passes, before, after, between, n_references,
    in_height, in_width, pair_row, pair_low, difference_row, passes_row, low, high, height, width, C, rows,
    HAS_DIFFERENCE: tl.constexpr, HAS_PASSES: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The largest value of each window, clamped, and where in the window it is first, row by row."""
    row, n0, c, inside, ok = _rows_and_channels(rows, C, BR, BC)
    out_pixels = height * width
    out_pixel = row % out_pixels
    is_reference, place, first, last, t = _around(before, after, between, row // out_pixels, n_references, inside)
    y0 = (out_pixel // width) * STRIDE - PADDING
    x0 = (out_pixel % width) * STRIDE - PADDING
    pixels = in_height * in_width
    largest = tl.full((BR, BC), float("-inf"), tl.float32)
    largest_first = largest
    largest_last = largest
    found = tl.zeros((BR, BC), tl.int32)
    for tap in range(WINDOW * WINDOW):
        y = y0 + tap // WINDOW
        x = x0 + tap % WINDOW
        there = ok & ((y >= 0) & (y < in_height) & (x >= 0) & (x < in_width))[:, None]
        pixel = y * in_width + x
        first_value = _load_pair(pair, first * pixels + pixel, pair_row, pair_low, c, there)
        last_value = _load_pair(pair, last * pixels + pixel, pair_row, pair_low, c, there)
        values = first_value + t[:, None] * (last_value - first_value)
        if HAS_DIFFERENCE:
            at = difference + ((place * pixels + pixel) * difference_row)[:, None] + c[None, :]
            values += tl.load(at, mask=there & (is_reference == 0)[:, None], other=0.0).to(tl.float32)
        larger = there & (values > largest)
        largest = tl.where(larger, values, largest)
        found = tl.where(larger, tap, found)
        largest_first = tl.where(there & (first_value > largest_first), first_value, largest_first)
        largest_last = tl.where(there & (last_value > largest_last), last_value, largest_last)
    tl.store(where + (row * C)[:, None] + c[None, :], found.to(tl.uint8), mask=ok)
    if HAS_PASSES:
        _store_passes(passes, row, passes_row, (largest > low) & (largest < high), n0, C, inside)
    largest_first = _clamp(largest_first, low, high, HAS_PASSES)
    largest_last = _clamp(largest_last, low, high, HAS_PASSES)
    values = _clamp(largest, low, high, HAS_PASSES)
    line = largest_first + t[:, None] * (largest_last - largest_first)
    _store_value(values, line, out_pair, out_difference, row, place * out_pixels + out_pixel, is_reference, c, C, ok)


@triton.jit(do_not_specialize=_ROWS)
def max_pool_backward(
    gradient, where, addend, passes, out, in_height, in_width, gradient_row, addend_row, passes_row,
    height, width, C, rows,
    HAS_ADDEND: tl.constexpr, HAS_PASSES: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of windows, of which there are in_height times in_width, at the pixels that were largest in them."""
    row, n0, c, inside, ok = _rows_and_channels(rows, C, BR, BC)
    pixel = row % (height * width)
    point = row // (height * width)
    y = pixel // width + PADDING
    x = pixel % width + PADDING
    values = tl.zeros((BR, BC), tl.float32)
    EACH: tl.constexpr = (WINDOW + STRIDE - 1) // STRIDE  # windows along an axis that may hold a pixel
    for which in tl.static_range(0, EACH * EACH):
        window_y = y // STRIDE - which // EACH
        window_x = x // STRIDE - which % EACH
        tap_y = y - window_y * STRIDE
        tap_x = x - window_x * STRIDE
        there = (window_y >= 0) & (window_y < in_height) & (window_x >= 0) & (window_x < in_width)
        there = ok & (there & (tap_y < WINDOW) & (tap_x < WINDOW))[:, None]
        source = (point * in_height + window_y) * in_width + window_x
        found = tl.load(where + (source * C)[:, None] + c[None, :], mask=there, other=255).to(tl.int32)
        there = there & (found == (tap_y * WINDOW + tap_x)[:, None])
        values += tl.load(gradient + (source * gradient_row)[:, None] + c[None, :], mask=there, other=0.0).to(
            tl.float32
        )
    _finish_gradient(
        values, addend, passes, out, addend_row, passes_row, row, n0, c, C, inside, ok, HAS_ADDEND, HAS_PASSES
    )


@triton.jit(do_not_specialize=_ROWS)
def mean_pool(
    x, out, in_height, in_width, x_row, x_low, out_row, out_low, height, width, C, rows,
    PAIRS: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The mean of each window, zeros beyond the image counting, of pairs or of single halves."""
    row, _, c, _, ok = _rows_and_channels(rows, C, BR, BC)
    out_pixel = row % (height * width)
    point = row // (height * width)
    y0 = (out_pixel // width) * STRIDE - PADDING
    x0 = (out_pixel % width) * STRIDE - PADDING
    values = tl.zeros((BR, BC), tl.float32)
    for tap in range(WINDOW * WINDOW):
        pixel_y = y0 + tap // WINDOW
        pixel_x = x0 + tap % WINDOW
        there = (pixel_y >= 0) & (pixel_y < in_height) & (pixel_x >= 0) & (pixel_x < in_width)
        at = x + (((point * in_height + pixel_y) * in_width + pixel_x) * x_row)[:, None] + c[None, :]
        values += tl.load(at, mask=ok & there[:, None], other=0.0).to(tl.float32)
        if PAIRS:
            values += tl.load(at + x_low, mask=ok & there[:, None], other=0.0).to(tl.float32)
    values *= 1.0 / (WINDOW * WINDOW)
    halves = values.to(tl.float16)
    at = out + (row * out_row)[:, None] + c[None, :]
    tl.store(at, halves, mask=ok)
    if PAIRS:
        tl.store(at + out_low, (values - halves.to(tl.float32)).to(tl.float16), mask=ok)


@triton.jit(do_not_specialize=_ROWS)
def mean_pool_backward(
    gradient, addend, passes, out, in_height, in_width, gradient_row, addend_row, passes_row, height, width, C, rows,
    HAS_ADDEND: tl.constexpr, HAS_PASSES: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of windows, of which there are in_height times in_width, shared among their pixels."""
    row, n0, c, inside, ok = _rows_and_channels(rows, C, BR, BC)
    pixel = row % (height * width)
    point = row // (height * width)
    y = pixel // width + PADDING
    x = pixel % width + PADDING
    values = tl.zeros((BR, BC), tl.float32)
    EACH: tl.constexpr = (WINDOW + STRIDE - 1) // STRIDE  # windows along an axis that may hold a pixel
    for which in range(EACH * EACH):
        window_y = y // STRIDE - which // EACH
        window_x = x // STRIDE - which % EACH
        there = (window_y >= 0) & (window_y < in_height) & (window_x >= 0) & (window_x < in_width)
        there = there & (y - window_y * STRIDE < WINDOW) & (x - window_x * STRIDE < WINDOW)
        source = (point * in_height + window_y) * in_width + window_x
        at = gradient + (source * gradient_row)[:, None] + c[None, :]
        values += tl.load(at, mask=ok & there[:, None], other=0.0).to(tl.float32)
    values *= 1.0 / (WINDOW * WINDOW)
    _finish_gradient(
        values, addend, passes, out, addend_row, passes_row, row, n0, c, C, inside, ok, HAS_ADDEND, HAS_PASSES
    )


# --- Kernels that know neither pixels nor channels


@triton.jit
def interpolate(start, difference, image, alpha, out, size, BLOCK: tl.constexpr):
    """``start[image] + alpha difference[image]`` of each point, float32."""
    point = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    source = tl.load(image + point).to(tl.int64) * size + at
    first = tl.load(start + source, mask=inside, other=0.0)
    step = tl.load(difference + source, mask=inside, other=0.0)
    tl.store(out + point.to(tl.int64) * size + at, first + tl.load(alpha + point) * step, mask=inside)


@triton.jit
def weighted_sum(gradient, order, begin, weights, sums, size, BLOCK: tl.constexpr):
    """``sums[image] = sum of weights[j] gradient[order[j]]``, j from begin[image] up to begin[image + 1]."""
    image = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(tl.load(begin + image), tl.load(begin + image + 1)):
        values = tl.load(gradient + tl.load(order + j).to(tl.int64) * size + at, mask=inside, other=0.0)
        total += tl.load(weights + j) * values.to(tl.float32)
    tl.store(sums + image.to(tl.int64) * size + at, total, mask=inside)
