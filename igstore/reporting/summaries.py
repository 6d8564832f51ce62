"""The tables of a report beside the article's own: at a glance, side against side, class by class, and the effort."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from igstore.evaluation import KEEPS, Case, Findings, Line, Row, Table, images_of, percent
from igstore.schema import Keep

_FEW = 5  # classes listed at either end


def at_a_glance(cases: Iterable[Case]) -> Table | None:
    """Both sides, and as many blocks at random, at the middle p, for cases of the same masks; None without a p."""
    cases = [case for case in cases if case.both_sides]
    every_p = sorted({p for case in cases for p in case.both_sides})
    if not every_p:
        return None
    p = 50.0 if 50 in every_p else every_p[len(every_p) // 2]
    groups = []
    for case in cases:
        line = [case.label, percent(case.rows[0].original_top1, case.rows[0].n)]
        for keep in KEEPS:
            own, random = (case.side(keep, order).get(p) for order in ("attribution", "random"))
            line += [_top1(own), _top1(random), percent(own.visible, own.n) if own else ""]
        groups.append((tuple(line),))
    header = ("model", "unmasked", f"top {p:g}%", "random", "visible", "the rest", "random", "visible")
    images = images_of([row for case in cases for row in case.rows])
    note = f"{cases[0].masks} Random: as many blocks, in a random order. Visible: share of the pixels."
    return Table(f"Top-1 accuracy (%) at p={p:g}, {images}", note, header, tuple(groups))


def _top1(row: Row | None) -> str:
    return percent(row.top1, row.n) if row else ""


def sides(case: Case) -> Table | None:
    """How many images are right from both sides, from one alone, and from neither, at every p."""
    groups: list[tuple[Line, ...]] = []
    for p, rows in reversed(case.both_sides.items()):
        only_top, only_bottom = rows["top"].only_this or 0, rows["bottom"].only_this or 0
        both = rows["top"].correct - only_top
        neither = rows["top"].n - both - only_top - only_bottom
        groups.append(((f"p={p:g}", *(str(count) for count in (both, only_top, only_bottom, neither))),))
    if not groups:
        return None
    header = ("images right from", "both sides", "top alone", "bottom alone", "neither")
    return Table("Side against side, image by image", images_of(case.rows), header, tuple(groups))


def classes(findings: Findings, case: Case, keep: Keep) -> Table | None:
    """The classes that do best and worst on one side of the cut; None where there are not two to compare."""
    if not case.side(keep):
        return None
    counts = findings.by_class(case, keep)
    enough = -(-int(counts.images.max()) // 2)  # of fewer images an accuracy says little
    places = np.flatnonzero(counts.images >= enough)
    if len(places) < 2:
        return None
    masked, unmasked = 100 * counts.correct / counts.images, 100 * counts.unmasked / counts.images
    # best first; of those alike, the one that had less to lose
    places = places[np.lexsort((places, unmasked[places], -masked[:, places].mean(axis=0)))]
    few = min(_FEW, len(places) // 2)

    def line(place: int) -> Line:
        n = int(counts.images[place])
        accuracies = (percent(float(value), n) for value in (unmasked[place], *masked[::-1, place]))
        return (findings.class_name(int(counts.classes[place])), str(n), *accuracies)

    best, worst = ([line(place) for place in end.tolist()] for end in (places[:few], places[-few:]))
    between = [("…", *[""] * (len(best[0]) - 1))] if len(places) > 2 * few else []
    done = {"top": "only the important pixels are shown", "bottom": "the important pixels are hidden"}[keep]
    return Table(
        f"Classes that do best and worst where {done} (keep {keep})",
        f"Top-1 accuracy (%), in order of its mean over p; of the {len(places)} classes with at least {enough} "
        f"{'image' if enough == 1 else 'images'}.",
        ("class", "images", "unmasked", *(f"p={p:g}" for p in reversed(case.side(keep)))),
        tuple((one,) for one in [*best, *between, *worst]),
    )


def effort(findings: Findings) -> Table:
    """For each store that was not imported, its completeness errors and the gradient evaluations spent on its maps."""
    groups = []
    for label, row in findings.integrated.items():
        errors, steps = findings.completeness(row)
        median, most = np.quantile(errors, (0.5, 0.9), method="inverted_cdf")
        values, counts = np.unique(steps, return_counts=True)
        shares = [
            f"{value} ({percent(100 * count / len(steps), len(steps))}%)"
            for value, count in zip(values, counts, strict=True)
        ]
        line = (
            label,
            row.method.replace("_", " "),
            f"{len(errors)}",
            f"{median:.3f}",
            f"{most:.3f}",
            f"{percent(100 * float((errors <= 0.05).mean()), len(errors))}%",
            ", ".join(shares) if len(values) > 1 else f"{values[0]}",
            f"{int(steps.sum(dtype=np.int64)):,}",
        )
        groups.append((line,))
    return Table(
        "Completeness errors of the maps, and what they cost",
        "The sum of a map should be the output on the image minus the output on the baseline; the error is by how much "
        "it is not, relatively. A step is one gradient evaluation.",
        ("store", "rule", "images", "median error", "90% below", "within 5%", "steps", "gradient evaluations"),
        tuple(groups),
    )
