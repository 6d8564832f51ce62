"""Commands that write, killed and stopped a thousand times each: nothing is lost, and nothing is left over.

Each case follows from its seed, which messages name, but for the moment in which a process is killed or stopped by the
clock.
"""

# ruff: noqa: F811  (fixtures of another module)

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from amounts import SEED, amount
from forks import Forks
from test_faults import Run, assert_undisturbed, build, files, folder, forks, is_ready, stopped, whole  # noqa: F401

from igstore import cli, verify_store
from igstore.storage import StoreReader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

WROTE_ALREADY = "exists, and nothing is ever written over"


@dataclass(frozen=True)
class Work:
    """A command that writes, what is there when it begins, and what is there when nothing has disturbed it.

    Parameters
    ----------
    argv
        The command; HERE stands for the folder that it works in.
    before
        What is in that folder, by name.
    makes
        The name of what it makes there.
    """

    argv: list[object]
    before: dict[str, Path]
    makes: str

    def begin(self, here: Path) -> None:
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        for name, source in self.before.items():
            shutil.copytree(source, here / name)

    def at(self, here: Path) -> list[str]:
        return [str(argument).replace("HERE", str(here)) for argument in self.argv]


@dataclass(frozen=True)
class Tried:
    """A `Work` that was done once: how many changes to files that took, how long, and what came out."""

    work: Work
    n_events: int
    seconds: float
    made: Path


def do(forks: Forks, home: Path, work: Work) -> Tried:
    here = home / "here.zarr"
    work.begin(here)
    started = time.monotonic()
    run = Run(forks, home, *work.at(here), fault=("count_events", str(home / "count")), slow=0.002)
    assert run.wait() == cli.DONE, run.said
    seconds = time.monotonic() - started
    return Tried(work, int((home / "count").read_text()), seconds, here)


@pytest.fixture(scope="module")
def starts(forks, folder, whole, tmp_path_factory) -> dict[str, Path]:
    """Stores in the middle of something."""
    home = tmp_path_factory.mktemp("starts")
    begun, damaged, unranked = home / "begun", home / "damaged", home / "unranked"
    run = Run(forks, home, *build(folder, begun, "--limit", 11, "--no-rank"))
    assert run.wait() == cli.DONE, run.said
    shutil.copytree(whole, damaged)
    (damaged / "attribution/c/1/0/0").write_bytes(b"")
    (damaged / "label/c/2").unlink()
    (damaged / "records/positive-3/00002.json").write_text("{}")
    shutil.copytree(whole, unranked)
    shutil.rmtree(unranked / "ranks")
    shutil.rmtree(unranked / "records/positive-3")
    return {"whole": whole, "begun": begun, "damaged": damaged, "unranked": unranked}


@pytest.fixture(scope="module")
def works(forks, folder, starts, tmp_path_factory) -> dict[str, Tried]:
    store = "HERE/model.zarr"
    builds = build(folder, Path(store))
    found = {
        "build": Work(builds, {}, "model.zarr"),
        "build more": Work(builds, {"model.zarr": starts["begun"]}, "model.zarr"),
        "build again": Work(builds, {"model.zarr": starts["damaged"]}, "model.zarr"),
        "rank": Work(["rank", store], {"model.zarr": starts["unranked"]}, "model.zarr"),
        "rank otherwise": Work(["rank", store, "--block", 4], {"model.zarr": starts["whole"]}, "model.zarr"),
        "merge": Work(["merge", store, store, "--out", "HERE/made"], {"model.zarr": starts["whole"]}, "made"),
    }
    for name in ("zarr", "ranks", "hdf5", "quantus", "virelay"):
        argv = ["export", store, "HERE/made", "--format", name]
        found[f"export {name}"] = Work(argv, {"model.zarr": starts["whole"]}, "made")
    return {name: do(forks, tmp_path_factory.mktemp("works"), work) for name, work in found.items()}


def assert_as_made(here: Path, tried: Tried) -> None:
    """Just what was made where nothing disturbed it, and nothing beside it."""
    assert sorted(path.name for path in here.iterdir()) == sorted(path.name for path in tried.made.iterdir())
    for path in here.iterdir():
        if path.is_dir():
            found, expected = files(path), files(tried.made / path.name)
            assert found == expected, sorted(name for name in found | expected if found.get(name) != expected.get(name))
        else:
            assert path.read_bytes() == (tried.made / path.name).read_bytes(), path.name
    if tried.work.makes == "model.zarr":
        assert verify_store(here / "model.zarr") == []


def test_killed(works, forks, tmp_path):
    """At a change to a file or by the clock, once or several times; then the same command finishes the work."""
    kills, seed = 0, SEED
    while kills < amount(1000):
        seed += 1
        dice = random.Random(seed)
        name = dice.choice(list(works))
        tried, here = works[name], tmp_path / "here.zarr"
        tried.work.begin(here)
        for _ in range(dice.choice([1, 1, 2, 4])):
            if dice.random() < 0.6:
                fault = ("die_at", dice.randint(1, tried.n_events))
                status = Run(forks, tmp_path, *tried.work.at(here), fault=fault, slow=0.001).wait()
            else:
                run = Run(forks, tmp_path, *tried.work.at(here), slow=0.002)
                time.sleep(dice.uniform(0, 1.2 * tried.seconds))
                os.kill(run.pid, signal.SIGKILL)
                status = run.wait()
            kills += status == -signal.SIGKILL
        last = Run(forks, tmp_path, *tried.work.at(here))
        said = f"seed {seed}: {name}: {last.wait()}, {last.said}"
        assert last.status == cli.DONE or WROTE_ALREADY in last.said, said
        try:
            assert_as_made(here, tried)
        except AssertionError as error:
            raise AssertionError(said) from error
        for file in tmp_path.glob("said *"):
            file.unlink()


# what happens while a writer is stopped, and what it then finds


def replace(dice: random.Random, here: Path, run) -> None:
    """Another store of the same settings is in its place, and the first one elsewhere, or gone."""
    store = here / "model.zarr"
    if store.exists():
        shutil.rmtree(store) if dice.random() < 0.5 else store.rename(here.with_name(f"aside-{time.monotonic_ns()}"))
    run("build")


MEANWHILE = {
    "replaced": replace,
    "built": lambda dice, here, run: run("build"),
    "ranked": lambda dice, here, run: run("rank"),
    "ranked otherwise": lambda dice, here, run: run("rank otherwise"),
    "built and ranked": lambda dice, here, run: (run("build"), run("rank otherwise")),
}


def test_stopped(works, forks, tmp_path):
    """At a change to a file or by the clock, as a hung mount does; others go on meanwhile, and then it wakes up."""
    stops, seed = 0, SEED
    names = [name for name in works if name.startswith(("build", "rank"))]
    while stops < amount(1000):
        seed += 1
        dice = random.Random(seed)
        name, meanwhile = dice.choice(names), dice.choice(list(MEANWHILE))
        tried, here = works[name], tmp_path / "here.zarr"
        tried.work.begin(here)
        fault = ("stop_at", dice.randint(1, tried.n_events)) if dice.random() < 0.6 else None
        first = Run(forks, tmp_path, *tried.work.at(here), fault=fault, slow=0.002)
        if fault is None:
            time.sleep(dice.uniform(0, 1.2 * tried.seconds))
            if not is_ready(first, 0.001):
                os.kill(first.pid, signal.SIGSTOP)
        first.until(lambda pid=first.pid: stopped(pid))
        stops += not is_ready(first, 0.001)
        others: list[Run] = []

        def run(other: str, others: list[Run] = others, here: Path = here) -> None:
            others.append(Run(forks, tmp_path, *works[other].work.at(here)))
            is_ready(others[-1], 0.6)  # unless it waits for the first one

        MEANWHILE[meanwhile](dice, here, run)
        os.kill(first.pid, signal.SIGCONT)
        statuses = [first.wait(), *(other.wait() for other in others)]
        said = f"seed {seed}: {name}, {meanwhile}: " + "\n".join(other.said for other in (first, *others))
        assert set(statuses) <= {cli.DONE, cli.FAILED, cli.MISUSED}, said
        assert "Traceback" not in said
        store = here / "model.zarr"
        if store.exists():
            findings = [f for f in verify_store(store) if not f.is_missing and "interrupted" not in f.problem]
            # what was damaged before is no loss
            assert not findings or name == "build again", f"{said}\n{findings}"
            assert StoreReader(store).n_images >= 11, said
        for last in ("build", "rank", "rank otherwise"):
            done = Run(forks, tmp_path, *works[last].work.at(here))
            assert done.wait() == cli.DONE, f"{said}\n{done.said}"
        try:
            assert_as_made(here, works["rank otherwise"])
        except AssertionError as error:
            raise AssertionError(said) from error
        for path in [*tmp_path.glob("said *"), *tmp_path.glob("aside-*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
