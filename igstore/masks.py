"""Which blocks are visible, and how the others are filled: from ranks and shares to masked pixels.

A mask is True where visible. The steps, for a batch of images::

    options = MaskOptions(p=50, keep="bottom")
    blocks = visible_blocks(rank, share, options)                # (image, block_y, block_x)
    mask = expand(blocks, height, width)                         # (image, y, x), igstore.blocks.expand
    masked = apply(pixels, mask, FILLS[options.fill](pixels, context))  # (image, channel, y, x)

Every step gives an image the same result whatever else is in the batch, and every result is exact: masks come from
comparisons, fills from integers. So the same formulas give the same bits in any array library and on any device.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igstore.blocks import (
    DEFAULT_BLOCK,
    block_ranks,
    block_shares,
    block_sums,
    check_block,
    rank_dtype,
    ranking_name,
)
from igstore.errors import UserError
from igstore.schema import Fill, Keep, Order, Score, Select, check_choice, whole_number
from igstore.wording import option

Bools = NDArray[np.bool_]
Ranks = NDArray[np.unsignedinteger[Any]]
Shares = NDArray[np.float32]
Pixels = NDArray[np.uint8]

logger = logging.getLogger(__name__)

BLUR_SIGMA = 10.0  # pixels
BLUR_RADIUS = 40  # pixels: four sigma, where a Gaussian is cut


# Which blocks are visible


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
        Floating-point maps of the same images, as `igstore.blocks.block_sums` takes them.
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
        digits = _random_bytes("order", seed, image_id, 6 * n_blocks).view("<u2").reshape(3, n_blocks)
        image_ranks[:] = np.lexsort(digits)
    return ranks.reshape(len(image_ids), *grid)


def visible_blocks(rank: Ranks, share: Shares, options: MaskOptions, random_rank: Ranks | None = None) -> Bools:
    """The blocks that stay visible: the top set, or all but the top set.

    Parameters
    ----------
    rank, share
        Of the same images, (image, block_y, block_x), in the ranking that the options name.
    options
        Their `p`, `keep` and `select` say which blocks.
    random_rank
        For ``order="random"``: what `random_ranks` gives for these images. In each image the top set is replaced by
        as many blocks as it has, the first of this permutation.

    Returns
    -------
    bool (image, block_y, block_x), True where visible. ``p=0`` with ``keep="bottom"`` shows everything.
    """
    top = SELECTIONS[options.select](rank, share, options.p)
    if random_rank is not None:
        top = random_rank < top.sum(axis=(-2, -1), keepdims=True)
    return top if options.keep == "top" else ~top


# What a hidden pixel becomes


@dataclass(frozen=True)
class FillContext:
    """What a fill may know beside the pixels.

    Parameters
    ----------
    mean
        The model's mean colour, per channel in [0, 1], as in its normalisation.
    image_ids
        The ids of the images of this batch, in its order.
    seed
        Of whatever is random.
    """

    mean: tuple[float, ...]
    image_ids: Sequence[str]
    seed: int = 0


def black(pixels: Pixels, context: FillContext) -> Pixels:
    """0 in every channel."""
    return np.zeros((1, pixels.shape[1], 1, 1), np.uint8)


def mean(pixels: Pixels, context: FillContext) -> Pixels:
    """The model's mean colour, 255 * mean, rounded to nearest (halves up)."""
    colour = np.floor(255 * np.asarray(context.mean) + 0.5)
    return np.clip(colour, 0, 255).astype(np.uint8).reshape(1, -1, 1, 1)


def image_mean(pixels: Pixels, context: FillContext) -> Pixels:
    """Each image's own mean of each channel, rounded to nearest (halves up) in integer arithmetic."""
    n_pixels = pixels.shape[2] * pixels.shape[3]
    doubled = 2 * pixels.sum(axis=(2, 3), dtype=np.int64, keepdims=True)  # (image, channel, 1, 1)
    means: Pixels = np.floor_divide(doubled + n_pixels, 2 * n_pixels).astype(np.uint8)
    return means


def blur(pixels: Pixels, context: FillContext) -> Pixels:
    """Each image under a Gaussian of sigma 10 px; see `gaussian_blur`."""
    blurred = np.empty(pixels.shape, np.uint8)
    for image, out in zip(pixels, blurred, strict=True):  # one by one: the intermediate float64 is 16 times as large
        out[...] = gaussian_blur(image)
    return blurred


def noise(pixels: Pixels, context: FillContext) -> Pixels:
    """Uniform 0 to 255 for every pixel and channel, from the seed, the image's id and the image's shape alone.

    The bytes are SHAKE-128's, in the order channel, y, x: the same on every machine and in every version.
    """
    n_values = math.prod(pixels.shape[1:])
    filled = np.empty(pixels.shape, np.uint8)
    for image_id, image in zip(context.image_ids, filled, strict=True):
        image[...] = _random_bytes("noise", context.seed, image_id, n_values).reshape(image.shape)
    return filled


# What a hidden pixel becomes, from pixels (image, channel, y, x) and a `FillContext`: uint8, of a shape that broadcasts
# to the pixels' own, so a plain colour is (1 or image, channel, 1, 1). A new fill is a function here that gives each
# image the same whatever else is in the batch.
FILLS: dict[str, Callable[[Pixels, FillContext], Pixels]] = {
    "black": black,
    "mean": mean,
    "image_mean": image_mean,
    "blur": blur,
    "noise": noise,
}


def gaussian_blur(pixels: Pixels) -> Pixels:
    """Images (..., y, x) under a Gaussian of sigma 10 px, cut at 40 px, the edges continued outwards.

    The same as ``scipy.ndimage.gaussian_filter(float, sigma=10, truncate=4, mode="nearest")`` rounded to nearest
    (halves up), but in integer arithmetic: the weights are rounded to multiples of 2**-22, so both products below are
    exact in float64 (255 * 2**44 < 2**53) and the result is the same in whatever order a processor adds.
    """
    down, across = (_blur_weights(side) for side in pixels.shape[-2:])
    sums = down @ pixels.astype(np.float64) @ across.T  # (..., y, x), in units of 2**-44
    return np.floor(sums * 2.0**-44 + 0.5).astype(np.uint8)


@lru_cache(maxsize=4)  # the sides of two image sizes
def _blur_weights(side: int) -> NDArray[np.float64]:
    """The blur along one axis as a matrix (out, in), in units of 2**-22."""
    offsets = np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    bell = np.exp(-0.5 * (offsets / BLUR_SIGMA) ** 2)
    weights = np.rint(bell / bell.sum() * 2**22)
    centres = np.arange(side)[:, np.newaxis]
    matrix = np.zeros((side, side))
    np.add.at(matrix, (centres, np.clip(centres + offsets, 0, side - 1)), weights)
    return matrix


def apply(pixels: Pixels, visible: Bools, fill_pixels: Pixels) -> Pixels:
    """The pixels where visible, the fill elsewhere: ``where(visible, pixels, fill_pixels)``.

    Parameters
    ----------
    pixels
        uint8 (image, channel, y, x).
    visible
        bool (image, y, x).
    fill_pixels
        uint8, broadcastable to `pixels`: what an entry of `FILLS` gives.

    Returns
    -------
    uint8 (image, channel, y, x), a new array.
    """
    # fill + (pixels - fill) * visible: uint8 wraps around, so this is exact, and five times faster than numpy.where
    masked = np.subtract(pixels, fill_pixels, dtype=np.uint8)
    masked *= visible[:, np.newaxis]
    masked += fill_pixels
    return masked


# A mask and its fill


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """Which blocks a mask shows, and how hidden pixels are filled. Every value is checked once, here.

    Parameters
    ----------
    p
        0 to 100: how far the top set goes.
    keep
        ``"top"`` shows the top set, ``"bottom"`` its complement.
    select
        What p is a percentage of: ``"mass"``, the image's total score, or ``"count"``, its blocks.
    score, block
        The ranking that is used.
    fill
        What a hidden pixel becomes: a name in `igstore.masks.FILLS`.
    order
        ``"attribution"``, or the control ``"random"``.
    seed
        Of the random order and of the noise.

    Raises
    ------
    UserError
        A value is not allowed; the message names those that are.

    >>> MaskOptions(p=30, keep="top").ranking
    'positive-3'
    >>> MaskOptions(p=300)
    Traceback (most recent call last):
        ...
    igstore.errors.UserError: p is 300; it must be a number from 0 to 100, a percentage: 50, not 0.5, is one half
    """

    p: float = 50.0
    keep: Keep = "bottom"
    select: Select = "mass"
    score: Score = "positive"
    block: int = DEFAULT_BLOCK
    fill: Fill = "black"
    order: Order = "attribution"
    seed: int = 0

    def __post_init__(self) -> None:
        p: Any = self.p
        if isinstance(p, bool) or not isinstance(p, Real) or not 0 <= p <= 100:  # type: ignore[operator]
            raise UserError(
                f"{option('p')} is {p!r}; it must be a number from 0 to 100, a percentage: 50, not 0.5, is one half"
            )
        choices = {"keep": Keep, "select": SELECTIONS, "score": Score, "fill": FILLS, "order": Order}
        for field, allowed in choices.items():
            check_choice(field, getattr(self, field), allowed)
        object.__setattr__(self, "p", float(p))
        object.__setattr__(self, "block", check_block(self.block))
        object.__setattr__(self, "seed", whole_number("seed", self.seed, -(2**63), 2**63 - 1))

    @property
    def ranking(self) -> str:
        """The name of the ranking that these options need, such as ``positive-3``."""
        return ranking_name(self.score, self.block)

    def __str__(self) -> str:
        parts = [
            f"keep {self.keep}, p={self.p:g} by {self.select}",
            f"{self.score} score of {self.block}x{self.block} blocks",
            f"fill {self.fill}",
        ]
        if self.order != "attribution":
            parts.append(f"{self.order} order")
        if self.order == "random" or self.fill == "noise":
            parts.append(f"seed {self.seed}")
        return ", ".join(parts)


def options_of_each(p: Any, **options: Any) -> list[MaskOptions]:
    """The options for each p, which is one number or several; `options` are the other fields of `MaskOptions`.

    Raises
    ------
    UserError
        There is no p, or a value is not allowed.
    """
    cells = [MaskOptions(p=one, **options) for one in np.atleast_1d(np.asarray(p, dtype=object)).tolist()]
    if not cells:
        raise UserError(f"{option('p')} is empty; give a number from 0 to 100, or several")
    warn_of_fractions(*cells)
    return cells


def warn_of_fractions(*cells: MaskOptions) -> None:
    """Warn of a p below 1, which is rarely what was meant."""
    few = [f"{p:g}" for p in dict.fromkeys(cell.p for cell in cells) if 0 < p < 1]
    if few:
        logger.warning(
            "p is a percentage, from 0 to 100, so %s is less than one percent; one half is 50", ", ".join(few)
        )


def _random_bytes(purpose: str, seed: int, image_id: str, n: int) -> NDArray[np.uint8]:
    """`n` bytes that depend on these words alone; other purposes, seeds and ids give unrelated ones."""
    return np.frombuffer(hashlib.shake_128(f"igstore {purpose} {seed} {image_id}".encode()).digest(n), np.uint8)
