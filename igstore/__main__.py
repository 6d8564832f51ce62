"""The command ``igstore``: a table of contents of the commands, each a module with a ``main(argv) -> int``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from igstore import __version__, cli

COMMANDS = {
    "build": "attribute images with Integrated Gradients, into a store",
    "rank": "rank the blocks of a store's maps",
    "evaluate": "measure models on masked images, and print the article's tables",
    "show": "draw what the masks do to some images",
    "report": "make a page of an evaluation, with figures",
    "info": "say what a store holds, what made it, and what is missing",
    "verify": "check every byte of a store, and what it means",
    "view": "look at any image and any mask of a store, in a browser",
}


def _help() -> list[str]:
    return [
        "igstore: Integrated Gradients once, masked images for ever",
        "",
        "usage: igstore COMMAND ... (`igstore COMMAND --help` lists a command's options)",
        "",
        *(f"  {name:<10} {purpose}" for name, purpose in COMMANDS.items()),
    ]


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        cli.say(*_help())
        return cli.DONE if argv else cli.MISUSED
    if argv[0] == "--version":
        cli.say(f"igstore {__version__}")
        return cli.DONE
    if argv[0] not in COMMANDS:
        print(f"igstore: there is no command {argv[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)  # noqa: T201
        return cli.MISUSED
    command = importlib.import_module(f"igstore.{argv[0]}").main
    return int(command(argv[1:]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``igstore COMMAND ...`` and return its exit status."""
    return cli.run(_dispatch, argv)


if __name__ == "__main__":
    raise SystemExit(main())
