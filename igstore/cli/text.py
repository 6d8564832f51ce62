"""Text that is safe to show, on a terminal, in CSV, Markdown and HTML; sizes and durations for people.

Names of models, classes and images may come from anybody's store.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from html import escape

_FORMULA = re.compile(r"\s*[=+\-@]")  # what begins so, spreadsheets compute
_OF_MARKDOWN = re.compile(r"([\\`\[\]|])")


def csv_text(header: Sequence[str], lines: Iterable[Iterable[object]]) -> str:
    """A table as CSV. A text that a spreadsheet would take for a formula has an apostrophe before it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, header))
    writer.writerows(map(_cell, line) for line in lines)
    return text.getvalue()


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    return f"'{printable(value)}" if _FORMULA.match(value) else printable(value)


def markdown(words: str) -> str:
    """Words in Markdown, within a line or a cell of a table."""
    return _OF_MARKDOWN.sub(r"\\\1", escape(" ".join(printable(words).split()), quote=False))


def html(words: str) -> str:
    """Words in HTML, within an element or an attribute."""
    return escape(printable(words))


def printable(text: str) -> str:
    """Text with a mark in place of what a terminal would take for a command, as names from elsewhere may hold."""
    return "".join(sign if sign.isprintable() or sign in "\t\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)


def size(n_bytes: float) -> str:
    """A number of bytes for people: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def duration(seconds: float) -> str:
    """A number of seconds for people: 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
