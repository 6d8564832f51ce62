from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import Forks
from PIL import Image

from igstore import cli, verify_store
from igstore.__main__ import main
from igstore.attributor import Attributor
from igstore.reader import StoreReader

N, SHARD_SIZE = 22, 8  # three shards, the last of six images
UNIT = 5  # images that are kept at a time: 200 gradient evaluations
COMMAND = ["--crop", 16, "--resize", 18, "--n-steps", 40, "--shard-size", SHARD_SIZE, "--device", "cpu"]
RECORDS = ("records/", "zarr.json")  # which say how long it took


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of labelled images."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    with (root / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "class_index"])
        for i in range(N):
            Image.fromarray(random.integers(0, 256, (18, 18, 3), np.uint8)).save(root / f"image_{i:03d}.png")
            table.writerow([f"image_{i:03d}.png", i % 7])
    return root


def build(folder: Path, store: Path, *more: object, model: str = "demo_network") -> list[object]:
    return ["build", "--model", f"networks:{model}", *COMMAND, "--data", folder, "--store", store, *more]


@pytest.fixture(scope="module")
def whole(forks: Forks, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a build that nothing disturbed."""
    home = tmp_path_factory.mktemp("whole")
    assert forks.wait(forks.start(*build(folder, home / "whole.zarr"), output=home / "said")) == cli.DONE
    return home / "whole.zarr"


def files(store: Path) -> dict[str, bytes]:
    found = {file.relative_to(store).as_posix(): file for file in store.rglob("*") if file.is_file()}
    return {
        name: b"" if name.startswith(RECORDS[0]) or name == RECORDS[1] else file.read_bytes()
        for name, file in found.items()
    }


def assert_undisturbed(store: Path, whole: Path) -> None:
    """The same files with the same bytes, and nothing beside them."""
    assert verify_store(store) == []
    found, expected = files(store), files(whole)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
    assert [path for path in store.parent.iterdir() if path.name.startswith(store.name)] == [store]


class Run:
    """A command in a process of its own."""

    def __init__(self, forks: Forks, home: Path, *argv: object, **options: Any) -> None:
        self._forks = forks
        self._output = home / f"said {time.monotonic_ns()}"
        self.pid = forks.start(*argv, output=self._output, **options)

    def wait(self) -> int:
        self.status = self._forks.wait(self.pid)
        return self.status

    @property
    def said(self) -> str:
        return self._output.read_text()

    def until(self, happened: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not happened():
            assert time.monotonic() < deadline, self.said
            time.sleep(0.005)


@pytest.fixture
def run(forks: Forks, tmp_path: Path) -> Callable[..., Run]:
    def start(*argv: object, **options: Any) -> Run:
        return Run(forks, tmp_path, *argv, **options)

    return start


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "model.zarr"


def has_begun(store: Path) -> bool:
    """Whether a shard is finished, and units of the next are."""
    return (store / "records/00000.json").exists() and any(store.glob("staging/*.npz"))


# killed


def events(run: Callable[..., Run], home: Path, *argv: object) -> int:
    """How many changes to files a command makes."""
    assert run(*argv, fault=("count_events", str(home / "count"))).wait() == cli.DONE
    return int((home / "count").read_text())


def test_a_build_that_is_killed_again_and_again(run, store, folder, whole):
    """Each time later in its work, at a change to a file; until it is through."""
    kills = 0
    for event in range(3, 200, 17):
        process = run(*build(folder, store), fault=("die_at", event))
        if process.wait() == cli.DONE:
            break
        assert process.status == -signal.SIGKILL, process.said
        kills += 1
    assert process.status == cli.DONE
    assert kills >= 5
    assert_undisturbed(store, whole)


@pytest.mark.slow
def test_a_build_that_is_killed_at_any_change_to_a_file(run, tmp_path, store, folder, whole):
    n_events = events(run, tmp_path, *build(folder, store))
    assert n_events > 50
    for event in range(1, n_events + 1):
        shutil.rmtree(store)
        assert run(*build(folder, store), fault=("die_at", event)).wait() == -signal.SIGKILL
        last = run(*build(folder, store))
        assert last.wait() == cli.DONE, last.said
        assert_undisturbed(store, whole)


@pytest.mark.slow
def test_a_build_that_is_killed_at_any_time(run, store, folder, whole):
    random = np.random.default_rng(0)
    kills = 0
    while kills < 50:
        process = run(*build(folder, store), slow=0.002)
        time.sleep(random.uniform(0, 0.7))
        os.kill(process.pid, signal.SIGKILL)
        if process.wait() == cli.DONE:
            assert_undisturbed(store, whole)
            shutil.rmtree(store)
        kills += process.status == -signal.SIGKILL
    assert run(*build(folder, store)).wait() == cli.DONE
    assert_undisturbed(store, whole)


@pytest.mark.parametrize("every", [pytest.param(11, id="some"), pytest.param(1, id="any", marks=pytest.mark.slow)])
def test_a_ranking_that_is_killed_at_a_change_to_a_file(run, tmp_path, store, whole, every):
    shutil.copytree(whole, store)
    shutil.rmtree(store / "ranks")
    shutil.rmtree(store / "records/positive-3")
    unranked = tmp_path / "unranked"
    store.rename(unranked)
    shutil.copytree(unranked, store)
    n_events = events(run, tmp_path, "rank", store)
    for event in range(1, n_events + 1, every):
        shutil.rmtree(store)
        shutil.copytree(unranked, store)
        assert run("rank", store, fault=("die_at", event)).wait() == -signal.SIGKILL
        last = run("rank", store)
        assert last.wait() == cli.DONE, last.said
        assert_undisturbed(store, whole)


# interrupted


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [(signal.SIGINT, cli.INTERRUPTED, "interrupted"), (signal.SIGTERM, cli.TERMINATED, "terminated")],
    ids=["SIGINT", "SIGTERM"],
)
class TestInterrupted:
    def test_a_build(self, run, store, folder, whole, sent, status, says):
        process = run(*build(folder, store), slow=0.02)
        process.until(lambda: has_begun(store))
        os.kill(process.pid, sent)
        assert process.wait() == status
        assert process.said.splitlines()[-1] == f"igstore: {says}; run the same command again to go on"
        assert "Traceback" not in process.said
        assert not StoreReader(store).is_complete
        assert run(*build(folder, store)).wait() == cli.DONE
        assert_undisturbed(store, whole)

    def test_a_ranking(self, run, store, whole, sent, status, says):
        shutil.copytree(whole, store)
        (store / "records/positive-3/00002.json").unlink()
        process = run("rank", store, fault=("slow_ranks", 0.5))
        process.until(lambda: (store / "staging").exists())
        os.kill(process.pid, sent)
        assert process.wait() == status
        assert process.said.splitlines()[-1] == f"igstore: {says}; run the same command again to go on"
        assert run("rank", store).wait() == cli.DONE
        assert_undisturbed(store, whole)


# failing disks


@pytest.mark.parametrize("call", [2, 9, 20, 33])
def test_a_disk_that_fails(run, store, folder, whole, call):
    """In the staged units, in a shard, in a record: wherever the given flush is."""
    failed = run(*build(folder, store), fault=("fail_at", call))
    assert failed.wait() == (cli.FAILED if store.exists() else cli.MISUSED)
    last = failed.said.splitlines()[-1]
    assert last.startswith("igstore: ")
    assert "Input/output error" in last
    assert "Traceback" not in failed.said
    if store.exists():
        assert str(store) in last
        assert "run the same command again to go on" in last
        assert {finding.is_missing for finding in verify_store(store) if "interrupted" not in finding.problem} == {True}
    assert run(*build(folder, store)).wait() == cli.DONE
    assert_undisturbed(store, whole)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A function that mounts a small file system in memory, or changes how it is mounted."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
        return folder

    yield mount
    while subprocess.run(["umount", folder], capture_output=True, check=False).returncode == 0:
        pass


@pytest.mark.parametrize("room", [40, 120, 200], ids=lambda room: f"{room} kB")
def test_a_full_disk(run, folder, whole, mount, room):
    small = mount("size=2m")
    (small / "ballast").write_bytes(bytes((2048 - room) * 1024))
    store = small / "model.zarr"
    failed = run(*build(folder, store))
    assert failed.wait() == (cli.FAILED if store.exists() else cli.MISUSED), failed.said
    assert "No space left on device" in failed.said.splitlines()[-1]
    assert "Traceback" not in failed.said
    (small / "ballast").unlink()
    assert run(*build(folder, store)).wait() == cli.DONE
    assert_undisturbed(store, whole)


def test_a_folder_that_may_not_be_written(run, folder, whole, mount):
    """A finished store there is read, and even the same build has nothing against it."""
    shared = mount("size=4m")
    shutil.copytree(whole, shared / "whole.zarr")
    shutil.copytree(whole, shared / "part.zarr")
    (shared / "part.zarr/records/00001.json").unlink()
    mount("remount,ro")
    new = run(*build(folder, shared / "new.zarr"))
    assert new.wait() == cli.MISUSED
    assert new.said.splitlines()[-1].startswith(
        f"igstore: the store cannot be made at {shared / 'new.zarr'}: Read-only"
    )
    part = run(*build(folder, shared / "part.zarr"))
    assert part.wait() == cli.FAILED
    assert "Read-only file system" in part.said.splitlines()[-1]
    assert "Traceback" not in new.said + part.said
    for argv in (
        build(folder, shared / "whole.zarr"),
        ["info", shared / "whole.zarr"],
        ["verify", shared / "whole.zarr"],
    ):
        process = run(*argv)
        assert process.wait() == cli.DONE, process.said


def test_a_store_that_is_deleted_while_it_is_built(run, store, folder):
    process = run(*build(folder, store), slow=0.02)
    process.until(lambda: has_begun(store))
    while store.exists():
        shutil.rmtree(store, ignore_errors=True)
    assert process.wait() == cli.MISUSED
    assert process.said.splitlines()[-1] == (
        f"igstore: {store} is gone: it was deleted or moved while it was being written; start again"
    )
    assert not store.exists()


def test_a_store_that_is_replaced_while_it_is_built(run, store, folder, tmp_path):
    """By one of other settings: their shards are not mixed."""
    other = store.with_name("other.zarr")
    assert run(*build(folder, other, "--baseline", "white")).wait() == cli.DONE
    process = run(*build(folder, store), slow=0.02)
    process.until(lambda: has_begun(store))
    store.rename(tmp_path / "aside.zarr")
    other.rename(store)
    before = files(store)
    assert process.wait() == cli.MISUSED
    assert "is not the store that was being written" in process.said.splitlines()[-1]
    assert files(store).keys() - before.keys() <= {"staging/at_work", "staging/writing"}
    assert [finding for finding in verify_store(store) if "interrupted" not in finding.problem] == []


# several at once


def test_a_second_builder_says_what_it_sees_and_harms_nothing(run, store, folder, whole):
    first = run(*build(folder, store), slow=0.02)
    first.until(lambda: has_begun(store))
    second = run(*build(folder, store), slow=0.01)
    refused = run(*build(folder, store, "--overwrite"))
    assert refused.wait() == cli.MISUSED
    assert f"{store} is not overwritten: somebody is at work there (process {first.pid} on " in refused.said
    assert first.wait() == second.wait() == cli.DONE
    assert f"igstore: somebody else is at work at {store}: process {first.pid} on" in second.said
    assert "somebody else" not in first.said
    assert_undisturbed(store, whole)


@pytest.mark.parametrize("fault", [None, ("without_locks", None)], ids=["locks", "a file system without locks"])
@pytest.mark.parametrize("rounds", [1, pytest.param(15, marks=pytest.mark.slow)])
def test_builders_that_start_together(run, store, folder, whole, fault, rounds):
    for _ in range(rounds):
        shutil.rmtree(store, ignore_errors=True)
        processes = [run(*build(folder, store), slow=0.001 * index, fault=fault) for index in range(3)]
        assert [process.wait() for process in processes] == [cli.DONE] * 3, [process.said for process in processes]
        assert_undisturbed(store, whole)


@pytest.mark.slow
def test_builders_of_which_some_are_killed(run, store, folder, whole):
    random = np.random.default_rng(0)
    for _ in range(15):
        shutil.rmtree(store, ignore_errors=True)
        processes = [run(*build(folder, store), slow=0.003 * index) for index in range(3)]
        for process in processes[:2]:
            time.sleep(random.uniform(0, 0.4))
            os.kill(process.pid, signal.SIGKILL)
        assert [process.wait() for process in processes][-1] == cli.DONE
        # of those that were killed, the last one to be at work may not have been there to sweep
        assert run(*build(folder, store)).wait() == cli.DONE
        assert_undisturbed(store, whole)


# growing


@pytest.fixture
def attributed(monkeypatch) -> list[str]:
    """The ids of the images that are attributed from now on."""
    ids = []
    attribute = Attributor.__call__

    def spy(self, pixels, labels, image_ids, reasons):
        ids.extend(image_ids)
        return attribute(self, pixels, labels, image_ids, reasons)

    monkeypatch.setattr(Attributor, "__call__", spy)
    return ids


def test_a_larger_limit_attributes_what_is_new_and_the_short_last_shard(store, folder, whole, attributed, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def images_attributed(*more: object) -> range:
        attributed.clear()
        assert main(list(map(str, build(folder, store, *more)))) == cli.DONE
        numbers = [int(name.removeprefix("image_")) for name in attributed]
        assert numbers == sorted(set(numbers))
        return range(numbers[0], numbers[-1] + 1) if numbers else range(0)

    assert images_attributed("--limit", 11) == range(11)
    assert images_attributed("--limit", 11) == range(0)
    assert images_attributed("--limit", 19) == range(8, 19)
    before = files(store)
    assert images_attributed("--limit", 3) == range(0)  # a smaller limit changes nothing
    assert files(store) == before
    assert images_attributed() == range(16, 22)
    assert_undisturbed(store, whole)


def test_a_smaller_limit_goes_on_with_what_the_store_lists(run, store, folder, whole):
    process = run(*build(folder, store), slow=0.02)
    process.until(lambda: has_begun(store))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert run(*build(folder, store, "--limit", 3)).wait() == cli.DONE
    assert_undisturbed(store, whole)
