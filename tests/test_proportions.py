from __future__ import annotations

import math
from fractions import Fraction

import pytest
from scipy.stats import binomtest

from igstore.errors import UserError
from igstore.reporting.proportions import mcnemar_p, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 1), (1, 1), (0, 300), (3, 300), (124, 300), (300, 300), (37325, 50000)]
)
def test_wilson_interval_is_scipys(successes: int, n: int) -> None:
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    # both are closed forms in float64
    assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), rel=1e-12, abs=1e-15)


def test_wilson_bounds_are_the_proportions_that_a_score_test_just_rejects() -> None:
    for bound in wilson_interval(41, 300):
        deviation = abs(41 / 300 - bound) / math.sqrt(bound * (1 - bound) / 300)
        assert math.erfc(deviation / math.sqrt(2)) == pytest.approx(0.05, rel=1e-9)


def test_wilson_interval_touches_0_and_1_exactly() -> None:
    assert wilson_interval(0, 77)[0] == 0
    assert wilson_interval(77, 77)[1] == 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_what_is_not_a_proportion(successes: int, n: int) -> None:
    with pytest.raises(UserError, match="not a proportion"):
        wilson_interval(successes, n)


def binomial_tail(only_first: int, only_second: int) -> float:
    """The definition, in whole numbers."""
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


@pytest.mark.parametrize(
    ("only_first", "only_second"), [(0, 0), (1, 0), (0, 6), (4, 4), (5, 4), (3, 79), (79, 3), (0, 900), (1000, 1100)]
)
def test_mcnemar_is_the_binomial_test_of_the_images_that_differ(only_first: int, only_second: int) -> None:
    assert mcnemar_p(only_first, only_second) == pytest.approx(binomial_tail(only_first, only_second), rel=1e-10)


def test_mcnemar_with_the_counts_of_a_whole_validation_set() -> None:
    # scipy's binomtest sums another way
    assert mcnemar_p(4800, 5100) == pytest.approx(binomtest(4800, 9900).pvalue, rel=1e-9)


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(UserError, match="not counts"):
        mcnemar_p(-1, 3)
