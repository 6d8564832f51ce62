"""Words from elsewhere in files for people and other programs: nothing in them is a command, a tag or a new column.

Names of models, classes and images may come from anybody's store.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from html import escape

from igstore.cli import printable

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
