"""Several jobs that share a file system, each building its part of one store."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from test_faults import SHARD_SIZE, assert_undisturbed, build, folder, forks, whole  # noqa: F401

from igstore import build_store, cli
from igstore.building import Part
from igstore.errors import UserError
from igstore.files import atomic
from igstore.storage import StoreReader, at_work, staging


@pytest.mark.parametrize("n_shards", [0, 1, 5, 100])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_parts_share_the_shards_out(n_shards, count):
    shares = [Part(number, count).shards(n_shards) for number in range(1, count + 1)]
    assert sorted(shard for share in shares for shard in share) == list(range(n_shards))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    # also of the shards at the end, which a larger limit adds
    late = [sum(shard >= n_shards // 2 for shard in share) for share in shares]
    assert max(late) - min(late) <= 1


def test_a_part_is_spelled_as_it_is_read():
    assert Part.parse("2/8") == Part(2, 8)
    assert str(Part(2, 8)) == "2/8"
    assert Part.parse("1/1").is_whole


@pytest.mark.parametrize("text", ["0/8", "9/8", "1", "1/0", "/8", "a/b", "-1/8", "1/8/2", "1/8 ", "\uff11/8", ""])
def test_what_is_no_part(text):
    with pytest.raises(UserError, match="must be I/N"):
        Part.parse(text)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--part", "0/3"], "part is 0/3; it must be I/N, I from 1 to N: 1/8 to 8/8 for eight jobs"),
        (["--part", "three"], "part is 'three'; it must be I/N, such as 1/8"),
        (["--part", "1/3", "--overwrite"], "each part would remove what the others have built"),
        (["--dry-run", "--scheduler", "tcp://127.0.0.1:9"], "dry-run measures this machine"),
    ],
    ids=["from zero", "a word", "overwriting", "measuring others"],
)
def test_a_mistake(forks, folder, tmp_path, more, says):  # noqa: F811
    store = tmp_path / "model.zarr"
    assert forks.wait(forks.start(*build(folder, store, *more), output=tmp_path / "said")) == cli.MISUSED
    said = (tmp_path / "said").read_text()
    assert says in said
    assert said.count("\n") == 1
    assert not store.exists()


def test_a_dry_run_of_a_part(forks, folder, tmp_path):  # noqa: F811
    dry_run = build(folder, tmp_path / "model.zarr", "--dry-run", "--part", "3/3", "--device", "cpu,cpu")
    assert forks.wait(forks.start(*dry_run, output=tmp_path / "said")) == cli.DONE
    said = (tmp_path / "said").read_text()
    assert "6 of 6 images, 1 shards of 8" in said
    assert "240 gradient evaluations" in said
    assert "on 2 devices" in said


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "model.zarr"


@pytest.mark.parametrize("fault", [None, ("without_locks", None)], ids=["locks", "a file system without locks"])
def test_three_parts_at_once_make_the_store_of_one_process(forks, folder, store, whole, tmp_path, fault):  # noqa: F811
    def said(number: int) -> Path:
        return tmp_path / f"said {number}"

    parts = [
        forks.start(*build(folder, store, "--part", f"{number}/3"), output=said(number), slow=0.002, fault=fault)
        for number in (1, 2, 3)
    ]
    assert [forks.wait(part) for part in parts] == [cli.DONE] * 3, [said(number).read_text() for number in (1, 2, 3)]
    assert_undisturbed(store, whole)
    assert not any("somebody else is at work" in said(number).read_text() for number in (1, 2, 3))


def test_parts_one_after_the_other(forks, folder, store, whole, tmp_path):  # noqa: F811
    """Each builds its own shards and no other; the last one finishes the store."""

    def run(*more: object) -> str:
        assert forks.wait(forks.start(*build(folder, store, *more), output=tmp_path / "said")) == cli.DONE
        return (tmp_path / "said").read_text()

    said = run("--part", "2/2")
    assert sorted(StoreReader(store).records) == [1]
    assert not (store / "ranks").exists()
    assert "part 2/2     done; shards of other parts to come: 2; " in said
    before = (store / "attribution/c/1/0/0").stat().st_mtime_ns
    assert "1 shard" not in run("--part", "5/5")  # of five parts, the last two have no shard of three
    assert sorted(StoreReader(store).records) == [1]
    assert "next         igstore evaluate" in run("--part", "1/2")
    assert (store / "attribution/c/1/0/0").stat().st_mtime_ns == before
    assert_undisturbed(store, whole)


def test_a_part_repairs_its_own_shards(forks, folder, store, whole, tmp_path):  # noqa: F811
    """And leaves those of others, which would be read for nothing."""
    for part in ("1/2", "2/2"):
        assert forks.wait(forks.start(*build(folder, store, "--part", part), output=tmp_path / "said")) == cli.DONE
    for shard in (1, 2):
        (store / f"scale/c/{shard}").write_bytes(bytes(4 * SHARD_SIZE))
    assert forks.wait(forks.start(*build(folder, store, "--part", "2/2"), output=tmp_path / "said")) == cli.DONE
    said = (tmp_path / "said").read_text()
    assert "shard 1 of scale" in said
    assert "shard 2" not in said
    assert forks.wait(forks.start(*build(folder, store), output=tmp_path / "said")) == cli.DONE
    assert_undisturbed(store, whole)


# what is left behind, and by whom


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A store."""
    import numpy as np
    from networks import Smooth

    images = [(f"image_{i}", np.full((16, 16, 3), 40 * i, np.uint8), 0) for i in range(3)]
    build_store(Smooth().eval(), images, tmp_path / "model.zarr", n_steps=2, shard_size=2, rank=False)
    return tmp_path / "model.zarr"


def partial(path: Path, *, seconds_ago: float = 0) -> Path:
    """An unfinished file, as it is while it is written."""
    temporary = atomic.temporary_name(path)
    temporary.write_bytes(b"half")
    os.utime(temporary, (time.time() - seconds_ago,) * 2)
    return temporary


def test_what_other_machines_write_is_left_alone_until_it_is_old(begun, monkeypatch):
    """Locks may know nothing of other machines."""
    own = partial(begun / "scale/c/0")
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    others, old = partial(begun / "scale/c/0"), partial(begun / "scale/c/1", seconds_ago=4000)
    monkeypatch.undo()
    assert [atomic.is_of_another_machine(path) for path in (own, others, old)] == [False, True, True]
    with at_work(begun) as presence:
        presence.sweep()
    assert staging.leftovers(begun) == [others]
    assert not own.exists()


def test_without_locks_only_what_is_old_is_swept(begun, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    young, old = partial(begun / "scale/c/0"), partial(begun / "scale/c/1", seconds_ago=4000)
    with at_work(begun) as presence:
        assert not presence.has_locks
        presence.sweep()
    assert staging.leftovers(begun) == [young]
    assert not old.exists()
