"""What a block is: its geometry, its score, its rank among an image's blocks, and the share of the blocks before it.

Functions over a leading image dimension. `block_sums`, `block_ranks` and `block_shares` say in NumPy what is meant, for
any maps, one image at a time, so that memory does not grow with the number of images. `rank_blocks` gives the same
ranks and shares of stored maps sooner.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from igstore.errors import UserError
from igstore.machine import kernels_allowed
from igstore.schema import Score, check_choice, whole_number

try:
    from igstore.masks import _ranking
except ImportError:  # not compiled: NumPy ranks the same, in three times the time
    _ranking = None  # type: ignore[assignment,unused-ignore]

DEFAULT_BLOCK = 3
MOST_BLOCK = 10**9 - 1  # pixels: more than any image has

_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))

ScoreFunction = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def positive(attribution: NDArray[np.float64]) -> NDArray[np.float64]:
    """What speaks for the target: max(a, 0)."""
    return np.maximum(attribution, 0.0)


def absolute(attribution: NDArray[np.float64]) -> NDArray[np.float64]:
    """What matters either way: abs(a)."""
    return np.abs(attribution)


def signed(attribution: NDArray[np.float64]) -> NDArray[np.float64]:
    """The attribution as it is: what speaks against the target cancels what speaks for it."""
    return attribution


# The score of one pixel, from its attribution; a block's score is the sum over its pixels. A new score is a function
# here, elementwise and finite for finite input.
SCORES: dict[str, ScoreFunction] = {"positive": positive, "absolute": absolute, "signed": signed}


def check_block(block: object) -> int:
    """`block` as an int; raise `UserError` unless it is a whole number of pixels that a name of a ranking may have."""
    return whole_number("block", block, 1, MOST_BLOCK)


def ranking_name(score: str, block: int) -> str:
    """The name of a ranking: ``positive-3``.

    Raises
    ------
    UserError
        Unknown score, or a block below 1 pixel.
    """
    check_choice("score", score, Score)
    return f"{score}-{check_block(block)}"


def ranking_parts(name: str) -> tuple[str, int] | None:
    """Score and block of a ranking, from the name that `ranking_name` gave it; None where it is not such a name."""
    score, _, block = name.rpartition("-")
    is_name = score in get_args(Score) and re.fullmatch("[1-9][0-9]{0,8}", block)
    return (score, int(block)) if is_name else None


def block_grid(height: int, width: int, block: int = DEFAULT_BLOCK) -> tuple[int, int]:
    """(n_y, n_x): how many blocks cover `height` by `width` pixels; the last ones may be cut by the image's edge.

    >>> block_grid(224, 299)
    (75, 100)
    """
    block = check_block(block)
    return -(-height // block), -(-width // block)


def rank_dtype(n_blocks: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The dtype of ranks among `n_blocks`: uint16, or uint32 above 65,535 blocks."""
    return np.dtype(np.uint16 if n_blocks <= 65_535 else np.uint32)


def block_sums(maps: ArrayLike, block: int = DEFAULT_BLOCK, score: str = "positive") -> NDArray[np.float64]:
    """The score of every block: the sum of its pixels' scores.

    The sums of float16 maps are exact, so the order of addition does not matter and anyone can recompute them: float16
    values are multiples of 2**-24, and float64 adds those without rounding up to 2**29. (A stored map stays below 2 in
    absolute value, so a block may have 2**28 pixels.)

    Parameters
    ----------
    maps
        Attributions (image, y, x), or (image, channel, y, x): channels are summed first, then the score is taken,
        so that a map kept with its channels scores as its sum over channels does.
    block
        Side of a block in pixels; it may exceed the image.
    score
        A name in `SCORES`.

    Returns
    -------
    float64 (image, block_y, block_x). A block with a NaN or infinite pixel has the score NaN.

    Raises
    ------
    UserError
        Not floating-point maps of three or four dimensions, or a score or block that is not allowed.
    """
    maps = np.asarray(maps)
    if maps.ndim not in (3, 4) or not np.issubdtype(maps.dtype, np.floating):
        raise UserError(
            f"maps are {maps.dtype} of shape {maps.shape}; they must be floating-point, "
            "(image, y, x) or (image, channel, y, x)"
        )
    check_choice("score", score, SCORES)
    n_y, n_x = block_grid(maps.shape[-2], maps.shape[-1], block)
    sums = np.empty((len(maps), n_y, n_x))  # (image, block_y, block_x)
    for image, image_sums in zip(maps, sums, strict=True):
        rows = _sum_runs(_pixel_scores(image, SCORES[score]), block, axis=0)  # (block_y, x)
        image_sums[...] = _sum_runs(rows, block, axis=1)
    return sums


def _pixel_scores(image: NDArray[np.floating[Any]], score: ScoreFunction) -> NDArray[np.float64]:
    """The scores (y, x) of the pixels of one map (y, x) or (channel, y, x); NaN where the map is not finite."""
    if image.ndim == 2 and image.dtype == np.float16:
        # one look-up does conversion, score and check, in less time than the conversion takes alone
        return np.take(_score_table(score), image.view(np.uint16), mode="wrap")
    values = image.astype(np.float64)
    if values.ndim == 3:
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, and reported as such
            values = values.sum(axis=0)
    return _finite_scores(values, score)


@cache
def _score_table(score: ScoreFunction) -> NDArray[np.float64]:
    """The score of every float16 value, indexed by its bits."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    return _finite_scores(values, score)


def _finite_scores(values: NDArray[np.float64], score: ScoreFunction) -> NDArray[np.float64]:
    # what is not finite is kept from the score, which could hide it: the positive part of -inf is 0
    finite = np.isfinite(values)
    return np.where(finite, score(np.where(finite, values, 0.0)), np.nan)


def _sum_runs(values: NDArray[np.float64], length: int, axis: int) -> NDArray[np.float64]:
    """Sums over runs of `length` along an axis; the last run is as long as the axis lasts."""
    rows = np.moveaxis(values, axis, 0)
    sums = np.moveaxis(rows[::length], 0, axis).copy()
    sum_rows = np.moveaxis(sums, axis, 0)
    for offset in range(1, min(length, len(rows))):
        some = rows[offset::length]
        sum_rows[: len(some)] += some
    return sums


def block_ranks(scores: ArrayLike) -> NDArray[np.unsignedinteger[Any]]:
    """The rank of every block among its image's: 0 for the highest score, ties in order of block index (row-major).

    The order is that of a stable ``argsort(-scores)``, where -0.0 equals 0.0.

    Parameters
    ----------
    scores
        (image, block_y, block_x), finite.

    Returns
    -------
    uint16 (uint32 above 65,535 blocks) (image, block_y, block_x): for each image a permutation.

    Raises
    ------
    UserError
        A score is NaN or infinite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    finite = np.isfinite(scores).all(axis=(1, 2))
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise UserError(
            f"{len(bad)} of {len(scores)} maps have NaN or infinite scores (the first at position {bad[0]}): "
            "such blocks have no rank; build these images again"
        )
    n_blocks = scores.shape[1] * scores.shape[2]
    ranks = np.empty((len(scores), n_blocks), rank_dtype(n_blocks))
    places = np.arange(n_blocks, dtype=ranks.dtype)
    for image, image_ranks in zip(scores, ranks, strict=True):
        image_ranks[_best_first(image.ravel())] = places
    return ranks.reshape(scores.shape)


def _best_first(scores: NDArray[np.float64]) -> NDArray[np.intp]:
    """The indices of `scores` from the highest to the lowest, equal ones in their own order.

    A radix sort over the four 16-bit digits of the scores' bits: what ``argsort(-scores, kind="stable")`` gives, in a
    quarter of its time.
    """
    bits = (0.0 - scores).astype("<f8").view("<i8")  # highest first; 0.0 - x is never -0.0
    # Floats of one sign are ordered as their bits. Flip the sign of the positive ones and every bit of the negative
    # ones, and all are ordered as unsigned integers.
    bits ^= (bits >> 63) | np.iinfo(np.int64).min
    return np.lexsort(bits.view("<u2").reshape(-1, 4).T)  # the last key, the highest digit, weighs most


def block_shares(scores: ArrayLike, ranks: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.float32]:
    """The share of its image's total score that is held by the blocks ranked before each block.

    Negative scores count as zero. A block with a positive score has a share below 1, a block with none has exactly 1,
    and so has every block of an image whose total is 0: ``share < 1`` says "has a positive score". Shares never
    decrease with rank.

    Parameters
    ----------
    scores
        (image, block_y, block_x), finite.
    ranks
        What `block_ranks` makes of these scores.

    Returns
    -------
    float32 (image, block_y, block_x) in [0, 1], rounded from float64.
    """
    scores = np.asarray(scores, dtype=np.float64)
    shares = np.empty(scores.shape, np.float32)
    for image, image_ranks, image_shares in zip(scores, ranks, shares, strict=True):
        place = image_ranks.astype(np.intp)
        ranked = np.empty(image.size)
        ranked[place] = image
        n_positive = np.count_nonzero(ranked > 0)  # they come first
        before = np.concatenate(([0.0], ranked[:n_positive])).cumsum()  # the last entry is the total
        ranked_shares = np.ones(image.size, np.float32)
        ranked_shares[:n_positive] = np.minimum((before[:-1] / before[-1]).astype(np.float32), _BELOW_ONE)
        image_shares[...] = ranked_shares[place]
    return shares


# A float16 is a multiple of 2**-24; one below 2 in absolute value times 2**24 is below 2**25.
_FRACTION_BITS = 24


def rank_blocks(
    maps: ArrayLike, block: int = DEFAULT_BLOCK, score: str = "positive"
) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.float32]]:
    """`block_ranks` and `block_shares` of the `block_sums` of maps: the same bits, sooner for stored maps.

    Scores of float16 maps are multiples of 2**-24, so those of stored maps, which stay below 2, are added as integers:
    32 bits hold the sum of 63 pixels, each below 2**25, and are sooner sorted by their digits than float64 is.
    Running totals are 64-bit integers, exact in float64 too below 2**53, which 2**22 blocks cannot reach; and a
    quotient is the same whether or not both of its terms are multiplied by 2**24. Everything else (maps of another
    dtype, with channels or with values of 2 and more, larger blocks or images, a score that makes other fractions)
    goes the plain way.

    It is a compiled kernel that does so, without Python's lock; where that is missing, all goes the plain way.

    Parameters
    ----------
    maps, block, score
        As `block_sums` takes them.

    Returns
    -------
    ranks, shares
        uint16 (or uint32) and float32, both (image, block_y, block_x).

    Raises
    ------
    UserError
        As `block_sums` and `block_ranks`.
    """
    maps = np.asarray(maps)
    check_choice("score", score, SCORES)
    table = _fixed_point_table(SCORES[score])
    has_kernel = _ranking is not None and kernels_allowed()
    if has_kernel and table is not None and _fits_fixed_point(maps, check_block(block)):
        ranked = _rank_in_fixed_point(maps, block, table)
        if ranked is not None:
            return ranked
    plain = block_sums(maps, block, score)
    ranks = block_ranks(plain)
    return ranks, block_shares(plain, ranks)


def _fits_fixed_point(maps: NDArray[Any], block: int) -> bool:
    """Whether sums of such maps, as far as shapes and dtype tell, are exact in fixed point."""
    if maps.ndim != 3 or maps.dtype != np.float16 or maps.size == 0 or block**2 > 63:
        return False
    n_y, n_x = block_grid(maps.shape[1], maps.shape[2], block)
    return n_y * n_x <= 1 << 22


@cache
def _fixed_point_table(score: ScoreFunction) -> NDArray[np.int32] | None:
    """The scores of float16 values below 2, times 2**24, indexed by the values' bits; None unless all are integers."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    with np.errstate(invalid="ignore"):
        usable = np.abs(values) < 2
    scores = np.where(usable, score(np.where(usable, values, 0.0)), 0.0) * 2.0**_FRACTION_BITS
    exact = (scores == np.rint(scores)) & (np.abs(scores) < 2.0 ** (_FRACTION_BITS + 1))
    return scores.astype(np.int32) if exact.all() else None


def _rank_in_fixed_point(
    maps: NDArray[np.float16], block: int, table: NDArray[np.int32]
) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.float32]] | None:
    """Ranks and shares, by the compiled kernel; None where a value is not below 2."""
    count, height, width = maps.shape
    n_y, n_x = block_grid(height, width, block)
    ranks = np.empty((count, n_y, n_x), rank_dtype(n_y * n_x))
    shares = np.empty(ranks.shape, np.float32)
    bits = np.ascontiguousarray(maps, dtype=np.float16).view(np.uint16)
    return (ranks, shares) if _ranking.rank(bits, table, ranks, shares, height, width, block) else None


def expand(blocks: NDArray[Any], height: int, width: int, block: int = DEFAULT_BLOCK) -> NDArray[Any]:
    """Every block's value on each of its pixels: (..., block_y, block_x) to (..., y, x).

    Raises
    ------
    UserError
        The blocks are not those of a `height` by `width` image.
    """
    grid = block_grid(height, width, block)
    if blocks.shape[-2:] != grid:
        raise UserError(
            f"there are {blocks.shape[-2:]} blocks; {height}x{width} pixels have {grid} blocks of {block}x{block}"
        )
    return blocks.repeat(block, axis=-1)[..., :width].repeat(block, axis=-2)[..., :height, :]
