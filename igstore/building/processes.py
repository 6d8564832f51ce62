"""Several devices of one machine: a process for each, which asks for a shard whenever it needs one.

A process that fails ends the whole: what is finished is kept, and the same build goes on with it. A process whose
parent is gone ends by itself.
"""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import torch

from igstore import cli
from igstore.building.decoding import most_workers
from igstore.building.plan import Build
from igstore.building.worker import Report, Worker
from igstore.errors import IgstoreError, UserError
from igstore.storage import at_work

_PATIENCE = 20.0  # seconds that a process has to finish what it is writing, once it is told to stop

# What the processes say, besides `Advance`: the network is there, another shard is needed, no more is, or an exception.
_READY, _ANOTHER, _DONE = "ready", "another", "done"


class Processes:
    """Builds shards in one process for each device; a context manager, which starts and ends them.

    Parameters
    ----------
    build
        As `Worker`. Its network and images must be picklable.
    devices
        One for each process; the same one may be there several times.
    batch_size
        As `Attributor` takes it.
    workers
        Threads that decode images in each process; None shares the cores out.

    Raises
    ------
    UserError
        The network or the images cannot be sent to another process.
    IgstoreError
        On entering the context or in `attribute`: what went wrong in a process, with its device in the message.
    """

    def __init__(
        self, build: Build, *, devices: Sequence[torch.device], batch_size: int | None, workers: int | None
    ) -> None:
        try:
            # by pickle alone: torch's own way to hand over tensors fills /dev/shm, which is small in containers
            self._build = pickle.dumps(build)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(
                f"several devices need a network and images that other processes can be sent ({error}); give names, "
                "package.module:function for a network of your own, and a path"
            ) from error
        workers = workers or max(1, most_workers() // len(devices))
        self._children = [_Child(device, batch_size, workers) for device in devices]

    def __enter__(self) -> Processes:
        try:
            for child in self._children:
                child.start(self._build)
            for child in self._children:
                child.receive()  # that it is ready
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def attribute(self, shards: Sequence[int], report: Report) -> None:
        """As `Worker.attribute`; each process is given the next shard when it asks for one."""
        to_do = iter(shards)
        at_work = {child.connection: child for child in self._children}
        for child in self._children:
            child.send(True)
        while at_work:
            for connection in wait(list(at_work)):
                child = at_work[connection]  # type: ignore[index]
                said = child.receive()
                if said == _DONE:
                    del at_work[child.connection]
                elif said == _ANOTHER:
                    child.send(next(to_do, None))
                else:
                    report(said)

    def _stop(self) -> None:
        for child in self._children:
            child.terminate()
        for child in self._children:
            child.join()


class _Child:
    """One of the processes, as its parent sees it."""

    def __init__(self, device: torch.device, batch_size: int | None, workers: int) -> None:
        self._device = device
        self.connection, self._childs_end = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_work, args=(self._childs_end, device, batch_size, workers), name=f"igstore {device}", daemon=True
        )

    def start(self, build: bytes) -> None:
        with _no_interrupts():
            self._process.start()
        self._childs_end.close()  # so that its end is seen when the process ends
        with suppress(BrokenPipeError):
            self.connection.send_bytes(build)

    def send(self, message: object) -> None:
        with suppress(BrokenPipeError):  # `receive` says why
            self.connection.send(message)

    def receive(self) -> Any:
        """What it says next. What it raised is raised here, and an end without a word is an error, too."""
        try:
            said = self.connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            status = self._process.exitcode
            how = f"was ended by {signal.Signals(-status).name}" if status and status < 0 else f"failed ({status})"
            raise IgstoreError(
                f"the process on {self._device} {how}; what was finished is kept: run the same command again to go on"
            ) from None
        if isinstance(said, IgstoreError):
            raise type(said)(f"on {self._device}: {said}")
        if isinstance(said, Exception):
            raise said
        return said

    def terminate(self) -> None:
        if self._process.is_alive():
            self._process.terminate()

    def join(self) -> None:
        if self._process.pid is not None:
            self._process.join(_PATIENCE)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self.connection.close()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes that are started meanwhile ignore Ctrl-C, which a terminal sends to all: their parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(connection: Connection, device: torch.device, batch_size: int | None, workers: int) -> None:
    """What one of the processes does."""

    def terminate(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise cli.Terminated

    signal.signal(signal.SIGTERM, terminate)
    logging.basicConfig(level=logging.WARNING, format=f"igstore: {device}: %(message)s", stream=sys.stderr)
    try:
        try:
            build: Build = pickle.loads(connection.recv_bytes())
            with Worker(build, device=device, batch_size=batch_size, workers=workers) as worker:
                connection.send(_READY)
                connection.recv()  # that the store is there
                with at_work(build.path):
                    worker.attribute(_asked_for(connection), connection.send)
                connection.send(_DONE)
        except ConnectionError:
            raise
        except (IgstoreError, OSError) as error:
            connection.send(error)
    except (KeyboardInterrupt, EOFError, ConnectionError):
        sys.exit(cli.TERMINATED)  # the parent stops us, or is gone
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _asked_for(connection: Connection) -> Iterator[int]:
    while True:
        connection.send(_ANOTHER)
        shard = connection.recv()
        if shard is None:
            return
        yield shard
