"""Several processes at one store: who else is at work there, one writer of a shard at a time, the last one sweeps.

The system's own locks (flock) say so. It takes those of a process that dies, however it dies, so nothing is left that
might be stale. On a file system without locks every process takes itself to be alone, but sweeps only what is old;
shards are whole and atomic all the same, and processes that compute the same write the same.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from igstore.storage import staging

_AT_WORK, _WRITING = "at_work", "writing"  # files in the staging folder, there to be locked
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_MOST_BYTES = 4096  # of names that are read


class Presence:
    """This process at a store, as `at_work` gives it.

    Attributes
    ----------
    others
        Who came before and may still be at work, in words, the latest last; empty where nobody is.
    has_locks
        Whether the store's file system has locks.
    """

    def __init__(self, store: Path, descriptor: int) -> None:
        self._store = store
        self._descriptor = descriptor
        alone = self._is_alone()
        self.has_locks = alone is not None
        if alone or not self.has_locks:
            os.ftruncate(descriptor, 0)  # those who are named there have left, or died
        self.others = os.pread(descriptor, _MOST_BYTES, 0).decode(errors="replace").splitlines()
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%F %R}\n".encode())
        _lock(descriptor, fcntl.LOCK_SH)

    def sweep(self) -> None:
        """Remove what interrupted writers left, unless somebody else is at work; the last thing to do in a context."""
        alone = self._is_alone()
        if alone or not self.has_locks:
            os.utime(self._descriptor)  # a file server's clock is not this machine's
            staging.sweep(self._store, is_alone=bool(alone), now=os.fstat(self._descriptor).st_mtime)

    def _is_alone(self) -> bool | None:
        """Whether nobody else is; then nobody comes in before this process leaves, or shares its lock again."""
        return _lock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def at_work(store: Path) -> Iterator[Presence]:
    """Be one of those who are at work at a store, as long as the context lasts.

    Raises
    ------
    StoreNotFoundError
        There is no store.
    """
    while True:
        descriptor = _open(store, _AT_WORK)
        _lock(descriptor, fcntl.LOCK_SH)
        if _is_at(staging.folder(store) / _AT_WORK, descriptor):
            break
        os.close(descriptor)  # the last one out has swept the file away meanwhile
    try:
        yield Presence(store, descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(store: Path) -> Iterator[None]:
    """Wait until nobody else writes a shard, and keep others from it as long as the context lasts; inside `at_work`."""
    descriptor = _open(store, _WRITING)
    try:
        _lock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open(store: Path, name: str) -> int:
    while True:
        folder = staging.make_folder(store)
        try:
            return os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except FileNotFoundError:
            continue  # swept in this very moment


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, operation: int) -> bool | None:
    """Whether the lock was granted; None where there are none."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True
