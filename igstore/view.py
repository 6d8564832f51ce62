"""`igstore view`: a page that shows what any mask leaves of any image, read by the browser from the store itself.

The server hands out files and nothing else: the page's and the store's, to this machine, parts of files where parts are
asked for. The page is plain files, so any web server with range support can do the same; see `save_page`.
"""

from __future__ import annotations

import html
import ipaddress
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from igstore import __version__, cli, files
from igstore.errors import StoreExistsError, UserError
from igstore.files import is_of_the_machine
from igstore.storage import StoreReader

_PAGE = Path(__file__).parent / "viewer"
_PAGE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}
_NO_FILES_PAUSE = 0.1  # seconds
_STORE = "store"  # folder of the store's address
_STORE_ADDRESS = 'name="igstore-store" content="{}"'  # in the page: where its store is
_HEADERS = {
    "Accept-Ranges": "bytes",
    "Cache-Control": "no-store",  # a store may grow, or be ranked, while it is looked at
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


@contextmanager
def serve(store: str | os.PathLike[str], *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve the page and a store to this machine, in the background, for as long as the context lasts.

    Parameters
    ----------
    store
        Folder of the store. Nothing in it is changed.
    host
        A loopback address, or ``localhost``.
    port
        0 is any that is free.

    Yields
    ------
    The page's address: ``http://127.0.0.1:PORT/``.

    Raises
    ------
    UserError
        `host` is not a loopback address, or the port is taken.
    StoreNotFoundError
        There is no store.
    SettingsMismatchError
        It is not a store of this format version.
    """
    root = StoreReader(store).root
    if not _is_loopback(host):
        raise UserError(
            f"host is {host}; the page is for this machine alone: 127.0.0.1. To see it from another one, run there "
            f"`ssh -L PORT:127.0.0.1:PORT {socket.gethostname()}`, PORT being the --port given here"
        )
    try:
        server = _Server(host, port, root.resolve())
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port} of {host} cannot be used: {error}; 0 is any port that is free") from error
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


def save_page(store: str | os.PathLike[str], folder: str | os.PathLike[str]) -> str:
    """Write the page as files that any web server with range support can serve along with the store.

    Parameters
    ----------
    store
        Folder of the store, of which nothing is copied.
    folder
        Where to write the page; an older page of igstore's is replaced.

    Returns
    -------
    Where the page looks for the store, relative to itself, unless its address says ``?store=URL``.

    Raises
    ------
    StoreExistsError
        There is an ``index.html`` in `folder` that igstore did not make.
    UserError
        `folder` cannot be written.
    StoreNotFoundError, SettingsMismatchError
        As `serve`.
    """
    root, folder = StoreReader(store).root, Path(folder).expanduser()
    address = quote(Path(os.path.relpath(root.absolute(), folder.absolute())).as_posix()) + "/"
    index = folder / "index.html"
    try:
        if index.exists() and _STORE_ADDRESS.partition(" ")[0] not in index.read_text("utf-8", "replace"):
            raise StoreExistsError(f"{index} exists and is not igstore's; give another folder, or remove it")
        for name in _page_files():
            content = _index(address) if name == index.name else (_PAGE / name).read_bytes()
            files.write_atomically(folder / name, content)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the page cannot be written to {folder}: {error.strerror or error}") from error
    return address


def _page_files() -> list[str]:
    found = (path for path in _PAGE.rglob("*") if path.suffix in _PAGE_TYPES)
    return sorted(path.relative_to(_PAGE).as_posix() for path in found)


def _index(store_address: str) -> bytes:
    """The page, told where its store is."""
    page = (_PAGE / "index.html").read_text("utf-8")
    return page.replace(_STORE_ADDRESS.format(f"{_STORE}/"), _STORE_ADDRESS.format(html.escape(store_address))).encode()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def requested_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The bytes of a file that a ``Range`` header asks for (RFC 9110, section 14).

    Parameters
    ----------
    header
        Such as ``bytes=0-99``, ``bytes=100-`` or ``bytes=-100``.
    size
        Of the file, in bytes.

    Returns
    -------
    (first, the one after the last), or None for the whole file: no header, one that is malformed, or one that asks for
    several ranges, all of which a server may answer with everything.

    Raises
    ------
    ValueError
        The file has none of these bytes.

    >>> requested_range("bytes=-100", 1000)
    (900, 1000)
    """
    match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", (header or "").replace(" ", ""), re.IGNORECASE)
    if match is None or match[0].endswith("=-"):
        return None
    if not match[1]:
        first, stop = max(0, size - int(match[2])), size
    else:
        first, stop = int(match[1]), min(size, int(match[2]) + 1 if match[2] else size)
        if match[2] and int(match[2]) < first:
            return None
    if first >= stop:
        raise ValueError(f"{header} of {size} bytes")
    return first, stop


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # connections that wait to be accepted, when a page asks for much at once

    def __init__(self, host: str, port: int, store: Path) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._connections: set[Any] = set()
        self.store = store
        self.store_address = f"{_STORE}/{quote(store.name)}/"
        super().__init__((host, port), _Handler)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_address[1]}/"

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if is_of_the_machine(error):  # no more files may be open, so the connection waits until one is closed
                time.sleep(_NO_FILES_PAUSE)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self._connections):  # which browsers keep for later
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # browsers hang up on what they no longer need
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = f"igstore/{__version__}"
    timeout = 60.0  # seconds until an idle connection is closed
    disable_nagle_algorithm = True  # which would hold a body back for 40 ms, until its headers are acknowledged

    def do_GET(self) -> None:
        try:
            self._answer()
        except OSError as error:
            if not is_of_the_machine(error):
                raise
            self._fail(HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "1"})

    do_HEAD = do_GET

    def _refuse_method(self) -> None:
        self._fail(HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse_method

    def _answer(self) -> None:
        # a page elsewhere may have its own name resolve to this machine: it must not read the store
        host = re.sub(r":[0-9]*$", "", self.headers.get("Host", ""))
        if not _is_loopback(host.strip("[]")):
            self._fail(HTTPStatus.FORBIDDEN)
            return
        path = unquote(self.path.partition("?")[0])
        if path in ("/", "/index.html"):
            self._head(HTTPStatus.OK, _PAGE_TYPES[".html"], len(page := _index(self.server.store_address)))
            if self.command == "GET":
                self.wfile.write(page)
            return
        file, content_type = self._find(path)
        if file is None:
            self._fail(HTTPStatus.NOT_FOUND)
            return
        self._send_file(file, content_type)

    def _find(self, path: str) -> tuple[Path | None, str]:
        """The file at a decoded path, and its type; None unless it is a regular one of the page's or the store's."""
        store_prefix = f"/{unquote(self.server.store_address)}"
        if path.startswith(store_prefix):
            root, name = self.server.store, path.removeprefix(store_prefix)
            content_type = "application/json" if name.endswith(".json") else "application/octet-stream"
        else:
            root, name = _PAGE, path.removeprefix("/")
            if name not in _page_files():
                return None, ""
            content_type = _PAGE_TYPES[Path(name).suffix]
        try:
            file = (root / name).resolve()  # links followed, so none leads out
            return (file if file.is_relative_to(root.resolve()) and file.is_file() else None), content_type
        except (OSError, ValueError):  # too long, or not a name at all
            return None, ""

    def _send_file(self, path: Path, content_type: str) -> None:
        try:
            file = path.open("rb")
        except OSError as error:
            if is_of_the_machine(error):
                raise
            self._fail(HTTPStatus.NOT_FOUND)
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            # ranges are for GET alone, and If-Range for answers that had a validator, which ours have not
            asked = None if self.command == "HEAD" or "If-Range" in self.headers else self.headers.get("Range")
            try:
                part = requested_range(asked, size)
            except ValueError:
                self._fail(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{size}"})
                return
            first, stop = part or (0, size)
            extra = {"Content-Range": f"bytes {first}-{stop - 1}/{size}"} if part else {}
            status = HTTPStatus.PARTIAL_CONTENT if part else HTTPStatus.OK
            self._head(status, content_type, stop - first, extra)
            if self.command == "GET" and stop > first:
                self.connection.sendfile(file, first, stop - first)

    def _fail(self, status: HTTPStatus, headers: dict[str, str] | None = None) -> None:
        self.close_connection = True  # there may be a body that nobody reads
        message = f"{status.value} {status.phrase}\n".encode()
        self._head(status, _PAGE_TYPES[".txt"], len(message), {"Connection": "close", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(message)

    def _head(self, status: HTTPStatus, content_type: str, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        own = {"Content-Type": content_type, "Content-Length": str(length)}
        for name, value in {**_HEADERS, **own, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: a line for every part of a file helps nobody."""


def parser() -> cli.Parser:
    """The options of the command."""
    parser = cli.Parser(
        "view", "Look at any image of a store and at what any mask leaves of it, in a browser on this machine."
    )
    parser.add_argument("store", metavar="STORE", help="folder of a ranked store")
    parser.add_argument("--port", type=int, help="of the page's address; 0 is any that is free")
    parser.add_argument(
        "--save",
        metavar="FOLDER",
        help="write the page as files instead, for a web server with range support that also serves the store",
    )
    return parser.of(serve)


def main(argv: Sequence[str]) -> int:
    """``igstore view STORE``."""
    options, output = parser().parse(argv)
    if options.save is not None:
        address = save_page(options.store, options.save)
        lines = [
            f"{options.save}: the page, which looks for its store at {address} (or at ?store=URL)",
            "serve both with range support: nginx, Caddy and S3 have it, `python -m http.server` has not",
        ]
        output.summary({"page": options.save, "store": address}, lines)
        return cli.DONE
    with serve(options.store, port=options.port) as url:
        try:
            said = f"{url} shows {options.store} on this machine; Ctrl-C stops it"
            output.result({"url": url, "store": options.store}, [said])
            sys.stdout.flush()
            threading.Event().wait()
        except KeyboardInterrupt as interruption:  # how a server is meant to end
            if isinstance(interruption, cli.Terminated):
                raise
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
