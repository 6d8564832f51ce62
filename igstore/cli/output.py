"""What a command prints: a result for people or as JSON, and notes that can be silenced."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from igstore.cli.text import printable


@dataclass(frozen=True)
class Output:
    """Where a command's words go: what was asked for to stdout, all else to stderr.

    Parameters
    ----------
    quiet
        Print errors, and the result where a result was asked for, and nothing else.
    json
        Print one JSON object on stdout, and nothing else there.
    """

    quiet: bool = False
    json: bool = False

    @property
    def show_progress(self) -> bool:
        """Whether to say how far the work is."""
        return not self.quiet

    def note(self, *lines: str) -> None:
        """Print what is worth knowing but was not asked for, on stderr."""
        if not self.quiet:
            print_lines(lines, sys.stderr)

    def result(self, found: Any, lines: Iterable[str]) -> None:
        """Print what was asked for: as `lines` for people, or `found` as JSON."""
        print_lines([json.dumps(_jsonable(found), allow_nan=False)] if self.json else lines, sys.stdout)

    def summary(self, found: Any, lines: Iterable[str]) -> None:
        """Print what was done, where the result is a file: as `result`, but not to those who want quiet."""
        if self.json or not self.quiet:
            self.result(found, lines)


def _jsonable(found: Any) -> Any:
    """`found` with lists, dicts, strings and finite numbers alone; None where a number is not finite."""
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        return {field.name: _jsonable(getattr(found, field.name)) for field in dataclasses.fields(found)}
    if isinstance(found, Mapping):
        return {str(name): _jsonable(value) for name, value in found.items()}
    if isinstance(found, float) and not math.isfinite(found):
        return None
    if found is None or isinstance(found, str | int | float):
        return found
    return str(found) if isinstance(found, os.PathLike) else [_jsonable(value) for value in found]


def say(*lines: str) -> None:
    """Print lines on stdout."""
    print_lines(lines, sys.stdout)


def print_lines(lines: Iterable[str], stream: TextIO) -> None:
    """Print lines that may hold names from elsewhere."""
    for line in lines:
        print(printable(line), file=stream)
