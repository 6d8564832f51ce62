"""What a parameter is called by whoever gave it: ``images=PATH`` in Python, ``--data PATH`` on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# What the command that runs calls its parameters; None in Python. One for the process, whose threads serve one command.
_called: dict[str, str] | None = None


def option(parameter: str, value: str = "") -> str:
    """A parameter as its user knows it, with a value that it may be given.

    >>> option("images", "PATH"), option("images")
    ('images=PATH', 'images')
    >>> with command_line():
    ...     call({"images": "--data"})
    ...     option("images", "PATH"), option("images")
    ('--data PATH', '--data')
    """
    if _called is not None and parameter in _called:
        return f"{_called[parameter]} {value}".rstrip()
    return f"{parameter}={value}" if value else parameter


@contextmanager
def command_line() -> Iterator[None]:
    """A command runs inside; what it calls its parameters is forgotten afterwards."""
    global _called
    before, _called = _called, {}
    try:
        yield
    finally:
        _called = before


def call(names: Mapping[str, str]) -> None:
    """Call parameters by these names until the command ends; where none runs, nothing changes."""
    if _called is not None:
        _called.update(names)
