"""Where a store's files are: a folder, or anything that has a URL. Whole files and parts, by names within the store.

Local files are mapped; for others see `igstore.files.remote`. Nothing here writes to a store, or knows Zarr.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from igstore.errors import DamagedStoreError, UserError
from igstore.files import atomic
from igstore.files.access import MOST_METADATA, MOST_SMALL, NOT_THERE, Part, Recorded, read_parts, read_whole, reading
from igstore.files.remote import RemoteFiles

T = TypeVar("T")

CACHE_VARIABLE = "IGSTORE_CACHE"


class Source(Protocol):
    """The files of one store.

    Attributes
    ----------
    where
        Its path or URL, as it may be shown.
    gap
        Bytes that are sooner read and thrown away than left out by asking twice.
    """

    where: str
    gap: int

    @property
    def said(self) -> Mapping[str, str]:
        """By name, what a server said to files that it keeps back, which count as not there."""

    def read(self, file: str) -> bytes:
        """A whole file of metadata; `FileNotFoundError` where there is none."""

    def read_many(self, names: Sequence[str], recorded: Sequence[Recorded | None] = ()) -> list[bytes | None]:
        """Whole small files at once, None for each that is not there.

        Where `recorded` says what they were when they were written, what comes from afar is held against it.
        """

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of small files, as they are, None for each that is not there."""

    def size(self, file: str, recorded: Recorded) -> int:
        """Bytes of a large file: as they are where that costs nothing to know, else as recorded."""

    def read_parts(self, file: str, parts: Sequence[Part], recorded: Recorded) -> list[bytes]:
        """Parts of a file, each as long as it was asked for; `FileNotFoundError` where there is none."""

    def path(self, file: str, recorded: Recorded) -> Path | None:
        """A path of the file on this machine; None where it is only to be had in parts."""

    def is_plain(self, file: str) -> bool:
        """Whether nothing but a regular file is there, if anything is: no link, folder or pipe."""

    def problem(self, file: str, recorded: Recorded) -> str:
        """Why a file is not the one that was recorded, in words that follow its name; "" where it is."""


class LocalFiles:
    """A store in a folder."""

    gap = 0
    said: Mapping[str, str] = {}

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()  # so that it is the same in a process that works elsewhere
        self.where = str(root)

    def read(self, file: str) -> bytes:
        """As `Source.read`."""
        return read_whole(self.root / file, MOST_METADATA)

    def read_many(self, names: Sequence[str], recorded: Sequence[Recorded | None] = ()) -> list[bytes | None]:
        """As `Source.read_many`."""
        contents, left = [], MOST_SMALL
        for name in names:
            contents.append(_or_none(self.root / name, partial(read_whole, most=left)))
            left -= len(contents[-1] or b"")
        return contents

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """As `Source.sizes`."""
        found = [_or_none(self.root / name, Path.stat) for name in names]
        return [status.st_size if status and stat.S_ISREG(status.st_mode) else None for status in found]

    def size(self, file: str, recorded: Recorded) -> int:
        """As `Source.size`."""
        return (self.root / file).stat().st_size

    def read_parts(self, file: str, parts: Sequence[Part], recorded: Recorded) -> list[bytes]:
        """As `Source.read_parts`."""
        return read_parts(self.root / file, parts)

    def path(self, file: str, recorded: Recorded) -> Path:
        """As `Source.path`."""
        return self.root / file

    def is_plain(self, file: str) -> bool:
        """As `Source.is_plain`."""
        status = _or_none(self.root / file, Path.lstat)
        return status is None or stat.S_ISREG(status.st_mode)

    def problem(self, file: str, recorded: Recorded) -> str:
        """As `Source.problem`."""
        path = self.root / file
        try:
            with reading(path):
                return _difference(path, recorded)
        except NOT_THERE:
            return "is missing"
        except DamagedStoreError as error:
            return str(error).removeprefix(f"{path} ")


def open_source(
    store: str | os.PathLike[str], *, cache: str | os.PathLike[str] | None, options: Mapping[str, Any] | None
) -> LocalFiles | RemoteFiles:
    """The files of the store at a path or URL; parameters as `igstore.storage.StoreReader`."""
    url = os.fspath(store)
    protocol, _, rest = url.partition("://")
    if rest and protocol != "file":
        folder = cache if cache is not None else os.environ.get(CACHE_VARIABLE)
        return RemoteFiles(url, cache=None if folder is None else os.fspath(folder), options=options)
    if options:
        raise UserError(f"storage_options are for URLs; {url} is a path")
    if not rest:
        return LocalFiles(Path(url).expanduser())
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        raise UserError(f"{url} goes on with a ? or #, which the address of a file has not; write them as %3F and %23")
    return LocalFiles(Path(unquote(parts.path)))


def _or_none(path: Path, read: Callable[[Path], T]) -> T | None:
    """What is read of a file; None where it is not there."""
    with reading(path):
        try:
            return read(path)
        except NOT_THERE:
            return None


def _difference(path: Path, recorded: Recorded) -> str:
    """Why a file of this machine is not the one that was recorded; "" where it is."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return "is not a regular file"
    size = path.stat().st_size
    if size != recorded["bytes"]:
        return f"has {size} bytes, and had {recorded['bytes']} when it was written"
    return "" if atomic.crc32c(path) == recorded["crc32c"] else "has changed since it was written"
