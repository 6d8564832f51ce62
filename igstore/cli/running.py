"""How a command is run: exit statuses, errors in one line, interruption."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from igstore.cli.text import printable
from igstore.errors import IgstoreError, command_line

DONE, FAILED, MISUSED, SOME_IMAGES_FAILED = 0, 1, 2, 3
INTERRUPTED, TERMINATED = 130, 143


class Answered(SystemExit):
    """An option such as ``--help`` has been answered, and nothing else was asked for."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as job schedulers send it before they kill; handled like Ctrl-C but for the exit status."""


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
