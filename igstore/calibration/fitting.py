"""Choosing the nodes and weights of a quadrature rule by least squares. NumPy only.

A rule with the weights w at some of the dense points misses the reference by ``c - 2 w.z + w'Kw`` on average: K is the
mean of the profiles' Gram matrices, z their inner products with the reference, and c the reference's own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_RIDGE = 1e-12  # of the largest diagonal element: maps at neighbouring points may be the same
_STARTS = 10
_MOST_PASSES = 50


def fit_rule(gram: Floats, reference: Floats, n_nodes: int) -> tuple[NDArray[np.intp], Floats]:
    """The `n_nodes` points, and their weights, whose sum of maps is closest to the reference.

    Points are chosen at random, and each is exchanged for the best other one as long as that helps. This is done a few
    times, and the best of all kept; the same arguments give the same rule. A path along which the maps do not change
    counts as much as all the images together, and the weights add up to 1, so that it is integrated exactly.

    Parameters
    ----------
    gram
        float64 (point, point), the mean over some images.
    reference
        float64 (point,): the weights with which all points make the reference.
    n_nodes
        At most as many as there are points.

    Returns
    -------
    places, weights
        Indices of points, ascending, and float64, both (n_nodes,).
    """
    gram = gram + 1  # the Gram matrix of a path without change
    gram += _RIDGE * gram.diagonal().max() * np.eye(len(gram))
    with_reference = gram @ reference
    generator = np.random.default_rng(0)
    starts = [generator.choice(len(gram), n_nodes, replace=False).tolist() for _ in range(_STARTS)]
    _, chosen = max(_exchanged(gram, with_reference, start) for start in starts)
    places = np.sort(chosen)
    weights = np.linalg.solve(gram[np.ix_(places, places)], with_reference[places])
    return places, weights / weights.sum()


def _exchanged(gram: Floats, with_reference: Floats, chosen: list[int]) -> tuple[float, list[int]]:
    """How much of the reference's square the points explain that exchanges, one by one, lead to; and those points."""
    best = 0.0
    for _ in range(_MOST_PASSES):
        before = best
        for place in range(len(chosen)):
            others = chosen[:place] + chosen[place + 1 :]
            explained = _explained(gram, with_reference, others)
            better = int(explained.argmax())
            if explained[better] > best * (1 + 1e-9):
                chosen, best = [*others[:place], better, *others[place:]], float(explained[better])
        if best == before:
            break
    return best, chosen


def _explained(gram: Floats, with_reference: Floats, chosen: list[int]) -> Floats:
    """How much of the reference's square the chosen points explain together with each other point; (point,)."""
    if not chosen:
        return np.asarray(with_reference**2 / gram.diagonal())
    root = np.linalg.cholesky(gram[np.ix_(chosen, chosen)])
    solved = np.linalg.solve(root, np.column_stack([gram[chosen], with_reference[chosen]]))
    parts, own = solved[:, :-1], solved[:, -1]
    left = gram.diagonal() - (parts**2).sum(axis=0)  # of each point's square, beside the chosen points
    new = left > 1e-9 * gram.diagonal()
    gain = np.zeros(len(gram))
    np.divide((with_reference - own @ parts) ** 2, left, out=gain, where=new)
    gain[chosen] = -np.inf  # once is enough
    return np.asarray(own @ own + gain)
