from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
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
from igstore.attribution import Attributor
from igstore.storage import StoreReader, hold
from igstore.storage.concurrency import writing

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
        deadline = time.monotonic() + 180
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
@pytest.mark.timeout(1800)
def test_a_build_that_is_killed_at_any_change_to_a_file(run, tmp_path, store, folder, whole):
    n_events = events(run, tmp_path, *build(folder, store))
    kills = 0
    for event in range(1, n_events + 1):
        shutil.rmtree(store)
        # threads make the number of changes differ by a few
        kills += run(*build(folder, store), fault=("die_at", event)).wait() == -signal.SIGKILL
        last = run(*build(folder, store))
        assert last.wait() == cli.DONE, last.said
        assert_undisturbed(store, whole)
    assert kills > max(50, 0.9 * n_events)


@pytest.mark.slow
@pytest.mark.timeout(900)
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
    chosen = range(1, events(run, tmp_path, "rank", store) + 1, every)
    kills = 0
    for event in chosen:
        shutil.rmtree(store)
        shutil.copytree(unranked, store)
        # threads make the number of changes differ by a few
        kills += run("rank", store, fault=("die_at", event)).wait() == -signal.SIGKILL
        last = run("rank", store)
        assert last.wait() == cli.DONE, last.said
        assert_undisturbed(store, whole)
    assert kills > 0.8 * len(chosen)


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
        info = run("info", store)
        assert info.wait() == cli.DONE
        assert " 0 built" not in info.said  # a shard is finished by then
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
    assert {"staging"} >= {name.split("/")[0] for name in files(store).keys() - before.keys()}
    assert run(*build(folder, store, "--baseline", "white")).wait() == cli.DONE
    assert verify_store(store) == []
    assert files(store) == before


# stopped, and woken in another world


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TZ"


def is_ready(run: Run, seconds: float) -> bool:
    """Whether a process ends within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.005)
    return False


def assert_nothing_lost(store: Path, n_images: int = N) -> None:
    """Whatever is there is right, though something may be missing or left over."""
    findings = verify_store(store)
    assert [f for f in findings if not f.is_missing and "interrupted" not in f.problem] == []
    assert StoreReader(store).n_images == n_images


# every so many changes to files, for the few and for the many
FEW, MANY = 67, pytest.param(1, id="any", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])
each_change = pytest.mark.parametrize("every", [pytest.param(FEW, id="some"), MANY])


@each_change
@pytest.mark.parametrize("remove", [False, True], ids=["moved", "deleted"])
def test_a_builder_that_wakes_in_another_store_writes_nothing_there(run, tmp_path, store, folder, whole, remove, every):
    """One of the same settings, so that nothing but the folder tells them apart."""
    n_stops = 0
    for event in range(4, 400, every):
        first = run(*build(folder, store), fault=("stop_at", event))
        first.until(lambda pid=first.pid: stopped(pid))
        if is_ready(first, 0):
            assert first.wait() == cli.DONE
            break
        n_stops += 1
        if store.exists():
            shutil.rmtree(store) if remove else store.rename(tmp_path / f"aside {event}")
        assert run(*build(folder, store)).wait() == cli.DONE
        before = files(store)
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait() in (cli.DONE, cli.MISUSED), first.said
        assert "Traceback" not in first.said
        assert verify_store(store) == []
        assert files(store) == before
        assert {path.suffix for path in store.parent.iterdir()} == {".zarr"}, list(store.parent.iterdir())
        shutil.rmtree(store)
    assert n_stops >= 3


@each_change
def test_a_builder_that_is_stopped_while_another_extends_its_store(run, store, folder, whole, every):
    n_stops = 0
    for event in range(4, 400, every):
        first = run(*build(folder, store, "--limit", 11), fault=("stop_at", event))
        first.until(lambda pid=first.pid: stopped(pid))
        if is_ready(first, 0):
            assert first.wait() == cli.DONE
            break
        n_stops += 1
        second = run(*build(folder, store))
        is_ready(second, 0.6)  # unless it waits for the first one
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait() in (cli.DONE, cli.MISUSED), first.said
        assert second.wait() in (cli.DONE, cli.MISUSED), second.said
        assert "Traceback" not in first.said + second.said
        assert_nothing_lost(store, StoreReader(store).n_images)
        assert run(*build(folder, store)).wait() == cli.DONE
        assert_undisturbed(store, whole)
        shutil.rmtree(store)
    assert n_stops >= 3


@pytest.mark.parametrize("first_is", ["extending", "ranking"])
@each_change
def test_extending_and_ranking_lose_nothing_of_each_other(run, tmp_path, store, folder, whole, first_is, every):
    """One stopped at a change to a file, the other at its work meanwhile."""
    begun = tmp_path / "begun.zarr"
    assert run(*build(folder, begun, "--limit", 11, "--no-rank")).wait() == cli.DONE
    extending, ranking = [*build(folder, store), "--no-rank"], ["rank", store]
    n_stops = 0
    for event in range(4, 400, every):
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(begun, store)
        argv, others = (extending, ranking) if first_is == "extending" else (ranking, extending)
        first = run(*argv, fault=("stop_at", event))
        first.until(lambda pid=first.pid: stopped(pid))
        if is_ready(first, 0):
            assert first.wait() == cli.DONE
            break
        n_stops += 1
        second = run(*others)
        is_ready(second, 0.6)
        os.kill(first.pid, signal.SIGCONT)
        said = {first.wait(), second.wait()}
        assert said <= {cli.DONE, cli.FAILED, cli.MISUSED}, first.said + second.said  # a ranking of maps that are gone
        assert "Traceback" not in first.said + second.said
        assert_nothing_lost(store)
        assert (first if first_is == "extending" else second).status == cli.DONE
        assert StoreReader(store).attributes["complete"]
        assert run("rank", store).wait() == cli.DONE
        assert_undisturbed(store, whole)
    assert n_stops >= 2


def test_whoever_is_waited_for_is_named_and_waiting_can_be_interrupted(run, store, folder, whole):
    shutil.copytree(whole, store)
    (store / "records/00002.json").unlink()
    with hold(store) as held, writing(held):
        waiting, other = run(*build(folder, store)), run(*build(folder, store))
        for process in (waiting, other):
            process.until(lambda said=process: f"waiting for process {os.getpid()} on " in said.said)
        os.kill(other.pid, signal.SIGINT)
        assert other.wait() == cli.INTERRUPTED
    assert waiting.wait() == cli.DONE
    assert run(*build(folder, store)).wait() == cli.DONE
    assert_undisturbed(store, whole)


# several at once


def test_a_second_builder_says_what_it_sees_and_harms_nothing(run, store, folder, whole):
    first = run(*build(folder, store), slow=0.1)  # long enough for the others to start on a busy machine
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
    submit = Attributor.submit

    def spy(self, pixels, labels, image_ids, reasons):
        ids.extend(image_ids)
        return submit(self, pixels, labels, image_ids, reasons)

    monkeypatch.setattr(Attributor, "submit", spy)
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


# networks that are no classifiers


FLAT = (
    r"the network returned \((\d),\) for a batch of \1 images; a classifier returns a tensor \(\1, number of classes\)"
)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("Flat", FLAT),
        ("Named", r"the network returned dict for a batch of \d images; a classifier returns a tensor"),
        ("Noisy", r"for image image_00\d: something in its forward pass is random"),
        ("Broken", "the network's outputs have no gradient with respect to its input: its forward pass switches"),
        ("Leaving", r"the network failed \(SystemExit: 0\)"),
    ],
)
def test_a_network_that_is_no_classifier(run, store, folder, model, says):
    process = run(*build(folder, store, model=model))
    assert process.wait() == cli.FAILED
    *_, last = process.said.splitlines()
    assert re.search(says, last)
    assert "Traceback" not in process.said
    assert not store.exists() or not StoreReader(store).records


def test_images_for_which_a_network_has_no_number_fail_alone(run, store, folder):
    process = run(*build(folder, store, model="Undefined"))
    assert process.wait() == cli.SOME_IMAGES_FAILED
    reader = StoreReader(store)
    assert 0 < len(reader.failed) < N
    assert set(reader.failed.values()) == {"its attribution or output is not finite"}
    assert next(iter(reader.failed)) in process.said
    assert verify_store(store) == []


def test_a_device_that_runs_out_of_memory(run, store, folder, whole):
    process = run(*build(folder, store, model="Greedy"))
    assert process.wait() == cli.DONE
    assert "igstore: out of memory on cpu: going on with batches of 2" in process.said
    # the same network but for that, in other batches: rounding may move few of the blocks across the cut
    ours, theirs = (masks(path) for path in (store, whole))
    assert (ours & theirs).sum() >= 0.99 * (ours | theirs).sum()


def masks(store: Path) -> np.ndarray:
    return StoreReader(store).ranking("positive-3").array("share").read(range(N)) < np.float32(0.5)


def test_a_batch_size_that_is_asked_for_and_does_not_fit(run, store, folder):
    process = run(*build(folder, store, "--batch-size", 8, model="Greedy"))
    assert process.wait() == cli.FAILED
    said = "igstore: out of memory on cpu with batches of 8: give a smaller --batch-size, or leave it out"
    assert process.said.splitlines()[-1].startswith(said)


def test_a_class_that_the_network_does_not_have(run, store, folder, tmp_path):
    """Said at once, though it is the last image that has it."""
    labels = (folder / "labels.csv").read_text().replace(f"image_{N - 1:03d}.png,0", f"image_{N - 1:03d}.png,7")
    (tmp_path / "labels.csv").write_text(labels)
    process = run(*build(folder, store, "--labels", tmp_path / "labels.csv"))
    assert process.wait() == cli.MISUSED
    assert f"image image_{N - 1:03d} has class index 7, but the network has 7 classes" in process.said.splitlines()[-1]
    assert not store.exists()


# mistakes

MISTAKES = [
    "",
    "bild",
    "build",
    "build --model networks:demo_network --data {nowhere}",
    "build --model networks:demo_network --data {folder}/labels.csv",
    "build --model networks:demo_network --data {folder} --store {file}",
    "build --model networks:demo_network --data {folder} --store {file}/store",
    "build --model networks:demo_network --data {folder} --store {folder}",
    "build --model networks:demo_network --data {folder} --labels {nowhere}",
    "build --model networks:demo_network --data {folder} --labels {file}",
    "build --model networks:demo_network --data {folder} --weights {file}",
    "build --model networks:demo_network --data {folder} --weights random",
    "build --model networks:no_network --data {folder}",
    "build --model networks:nn --data {folder}",
    "build --model networks:Smooth.forward --data {folder}",
    "build --model no_networks:demo_network --data {folder}",
    "build --model timm:resnet_fifty --data {folder}",
    "build --model resnet-50 --data {folder}",
    "build --model {folder} --data {folder}",
    "build --model networks:demo_network --data {folder} --n-steps 40000",
    "build --model networks:demo_network --data {folder} --n-steps many",
    "build --model networks:demo_network --data {folder} --shard-size 0",
    "build --model networks:demo_network --data {folder} --shard-size 1000000000000",
    "build --model networks:demo_network --data {folder} --limit -1",
    "build --model networks:demo_network --data {folder} --seed -1 --baseline noise",
    "build --model networks:demo_network --data {folder} --crop 100000",
    "build --model networks:demo_network --data {folder} --mean 0 0",
    "build --model networks:demo_network --data {folder} --std 0 0 0",
    "build --model networks:demo_network --data {folder} --std nan 1 1",
    "build --model networks:demo_network --data {folder} --method riemann_trapezoid --n-steps 1",
    "build --model networks:demo_network --data {folder} --precision tf32 --device cpu",
    "build --model networks:demo_network --data {folder} --device gpu",
    "build --model networks:demo_network --data {folder} --device cuda:99",
    "build --model networks:demo_network --data {folder} --batch-size 0",
    "build --model networks:demo_network --data {folder} --workers none",
    "build --model networks:demo_network --data {folder} --split test",
    "build --model networks:demo_network --data {folder} extra",
    "rank",
    "rank {nowhere}",
    "rank {folder}",
    "rank {file}",
    "rank {store} --score loudest",
    "rank {store} --block 0",
    "rank {store} --scheduler nonsense",
    "info {nowhere}",
    "info {folder}",
    "info {file}",
    "verify",
    "verify {nowhere}",
    "verify {file}",
    "verify {folder}",
    "verify {store} --recompute 0",
    "verify {store} --recompute 2 --device gpu",
    "verify {store} --recompute 2 --weights {nowhere}",
    "verify {store} --recompute 2 --data {nowhere}",
    "verify {store} --recompute 2 --seed -1",
]


def test_code_that_ends_the_program_does_not_make_it_look_done(folder, store, monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (tmp_path / "leaving_module.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for model in ("networks:leaving", "leaving_module:network"):
        argv = ["build", "--model", model, "--data", folder, "--store", store]
        assert main(list(map(str, argv))) == cli.MISUSED
        assert f"{model} called sys.exit(" in capsys.readouterr().err
    assert not store.exists()

    def command(_argv: object) -> int:
        sys.exit(0)  # anything else of a user's that a command calls

    assert cli.run(command, []) == cli.FAILED
    assert "sys.exit(0)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as asked:
        main(["build", "--help"])
    assert asked.value.code == cli.DONE


@pytest.mark.parametrize("there", ["a store", "an empty folder", "nothing"])
def test_a_store_that_is_a_link_is_built_where_it_leads(run, store, folder, whole, tmp_path, there):
    target = tmp_path / "elsewhere" / "model.zarr"
    target.parent.mkdir()
    if there == "a store":
        shutil.copytree(whole, target)
        (target / "attribution/c/0/0/0").write_bytes(b"")
    elif there == "an empty folder":
        target.mkdir()
    store.symlink_to(target)
    process = run(*build(folder, store, "--overwrite"))
    assert process.wait() == cli.DONE, process.said
    assert store.is_symlink()
    assert_undisturbed(store, whole)
    assert files(target) == files(whole)
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("line", MISTAKES, ids=lambda line: line or "nothing")
def test_a_mistake_is_one_line_and_status_2(line, folder, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    places = {"nowhere": tmp_path / "nowhere", "folder": folder, "file": tmp_path / "file", "store": whole}
    argv = line.format_map(places).split()
    if argv[:1] == ["build"] and "--crop" not in argv:
        argv += ["--crop", "16"]
    assert main(argv) == cli.MISUSED
    said = capsys.readouterr()
    # what an empty command line and a place without images are told goes on for some lines
    assert said.err.count("\n") == 1 or not argv or "--data" in line
    assert said.err.startswith("igstore: ") or not argv
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
