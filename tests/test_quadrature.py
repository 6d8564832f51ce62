from __future__ import annotations

import numpy as np
import pytest
from captum.attr._utils.approximation_methods import approximation_parameters

from igstore.attribution import METHODS, rule
from igstore.errors import UserError

# What each rule integrates without error: the largest degree of polynomial, by its textbook definition.
EXACT_DEGREE = {
    "riemann_right": 0,
    "riemann_left": 0,
    "riemann_middle": 1,
    "riemann_trapezoid": 1,
    "gausslegendre": 15,  # 2m - 1 for m = 8
    "quadratic_midpoint": 0,
    "logarithmic_midpoint": 0,
}
# Halving the step divides the error by 2**order for smooth integrands.
ORDER = {
    "riemann_right": 1,
    "riemann_left": 1,
    "riemann_middle": 2,
    "riemann_trapezoid": 2,
    "quadratic_midpoint": 2,
    "logarithmic_midpoint": 2,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("m", [2, 7, 50])
def test_weights_are_a_mean_and_nodes_lie_on_the_path_in_order(method, m):
    alphas, weights = rule(method, m)
    assert alphas.shape == weights.shape == (m,)
    assert alphas.dtype == weights.dtype == np.float64
    assert (weights > 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-13)
    assert (np.diff(alphas) > 0).all()
    assert alphas[0] >= 0
    assert alphas[-1] <= 1


@pytest.mark.parametrize("method", METHODS)
def test_polynomials_are_integrated_exactly_up_to_the_rules_degree_and_no_further(method):
    alphas, weights = rule(method, 8)
    degree = EXACT_DEGREE[method]
    for power in range(degree + 1):
        assert weights @ alphas**power == pytest.approx(1 / (power + 1), abs=1e-13)
    assert abs(weights @ alphas ** (degree + 1) - 1 / (degree + 2)) > 1e-13


@pytest.mark.parametrize("method", ORDER)
def test_the_error_falls_with_the_rules_order(method):
    def error(m: int) -> float:
        alphas, weights = rule(method, m)
        return abs(weights @ np.exp(alphas) - (np.e - 1))

    # the trapezoid has m - 1 intervals for m points
    extra = 1 if method == "riemann_trapezoid" else 0
    assert error(128 + extra) / error(64 + extra) == pytest.approx(2.0 ** -ORDER[method], rel=0.05)


@pytest.mark.parametrize("method", ["riemann_right", "riemann_left", "riemann_middle", "gausslegendre"])
def test_captum_has_the_same_rule(method):
    step_sizes, captum_alphas = approximation_parameters(method)
    alphas, weights = rule(method, 50)
    np.testing.assert_allclose(alphas, captum_alphas(50), atol=1e-15)
    np.testing.assert_allclose(weights, step_sizes(50), atol=1e-15)


def test_the_logarithmic_rule_has_the_midpoints_and_widths_of_a_logarithmic_scale():
    edges = np.geomspace(0.08, 1.08, 13) - 0.08
    alphas, weights = rule("logarithmic_midpoint", 12)
    np.testing.assert_allclose(weights, np.diff(edges), atol=1e-15)
    np.testing.assert_allclose(alphas + 0.08, np.sqrt((edges[:-1] + 0.08) * (edges[1:] + 0.08)), atol=1e-15)


def test_the_points_of_the_right_hand_rule_are_nested():
    coarse, fine = rule("riemann_right", 25)[0], rule("riemann_right", 50)[0]
    assert set(coarse) <= set(fine)


@pytest.mark.parametrize(
    ("method", "m", "says"),
    [("simpson", 8, "riemann_right"), ("riemann_right", 0, "at least 1"), ("riemann_trapezoid", 1, "at least 2")],
)
def test_a_wrong_rule_is_refused_with_the_choices(method, m, says):
    with pytest.raises(UserError, match=says):
        rule(method, m)
