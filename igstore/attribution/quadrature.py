"""Quadrature rules on [0, 1]: where Integrated Gradients evaluates the gradient, and with which weight. NumPy only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from igstore.errors import UserError, option
from igstore.schema import LearnedRule, check_choice, whole_number

Nodes = tuple[NDArray[np.float64], NDArray[np.float64]]


def _riemann_right(m: int) -> Nodes:
    """h/m for h = 1..m: the article's rule. The points for m are among those for 2m."""
    return np.arange(1, m + 1) / m, np.full(m, 1 / m)


def _riemann_left(m: int) -> Nodes:
    return np.arange(m) / m, np.full(m, 1 / m)


def _riemann_middle(m: int) -> Nodes:
    return (np.arange(m) + 0.5) / m, np.full(m, 1 / m)


def _riemann_trapezoid(m: int) -> Nodes:
    """The textbook composite trapezoid on m points, the end points weighing half."""
    if m < 2:
        raise UserError(f"riemann_trapezoid needs {option('n_steps')} of at least 2, for both end points; it is {m}")
    weights = np.full(m, 1 / (m - 1))
    weights[[0, -1]] /= 2
    return np.linspace(0, 1, m), weights


def _gausslegendre(m: int) -> Nodes:
    """Gauss-Legendre, exact for polynomials up to degree 2m-1, moved from [-1, 1] to [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(m)
    return (nodes + 1) / 2, weights / 2


def _quadratic_midpoint(m: int) -> Nodes:
    """Midpoints in u of alpha = u^2, weights the widths of the intervals in alpha: dense near the baseline.

    Most of a classifier's change happens there, so fewer steps give the same masks.
    """
    h = np.arange(m)
    return ((h + 0.5) / m) ** 2, (2 * h + 1) / m**2


# Of `_logarithmic_midpoint`. Gradients of EfficientNet-Lite0 on photographs change as fast as this density of points
# supposes; from 0.05 to 0.12 the masks are as good.
_OFFSET = 0.08


def _logarithmic_midpoint(m: int) -> Nodes:
    """Midpoints in u of alpha + 0.08 = 0.08 * 13.5^u, weights the widths of the intervals in alpha.

    Their density is that of 1 / (alpha + 0.08): close to the baseline an image changes little in brightness but much in
    proportion, and the gradient changes with the proportion. Very close it does not, so points there are spared.
    """

    def alpha(u: NDArray[np.float64]) -> NDArray[np.float64]:
        path: NDArray[np.float64] = _OFFSET * ((1 + 1 / _OFFSET) ** u - 1)
        return path

    h = np.arange(m + 1)
    return alpha((h[:-1] + 0.5) / m), np.diff(alpha(h / m))


METHODS: dict[str, Callable[[int], Nodes]] = {
    "riemann_right": _riemann_right,
    "riemann_left": _riemann_left,
    "riemann_middle": _riemann_middle,
    "riemann_trapezoid": _riemann_trapezoid,
    "gausslegendre": _gausslegendre,
    "quadratic_midpoint": _quadratic_midpoint,
    "logarithmic_midpoint": _logarithmic_midpoint,
}


_MOST_STEPS = 2**24


def rule(method: str | LearnedRule, n_steps: int) -> Nodes:
    """Nodes alpha in [0, 1] and weights of a quadrature rule, both float64 of shape (n_steps,), alpha ascending.

    Parameters
    ----------
    method
        A name in `METHODS`, or a learned rule.
    n_steps
        Number of gradient evaluations, at least 1 (2 for ``riemann_trapezoid``). A learned rule has its own.

    Raises
    ------
    UserError
        Unknown method, too few steps for it, or not as many as the learned rule has.

    Examples
    --------
    >>> rule("riemann_right", 4)
    (array([0.25, 0.5 , 0.75, 1.  ]), array([0.25, 0.25, 0.25, 0.25]))
    """
    if isinstance(method, LearnedRule):
        if n_steps != len(method.nodes):
            raise UserError(
                f"{option('n_steps')} is {n_steps!r:.80}, and the learned rule has {len(method.nodes)} nodes"
            )
        return np.array(method.nodes), np.array(method.weights)
    check_choice("method", method, METHODS)
    return METHODS[method](whole_number("n_steps", n_steps, 1, _MOST_STEPS))
