from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from igstore.errors import UserError
from igstore.masks import (
    FILLS,
    FillContext,
    MaskOptions,
    apply,
    block_ranks,
    block_shares,
    block_sums,
    expand,
    random_ranks,
    visible_blocks,
)
from igstore.masks.fills import gaussian_blur
from igstore.masks.selection import SELECTIONS, count_threshold, mass_threshold
from igstore.schema import Fill, Keep, Select

several = settings(deadline=None, max_examples=60)

PERCENTAGES = st.one_of(st.sampled_from([0, 30, 50, 70, 90, 100]), st.floats(0, 100), st.integers(0, 100))
GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))
# halves, so that shares and the thresholds of 12.5, 25, ... meet exactly; a few equal, negative and zero
SCORES = GRIDS.flatmap(
    lambda grid: hnp.arrays(np.float64, grid, elements=st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 7.0]))
)
KEEPS = get_args(Keep)


def ranked(scores) -> tuple[np.ndarray, np.ndarray]:
    rank = block_ranks(scores)
    return rank, block_shares(scores, rank)


def visible(rank, share, random_rank=None, **options) -> np.ndarray:
    return visible_blocks(rank, share, MaskOptions(**options), random_rank)


def top_blocks(rank, share, p, select="mass") -> np.ndarray:
    return visible(rank, share, p=p, keep="top", select=select)


def random_scores(n: int = 3, n_y: int = 9, n_x: int = 11, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(2, (n, n_y, n_x)).astype(np.float16).astype(np.float64)


def in_rank_order(rank: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(image, block): the values from rank 0 to the last."""
    order = np.argsort(rank.reshape(len(rank), -1), axis=1)
    return np.take_along_axis(values.reshape(len(values), -1), order, axis=1)


# p


@pytest.mark.parametrize("p", [0, 100, 50, 12.5, -0.0, np.float32(50), np.int64(7), np.uint8(100), Fraction(1, 3)])
def test_p_is_a_percentage(p):
    checked = MaskOptions(p=p).p
    assert type(checked) is float
    assert checked == float(p)


@pytest.mark.parametrize(
    "p",
    [-1, 101, 100.0000001, -1e-300, math.nan, math.inf, -math.inf, 10**400, "50", None, True, np.True_, 50j, [50]],
    ids=lambda p: repr(p)[:12],
)
def test_p_that_is_none_is_refused(p):
    with pytest.raises(UserError, match=r"p is .*; it must be a number from 0 to 100"):
        MaskOptions(p=p)


# the top set


def test_selections_are_the_ones_that_the_schema_names():
    assert set(SELECTIONS) == set(get_args(Select))


@pytest.mark.parametrize("select", SELECTIONS)
@given(SCORES, PERCENTAGES, PERCENTAGES)
@several
def test_every_selection_is_a_prefix_of_the_ranks_that_grows_with_p(select, scores, p, q):
    rank, share = ranked(scores)
    small, large = (top_blocks(rank, share, each, select) for each in sorted([p, q]))
    assert small.dtype == bool
    assert small.shape == rank.shape
    for top in (small, large):
        assert (np.diff(in_rank_order(rank, top).astype(int)) <= 0).all()
    assert not (small & ~large).any()
    assert not top_blocks(rank, share, 0, select).any()


@pytest.mark.parametrize("select", SELECTIONS)
@given(SCORES, PERCENTAGES)
@several
def test_every_selection_treats_each_image_alone(select, scores, p):
    rank, share = ranked(scores)
    together = top_blocks(rank, share, p, select)
    for i in range(len(scores)):
        np.testing.assert_array_equal(top_blocks(rank[i : i + 1], share[i : i + 1], p, select)[0], together[i])


@given(SCORES, PERCENTAGES)
@several
def test_mass_compares_shares_in_float32(scores, p):
    rank, share = ranked(scores)
    np.testing.assert_array_equal(top_blocks(rank, share, p, "mass"), share < np.array(p / 100, np.float32))


@given(SCORES, st.integers(0, 64))
@several
def test_mass_is_the_smallest_set_that_holds_p_percent(scores, sixty_fourths):
    # a total of 64, so that shares and thresholds are exact in float32
    held = np.maximum(scores, 0)
    scores[:, 0, 0] = 64 - (held.sum(axis=(1, 2)) - held[:, 0, 0])  # at least 64 - 35 * 7: may be negative
    rank, share = ranked(scores)
    top = top_blocks(rank, share, 100 * sixty_fourths / 64, "mass")
    for best, n in zip(in_rank_order(rank, np.maximum(scores, 0)), top.sum(axis=(1, 2)), strict=True):
        needed = best.sum() * sixty_fourths / 64
        if best.sum() == 64:  # otherwise the first block went below 0
            assert best[:n].sum() >= needed
            assert n == 0 or best[: n - 1].sum() < needed


def test_mass_stops_at_the_block_that_completes_p_percent():
    rank, share = ranked(np.array([[[1.0, 2.0, 1.0, 0.0]]]))  # ranks 1 0 2 3, shares 0.5 0 0.75 1
    assert top_blocks(rank, share, 50).tolist() == [[[False, True, False, False]]]
    assert top_blocks(rank, share, 50.1).tolist() == [[[True, True, False, False]]]
    assert top_blocks(rank, share, 75).tolist() == [[[True, True, False, False]]]
    assert top_blocks(rank, share, 1e-3).tolist() == [[[False, True, False, False]]]


@given(SCORES)
@several
def test_mass_at_100_is_the_blocks_with_positive_scores(scores):
    np.testing.assert_array_equal(top_blocks(*ranked(scores), 100, "mass"), scores > 0)


def test_mass_at_100_keeps_a_block_whose_share_would_round_to_one():
    scores = np.array([[[1e6, 2.0**-24, 0.0]]])
    assert top_blocks(*ranked(scores), 100).tolist() == [[[True, True, False]]]


@pytest.mark.parametrize("p", [30, 33.3, 1 / 3, 99.99])
def test_mass_threshold_is_the_float32_of_p(p):
    assert type(mass_threshold(p)) is float
    assert mass_threshold(p) == float(np.float32(p / 100))  # as float64, so that the rounding shows


@given(SCORES, st.decimals(0, 100, places=3))
@several
def test_count_is_the_definition(scores, p):
    rank, share = ranked(scores)
    n_blocks = rank[0].size
    chosen = top_blocks(rank, share, float(p), "count")
    for r, top in zip(rank.ravel().tolist(), chosen.ravel().tolist(), strict=True):
        assert top == (100 * r < Fraction(p) * n_blocks)


@given(SCORES)
@several
def test_count_at_100_is_everything(scores):
    assert top_blocks(*ranked(scores), 100, "count").all()


@pytest.mark.parametrize(
    ("p", "n_blocks", "n_top"),
    [
        (50, 5625, 2813),
        (30, 10_000, 3000),
        (8.8, 5625, 495),  # 8.8 * 5625 is 49500.00000000001 in floating point
        (np.float64(8.8), 5625, 495),
        (1e-9, 5625, 1),
        (100, 65_535, 65_535),  # 100 * rank does not fit the ranks' uint16
        (99.999, 65_536, 65_536),
        (np.uint8(200 // 2), 70_000, 70_000),
    ],
)
def test_count_neither_overflows_nor_rounds(p, n_blocks, n_top):
    assert count_threshold(p, n_blocks) == n_top
    rank = np.arange(n_blocks, dtype=np.uint16 if n_blocks < 65_536 else np.uint32).reshape(1, 1, -1)
    assert top_blocks(rank, np.zeros(rank.shape, np.float32), p, "count").sum() == n_top


@pytest.mark.parametrize(
    ("wrong", "choices"),
    [
        ({"keep": "best"}, ", ".join(KEEPS)),
        ({"select": "area"}, ", ".join(SELECTIONS)),
        ({"fill": "grey"}, ", ".join(FILLS)),
        ({"score": "squared"}, "positive, absolute, signed"),
        ({"order": "reverse"}, "attribution, random"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_are_checked_against_the_registries(wrong, choices):
    right = {"keep": "top", "select": "mass", "score": "signed", "fill": "black", "order": "random"}
    assert MaskOptions(**right)
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is .*one of {choices}$"):
        MaskOptions(**{**right, **wrong})


def test_a_selection_and_a_fill_are_one_function(monkeypatch):
    monkeypatch.setitem(SELECTIONS, "best", lambda rank, share, p: rank == 0)
    monkeypatch.setitem(FILLS, "white", lambda pixels, context: np.full((1, 3, 1, 1), 255, np.uint8))
    assert MaskOptions(fill="white").fill == "white"
    assert visible(*ranked(random_scores(5)), p=50, keep="top", select="best").sum() == 5


# either side


@pytest.mark.parametrize("shuffled", [False, True], ids=["attribution", "random"])
@pytest.mark.parametrize("select", SELECTIONS)
@given(SCORES, PERCENTAGES)
@several
def test_bottom_is_the_complement_of_top(select, shuffled, scores, p):
    rank, share = ranked(scores)
    other = random_ranks([f"image {i}" for i in range(len(rank))], rank.shape[1:]) if shuffled else None
    top, bottom = (visible(rank, share, p=p, keep=keep, select=select, random_rank=other) for keep in KEEPS)
    np.testing.assert_array_equal(top, ~bottom)
    if not shuffled:
        np.testing.assert_array_equal(top, SELECTIONS[select](rank, share, p))


@pytest.mark.parametrize("select", SELECTIONS)
def test_p_0_bottom_is_the_untouched_image(select):
    assert visible(*ranked(random_scores()), p=0, keep="bottom", select=select).all()


def test_p_100():
    scores = random_scores()
    rank, share = ranked(scores)
    np.testing.assert_array_equal(visible(rank, share, p=100, keep="top"), scores > 0)
    np.testing.assert_array_equal(visible(rank, share, p=100), scores <= 0)
    assert visible(rank, share, p=100, keep="top", select="count").all()


def test_an_image_without_positive_scores_has_no_top():
    rank, share = ranked(np.array([[[-1.0, -0.0], [0.0, -2.0]]]))
    for p in (0, 30, 100):
        assert not visible(rank, share, p=p, keep="top").any()
        assert visible(rank, share, p=p, keep="bottom").all()
    assert visible(rank, share, p=50, keep="top", select="count").tolist() == [[[False, True], [True, False]]]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("shuffled", [False, True], ids=["attribution", "random"])
@pytest.mark.parametrize("p", [0, 8.8, 30, 50, 100])
def test_the_same_function_takes_torch_tensors(p, shuffled, select, keep):
    rank, share = ranked(random_scores(4, 75, 75))
    other = random_ranks("abcd", (75, 75)) if shuffled else None
    expected = visible(rank, share, p=p, keep=keep, select=select, random_rank=other)
    of_tensors = visible(
        torch.tensor(rank.astype(np.int32)),
        torch.tensor(share),
        p=p,
        keep=keep,
        select=select,
        random_rank=None if other is None else torch.tensor(other.astype(np.int32)),
    )
    assert of_tensors.dtype == torch.bool
    np.testing.assert_array_equal(of_tensors.numpy(), expected)


# the random order


def random_ranks_by_hand(image_id: str, n_blocks: int, seed: int) -> list[int]:
    """Blocks in the order of the 48-bit numbers that SHAKE-128 gives, low digits of all blocks first."""
    data = hashlib.shake_128(f"igstore order {seed} {image_id}".encode()).digest(6 * n_blocks)
    digits = [int.from_bytes(data[i : i + 2], "little") for i in range(0, len(data), 2)]
    low, middle, high = digits[:n_blocks], digits[n_blocks : 2 * n_blocks], digits[2 * n_blocks :]
    return sorted(range(n_blocks), key=lambda b: (high[b], middle[b], low[b]))


@pytest.mark.parametrize(("n_y", "n_x", "dtype"), [(1, 1, np.uint16), (75, 75, np.uint16), (2, 32_768, np.uint32)])
def test_random_ranks_are_those_of_the_recipe(n_y, n_x, dtype):
    ranks = random_ranks(["ILSVRC2012_val_00000293", "ü/1"], (n_y, n_x), seed=7)
    assert ranks.shape == (2, n_y, n_x)
    assert ranks.dtype == dtype
    for image_id, image_ranks in zip(["ILSVRC2012_val_00000293", "ü/1"], ranks, strict=True):
        assert image_ranks.ravel().tolist() == random_ranks_by_hand(image_id, n_y * n_x, seed=7)


def test_random_ranks_are_permutations_of_their_own():
    ids = [f"ILSVRC2012_val_{i:08d}" for i in range(20)]
    ranks = random_ranks(ids, (7, 9))
    np.testing.assert_array_equal(np.sort(ranks.reshape(20, -1)), np.broadcast_to(np.arange(63), (20, 63)))
    assert len(np.unique(ranks.reshape(20, -1), axis=0)) == 20  # one for each image
    assert (random_ranks(ids, (7, 9), seed=1) != ranks).any(axis=(1, 2)).all()  # and for each seed
    np.testing.assert_array_equal(random_ranks(ids[::-1], (7, 9)), ranks[::-1])  # whatever else is in the batch
    assert random_ranks([], (7, 9)).shape == (0, 7, 9)


def test_random_ranks_are_the_same_in_every_process():
    program = (
        "from igstore.masks.selection import random_ranks; print(random_ranks(['a', 'b'], (3, 4), seed=5).tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert outputs == {f"{random_ranks(['a', 'b'], (3, 4), seed=5).tolist()}\n"}


def test_random_ranks_are_uniform():
    n_images, n_blocks = 2000, 12
    ranks = random_ranks([str(i) for i in range(n_images)], (3, 4)).reshape(n_images, n_blocks)
    counts = np.stack([(ranks == r).sum(axis=0) for r in range(n_blocks)])  # (rank, block)
    expected = n_images / n_blocks
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 180  # 121 degrees of freedom: mean 121, standard deviation 15.6


@pytest.mark.parametrize("select", SELECTIONS)
def test_random_order_shows_as_many_blocks_as_the_attribution_does(select):
    rank, share = ranked(random_scores())
    other = random_ranks(["a", "b", "c"], rank.shape[1:])
    before = np.zeros(rank.shape, bool)
    for p in (0, 10, 30, 50, 70, 90, 100):
        top = visible(rank, share, p=p, keep="top", select=select, random_rank=other)
        sizes = top_blocks(rank, share, p, select).sum(axis=(1, 2))
        assert top.sum(axis=(1, 2)).tolist() == sizes.tolist()
        for image_top, image_other, size in zip(top, other, sizes, strict=True):
            np.testing.assert_array_equal(image_top, image_other < size)
        assert not (before & ~top).any()  # one permutation for every p
        before = top


# fills


def photographs(n: int = 3, height: int = 50, width: int = 64, seed: int = 0) -> np.ndarray:
    """Smooth shapes with noise and black and white corners."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (n, 3, height, width)).astype(np.float64)
    images = scipy.ndimage.gaussian_filter(noise, (0, 0, 6, 6)) * 2 - 127 + rng.normal(0, 20, noise.shape)
    images[:, :, :20, :20], images[:, :, -9:, -20:] = 0, 255
    return images.clip(0, 255).astype(np.uint8)


def context_for(pixels: np.ndarray, seed: int = 0) -> FillContext:
    return FillContext(mean=(0.485, 0.456, 0.406), image_ids=[f"image {i}" for i in range(len(pixels))], seed=seed)


def test_fills_are_the_ones_that_the_schema_names():
    assert set(FILLS) == set(get_args(Fill))


@pytest.mark.parametrize("fill", FILLS)
def test_every_fill_is_uint8_that_broadcasts_to_the_pixels(fill):
    pixels = photographs()
    filled = FILLS[fill](pixels, context_for(pixels))
    assert filled.dtype == np.uint8
    assert np.broadcast_shapes(filled.shape, pixels.shape) == pixels.shape


@pytest.mark.parametrize("fill", FILLS)
def test_every_fill_treats_each_image_alone(fill):
    pixels = photographs(4)
    original = pixels.copy()
    together = np.broadcast_to(FILLS[fill](pixels, context_for(pixels)), pixels.shape)
    np.testing.assert_array_equal(pixels, original)
    for i in range(4):
        context = FillContext(mean=(0.485, 0.456, 0.406), image_ids=[f"image {i}"])
        alone = np.broadcast_to(FILLS[fill](pixels[i : i + 1], context), pixels[i : i + 1].shape)
        np.testing.assert_array_equal(alone[0], together[i])


@pytest.mark.parametrize("fill", FILLS)
def test_every_fill_takes_an_empty_batch(fill):
    pixels = np.empty((0, 3, 8, 8), np.uint8)
    filled = FILLS[fill](pixels, context_for(pixels))
    assert apply(pixels, np.empty((0, 8, 8), bool), filled).shape == pixels.shape


def test_black_is_zero():
    pixels = photographs()
    assert FILLS["black"](pixels, context_for(pixels)).tolist() == [[[[0]], [[0]], [[0]]]]


@pytest.mark.parametrize(
    ("mean", "colour"),
    [
        ((0.485, 0.456, 0.406), [124, 116, 104]),
        ((0.5, 0.5, 0.5), [128, 128, 128]),  # 127.5: halves up
        ((0.0, 1.0, 0.3), [0, 255, 77]),  # 76.5
        ((-0.1, 1.2, 0.1), [0, 255, 26]),  # not colours; 25.5
    ],
    ids=["imagenet", "lite", "ends", "beyond"],
)
def test_mean_is_the_models_mean_colour(mean, colour):
    filled = FILLS["mean"](photographs(2), FillContext(mean=mean, image_ids=["a", "b"]))
    assert filled.tolist() == [[[[value]] for value in colour]]


def test_image_mean_is_the_rounded_mean_of_each_image_and_channel():
    pixels = np.concatenate([photographs(3), np.full((1, 3, 50, 64), 255, np.uint8)])
    filled = FILLS["image_mean"](pixels, context_for(pixels))
    assert filled.shape == (4, 3, 1, 1)
    for i, c in np.ndindex(4, 3):
        mean = Fraction(int(pixels[i, c].astype(np.int64).sum()), 50 * 64)
        assert filled[i, c].item() == math.floor(mean + Fraction(1, 2))


def test_image_mean_rounds_halves_up():
    pixels = np.array([[[[0, 1]], [[1, 2]], [[254, 255]]]], np.uint8)
    assert FILLS["image_mean"](pixels, context_for(pixels)).ravel().tolist() == [1, 2, 255]


@pytest.mark.parametrize(("height", "width"), [(50, 64), (224, 224), (101, 83), (7, 5), (1, 1)])
def test_blur_is_scipys_gaussian(height, width):
    pixels = photographs(2, height, width)
    blurred = FILLS["blur"](pixels, context_for(pixels))
    expected = scipy.ndimage.gaussian_filter(pixels.astype(np.float64), (0, 0, 10, 10), mode="nearest", truncate=4)
    # rounding to a whole number, and weights rounded to 2**-22: 2 axes * 162 half units * 255 < 0.01
    assert abs(blurred - expected).max() < 0.51
    assert (blurred == np.floor(expected + 0.5)).mean() > 0.99


@pytest.mark.parametrize("value", [0, 1, 128, 255])
def test_blur_leaves_a_plain_image_alone(value):
    pixels = np.full((1, 3, 45, 30), value, np.uint8)
    np.testing.assert_array_equal(FILLS["blur"](pixels, context_for(pixels)), pixels)


def test_blur_does_not_depend_on_the_order_of_addition():
    pixels = photographs(1, 90, 70)[0]
    blurred = gaussian_blur(pixels)
    np.testing.assert_array_equal(gaussian_blur(pixels[:, ::-1]), blurred[:, ::-1])
    np.testing.assert_array_equal(gaussian_blur(pixels[..., ::-1]), blurred[..., ::-1])
    np.testing.assert_array_equal(gaussian_blur(pixels.swapaxes(1, 2)), blurred.swapaxes(1, 2))
    np.testing.assert_array_equal(gaussian_blur(pixels[1]), blurred[1])


def test_noise_is_that_of_the_recipe():
    pixels = photographs(2, 5, 4)
    filled = FILLS["noise"](pixels, context_for(pixels, seed=3))
    for i in range(2):
        expected = hashlib.shake_128(f"igstore noise 3 image {i}".encode()).digest(60)
        assert filled[i].tobytes() == expected


def test_noise_is_uniform_and_depends_on_the_seed_and_the_image_alone():
    pixels = photographs(2, 224, 224)
    filled = FILLS["noise"](pixels, context_for(pixels))
    counts = np.bincount(filled.ravel(), minlength=256)
    chi_square = ((counts - filled.size / 256) ** 2 / (filled.size / 256)).sum()
    assert chi_square < 370  # 255 degrees of freedom: mean 255, standard deviation 22.6
    correlation = np.corrcoef(filled.reshape(6, -1))  # of images and channels
    assert abs(correlation - np.eye(6)).max() < 0.03  # 6.7 standard deviations of 1 / sqrt(224 * 224)
    np.testing.assert_array_equal(FILLS["noise"](255 - pixels, context_for(pixels)), filled)
    assert (FILLS["noise"](pixels, context_for(pixels, seed=1)) == filled).mean() < 0.01


def test_noise_needs_an_id_for_each_image():
    with pytest.raises(ValueError, match="longer"):
        FILLS["noise"](photographs(2), FillContext(mean=(0, 0, 0), image_ids=["a"]))


# masked pixels


@pytest.mark.parametrize("fill", FILLS)
@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=5)
def test_apply_is_where(fill, seed):
    pixels = photographs(3, 20, 25, seed)
    visible = np.random.default_rng(seed).random((3, 20, 25)) < 0.5
    original = pixels.copy()
    filled = FILLS[fill](pixels, context_for(pixels))
    masked = apply(pixels, visible, filled)
    assert masked.dtype == np.uint8
    np.testing.assert_array_equal(masked, np.where(visible[:, np.newaxis], pixels, filled))
    np.testing.assert_array_equal(pixels, original)


def test_apply_is_exact_for_every_pair_of_values():
    pixels, filled = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    pixels, filled = pixels[np.newaxis, np.newaxis], filled[np.newaxis, np.newaxis]
    np.testing.assert_array_equal(apply(pixels, np.ones((1, 256, 256), bool), filled), pixels)
    np.testing.assert_array_equal(apply(pixels, np.zeros((1, 256, 256), bool), filled), filled)


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_apply_refuses_a_fill_that_is_not_uint8(dtype):
    with pytest.raises(TypeError):
        apply(photographs(1), np.ones((1, 50, 64), bool), np.zeros((1, 3, 1, 1), dtype))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("p", [0, 30, 50, 90, 100])
@pytest.mark.parametrize("side", [224, 240, 260, 299])
def test_from_maps_to_masked_pixels(side, p, keep):
    maps = (np.random.default_rng(side).standard_t(2, (1, side, side)) / 50).clip(-1.9, 1.9).astype(np.float16)
    pixels = photographs(1, side, side)
    rank, share = ranked(block_sums(maps))
    mask = expand(visible(rank, share, p=p, keep=keep), side, side)
    masked = apply(pixels, mask, FILLS["black"](pixels, context_for(pixels)))

    n = math.ceil(side / 3)
    padded = np.pad(np.maximum(maps[0].astype(np.float64), 0), (0, 3 * n - side))
    scores = padded.reshape(n, 3, n, 3).sum(axis=(1, 3)).ravel()
    order = np.argsort(-scores, kind="stable")
    held = np.cumsum(scores[order]) - scores[order]
    top = np.zeros(n * n, bool)
    top[order] = ((held / scores.sum()).astype(np.float32) < np.float32(p / 100)) & (scores[order] > 0)
    top = np.kron(top.reshape(n, n), np.ones((3, 3), bool))[:side, :side]
    expected = pixels * (top if keep == "top" else ~top)
    np.testing.assert_array_equal(masked, expected)
    if (p, keep) == (0, "bottom"):
        np.testing.assert_array_equal(masked, pixels)
