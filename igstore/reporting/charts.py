"""A chart: its numbers, and from them a drawing for a page, a picture, and a table. Needs matplotlib, and no torch."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from igstore.cli import csv_text, printable
from igstore.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, RULE = "#1b1d1f", "#d4d7da"

_PNG_DPI = 160
_BAND_OPACITY = 0.16
_LETTERS_PER_INCH = 12  # of a legend, whose lines and gaps are worth 8 letters a column


@dataclass(frozen=True)
class Look:
    """How a series is drawn: colour, line and marker each tell it from the others, for whom one of them is lost."""

    colour: str
    line: Any = "-"
    marker: str = ""
    width: float = 1.8


# The colours are Okabe and Ito's, which colour-blind readers tell apart.
LOOKS = {
    "top": Look("#d55e00", "-", "o"),
    "bottom": Look("#0072b2", (0, (6, 2)), "s"),
    "random": Look("#6f7378", (0, (1, 1.5)), "D"),
    "random top": Look("#6f7378", (0, (1, 1.5)), "^"),
    "random bottom": Look("#6f7378", (0, (5, 1.5, 1, 1.5)), "v"),
    "reference": Look(INK, (0, (8, 3)), width=1.1),
}

_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LINES = ("-", (0, (6, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


def look_in_turn(turn: int) -> Look:
    """A look for what has no meaning of its own: the first sixteen differ, the first four in both colour and line."""
    return Look(_COLOURS[turn % 4], _LINES[(turn + turn // 4) % 4])


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points joined by a line.

    Attributes
    ----------
    label
        Its name in the legend; series of one label look the same in every panel.
    look
        How it is drawn.
    x, y
        The points.
    low, high
        A band about them, or None.
    """

    label: str
    look: Look
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """What is drawn in one pair of axes."""

    title: str
    series: Sequence[Series]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Panels beside each other, on the same axes.

    Attributes
    ----------
    name
        A file name without its ending.
    x_label, y_label
        What the axes show, and the names of those columns in the table.
    y_limits
        From and to.
    x_limits
        From and to; None follows the points.
    x_ticks
        Where the x axis is labelled; None leaves it to the drawing.
    x_is_log
        Whether the x axis is logarithmic.
    """

    name: str
    x_label: str
    y_label: str
    panels: Sequence[Panel]
    y_limits: tuple[float, float] = (0, 100)
    x_limits: tuple[float, float] | None = None
    x_ticks: Sequence[float] | None = None
    x_is_log: bool = False

    def csv(self) -> str:
        """Every point of the chart: panel, series, x, y, and the band's ends where there is one."""
        lines: list[list[object]] = []
        for panel in self.panels:
            for series in panel.series:
                empty = [""] * len(series.x)
                columns = (series.x, series.y, series.low or empty, series.high or empty)
                lines += [[panel.title, series.label, *point] for point in zip(*columns, strict=True)]
        return csv_text(["panel", "series", self.x_label, self.y_label, "low", "high"], lines)

    def png(self) -> bytes:
        """A picture on white."""
        data = io.BytesIO()
        with _style(self.name):
            self._figure.savefig(data, format="png", dpi=_PNG_DPI, facecolor="white")
        return data.getvalue()

    def svg(self) -> str:
        """An ``<svg>`` element for a page, which sets its colours: ``currentColor``, ``--rule``, ``--c-d55e00`` ..."""
        data = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with _style(self.name):
            self._figure.savefig(data, format="svg", transparent=True, metadata=nothing)
        return _for_page(data.getvalue(), self.name)

    @cached_property
    def _figure(self) -> Figure:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        columns = min(len(self.panels), 2 if len(self.panels) in (2, 4) else 3)
        rows = -(-len(self.panels) // columns)
        width, height = {1: (7.0, 3.9), 2: (8.6, 3.4), 3: (10.0, 3.0)}[columns]
        figure = Figure(figsize=(width, 0.5 + rows * height), layout=ConstrainedLayoutEngine(wspace=0.04))
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, panel in zip(grid, self.panels, strict=False):
            self._draw_panel(axes, panel)
        for axes in grid[len(self.panels) :]:
            axes.set_axis_off()
        for place, axes in enumerate(grid[: len(self.panels)]):
            if place + columns >= len(self.panels):
                axes.set_xlabel(self.x_label)
                axes.tick_params(labelbottom=True)
            if place % columns == 0:
                axes.set_ylabel(self.y_label)
        handles = {line.get_label(): line for axes in grid for line in axes.get_lines()}
        columns = min(4, max(1, int(width * _LETTERS_PER_INCH / (8 + max(map(len, handles))))))
        figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=columns, frameon=False)
        return figure

    def _draw_panel(self, axes: Axes, panel: Panel) -> None:
        for series in panel.series:
            look = series.look
            if series.low is not None and series.high is not None:
                axes.fill_between(series.x, series.low, series.high, color=look.colour, alpha=_BAND_OPACITY, lw=0)
            axes.plot(
                series.x,
                series.y,
                color=look.colour,
                ls=look.line,
                lw=look.width,
                marker=look.marker,
                label=printable(series.label),
                clip_on=False,
            )
        axes.set_title(printable(panel.title) if len(self.panels) > 1 else "", loc="left")
        axes.set_ylim(*self.y_limits)
        if self.x_is_log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        if self.x_limits:
            axes.set_xlim(*self.x_limits)
        if self.x_ticks is not None:
            axes.set_xticks(self.x_ticks)


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """matplotlib's own defaults, whatever this machine's are, and ours over them; `salt` makes the drawing's ids."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError("the figures need matplotlib; install it with `pip install 'igstore[report]'`") from None
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "font.size": 10,
                "axes.titlesize": 10,
                "axes.edgecolor": INK,
                "axes.labelcolor": INK,
                "axes.grid": True,
                "axes.axisbelow": True,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "grid.color": RULE,
                "grid.linewidth": 0.7,
                "legend.handlelength": 3.2,
                "lines.markersize": 5.5,
                "svg.fonttype": "none",
                "svg.hashsalt": salt,
                "text.color": INK,
                "text.parse_math": False,  # names of models are not formulas
                "xtick.color": INK,
                "ytick.color": INK,
            }
        )
        yield


def _for_page(svg: str, name: str) -> str:
    """matplotlib's SVG file as an element of a page: sized by it, coloured by it, its ids apart from other charts'."""
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    (box,) = re.findall(r'viewBox="[^"]*"', head)
    body = body.replace("xlink:href", "href")
    body = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", body)
    body = body.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    for colour in (*(look.colour for look in LOOKS.values()), *_COLOURS):
        body = body.replace(colour, f"var(--c-{colour[1:]})")
    return f'<svg {box} aria-hidden="true">{body.strip()}'
