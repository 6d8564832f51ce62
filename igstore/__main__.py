"""The command ``igstore``: finds the command that is asked for, and runs it."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from igstore import __version__, cli
from igstore.cli import COMMANDS, SECTIONS, module_of
from igstore.errors import UserError


def _help() -> list[str]:
    lines = ["igstore: Integrated Gradients once, masked images for ever", "", "usage: igstore COMMAND ..."]
    width = max(map(len, COMMANDS)) + 2
    for title, commands in SECTIONS.items():
        lines += ["", title, *(f"  {name:<{width}}{purpose}" for name, purpose in commands.items())]
    return [*lines, "", "`igstore COMMAND --help` lists a command's options; every command takes --quiet and --json"]


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        cli.say(*_help())
        return cli.DONE if argv else cli.MISUSED
    if argv[0] == "--version":
        cli.say(f"igstore {__version__}")
        return cli.DONE
    if argv[0] not in COMMANDS:
        close = get_close_matches(argv[0], COMMANDS, 1)
        meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {argv[0]!r}; {meant}")
    return int(module_of(argv[0]).main(argv[1:]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``igstore COMMAND ...`` and return its exit status."""
    return cli.run(_dispatch, argv)


if __name__ == "__main__":
    raise SystemExit(main())
