"""A folder of shards that were fetched from afar, kept by the checksum on record."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from igstore.errors import DamagedStoreError
from igstore.storage import files
from igstore.storage.locks import lock

_SHA256 = re.compile("[0-9a-f]{64}")


class ShardCache:
    """Files by their sha256, shared by any number of processes, stores and copies of a store.

    A file is kept only if its size and sha256 are those on record, and is whole or not there, whatever happens. Nothing
    is ever removed from the folder; its owner may, whenever nobody reads from it.

    Parameters
    ----------
    folder
        Made when it is first needed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser().absolute()

    def keep(self, recorded: Mapping[str, Any], fetch: Callable[[Path], None], *, what: str) -> Path:
        """The path of a file as it was recorded, fetched first if it is not here.

        Parameters
        ----------
        recorded
            Its size ``bytes``, and its ``crc32c`` and ``sha256`` in hex.
        fetch
            Writes it to the path that it is given.
        what
            The file's name, for messages.

        Raises
        ------
        DamagedStoreError
            What `fetch` wrote is not what was recorded.
        """
        sha256 = str(recorded["sha256"])
        if not _SHA256.fullmatch(sha256):  # it becomes a path, and a store's contents must not choose one
            raise DamagedStoreError(f"the record of {what} says {sha256!r:.80}, which is no sha256")
        kept = self.folder / sha256[:2] / sha256
        if not _has_size(kept, recorded):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with _alone(kept.with_name(f"{sha256}.lock")):
                if not _has_size(kept, recorded):  # another process may have fetched it meanwhile
                    _fetch(kept, recorded, fetch, what)
        return kept


def _fetch(kept: Path, recorded: Mapping[str, Any], fetch: Callable[[Path], None], what: str) -> None:
    for left in files.temporaries(kept):
        left.unlink(missing_ok=True)  # by processes that died: those that live hold the lock
    temporary = files.temporary_name(kept)
    try:
        fetch(temporary)
        found = files.checksum(temporary)
        if any(found[name] != recorded[name] for name in found):
            raise DamagedStoreError(
                f"{what} is not what was written there: it has {found['bytes']} bytes and sha256 "
                f"{found['sha256'][:12]}, its record says {recorded['bytes']} and {recorded['sha256'][:12]}; "
                "`igstore verify` says what else is damaged"
            )
        temporary.replace(kept)
    finally:
        temporary.unlink(missing_ok=True)


def _has_size(path: Path, recorded: Mapping[str, Any]) -> bool:
    try:
        return bool(path.stat().st_size == recorded["bytes"])
    except FileNotFoundError:
        return False


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from fetching the same file as long as the context lasts, where the system has locks."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)
