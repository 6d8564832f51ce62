from igstore.masks.blocks import (
    DEFAULT_BLOCK as DEFAULT_BLOCK,
    block_grid as block_grid,
    block_ranks as block_ranks,
    block_shares as block_shares,
    block_sums as block_sums,
    check_block as check_block,
    expand as expand,
    rank_blocks as rank_blocks,
    rank_dtype as rank_dtype,
    ranking_name as ranking_name,
    ranking_parts as ranking_parts,
)
from igstore.masks.fills import FILLS as FILLS, FillContext as FillContext, apply as apply
from igstore.masks.options import (
    MaskOptions as MaskOptions,
    options_of_each as options_of_each,
    visible_blocks as visible_blocks,
    warn_of_fractions as warn_of_fractions,
)
from igstore.masks.selection import (
    Bools as Bools,
    Pixels as Pixels,
    Ranks as Ranks,
    Shares as Shares,
    mask_overlaps as mask_overlaps,
    random_ranks as random_ranks,
)
