"""Stores behind servers that answer other things than they are asked for: what is there is read, or it is said why."""

from __future__ import annotations

import datetime
import gzip
import logging
import os
import pickle
import random
import shutil
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from amounts import SEED, amount
from servers import Served, answer, http_server
from stores import make_store

from igstore import MaskedImageNet, open_store
from igstore.cli import run
from igstore.errors import (
    AccessError,
    DamagedStoreError,
    IgstoreError,
    ReplacedError,
    StoreNotFoundError,
    UnreachableError,
    UserError,
)
from igstore.files import atomic, remote, servers, shown
from igstore.files.cache import ShardCache
from igstore.info import main as info_main
from igstore.schema import NOT_BUILT
from igstore.storage import StoreReader
from igstore.verify import main as verify_main

N, SHARD = 10, 4
PIXELS = "/toy.zarr/pixels/c/"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("servers") / "toy.zarr", N, shard_size=SHARD, size=(7, 8))


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    shutil.copytree(intact, tmp_path / "served/toy.zarr")
    return tmp_path / "served"


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    monkeypatch.delenv("IGSTORE_CACHE", raising=False)
    with http_server(folder) as served:
        yield served


@pytest.fixture
def url(server: Served) -> str:
    return f"{server.url}/toy.zarr"


@pytest.fixture
def pixels(intact: Path) -> np.ndarray:
    return open_store(intact).pixels.values


# a part is the part that was asked for


def wrong_range(how: str) -> Callable[..., None]:
    def act(handler: Any, part: tuple[int, int]) -> None:
        body = bytes(255 for _ in range(part[1] - part[0]))
        first, last = part[0], part[1] - 1
        said = {
            "elsewhere": f"bytes {first + 100}-{last + 100}/99999",
            "no range": None,
            "nonsense": "bytes of the file",
            "another unit": f"pixels {first}-{last}/99999",
            "longer": f"bytes {first}-{last + 1}/99999",
        }[how]
        answer(handler, 206, body, **({} if said is None else {"Content_Range": said}))

    return act


@pytest.mark.parametrize("how", ["elsewhere", "no range", "nonsense", "another unit", "longer"])
def test_a_part_from_elsewhere_is_not_believed(server, url, pixels, how):
    server.fault = lambda path, before: wrong_range(how) if path.startswith(PIXELS) and before < 1 else None
    np.testing.assert_array_equal(StoreReader(url).array("pixels").read([1, 5]), pixels[[1, 5]])


@pytest.mark.parametrize("size", [100, 10**6])
def test_a_file_of_another_size_is_not_the_one_on_record(server, url, size):
    def act(handler: Any, part: tuple[int, int]) -> None:
        said = f"bytes {part[0]}-{part[1] - 1}/{size}"
        answer(handler, 206, bytes(part[1] - part[0]), Content_Range=said)

    server.fault = lambda path, before: act if path.startswith(PIXELS) else None
    with pytest.raises(DamagedStoreError, match="pixels/c/0/0/0/0"):
        StoreReader(url).array("pixels").read([1])


def test_compressed_answers_are_read(server, url, folder, pixels):
    """Some servers compress whatever is asked for, though they are asked not to."""

    def act(handler: Any, _: Any) -> None:
        content = gzip.compress((folder / handler.path.lstrip("/")).read_bytes())
        answer(handler, 200, content, Content_Encoding="gzip")

    server.fault = lambda path, before: act if (folder / path.lstrip("/")).is_file() else None
    np.testing.assert_array_equal(StoreReader(url).array("pixels").read([1, 5]), pixels[[1, 5]])


# the file is the one that it was


def replace(file: Path, at: float) -> None:
    """Other bytes, of the same length, last changed at that time."""
    content = bytearray(file.read_bytes())
    content[:50] = bytes(255 - byte for byte in content[:50])
    file.write_bytes(content)
    os.utime(file, (at, at))


@pytest.fixture
def aged(folder: Path) -> Path:
    """The store in the folder, an hour old."""
    for file in (folder / "toy.zarr").rglob("*"):
        os.utime(file, (time.time() - 3600,) * 2)
    return folder / "toy.zarr"


@pytest.mark.parametrize("cached", [False, True], ids=["parts", "cached"])
@pytest.mark.parametrize("before", [False, True], ids=["not read yet", "read before"])
def test_a_shard_that_is_replaced_is_said_to_be(server, url, aged, tmp_path, before, cached):
    server.tags = True
    array = StoreReader(url, cache=tmp_path / "cache" if cached else None).array("pixels")
    array.read([5])
    if before:
        array.read([0])
    replace(aged / "pixels/c/0/0/0/0", time.time() + 5)
    if before and cached:
        array.read([0])  # has what was recorded
        return
    with pytest.raises(ReplacedError, match=r"pixels/c/0/0/0/0 has been replaced since .* open it again"):
        array.read([0])
    array.read([6])  # those that were not are read


def test_an_etag_alone_tells(server, url, aged):
    server.tags = True
    array = StoreReader(url).array("pixels")
    array.read([0])
    replace(aged / "pixels/c/0/0/0/0", time.time() - 1800)  # older than the store is open
    with pytest.raises(ReplacedError):
        array.read([0])
    pickled = pickle.loads(pickle.dumps(array))
    with pytest.raises(ReplacedError):  # in a worker, too
        pickled.read([0])


def test_a_store_that_grows_meanwhile_is_read(server, url, aged):
    """A record that is read after the shard was written is newer than it."""
    record, content = aged / "records/00001.json", (aged / "records/00001.json").read_bytes()
    record.unlink()
    server.tags = True
    early = StoreReader(url)
    for file in ("pixels/c/1/0/0/0", "attribution/c/1/0/0"):
        os.utime(aged / file)
    record.write_bytes(content)
    assert early.array("pixels").read([5]).any()
    assert StoreReader(url).array("pixels").read([5]).any()


def test_scalars_are_held_against_their_record(server, url, aged):
    replace(aged / "prediction/c/1", time.time())
    with pytest.raises(DamagedStoreError, match="prediction/c/1 has changed since it was written"):
        StoreReader(url).scalars("prediction")


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[Any, dict[str, Any]]]:
    """A client of a real S3 server on this machine, and what s3fs needs to know."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3", region_name="us-east-1", endpoint_url=endpoint, aws_access_key_id="k", aws_secret_access_key="s"
    )
    client.create_bucket(Bucket="lab")
    yield client, {"endpoint_url": endpoint, "key": "k", "secret": "s"}
    server.stop()


@pytest.mark.parametrize("before", [False, True], ids=["not read yet", "read before"])
def test_an_object_that_is_replaced_is_said_to_be(s3, intact, before):
    client, options = s3
    for path in intact.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "lab", f"{before}/{path.relative_to(intact).as_posix()}")
    array = StoreReader(f"s3://lab/{before}", storage_options=options).array("pixels")
    array.read([0] if before else [5])
    content = bytearray((intact / "pixels/c/0/0/0/0").read_bytes())
    content[0] ^= 255
    if not before:  # its date is in whole seconds
        time.sleep(1.1 - datetime.datetime.now().microsecond / 1e6 + 1)
    client.put_object(Bucket="lab", Key=f"{before}/pixels/c/0/0/0/0", Body=bytes(content))
    with pytest.raises(ReplacedError):
        array.read([0])


# what is refused, or is a page


def to_login(handler: Any, _: Any) -> None:
    if "login" in handler.path:
        answer(handler, 200, b"<!DOCTYPE html><title>Sign in</title>", Content_Type="text/html; charset=utf-8")
    else:
        answer(handler, 302, Location="/login?next=secret")


ABSENCES = {
    "403": (403, "403 Forbidden"),
    "401": (401, "401 Unauthorized"),
    "410": (410, None),
    "a page": (
        lambda handler, _: answer(handler, 200, b"<html>not found</html>", Content_Type="text/html"),
        "a page for people",
    ),
    "a page of another type": (
        lambda handler, _: answer(handler, 200, b"\n <!doctype html>", Content_Type="application/json"),
        "a page for people",
    ),
    "a login": (to_login, "a page for people, after a redirect to http://127.0.0.1:"),
}


@pytest.mark.parametrize("kind", ABSENCES)
def test_whatever_is_said_to_what_is_not_there_finished_images_are_read(server, url, folder, pixels, caplog, kind):
    how, says = ABSENCES[kind]
    (folder / "toy.zarr/records/00001.json").unlink()
    server.fault = lambda path, before: how if "records/00001" in path or "login" in path else None
    store = StoreReader(url)
    np.testing.assert_array_equal(store.array("pixels").read([0, 9]), pixels[[0, 9]])
    assert store.missing_shards == [1]
    assert store.image_ids == StoreReader(folder / "toy.zarr").image_ids  # which are there, whatever has been built
    assert len(MaskedImageNet(url)) == N - SHARD
    with pytest.raises(DamagedStoreError, match=says or "is not finished"):
        store.array("pixels").read([5])
    said = [record.getMessage() for record in caplog.records]
    assert [says in message for message in said] == 2 * [True] if says else not said
    assert "secret" not in "".join(said)


@pytest.mark.parametrize("kind", ABSENCES)
def test_a_store_that_is_not_there_is_said_with_what_the_server_says(server, url, kind):
    how, says = ABSENCES[kind]
    server.fault = lambda path, before: how
    with pytest.raises(UserError if says else StoreNotFoundError, match=says or "there is no store"):
        StoreReader(url)


@pytest.mark.parametrize("kind", ["403", "a page", "a login"])
def test_a_shard_that_is_kept_back_is_no_damage(server, url, kind):
    how, says = ABSENCES[kind]
    server.fault = lambda path, before: how if path.startswith(f"{PIXELS}0") or "login" in path else None
    with pytest.raises(UserError, match=says):
        StoreReader(url).array("pixels").read([0])


@pytest.mark.parametrize("status", [204, 400, 405, 418, 501, 599])
def test_what_no_repetition_helps_against_is_not_repeated(server, url, status):
    server.fault = lambda path, before: (
        (lambda handler, _: answer(handler, status)) if path.startswith(PIXELS) else None
    )
    with pytest.raises(UnreachableError, match=str(status)):
        StoreReader(url).array("pixels").read([0])
    assert len(server.asked("/pixels/c/0")) == 1


def test_a_server_that_redirects_for_ever(server, url):
    server.fault = lambda path, before: lambda handler, _: answer(handler, 302, Location=f"{path}x"[:200])
    with pytest.raises(UnreachableError):
        StoreReader(url)


def test_what_a_server_says_is_no_format(server, url):
    def act(handler: Any, _: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 {} }{0} {x!r:>9} %s %(a)s\r\n\r\n")
        handler.close_connection = True

    server.fault = lambda path, before: act
    with pytest.raises(UnreachableError, match="in 4 attempts"):
        StoreReader(url)


def test_a_part_that_breaks_off_is_asked_for_again(server, url, pixels):
    """Where nothing says how long it is, only its end tells."""

    def act(handler: Any, part: tuple[int, int]) -> None:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {part[0]}-{part[1] - 1}/*")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(bytes(7))
        handler.close_connection = True

    server.fault = lambda path, before: act if path.startswith(PIXELS) and before < 2 else None
    np.testing.assert_array_equal(StoreReader(url).array("pixels").read([1]), pixels[[1]])


# patience


def test_it_is_asked_again_when_the_server_wants_to_be(server, url, pixels, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
    pauses = ["7", soon.strftime("%a, %d %b %Y %H:%M:%S GMT"), "soon"]

    def fault(path: str, before: int) -> Any:
        if path.startswith(PIXELS) and before < 3:
            return lambda handler, _: answer(handler, 429 if before else 503, Retry_After=pauses[before])
        return None

    server.fault = fault
    np.testing.assert_array_equal(StoreReader(url).array("pixels").read([0]), pixels[:1])
    assert waited[0] == 7
    assert 27 <= waited[1] <= 31
    assert waited[2] == pytest.approx(0.04)  # the third pause of its own


def test_a_server_that_wants_to_be_left_alone_is_left_alone(server, url):
    server.fault = lambda path, before: lambda handler, _: answer(handler, 503, Retry_After="3600")
    with pytest.raises(UnreachableError, match=r"503 Service Unavailable; it wants to be asked again in 3600 seconds"):
        StoreReader(url)
    assert len(server.requests) == 1


def drip(handler: Any, part: tuple[int, int] | tuple[None, None]) -> None:
    """A byte at a time, for ever."""
    handler.send_response(200 if part[0] is None else 206)
    if part[0] is not None:
        handler.send_header("Content-Range", f"bytes {part[0]}-{part[1] - 1}/*")
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    with suppress(OSError):
        while True:
            handler.wfile.write(b" ")
            time.sleep(0.02)


@pytest.mark.parametrize("where", ["toy.zarr/zarr.json", "records/00001", "pixels/c/0"])
def test_a_server_that_drips_is_given_up(server, url, monkeypatch, where):
    monkeypatch.setattr(servers, "_START", 0.3)
    server.fault = lambda path, before: drip if where in path else None
    with pytest.raises(UnreachableError, match="fewer than 16384 bytes a second"):
        StoreReader(url).array("pixels").read([0])
    assert len([path for path, *_ in server.requests if where in path]) == 1


def test_slow_is_not_too_slow(server, url, folder, pixels, monkeypatch):
    """As long as all that is fetched together comes fast enough, each part may wait for the others."""
    monkeypatch.setattr(servers, "_START", 0.3)
    monkeypatch.setattr(servers, "_SLOWEST", 100)

    def slow(handler: Any, part: Any) -> None:
        content = (folder / handler.path.lstrip("/")).read_bytes()[slice(*part)]
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {part[0]}-{part[1] - 1}/*")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        for start in range(0, len(content), 50):
            handler.wfile.write(content[start : start + 50])
            handler.wfile.flush()
            time.sleep(0.05)

    server.fault = lambda path, before: slow if path.startswith(PIXELS) else None
    np.testing.assert_array_equal(StoreReader(url).array("pixels").read([0, 1]), pixels[:2])


# what has no end


def endless(handler: Any, _: Any) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    with suppress(OSError):
        while True:
            handler.wfile.write(b"100000\r\n" + bytes(0x100000) + b"\r\n")


def huge(handler: Any, _: Any) -> None:
    with suppress(OSError):
        answer(handler, 200, bytes(2**20), Content_Length=str(10**12))


@pytest.mark.parametrize("how", [endless, huge])
@pytest.mark.parametrize("where", ["toy.zarr/zarr.json", "records/00001", "label/c/0", "pixels/c/0"])
def test_what_has_no_end_is_cut_off(server, url, where, how):
    server.fault = lambda path, before: how if where in path else None
    tracemalloc.start()
    try:
        with pytest.raises(IgstoreError):
            StoreReader(url).array("pixels").read([0])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**30


NESTED = {
    "lists": b"[" + b"[]," * 10**6 + b"[]]",
    "objects": b"[" + b"{}," * 10**6 + b"{}]",
    "deep": b"[" * 10**6,
    "in attributes": b'{"node_type": "group", "attributes": {"a": [' + b"[]," * 10**6 + b"[]]}}",
}


@pytest.mark.parametrize("content", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("where", ["zarr.json", "records/00001.json", "pixels/zarr.json"])
def test_nested_metadata_cost_little(folder, where, content):
    store = folder / "toy.zarr"
    (store / where).write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedStoreError):
            StoreReader(store).array("pixels").read([0])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20e6  # the text itself is 3 MB


def test_finished_shards_have_all_their_images(folder):
    store = folder / "toy.zarr"
    file = store / "pixels/c/0/0/0/0"
    content = file.read_bytes()
    index = np.frombuffer(content[-SHARD * 16 - 4 : -4], "<u8").reshape(-1, 2).copy()
    index[1] = np.iinfo(np.uint64).max
    file.write_bytes(content[: -SHARD * 16 - 4] + index.tobytes() + checksum(index.tobytes()))
    with pytest.raises(DamagedStoreError, match="lacks images"):
        StoreReader(store).array("pixels").read([1])


def checksum(content: bytes) -> bytes:
    import google_crc32c

    return google_crc32c.value(content).to_bytes(4, "little")


# secrets


def signed(path: str, before: int) -> int | None:
    return None if "sig=a%2Fb%3D" in path or "sig=a/b%3D" in path else 403


def test_a_signed_address_is_read_and_not_shown(server, url, pixels, intact, capsys, caplog, tmp_path):
    server.fault = signed
    address = f"{url}?se=2030&sig=a%2Fb%3D"
    store = StoreReader(address, cache=tmp_path / "cache")
    np.testing.assert_array_equal(store.array("pixels").read(range(N)), pixels)
    np.testing.assert_array_equal(StoreReader(address).array("pixels").read([9, 0]), pixels[[9, 0]])
    assert store.where == url
    assert run(info_main, [address]) == 0
    assert run(info_main, [address, "--json"]) == 0
    run(verify_main, [address])
    run(verify_main, [address, "--json"])
    server.fault = lambda path, before: 500
    assert run(info_main, [address]) == 1
    server.fault = lambda path, before: None
    assert run(info_main, [f"{url}x?sig=a%2Fb%3D"]) == 2
    said = "".join(capsys.readouterr()) + caplog.text
    assert "toy.zarr" in said
    for secret in ("sig", "a%2Fb", "a/b", "se=2030"):
        assert secret not in said.replace("signal", "")


def test_passwords_in_addresses_are_used_and_not_shown(server, url, pixels, capsys):
    import base64

    wanted = "Basic " + base64.b64encode(b"me:pass-word").decode()

    address = url.replace("://", "://me:pass-word@")
    seen: list[str | None] = []
    server.fault = lambda path, before: (
        (lambda handler, _: (seen.append(handler.headers["Authorization"]), answer(handler, 404))[1])
        if path.endswith("zarr.json")
        else None
    )
    assert run(info_main, [address]) == 2
    assert seen == [wanted]
    server.fault = lambda path, before: None
    assert run(info_main, [address]) == 0
    with http_server(Path("/nowhere")) as gone:
        nobody = gone.url.replace("://", "://me:pass-word@")
    assert run(info_main, [nobody]) == 1
    said = "".join(capsys.readouterr())
    assert "pass-word" not in said
    assert "me:" not in said


@pytest.mark.parametrize(
    "address",
    ["s3://lab/toy.zarr?versionId=1", "memory://toy.zarr?x=1", "https://host/toy.zarr#part", "file:///toy.zarr?x=1"],
)
def test_queries_that_mean_nothing_are_refused_by_name(address):
    with pytest.raises(UserError, match=r"\? or #"):
        StoreReader(address)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("https://host/toy.zarr", "https://host/toy.zarr"),
        ("https://me:pw@host:80/a@b/toy.zarr?sig=x&y=z", "https://host:80/a@b/toy.zarr"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("ftp://me@host/x", "ftp://host/x"),
        ("simplecache::https://u:p@h/x?k=1", "simplecache::https://h/x"),
        ("/a folder/what?.zarr", "/a folder/what?.zarr"),
        ("500, message='no', url='https://u:p@h/x?k=1'", "500, message='no', url='https://h/x'"),
        ('at "http://h/a?b=c", and http://i/?d', 'at "http://h/a", and http://i/'),
        ("https://me:p#w@host/x", "https://host/x"),
    ],
)
def test_what_is_shown_of_addresses(text, seen):
    assert shown(text) == seen


# the cache


def test_a_kept_shard_that_changed_is_fetched_again(server, url, pixels, tmp_path, caplog):
    StoreReader(url, cache=tmp_path / "cache").array("pixels").read([0])
    [kept] = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    content = bytearray(kept.read_bytes())
    content[3] ^= 1
    kept.write_bytes(content)
    server.requests.clear()
    again = StoreReader(url, cache=tmp_path / "cache").array("pixels")  # as another process would open it
    np.testing.assert_array_equal(again.read([0]), pixels[:1])
    assert "has changed since it was kept" in caplog.text
    assert len(server.asked("/pixels/c/0")) == 1
    assert kept.read_bytes() != content


def test_a_kept_shard_is_looked_at_once_by_each_process(server, url, tmp_path, monkeypatch):
    store = StoreReader(url, cache=tmp_path / "cache")
    store.array("pixels").read([0])
    looked: list[Path] = []
    monkeypatch.setattr(atomic, "crc32c", lambda path: looked.append(path) or "")
    for _ in range(3):
        store.form.image_array("pixels", store.records.get).read([0])
    assert not looked
    with suppress(DamagedStoreError):
        pickle.loads(pickle.dumps(store)).array("pixels").read([0])
    assert looked


def test_what_is_kept_is_on_the_disk_before_it_has_its_name(server, url, tmp_path, monkeypatch):
    done: list[str] = []
    flush, rename = os.fsync, os.replace

    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("flush"), flush(descriptor))[1])
    monkeypatch.setattr(os, "rename", lambda *paths: (done.append("rename"), rename(*paths))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("rename"), rename(*paths))[1])
    StoreReader(url, cache=tmp_path / "cache").array("pixels").read([0])
    assert done == ["flush", "rename"]


UNUSABLE = {
    "a file": lambda path: path.write_text("in the way"),
    "a file above": lambda path: (path.parent / "file").write_text("") and None,
    "a link to nowhere": lambda path: path.symlink_to("/proc/nothing/here"),
    "a folder of the system's": lambda path: path.symlink_to("/proc/self"),
}


@pytest.mark.parametrize("gives_parts", [True, False], ids=["parts", "whole files"])
@pytest.mark.parametrize("how", UNUSABLE)
def test_a_cache_that_cannot_be_used_is_a_warning(server, url, pixels, tmp_path, caplog, how, gives_parts):
    server.gives_parts = gives_parts
    cache = tmp_path / "file" / "cache" if how == "a file above" else tmp_path / "cache"
    UNUSABLE[how](tmp_path / "cache")
    store = StoreReader(url, cache=cache)
    np.testing.assert_array_equal(store.array("pixels").read([5, 0]), pixels[[5, 0]])
    np.testing.assert_array_equal(store.array("attribution").shard(2).shape[0], 2)
    warned = [record.getMessage() for record in caplog.records if "cannot be used" in record.getMessage()]
    assert len(warned) == 1
    assert str(cache) in warned[0]
    assert "goes on without it" in warned[0]


def test_a_full_cache_is_a_warning_and_what_is_in_it_is_read(server, url, pixels, tmp_path, caplog):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        store = StoreReader(url, cache=small)
        for image in (0, 5, 9, 0):
            np.testing.assert_array_equal(store.array("pixels").read([image]), pixels[[image]])
            np.testing.assert_array_equal(store.array("attribution").read([image]).shape[0], 1)
        assert caplog.text.count("the disk is full") == 1
        assert not list(small.rglob("*.partial"))
        assert [path for path in small.rglob("*") if path.is_file() and path.suffix != ".lock"]
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_cache_that_others_filled_is_read_where_nothing_may_be_written(server, url, pixels, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    StoreReader(url, cache=cache).array("pixels").read(range(N))
    server.requests.clear()

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr("igstore.files.cache._alone", refuse)
    store = StoreReader(url, cache=cache)
    np.testing.assert_array_equal(store.array("pixels").read(range(N)), pixels)
    assert not server.asked("/pixels/c/")
    assert store.array("attribution").read([0]).shape == (1, 7, 8)  # which nobody kept
    np.testing.assert_array_equal(store.array("pixels").read(range(N)), pixels)
    assert not server.asked("/pixels/c/")


def test_a_cache_says_which_folder_it_is(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AccessError, match=f"the cache {tmp_path / 'file'} cannot be used: Not a directory"):
        ShardCache(tmp_path / "file").keep(
            {"sha256": "0" * 64, "bytes": 3, "crc32c": "0" * 8}, lambda begin: None, what="x"
        )


# whatever a server does


STATUSES = [200, 201, 204, 206, 301, 304, 400, 401, 403, 404, 408, 410, 412, 416, 429, 500, 503]


def misbehave(dice: random.Random, folder: Path) -> Callable[[str, int], Any]:
    """A server that now and then answers in some odd way; the same for the same dice."""
    share = dice.choice([0.02, 0.1, 0.5])

    def whole(handler: Any) -> bytes:
        with suppress(OSError):
            return (folder / handler.path.partition("?")[0].lstrip("/")).read_bytes()
        return b""

    def odd(handler: Any, part: Any) -> None:
        content = whole(handler)
        first, last = part if part[0] is not None else (0, len(content))
        given = content[first:last]
        kind = dice.randrange(16)
        if kind == 0:
            answer(
                handler, dice.choice([200, 201, 204, 206, 301, 304, 400, 401, 403, 404, 408, 410, 412, 416, 429, 500])
            )
        elif kind == 1:
            answer(handler, 206, given, Content_Range=f"bytes {first + dice.randint(-9, 9)}-{last}/{len(content)}")
        elif kind == 2:
            answer(handler, 206, given[: len(given) // 2], Content_Range=f"bytes {first}-{last - 1}/{len(content)}")
        elif kind == 3:
            answer(handler, 200, content + bytes(dice.randrange(1, 99)))
        elif kind == 4:
            answer(handler, 200, content[: len(content) // 2])
        elif kind == 5:
            answer(handler, 200, b"<html>" + given, Content_Type="text/html")
        elif kind == 6:
            answer(
                handler, 302, Location=dice.choice(["/", handler.path, "/login", "http://127.0.0.1:1/", "nonsense:"])
            )
        elif kind == 7:
            answer(handler, 200, gzip.compress(content), Content_Encoding="gzip")
        elif kind == 8:
            answer(handler, 200, given, Content_Encoding=dice.choice(["gzip", "deflate", "br", "unknown"]))
        elif kind == 9:
            answer(handler, 503, Retry_After=dice.choice(["0", "-1", "1e9", "never", "99999999999999999999"]))
        elif kind == 10:
            answer(handler, 206, given, Content_Range=dice.choice(["", "bytes */9", "bytes 0-", "bytes 9-1/5", "x"]))
        elif kind == 11:
            answer(handler, 200, given, Content_Length=dice.choice(["-1", "1", "99999", "many", ""]))
            handler.close_connection = True
        elif kind == 12:
            handler.wfile.write(dice.randbytes(dice.randrange(200)))
            handler.close_connection = True
        elif kind == 13:
            handler.close_connection = True
        elif kind == 14:
            tag = dice.choice(['"a"', "W/", "", "\u00e9", '"' + "x" * 5000])
            answer(handler, 206 if part[0] is not None else 200, given, ETag=tag, Last_Modified="yesterday", Date="now")
        else:  # other bytes, in files that are checked whole
            small = part[0] is None
            changed = bytes(255 - byte for byte in given) if small else given
            answer(handler, 200 if small else 404, changed if small else b"")

    return lambda path, before: odd if dice.random() < share else None


def fuzz(seeds: range, folder: Path, intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read through such servers: what comes is right, or an error of igstore's own."""
    monkeypatch.setattr(remote, "_PAUSE", 0)
    monkeypatch.setattr(remote, "_LONGEST_PAUSE", 0)
    monkeypatch.setattr(servers, "_SILENCE", 1)
    expected = open_store(intact).compute()
    outcomes: dict[str, int] = {}
    with http_server(folder) as served:
        for seed in seeds:
            dice = random.Random(seed)
            served.fault = misbehave(dice, folder)
            served.requests.clear()
            cache = tmp_path / f"cache-{seed}" if dice.random() < 0.3 else None
            try:
                store = StoreReader(f"{served.url}/toy.zarr", cache=cache)
                for name in ("pixels", "attribution"):
                    images = dice.sample(range(N), dice.randrange(1, N))
                    read = store.array(name).read(images)
                    wanted = expected[name][images] if name == "pixels" else raw_maps(intact)[images]
                    np.testing.assert_array_equal(read, wanted, err_msg=f"seed {seed}")
                known = store.status != NOT_BUILT  # those whose records the server gives
                np.testing.assert_array_equal(
                    store.scalars("target")[known], expected.target[known], err_msg=f"seed {seed}"
                )
                kind = "right"
            except IgstoreError as error:
                kind = type(error).__name__
            except Exception as error:
                raise AssertionError(f"seed {seed} raised {error!r}") from error
            outcomes[kind] = outcomes.get(kind, 0) + 1
            if cache:
                shutil.rmtree(cache, ignore_errors=True)
    assert outcomes.get("right", 0) > len(seeds) / 5, outcomes
    assert len(outcomes) > 3, outcomes


def raw_maps(store: Path) -> np.ndarray:
    import zarr

    return np.asarray(zarr.open_array(store / "attribution", mode="r", zarr_format=3)[:])


def test_whatever_a_server_does_only_own_errors_come_out(intact, tmp_path, monkeypatch):
    fuzz(range(40), intact.parent, intact, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_whatever_many_servers_do_only_own_errors_come_out(intact, tmp_path, monkeypatch):
    first = 1000 + 10**6 * SEED
    fuzz(range(first, first + amount(10_000)), intact.parent, intact, tmp_path, monkeypatch)
