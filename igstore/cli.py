"""What every command shares: exit statuses, one-line errors, orderly interruption, numbers for people."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from igstore.errors import IgstoreError, UserError

DONE, FAILED, MISUSED, SOME_IMAGES_FAILED = 0, 1, 2, 3
INTERRUPTED, TERMINATED = 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, as job schedulers send it before they kill; handled like Ctrl-C but for the exit status."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"igstore {command}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`, which `run` turns into one line and status 2."""
        raise UserError(f"{message} (`{self.prog} --help` lists the options)")


@contextmanager
def _terminable() -> Iterator[None]:
    def terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a command's `main` and turn what it raises into a message on stderr and an exit status."""
    logging.basicConfig(level=logging.WARNING, format="igstore: %(message)s", stream=sys.stderr)
    try:
        with _terminable():
            return command(sys.argv[1:] if argv is None else argv)
    except IgstoreError as error:
        print(printable(f"igstore: {error}"), file=sys.stderr)  # noqa: T201
        return error.exit_status
    except KeyboardInterrupt as interruption:
        terminated = isinstance(interruption, Terminated)
        how = "terminated" if terminated else "interrupted"
        print(f"igstore: {how}; run the same command again to go on", file=sys.stderr)  # noqa: T201
        return TERMINATED if terminated else INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has gone, as `igstore info | head` does; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        print(f"igstore: {error}; what was finished is kept: run the same command again to go on", file=sys.stderr)  # noqa: T201
        return FAILED


def say(*lines: str) -> None:
    """Print lines on stdout."""
    for line in lines:
        print(printable(line))  # noqa: T201


def printable(text: str) -> str:
    """Text with a mark in place of what a terminal would take for a command, as names from elsewhere may hold."""
    return "".join(sign if sign.isprintable() or sign in "\t\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


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


def choices_of(literal: object) -> list[str]:
    """The strings of a `Literal` type, as argparse's `choices`."""
    arguments = getattr(literal, "__args__", None)
    if not arguments:
        raise UserError(f"{literal} is not a Literal type")
    return [str(argument) for argument in arguments]
