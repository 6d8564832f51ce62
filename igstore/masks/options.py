"""The settings of a mask, checked once, and the blocks that it shows.

A mask is True where visible. The steps, for a batch of images::

    options = MaskOptions(p=50, keep="bottom")
    blocks = visible_blocks(rank, share, options)                # (image, block_y, block_x)
    mask = expand(blocks, height, width)                         # (image, y, x), igstore.masks.expand
    masked = apply(pixels, mask, FILLS[options.fill](pixels, context))  # (image, channel, y, x)

Every step gives an image the same result whatever else is in the batch, and every result is exact: masks come from
comparisons, fills from integers. So the same formulas give the same bits in any array library and on any device.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from igstore.errors import UserError, option
from igstore.masks.blocks import (
    DEFAULT_BLOCK,
    check_block,
    ranking_name,
)
from igstore.masks.fills import FILLS
from igstore.masks.selection import SELECTIONS, Bools, Ranks, Shares
from igstore.schema import Fill, Keep, Order, Score, Select, check_choice, whole_number

logger = logging.getLogger(__name__)


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
