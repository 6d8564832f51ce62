"""How sure a measured accuracy is: an interval for one proportion, a test for two of the same images."""

from __future__ import annotations

import math

from scipy.special import bdtr

from igstore.errors import UserError

_Z = 1.959963984540054  # of a standard normal variable, 95% lie within +-z


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95% interval of a proportion, by Wilson's score method, which also holds near 0 and 1.

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927: the proportions that a score
    test at 5% does not reject, given what was observed.

    Parameters
    ----------
    successes
        0 to `n`.
    n
        Independent trials, at least 1.

    Returns
    -------
    (low, high), from 0 to 1.

    Raises
    ------
    UserError
        The numbers are not such counts.

    >>> low, high = wilson_interval(0, 100)
    >>> f"{low:.4f} {high:.4f}"
    '0.0000 0.0370'
    """
    if not 0 <= successes <= n or n < 1:
        raise UserError(f"{successes} of {n} is not a proportion; it takes at least one trial, and 0 to all successes")
    centre = successes + _Z**2 / 2
    reach = _Z * math.sqrt(successes * (n - successes) / n + _Z**2 / 4)
    low = 0.0 if successes == 0 else (centre - reach) / (n + _Z**2)
    high = 1.0 if successes == n else (centre + reach) / (n + _Z**2)
    return low, high


def mcnemar_p(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of McNemar's test: whether two ways to classify the same images are equally good.

    Images that both get right, or both wrong, say nothing about it. If the two were equally good, each of the others
    would be right under the first with probability 1/2: the p-value is that of the binomial distribution.

    Parameters
    ----------
    only_first, only_second
        How many images are right under the first alone, and under the second alone.

    Returns
    -------
    0 to 1; 1 where they never differ.

    Raises
    ------
    UserError
        A count is negative.
    """
    if only_first < 0 or only_second < 0:
        raise UserError(f"{only_first} and {only_second} are not counts of images")
    tail = bdtr(float(min(only_first, only_second)), only_first + only_second, 0.5)
    return min(1.0, 2 * float(tail))
