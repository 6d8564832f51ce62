"""How a server is asked for a file, or for a part of one: what it sends is bounded, and only believed if it fits.

HTTP goes through fsspec's own session, S3 through s3fs; what both say in their headers is looked at alike. Of other
protocols fsspec gives bytes alone.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from igstore.files.access import Part
from igstore.files.names import shown

_AT_ONCE = 64  # requests
_CONNECTING = 10.0  # seconds until a server has to be there
_SILENCE = 30.0  # seconds without a byte
_START = 60.0  # seconds in which it may be as slow as it likes
_SLOWEST = 2**14  # bytes a second from then on, all requests together

_REFUSALS = (401, 402, 403, 407, 451)
_PASSING = (408, 425, 429, 500, 502, 503, 504)
A_PAGE = "a page for people"
_PAGES = ("text/html", "application/xhtml+xml")


class RefusedError(Exception):
    """The server keeps it back: it says so, or shows a page for people instead. The message is what it said."""


class BusyError(Exception):
    """The server cannot answer now; the message is what it said.

    Attributes
    ----------
    pause
        After how many seconds it wants to be asked again; None where it does not say.
    """

    def __init__(self, said: str, pause: float | None = None) -> None:
        super().__init__(said)
        self.pause = pause


class UselessError(Exception):
    """What the server answers would not be another thing if it were asked again; the message is what it said."""


class NoPartsError(Exception):
    """The server does not give the part that it was asked for, but the whole file, or another part."""


class TooShortError(Exception):
    """The file ends before the part that was asked for does."""


class TooLongError(Exception):
    """More comes than there can be."""


@dataclass(frozen=True)
class Reply:
    """What a server says of a file, as far as it says anything.

    Attributes
    ----------
    size
        Bytes of all of it.
    tag
        Its ETag.
    modified, asked
        When it was last changed, and when it was asked for, in seconds since 1970, both by the server's clock.
    """

    size: int | None = None
    tag: str | None = None
    modified: float | None = None
    asked: float | None = None


class Budget:
    """How much may be received, and how slowly, by several requests together.

    Parameters
    ----------
    most
        Bytes.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._received = 0
        self._start = time.monotonic()

    def take(self, n_bytes: int) -> None:
        """Count bytes that were received; raises `TooLongError` where they are too many."""
        self._received += n_bytes
        if self._received > self.most:
            raise TooLongError

    @property
    def deadline(self) -> float:
        """When the next bytes must have come, by `time.monotonic`."""
        return min(time.monotonic() + _SILENCE, self._last_moment)

    @property
    def _last_moment(self) -> float:
        return self._start + _START + self._received / _SLOWEST

    @property
    def is_overrun(self) -> bool:
        """Whether all that was received came too slowly."""
        return time.monotonic() >= self._last_moment


def with_defaults(protocol: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A user's `storage_options`, and what igstore adds to them: as many connections as requests, no total time."""
    defaults: dict[str, dict[str, Any]] = {}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        defaults = {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=_CONNECTING)}}
    elif protocol in ("s3", "s3a"):
        defaults = {"config_kwargs": {"max_pool_connections": _AT_ONCE}}
    return {**options, **{name: {**own, **options.get(name, {})} for name, own in defaults.items()}}


async def get(
    filesystem: Any,
    url: str,
    part: Part | None,
    budget: Budget,
    *,
    check: Callable[[Reply], None],
    write: Callable[[bytes], object],
) -> None:
    """Ask for a file or a part of one.

    Parameters
    ----------
    filesystem, url
        As fsspec has them.
    part
        None is the whole file.
    budget
        Of this request and others.
    check
        Is given what the server says of the file before any byte of it; raises what makes it useless.
    write
        Is given the bytes in pieces, in order, none beyond those that were asked for.

    Raises
    ------
    FileNotFoundError
        There is none.
    RefusedError, BusyError, UselessError, NoPartsError, TooShortError, TooLongError
        As they say.
    Exception
        Whatever networks do.
    """
    n_bytes, expected = 0, None if part is None else part[1] - part[0]
    try:
        async with asyncio.timeout_at(budget.deadline) as clock:
            async with _asking(filesystem)(filesystem, url, part) as (reply, pieces):
                check(reply)
                if part is None and (reply.size or 0) > budget.most:
                    raise TooLongError
                async for piece in pieces:
                    n_bytes += len(piece)
                    if expected is not None and n_bytes > expected:
                        raise NoPartsError
                    budget.take(len(piece))
                    clock.reschedule(budget.deadline)
                    write(piece)
    except TimeoutError:
        if budget.is_overrun:
            raise UselessError(f"it sends fewer than {_SLOWEST} bytes a second") from None
        raise BusyError(f"it has sent nothing for {_SILENCE:.0f} seconds") from None
    if expected is not None and n_bytes < expected:
        raise BusyError("it broke off")


def together(filesystem: Any, requests: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> list[Exception | None]:
    """Make requests of a file system, many at once; for each what it raised, None where it went well."""
    from fsspec.asyn import get_loop, sync

    async def run() -> list[BaseException | None]:
        gate = asyncio.Semaphore(_AT_ONCE if filesystem.async_impl else 1)

        async def one(request: Callable[[], Coroutine[Any, Any, None]]) -> None:
            async with gate:
                await request()

        return await asyncio.gather(*map(one, requests), return_exceptions=True)

    results: list[Exception | None] = sync(filesystem.loop if filesystem.async_impl else get_loop(), run)
    return results


def _asking(filesystem: Any) -> Callable[..., Any]:
    protocols = [filesystem.protocol] if isinstance(filesystem.protocol, str) else filesystem.protocol
    if "http" in protocols:
        return _ask_http
    return _ask_s3 if "s3" in protocols else _ask_other


@asynccontextmanager
async def _ask_http(filesystem: Any, url: str, part: Part | None) -> AsyncIterator[tuple[Reply, AsyncIterator[bytes]]]:
    session, options = await filesystem.set_session(), filesystem.kwargs
    # a part of what is compressed would be no part of the file
    headers = {**options.get("headers", {}), "Accept-Encoding": "identity", **_range(part)}
    async with session.get(filesystem.encode_url(url), **{**options, "headers": headers}) as answer:
        headers = {name.lower(): value for name, value in answer.headers.items()}
        whence = f", after a redirect to {shown(str(answer.url))}" if answer.history else ""
        yield _reply(answer.status, headers, part, whence), answer.content.iter_any()


@asynccontextmanager
async def _ask_s3(filesystem: Any, url: str, part: Part | None) -> AsyncIterator[tuple[Reply, AsyncIterator[bytes]]]:
    bucket, key, _ = filesystem.split_path(url)
    try:
        answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **_range(part))
    except OSError as error:  # s3fs's words for what botocore raises
        said = getattr(error.__cause__, "response", {}).get("ResponseMetadata")
        if said:
            _reply(said["HTTPStatusCode"], said["HTTPHeaders"], part, f": {error}")
        raise
    async with answer["Body"] as body:
        said = answer["ResponseMetadata"]
        yield _reply(said["HTTPStatusCode"], said["HTTPHeaders"], part, ""), body.iter_chunks(2**20)


@asynccontextmanager
async def _ask_other(filesystem: Any, url: str, part: Part | None) -> AsyncIterator[tuple[Reply, AsyncIterator[bytes]]]:
    first, last = part or (None, None)
    if filesystem.async_impl:
        content = await filesystem._cat_file(url, start=first, end=last)
    else:
        content = await asyncio.to_thread(filesystem.cat_file, url, start=first, end=last)
    if part is not None and len(content) < part[1] - part[0]:
        raise TooShortError

    async def pieces() -> AsyncIterator[bytes]:
        yield content

    yield Reply(), pieces()


def _range(part: Part | None) -> dict[str, str]:
    return {} if part is None else {"Range": f"bytes={part[0]}-{part[1] - 1}"}


def _reply(status: int, headers: Mapping[str, str], part: Part | None, whence: str) -> Reply:
    """What the head of an answer says, if the body is the part that was asked for.

    Parameters
    ----------
    status, headers
        The headers by their names in lower case.
    part
        None where the whole file was asked for.
    whence
        Ends what is said of an answer that is none.
    """
    said = f"{status} {_phrase(status)}{whence}"
    if status in (404, 410):
        raise FileNotFoundError(said)
    if status in _REFUSALS:
        raise RefusedError(said)
    if status in _PASSING:
        raise BusyError(said, _pause(headers))
    if status == 416:
        raise TooShortError
    if status == 200 and headers.get("content-type", "").partition(";")[0].strip().lower() in _PAGES:
        raise RefusedError(f"{A_PAGE}{whence}")
    is_encoded = headers.get("content-encoding", "identity") != "identity"
    size = None if is_encoded else _number(headers.get("content-length"))
    if status == 206 and part is not None and not is_encoded:
        size = _size_of_whole(headers.get("content-range", ""), part)
    elif status != 200 and (status != 206 or part is None):
        raise UselessError(said)
    elif status == 206 or part not in (None, (0, size)):
        raise NoPartsError
    return Reply(size, headers.get("etag"), _seconds(headers.get("last-modified")), _seconds(headers.get("date")))


def _size_of_whole(content_range: str, part: Part) -> int | None:
    """The bytes of the file that a part is of, where its ``Content-Range`` says; it must be the part asked for."""
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", content_range.strip())
    given = (int(match[1]), int(match[2]) + 1) if match else None
    if match is None or given is None or given[0] != part[0] or given[1] > part[1]:
        raise NoPartsError
    if given[1] < part[1]:
        raise TooShortError
    return _number(match[3])


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _number(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"\d{1,18}", text) else None


def _seconds(text: str | None) -> float | None:
    """A date of HTTP's in seconds since 1970."""
    try:
        moment = parsedate_to_datetime(text or "")
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _pause(headers: Mapping[str, str]) -> float | None:
    """The seconds that a server wants to be left alone for: a number of them, or a date."""
    text = headers.get("retry-after", "").strip()
    if (number := _number(text)) is not None:
        return float(number)
    until, now = _seconds(text), _seconds(headers.get("date")) or datetime.now(UTC).timestamp()
    return None if until is None else max(0.0, until - now)
