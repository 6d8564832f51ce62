"""The charts of an evaluation, and of the maps behind it. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from igstore.evaluation import KEEPS, Case, Findings, Row
from igstore.reporting.charts import LOOKS, Chart, Panel, Series, look_in_turn

P, TOP1, VISIBLE = "p", "top-1 accuracy (%)", "pixels visible (%)"

_LEVELS = np.arange(0.5, 100, 0.5)  # percent of the images: where the curves of completeness errors have their points


def accuracy_by_p(cases: Sequence[Case], name: str) -> Chart:
    """Accuracy at every p, of both sides and of as many blocks at random, with Wilson's 95% bands."""
    every_p = sorted({row.p for case in cases for row in case.rows})
    limits = max(0.0, every_p[0] - 5), min(100.0, every_p[-1] + 5)
    panels = []
    for case in cases:
        sides = (
            ("top p%", "top", case.side("top")),
            ("all but the top p%", "bottom", case.side("bottom")),
            ("as many as top, at random", "random top", case.side("top", "random")),
            ("as many as the rest, at random", "random bottom", case.side("bottom", "random")),
        )
        series = [_accuracies(label, look, list(side.values()), list(side)) for label, look, side in sides if side]
        panels.append(Panel(case.label, [*series, _unmasked(case, limits)]))
    ticks = every_p if len(every_p) <= 10 else None
    return Chart(name=name, x_label=P, y_label=TOP1, panels=panels, x_limits=limits, x_ticks=ticks)


def accuracy_by_visible(cases: Sequence[Case], name: str) -> Chart:
    """Accuracy against the pixels that are visible: which of them are worth most, number for number."""
    panels = []
    for case in cases:
        sides = (
            ("the most important", "top", [*case.side("top").values()]),
            ("the least important", "bottom", [*case.side("bottom").values()]),
            ("at random", "random", [row for keep in KEEPS for row in case.side(keep, "random").values()]),
        )
        ordered = ((label, look, sorted(rows, key=lambda row: row.visible)) for label, look, rows in sides if rows)
        series = [_accuracies(label, look, rows, [row.visible for row in rows]) for label, look, rows in ordered]
        panels.append(Panel(case.label, [*series, _unmasked(case, (0, 100))]))
    return Chart(name=name, x_label=VISIBLE, y_label=TOP1, panels=panels, x_limits=(0, 100))


def _accuracies(label: str, look: str, rows: Sequence[Row], x: Sequence[float]) -> Series:
    return Series(
        label=label,
        look=LOOKS[look],
        x=x,
        y=[row.top1 for row in rows],
        low=[row.low for row in rows],
        high=[row.high for row in rows],
    )


def _unmasked(case: Case, x: tuple[float, float]) -> Series:
    accuracy = case.rows[0].original_top1
    return Series(label="unmasked", look=LOOKS["reference"], x=x, y=(accuracy, accuracy))


def visible_by_p(findings: Findings, cases: Sequence[Case], name: str) -> Chart:
    """Pixels left visible at every p: the mean over images, and the band of the middle half; a panel for each store."""
    titles = {row.store_settings_sha256: label for label, row in findings.stores.items()}
    panels: dict[str, Panel] = {}
    for case in cases:
        store = case.rows[0].store_settings_sha256
        if store in panels:  # another model that was shown the same masks
            continue
        series = []
        for keep, label in zip(KEEPS, ("top p%", "all but the top p%"), strict=True):
            side = case.side(keep)
            if side:
                percents = 100 * findings.outcome(list(side.values())).visible.astype(np.float64)  # (p, image)
                low, high = np.quantile(percents, (0.25, 0.75), axis=1).tolist()
                mean = [row.visible for row in side.values()]
                series.append(Series(label=label, look=LOOKS[keep], x=list(side), y=mean, low=low, high=high))
        series.append(Series(label="p% of the pixels", look=LOOKS["reference"], x=(0, 100), y=(0, 100)))
        panels[store] = Panel(titles[store], series)
    return Chart(name=name, x_label=P, y_label=VISIBLE, panels=list(panels.values()), x_limits=(0, 100))


def completeness(findings: Findings, name: str) -> Chart:
    """How many images have a completeness error of at most so much; a line for each store that was not imported."""
    every = {
        label: np.quantile(findings.completeness(row)[0], _LEVELS / 100, method="inverted_cdf").astype(np.float64)
        for label, row in findings.integrated.items()
    }
    is_log = any(((quantiles > 0) & np.isfinite(quantiles)).any() for quantiles in every.values())
    series = []
    for turn, (label, quantiles) in enumerate(every.items()):
        drawn = np.isfinite(quantiles) & ((quantiles > 0) | (not is_log))  # a logarithmic axis has no place for 0
        series.append(
            Series(label=label, look=look_in_turn(turn), x=quantiles[drawn].tolist(), y=_LEVELS[drawn].tolist())
        )
    return Chart(
        name=name,
        x_label="completeness error",
        y_label="images with at most this error (%)",
        panels=[Panel("", series)],
        x_is_log=is_log,
    )
