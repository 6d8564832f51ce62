"""From an evaluation's rows to the article's Tables 1, 2 and 3, as plain text and as Markdown. No I/O, no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from igstore.reporting.results import Row
from igstore.schema import Keep

WIDTH = 100  # columns of a terminal

Line = tuple[str, ...]

_SHOWN: dict[Keep, str] = {
    "top": "where the unimportant pixels are masked (keep top)",
    "bottom": "where the important pixels are masked (keep bottom)",
}


@dataclass(frozen=True)
class Table:
    """A table of ready-made strings.

    Attributes
    ----------
    title, note
        What it shows, and how that came about.
    header
        The columns' names. The first column is aligned left, the others right.
    groups
        Lines that belong together: the first of each says what it is about, the others say more of it.
    """

    title: str
    note: str
    header: Line
    groups: tuple[tuple[Line, ...], ...]

    def text(self) -> str:
        """The table for a terminal."""
        lines = [self.header]
        for first, *others in self.groups:
            lines += [first, *((f"  {name}", *cells) for name, *cells in others)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        above = [textwrap.fill(words, WIDTH) for words in (self.title, self.note)]
        return "\n".join([*above, "", *(_aligned(line, widths) for line in lines)])

    def markdown(self) -> str:
        """The table in GitHub's Markdown, under its title and note."""
        rule = ("---", *["---:"] * (len(self.header) - 1))
        lines = [self.header, rule, *(line for group in self.groups for line in group)]
        return "\n".join([f"**{self.title}**", "", self.note, "", *(f"| {' | '.join(line)} |" for line in lines)])


def _aligned(line: Line, widths: Sequence[int]) -> str:
    name, *cells = line
    return "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip()


def article_tables(rows: Sequence[Row]) -> list[Table]:
    """The article's three tables, once for each kind of mask among the rows.

    Table 1 is of ``keep="top"`` and Table 2 of ``keep="bottom"``, with a column for every p. Table 3 sets the two side
    by side at p=50, or at the middle one where that is missing. A table without rows is left out.
    """
    tables = []
    for masks, of_masks in grouped(rows, describer(rows)).items():
        for number, keep in enumerate(_SHOWN, start=1):
            kept = [row for row in of_masks if row.keep == keep]
            if kept:
                tables.append(_by_p(f"Table {number}. Top-1 accuracy (%) {_SHOWN[keep]}", masks, kept))
        sides = _both_sides(of_masks)
        if sides:
            tables.append(_top_against_bottom(masks, sides))
    return tables


def _by_p(title: str, masks: str, rows: Sequence[Row]) -> Table:
    every_p = sorted({row.p for row in rows}, reverse=True)

    def lines(label: str, of_label: Sequence[Row]) -> tuple[Line, ...]:
        first, at = of_label[0], {row.p: row for row in of_label}

        def line(name: str, unmasked: str, of_row: Callable[[Row], str]) -> Line:
            return (name, unmasked, *(of_row(at[p]) if p in at else "" for p in every_p))

        return (
            line(label, percent(first.original_top1, first.n), lambda row: percent(row.top1, row.n)),
            line("95% interval", _interval(first.original_low, first.original_high, first.n), _interval_of),
            line("top-5", percent(first.original_top5, first.n), lambda row: percent(row.top5, row.n)),
            line("pixels visible", percent(100, first.n), lambda row: percent(row.visible, row.n)),
        )

    groups = tuple(lines(label, of_label) for label, of_label in grouped(rows, labeller(rows)).items())
    return Table(f"{title}, {images_of(rows)}", masks, ("model", "unmasked", *(f"p={p:g}" for p in every_p)), groups)


def _both_sides(rows: Sequence[Row]) -> dict[str, dict[float, tuple[Row, Row]]]:
    """The rows of top and bottom by label and p, where there are both."""
    sides: dict[str, dict[float, tuple[Row, Row]]] = {}
    for label, of_label in grouped(rows, labeller(rows)).items():
        top, bottom = ({row.p: row for row in of_label if row.keep == keep} for keep in _SHOWN)
        if both := {p: (top[p], bottom[p]) for p in sorted(top.keys() & bottom.keys())}:
            sides[label] = both
    return sides


def _top_against_bottom(masks: str, sides: dict[str, dict[float, tuple[Row, Row]]]) -> Table:
    every_p = sorted({p for at in sides.values() for p in at})
    p = 50.0 if 50 in every_p else every_p[len(every_p) // 2]
    pairs = {label: at[p] for label, at in sides.items() if p in at}
    groups = tuple(
        (
            (
                label,
                *(percent(row.top1, row.n) for row in (top, bottom)),
                *(str(count) for count in (top.only_this, top.only_opposite)),
                _probability(top.mcnemar_p),
            ),
            ("95% interval", _interval_of(top), _interval_of(bottom), "", "", ""),
        )
        for label, (top, bottom) in pairs.items()
    )
    images = images_of([row for pair in pairs.values() for row in pair])
    title = f"Table 3. Top-1 accuracy (%) of the important against the unimportant pixels at p={p:g}, {images}"
    note = f"{masks} Only top, only bottom: images that are right there alone."
    return Table(
        title, note, ("model", f"top {p:g}%", f"bottom {p:g}%", "only top", "only bottom", "McNemar's p"), groups
    )


def describer(rows: Sequence[Row]) -> Callable[[Row], str]:
    """What to say of a row's masks: whose they are, how they were made, and what p means; not which p or order.

    They are a model's own where these rows show them to nobody else.
    """
    shared = {row.store_settings_sha256 for row in rows if not row.is_own}

    def describe(row: Row) -> str:
        whose = f"Masks of {row.store_model}" if row.store_settings_sha256 in shared else "Own masks"
        how = f"{row.baseline} baseline, {row.target} as target, {row.n_steps} steps"
        if not row.n_steps:  # imported maps
            how = f"made by {row.method}, {row.target} as target"
        return (
            f"{whose} ({how}); "
            f"p by {row.select}, {row.score} scores of {row.block}x{row.block} blocks; {row.fill} fill."
        )

    return describe


def labeller(rows: Sequence[Row]) -> Callable[[Row], str]:
    """What to call a row's line among these rows: the model, and as much more as it takes to tell the lines apart."""
    more = ("weights", "store", "seed")
    seen: dict[str, list[set[object]]] = {}
    for row in rows:
        for values, name in zip(seen.setdefault(row.model, [set() for _ in more]), more, strict=True):
            values.add(getattr(row, name))

    def label(row: Row) -> str:
        order = ["random order"] if row.order == "random" else []
        differing = [
            str(getattr(row, name)) for name, values in zip(more, seen[row.model], strict=True) if len(values) > 1
        ]
        return ", ".join([row.model, *order, *differing])

    return label


def grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """The rows by what `key` says of them, groups and rows in the order in which they come."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def percent(value: float, n: int) -> str:
    """A percentage of `n` images, with as many decimals as they carry."""
    return f"{value:.2f}" if n >= 1000 else f"{value:.1f}"


def _interval(low: float, high: float, n: int) -> str:
    return f"{percent(low, n)}-{percent(high, n)}"


def _interval_of(row: Row) -> str:
    return _interval(row.low, row.high, row.n)


def _probability(p: float | None) -> str:
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"


def images_of(rows: Sequence[Row]) -> str:
    """How many images the rows are of, in words."""
    counts = sorted({row.n for row in rows})
    return f"{counts[0]} images" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} images"
