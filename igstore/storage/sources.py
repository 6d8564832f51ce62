"""Where a store's files are: a folder, or anything that has a URL. Whole files and parts, by names within the store.

Local files are mapped; what is behind a URL is fetched by fsspec (S3, HTTP, Google Cloud and others), many at once,
again where it failed, and never trusted to be as long as was asked for. Nothing here writes to a store, or knows Zarr.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from igstore.errors import DamagedStoreError, IgstoreError, UnreachableError, UserError
from igstore.storage import files
from igstore.storage.cache import ShardCache

Recorded = Mapping[str, Any]  # a file's ``bytes``, ``crc32c`` and ``sha256``, as its record has them
Part = tuple[int, int]  # first byte, and the one after the last
T = TypeVar("T")

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "IGSTORE_CACHE"

_ATTEMPTS = 4
_PAUSE = 0.5  # seconds before the second attempt; doubles
_PATIENCE = {"sock_connect": 10, "sock_read": 30}  # seconds without a byte, over HTTP
_LARGEST_REQUEST = 2**25  # bytes, so that a cut connection costs little


class Source(Protocol):
    """The files of one store.

    Attributes
    ----------
    where
        Its path or URL, for messages.
    gap
        Bytes that are sooner read and thrown away than left out by asking twice.
    """

    where: str
    gap: int

    def read(self, file: str) -> bytes:
        """A whole file; `FileNotFoundError` where there is none."""

    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        """Whole small files at once, None for each that is not there."""

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of small files, as they are, None for each that is not there."""

    def size(self, file: str, recorded: Recorded) -> int:
        """Bytes of a large file: as they are where that costs nothing to know, else as recorded."""

    def read_parts(self, file: str, parts: Sequence[Part], recorded: Recorded) -> list[bytes]:
        """Parts of a file, each as long as it was asked for; `FileNotFoundError` where there is none."""

    def path(self, file: str, recorded: Recorded) -> Path | None:
        """A path of the file on this machine; None where it is only to be had in parts."""

    def problem(self, file: str, recorded: Recorded) -> str:
        """Why a file is not the one that was recorded, in words that follow its name; "" where it is."""


class LocalFiles:
    """A store in a folder."""

    gap = 0

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()  # so that it is the same in a process that works elsewhere
        self.where = str(root)

    def read(self, file: str) -> bytes:
        """As `Source.read`."""
        return (self.root / file).read_bytes()

    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        """As `Source.read_many`."""
        return [_or_none(self.root / name) for name in names]

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """As `Source.sizes`."""
        paths = [self.root / name for name in names]
        return [path.stat().st_size if path.is_file() else None for path in paths]

    def size(self, file: str, recorded: Recorded) -> int:
        """As `Source.size`."""
        return (self.root / file).stat().st_size

    def read_parts(self, file: str, parts: Sequence[Part], recorded: Recorded) -> list[bytes]:
        """As `Source.read_parts`."""
        return _parts_of(self.root / file, parts)

    def path(self, file: str, recorded: Recorded) -> Path:
        """As `Source.path`."""
        return self.root / file

    def problem(self, file: str, recorded: Recorded) -> str:
        """As `Source.problem`."""
        path = self.root / file
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                return "is not a regular file"
            return _difference(path, recorded)
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"


class RemoteFiles:
    """A store behind a URL.

    It pickles as what it was made from, and each process connects for itself.

    Parameters
    ----------
    url
        Of the store's folder, in any of fsspec's protocols.
    cache
        Keep every shard that is read in this folder, whole, and read it from there; None fetches what is asked for.
    options
        As fsspec, zarr and xarray take `storage_options`.
    """

    gap = 2**18  # what a fast line carries in the time of a request

    def __init__(self, url: str, *, cache: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        self.where = url.rstrip("/")
        self._cache = None if cache is None else ShardCache(cache)
        self._options = dict(options or {})
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
            protocol = self.where.partition("://")[0]
            try:
                from fsspec.core import url_to_fs

                self._opened[os.getpid()] = url_to_fs(self.where, **{**_defaults(protocol), **self._options})
            except ImportError as error:
                raise UserError(
                    f"{self.where}: reading over {protocol} needs more packages ({error}); install them with "
                    "`pip install 'igstore[remote]'`"
                ) from error
            except (ValueError, TypeError) as error:
                raise UserError(f"{self.where} cannot be opened: {error}") from error
        return self._opened[os.getpid()]

    def read(self, file: str) -> bytes:
        """As `Source.read`."""
        (content,) = self.read_many([file])
        if content is None:
            raise FileNotFoundError(f"{self.where}/{file} is missing")
        return content

    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        """As `Source.read_many`."""
        return self._fetch(names, [None] * len(names))

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """As `Source.sizes`."""
        return [None if content is None else len(content) for content in self.read_many(names)]

    def size(self, file: str, recorded: Recorded) -> int:
        """As `Source.size`."""
        return int(recorded["bytes"])

    def read_parts(self, file: str, parts: Sequence[Part], recorded: Recorded) -> list[bytes]:
        """As `Source.read_parts`."""
        kept = self.path(file, recorded)
        if kept is not None:
            return _parts_of(kept, parts)
        if not self._keeps_whole:
            pieces = [piece for part in parts for piece in _divided(part)]
            try:
                contents = self._fetch([file] * len(pieces), pieces)
            except _GivesNoPartsError:
                self._keeps_whole = True
            else:
                if None in contents:
                    raise FileNotFoundError(f"{self.where}/{file} is missing")
                given = dict(zip(pieces, contents, strict=True))
                return [b"".join(given[piece] or b"" for piece in _divided(part)) for part in parts]
        return _parts_of(self._keep(self._own_cache, file, recorded), parts)

    def path(self, file: str, recorded: Recorded) -> Path | None:
        """As `Source.path`."""
        return None if self._cache is None else self._keep(self._cache, file, recorded)

    def problem(self, file: str, recorded: Recorded) -> str:
        """As `Source.problem`."""
        with tempfile.TemporaryDirectory(prefix="igstore-") as folder:
            copy = Path(folder, "copy")
            try:
                self._download(file, copy)
            except FileNotFoundError:
                return "is missing"
            return _difference(copy, recorded)

    @cached_property
    def _own_cache(self) -> ShardCache:
        """Where whole files are kept if nobody said where, for as long as this process lives."""
        folder = tempfile.TemporaryDirectory(prefix="igstore-")
        weakref.finalize(self, folder.cleanup)
        logger.warning(
            "%s: the server does not give parts of files, so whole shards are fetched; give cache=FOLDER, or set %s, "
            "to keep them for the next time",
            self.where,
            CACHE_VARIABLE,
        )
        return ShardCache(folder.name)

    def _keep(self, cache: ShardCache, file: str, recorded: Recorded) -> Path:
        return cache.keep(recorded, lambda path: self._download(file, path), what=f"{self.where}/{file}")

    def _download(self, file: str, path: Path) -> None:
        filesystem, root = self._there
        url = f"{root}/{file}"
        self._persist(file, lambda: filesystem.get_file(url, str(path)))

    def _fetch(self, names: Sequence[str], parts: Sequence[Part | None]) -> list[bytes | None]:
        """Files, or parts of them, in as many requests at once; None for those that are not there."""
        found: list[bytes | None] = [None] * len(names)
        left = list(range(len(names)))

        def ask() -> None:
            filesystem, root = self._there
            urls = [f"{root}/{names[place]}" for place in left]
            bounds = [parts[place] or (None, None) for place in left]
            answers = filesystem.cat_ranges(urls, *map(list, zip(*bounds, strict=True)), on_error="return")
            failures = []
            for place, answer in zip(list(left), answers, strict=True):
                try:
                    found[place] = _checked(answer, parts[place])
                except FileNotFoundError:
                    found[place] = None
                except _GivesNoPartsError:
                    raise
                except Exception as error:  # there is no common base of what servers and networks can do
                    failures.append(error)
                    continue
                left.remove(place)
            if failures:
                raise failures[0]

        if left:
            self._persist(names[0], ask)
        return found

    def _persist(self, file: str, ask: Callable[[], T]) -> T:
        """What `ask` returns, asking again where that may help."""
        reason: Exception | None = None
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                return ask()
            except (FileNotFoundError, IgstoreError, _GivesNoPartsError):
                raise
            except Exception as error:  # as above
                reason = error
            if isinstance(reason, PermissionError) or getattr(reason, "status", None) in (401, 403):
                raise UserError(
                    f"{self.where} refuses to be read ({_in_words(reason)}); give the access it wants as fsspec's "
                    "storage_options, such as {'anon': True} for a public bucket"
                ) from reason
        if isinstance(reason, _TooShortError) or getattr(reason, "status", None) == 416:
            raise DamagedStoreError(f"{self.where}/{file} is shorter than it must be; the copy there is damaged")
        raise UnreachableError(
            f"{self.where}/{file} could not be read, in {_ATTEMPTS} attempts: {_in_words(reason)}"
        ) from reason


class _GivesNoPartsError(Exception):
    """The server gave more than the part that it was asked for."""


class _TooShortError(Exception):
    """The server gave less than the part that it was asked for."""


def open_source(
    store: str | os.PathLike[str], *, cache: str | os.PathLike[str] | None, options: Mapping[str, Any] | None
) -> LocalFiles | RemoteFiles:
    """The files of the store at a path or URL; parameters as `igstore.storage.reader.StoreReader`."""
    url = os.fspath(store)
    protocol, _, rest = url.partition("://")
    if not rest or protocol == "file":
        if options:
            raise UserError(f"storage_options are for URLs; {url} is a path")
        return LocalFiles(Path(unquote(urlsplit(url).path)) if rest else Path(url).expanduser())
    folder = cache if cache is not None else os.environ.get(CACHE_VARIABLE)
    return RemoteFiles(url, cache=None if folder is None else os.fspath(folder), options=options)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether it is a URL, and not one of a local file."""
    protocol, separator, _ = os.fspath(path).partition("://")
    return bool(separator) and protocol != "file"


def _defaults(protocol: str) -> dict[str, Any]:
    """Options that fsspec is given unless the user says otherwise."""
    if protocol not in ("http", "https"):
        return {}
    from aiohttp import ClientTimeout

    return {"client_kwargs": {"timeout": ClientTimeout(total=None, **_PATIENCE)}}


def _or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedStoreError(f"{path} cannot be read ({error.strerror})") from error


def _checked(answer: bytes | Exception, part: Part | None) -> bytes:
    """What came back, if it is as long as what was asked for."""
    if isinstance(answer, Exception):
        raise answer
    if part is not None and len(answer) != part[1] - part[0]:
        raise _TooShortError if len(answer) < part[1] - part[0] else _GivesNoPartsError
    return bytes(answer)


def _divided(part: Part) -> list[Part]:
    """A part as parts that are each worth a request."""
    first, last = part
    return [(start, min(start + _LARGEST_REQUEST, last)) for start in range(first, last, _LARGEST_REQUEST)]


def _parts_of(path: Path, parts: Sequence[Part]) -> list[bytes]:
    with path.open("rb") as file:
        contents = [os.pread(file.fileno(), last - first, first) for first, last in parts]
    if any(len(content) != last - first for content, (first, last) in zip(contents, parts, strict=True)):
        raise DamagedStoreError(f"{path} is shorter than it must be; the build's command again repairs it")
    return contents


def _difference(path: Path, recorded: Recorded) -> str:
    """Why a file of this machine is not the one that was recorded; "" where it is."""
    size = path.stat().st_size
    if size != recorded["bytes"]:
        return f"has {size} bytes, and had {recorded['bytes']} when it was written"
    return "" if files.crc32c(path) == recorded["crc32c"] else "has changed since it was written"


def _in_words(error: Exception | None) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
