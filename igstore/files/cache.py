"""A folder of shards that were fetched from afar, kept by the checksum on record."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from igstore.errors import DamagedStoreError, IgstoreError
from igstore.files import atomic
from igstore.files.access import NOT_THERE, Recorded, access_error
from igstore.files.locks import lock

logger = logging.getLogger(__name__)

_SHA256 = re.compile("[0-9a-f]{64}")

_NO_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that know of none

Write = Callable[[bytes], object]


class ShardCache:
    """Files by their sha256, shared by any number of processes, stores and copies of a store.

    A file is kept only if its size and sha256 are those on record, is whole or not there, whatever happens, and is
    looked at again by each process that reads it: disks forget. Nothing is ever removed from the folder but what has
    changed in it; its owner may remove anything, whenever nobody reads from it.

    Parameters
    ----------
    folder
        Made when it is first needed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self._sound: set[Path] = set()  # what this process has looked at

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sound": set()}

    def find(self, recorded: Recorded, *, what: str) -> Path | None:
        """The path of a file as it was recorded; None where it is not here.

        Parameters
        ----------
        recorded
            Its size ``bytes``, and its ``crc32c`` and ``sha256`` in hex.
        what
            The file's name, for messages.

        Raises
        ------
        AccessError
            The folder cannot be read.
        """
        kept = self._path(recorded, what)
        with self._using(), suppress(*NOT_THERE):
            if kept.stat().st_size != recorded["bytes"]:
                return None
            if kept in self._sound or atomic.crc32c(kept) == recorded["crc32c"]:
                self._sound.add(kept)
                return kept
            logger.warning("%s has changed since it was kept, so %s is fetched again", kept, what)
        return None

    def keep(self, recorded: Recorded, fetch: Callable[[Callable[[], Write]], None], *, what: str) -> Path:
        """The path of a file as it was recorded, fetched first if it is not here.

        Parameters
        ----------
        recorded, what
            As `find`.
        fetch
            Is given a function to call whenever it begins; what that one returns takes the file's bytes, in order.

        Raises
        ------
        AccessError
            The folder cannot be read, or written.
        DamagedStoreError
            What `fetch` wrote is not what was recorded.
        """
        found = self.find(recorded, what=what)
        if found:
            return found
        kept = self._path(recorded, what)
        with self._using():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with _alone(kept.with_name(f"{kept.name}.lock")):
                if not self.find(recorded, what=what):  # another process may have fetched it meanwhile
                    self._fetch(kept, recorded, fetch, what)
        self._sound.add(kept)
        return kept

    def _path(self, recorded: Recorded, what: str) -> Path:
        sha256 = str(recorded["sha256"])
        if not _SHA256.fullmatch(sha256):  # a store's contents must not choose a path
            raise DamagedStoreError(f"the record of {what} says {sha256!r:.80}, which is no sha256")
        return self.folder / sha256[:2] / sha256

    def _fetch(self, kept: Path, recorded: Recorded, fetch: Callable[[Callable[[], Write]], None], what: str) -> None:
        for left in atomic.temporaries(kept):
            left.unlink(missing_ok=True)  # by processes that died: those that live hold the lock
        temporary = atomic.temporary_name(kept)
        try:
            with temporary.open("wb", buffering=0) as file:
                fetch(lambda: self._begin(file))
            found = atomic.checksum(temporary)
            if any(found[name] != recorded[name] for name in found):
                raise DamagedStoreError(
                    f"{what} is not what was written there: it has {found['bytes']} bytes and sha256 "
                    f"{found['sha256'][:12]}, its record says {recorded['bytes']} and {recorded['sha256'][:12]}; "
                    "`igstore verify` says what else is damaged"
                )
            try:
                atomic.flush(temporary)
            except OSError as error:
                if error.errno not in _NO_FLUSH:
                    raise
            temporary.replace(kept)
        finally:
            temporary.unlink(missing_ok=True)

    def _begin(self, file: BinaryIO) -> Write:
        with self._using():
            file.seek(0)
            file.truncate()

        def write(piece: bytes) -> None:
            left = memoryview(piece)
            with self._using():
                while left:
                    left = left[file.write(left) :]

        return write

    @contextmanager
    def _using(self) -> Iterator[None]:
        try:
            yield
        except IgstoreError:
            raise
        except OSError as error:
            raise access_error(f"the cache {self.folder} cannot be used", error) from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from fetching the same file as long as the context lasts, where the system has locks."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)
