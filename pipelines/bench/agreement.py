"""How far two sets of maps agree, by what they are for: the masks made of them, and completeness."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from igstore.masks import MaskOptions, block_ranks, block_shares, block_sums, expand, visible_blocks

Maps = NDArray[np.float32]


def mask_iou(maps: Maps, others: Maps) -> NDArray[np.float64]:
    """Intersection over union of the p=50 masks of two maps of each image: (image, y, x) twice to (image,).

    1 where neither map has a positive attribution, so that both masks are empty.
    """
    one, other = _masks(maps), _masks(others)
    both, either = (counted.sum(axis=(1, 2)) for counted in (one & other, one | other))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def _masks(maps: Maps) -> NDArray[np.bool_]:
    scores = block_sums(maps)
    ranks = block_ranks(scores)
    blocks = visible_blocks(ranks, block_shares(scores, ranks), MaskOptions(p=50, keep="top"))
    _, height, width = maps.shape
    return expand(blocks, height, width)


def completeness_errors(maps: Maps, differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """``|sum of a map - (f(x) - f(b))| / |f(x) - f(b)|`` of each image."""
    totals = maps.sum(axis=(1, 2), dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        errors: NDArray[np.float64] = np.abs(totals - differences) / np.abs(differences)
    return errors
