"""What a benchmark prints: a table for people, and one JSON object as the last line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from igstore import cli


def parser(benchmark: str, description: str | None) -> cli.BareParser:
    """The parser of a benchmark's options."""
    return cli.BareParser(
        prog=f"python -m pipelines.bench {benchmark}",
        description=description,
        formatter_class=cli.Help,
        allow_abbrev=False,
    )


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of one set of columns as aligned lines, numbers to the right; None is a dash."""
    header = list(rows[0])
    cells = [header, *([_text(row[column]) for column in header] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_text = [any(isinstance(row[column], str) for row in rows) for column in header]
    lines = []
    for line in cells:
        padded = zip(line, widths, is_text, strict=True)
        lines.append("  ".join(cell.ljust(width) if text else cell.rjust(width) for cell, width, text in padded))
    return [line.rstrip() for line in (lines[0], "  ".join("-" * width for width in widths), *lines[1:])]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def say_result(result: Mapping[str, Any]) -> None:
    """Print a result as one line of JSON; what JSON has no word for (infinity, NaN) becomes null."""
    cli.say("", json.dumps(finite(result), allow_nan=False))


def finite(value: Any) -> Any:
    """`value` with null for what JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
