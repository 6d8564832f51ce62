"""From an evaluation's rows to the article's Tables 1, 2 and 3, as plain text and as Markdown. No I/O, no torch."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from igstore.cli import markdown
from igstore.errors import UserError
from igstore.evaluation.results import Row
from igstore.schema import BuildSpec, Keep

WIDTH = 100  # columns of a terminal
_FRAME = 7  # lines of a table's title, of its note, three at most, of its header, and around them

Line = tuple[str, ...]

_SHOWN: dict[Keep, str] = {
    "top": "where the unimportant pixels are masked (keep top)",
    "bottom": "where the important pixels are masked (keep bottom)",
}

_REDUCED = {
    "positive": "positive part of each channel",
    "absolute": "absolute value of each channel",
    "none": "channels apart",
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
        rows = [f"| {' | '.join(map(markdown, line))} |" for line in lines]
        return "\n".join([f"**{markdown(self.title)}**", "", markdown(self.note), "", *rows])


def _aligned(line: Line, widths: Sequence[int]) -> str:
    name, *cells = line
    return "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip()


def article_tables(rows: Sequence[Row]) -> list[Table]:
    """The article's three tables, once for each kind of mask among the rows.

    Table 1 is of ``keep="top"`` and Table 2 of ``keep="bottom"``, with a column for every p. Table 3 sets the two side
    by side at p=50, or at the middle one where that is missing. A table without rows is left out.
    """
    tables = []
    for masks, of_masks in kinds(rows).items():
        for number, keep in enumerate(_SHOWN, start=1):
            kept = [row for row in of_masks if row.keep == keep]
            if kept:
                tables.append(_by_p(f"Table {number}. Top-1 accuracy (%) {_SHOWN[keep]}", masks, kept))
        sides = _both_sides(of_masks)
        if sides:
            tables.append(_top_against_bottom(masks, sides))
    return tables


def overview(rows: Sequence[Row], most: int) -> list[Table]:
    """Top-1 accuracies alone, a line for each model, order and side of the cut; a table for each kind of mask.

    As text, the tables and what separates them take at most `most` lines. The last note says how many lines of the
    tables are left out.
    """
    tables: list[Table] = []
    left_out = 0
    for masks, of_masks in kinds(rows).items():
        every_p = sorted({row.p for row in of_masks}, reverse=True)
        found: list[Line] = []
        for label, of_label in lines(of_masks).items():
            for keep in _SHOWN:
                at = by_p(row for row in of_label if row.keep == keep)
                if at:
                    unmasked = percent(of_label[0].original_top1, of_label[0].n)
                    shown = (percent(at[p].top1, at[p].n) if p in at else "" for p in every_p)
                    found.append((label, keep, unmasked, *shown))
        header = ("model", "keep", "unmasked", *(f"p={p:g}" for p in every_p))
        taken = sum(_FRAME + len(table.groups) for table in tables)
        shown_lines = found[: max(0, most - taken - _FRAME)]
        left_out += len(found) - len(shown_lines)
        if shown_lines:
            title = f"Top-1 accuracy (%), {images_of(of_masks)}"
            tables.append(Table(title, masks, header, tuple((line,) for line in shown_lines)))
    if left_out:
        tables[-1] = dataclasses.replace(tables[-1], note=f"{tables[-1].note} {left_out} more lines are left out.")
    return tables


def _by_p(title: str, masks: str, rows: Sequence[Row]) -> Table:
    every_p = sorted({row.p for row in rows}, reverse=True)

    def group(label: str, of_label: Sequence[Row]) -> tuple[Line, ...]:
        first, at = of_label[0], by_p(of_label)

        def line(name: str, unmasked: str, of_row: Callable[[Row], str]) -> Line:
            return (name, unmasked, *(of_row(at[p]) if p in at else "" for p in every_p))

        return (
            line(label, percent(first.original_top1, first.n), lambda row: percent(row.top1, row.n)),
            line("95% interval", _interval(first.original_low, first.original_high, first.n), _interval_of),
            line("top-5", percent(first.original_top5, first.n), lambda row: percent(row.top5, row.n)),
            line("pixels visible", percent(100, first.n), lambda row: percent(row.visible, row.n)),
        )

    groups = tuple(group(label, of_label) for label, of_label in lines(rows).items())
    return Table(f"{title}, {images_of(rows)}", masks, ("model", "unmasked", *(f"p={p:g}" for p in every_p)), groups)


def _both_sides(rows: Sequence[Row]) -> dict[str, dict[float, tuple[Row, Row]]]:
    """The rows of top and bottom by label and p, where there are both."""
    sides: dict[str, dict[float, tuple[Row, Row]]] = {}
    for label, of_label in lines(rows).items():
        top, bottom = (by_p(row for row in of_label if row.keep == keep) for keep in _SHOWN)
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


def kinds(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by the kind of their masks: whose they are, how they were made, and what p means; not which p or order.

    Masks are a model's own where these rows show them to nobody else; then models share a kind. Each has a sentence of
    its own. Kinds and rows are in the order in which they come.
    """
    shared = {row.store_settings_sha256 for row in rows if not row.is_own}

    def kind(row: Row) -> tuple[object, ...]:
        owner = (row.store_model, row.store_weights, row.store_weights_sha256)
        made = (row.baseline, row.target, row.output, row.method, row.n_steps, row.reduce)
        mask = (row.select, row.score, row.block, row.fill)
        return (owner if row.store_settings_sha256 in shared else None, *made, *mask)

    def whose(row: Row) -> str:
        return f"Masks of {row.store_model}" if row.store_settings_sha256 in shared else "Own masks"

    groups = _grouped(rows, kind)
    names = _distinct(
        groups,
        lambda row: (whose(row), _how(row), _mask(row)),
        [lambda row: row.store_weights, lambda row: _short(row.store_weights_sha256), lambda row: row.baseline],
    )
    sentences = {
        key: f"{', '.join([words[0], *more])} ({words[1]}); {words[2]}" for key, (words, more) in names.items()
    }
    return {sentences[key]: group for key, group in groups.items()}


def _how(row: Row) -> str:
    made = f"{row.baseline} baseline, {row.target} as target, {row.n_steps} steps"
    if row.is_imported:
        made = f"made by {row.method}, {row.target} as target"
    unusual = [] if row.is_imported or row.method == BuildSpec.method else [row.method]
    unusual += [row.output] if row.output != BuildSpec.output else []
    unusual += [_REDUCED[row.reduce]] if row.reduce != BuildSpec.reduce else []
    return ", ".join([made, *unusual])


def _mask(row: Row) -> str:
    return f"p by {row.select}, {row.score} scores of {row.block}x{row.block} blocks; {row.fill} fill."


def lines(rows: Sequence[Row], *, orders_apart: bool = True) -> dict[str, list[Row]]:
    """The rows of a kind by their line in a table: by model, store, seed and order.

    Each has a name of its own: the model, and as much more as it takes to tell the lines apart.
    """

    def line(row: Row) -> tuple[object, ...]:
        pair = (row.store, row.store_settings_sha256, row.model, row.weights, row.weights_sha256)
        return (*pair, row.seed, row.order if orders_apart else None)

    def name(row: Row) -> str:
        return f"{row.model}, random order" if orders_apart and row.order == "random" else row.model

    groups = _grouped(rows, line)
    parts: list[Callable[[Row], str]] = [
        lambda row: row.weights,
        lambda row: row.store,
        lambda row: str(row.seed),
        lambda row: _short(row.weights_sha256),
        lambda row: f"settings {_short(row.store_settings_sha256)}",
    ]
    return {", ".join([words, *more]): groups[key] for key, (words, more) in _distinct(groups, name, parts).items()}


def store_names(rows: Sequence[Row]) -> dict[str, Row]:
    """A row of each store, by a name of its own: its model, and as much more as it takes."""
    groups = _grouped(rows, lambda row: row.store_settings_sha256)
    parts: list[Callable[[Row], str]] = [
        lambda row: row.store,
        lambda row: f"settings {_short(row.store_settings_sha256)}",
    ]
    names = _distinct(groups, lambda row: row.store_model, parts)
    return {", ".join([words, *more]): groups[key][0] for key, (words, more) in names.items()}


def by_p(rows: Iterable[Row]) -> dict[float, Row]:
    """The rows of one line and side by p.

    Raises
    ------
    UserError
        Two are of one p: nothing could tell them apart.
    """
    at: dict[float, Row] = {}
    for row in rows:
        if at.setdefault(row.p, row) is not row:
            raise UserError(f"there are two rows of {row.model} on {row.store} with {row.cell}; there can be one")
    return at


def _grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[Hashable, list[Row]]:
    """The rows by their keys, groups and rows in the order in which they come."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


_Words = TypeVar("_Words", bound=Hashable)


def _distinct(
    groups: Mapping[Hashable, Sequence[Row]], name: Callable[[Row], _Words], parts: Sequence[Callable[[Row], str]]
) -> dict[Hashable, tuple[_Words, list[str]]]:
    """A name for each group, and what to say besides: of `parts`, in turn, what tells it from others of that name."""
    words = {key: name(group[0]) for key, group in groups.items()}
    more: dict[Hashable, list[str]] = {key: [] for key in groups}
    for part in parts:
        alike: dict[Hashable, list[Hashable]] = {}
        for key in groups:
            alike.setdefault((words[key], *more[key]), []).append(key)
        for keys in alike.values():
            said = {key: part(groups[key][0]) for key in keys}
            if len(set(said.values())) > 1:
                for key in keys:
                    more[key].append(said[key])
    return {key: (words[key], more[key]) for key in groups}


def _short(sha256: str) -> str:
    return sha256[:8]


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
