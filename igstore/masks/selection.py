"""Which blocks matter most: the top set of an image, from its ranks and shares, and the random control."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igstore.masks.blocks import (
    block_ranks,
    block_shares,
    block_sums,
    rank_dtype,
)

Bools = NDArray[np.bool_]
Ranks = NDArray[np.unsignedinteger[Any]]
Shares = NDArray[np.float32]
Pixels = NDArray[np.uint8]


def mass_threshold(p: float) -> float:
    """The share below which a block is in the top set: p/100 rounded to float32, so that float32 shares meet no other.

    A Python float, because NumPy and PyTorch compare that with a float32 array in float32.
    """
    return float(np.float32(p / 100))


def count_threshold(p: float, n_blocks: int) -> int:
    """The rank below which a block is in the top set: the number of ranks r with ``100 * r < p * n_blocks``.

    In exact arithmetic, p being the decimal that it is written as: 8.8% of 5625 blocks are 495, where floating point
    makes it 496.
    """
    return math.ceil(Fraction(repr(float(p))) * n_blocks / 100)


def mass(rank: Ranks, share: Shares, p: float) -> Bools:
    """The smallest set of highest-scoring blocks that holds p% of the image's total score."""
    return share < mass_threshold(p)


def count(rank: Ranks, share: Shares, p: float) -> Bools:
    """The highest-scoring p% of the blocks, rounded up to whole blocks."""
    return rank < count_threshold(p, rank.shape[-2] * rank.shape[-1])


# The top set, from the ranks and shares (image, block_y, block_x) of some images and p. A new selection is a function
# here that looks at each image by itself, gives only sets that start at rank 0, and grows with p.
SELECTIONS: dict[str, Callable[[Ranks, Shares, float], Bools]] = {"mass": mass, "count": count}


def mask_overlaps(maps: NDArray[Any], others: NDArray[Any], p: float = 50) -> NDArray[np.float64]:
    """Intersection over union of the top sets of two maps of each image, by mass: how far the maps make the same masks.

    Parameters
    ----------
    maps, others
        Floating-point maps of the same images, as `igstore.masks.block_sums` takes them.
    p
        0 to 100, a percentage of the image's total score.

    Returns
    -------
    float64 (image,), 1 where both sets are empty.
    """
    scores = [block_sums(each) for each in (maps, others)]
    top = [mass(ranks := block_ranks(each), block_shares(each, ranks), p) for each in scores]
    both, either = (combine(*top).sum(axis=(1, 2)) for combine in (np.logical_and, np.logical_or))
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def random_ranks(image_ids: Sequence[str], grid: tuple[int, int], seed: int = 0) -> Ranks:
    """The control's ranks: one random permutation of the blocks for each image.

    An image's permutation depends on the seed, its id and the grid alone. It orders the blocks by 48-bit numbers, whose
    16-bit digits SHAKE-128 makes of the seed and the id, so it is the same on every machine and in every version.

    Parameters
    ----------
    image_ids
        One string an image.
    grid
        (n_y, n_x), the number of blocks down and across.
    seed
        An integer.

    Returns
    -------
    uint16 (uint32 above 65,535 blocks) (image, block_y, block_x).
    """
    n_blocks = math.prod(grid)
    ranks = np.empty((len(image_ids), n_blocks), rank_dtype(n_blocks))
    for image_id, image_ranks in zip(image_ids, ranks, strict=True):
        digits = random_bytes("order", seed, image_id, 6 * n_blocks).view("<u2").reshape(3, n_blocks)
        image_ranks[:] = np.lexsort(digits)
    return ranks.reshape(len(image_ids), *grid)


def random_bytes(purpose: str, seed: int, image_id: str, n: int) -> NDArray[np.uint8]:
    """`n` bytes that depend on these words alone; other purposes, seeds and ids give unrelated ones."""
    return np.frombuffer(hashlib.shake_128(f"igstore {purpose} {seed} {image_id}".encode()).digest(n), np.uint8)
