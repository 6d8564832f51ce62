"""What systems and file systems refuse: readers do without it, or say what it was, and never call it damage."""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import make_store

from igstore import MaskedImageNet, export_store, masked_view, open_store
from igstore.errors import AccessError, DamagedStoreError, OutOfMemoryError
from igstore.files import access_error, reading
from igstore.storage import StoreReader, arrays

FORMS = {"raw": {}, "zstd": {"compress": "zstd"}, "hdf5": {"format": "hdf5"}}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same store of many shards in each form."""
    folder = tmp_path_factory.mktemp("systems")
    whole = make_store(folder / "raw.zarr", 40, shard_size=1, size=(7, 8))
    made = {name: export_store(whole, folder / name, **options) for name, options in FORMS.items() if options}
    return {"raw": whole, **made}


# open files


@contextmanager
def most_files(more: int) -> Iterator[None]:
    """Let this process open so many more files than it has open, and none beyond."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + more, before[1]))
    held = []
    try:
        with suppress(OSError):
            while True:  # the limit is on their numbers, and there may be gaps
                held.append(os.open(os.devnull, os.O_RDONLY))
        for descriptor in held[:more]:
            os.close(descriptor)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in held[more:]:
            os.close(descriptor)


@pytest.mark.parametrize("form", FORMS)
def test_shards_are_not_held_open(stores, form):
    store = stores[form]
    expected = open_store(store).compute()
    with most_files(8):
        data = MaskedImageNet(store)
        order = np.random.default_rng(0).permutation(len(data)).tolist()
        assert all(data[index][0].shape == (3, 7, 8) for index in order)
        held = [StoreReader(store).array("pixels").shard(shard) for shard in range(40)]
        np.testing.assert_array_equal(np.concatenate(held), expected.pixels)
        assert open_store(store).compute().identical(expected)
        assert int(masked_view(store, p=50).sum()) > 0


def maps_of(folder: Path) -> int:
    gc.collect()
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_no_more_maps_are_held_than_there_may_be(stores, monkeypatch):
    monkeypatch.setattr(arrays, "_MOST_MAPS", 5)
    before, array = maps_of(stores["raw"]), StoreReader(stores["raw"]).array("pixels")
    values = array.read(range(40))
    assert maps_of(stores["raw"]) - before == 5
    kept = array.shard(3)  # is in use, and stays whatever is read meanwhile
    np.testing.assert_array_equal(array.read(range(40)), values)
    np.testing.assert_array_equal(kept[0], values[3])
    assert maps_of(stores["raw"]) - before == 6
    del array, kept
    assert maps_of(stores["raw"]) == before


def test_a_map_cannot_be_written_to(stores):
    shard = StoreReader(stores["raw"]).array("pixels").shard(0)
    with pytest.raises(ValueError, match="read-only"):
        shard[0] = 0
    with pytest.raises(ValueError, match="WRITEABLE"):
        shard.flags.writeable = True


@pytest.mark.parametrize("form", FORMS)
def test_no_more_files_is_not_damage(stores, form):
    store = StoreReader(stores[form])
    array, records = store.array("pixels"), store.records
    with most_files(0):
        with pytest.raises(AccessError, match=r"cannot be read: .*ulimit -n") as refused:
            array.read([0])
        with pytest.raises(AccessError, match="ulimit -n"):
            StoreReader(stores[form])
    assert refused.value.errno == errno.EMFILE
    assert array.read([0]).any()
    assert store.records == records


# what the system says


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (OSError(errno.EMFILE, "m"), AccessError, "ulimit -n"),
        (OSError(errno.ENFILE, "m"), AccessError, "all processes together"),
        (OSError(errno.ENOMEM, "m"), OutOfMemoryError, "not enough memory"),
        (MemoryError("Unable to allocate 3 GiB"), OutOfMemoryError, "Unable to allocate 3 GiB"),
        (PermissionError(errno.EACCES, "Permission denied"), AccessError, "no permission .Permission denied"),
        (OSError(errno.ENODEV, "No such device"), AccessError, "No such device"),
        (OSError(errno.ESTALE, "Stale file handle"), AccessError, "mounted"),
        (InterruptedError(errno.EINTR, "Interrupted system call"), AccessError, "try again"),
        (OSError(errno.EIO, "Input/output error"), AccessError, "fails"),
        (OSError(errno.EKEYEXPIRED, "Key has expired"), AccessError, "Key has expired"),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), DamagedStoreError, "directory"),
        (OSError("truncated file: eof = 5000"), DamagedStoreError, "truncated"),  # as HDF5 has it
        (ValueError("other bytes"), DamagedStoreError, "other bytes"),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, Exception) else "",
)
def test_only_contents_are_damaged(error, kind, says):
    with pytest.raises(kind, match=says) as raised, reading("the file"):
        raise error
    assert str(raised.value).startswith("the file cannot be read: ")
    assert type(raised.value) is kind
    assert raised.value.__cause__ is error


@pytest.fixture(scope="session")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that refuses what REFUSE says."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("refusing") / "refusing.so"
    source = Path(__file__).with_name("refusing.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


# Runs lines of Python, each under its own REFUSE, and prints what they give, or what they raise.
RUNNER = """
import json, os, pickle, sys
import igstore, igstore.cli.parser, igstore.errors
from igstore.building.import_source import GivenMaps
from igstore.storage.reader import StoreReader

def values(store):
    array = StoreReader(store).array("pixels")
    return int(array.read([5, 1, 3]).sum()), int(array.shard(2).sum())

def kinds(findings):
    return [("unread" if found.is_unread else "damaged") for found in findings if found.shard == 2]

for rule, line in pickle.load(sys.stdin.buffer):
    os.environ["REFUSE"] = rule
    try:
        result = eval(line)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    finally:
        del os.environ["REFUSE"]
    print(json.dumps(result, default=str))
"""


def run_refused(library: Path, lines: list[tuple[str, str]]) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=pickle.dumps(lines),
        capture_output=True,
        env=os.environ | {"LD_PRELOAD": str(library)},
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


WHEN_READ = {
    "attributes": ("/zarr.json", "StoreReader({store!r})"),
    "metadata": ("pixels/zarr.json", "values({store!r})"),
    "records": ("records/00002.json", "values({store!r})"),
    "scalars": ("status/c/2", "StoreReader({store!r}).status"),
    "shards": ("pixels/c/2/", "values({store!r})"),
    "an HDF5 file": ("hdf5", "values({store!r})"),
}


def test_what_may_not_be_opened_is_no_damage(stores, refusing):
    codes = [errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.EIO]
    cases = [(name, code) for name in WHEN_READ for code in codes]
    lines = []
    for name, code in cases:
        part, line = WHEN_READ[name]
        store = stores["hdf5" if "HDF5" in name else "raw"]
        lines.append((f"open:{code}:{part}", line.format(store=str(store))))
    for case, said in zip(cases, run_refused(refusing, lines), strict=True):
        assert str(said).startswith("AccessError: "), (case, said)
        assert os.strerror(case[1]) in said, (case, said)


def test_what_may_not_be_opened_is_told_from_damage_by_whoever_looks(stores, refusing, tmp_path):
    store, out = str(shutil.copytree(stores["raw"], tmp_path / "copy.zarr")), str(tmp_path / "out")
    looks = [
        f"kinds(igstore.verify_store({store!r}))",
        f"igstore.cli.run(__import__('igstore.verify').verify.main, [{store!r}, '--json'])",
        f"igstore.export_store({store!r}, {out!r})",
        f"igstore.rank_store({store!r}, score='absolute')",
    ]
    rule = f"open:{errno.EACCES}:attribution/c/2/"
    found, printed, status, exported, ranked = run_refused(refusing, [(rule, look) for look in looks])
    assert found == ["unread"]
    assert [finding["is_unread"] for finding in printed["findings"] if finding["shard"] == 2] == [True]
    assert status == 1
    for said in (exported, ranked):
        assert said.startswith("AccessError")
        assert "Permission denied" in said
    assert [path.name for path in tmp_path.iterdir()] == ["copy.zarr"]


@pytest.mark.parametrize("form", FORMS)
def test_file_systems_without_maps_are_read(stores, refusing, form):
    line = f"values({str(stores[form])!r})"
    codes = (errno.ENODEV, errno.ENOMEM, errno.EACCES, errno.EINVAL)
    rules = ["", *(f"mmap:{code}:{stores[form].name}" for code in codes)]
    expected, *found = run_refused(refusing, [(rule, line) for rule in rules])
    assert isinstance(expected, list)
    assert found == 4 * [expected]


def test_maps_to_import_are_read_where_they_cannot_be_mapped(refusing, tmp_path):
    np.save(tmp_path / "maps.npy", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    line = f"GivenMaps({str(tmp_path / 'maps.npy')!r}, ['a', 'b']).read(['b']).sum()"
    rules = ["", f"mmap:{errno.ENODEV}:maps.npy"]
    assert run_refused(refusing, [(rule, line) for rule in rules]) == 2 * [sum(range(12, 24))]


def test_file_systems_without_locks_are_read_and_written(stores, refusing, tmp_path):
    hdf5, raw = str(stores["hdf5"]), str(stores["raw"])
    lines = [("", f"values({hdf5!r})")]
    codes = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EROFS, errno.ENOSYS, errno.EINVAL)
    lines += [(f"flock:{code}:", f"values({hdf5!r})") for code in codes]
    for form in ("zarr", "hdf5", "virelay", "quantus"):
        out = str(tmp_path / form)
        lines += [(f"flock:{errno.ENOLCK}:", f"str(igstore.export_store({raw!r}, {out!r}, format={form!r}))")]
    expected, *found = run_refused(refusing, lines)
    assert found[: len(codes)] == len(codes) * [expected]
    assert found[len(codes) :] == [str(tmp_path / form) for form in ("zarr", "hdf5", "virelay", "quantus")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hdf5", "quantus", "virelay", "zarr"]
    np.testing.assert_array_equal(open_store(tmp_path / "hdf5").pixels, open_store(tmp_path / "zarr").pixels)


@pytest.mark.parametrize("form", ["zarr", "hdf5", "quantus", "virelay"])
def test_file_systems_that_cannot_rename_are_named_and_left_clean(stores, refusing, tmp_path, form):
    out = str(tmp_path / form)
    line = f"igstore.export_store({str(stores['raw'])!r}, {out!r}, format={form!r})"
    codes = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
    found = run_refused(refusing, [(f"rename:{code}:{tmp_path}", line) for code in codes])
    for code, said in zip(codes, found, strict=True):
        assert said.startswith(("AccessError: ", "UserError: ")), said
        assert out in said
        assert os.strerror(code) in said
    assert not list(tmp_path.iterdir())
    assert run_refused(refusing, [(f"link:{errno.EPERM}:", f"str({line})")]) == [out]  # nothing needs links


def test_an_error_of_the_system_keeps_its_number():
    refused = access_error("x", OSError(errno.EACCES, "no"))
    assert isinstance(refused, AccessError)
    assert refused.errno == errno.EACCES


def look(path: Path) -> None:
    store = StoreReader(path)
    store.scalars("status")
    store.array("attribution").read([5])
    store.array("pixels").read([5])


def test_what_is_no_file_is_not_waited_for(tmp_path):
    path = make_store(tmp_path / "store.zarr", 6, size=(7, 8))
    for name in ("records/00000.json", "status/c/1", "pixels/c/1/0/0/0", "attribution/zarr.json", "zarr.json"):
        file = path / name
        file.rename(tmp_path / "aside")
        os.mkfifo(file)
        with pytest.raises(DamagedStoreError, match=r"not a regular file|has 0 bytes"):
            look(path)
        file.unlink()
        (tmp_path / "aside").rename(file)
