"""A store behind a URL, read through fsspec: many requests at once, again where it helps, and nothing believed unseen.

A part is the one that was asked for, of the file that was on record when the store was opened; what is refused or shows
a page for people is not there; what comes too slowly or without end is given up.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import google_crc32c

from igstore.errors import AccessError, DamagedStoreError, IgstoreError, ReplacedError, UnreachableError, UserError
from igstore.files import servers
from igstore.files.access import MOST_METADATA, MOST_SMALL, Part, Recorded, access_error, read_parts
from igstore.files.cache import ShardCache
from igstore.files.names import shown
from igstore.files.servers import (
    BusyError,
    NoPartsError,
    RefusedError,
    Reply,
    TooLongError,
    TooShortError,
    UselessError,
)

logger = logging.getLogger(__name__)

_ATTEMPTS = 4
_PAUSE = 0.5  # seconds before the second attempt; doubles
_LONGEST_PAUSE = 60.0  # seconds, however long a server wants to be left alone
_LARGEST_REQUEST = 2**25  # bytes, so that a cut connection costs little


@dataclass(frozen=True)
class _Wanted:
    """A file, or a part of one, that is to be fetched.

    Attributes
    ----------
    begin
        Called before each attempt; what it returns is given the bytes.
    """

    file: str
    part: Part | None
    recorded: Recorded | None
    begin: Callable[[], Callable[[bytes], object]]


class RemoteFiles:
    """A store behind a URL, as `igstore.files.Source`.

    It pickles as what it was made from, options and all, and each process connects for itself.

    Parameters
    ----------
    url
        Of the store's folder, in any of fsspec's protocols. What an HTTP address has after a question mark, as signed
        links do, is sent along for every file.
    cache
        Keep every shard that is read in this folder, whole, and read it from there; None fetches what is asked for.
    options
        As fsspec, zarr and xarray take `storage_options`.
    """

    gap = 2**18  # what a fast line carries in the time of a request

    def __init__(self, url: str, *, cache: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        self.where = shown(url).rstrip("/")
        address, mark, query = url.partition("?")
        if "#" in url or (mark and not address.startswith(("http://", "https://"))):
            raise UserError(f"the address of {self.where} goes on with a ? or #; only http(s) addresses have a query")
        self._url, self._query = address.rstrip("/"), mark + query
        self.said: dict[str, str] = {}
        self._cache = None if cache is None else ShardCache(cache)
        self._fills_cache = True
        self._options = dict(options or {})
        self._versions: dict[str, str | float] = {}  # of each file: what tells it from what may take its place
        self._as_of = 0.0  # when records were read, by the server's clock
        self._opened: dict[int, tuple[Any, str]] = {}  # by process: connections do not survive a fork
        self._keeps_whole = False  # because the server does not give parts
        _ = self._there  # raises where the protocol is not known

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_own_cache", None)
        return state | {"_opened": {}, "_keeps_whole": False}

    @property
    def _there(self) -> tuple[Any, str]:
        """The file system, and the store's path in it."""
        if os.getpid() not in self._opened:
            protocol = self._url.partition("://")[0]
            try:
                from fsspec.core import url_to_fs

                self._opened[os.getpid()] = url_to_fs(self._url, **servers.with_defaults(protocol, self._options))
            except ImportError as error:
                raise UserError(
                    f"{self.where}: reading over {protocol} needs more packages ({error}); install them with "
                    "`pip install 'igstore[remote]'`"
                ) from error
            except (ValueError, TypeError) as error:
                raise UserError(f"{self.where} cannot be opened: {shown(str(error))}") from None
        return self._opened[os.getpid()]

    def read(self, file: str) -> bytes:
        """As `Source.read`."""
        (content,) = self._contents([file], [None], [None], most=MOST_METADATA)
        if content is None:
            raise self._absence(file)
        return content

    def read_many(self, names: Sequence[str], recorded: Sequence[Recorded | None] = ()) -> list[bytes | None]:
        """As `Source.read_many`."""
        recorded, knew_of_none = recorded or [None] * len(names), not self.said
        contents = self._contents(names, [None] * len(names), recorded, most=MOST_SMALL)
        if knew_of_none and self.said:  # buckets that must not be listed say such things of what is not there
            file, said = next(iter(self.said.items()))
            logger.warning("%s: the server says %s to %s; it is taken not to be there", self.where, said, file)
        for name, content, record in zip(names, contents, recorded, strict=True):
            if content is not None and record and f"{google_crc32c.value(content):08x}" != record["crc32c"]:
                raise DamagedStoreError(f"{self.where}/{name} has changed since it was written")
        return contents

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """As `Source.sizes`."""
        return [None if content is None else len(content) for content in self.read_many(names)]

    def size(self, file: str, recorded: Recorded) -> int:
        """As `Source.size`."""
        return int(recorded["bytes"])

    def read_parts(self, file: str, parts: Sequence[Part], recorded: Recorded) -> list[bytes]:
        """As `Source.read_parts`."""
        kept = self.path(file, recorded)
        if kept is None and not self._keeps_whole:
            pieces = [piece for part in parts for piece in _divided(part)]
            n_bytes = sum(last - first for first, last in pieces)
            try:
                contents = self._contents([file] * len(pieces), pieces, [recorded] * len(pieces), most=n_bytes)
            except NoPartsError:
                self._keeps_whole = True
            else:
                if None in contents:
                    raise self._absence(file)
                given = dict(zip(pieces, contents, strict=True))
                return [b"".join(given[piece] or b"" for piece in _divided(part)) for part in parts]
        return read_parts(kept or self._keep(self._own_cache, file, recorded), parts)

    def path(self, file: str, recorded: Recorded) -> Path | None:
        """As `Source.path`."""
        if self._cache is None:
            return None
        try:
            if self._fills_cache:
                return self._keep(self._cache, file, recorded)
            return self._cache.find(recorded, what=file)
        except AccessError as error:
            logger.warning("%s; reading goes on without it", error)
            self._fills_cache = False
            return None

    def is_plain(self, file: str) -> bool:
        """As `Source.is_plain`; nothing else has an address."""
        return True

    def problem(self, file: str, recorded: Recorded) -> str:
        """As `Source.problem`."""
        crc = 0

        def begin() -> Callable[[bytes], object]:
            nonlocal crc
            crc = 0
            return add

        def add(piece: bytes) -> None:
            nonlocal crc
            crc = google_crc32c.extend(crc, piece)

        try:
            (is_there,) = self._fetch([_Wanted(file, None, recorded, begin)], most=recorded["bytes"])
        except DamagedStoreError as error:
            return str(error).removeprefix(f"{self.where}/{file} ")
        if not is_there:
            return f"is missing: the server says {self.said[file]}" if file in self.said else "is missing"
        return "" if f"{crc:08x}" == recorded["crc32c"] else "has changed since it was written"

    @cached_property
    def _own_cache(self) -> ShardCache:
        """Where whole files are kept if nobody said where, for as long as this process lives."""
        try:
            folder = tempfile.TemporaryDirectory(prefix="igstore-")
        except OSError as error:
            raise access_error("no temporary folder can be made", error) from error
        weakref.finalize(self, folder.cleanup)
        logger.warning(
            "%s: the server does not give parts of files, so whole shards are fetched; give cache=FOLDER, or set "
            "IGSTORE_CACHE, to keep them for the next time",
            self.where,
        )
        return ShardCache(folder.name)

    def _keep(self, cache: ShardCache, file: str, recorded: Recorded) -> Path:
        def fetch(begin: Callable[[], Callable[[bytes], object]]) -> None:
            (is_there,) = self._fetch([_Wanted(file, None, recorded, begin)], most=recorded["bytes"])
            if not is_there:
                raise self._absence(file)

        return cache.keep(recorded, fetch, what=f"{self.where}/{file}")

    def _absence(self, file: str) -> Exception:
        """Why a file is not there that must be."""
        if file not in self.said:
            return FileNotFoundError(f"{self.where}/{file} is missing")
        return UserError(
            f"{self.where} refuses to be read (the server says {self.said[file]} to {file}); give the access it wants "
            "as fsspec's storage_options, such as {'anon': True} for a public bucket"
        )

    def _contents(
        self, names: Sequence[str], parts: Sequence[Part | None], recorded: Sequence[Recorded | None], *, most: int
    ) -> list[bytes | None]:
        """Files, or parts of them, in memory; None for those that are not there. At most so many bytes together."""
        contents = [bytearray() for _ in names]

        def begin(content: bytearray) -> Callable[[bytes], object]:
            content.clear()
            return content.extend

        wanted = [
            _Wanted(name, part, record, partial(begin, content))
            for name, part, record, content in zip(names, parts, recorded, contents, strict=True)
        ]
        found = self._fetch(wanted, most=most)
        for place, name in enumerate(names):
            if found[place] and name.endswith(".json") and contents[place].lstrip().startswith(b"<"):
                found[place], self.said[name] = False, servers.A_PAGE
        return [bytes(content) if is_there else None for content, is_there in zip(contents, found, strict=True)]

    def _fetch(self, wanted: Sequence[_Wanted], *, most: int) -> list[bool]:
        """Fetch files, or parts, in as many requests at once, again where that may help; whether each is there.

        What the server keeps back is not there, and what it says is in `said`.
        """
        filesystem, root = self._there
        found: dict[int, bool] = {}
        for attempt in range(_ATTEMPTS):
            budget = servers.Budget(most)
            left = [place for place in range(len(wanted)) if place not in found]
            requests = [partial(self._get, filesystem, root, wanted[place], budget) for place in left]
            failures = []
            for place, error in zip(left, servers.together(filesystem, requests), strict=True):
                if error is None or isinstance(error, FileNotFoundError | RefusedError | PermissionError):
                    found[place] = error is None
                    if error and not isinstance(error, FileNotFoundError):
                        self.said[wanted[place].file] = shown(str(error))
                else:
                    failures.append((wanted[place].file, error))
            if not failures:
                break
            for file, error in failures:
                self._raise_for_good(file, error, most)
            self._pause(attempt, *failures[0])
        return [found[place] for place in range(len(wanted))]

    async def _get(self, filesystem: Any, root: str, wanted: _Wanted, budget: servers.Budget) -> None:
        url = f"{root}/{wanted.file}{self._query}"
        check = partial(self._check, wanted.file, wanted.recorded)
        await servers.get(filesystem, url, wanted.part, budget, check=check, write=wanted.begin())

    def _check(self, file: str, recorded: Recorded | None, reply: Reply) -> None:
        """Raise unless what the server says of a file is what the record, and the server itself, said of it before."""
        if recorded is None:  # a record, or something older than records
            self._as_of = max(self._as_of, reply.asked or 0)
            return
        version = reply.tag or reply.modified
        is_another = version is not None and self._versions.setdefault(file, version) != version
        if is_another or (self._as_of and (reply.modified or 0) > self._as_of):
            raise ReplacedError(f"{self.where}/{file} has been replaced since the store was opened; open it again")
        if reply.size is not None and reply.size < recorded["bytes"]:
            raise TooShortError
        if reply.size is not None and reply.size > recorded["bytes"]:
            raise TooLongError

    def _raise_for_good(self, file: str, error: Exception, most: int) -> None:
        """Raise what to ask again would not help against."""
        what = f"{self.where}/{file}"
        if isinstance(error, IgstoreError | NoPartsError):
            raise error
        if isinstance(error, TooShortError):
            raise DamagedStoreError(f"{what} is shorter than it must be; the copy there is damaged")
        if isinstance(error, TooLongError):
            raise DamagedStoreError(f"{what} has more than the {most} bytes that it may have")
        if isinstance(error, UselessError):
            raise UnreachableError(f"{what} could not be read: {error}")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise access_error(f"{what} cannot be read", error) from None

    def _pause(self, attempt: int, file: str, error: Exception) -> None:
        """Wait until it is time to ask again; raise `UnreachableError` where it is not worth it."""
        what, pause = f"{self.where}/{file} could not be read", getattr(error, "pause", None)
        said = str(error) if isinstance(error, BusyError) else f"{type(error).__name__}: {error}"
        said = " ".join(shown(said).split())[:200]
        if attempt + 1 == _ATTEMPTS:
            raise UnreachableError(f"{what}, in {_ATTEMPTS} attempts: {said}")
        if pause is not None and pause > _LONGEST_PAUSE:
            raise UnreachableError(f"{what}: {said}; it wants to be asked again in {pause:.0f} seconds")
        time.sleep(_PAUSE * 2**attempt if pause is None else pause)


def _divided(part: Part) -> list[Part]:
    """A part as parts that are each worth a request."""
    first, last = part
    return [(start, min(start + _LARGEST_REQUEST, last)) for start in range(first, last, _LARGEST_REQUEST)]
