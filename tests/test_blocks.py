from __future__ import annotations

import shutil
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from igstore.errors import UserError
from igstore.machine import kernels_allowed
from igstore.masks import (
    block_grid,
    block_ranks,
    block_shares,
    block_sums,
    blocks,
    check_block,
    expand,
    rank_blocks,
    rank_dtype,
)
from igstore.masks.blocks import MOST_BLOCK, SCORES
from igstore.schema import Score

several = settings(deadline=None, max_examples=60)

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))
FLOAT16_BITS = st.integers(0, 0x7BFF) | st.integers(0x8000, 0xFBFF)  # all that are finite, signed zeros included
# few distinct values, so that most images have ties; neighbours that differ in each of the four 16-bit digits
SCORE_VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1.0 + 2**-52, 1.0 + 2**-30, 1.0 + 2**-10, 5e-324, -5e-324, 1e300]),
    st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300),
)
GRIDS = st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 6))


def maps_of(max_channels: int = 0) -> st.SearchStrategy[np.ndarray]:
    side = st.integers(1, 10)
    shapes = st.tuples(st.integers(1, 2), side, side)
    if max_channels:
        shapes = st.tuples(st.integers(1, 2), st.integers(1, max_channels), side, side)
    bits = shapes.flatmap(lambda shape: hnp.arrays(np.uint16, shape, elements=FLOAT16_BITS))
    return bits.map(lambda maps: maps.view(np.float16))


def blocks_of(image: np.ndarray, block: int):
    """((block_y, block_x), pixels of the block) for every block that starts inside the image."""
    height, width = image.shape
    for j, top in enumerate(range(0, height, block)):
        for i, left in enumerate(range(0, width, block)):
            yield (j, i), image[top : top + block, left : left + block]


def exact_sum(values: np.ndarray) -> Fraction:
    return sum((Fraction(float(value)) for value in values.ravel()), Fraction(0))


def random_maps(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Heavy-tailed float16 maps, about half of them negative, some of them exactly zero."""
    values = np.random.default_rng(seed).standard_t(2, (n, height, width)) / 50
    values[:, ::7, ::5] = 0
    return values.clip(-1.99, 1.99).astype(np.float16)


# geometry


@pytest.mark.parametrize(
    ("height", "width", "block", "grid"),
    [
        (224, 224, 3, (75, 75)),
        (240, 240, 3, (80, 80)),
        (260, 260, 3, (87, 87)),
        (299, 299, 3, (100, 100)),
        (224, 299, 3, (75, 100)),
        (224, 224, 1, (224, 224)),
        (224, 224, 16, (14, 14)),
        (224, 224, 225, (1, 1)),
        (1, 7, 3, (1, 3)),
    ],
)
def test_grid(height, width, block, grid):
    assert block_grid(height, width, block) == grid


@pytest.mark.parametrize("block", [0, -3, 2.5, 3.0, "3", None, True], ids=repr)
def test_block_must_be_a_whole_number_of_pixels(block):
    with pytest.raises(UserError, match=f"block is {block!r}.*at least 1"):
        check_block(block)
    with pytest.raises(UserError, match="block is"):
        block_grid(9, 9, block)


def test_numpy_integers_are_blocks():
    assert type(check_block(np.int16(4))) is int
    assert block_grid(9, 8, np.int64(4)) == (3, 2)


@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 23),
    st.lists(st.integers(0, 3), max_size=2),
)
@several
def test_expand_is_kron_cut_to_size(height, width, block, lead):
    grid = (len(range(0, height, block)), len(range(0, width, block)))
    values = np.arange(np.prod([*lead, *grid]), dtype=np.uint16).reshape(*lead, *grid)
    expected = np.kron(values, np.ones((block, block), np.uint16))[..., :height, :width]
    expanded = expand(values, height, width, block)
    assert expanded.dtype == values.dtype
    np.testing.assert_array_equal(expanded, expected)


@pytest.mark.parametrize("side", [224, 240, 260, 299])
def test_expand_puts_every_pixel_in_its_block(side):
    n = block_grid(side, side)[0]
    expanded = expand(np.arange(n * n).reshape(1, n, n), side, side)
    y, x = np.indices((side, side))
    np.testing.assert_array_equal(expanded[0], (y // 3) * n + x // 3)


@pytest.mark.parametrize(("height", "width"), [(9, 12), (12, 9), (9, 6), (6, 9)])
def test_expand_refuses_blocks_of_another_size(height, width):
    with pytest.raises(UserError, match=r"\(3, 3\) blocks; "):
        expand(np.zeros((1, 3, 3)), height, width, 3)


# scores


def test_scores_are_the_ones_that_the_schema_names():
    assert set(SCORES) == set(get_args(Score))


@pytest.mark.parametrize(
    ("score", "expected"), [("positive", [0, 0, 0, 2.5]), ("absolute", [1.5, 0, 0, 2.5]), ("signed", [-1.5, 0, 0, 2.5])]
)
def test_score_of_a_pixel(score, expected):
    maps = np.array([[[-1.5, -0.0, 0.0, 2.5]]], np.float16)
    assert block_sums(maps, 1, score).tolist() == [[expected]]


@pytest.mark.parametrize("score", SCORES)
@given(maps=maps_of(), block=st.integers(1, 12))
@several
def test_sums_are_exact(score, maps, block):
    sums = block_sums(maps, block, score)
    assert sums.dtype == np.float64
    assert sums.shape == (len(maps), *block_grid(*maps.shape[1:], block))
    for image, image_sums in zip(maps, sums, strict=True):
        for where, pixels in blocks_of(image, block):
            assert Fraction(image_sums[where]) == exact_sum(SCORES[score](pixels.astype(np.float64)))


@pytest.mark.parametrize("score", SCORES)
@given(maps=maps_of(max_channels=3), block=st.integers(1, 4))
@several
def test_channels_are_summed_before_they_are_scored(score, maps, block):
    sums = block_sums(maps, block, score)
    for image, image_sums in zip(maps, sums, strict=True):
        channels = image.astype(np.float64).sum(axis=0)  # exact: float16 values and few of them
        for where, pixels in blocks_of(channels, block):
            assert Fraction(image_sums[where]) == exact_sum(SCORES[score](pixels))


def test_channels_that_cancel_score_nothing():
    maps = np.array([[[[1.0, 1.0]], [[-1.0, 2.0]], [[0.0, -1.0]]]], np.float16)  # one image of 1x2 pixels
    assert block_sums(maps, 1, "positive").tolist() == [[[0, 2]]]
    assert block_sums(maps, 1, "absolute").tolist() == [[[0, 2]]]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("side", [224, 240, 260, 299])
def test_sums_of_ragged_images_drop_no_pixel(side, score):
    maps = random_maps(2, side, side)
    n = -(-side // 3)
    padded = np.zeros((2, 3 * n, 3 * n))
    padded[:, :side, :side] = SCORES[score](maps.astype(np.float64))
    expected = padded.reshape(2, n, 3, n, 3).sum(axis=(2, 4))
    np.testing.assert_array_equal(block_sums(maps, 3, score), expected)


@pytest.mark.parametrize(("side", "last"), [(224, 2), (240, 3), (260, 2), (299, 2)])
def test_last_blocks_are_as_wide_as_the_image_leaves_them(side, last):
    areas = block_sums(np.ones((1, side, side), np.float16))[0]
    assert areas[0, 0] == 9
    assert areas[-1, 0] == areas[0, -1] == 3 * last
    assert areas[-1, -1] == last * last
    assert areas.sum() == side * side


def test_a_block_may_exceed_the_image_by_far():
    assert block_sums(np.ones((1, 5, 7), np.float16), MOST_BLOCK).tolist() == [[[35]]]


def test_sums_do_not_depend_on_the_order_of_the_pixels():
    # in float32, or in float16, the small values would vanish beside the large ones
    values = np.array([65504, 2**-24, -65504, 2**-24, 2048, 2**-14, -2048, 0.1, -0.0], np.float16)
    rng = np.random.default_rng(0)
    maps = np.stack([rng.permutation(values).reshape(3, 3) for _ in range(50)])
    for score in SCORES:
        sums = block_sums(maps, 3, score)
        assert len(np.unique(sums)) == 1
    assert Fraction(block_sums(maps, 3, "signed")[0, 0, 0]) == exact_sum(values)


@pytest.mark.parametrize("score", SCORES)
def test_other_layouts_and_dtypes_give_the_same_sums(score):
    maps = random_maps(3, 11, 14)
    expected = block_sums(maps, 3, score)
    for same in (
        maps.astype(np.float32),
        maps.astype(np.float64),
        maps.astype(">f2"),
        np.asfortranarray(maps),
        np.repeat(maps, 2, axis=2)[:, :, ::2],
        maps[:, np.newaxis],
    ):
        np.testing.assert_array_equal(block_sums(same, 3, score), expected)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("layout", ["float16", "float32", "channels"])
def test_a_block_that_is_not_finite_scores_nan_and_has_no_rank(score, bad, layout):
    maps = np.ones((3, 6, 6), np.float32 if layout == "float32" else np.float16)
    maps[1, 4, 2] = bad
    if layout == "channels":
        maps = np.stack([maps, -maps], axis=1)  # inf - inf
    sums = block_sums(maps, 3, score)
    assert np.argwhere(np.isnan(sums)).tolist() == [[1, 1, 0]]
    with pytest.raises(UserError, match=r"1 of 3 maps .* first at position 1"):
        block_ranks(sums)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan], ids=str)
def test_ranks_refuse_scores_that_are_not_finite(value):
    with pytest.raises(UserError, match=r"2 of 2 maps .* first at position 0"):
        block_ranks(np.full((2, 1, 2), value))


@pytest.mark.parametrize(
    "maps",
    [np.zeros((4, 4), np.float16), np.zeros((1, 1, 1, 4, 4), np.float16), np.zeros((1, 4, 4), np.int16)],
    ids=["no image dimension", "five dimensions", "integers"],
)
def test_maps_of_another_kind_are_refused(maps):
    with pytest.raises(UserError, match=r"maps are .*\(image, channel, y, x\)"):
        block_sums(maps)


def test_unknown_score_names_the_choices():
    with pytest.raises(UserError, match=r"score is 'max'.*positive, absolute, signed"):
        block_sums(np.zeros((1, 4, 4), np.float16), score="max")


def test_a_score_is_one_function(monkeypatch):
    monkeypatch.setitem(SCORES, "squared", lambda attribution: attribution**2)
    maps = random_maps(1, 8, 8)
    assert block_sums(maps, 8, "squared").item() == pytest.approx((maps.astype(np.float64) ** 2).sum(), rel=1e-12)


# ranks


def ranks_by_definition(scores: np.ndarray) -> np.ndarray:
    """One image's ranks: highest score first, ties by block index; Python's comparison of floats, so -0.0 == 0.0."""
    flat = scores.ravel().tolist()
    ranks = [0] * len(flat)
    for place, block in enumerate(sorted(range(len(flat)), key=lambda index: (-flat[index], index))):
        ranks[block] = place
    return np.array(ranks).reshape(scores.shape)


@given(GRIDS.flatmap(lambda shape: hnp.arrays(np.float64, shape, elements=SCORE_VALUES)))
@several
def test_ranks_are_the_definition(scores):
    ranks = block_ranks(scores)
    assert ranks.shape == scores.shape
    assert ranks.dtype == np.uint16
    for image, image_ranks in zip(scores, ranks, strict=True):
        np.testing.assert_array_equal(image_ranks, ranks_by_definition(image))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("side", [224, 299])
def test_ranks_are_a_stable_argsort(side, score):
    scores = block_sums(random_maps(3, side, side), 3, score)
    order = np.argsort(-scores.reshape(3, -1), axis=1, kind="stable")
    expected = np.empty_like(order)
    np.put_along_axis(expected, order, np.arange(order.shape[1])[np.newaxis], axis=1)
    np.testing.assert_array_equal(block_ranks(scores).reshape(3, -1), expected)


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 3.0, -3.0, 5e-324], ids=["zero", "minus zero", "positive", "negative", "subnormal"]
)
def test_equal_scores_rank_in_row_major_order(value):
    ranks = block_ranks(np.full((2, 4, 5), value))
    np.testing.assert_array_equal(ranks, np.broadcast_to(np.arange(20).reshape(4, 5), (2, 4, 5)))


def test_signed_zeros_are_equal():
    assert block_ranks(np.array([[[-0.0, 0.0, -0.0, 5e-324, -5e-324, 0.0]]])).tolist() == [[[1, 2, 3, 0, 5, 4]]]


@pytest.mark.parametrize(
    ("grid", "dtype"), [((257, 255), np.uint16), ((256, 256), np.uint32), ((1, 65_537), np.uint32)]
)
def test_many_blocks_need_wider_ranks(grid, dtype):
    ranks = block_ranks(np.arange(np.prod(grid), dtype=np.float64).reshape(1, *grid))  # the last block is the best
    assert ranks.dtype == dtype == rank_dtype(ranks.size)
    np.testing.assert_array_equal(ranks.ravel(), np.arange(ranks.size)[::-1])


# shares


def shares_by_definition(scores: np.ndarray) -> np.ndarray:
    """One image's shares, summed in rational numbers."""
    ranks = ranks_by_definition(scores)
    held = [max(Fraction(score), Fraction(0)) for score in scores.ravel().tolist()]
    total = sum(held)
    shares = []
    for block, rank in enumerate(ranks.ravel()):
        before = sum((h for h, r in zip(held, ranks.ravel(), strict=True) if r < rank), Fraction(0))
        shares.append(min(np.float32(float(before) / float(total)), BELOW_ONE) if held[block] else np.float32(1))
    return np.array(shares, np.float32).reshape(scores.shape)


@pytest.mark.parametrize("score", SCORES)
@given(maps=maps_of(), block=st.integers(1, 4))
@several
def test_shares_are_the_definition(score, maps, block):
    scores = block_sums(maps, block, score)
    shares = block_shares(scores, block_ranks(scores))
    assert shares.dtype == np.float32
    for image, image_shares in zip(scores, shares, strict=True):
        np.testing.assert_array_equal(image_shares, shares_by_definition(image))


@given(GRIDS.flatmap(lambda shape: hnp.arrays(np.float64, shape, elements=SCORE_VALUES)))
@several
def test_shares_of_any_scores_keep_their_promises(scores):
    ranks = block_ranks(scores)
    shares = block_shares(scores, ranks)
    np.testing.assert_array_equal(shares < 1, scores > 0)
    assert ((shares >= 0) & (shares <= 1)).all()
    for image_ranks, image_shares in zip(ranks, shares, strict=True):
        in_order = image_shares.ravel()[np.argsort(image_ranks.ravel())]
        assert (np.diff(in_order) >= 0).all()


def test_shares_by_hand():
    scores = np.array([[[1.0, 4.0], [-7.0, 3.0]], [[0.0, -0.0], [-1.0, -2.0]]])
    assert block_shares(scores, block_ranks(scores)).tolist() == [[[0.875, 0], [1, 0.5]], [[1, 1], [1, 1]]]


def test_a_share_that_rounds_to_one_is_clamped_below_it():
    scores = np.array([[[65504.0 * 9, 2**-24, 0.0]]])
    assert block_shares(scores, block_ranks(scores)).tolist() == [[[0, BELOW_ONE, 1]]]


def test_shares_are_summed_in_float64():
    scores = np.full((1, 1, 4097), 2.0**-24)
    scores[0, 0, 0] = 1  # beside it, float32 loses each of the others
    shares = block_shares(scores, block_ranks(scores))[0, 0]
    assert shares[0] == 0
    assert shares[-1] == np.float32((1 + 4095 * 2**-24) / (1 + 4096 * 2**-24))


@pytest.mark.parametrize("score", SCORES)
def test_an_image_is_the_same_alone_and_in_a_batch(score):
    maps = random_maps(4, 20, 17)
    maps[1] = 0
    maps[2] = -abs(maps[2])
    scores = block_sums(maps, 3, score)
    ranks = block_ranks(scores)
    shares = block_shares(scores, ranks)
    for i in range(4):
        alone = block_sums(maps[i : i + 1], 3, score)
        np.testing.assert_array_equal(alone[0], scores[i])
        np.testing.assert_array_equal(block_ranks(alone)[0], ranks[i])
        np.testing.assert_array_equal(block_shares(alone, block_ranks(alone))[0], shares[i])


def test_no_images_give_no_ranks():
    scores = block_sums(np.empty((0, 8, 8), np.float16))
    ranks = block_ranks(scores)
    assert scores.shape == ranks.shape == block_shares(scores, ranks).shape == (0, 3, 3)


# ranks and shares at once


def assert_ranked_as_defined(maps: np.ndarray, block: int, score: str) -> None:
    sums = block_sums(maps, block, score)
    expected = block_ranks(sums)
    ranks, shares = rank_blocks(maps, block, score)
    np.testing.assert_array_equal(ranks, expected, strict=True)
    np.testing.assert_array_equal(shares, block_shares(sums, expected), strict=True)


@pytest.fixture
def only_the_kernel(monkeypatch):
    """What is ranked at once is ranked by the kernel, so that agreement with the plain way means something."""
    if blocks._ranking is None or not kernels_allowed():
        pytest.skip("the kernel is not compiled, or ruled out")
    ranked_by_kernel = blocks._rank_in_fixed_point
    calls = []

    def ranked(*arguments):
        found = ranked_by_kernel(*arguments)
        assert found is not None
        calls.append(arguments)
        return found

    monkeypatch.setattr(blocks, "_rank_in_fixed_point", ranked)
    yield
    assert calls


def test_kernel_is_there_where_it_can_be():
    """Tests of a kernel that failed to compile would all be skipped."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    assert blocks._ranking is not None


STORED = st.floats(width=16, min_value=np.float16(-1.999), max_value=np.float16(1.999))  # subnormal ones included
EXTREMES = st.sampled_from([0.0, -0.0, 2.0**-24, -(2.0**-24), 1.999, -1.999, 1.0])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("elements", [STORED, EXTREMES], ids=["any", "ties and extremes"])
def test_stored_maps_are_ranked_by_the_kernel_as_defined(score, elements, only_the_kernel):
    @given(
        hnp.arrays(np.float16, GRIDS.map(lambda shape: (shape[0] + 1, *shape[1:])), elements=elements),
        st.integers(1, 7),
    )
    @several
    def check(maps, block):
        assert_ranked_as_defined(maps, block, score)

    check()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("side", [224, 299])
def test_large_maps_are_ranked_by_the_kernel_as_defined(score, side, only_the_kernel):
    assert_ranked_as_defined(random_maps(3, side, side), 3, score)


def test_more_blocks_than_16_bits_count(only_the_kernel):
    maps = random_maps(2, 260, 257)
    assert_ranked_as_defined(maps, 1, "absolute")
    assert rank_blocks(maps, 1)[0].dtype == np.uint32


def test_without_the_kernel_ranks_are_the_same(monkeypatch):
    monkeypatch.setattr(blocks, "_ranking", None)
    assert_ranked_as_defined(random_maps(3, 50, 60), 3, "positive")


def test_the_switch_rules_the_kernel_out(monkeypatch):
    monkeypatch.setattr(blocks, "_rank_in_fixed_point", lambda *_: pytest.fail("the kernel was used"))
    monkeypatch.setenv("IGSTORE_KERNELS", "0")
    assert_ranked_as_defined(random_maps(3, 50, 60), 3, "positive")
    monkeypatch.setenv("IGSTORE_KERNELS", "no")
    with pytest.raises(UserError, match="IGSTORE_KERNELS is 'no'; it must be 0"):
        rank_blocks(random_maps(3, 50, 60), 3, "positive")


@pytest.mark.skipif(blocks._ranking is None, reason="the kernel is not compiled")
def test_kernel_refuses_arrays_that_do_not_go_together():
    maps, table = np.zeros((2, 6, 6), np.uint16), np.zeros(1 << 16, np.int32)
    ranks, shares = np.zeros((2, 2, 2), np.uint16), np.zeros((2, 2, 2), np.float32)
    assert blocks._ranking.rank(maps, table, ranks, shares, 6, 6, 3)
    for wrong in (
        (maps[:1], table, ranks, shares, 6, 6, 3),
        (maps, table[:-1], ranks, shares, 6, 6, 3),
        (maps, table, ranks[:1], shares, 6, 6, 3),
        (maps, table, ranks, shares[:1], 6, 6, 3),
        (maps, table, ranks, shares, 6, 6, 2),
        (maps, table, ranks, shares, 5, 6, 3),
        (maps, table, ranks, shares, 6, 6, 0),
        (maps, table, ranks, shares, 0, 6, 3),
    ):
        with pytest.raises(ValueError, match=r"sizes do not go together|at least 1"):
            blocks._ranking.rank(*wrong)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("block", [7, 8])
def test_the_largest_sums_do_not_overflow(sign, block):
    largest = np.nextafter(np.float16(2), np.float16(0))
    maps = np.full((1, 16, 16), sign * largest)
    maps[0, :8, :8] = sign
    assert_ranked_as_defined(maps, block, "signed")


@pytest.mark.parametrize("score", SCORES)
@given(maps=maps_of(max_channels=3) | maps_of(), block=st.integers(1, 12))
@several
def test_any_maps_are_ranked_as_defined(score, maps, block):
    assert_ranked_as_defined(maps, block, score)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_maps_of_other_dtypes_are_ranked_as_defined(dtype):
    assert_ranked_as_defined(np.random.default_rng(0).standard_normal((2, 20, 20)).astype(dtype), 3, "positive")


def test_views_are_ranked_as_defined(only_the_kernel):
    assert_ranked_as_defined(random_maps(4, 20, 30)[::2, ::-1].transpose(0, 2, 1), 3, "positive")


def test_no_maps_give_no_ranks_at_once():
    ranks, shares = rank_blocks(np.empty((0, 7, 7), np.float16))
    assert ranks.shape == shares.shape == (0, 3, 3)
    assert (ranks.dtype, shares.dtype) == (np.uint16, np.float32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_maps_that_are_not_finite_are_not_ranked_at_once(bad):
    maps = random_maps(3, 8, 8)
    maps[1, 2, 3] = bad
    with pytest.raises(UserError, match=r"1 of 3 .* position 1"):
        rank_blocks(maps)


def test_a_score_that_makes_finer_fractions_is_ranked_as_defined(monkeypatch):
    monkeypatch.setitem(SCORES, "square", np.square)
    assert_ranked_as_defined(random_maps(2, 20, 20), 3, "square")
