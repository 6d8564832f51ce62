"""`igstore view`: the server on its own, and the page in a real browser."""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
import zarr
from stores import make_store
from zarr.codecs import ZstdCodec

from igstore import keep_mask, masked_view, open_store
from igstore.__main__ import COMMANDS
from igstore.errors import StoreExistsError, StoreNotFoundError, UserError
from igstore.reporting import pictures
from igstore.storage import StoreReader, finish_store
from igstore.view import _Server, requested_range, save_page, serve

REPOSITORY = Path(__file__).resolve().parents[1]
VIEWER = REPOSITORY / "igstore" / "viewer"

# 15x25 blocks, cut at both edges: 21.6% and 43.2% of 375 are whole numbers that floating point misses
SIZE = (44, 73)
N = 10
FAILED = 5
RANKINGS = (("positive", 3), ("absolute", 4))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(
        tmp_path_factory.mktemp("view") / "toy.zarr", N, size=SIZE, failed=(FAILED,), rankings=RANKINGS, shard_size=4
    )


@pytest.fixture(scope="module")
def address(store: Path) -> Iterator[str]:
    with serve(store) as url:
        yield url


def ask(
    url: str, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    """One request whose path is sent as it is."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        return response, response.read()


# The server

SHARD = "attribution/c/0/0/0"


def test_files_of_the_store_are_served_whole(address, store):
    for name, content_type in ((SHARD, "application/octet-stream"), ("zarr.json", "application/json")):
        response, body = ask(address, f"/store/toy.zarr/{name}")
        assert response.status == 200
        assert body == (store / name).read_bytes()
        assert response.headers["Content-Type"] == content_type
        assert response.headers["Content-Length"] == str(len(body))
        assert response.headers["Accept-Ranges"] == "bytes"


@pytest.mark.parametrize(
    ("header", "part"),
    [
        pytest.param("bytes=0-0", slice(0, 1), id="one byte"),
        pytest.param("bytes=5-9", slice(5, 10), id="middle"),
        pytest.param("bytes=100-", slice(100, None), id="open end"),
        pytest.param("bytes=-7", slice(-7, None), id="suffix"),
        pytest.param("bytes=-99999999", slice(None), id="suffix longer than the file"),
        pytest.param("bytes=3-99999999", slice(3, None), id="end beyond the file"),
        pytest.param("BYTES= 5 - 9", slice(5, 10), id="capitals and spaces"),
    ],
)
def test_a_range_is_served_as_a_part(address, store, header, part):
    content = (store / SHARD).read_bytes()
    first, stop, _ = part.indices(len(content))
    response, body = ask(address, f"/store/toy.zarr/{SHARD}", headers={"Range": header})
    assert response.status == 206
    assert body == content[part]
    assert response.headers["Content-Range"] == f"bytes {first}-{stop - 1}/{len(content)}"
    assert response.headers["Content-Length"] == str(len(body))


@pytest.mark.parametrize(
    "header",
    ["bytes=9-5", "bytes=0-1,3-4", "items=0-1", "bytes=-", "bytes=a-b", "bytes=1", "", f"bytes=0-{'9' * 5000}"],
    ids=["backwards", "several", "unit", "nothing", "letters", "no dash", "empty", "endless"],
)
def test_a_range_that_is_none_or_several_is_answered_with_the_whole_file(address, store, header):
    response, body = ask(address, f"/store/toy.zarr/{SHARD}", headers={"Range": header})
    assert response.status == 200
    assert body == (store / SHARD).read_bytes()
    assert "Content-Range" not in response.headers


@pytest.mark.parametrize("header", ["bytes={size}-", "bytes=99999999-", "bytes=-0"])
def test_a_range_beyond_the_file_is_refused(address, store, header):
    size = (store / SHARD).stat().st_size
    response, body = ask(address, f"/store/toy.zarr/{SHARD}", headers={"Range": header.format(size=size)})
    assert response.status == 416
    assert response.headers["Content-Range"] == f"bytes */{size}"
    assert len(body) < 100


def test_an_empty_file_has_no_ranges():
    assert requested_range(None, 0) is None
    for header in ("bytes=0-", "bytes=-5"):
        with pytest.raises(ValueError, match="of 0 bytes"):
            requested_range(header, 0)


def test_a_range_that_is_conditional_is_answered_with_the_whole_file(address, store):
    headers = {"Range": "bytes=0-3", "If-Range": '"some version"'}
    response, body = ask(address, f"/store/toy.zarr/{SHARD}", headers=headers)
    assert (response.status, len(body)) == (200, (store / SHARD).stat().st_size)


def test_head_is_get_without_the_body(address, store):
    for path in (f"/store/toy.zarr/{SHARD}", "/", "/viewer.js", "/nothing"):
        got, body = ask(address, path)
        response, nothing = ask(address, path, "HEAD", {"Range": "bytes=0-1"})
        assert nothing == b""
        assert response.status == got.status
        assert response.headers["Content-Length"] == str(len(body))
        assert response.headers["Content-Type"] == got.headers["Content-Type"]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_other_methods_are_refused_and_change_nothing(address, store, method):
    before = (store / "zarr.json").read_bytes()
    response, _ = ask(address, "/store/toy.zarr/zarr.json", method)
    assert response.status == 405
    assert response.headers["Allow"] == "GET, HEAD"
    assert (store / "zarr.json").read_bytes() == before


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a store with a secret beside it, and links to the secret inside."""
    folder = tmp_path_factory.mktemp("guarded")
    store = make_store(folder / "toy.zarr", 2, shard_size=2)
    (folder / "secret").mkdir()
    (folder / "secret" / "secret.txt").write_text("SECRET")
    (folder / "secret.txt").write_text("SECRET")
    (folder / "toy.zarr-other").mkdir()
    (folder / "toy.zarr-other" / "secret.txt").write_text("SECRET")
    (store / "link.txt").symlink_to(folder / "secret.txt")
    (store / "linked").symlink_to(folder / "secret")
    with serve(store) as url:
        yield url


@pytest.mark.parametrize(
    "path",
    [
        "/store/toy.zarr/../secret.txt",
        "/store/toy.zarr/%2e%2e/secret.txt",
        "/store/toy.zarr/..%2fsecret.txt",
        "/store/toy.zarr/..%5csecret.txt",
        "/store/toy.zarr/label/../../secret.txt",
        "/store/toy.zarr/../toy.zarr-other/secret.txt",
        "/store/toy.zarr-other/secret.txt",
        "/store/../secret.txt",
        "/../secret.txt",
        "/store/toy.zarr//etc/passwd",
        "//etc/passwd",
        "/%2fetc/passwd",
        "/store/toy.zarr/link.txt",
        "/store/toy.zarr/linked/secret.txt",
        "/store/toy.zarr/%00",
        f"/store/toy.zarr/{'a' * 5000}",
        "/store/toy.zarr/",
        "/store/toy.zarr/label",
        "/store/",
        "/vendor",
        "/vendor/build.sh",
        "/vendor/../../view.py",
        "/viewer.js/../../view.py",
        "/view.py",
    ],
)
def test_nothing_but_files_of_the_page_and_of_the_store_is_served(guarded, path):
    response, body = ask(guarded, path)
    assert response.status == 404
    assert body == b"404 Not Found\n"


def test_a_store_behind_a_link_is_served(store, tmp_path):
    (tmp_path / "latest.zarr").symlink_to(store)
    with serve(tmp_path / "latest.zarr") as url:
        page = ask(url, "/")[1].decode()
        place = re.search(r'name="igstore-store" content="([^"]+)"', page)
        assert place
        assert ask(url, f"/{place[1]}zarr.json")[1] == (store / "zarr.json").read_bytes()


def test_names_are_quoted_in_addresses(tmp_path):
    store = make_store(tmp_path / 'a "strange" näme #1.zarr', 2, shard_size=2)
    with serve(store) as url:
        place = re.search(r'name="igstore-store" content="([^"]+)"', ask(url, "/")[1].decode())
        assert place
        assert ask(url, f"/{place[1]}zarr.json")[1] == (store / "zarr.json").read_bytes()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:9000", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("evil.example:80", 403),
        ("192.168.0.7", 403),
        ("127.0.0.1.evil.example", 403),
        ("[", 403),
        ("", 403),
    ],
)
def test_it_answers_to_the_names_of_this_machine_alone(address, host, status):
    assert ask(address, "/store/toy.zarr/zarr.json", headers={"Host": host})[0].status == status


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])
def test_it_listens_on_this_machine_alone(store, host):
    with pytest.raises(UserError, match="this machine alone"), serve(store, host=host):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is not an address of this machine")
def test_it_is_bound_to_its_address(address):
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.2", urlsplit(address).port)):
        pass


def test_a_port_that_is_taken_is_told(address, store):
    with pytest.raises(UserError, match="0 is any port that is free"), serve(store, port=urlsplit(address).port):
        pass


def test_it_stops_with_its_context(store):
    with contextlib.ExitStack() as stack:
        with serve(store) as url:
            kept = stack.enter_context(contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)))
            kept.request("GET", "/viewer.js")
            kept.getresponse().read()
        with pytest.raises(ConnectionRefusedError):
            ask(url, "/")
        assert kept.sock
        assert kept.sock.recv(1) == b""  # the server has hung up


def test_what_is_no_store_is_refused(tmp_path):
    for view in (lambda: serve(tmp_path).__enter__(), lambda: save_page(tmp_path, tmp_path / "page")):
        with pytest.raises(StoreNotFoundError, match="there is no store"):
            view()
    assert not (tmp_path / "page").exists()


def test_a_connection_that_is_held_open_keeps_nobody_waiting(address):
    with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port)) as idle:
        idle.sendall(b"GET /viewer.js HTTP/1.1\r\nHost: localhost\r\n")  # and no end
        assert ask(address, "/viewer.js")[0].status == 200


def test_a_connection_serves_many_requests(address, store):
    with contextlib.closing(http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)) as connection:
        for first in range(3):
            connection.request("GET", f"/store/toy.zarr/{SHARD}", headers={"Range": f"bytes={first}-9"})
            assert connection.getresponse().read() == (store / SHARD).read_bytes()[first:10]


def test_connections_wait_to_be_accepted(store):
    """A page asks for hundreds of parts at once, and none may be turned away."""
    server = _Server("127.0.0.1", 0, store)  # which accepts nothing yet
    with contextlib.closing(server.socket), contextlib.ExitStack() as stack:
        for _ in range(200):
            waiting = stack.enter_context(contextlib.closing(socket.socket()))
            waiting.settimeout(5)
            waiting.connect(server.server_address)


# A server in a process that has no more files to open; it prints its address, and then, when a line is written to it,
# how often it tried to accept a connection that waits.
WITHOUT_FILES = """
import os, resource, sys, time
import igstore.view as view
tried = 0
def opened():
    return len(os.listdir("/proc/self/fd"))
class Server(view._Server):
    def get_request(self):
        global tried
        tried += 1
        return super().get_request()
view._Server = Server
with view.serve(sys.argv[1]) as url:
    idle = opened()
    print(url, flush=True)
    sys.stdin.readline()
    while opened() > idle + 1:  # the connection is kept; the file that was sent over it is about to be closed
        time.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1,) * 2)
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    print("full", flush=True)
    sys.stdin.readline()
    print(tried, flush=True)
    for descriptor in held:
        os.close(descriptor)
    sys.stdin.readline()
"""


def test_a_server_without_files_waits_for_them(store):
    with subprocess.Popen(
        [sys.executable, "-c", WITHOUT_FILES, store],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as process:
        assert process.stdin
        assert process.stdout

        def go_on() -> str:
            print(file=process.stdin, flush=True)
            return process.stdout.readline().strip()

        url = process.stdout.readline().strip()
        with contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)) as kept:
            kept.request("GET", f"/store/toy.zarr/{SHARD}")
            assert kept.getresponse().read() == (store / SHARD).read_bytes()
            before = 1
            assert go_on() == "full"
            began = time.monotonic()
            with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as waiting:
                kept.request("GET", f"/store/toy.zarr/{SHARD}")
                refused = kept.getresponse()
                assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
                time.sleep(1)
                tried = int(go_on()) - before
                # ten a second, not as many as a processor can
                assert tried <= 10 * (time.monotonic() - began) + 1
                waiting.sendall(b"GET /viewer.js HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert waiting.recv(12) == b"HTTP/1.1 200"
        process.communicate("\n", timeout=60)


# The page as files


def page_files() -> list[str]:
    return [
        str(path.relative_to(VIEWER)) for path in VIEWER.rglob("*") if path.suffix in (".html", ".css", ".js", ".txt")
    ]


def test_the_server_has_the_whole_page(address):
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".txt": "text/plain"}
    for name in page_files():
        response, body = ask(address, f"/{name}")
        assert response.status == 200
        assert response.headers["Content-Type"] == f"{types[Path(name).suffix]}; charset=utf-8"
        if name != "index.html":
            assert body == (VIEWER / name).read_bytes()


def test_the_page_is_installed_whole():
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["packages"]["find"]["include"] == ["igstore*"]  # every folder below, with or without Python
    installed = {
        path for pattern in setuptools["package-data"]["*"] for path in (REPOSITORY / "igstore").rglob(pattern)
    }
    assert {VIEWER / name for name in page_files()} <= installed


def test_what_is_bundled_is_what_the_lock_file_pins():
    locked = json.loads((VIEWER / "vendor" / "package-lock.json").read_text())["packages"]
    banner = (VIEWER / "vendor" / "zarrita.bundle.js").read_text().splitlines()[0]
    bundled = dict(re.findall(r"([@\w/-]+) (\d+\.\d+\.\d+)", banner))
    assert {"zarrita", "@zarrita/storage", "fzstd"} <= set(bundled)
    licences = (VIEWER / "vendor" / "LICENSES.txt").read_text()
    for package, version in bundled.items():
        assert locked[f"node_modules/{package}"]["version"] == version
        assert f"== {package} {version} " in licences
        assert locked[f"node_modules/{package}"]["license"] == "MIT"
    assert licences.count("Permission is hereby granted") == len(bundled)


def test_the_saved_page_knows_where_the_store_is(store, tmp_path):
    folder = tmp_path / "site" / "page"
    place = save_page(store, folder)
    assert (folder / place).resolve() == store.resolve()
    assert f'content="{place}"' in (folder / "index.html").read_text()
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == sorted(page_files())
    (folder / "viewer.js").write_text("old")
    save_page(store, folder)
    assert (folder / "viewer.js").read_bytes() == (VIEWER / "viewer.js").read_bytes()


def test_a_page_of_others_is_not_replaced(store, tmp_path):
    (tmp_path / "index.html").write_text("<h1>mine</h1>")
    with pytest.raises(StoreExistsError, match="not igstore's"):
        save_page(store, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert (tmp_path / "index.html").read_text() == "<h1>mine</h1>"


def test_a_folder_that_cannot_be_written_is_told(store, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        save_page(store, tmp_path / "file")


# The command


def igstore(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "igstore", *arguments]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_the_command_serves_until_it_is_stopped(store, number, status):
    with subprocess.Popen(igstore("view", str(store)), stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stdout
        line = process.stdout.readline()
        assert str(store) in line
        url = line.split()[0]
        assert ask(url, "/store/toy.zarr/zarr.json")[1] == (store / "zarr.json").read_bytes()
        process.send_signal(number)
        assert process.wait(60) == status


def test_the_command_saves_the_page(store, tmp_path):
    command = igstore("view", str(store), "--save", str(tmp_path / "page"))
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert "?store=URL" in done.stdout
    assert (tmp_path / "page" / "index.html").exists()


def test_the_command_is_listed_and_refuses_in_one_line(tmp_path):
    assert "view" in COMMANDS
    done = subprocess.run(igstore("view", str(tmp_path)), capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("igstore: there is no store at")
    assert len(done.stderr.splitlines()) == 1


# The page in a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox --disable-gpu --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
).split()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)} on the PATH")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


class Viewer:
    """The page in a tab of its own, which must not fail, nor talk to anybody but its server."""

    def __init__(self, browser: Any, url: str, *, before: str = "", **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1200, "height": 800}, **options)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(60_000)
        self.failures: list[str] = []
        self.hosts: set[str] = set()
        self.parts: list[tuple[str, int, int]] = []  # path, status, length of what was read in parts
        self.tab.on("pageerror", lambda error: self.failures.append(str(error)))
        self.tab.on("console", self._heard)
        self.tab.on("response", self._answered)
        if before:
            self.tab.add_init_script(before)
        self.tab.goto(url)
        self.tab.wait_for_function(
            "() => !document.getElementById('page').hidden || document.getElementById('notice-remedy').innerText.trim()"
        )

    def _heard(self, message: Any) -> None:
        # a file that is not there is an answer like others, and a server that is gone is told in the page
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.failures.append(message.text)

    def _answered(self, response: Any) -> None:
        split = urlsplit(response.url)
        if split.scheme != "data":
            self.hosts.add(split.netloc)
        if "range" in response.request.headers:
            self.parts.append((split.path, response.status, int(response.headers["content-length"])))

    def go(self, **state: object) -> None:
        """Follow a link to a state."""
        link = "&".join(f"{name}={quote(str(value))}" for name, value in state.items())
        self.tab.evaluate(
            """async link => {
                const followed = new Promise(follow => addEventListener("hashchange", follow, { once: true }));
                if (location.hash !== "#" + link) {
                    location.hash = link;
                    await followed;
                }
                const main = document.getElementById("main");
                while (main.getAttribute("aria-busy") === "true") await new Promise(go => setTimeout(go, 1));
            }""",
            link,
        )

    def settle(self) -> None:
        self.tab.wait_for_function("() => document.getElementById('main').getAttribute('aria-busy') === 'false'")

    def canvas(self, name: str) -> np.ndarray:
        """What is drawn, uint8 (y, x, 3)."""
        width, height, values = self.tab.evaluate(
            """name => {
                const canvas = document.getElementById(name);
                const { width, height } = canvas;
                const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
                return [width, height, Array.from(data, value => String.fromCharCode(value)).join("")];
            }""",
            name,
        )
        drawn = np.frombuffer(values.encode("latin-1"), np.uint8).reshape(height, width, 4)
        assert (drawn[..., 3] == 255).all()
        return drawn[..., :3]

    def text(self, name: str) -> str:
        return str(self.tab.inner_text(f"#{name}"))

    def is_shown(self, name: str) -> bool:
        return bool(self.tab.is_visible(f"#{name}"))

    def listed(self) -> list[str]:
        """The ids in the list, in order."""
        rows = self.tab.eval_on_selector_all(
            "#list .row", "rows => rows.map(row => [row.ariaPosInSet, row.querySelector('.row-id').textContent])"
        )
        return [name for _, name in sorted(rows, key=lambda row: int(row[0]))]


@contextlib.contextmanager
def viewer(browser: Any, url: str, **options: Any) -> Iterator[Viewer]:
    page = Viewer(browser, url, **options)
    try:
        yield page
    finally:
        page.context.close()
    assert page.failures == []
    assert page.hosts == {urlsplit(url).netloc}


def masked_pixels(store: Path, image: str, **options: Any) -> np.ndarray:
    """uint8 (y, x, 3), as igstore has it."""
    return masked_view(store, **options).sel(image=image).to_numpy().transpose(1, 2, 0)


def test_the_mask_drawn_is_igstores_pixel_for_pixel(browser, address, store):
    pixels = open_store(store).pixels
    images = ["image_0001", "image_0002", "image_0009"]  # no positive score, black, usual
    fills = itertools.cycle(("black", "mean", "image_mean"))
    with viewer(browser, address) as page:
        for p, keep, select in itertools.product((0, 21.6, 33.3, 43.2, 50, 100), ("top", "bottom"), ("mass", "count")):
            options = {"p": p, "keep": keep, "select": select, "fill": next(fills)}
            expected = masked_view(store, **options).sel(image=images).to_numpy().transpose(0, 2, 3, 1)
            for place, image in enumerate(images):
                page.go(image=image, **options)
                assert np.array_equal(page.canvas("masked"), expected[place]), (image, options)
        for image in images:
            page.go(image=image)
            assert np.array_equal(page.canvas("original"), pixels.sel(image=image).to_numpy().transpose(1, 2, 0))


def test_the_words_say_what_the_mask_is(browser, address, store):
    with viewer(browser, address) as page:
        page.go(image="image_0003", p=21.6, keep="top", select="count")
        meaning = page.text("meaning").replace("×", "x")  # noqa: RUF001
        assert meaning == "Shown: the 21.6% of the 3x3 blocks with the most positive attribution, which are 81 of 375."
        share = keep_mask(store, 21.6, "top", select="count").sel(image="image_0003").to_numpy().mean()
        assert page.text("visible") == f"{100 * share:.1f}% of the pixels visible"
        snippet = page.text("snippet")
        view = eval(snippet.replace('"toy.zarr"', "store"), {"igstore": sys.modules["igstore"], "store": store})
        assert np.array_equal(page.canvas("masked"), view.to_numpy().transpose(1, 2, 0))


def test_shares_are_compared_as_float32(browser, tmp_path):
    store = make_store(tmp_path / "toy.zarr", 2, size=(6, 3), shard_size=2)
    share = zarr.open_array(store / "ranks" / "positive-3" / "share", mode="r+")
    share[:] = np.full((2, 2, 1), np.float32(0.7))  # which is less than 0.7
    with serve(store) as url, viewer(browser, url) as page:
        for p in (69.9, 70, 70.1):
            page.go(image="image_0001", p=p, keep="top")
            assert np.array_equal(page.canvas("masked"), masked_pixels(store, "image_0001", p=p, keep="top"))


def test_other_rankings_have_their_own_blocks(browser, address, store):
    with viewer(browser, address) as page:
        options = {"p": 40, "keep": "top"}
        page.go(image="image_0003", ranking="absolute-4", **options)
        expected = masked_pixels(store, "image_0003", score="absolute", block=4, **options)
        assert np.array_equal(page.canvas("masked"), expected)
        page.tab.select_option("#ranking", "positive-3")
        page.settle()
        assert np.array_equal(page.canvas("masked"), masked_pixels(store, "image_0003", **options))
        page.go(image="image_0003", ranking="signed-7")
        assert "igstore rank toy.zarr --score signed --block 7" in page.text("trouble")
        assert not page.is_shown("masked")


def block_sums(attribution: np.ndarray, block: int) -> np.ndarray:
    height, width = attribution.shape
    return np.add.reduceat(np.add.reduceat(attribution, range(0, height, block), 0), range(0, width, block), 1)


def heat_map(attribution: np.ndarray, block: int) -> np.ndarray:
    """The picture of an attribution (y, x): vermillion above 0, blue below, full from the 99th percentile."""
    height, width = attribution.shape
    sums = block_sums(attribution, block)
    strength = np.minimum(np.abs(sums) / np.quantile(np.abs(sums), 0.99), 1)[..., np.newaxis]
    colours = np.where(sums[..., np.newaxis] > 0, (213, 94, 0), (0, 114, 178))
    blocks = np.rint(255 * (1 - strength) + colours * strength)
    return blocks.repeat(block, 0).repeat(block, 1)[:height, :width]


@pytest.mark.parametrize(
    "before", ["", "delete globalThis.Float16Array"], ids=["as it is", "browser without Float16Array"]
)
def test_the_heat_map(browser, address, store, before):
    attribution = open_store(store).attribution
    with viewer(browser, address, before=before) as page:
        assert page.tab.evaluate("() => new Float16Array(1) instanceof Uint16Array") == bool(before)
        for image in ("image_0003", "image_0001"):
            page.go(image=image)
            values = attribution.sel(image=image).to_numpy().astype(np.float64)
            # here, in the browser, and in the pictures of `igstore show`
            for drawn in (page.canvas("attribution"), pictures.heat_map(values, 3)):
                difference = np.abs(drawn - heat_map(values, 3))
                assert difference.max() <= 1  # a sum's last bits may decide which way a colour is rounded
            full = np.quantile(np.abs(block_sums(values, 3)), 0.99)
            assert float(page.text("for").removeprefix("for +")) == pytest.approx(full, rel=0.01)  # three digits


def test_single_images_are_read_in_parts(browser, address, store):
    with viewer(browser, address) as page:
        page.settle()
        lengths = {path.split("/")[3]: set() for path, _, _ in page.parts}
        for path, status, length in page.parts:
            assert status == 206
            lengths[path.split("/")[3]].add(length)
        index = 4 * 16 + 4  # an offset and a length for each of 4 images, and a checksum
        assert lengths["pixels"] == {index, 3 * 44 * 73}
        assert lengths["attribution"] == {index, 2 * 44 * 73}
        assert lengths["ranks"] == {index, 2 * 15 * 25, 4 * 15 * 25}


def test_a_link_opens_what_it_says(browser, address, store):
    state = {"image": "image_0007", "p": "33.3", "keep": "top", "select": "count", "fill": "mean"}
    link = "&".join(f"{name}={value}" for name, value in state.items())
    with viewer(browser, f"{address}#{link}&search=bee&wrong=1&sort=worst") as page:
        page.settle()
        expected = masked_pixels(store, "image_0007", p=33.3, keep="top", select="count", fill="mean")
        assert np.array_equal(page.canvas("masked"), expected)
        assert page.text("image-id").startswith("image_0007")
        assert page.tab.input_value("#p-exact") == "33.3"
        assert page.tab.input_value("#search") == "bee"
        assert page.tab.is_checked("#wrong")
        assert page.tab.input_value("#sort") == "worst"
        assert page.tab.is_checked("[name=keep][value=top]")


def test_a_link_with_nonsense_opens_the_usual(browser, address, store):
    usual = masked_pixels(store, "image_0003", p=50, keep="bottom")
    nonsense = {"p": "fifty", "keep": "middle", "select": "", "fill": "blur", "sort": "x", "wrong": "no"}
    with viewer(browser, f"{address}#%%%&=&p=50,0&image") as page:
        page.settle()
        assert page.text("trouble") == 'This store has no image "".'
        for state in (nonsense, {"p": "50,0"}, {"p": ""}, {}, {"other": "%"}):
            page.go(image="image_0003", p=10, keep="top", fill="mean")
            page.go(image="image_0003", **state)
            assert np.array_equal(page.canvas("masked"), usual), state


def test_the_address_follows(browser, address):
    with viewer(browser, address) as page:
        page.settle()
        page.tab.fill("#p-exact", "12.5")
        page.tab.press("#p-exact", "Enter")
        page.tab.get_by_text("top", exact=True).click()
        page.tab.keyboard.press("ArrowRight")  # after a click, arrow keys are the page's
        page.tab.wait_for_function("() => location.hash === '#image=image_0001&p=12.5&keep=top'")
        page.tab.reload()
        page.settle()
        assert page.text("image-id").startswith("image_0001")
        assert page.tab.input_value("#p") == "13"  # the slider has whole numbers
        assert page.tab.input_value("#p-exact") == "12.5"


def test_search_filter_and_order(browser, address, store):
    data = open_store(store)
    ids, names = data.image.to_numpy(), data.class_name.to_numpy()
    built = data.status.to_numpy() == 1
    predicted = np.array([*StoreReader(store).attributes["class_names"], ""])[data.prediction.to_numpy()]
    wrong = built & (data.label.to_numpy() >= 0) & (predicted != names)
    errors = data.completeness_error.to_numpy()
    with viewer(browser, address) as page:
        page.settle()
        assert page.listed() == list(ids)
        page.tab.fill("#search", "BEE")
        assert page.listed() == list(ids[(names == "bee") | (predicted == "bee")]) != []
        page.tab.fill("#search", "0008")
        assert set(page.listed()) == {"image_0008"}
        page.tab.fill("#search", "n00000003")
        assert page.listed() == list(ids[names == "dog"]) != []
        page.tab.fill("#search", "dog ant")
        assert page.listed() == list(ids[(names == "dog") & (predicted == "ant")]) != []
        page.tab.fill("#search", "unicorn")
        assert page.listed() == []
        assert page.text("count") == "No image matches."
        page.tab.fill("#search", "")
        page.tab.check("#wrong")
        assert page.listed() == list(ids[wrong]) != []
        assert page.text("count") == f"{wrong.sum()} images"
        page.tab.uncheck("#wrong")
        for order, sign in (("worst", -1), ("best", 1)):
            page.tab.select_option("#sort", order)
            by_error = np.flatnonzero(built)[np.argsort(sign * errors[built], kind="stable")]
            assert page.listed() == [*ids[by_error], *ids[~built]]  # failed ones come last


def test_picking_images(browser, address, store):
    with viewer(browser, address) as page:
        page.settle()
        page.tab.click("#image-3")
        page.settle()
        assert np.array_equal(page.canvas("masked"), masked_pixels(store, "image_0003"))
        assert page.tab.get_attribute("#image-3", "aria-selected") == "true"
        for press, image in (
            (lambda: page.tab.keyboard.press("ArrowRight"), "image_0004"),
            (lambda: page.tab.click("#previous"), "image_0003"),
            (lambda: page.tab.keyboard.press("ArrowLeft"), "image_0002"),
            (lambda: page.tab.press("#list", "ArrowDown"), "image_0003"),
        ):
            press()
            page.settle()
            assert page.text("image-id").startswith(image)
        page.tab.keyboard.press("/")
        page.tab.keyboard.type("cat")
        page.tab.keyboard.press("Enter")
        page.tab.keyboard.press("ArrowDown")
        page.settle()
        assert page.text("image-id").startswith("image_0009")
        assert page.tab.is_disabled("#next")


def test_the_image_shown_is_the_one_picked_last(browser, address, store):
    held = []
    with viewer(browser, f"{address}#image=image_0009") as page:
        page.settle()

        def hold_first_image(route: Any) -> None:
            if route.request.headers.get("range") == "bytes=0-9635":
                held.append(route)
            else:
                route.continue_()

        page.tab.route("**/pixels/**", hold_first_image)
        page.tab.evaluate("() => { location.hash = 'image=image_0000' }")
        page.go(image="image_0003")
        assert len(held) == 1
        with page.tab.expect_response("**/pixels/**"):
            held[0].continue_()
        page.tab.evaluate("() => new Promise(go => setTimeout(go, 200))")
        assert np.array_equal(page.canvas("masked"), masked_pixels(store, "image_0003"))


def test_the_keys_change_the_mask(browser, address, store):
    with viewer(browser, f"{address}#image=image_0003") as page:
        page.settle()
        for key in ("ArrowUp", "Shift+ArrowDown", "k", "s", "f"):
            page.tab.keyboard.press(key)
        expected = masked_pixels(store, "image_0003", p=41, keep="top", select="count", fill="mean")
        assert np.array_equal(page.canvas("masked"), expected)


def test_a_store_without_pixels_shows_maps_and_masks(browser, tmp_path):
    store = make_store(tmp_path / "toy.zarr", 4, size=SIZE, pixels=False, shard_size=4)
    with serve(store) as url, viewer(browser, url) as page:
        for keep in ("top", "bottom"):
            page.go(image="image_0003", p=50, keep=keep)
            visible = keep_mask(store, 50, keep).sel(image="image_0003").to_numpy()
            drawn = page.canvas("masked")
            assert (drawn[visible] > 200).all()
            assert (drawn[~visible] < 60).all()
        assert page.is_shown("attribution")
        assert not page.is_shown("original")
        assert not page.is_shown("fill")
        assert "igstore.keep_mask(" in page.text("snippet")


def test_a_store_without_ranks_names_the_command(browser, tmp_path):
    store = make_store(tmp_path / "toy.zarr", 4, size=SIZE, rankings=(), shard_size=4)
    with serve(store) as url, viewer(browser, url) as page:
        page.settle()
        assert "igstore rank toy.zarr --score positive --block 3" in page.text("trouble")
        assert page.is_shown("original")
        assert page.is_shown("attribution")
        assert not page.is_shown("masked")
        assert not page.is_shown("controls")


def test_ranks_of_older_maps_are_not_used(browser, tmp_path):
    store = make_store(tmp_path / "toy.zarr", 4, size=SIZE, shard_size=4)
    record = store / "records" / "positive-3" / "00000.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"attribution_sha256": "0" * 64}))
    with serve(store) as url, viewer(browser, url) as page:
        page.settle()
        assert "newer than they are" in page.text("trouble")
        assert not page.is_shown("masked")


def test_images_that_failed_or_are_not_built_say_so(browser, tmp_path):
    store = make_store(tmp_path / "toy.zarr", 10, size=SIZE, shard_size=4, shards=(0, 1), failed=(5,))
    with serve(store) as url, viewer(browser, url) as page:
        assert "7 of 10 images built" in page.text("provenance")
        assert len(page.listed()) == 8
        page.go(image="image_0005")
        assert "made to fail" in page.text("trouble")
        assert not page.is_shown("original")
        page.go(image="image_0009")
        assert "not built yet" in page.text("trouble")
        page.go(image="image_0003")
        assert not page.is_shown("trouble")
        assert np.array_equal(page.canvas("masked"), masked_pixels(store, "image_0003"))


def test_a_shard_that_is_gone_is_told(browser, tmp_path):
    store = make_store(tmp_path / "toy.zarr", 4, size=SIZE, shard_size=4)
    (store / "pixels" / "c" / "0" / "0" / "0" / "0").unlink()
    with serve(store) as url, viewer(browser, url) as page:
        page.settle()
        assert "pixels/c/0/0/0/0 is missing" in page.text("trouble")
        assert not page.is_shown("masked")


@pytest.mark.parametrize("content", ["", "null", "{}"])
def test_a_record_that_is_none_is_told(browser, tmp_path, content):
    store = make_store(tmp_path / "toy.zarr", 4, size=SIZE, shard_size=4)
    (store / "records" / "00000.json").write_text(content)
    with serve(store) as url, viewer(browser, url) as page:
        page.settle()
        assert "records/00000.json is not a record" in page.text("trouble")
        assert not page.is_shown("masked")


def test_a_server_that_is_gone_is_told(browser, store):
    with contextlib.ExitStack() as stack:
        with serve(store) as url:
            page = stack.enter_context(viewer(browser, url))
            page.settle()
        page.tab.evaluate("() => { location.hash = 'image=image_0009' }")
        page.tab.wait_for_selector("#notice")
        assert "No answer from" in page.text("notice")
        assert "igstore view" in page.text("notice")


def test_channels_and_compression(browser, tmp_path):
    store = make_store(tmp_path / "toy.zarr", 4, size=SIZE, shard_size=4, reduce="none")
    values = open_store(store).attribution.sel(image="image_0003").to_numpy().astype(np.float64)
    expected = masked_pixels(store, "image_0003", fill="image_mean")
    for name in ("attribution", "pixels", "ranks/positive-3/rank", "ranks/positive-3/share"):
        old = zarr.open_array(store / name, mode="r")
        data, metadata = (
            old[:],
            {"shards": old.shards, "chunks": old.chunks, "dimension_names": old.metadata.dimension_names},
        )
        zarr.create_array(store / name, data=data, compressors=ZstdCodec(level=3), overwrite=True, **metadata)
    finish_store(store, {})
    with serve(store) as url, viewer(browser, url) as page:
        page.go(image="image_0003", fill="image_mean")
        assert np.array_equal(page.canvas("masked"), expected)
        assert np.abs(page.canvas("attribution") - heat_map(values.sum(axis=0), 3)).max() <= 1


@pytest.mark.parametrize("path", ["?store=nothing.zarr", "?store=store/toy.zarr/label"], ids=["missing", "an array"])
def test_what_is_no_store_is_told(browser, address, path):
    with viewer(browser, address + path) as page:
        assert "There is no igstore store at" in page.text("notice")
        assert "igstore view STORE" in page.text("notice")
        assert not page.is_shown("page")


class Static(http.server.SimpleHTTPRequestHandler):
    """The standard library's server of files, which knows no ranges."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


class StaticWithRanges(Static):
    """The same with the one kind of range that is needed, ``bytes=FIRST-LAST``."""

    def do_GET(self) -> None:
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if part is None:
            super().do_GET()
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        first, last = map(int, part.groups())
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(content[first : last + 1])


@contextlib.contextmanager
def static(folder: Path, handler: type[Static]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder))
    with server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def test_the_page_works_as_files_beside_a_store(browser, store, tmp_path):
    save_page(store, store.parent / "page")
    expected = masked_pixels(store, "image_0003", p=30, keep="top")
    with static(store.parent, StaticWithRanges) as url:
        for query in ("", f"?store={url}toy.zarr"):
            with viewer(browser, f"{url}page/{query}#image=image_0003&p=30&keep=top") as page:
                page.settle()
                assert np.array_equal(page.canvas("masked"), expected)


def test_a_server_without_ranges_is_told(browser, store):
    save_page(store, store.parent / "page")
    with static(store.parent, Static) as url, viewer(browser, f"{url}page/") as page:
        assert "does not send parts of files" in page.text("notice")
        assert not page.is_shown("page")


def test_nothing_sticks_out(browser, address):
    with viewer(browser, address) as page:
        page.settle()
        for width in (1200, 760, 360):
            page.tab.set_viewport_size({"width": width, "height": 800})
            assert page.tab.evaluate("() => document.scrollingElement.scrollWidth") <= width
            for name in ("original", "attribution", "masked", "controls", "next"):
                box = page.tab.locator(f"#{name}").bounding_box()
                assert box["x"] >= 0, (name, width)
                assert box["x"] + box["width"] <= width, (name, width)
        # narrow: the list folds away, before and after an image is picked
        assert not page.is_shown("list")
        page.tab.click("#browse-toggle")
        page.tab.click("#image-2")
        page.settle()
        assert page.text("image-id").startswith("image_0002")
        assert not page.is_shown("list")
