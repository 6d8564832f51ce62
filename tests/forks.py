"""Runs igstore's commands in processes of their own that need not import torch again: each is a fork of one that has.

As a program, it is that one: it reads what to run from its standard input and says how it went, in lines of JSON.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Forks:
    """Starts and awaits commands; a context manager."""

    def __enter__(self) -> Forks:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE,
            env=os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def start(self, *argv: object, output: Path, fault: tuple[str, Any] | None = None, slow: float = 0) -> int:
        """Start ``igstore ARGV``, which prints into a file, and return its process id.

        Parameters
        ----------
        fault
            One of those below and its argument: ``("die_at", 3)``.
        slow
            Seconds that ``networks:demo_network`` sleeps for each batch.
        """
        return int(self._ask({"argv": list(map(str, argv)), "output": str(output), "fault": fault, "slow": slow}))

    def wait(self, pid: int) -> int:
        """The exit status of a process, or minus the number of the signal that ended it."""
        return int(self._ask({"wait": pid}))

    def _ask(self, request: dict[str, Any]) -> str:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return self._server.stdout.readline()


# Faults, put into a process before its command runs.


def _on_file_events(act: Callable[[int], None]) -> None:
    """Call `act` with 1, 2, 3 ... before each change to a file or folder of a store."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        is_change = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        if event == "open" and isinstance(arguments[2], int):
            is_change = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        where = str(arguments[0]) if is_change else ""
        # within a store relative to its folder, which is held by a descriptor
        if is_change and not where.isdigit() and (".zarr" in where or not os.path.isabs(where)):
            count += 1
            act(count)

    sys.addaudithook(hook)


def die_at(event: int) -> None:
    """Die by SIGKILL just before the given change to a file."""
    _on_file_events(lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == event else None)


def stop_at(event: int) -> None:
    """Stop, as SIGSTOP or a hung mount does, just before the given change to a file, until SIGCONT."""
    _on_file_events(lambda count: os.kill(os.getpid(), signal.SIGSTOP) if count == event else None)


def count_events(file: str) -> None:
    """Say in a file how many changes to files there were so far."""
    _on_file_events(lambda count: Path(file).write_text(str(count)) and None)


def fail_at(call: int) -> None:
    """A disk that fails from the given flush on."""
    flush, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flush(descriptor)

    os.fsync = fsync


def without_locks(_: object) -> None:
    """A file system that knows no locks."""
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = flock


def slow_ranks(seconds: float) -> None:
    """Rank as slowly as if images were large."""
    import igstore.rank

    rank_blocks = igstore.building.ranking.rank_blocks

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return rank_blocks(*arguments)

    igstore.building.ranking.rank_blocks = slow


def _run(request: dict[str, Any]) -> None:
    """What a fork does, for ever after."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["IGSTORE_TEST_SLOW"] = str(request["slow"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let their background jobs ignore it
    status = 1
    try:
        if request["fault"]:
            name, argument = request["fault"]
            globals()[name](argument)
        from igstore.__main__ import main

        status = main(request["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    import networks  # noqa: F401
    import torch

    import igstore.build
    import igstore.building.dry_run
    import igstore.building.placement
    import igstore.verify  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                _run(request)
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()
