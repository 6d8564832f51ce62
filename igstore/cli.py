"""What all commands share: options, output, exit statuses, one-line errors, interruption, numbers for people."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import itertools
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, TextIO

from igstore.errors import IgstoreError, UserError
from igstore.wording import call, command_line

DONE, FAILED, MISUSED, SOME_IMAGES_FAILED = 0, 1, 2, 3
INTERRUPTED, TERMINATED = 130, 143


class Answered(SystemExit):
    """An option such as ``--help`` has been answered, and nothing else was asked for."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as job schedulers send it before they kill; handled like Ctrl-C but for the exit status."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says an option's default where there is one to say, and its help does not say it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        nothing_to_say = default is None or isinstance(default, bool) or default in (argparse.SUPPRESS, [], ())
        if nothing_to_say or "default" in (action.help or ""):
            return action.help
        said = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{action.help} (default: {said.replace('%', '%%')})"


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
            _print(lines, sys.stderr)

    def result(self, found: Any, lines: Iterable[str]) -> None:
        """Print what was asked for: as `lines` for people, or `found` as JSON."""
        _print([json.dumps(_jsonable(found), allow_nan=False)] if self.json else lines, sys.stdout)

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


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, and which knows the options that all commands have."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"igstore {command}", description=description, formatter_class=Help, allow_abbrev=False)
        # absent where not given, so that the other options can be handed on as they are
        self.add_argument(
            "--quiet", action="store_true", default=argparse.SUPPRESS, help="print errors and the result, nothing else"
        )
        self.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object instead of text"
        )

    def of(self, function: Callable[..., Any]) -> Parser:
        """This parser, its options' defaults being those of the function that they are given to.

        Options that have a default of their own keep it.
        """
        parameters = inspect.signature(function).parameters
        for action in self._actions:
            parameter = parameters.get(action.dest)
            if action.default is None and parameter is not None and parameter.default is not parameter.empty:
                action.default = parameter.default
        return self

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, Output]:
        """The command's own options, and where its words go."""
        call({action.dest: _called(action) for action in self._actions})
        self._check_names(argv)
        options = self.parse_args(argv)
        given = vars(options)
        output = Output(quiet=given.pop("quiet", False), json=given.pop("json", False))
        logging.getLogger("igstore").setLevel(logging.ERROR if output.quiet else logging.NOTSET)
        return options, output

    def exit(self, status: int = DONE, message: str | None = None) -> NoReturn:
        """Raise `Answered`, which is told from a user's code that calls `sys.exit`."""
        raise Answered(status)

    def _check_names(self, argv: Sequence[str]) -> None:
        """Raise `UserError` where an argument looks like an option and is none, with the one that it is like."""
        known = {name: name for name in self._option_string_actions}
        # what Python calls it, too
        meant = {
            f"--{action.dest.replace('_', '-')}": action.option_strings[-1]
            for action in self._actions
            if action.option_strings
        }
        for given in itertools.takewhile(lambda argument: argument != "--", argv):
            name = given.partition("=")[0]
            if re.match("--?[^\\W\\d]", name) and name not in known:
                close = difflib.get_close_matches(name, spelled := meant | known, 1)
                hint = f"; did you mean {spelled[close[0]]}?" if close else ""
                self.error(f"there is no option {name}{hint}")

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`, which `run` turns into one line and status 2."""
        raise UserError(f"{message} (`{self.prog} --help` lists the options)")


def _called(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)


@contextmanager
def _terminable() -> Iterator[None]:
    def terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _own_log_level() -> Iterator[None]:
    """Put igstore's log level back afterwards, which ``--quiet`` changes."""
    logger = logging.getLogger("igstore")
    before = logger.level
    try:
        yield
    finally:
        logger.setLevel(before)


def _leave_cores_to_others() -> None:
    """Have torch's threads sleep while they wait for each other, unless the user has said how they wait.

    By default they spin, which takes the cores from other work on the machine and from each other. On a machine without
    other work both are as fast. OpenMP asks for this once, when torch is imported.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a command's `main` and turn what it raises into a message on stderr and an exit status."""
    logging.basicConfig(level=logging.WARNING, format="igstore: %(message)s", stream=sys.stderr)
    _leave_cores_to_others()
    try:
        with _terminable(), _own_log_level(), command_line():
            return command(sys.argv[1:] if argv is None else argv)
    except IgstoreError as error:
        print(printable(f"igstore: {error}"), file=sys.stderr)  # noqa: T201
        return error.exit_status
    except KeyboardInterrupt as interruption:
        terminated = isinstance(interruption, Terminated)
        how = "terminated" if terminated else "interrupted"
        print(f"igstore: {how}; run the same command again to go on", file=sys.stderr)  # noqa: T201
        return TERMINATED if terminated else INTERRUPTED
    except Answered:
        raise
    except SystemExit as error:
        print(f"igstore: a network's or data set's own code called sys.exit({error.code!r})", file=sys.stderr)  # noqa: T201
        return FAILED
    except BrokenPipeError:
        # whoever read our output has gone, as `igstore info | head` does; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't start new thread" not in str(error):
            raise
        said = " ".join(str(error).split()) or "there is no more"
        print(f"igstore: out of memory ({said}); allow this process more, or give smaller batches", file=sys.stderr)  # noqa: T201
        return FAILED
    except OSError as error:
        print(f"igstore: {error}; what was finished is kept: run the same command again to go on", file=sys.stderr)  # noqa: T201
        return FAILED


def say(*lines: str) -> None:
    """Print lines on stdout."""
    _print(lines, sys.stdout)


def _print(lines: Iterable[str], stream: TextIO) -> None:
    for line in lines:
        print(printable(line), file=stream)


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
