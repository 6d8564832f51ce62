"""What a block is: its geometry, its score, its rank among an image's blocks, and the share of the blocks before it.

Pure NumPy functions over a leading image dimension. Everything is worked out one image at a time, so memory does not
grow with the number of images and the intermediate arrays stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from igstore.errors import UserError
from igstore.schema import check_choice

DEFAULT_BLOCK = 3

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
    """`block` as an int; raise `UserError` unless it is a whole number of pixels, at least 1."""
    if isinstance(block, bool) or not isinstance(block, Integral) or block < 1:
        raise UserError(f"block is {block!r}; it must be a whole number of pixels, at least 1")
    return int(block)


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
        rows = _sum_runs(_pixel_scores(image, SCORES[score]), block)  # (block_y, x)
        image_sums[...] = _sum_runs(rows.T, block).T
    return sums


def _pixel_scores(image: NDArray[np.floating[Any]], score: ScoreFunction) -> NDArray[np.float64]:
    """The scores (y, x) of the pixels of one map (y, x) or (channel, y, x); NaN where the map is not finite."""
    if image.ndim == 2 and image.dtype == np.float16:
        # one look-up does conversion, score and check, in less time than the conversion takes alone
        return np.take(_score_table(score), image.view(np.uint16), mode="clip")
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


def _sum_runs(values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Sums over runs of `length` rows; the last run is as long as the rows last."""
    sums = values[::length].copy()
    for offset in range(1, min(length, len(values))):
        rows = values[offset::length]
        sums[: len(rows)] += rows
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
    below_one = np.nextafter(np.float32(1), np.float32(0))
    shares = np.empty(scores.shape, np.float32)
    for image, image_ranks, image_shares in zip(scores, ranks, shares, strict=True):
        place = image_ranks.astype(np.intp)
        ranked = np.empty(image.size)
        ranked[place] = image
        n_positive = np.count_nonzero(ranked > 0)  # they come first
        before = np.concatenate(([0.0], ranked[:n_positive])).cumsum()  # the last entry is the total
        ranked_shares = np.ones(image.size, np.float32)
        ranked_shares[:n_positive] = np.minimum((before[:-1] / before[-1]).astype(np.float32), below_one)
        image_shares[...] = ranked_shares[place]
    return shares


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
