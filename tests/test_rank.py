from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
import zarr
from distributed import Client, LocalCluster

from igstore import cli
from igstore.building import rank_store, ranking
from igstore.building.ranking import RankingSummary, _active_client, _rank_shard, rank_blocks
from igstore.errors import DamagedStoreError, StoreNotFoundError, UserError
from igstore.files import Folder, LocalFiles
from igstore.masks.blocks import SCORES
from igstore.rank import main
from igstore.schema import BUILT, FAILED, FORMAT_VERSION, BuildSpec, Preprocessing
from igstore.storage import StoreReader, create_store, extend_store, layout, write_rank_shard, write_shard

N, SHARD_SIZE = 23, 10  # three shards, the last of three images
ALL_SHARDS = (0, 1, 2)
SPEC = BuildSpec(
    model="model",
    weights="own",
    weights_sha256="0" * 64,
    preprocessing=Preprocessing(resize=None, crop=(11, 14)),
    images_fingerprint="f",
    pixels=False,
    shard_size=SHARD_SIZE,
)


def some_maps(spec: BuildSpec, n: int = N, seed: int = 0) -> np.ndarray:
    """Heavy-tailed float16 maps with ties, an all-zero one and an all-negative one in the first shard."""
    lengths = layout.sizes(spec)
    dims = layout.variables(spec)["attribution"].dims
    values = np.random.default_rng(seed).standard_t(2, (n, *(lengths[dim] for dim in dims[1:]))) / 20
    values[3] = 0
    values[4] = -np.abs(values[4])
    values[5] = np.round(values[5])
    return values.clip(-1.99, 1.99).astype(np.float16)


def image_id(number: int) -> str:
    return f"image_{number:04d}"


def write_maps(path: Path, maps: np.ndarray, shard: int) -> None:
    spec, there = StoreReader(path).spec, StoreReader(path).record(shard)
    first, last = layout.shard_bounds(shard, len(maps), spec.shard_size)
    arrays = layout.unbuilt(spec, last - first)
    arrays["attribution"] = maps[first:last]
    arrays["scale"][:] = 2.0 ** np.arange(last - first)
    arrays["status"][:] = np.where(maps[first:last].reshape(last - first, -1).any(axis=1), BUILT, FAILED)
    arrays |= layout.listed(spec, map(image_id, range(first, last)), np.zeros(last - first, np.int32))
    write_shard(path, spec, len(maps), shard, arrays, {"failed": {}}, instead_of=there)


def make(path: Path, maps: np.ndarray, spec: BuildSpec = SPEC, shards: tuple[int, ...] = ALL_SHARDS) -> Path:
    ids = [image_id(i) for i in range(len(maps))]
    create_store(path, spec, image_ids=ids, labels=np.zeros(len(maps), np.int32), attributes={})
    for shard in shards:
        write_maps(path, maps, shard)
    return path


PIXEL_SCORES = {"positive": lambda a: max(a, 0.0), "absolute": abs, "signed": lambda a: a}


def oracle(maps: np.ndarray, *, score: str = "positive", block: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Ranks and shares, block by block and pixel by pixel, straight from the definitions."""
    if maps.ndim == 4:
        maps = maps.astype(np.float64).sum(axis=1)
    tops, lefts = range(0, maps.shape[1], block), range(0, maps.shape[2], block)
    all_ranks, all_shares = [], []
    for image in maps.astype(np.float64):
        scores = np.array(
            [
                sum(PIXEL_SCORES[score](float(a)) for a in image[top : top + block, left : left + block].ravel())
                for top in tops
                for left in lefts
            ]
        )
        order = np.argsort(-scores, kind="stable")
        ranks, shares = np.empty(len(order), int), np.ones(len(order))
        total, before = sum(s for s in scores if s > 0), 0.0
        for place, index in enumerate(order):
            ranks[index] = place
            if scores[index] > 0:
                shares[index] = min(before / total, float(np.nextafter(np.float32(1), np.float32(0))))
                before += scores[index]
        all_ranks.append(ranks.reshape(len(tops), len(lefts)))
        all_shares.append(shares.reshape(len(tops), len(lefts)))
    return np.array(all_ranks), np.array(all_shares, np.float32)


def assert_ranked(path: Path, maps: np.ndarray, *, score: str = "positive", block: int = 3) -> None:
    """The whole store is ranked, and any reader sees the oracle's ranks and shares."""
    ranks, shares = oracle(maps, score=score, block=block)
    ranking = StoreReader(path).ranking(f"{score}-{block}")
    assert ranking.missing_shards == []
    np.testing.assert_array_equal(ranking.array("rank").read(range(len(maps))), ranks)
    np.testing.assert_array_equal(ranking.array("share").read(range(len(maps))), shares)
    with xr.open_zarr(path, group=f"ranks/{score}-{block}", chunks=None) as dataset:
        assert dataset["rank"].dims == dataset["share"].dims == ("image", "block_y", "block_x")
        np.testing.assert_array_equal(dataset["rank"], ranks)
        np.testing.assert_array_equal(dataset["share"], shares)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes whenever a file is written, even with the same contents."""
    stats = {str(file): file.stat() for file in folder.rglob("*") if file.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.fixture(scope="module")
def maps() -> np.ndarray:
    return some_maps(SPEC)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, maps: np.ndarray) -> Path:
    return make(tmp_path_factory.mktemp("template") / "model.zarr", maps)


@pytest.fixture
def path(tmp_path: Path, template: Path) -> Path:
    """A built store without ranks."""
    return shutil.copytree(template, tmp_path / "model.zarr")


# what is written


@pytest.mark.parametrize("block", [1, 3, 4, 20], ids=lambda block: f"block {block}")
@pytest.mark.parametrize("score", SCORES)
def test_equals_loops_over_pixels(path, maps, score, block):
    summary = rank_store(path, score=score, block=block)
    assert summary == RankingSummary(f"{score}-{block}", ranked=N, unchanged=0, missing_shards=())
    assert_ranked(path, maps, score=score, block=block)


def test_maps_with_channels_rank_as_their_sum_over_channels(tmp_path):
    spec = replace(SPEC, reduce="none")
    maps = some_maps(spec)
    rank_store(make(tmp_path / "model.zarr", maps, spec))
    assert_ranked(tmp_path / "model.zarr", maps)


def test_more_blocks_than_uint16_holds(tmp_path):
    spec = replace(SPEC, preprocessing=Preprocessing(resize=None, crop=(256, 257)))
    maps = some_maps(spec, n=6)
    rank_store(make(tmp_path / "model.zarr", maps, spec, shards=(0,)), block=1)
    ranks = StoreReader(tmp_path / "model.zarr").ranking("positive-1").array("rank").read([0])
    assert ranks.dtype == np.uint32
    np.testing.assert_array_equal(np.sort(ranks.ravel()), np.arange(256 * 257))


def test_attributes_say_what_the_ranking_is(path):
    rank_store(path, score="absolute", block=np.int64(4))
    with xr.open_zarr(path, group="ranks/absolute-4", chunks=None) as dataset:
        attributes = dict(dataset.attrs)
    assert attributes == {"format_version": FORMAT_VERSION, "score": "absolute", "block": 4, "crop": [11, 14]}


def test_consolidated_metadata_has_every_ranking(path):
    rank_store(path)
    rank_store(path, score="signed")
    names = {name for name, _ in zarr.open_group(path, mode="r", use_consolidated=True).members(max_depth=None)}
    assert {f"ranks/{r}-3/{a}" for r in ("positive", "signed") for a in ("rank", "share")} <= names


@pytest.mark.parametrize("name", ["rank", "share"])
def test_shards_are_what_zarr_itself_writes(path, name):
    rank_store(path)
    written = zarr.open_array(path / "ranks/positive-3" / name, mode="r")
    memory = zarr.storage.MemoryStore()
    config = {"write_empty_chunks": True}
    again = zarr.create_array(
        memory,
        shape=written.shape,
        shards=written.shards,
        chunks=written.chunks,
        dtype=written.dtype,
        compressors=None,
        filters=None,
        config=config,
    )
    again[:] = written[:]
    for shard in ALL_SHARDS:
        file = layout.shard_file(f"ranks/positive-3/{name}", shard, 3)
        assert (path / file).read_bytes() == memory._store_dict[f"c/{shard}/0/0"].to_bytes()


# going on


def test_only_shards_without_a_record_are_ranked_again(path, maps):
    rank_store(path)
    first = contents(path)
    (path / layout.record_file(1, "positive-3")).unlink()
    before = state(path)
    assert rank_store(path).ranked == SHARD_SIZE
    changed = {name for name, stat in state(path).items() if before.get(name) != stat}
    shards = {Path(name).relative_to(path).as_posix() for name in changed if not name.endswith("zarr.json")}
    assert shards == {
        "ranks/positive-3/rank/c/1/0/0",
        "ranks/positive-3/share/c/1/0/0",
        "records/positive-3/00001.json",
    }
    assert contents(path) == first


def test_ranking_a_ranked_store_writes_nothing(path):
    rank_store(path)
    before = state(path)
    assert rank_store(path) == RankingSummary("positive-3", ranked=0, unchanged=N, missing_shards=())
    assert state(path) == before


def test_a_shard_that_was_built_again_is_ranked_again(path, maps):
    rank_store(path)
    changed = maps.copy()
    changed[10:20] = some_maps(SPEC, seed=1)[10:20]
    write_maps(path, changed, 1)

    stale = StoreReader(path).ranking("positive-3")
    assert stale.missing_shards == [1]
    with pytest.raises(DamagedStoreError, match="shard 1"):
        stale.array("rank").read([10])

    assert rank_store(path).ranked == SHARD_SIZE
    assert_ranked(path, changed)


def test_a_shard_that_is_built_again_while_it_is_ranked(path, maps, monkeypatch):
    changed = maps.copy()
    changed[:10] = some_maps(SPEC, seed=1)[:10]

    def overtaken(*arguments: Any) -> np.ndarray:
        monkeypatch.undo()
        write_maps(path, changed, 0)
        return rank_blocks(*arguments)

    monkeypatch.setattr(ranking, "rank_blocks", overtaken)
    with dask.config.set(scheduler="synchronous"):
        rank_store(path)
    assert rank_store(path).missing_shards == ()
    assert_ranked(path, changed)


def test_a_shard_that_is_being_built_again(path):
    (path / layout.record_file(0)).unlink()
    with pytest.raises(DamagedStoreError, match=r"shard 0 .* is being written"):
        _rank_shard(str(path), "positive-3", 0, score="positive", block=3)


def test_a_shard_is_ranked_without_reading_the_records_of_others(path, monkeypatch):
    rank_store(path)
    read = []
    of_files = LocalFiles.read_many
    monkeypatch.setattr(LocalFiles, "read_many", lambda *given: read.extend(given[1]) or of_files(*given))
    ranking = StoreReader(path).ranking("positive-3")
    assert ranking.record(1) == ranking.records[1]
    assert read[: read.index("records/positive-3/00000.json")] == [
        "records/positive-3/00001.json",
        "records/00001.json",
        *(f"records/{shard:05d}.json" for shard in ALL_SHARDS),
    ]


def test_a_shard_that_was_built_again_alike_is_not(path, maps):
    rank_store(path)
    write_maps(path, maps, 1)
    assert rank_store(path).ranked == 0


def test_a_part_of_a_store_is_ranked_and_the_rest_later(tmp_path, maps):
    path = make(tmp_path / "model.zarr", maps, shards=(1,))
    assert rank_store(path) == RankingSummary("positive-3", ranked=10, unchanged=0, missing_shards=(0, 2))
    ranking = StoreReader(path).ranking("positive-3")
    assert list(ranking.records) == [1]
    with pytest.raises(DamagedStoreError, match="shard 0"):
        ranking.array("share").read([0])

    write_maps(path, maps, 0)
    write_maps(path, maps, 2)
    assert rank_store(path) == RankingSummary("positive-3", ranked=13, unchanged=10, missing_shards=())
    assert_ranked(path, maps)


def test_a_store_that_grew(tmp_path, maps):
    path = make(tmp_path / "model.zarr", maps[:13], shards=(0, 1))
    rank_store(path)
    ids = [f"image_{i:04d}" for i in range(N)]
    extend_store(path, image_ids=ids, labels=np.zeros(N, np.int32))

    # the short shard is to be built again; the ranking is as long as the store all the same
    assert rank_store(path) == RankingSummary("positive-3", ranked=0, unchanged=10, missing_shards=(1, 2))
    with xr.open_zarr(path, group="ranks/positive-3", chunks=None) as dataset:
        assert dataset.sizes["image"] == N

    write_maps(path, maps, 1)
    write_maps(path, maps, 2)
    assert rank_store(path).ranked == 13
    assert_ranked(path, maps)


KILLED = """
import os, signal, sys
import dask
from igstore.files.atomic import Folder
from igstore.building.ranking import rank_store

write, calls = Folder.write, 0

def fatal(self, name, *pieces):
    global calls
    calls += not name.endswith("zarr.json")
    if calls == int(sys.argv[2]):
        os.replace = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, *pieces)

Folder.write = fatal
dask.config.set(scheduler="synchronous")
rank_store(sys.argv[1])
"""


# Each shard is three files: ranks, shares, and the record.
@pytest.mark.parametrize(
    ("write", "finished"),
    [(1, 0), (3, 0), (5, 1)],
    ids=["in the first array", "in the first record", "in the second shard"],
)
def test_killed_and_ranked_again(path, maps, write, finished):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), str(write)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(path.rglob("*.partial"))
    assert len(StoreReader(path).ranking("positive-3").records) == finished
    assert rank_store(path).missing_shards == ()
    assert_ranked(path, maps)
    assert not list(path.rglob("*.partial"))


def test_interrupted_before_the_metadata_was_consolidated(path, maps, monkeypatch):
    def interrupted(self: Folder, name: str, *pieces: bytes) -> None:
        if name == "zarr.json":
            raise KeyboardInterrupt
        write(self, name, *pieces)

    write = Folder.write
    monkeypatch.setattr(Folder, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rank_store(path)
    monkeypatch.undo()
    rank_store(path)
    assert_ranked(path, maps)


# where it is computed


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", silence_logs="ERROR"
    ) as cluster:
        yield cluster


@pytest.mark.parametrize("how", ["address", "active client"])
def test_a_cluster_of_two_processes_writes_the_same_bytes(path, tmp_path, cluster, how, monkeypatch, capsys):
    other = shutil.copytree(path, tmp_path / "other.zarr")
    rank_store(other, score="absolute")
    expected = contents(other)
    # were anything computed here, this would show
    monkeypatch.setattr("dask.compute", None)
    monkeypatch.chdir(tmp_path)  # the workers are elsewhere
    if how == "address":
        summary = rank_store(path.name, score="absolute", scheduler=cluster.scheduler_address, show_progress=True)
    else:
        with Client(cluster):
            summary = rank_store(path.name, score="absolute", show_progress=True)
    assert summary.ranked == N
    assert f"absolute-3: {N}/{N} images" in capsys.readouterr().err
    assert contents(path) == expected


def test_an_error_in_a_worker_arrives(path, maps, cluster):
    broken = maps.copy()
    broken[12, 3, 4] = np.nan
    write_maps(path, broken, 1)
    with pytest.raises(DamagedStoreError, match="NaN"):
        rank_store(path, scheduler=cluster.scheduler_address)


def test_a_scheduler_with_nothing_left_to_do(path, cluster):
    rank_store(path)
    assert rank_store(path, scheduler=cluster.scheduler_address).unchanged == N


def test_no_scheduler_answers(path):
    with dask.config.set({"distributed.comm.timeouts.connect": "200ms"}):
        for address in ("tcp://127.0.0.1:9", "nonsense"):
            with pytest.raises(UserError, match=f"no dask scheduler answers at {address}: "):
                rank_store(path, scheduler=address)
    assert not (path / "ranks").exists()


def test_without_distributed(path, maps, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=re.escape("pip install 'igstore[cluster]'")):
        rank_store(path, scheduler="tcp://127.0.0.1:9")
    rank_store(path)
    assert_ranked(path, maps)


def test_dask_configuration_comes_first(path, maps):
    computed = []

    def get(graph: Any, keys: Any, **kwargs: Any) -> Any:
        computed.append(len(keys))
        return dask.get(graph, keys, **kwargs)

    with dask.config.set(scheduler=get):
        rank_store(path)
    assert computed == [len(ALL_SHARDS)]
    assert_ranked(path, maps)


def test_configuration_comes_before_an_active_client(cluster):
    with Client(cluster) as client:
        assert _active_client() is client
        with dask.config.set(scheduler="synchronous"):
            assert _active_client() is None


def test_progress_is_shown_when_asked_for(path, capsys):
    rank_store(path)
    assert capsys.readouterr().err == ""
    (path / layout.record_file(2, "positive-3")).unlink()
    rank_store(path, show_progress=True)
    assert f"positive-3: {N}/{N} images" in capsys.readouterr().err


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "loudest"}, "score is 'loudest'; it must be one of positive, absolute, signed"),
        ({"block": 0}, "block is 0"),
        ({"block": 2.5}, "block is 2.5"),
    ],
    ids=["score", "block 0", "block 2.5"],
)
def test_wrong_settings(path, options, message):
    before = state(path)
    with pytest.raises(UserError, match=message):
        rank_store(path, **options)
    assert state(path) == before


def test_no_store(tmp_path):
    with pytest.raises(StoreNotFoundError, match="there is no store at"):
        rank_store(tmp_path / "nothing.zarr")


def test_nothing_is_built(tmp_path, maps):
    path = make(tmp_path / "model.zarr", maps, shards=())
    with pytest.raises(UserError, match=r"no shard of .* is finished"):
        rank_store(path)
    assert not (path / "ranks").exists()


def test_a_map_that_is_not_finite(path, maps):
    broken = maps.copy()
    broken[12, 3, 4] = np.nan
    write_maps(path, broken, 1)
    with pytest.raises(DamagedStoreError, match=r"from image 10: 1 of 10 maps .* position 2.*records/00001\.json"):
        rank_store(path)


def test_maps_that_are_missing(path):
    (path / layout.shard_file("attribution", 2, 3)).unlink()
    with pytest.raises(DamagedStoreError, match="is missing"):
        rank_store(path)


@pytest.mark.parametrize(("shard", "images"), [(0, 7), (0, 11), (2, 10)], ids=["part", "more", "past the end"])
def test_only_whole_shards_are_written(path, shard, images):
    rank_store(path)
    before, store = state(path), StoreReader(path)
    tie = {"attribution_sha256": store.attribution_sha256(store.records[shard])}
    there = store.ranking("positive-3").records[shard]
    arrays = {"rank": np.zeros((images, 4, 5), np.uint16), "share": np.zeros((images, 4, 5), np.float32)}
    with pytest.raises(UserError, match="only whole shards are written"):
        write_rank_shard(path, "positive-3", shard, arrays, tie, instead_of=there)
    assert state(path) == before


# the command


def test_command(path, maps, capsys):
    assert cli.run(main, [str(path), "--block", "4", "--score", "signed"]) == cli.DONE
    assert capsys.readouterr().out == "ranks/signed-4: 23 images ranked, 0 unchanged\n"
    assert_ranked(path, maps, score="signed", block=4)


def test_command_says_what_is_missing(tmp_path, maps, capsys):
    path = make(tmp_path / "model.zarr", maps, shards=(0, 1))
    assert cli.run(main, [str(path)]) == cli.DONE
    assert "not built, and so have no ranks: 1 of 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--score", "loudest"], ["--block", "0"], ["--blocks", "3"]], ids=lambda arguments: arguments[0]
)
def test_command_refuses(path, arguments, capsys):
    assert cli.run(main, [str(path), *arguments]) == cli.MISUSED
    assert capsys.readouterr().err.count("\n") == 1


def test_command_without_a_store(tmp_path, capsys):
    assert cli.run(main, [str(tmp_path / "nothing.zarr")]) == cli.MISUSED
    assert "igstore build" in capsys.readouterr().err


def test_module_runs_and_needs_no_torch(path, maps):
    program = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('igstore.rank', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False, env={**os.environ})
    assert done.returncode == cli.DONE
    assert_ranked(path, maps)
