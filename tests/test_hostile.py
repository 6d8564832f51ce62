"""Stores that are made to do harm: each tries one thing, and one tries everything at once, with every command."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
from stores import image_ids, make_store
from test_untrusted import look, reseal, use

from igstore import cli
from igstore.__main__ import main
from igstore.files import sealed

N, SHARD = 6, 4
SECRET = b"what another file of this machine holds\n" * 100
CODE = """
from pathlib import Path
import torch

Path(__file__).with_name("it has run").touch()

def network():
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()
"""
ESCAPES = "\x1b[2J\x1b]0;owned\x07\ud800"
MARKUP = "<script>alert(1)</script>"
FORMULA = '=HYPERLINK("http://evil","x")'


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "store.zarr"
    return make_store(path, n=N, size=(7, 8), failed=(3,), shard_size=SHARD)


@pytest.fixture
def path(intact: Path, tmp_path: Path) -> Path:
    """In a folder of its own, beside code and a file that it must not reach."""
    (tmp_path / "outside").write_bytes(SECRET)
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent/readme.py").write_text(CODE)
    return shutil.copytree(intact, tmp_path / "sent/store.zarr")


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(file.read_text())
    change(document)
    if file.name == "zarr.json":
        document["attributes"] = sealed(document["attributes"]) if file.parent.name == "store.zarr" else {}
    file.write_text(json.dumps(sealed(document) if "records" in str(file) else document))


def root(path: Path, **attributes: Any) -> None:
    edit(path / "zarr.json", lambda document: document["attributes"].update(attributes))


def array(name: str, **metadata: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / name / "zarr.json", lambda document: document.update(metadata))


def record(path: Path, **fields: Any) -> None:
    edit(path / "records/00000.json", lambda document: document.update(fields))


def sharding(chunk: list[int], codecs: list[Any]) -> dict[str, Any]:
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    configuration = {"chunk_shape": chunk, "codecs": codecs, "index_codecs": index, "index_location": "end"}
    return {"codecs": [{"name": "sharding_indexed", "configuration": configuration}]}


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something else in the place of a file or folder."""

    def put(path: Path) -> None:
        file = path / name
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        make(file)

    return put


def endless(file: Path) -> None:
    """A terabyte that takes no room."""
    with file.open("wb") as opened:
        opened.truncate(2**40)


def ids(path: Path, *names: str) -> None:
    """Other ids of the first images, which records bless."""
    texts = np.array([*names, *image_ids(N)[len(names) :]][:SHARD], dtype=object)
    (path / "image_id/c/0").write_bytes(bytes(numcodecs.VLenUTF8().encode(texts)))
    reseal(path)


def absent(path: Path) -> None:
    """A finished shard that says that none of its images is there, as Zarr does of what was never written."""
    import google_crc32c

    file = path / "attribution/c/0/0/0"
    index = b"\xff" * (16 * SHARD)
    file.write_bytes(index + google_crc32c.value(index).to_bytes(4, "little"))
    reseal(path)


HOSTILE: dict[str, Callable[[Path], Any]] = {
    # sizes that are only claimed
    "more images than there are": lambda path: root(path, n_images=10**11),
    "more images, in one shard": lambda path: root(path, n_images=10**6, shard_size=10**6),
    "shards of nothing": lambda path: root(path, n_images=10**11, shard_size=1),
    "large images": lambda path: root(path, crop=[10**9, 10**9]),
    "images as large as may be": lambda path: root(path, crop=[8192, 8192]),
    "a long array": array("attribution", shape=[10**12, 7, 8]),
    "large maps": array("attribution", shape=[6, 10**6, 10**6]),
    "large chunks": array("scale", chunk_grid={"name": "regular", "configuration": {"chunk_shape": [10**12]}}),
    "large inner chunks": array("attribution", **sharding([1, 10**6, 10**6], [{"name": "bytes"}])),
    "wide values": array("label", data_type="fixed_length_utf32", fill_value="x" * 10),
    "names without end": lambda path: (path / "image_id/c/0").write_bytes(b"\xff\xff\xff\x7f" + bytes(50)),
    "one name without end": lambda path: (path / "image_id/c/0").write_bytes(b"\4\0\0\0\xff\xff\xff\x7f" + bytes(50)),
    "large numbers": lambda path: record(path, seconds=10**400, in_top5=10**400),
    "blocks larger than large": lambda path: (path / "ranks/positive-3").rename(path / "ranks/positive-999999999"),
    "images that are absent": absent,
    # what is long or deep
    "a deep record": lambda path: (path / "records/00000.json").write_text("[" * 10**5),
    "deep metadata": lambda path: (path / "scale/zarr.json").write_text('{"a":' * 10**5),
    "a deep root": lambda path: (path / "zarr.json").write_text('{"a":' * 10**5),
    "a root of many lists": lambda path: (path / "zarr.json").write_text('{"a":[' + "[]," * 10**6 + "[]]}"),
    "a record of many lists": lambda path: (path / "records/00000.json").write_text("[" + "[]," * 10**6 + "[]]"),
    **{
        f"{name} without end": instead(name, endless)
        for name in (
            "zarr.json",
            "scale/zarr.json",
            "records/00000.json",
            "records/positive-3/00000.json",
            "label/c/0",
            "image_id/c/0",
            "attribution/c/0/0/0",
        )
    },
    # what is no file
    "a folder in the place of a file": instead("scale/c/0", Path.mkdir),
    "a folder in the place of a record": instead("records/00000.json", Path.mkdir),
    "a file in the place of a folder": instead("ranks", Path.touch),
    **{
        f"a pipe in the place of {name}": instead(name, os.mkfifo)
        for name in (
            "zarr.json",
            "records/00000.json",
            "label/c/0",
            "attribution/c/0/0/0",
            "ranks/positive-3/zarr.json",
        )
    },
    **{
        f"a device in the place of {name}": instead(name, lambda file: file.symlink_to("/dev/zero"))
        for name in ("zarr.json", "records/00000.json", "label/c/0", "attribution/c/0/0/0")
    },
    "a link that leads nowhere": instead("records/00001.json", lambda file: file.symlink_to("nowhere")),
    "a link that leads to itself": instead("records/00001.json", lambda file: file.symlink_to(file.name)),
    # what leads out
    "records of other files": lambda path: record(
        path, files={"../../outside": {"bytes": len(SECRET), "crc32c": "0" * 8, "sha256": "0" * 64}}
    ),
    "a record of other images": lambda path: record(path, images=[0, 10**15]),
    "a ranking of another name": lambda path: (path / "ranks/positive-3").rename(path / "ranks/positive-03"),
    "ids that are paths": lambda path: ids(path, "../../outside", "/etc/passwd", "..", "a/../../outside"),
    # what would be run
    "a codec that runs code": array(
        "attribution", **sharding([1, 7, 8], [{"name": "numcodecs.pickle", "configuration": {}}])
    ),
    "objects": array("image_id", data_type="object"),
    "a model that is code": lambda path: root(path, model="readme:network"),
    "weights that are a file": lambda path: root(path, model="shufflenet_v2_x0_5", weights="../outside"),
    # texts
    "ids that are commands": lambda path: ids(path, ESCAPES.replace("\ud800", ""), MARKUP, FORMULA, "nul\0nul"),
    "texts that are no lists": lambda path: root(path, class_names={"0": MARKUP}, wnids=ESCAPES),
    "texts that are commands": lambda path: root(
        path,
        model=f"toy{ESCAPES}{MARKUP}",
        weights=FORMULA,
        class_names=[ESCAPES, MARKUP, FORMULA],
        versions={ESCAPES: MARKUP},
    ),
}

_events: list[tuple[str, str]] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is not None and event in ("open", "pickle.find_class", "os.listdir", "os.scandir", "os.remove"):
        _events.append((event, str(arguments[0])))


sys.addaudithook(_hook)


@pytest.fixture
def events() -> Iterator[list[tuple[str, str]]]:
    """What is opened and unpickled meanwhile."""
    global _events
    _events = []
    yield _events
    _events = None


def assert_reached_nothing(path: Path, events: list[tuple[str, str]]) -> None:
    # dask pickles its own expressions
    unpickled = {place.split(".")[0] for event, place in events if event == "pickle.find_class"}
    assert unpickled <= {"dask", "toolz", "numpy", "xarray", "igstore", "functools"}
    assert not [place for _, place in events if "outside" in place or "passwd" in place or "readme" in place]
    sent = path.parent
    assert (sent.parent / "outside").read_bytes() == SECRET
    assert not list(sent.rglob("it has run"))
    assert "readme" not in sys.modules


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_store_costs_little_and_reaches_nothing(path, make, events):
    make(path)
    tracemalloc.start()
    try:
        look(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50e6
    assert_reached_nothing(path, events)
    # everything that is opened near the store is in it
    home = str(path.parent)
    assert {place for _, place in events if place.startswith(home) and not place.startswith(str(path))} <= {home}


@pytest.mark.slow
@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_nothing_that_is_made_of_a_hostile_store_does_harm(path, make, events):
    make(path)
    tracemalloc.start()
    try:
        use(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100e6
    assert_reached_nothing(path, events)


def everything(path: Path) -> None:
    """All that a store can try with which nothing is wrong: it is opened, shown and exported."""
    shutil.rmtree(path)
    texts = [f"{MARKUP}{ESCAPES}", FORMULA, "../../outside"]
    make_store(
        path,
        n=N,
        size=(7, 8),
        shard_size=SHARD,
        failed=(3,),
        class_names=[*texts, "d", "e"],
        wnids=[f"n{index}{ESCAPES}" for index in range(5)],
        model="readme:network",
        weights=f"../outside{ESCAPES}{MARKUP}",
    )
    ids(path, "../../outside", f"{MARKUP}{ESCAPES[:-1]}", FORMULA)
    record(path, failed={image_ids(N)[3]: f"{ESCAPES}{MARKUP}"}, device=ESCAPES)
    root(path, versions={ESCAPES: MARKUP}, made_by=ESCAPES)


def everything_and_more(path: Path) -> None:
    """And what makes it no store in several ways."""
    everything(path)
    (path / "more").symlink_to(path.parent)
    (path / "conftest.py").write_text(CODE)
    instead("records/00001.json", os.mkfifo)(path)
    instead("records/positive-3/00001.json", lambda file: file.symlink_to(path.parent.parent / "outside"))(path)
    instead("output/c/1", endless)(path)
    instead("scale/c/1", Path.mkdir)(path)
    (path / "ranks/absolute-999999999").mkdir()
    os.mkfifo(path / "staging")


COMMANDS = """
info {store}
info {store} --json
verify {store}
verify {store} --recompute 2
rank {store} --score absolute
rank {store}
evaluate {store} --p 50
evaluate {store} --p 50 --models squeezenet1_1 --weights random:0 --out found
report found --store {store}
curves {store} --steps 1
show {store} --out shown.png
view {store} --save page
export {store} copy.zarr
export {store} thin.zarr --format ranks
export {store} small.zarr --compress zstd
export {store} store.h5 --format hdf5
export {store} quantus --format quantus
export {store} virelay --format virelay
merge {store} {store} --out merged.zarr
""".strip().splitlines()


@pytest.mark.parametrize("make", [everything, everything_and_more])
def test_a_store_that_tries_everything(path, events, monkeypatch, capfd, make):
    """Each command ends by itself, in a status of its own and in words for people."""
    make(path)
    monkeypatch.chdir(path.parent)
    for line in COMMANDS:
        argv = line.format(store=path.name).split()
        assert main(argv) in (cli.DONE, cli.FAILED, cli.MISUSED, cli.SOME_IMAGES_FAILED), line
        out, err = capfd.readouterr()
        assert "\x1b" not in out + err, line
        assert "\x07" not in out + err, line
        assert "Traceback" not in err, line
    assert_reached_nothing(path, events)
    made = [file for file in path.parent.rglob("*") if file.is_file() and path not in file.parents]
    for file in made:
        if file.suffix in (".html", ".csv", ".md"):
            text = file.read_text()
            assert cli.printable(text) == text, file
            assert MARKUP not in text or file.suffix == ".csv", file
        if file.suffix == ".csv":
            cells = [cell for line in csv.reader(io.StringIO(text)) for cell in line]
            assert not [cell for cell in cells if cell[:1] in tuple("=+-@")], file
    if make is everything:
        assert {".html", ".csv", ".md", ".png", ".h5", ".npy"} <= {file.suffix for file in made}


def test_terminals_are_sent_no_commands(path, capsys):
    root(path, model="\x1b[2J\ud800evil")
    assert main(["info", str(path)]) == cli.DONE
    said = capsys.readouterr().out
    assert "evil" in said
    assert "\x1b" not in said
