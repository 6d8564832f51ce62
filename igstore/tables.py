"""From the rows of an evaluation to the article's Tables 1, 2 and 3, as plain text and as Markdown. No I/O, no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from igstore.results import Row
from igstore.schema import Keep

WIDTH = 100  # columns of a terminal

_T = TypeVar("_T")

Lines = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Table:
    """A table of ready-made strings.

    Attributes
    ----------
    title
        What it shows, on as many lines as it takes.
    header
        The columns' names; the first column is aligned left, the others right.
    groups
        Lines that belong together: the first of each group is what it is about, the others tell more of it.
    """

    title: str
    header: tuple[str, ...]
    groups: tuple[Lines, ...]

    def text(self) -> str:
        """The table for a terminal."""
        lines = [self.header, *(line for group in self.groups for line in _indented(group))]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        title = textwrap.fill(self.title, WIDTH)
        return "\n".join([title, *(_aligned(line, widths) for line in lines)])

    def markdown(self) -> str:
        """The table in GitHub's Markdown, the title in bold above it."""
        rule = ("---", *["---:"] * (len(self.header) - 1))
        lines = [self.header, rule, *(line for group in self.groups for line in group)]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _indented(group: Lines) -> list[tuple[str, ...]]:
    first, *others = group
    return [first, *((f"  {name}", *values) for name, *values in others)]


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


def article_tables(rows: Sequence[Row]) -> list[Table]:
    """The article's three tables, for each kind of mask among the rows; a table that has no rows is left out.

    Table 1 is of ``keep="top"``, Table 2 of ``keep="bottom"``, each with a column for every p. Table 3 compares the
    two at p=50, or at the middle one of the p that both have.
    """
    tables = []
    for masks, of_masks in group_by(rows, describe_masks).items():
        tables += [_by_p(number, keep, masks, of_masks) for number, keep in ((1, "top"), (2, "bottom"))]
        tables.append(_top_against_bottom(masks, of_masks))
    return [table for table in tables if table is not None]


_SHOWN: dict[Keep, str] = {
    "top": "the unimportant pixels masked (keep top)",
    "bottom": "the important pixels masked (keep bottom)",
}


def _by_p(number: int, keep: Keep, masks: str, rows: Sequence[Row]) -> Table | None:
    kept = [row for row in rows if row.keep == keep]
    if not kept:
        return None
    every_p = sorted({row.p for row in kept}, reverse=True)
    groups = []
    for label, of_label in group_by(kept, labeller(rows)).items():
        first = of_label[0]
        at = {row.p: row for row in of_label}
        cells = [at.get(p) for p in every_p]
        groups.append(
            (
                (label, percent(first.original_top1, first.n), *(row and percent(row.top1, row.n) or "" for row in cells)),
            )
        )
    return Table("", (), tuple(groups))
