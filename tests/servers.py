"""Real servers of a folder, on the loopback address, that count what they are asked and fail when they are told to."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Served:
    """What is being served: its address, the requests so far, and what is to go wrong.

    Attributes
    ----------
    requests
        (path, first byte or None, one after the last or None) of each request, in order.
    gives_parts
        Whether a request for a part is answered with it, or with the whole file, as many simple servers do.
    tags
        Whether files have an ETag and a Last-Modified, as they have on most servers.
    fault
        Called with a path and how often it was asked for before; returns a status to answer with instead, "cut" to
        break off in the middle, "hang" to say nothing for a while, a function that answers in any other way, given the
        handler of the request and the part that was asked for, or None.
    """

    url: str = ""
    requests: list[tuple[str, int | None, int | None]] = field(default_factory=list)
    gives_parts: bool = True
    tags: bool = False
    fault: Callable[[str, int], int | str | Callable[..., None] | None] = lambda path, before: None

    def asked(self, name: str) -> list[tuple[str, int | None, int | None]]:
        return [request for request in self.requests if name in request[0]]


@contextmanager
def http_server(folder: Path) -> Iterator[Served]:
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            content_range = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            before = sum(path == self.path for path, *_ in served.requests)
            wanted = (int(content_range[1]), int(content_range[2]) + 1) if content_range else (None, None)
            served.requests.append((self.path, *wanted))
            fault = served.fault(self.path, before)
            if isinstance(fault, int):
                self.send_error(fault)
                return
            if callable(fault):
                fault(self, wanted)
                return
            if fault == "hang":
                time.sleep(3)
                self.close_connection = True
                return
            has_part = content_range and served.gives_parts
            try:
                with (folder / self.path.partition("?")[0].lstrip("/")).open("rb") as file:
                    status = os.fstat(file.fileno())
                    size = status.st_size
                    file.seek(wanted[0] or 0 if has_part else 0)
                    content = file.read(wanted[1] - wanted[0] if has_part else -1)
            except OSError:
                self.send_error(404)
                return
            if has_part:
                if not content:
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {wanted[0]}-{wanted[0] + len(content) - 1}/{size}")
            else:
                self.send_response(200)
            if served.tags:
                self.send_header("ETag", f'"{status.st_mtime_ns:x}-{size:x}"')
                self.send_header("Last-Modified", formatdate(status.st_mtime, usegmt=True))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if fault == "cut":
                content = content[: len(content) // 2]
                self.close_connection = True
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients hang up on servers that misbehave
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answer(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    """Answer a request with just that; headers are given with underscores, and Content-Length is added if missing."""
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)
