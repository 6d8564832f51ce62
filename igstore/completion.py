"""`igstore completion`: a script with which a shell completes commands, options, their choices, and paths. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal

from igstore import cli
from igstore.cli import COMMANDS, module_of
from igstore.errors import UserError

Shell = Literal["bash", "zsh", "fish", "tcsh"]

# What options that take a path call it, in their help
_PATHS = {"CSV", "DIR", "FILE", "FOLDER", "HTML", "MAPS", "OUT", "PATH", "PNG", "RESULTS", "STORE"}


def whole_parser() -> argparse.ArgumentParser:
    """One parser for the whole command line, each command a subcommand with its options and what they complete to."""
    whole = argparse.ArgumentParser("igstore", description="Integrated Gradients once, masked images for ever.")
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers(metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        parser = module_of(name).parser()
        for action in parser._actions:
            if action.metavar in _PATHS:
                action.complete = "file"  # shtab's way to say so
        commands.add_parser(name, help=purpose, description=parser.description, parents=[parser], add_help=False)
    return whole


def script(shell: Shell) -> str:
    """The script for a shell.

    Raises
    ------
    UserError
        shtab, which writes it, is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise UserError("completion needs shtab; install it with `pip install 'igstore[completion]'`") from None
    return str(shtab.complete(whole_parser(), shell))


def parser() -> cli.Parser:
    """The options of the command."""
    parser = cli.Parser(
        "completion",
        'Print a script with which a shell completes igstore. In bash: eval "$(igstore completion bash)"; to keep it, '
        "write it where your shell looks for completions.",
    )
    parser.add_argument("shell", choices=cli.choices_of(Shell), help="the shell that is to complete")
    return parser


def main(argv: Sequence[str]) -> int:
    """``igstore completion SHELL``."""
    options, output = parser().parse(argv)
    text = script(options.shell)
    output.result({"shell": options.shell, "script": text}, text.splitlines())
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
