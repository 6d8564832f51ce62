"""Several processes at one store: who else is at work there, one writer at a time, the last one sweeps.

The system's own locks say so. On a file system without locks every process takes itself to be alone, but sweeps only
what is old; shards are whole and atomic all the same, and processes that compute the same write the same.

The files that are locked are in the staging folder, and are gone when nobody needs them any more.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from igstore.errors import StoreNotFoundError, UserError
from igstore.files import NOT_THERE, Folder, lock
from igstore.storage import staging

logger = logging.getLogger(__name__)

_AT_WORK, _WRITING = f"{staging.FOLDER}/at_work", f"{staging.FOLDER}/writing"
_MOST_BYTES = 4096  # of names that are read
_PATIENCE = 5.0  # seconds to wait for a lock without a word
_PAUSES = (0.01, 0.5)  # seconds between attempts at a lock, at first and at most


class Presence:
    """This process at a store, as `at_work` gives it.

    Attributes
    ----------
    folder
        The store's.
    others
        Who came before and may still be at work, in words, the latest last; empty where nobody is.
    has_locks
        Whether the store's file system has locks.
    """

    def __init__(self, folder: Folder, taken: _Taken) -> None:
        self.folder = folder
        self._taken = taken
        self.others = taken.others
        self.has_locks = taken.alone is not None

    def sweep(self) -> None:
        """Remove what interrupted writers left, unless somebody else is at work; the last thing to do in a context."""
        # nobody comes in any more if this one is alone
        folder, descriptor = self.folder, self._taken.descriptor
        alone = lock(descriptor)
        if alone is False or not folder.is_in_place:
            return
        os.utime(descriptor)  # a file server's clock is not this machine's
        with _taking(folder, _WRITING):  # from those who only look in
            staging.sweep(folder, is_alone=bool(alone), now=os.fstat(descriptor).st_mtime)
        if not staging.units(folder):
            folder.remove(_AT_WORK)


@contextmanager
def at_work(store: Path) -> Iterator[Presence]:
    """Be one of those who are at work at a store, as long as the context lasts.

    Raises
    ------
    StoreNotFoundError
        There is no store.
    """
    with hold(store) as folder:
        if folder.read("zarr.json") is None:
            raise gone(folder.path)
        taken = _take(folder, _AT_WORK, shared=True)
        try:
            yield Presence(folder, taken)
        finally:
            os.close(taken.descriptor)
            folder.remove_empty(staging.FOLDER)


@contextmanager
def hold(store: Path) -> Iterator[Folder]:
    """The folder of a store, which stays the same one whatever becomes of its name; whoever writes, writes there.

    Raises
    ------
    StoreNotFoundError
        There is no folder.
    """
    try:
        folder = Folder(store)
    except NOT_THERE:
        raise gone(store) from None
    with folder:
        yield folder


@contextmanager
def writing(folder: Folder, *, shared: bool = False, given_up: threading.Event | None = None) -> Iterator[None]:
    """Keep others from writing in a store as long as the context lasts, having waited until nobody does.

    Whoever is waited for is named, after a while.

    Parameters
    ----------
    folder
        The store's.
    shared
        Beside others that share it, who write other files.
    given_up
        Set by who does not want to wait any longer.

    Raises
    ------
    StoreNotFoundError
        The store is gone, or another is in its place.
    """
    with _taking(folder, _WRITING, shared=shared, given_up=given_up):
        check_in_place(folder)  # it may have taken long
        try:
            yield
        except FileNotFoundError:
            check_in_place(folder)  # nothing can be made in a folder that is deleted
            raise


def check_in_place(folder: Folder) -> None:
    """Raise `StoreNotFoundError` if a store is gone, or another is in its place."""
    if not folder.is_in_place:
        if folder.path.exists():
            raise replaced(folder.path)
        raise gone(folder.path)


def gone(store: Path) -> StoreNotFoundError:
    """The error that says so."""
    return StoreNotFoundError(f"{store} is gone: it was deleted or moved while it was being written; start again")


def replaced(store: Path) -> StoreNotFoundError:
    """The error that says so."""
    return StoreNotFoundError(
        f"{store} is not the store that was being written: another process has replaced or extended it; run the "
        "same command again to go on with what is there"
    )


@dataclass(frozen=True)
class _Taken:
    """A file that is locked and under its name, or would be locked if there were locks.

    Attributes
    ----------
    descriptor
        Of the file; whoever took it closes it.
    alone
        Whether nobody else had it; None without locks.
    others
        Those who had, in words.
    """

    descriptor: int
    alone: bool | None
    others: list[str]


def _take(folder: Folder, name: str, *, shared: bool, given_up: threading.Event | None = None) -> _Taken:
    while True:
        check_in_place(folder)
        try:
            descriptor = folder.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        except FileNotFoundError:
            continue  # the staging folder was swept away in this moment
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.ELOOP):
                raise
            folder.remove(name)  # a folder or a link, where a file belongs
            continue
        try:
            alone = lock(descriptor)
            if alone is False:
                _wait(folder, descriptor, shared=shared, given_up=given_up)
            if alone is not False or not shared:
                os.ftruncate(descriptor, 0)  # those who are named there have left, or died
            others = _names(descriptor)
            os.write(
                descriptor, f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%F %R}\n".encode()
            )
            if shared:
                _wait(folder, descriptor, shared=True)
            if _is_at(folder, name, descriptor):
                return _Taken(descriptor, alone, others)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever had it before has removed it


@contextmanager
def _taking(
    folder: Folder, name: str, *, shared: bool = False, given_up: threading.Event | None = None
) -> Iterator[None]:
    """Take a file for a context; the last one to let go of it removes it."""
    taken = _take(folder, name, shared=shared, given_up=given_up)
    try:
        yield
    finally:
        if lock(taken.descriptor) is not False:
            folder.remove(name)
        os.close(taken.descriptor)
        folder.remove_empty(staging.FOLDER)


def _wait(folder: Folder, descriptor: int, *, shared: bool, given_up: threading.Event | None = None) -> None:
    """Wait until a lock is granted, and name whoever has it if that takes long."""
    started, pause, is_said = time.monotonic(), _PAUSES[0], False
    while lock(descriptor, shared=shared) is False:
        names = ", ".join(_names(descriptor)) or "another process"
        if given_up is not None and given_up.is_set():
            raise UserError(f"{folder.path}: waiting for {names} was given up")
        if not is_said and time.monotonic() - started > _PATIENCE:
            logger.warning("%s: waiting for %s, writing there; if that hangs, end it", folder.path, names)
            is_said = True
        time.sleep(pause)
        pause = min(2 * pause, _PAUSES[1])


def _is_at(folder: Folder, name: str, descriptor: int) -> bool:
    try:
        there = folder.open(name, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return os.path.sameopenfile(there, descriptor)
    finally:
        os.close(there)


def _names(descriptor: int) -> list[str]:
    """Who have written their names into an open file, the latest last."""
    lines = os.pread(descriptor, _MOST_BYTES, 0).decode(errors="replace").splitlines()
    return list(dict.fromkeys(lines))
