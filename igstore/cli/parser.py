"""A command's options: the parser that all commands use, and types of arguments."""

from __future__ import annotations

import argparse
import difflib
import inspect
import itertools
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from igstore.cli.output import Output
from igstore.cli.running import DONE, Answered
from igstore.errors import UserError, call


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says an option's default where there is one to say, and its help does not say it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        nothing_to_say = default is None or isinstance(default, bool) or default in (argparse.SUPPRESS, [], ())
        if nothing_to_say or "default" in (action.help or ""):
            return action.help
        said = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{action.help} (default: {said.replace('%', '%%')})"


class BareParser(argparse.ArgumentParser):
    """An argument parser for `run`: what ends it is told from a user's code that calls `sys.exit`."""

    def exit(self, status: int = DONE, message: str | None = None) -> NoReturn:
        """Raise `Answered`, after the message, if there is one, on stderr."""
        try:
            super().exit(status, message)
        except SystemExit:
            raise Answered(status) from None


class Parser(BareParser):
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


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def choices_of(literal: object) -> list[str]:
    """The strings of a `Literal` type, as argparse's `choices`."""
    arguments = getattr(literal, "__args__", None)
    if not arguments:
        raise UserError(f"{literal} is not a Literal type")
    return [str(argument) for argument in arguments]
