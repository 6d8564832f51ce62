"""Stores behind URLs: the same data as from a folder, in few requests, whatever servers and networks do."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from servers import Served, http_server
from stores import make_store, mapped_file
from torch.utils.data import DataLoader

from igstore import MaskedImageNet, export_store, keep_mask, masked_view, open_store
from igstore.cli import run
from igstore.errors import DamagedStoreError, StoreNotFoundError, UnreachableError, UserError
from igstore.evaluate import evaluate
from igstore.files import remote, servers, sources
from igstore.info import main as info_main, store_info
from igstore.models import classifier_from_module
from igstore.schema import Preprocessing
from igstore.storage import StoreReader
from igstore.verify import verify_store

N, SHARD = 10, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    make_store(folder / "toy.zarr", N, shard_size=SHARD, failed=(5,))
    return folder


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    monkeypatch.delenv(sources.CACHE_VARIABLE, raising=False)
    with http_server(folder) as served:
        yield served


@pytest.fixture
def url(server: Served) -> str:
    return f"{server.url}/toy.zarr"


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[dict]:
    """What s3fs needs to know to find the store at ``s3://lab/toy.zarr`` in a real S3 server on this machine."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    access = {"endpoint_url": f"http://{host}:{port}", "aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    client = boto3.client("s3", region_name="us-east-1", **access)
    client.create_bucket(Bucket="lab")
    for path in (folder / "toy.zarr").rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "lab", path.relative_to(folder).as_posix())
    yield {"endpoint_url": access["endpoint_url"], "key": "key", "secret": "secret"}
    server.stop()


def assert_same_items(mine: MaskedImageNet, theirs: MaskedImageNet) -> None:
    assert len(mine) == len(theirs) == N - 1
    for (image, label), (other_image, other_label) in zip(mine, theirs, strict=True):
        assert torch.equal(image, other_image)
        assert label == other_label


# the same data


@pytest.mark.parametrize("gives_parts", [True, False], ids=["parts", "whole files only"])
@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_a_store_over_http_is_the_store(
    folder: Path, server: Served, url: str, tmp_path: Path, gives_parts: bool, cached: bool
) -> None:
    server.gives_parts = gives_parts
    there = StoreReader(url, cache=tmp_path / "cache" if cached else None)
    here = folder / "toy.zarr"
    xr.testing.assert_identical(open_store(there).compute(), open_store(here).compute())
    np.testing.assert_array_equal(masked_view(there, p=[70, 30]), masked_view(here, p=[70, 30]))
    np.testing.assert_array_equal(keep_mask(there), keep_mask(here))
    assert_same_items(MaskedImageNet(there), MaskedImageNet(here))
    assert store_info(there).n_bytes == store_info(here).n_bytes
    assert set(verify_store(there)) == set(verify_store(here))


def test_a_store_on_s3_is_the_store(folder: Path, s3: dict, tmp_path: Path) -> None:
    here = folder / "toy.zarr"
    for cache in (None, tmp_path):
        there = StoreReader("s3://lab/toy.zarr", storage_options=s3, cache=cache)
        xr.testing.assert_identical(open_store(there).compute(), open_store(here).compute())
        assert_same_items(MaskedImageNet(there), MaskedImageNet(here))
    assert set(verify_store(there)) == set(verify_store(here))
    loader = DataLoader(MaskedImageNet(there), batch_size=3, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat([x for x, _ in loader]), torch.stack([x for x, _ in MaskedImageNet(here)]))


@pytest.mark.parametrize("as_url", [Path.as_uri, str], ids=["file URL", "path"])
def test_a_local_store_by_its_url(folder: Path, as_url) -> None:
    where = as_url(folder / "toy.zarr")
    assert MaskedImageNet(where)[0][0].shape == (3, 23, 26)
    assert StoreReader(where).root == folder / "toy.zarr"


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_connect_for_themselves(folder: Path, url: str, start: str) -> None:
    data = MaskedImageNet(url)
    expected = torch.stack([image for image, _ in MaskedImageNet(folder / "toy.zarr")])
    assert torch.equal(data[0][0], expected[0])  # this process is connected before it forks
    loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context=start)
    assert torch.equal(torch.cat([images for images, _ in loader]), expected)
    assert len(pickle.dumps(data)) < 10_000


def test_the_command_line_takes_a_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(info_main, [url]) == 0
    assert f"store        {url}\n" in capsys.readouterr().out


# few requests


def test_neighbours_are_one_request(server: Served, url: str) -> None:
    store = StoreReader(url)
    pixels = store.array("pixels")
    _ = store.records
    image = 3 * 23 * 26
    pixels.read([1, 2, 3, 4, 5])
    asked = [(path[-9:], first, last) for path, first, last in server.asked("/pixels/c/")]
    index = SHARD * 16 + 4
    ends = [(f"c/{shard}/0/0/0", SHARD * image, SHARD * image + index) for shard in (0, 1)]
    assert asked == [ends[0], ("c/0/0/0/0", image, 4 * image), ends[1], ("c/1/0/0/0", 0, 2 * image)]
    server.requests.clear()
    pixels.read([0, 2])  # sooner read what is between than ask twice; the index is known
    assert server.requests == [("/toy.zarr/pixels/c/0/0/0/0", 0, 3 * image)]


def test_metadata_are_read_once(server: Served, url: str) -> None:
    MaskedImageNet(url)
    assert [path for path, *_ in server.requests if path.endswith("zarr.json")] == ["/toy.zarr/zarr.json"]
    n_shards = -(-N // SHARD)
    # one small file a shard each: labels, counted and then read, statuses, records of the build and of the ranking
    assert len(server.requests) == 1 + 5 * n_shards


def test_large_parts_are_divided(server: Served, url: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(remote, "_LARGEST_REQUEST", 1000)
    expected = open_store(folder / "toy.zarr").pixels[:1]
    np.testing.assert_array_equal(StoreReader(url).array("pixels").read([0]), expected)
    sizes = [last - first for _, first, last in server.asked("/pixels/c/")]
    assert max(sizes) == 1000
    assert sum(sizes) == 3 * 23 * 26 + SHARD * 16 + 4


# the cache


def test_what_is_cached_is_not_asked_for_again(server: Served, url: str, tmp_path: Path) -> None:
    first = StoreReader(url, cache=tmp_path).array("pixels").read(range(N))
    assert [request[1:] for request in server.asked("/pixels/c/")] == 3 * [(None, None)]
    server.requests.clear()
    again = StoreReader(url, cache=tmp_path)
    np.testing.assert_array_equal(again.array("pixels").read(range(N)), first)
    assert str(mapped_file(again.array("pixels").shard(0))).startswith(str(tmp_path))
    assert not server.asked("/pixels/c/")
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in kept) == sorted(path.name for path in kept)


def test_the_environment_names_the_cache(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sources.CACHE_VARIABLE, str(tmp_path / "here"))
    _ = MaskedImageNet(url)[0]
    assert len([path for path in (tmp_path / "here").rglob("*") if path.suffix != ".lock" and path.is_file()]) == 3


def test_a_cache_keeps_nothing_that_differs_from_its_record(tmp_path: Path, server: Served, folder: Path) -> None:
    copy = Path(shutil.copytree(folder / "toy.zarr", folder / "damaged.zarr"))
    file = copy / "pixels/c/1/0/0/0"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    store = StoreReader(f"{server.url}/damaged.zarr", cache=tmp_path)
    assert store.array("pixels").read([0]).any()
    with pytest.raises(DamagedStoreError, match=r"pixels/c/1/0/0/0 is not what was written there"):
        store.array("pixels").read([4])
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert len(kept) == 1
    [finding] = set(verify_store(store)) - set(verify_store(folder / "toy.zarr"))
    assert (finding.shard, finding.array) == (1, "pixels")
    shutil.rmtree(copy)


def test_a_short_file_in_the_cache_is_fetched_again(server: Served, url: str, tmp_path: Path) -> None:
    expected = StoreReader(url, cache=tmp_path).array("pixels").read([0])
    [kept] = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    kept.write_bytes(kept.read_bytes()[:100])
    kept.with_name(f"{kept.name}.{'0' * 32}.partial").write_bytes(b"left by a process that died")
    np.testing.assert_array_equal(StoreReader(url, cache=tmp_path).array("pixels").read([0]), expected)
    assert not list(tmp_path.rglob("*.partial"))


def _read(url: str, cache: Path) -> int:
    return int(StoreReader(url, cache=cache).array("pixels").read([0]).sum())


def test_processes_fetch_a_shard_once(server: Served, url: str, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len(set(pool.starmap(_read, 3 * [(url, tmp_path)]))) == 1
    assert len(server.asked("/pixels/c/0")) == 1


def test_a_checksum_that_is_a_path_is_refused(tmp_path: Path, server: Served, folder: Path) -> None:
    copy = Path(shutil.copytree(folder / "toy.zarr", folder / "evil.zarr"))
    record = copy / "records/00000.json"
    content = json.loads(record.read_text())
    content["files"]["pixels/c/0/0/0/0"]["sha256"] = "/../../evil"
    record.write_text(json.dumps(content))
    with pytest.raises(DamagedStoreError, match="no sha256"):
        StoreReader(f"{server.url}/evil.zarr", cache=tmp_path / "cache").array("pixels").read([0])
    assert not (tmp_path / "cache").exists()
    shutil.rmtree(copy)


# what goes wrong


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "hang"])
@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_what_fails_once_is_asked_for_again(
    folder: Path,
    server: Served,
    url: str,
    tmp_path: Path,
    fault: int | str,
    cached: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(servers, "_SILENCE", 0.5)
    server.fault = lambda path, before: fault if before == 0 and ("/pixels/" in path or "/status/" in path) else None
    store = StoreReader(url, cache=tmp_path if cached else None)
    expected = open_store(folder / "toy.zarr")
    np.testing.assert_array_equal(store.array("pixels").read([0, 1]), expected.pixels[:2])
    np.testing.assert_array_equal(store.status, expected.status)


@pytest.mark.parametrize("fault", [500, "cut"])
def test_what_always_fails_is_said(server: Served, url: str, fault: int | str) -> None:
    server.fault = lambda path, before: fault if "/pixels/" in path else None
    with pytest.raises(UnreachableError, match=r"pixels/c/0/0/0/0 could not be read, in 4 attempts"):
        StoreReader(url).array("pixels").read([0])
    assert len(server.asked("/pixels/c/0")) == 4


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_not_asked_twice(server: Served, url: str, status: int) -> None:
    server.fault = lambda path, before: status
    with pytest.raises(UserError, match=r"refuses to be read .*storage_options"):
        StoreReader(url)
    assert len(server.requests) == 1


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    with http_server(tmp_path) as served:
        with pytest.raises(StoreNotFoundError, match=f"there is no store at {served.url}/missing.zarr"):
            MaskedImageNet(f"{served.url}/missing.zarr")
        address = served.url
    with pytest.raises(UnreachableError, match="could not be read"):
        MaskedImageNet(f"{address}/gone.zarr")
    with pytest.raises(UserError, match="nosuch"):
        MaskedImageNet("nosuch://lab/toy.zarr")
    with pytest.raises(UserError, match="storage_options are for URLs"):
        StoreReader(tmp_path, storage_options={"anon": True})


def test_a_missing_or_short_file_there_is_damage(server: Served, folder: Path) -> None:
    copy = Path(shutil.copytree(folder / "toy.zarr", folder / "short.zarr"))
    (copy / "pixels/c/0/0/0/0").unlink()
    file = copy / "pixels/c/1/0/0/0"
    file.write_bytes(file.read_bytes()[:50])
    store = StoreReader(f"{server.url}/short.zarr")
    with pytest.raises(DamagedStoreError, match="is missing"):
        store.array("pixels").read([0])
    with pytest.raises(DamagedStoreError, match="shorter than it must be"):
        store.array("pixels").read([4])
    found = set(verify_store(store)) - set(verify_store(folder / "toy.zarr"))
    assert {(finding.shard, finding.array) for finding in found} == {(0, "pixels"), (1, "pixels")}
    shutil.rmtree(copy)


def test_what_needs_a_folder_says_so(url: str) -> None:
    from igstore.building import rank_store

    with pytest.raises(UserError, match="is not a folder of this machine"):
        rank_store(url, score="absolute")


# compressed stores


def test_a_compressed_store_is_read_in_as_few_requests(folder: Path, server: Served) -> None:
    export_store(folder / "toy.zarr", folder / "small.zarr", compress="zstd")
    here, there = open_store(folder / "toy.zarr"), StoreReader(f"{server.url}/small.zarr")
    np.testing.assert_array_equal(there.array("pixels").read(range(N)), here.pixels)
    # for each shard the index and then all of its images
    assert len(server.asked("/pixels/c/")) == 2 * 3
    np.testing.assert_array_equal(there.array("pixels").read([9, 0, 4]), here.pixels[[9, 0, 4]])
    np.testing.assert_array_equal(masked_view(folder / "small.zarr"), masked_view(folder / "toy.zarr"))
    shutil.rmtree(folder / "small.zarr")


def test_another_compression_is_read_from_a_folder(folder: Path, server: Served) -> None:
    copy = Path(shutil.copytree(folder / "toy.zarr", folder / "blosc.zarr"))
    pixels = zarr.open_array(copy / "pixels", mode="r")[:]
    group = zarr.open_group(copy, mode="r+", use_consolidated=False)
    array = group.create_array(
        "pixels",
        shape=pixels.shape,
        dtype="u1",
        chunks=(1, *pixels.shape[1:]),
        shards=(SHARD, *pixels.shape[1:]),
        compressors=zarr.codecs.BloscCodec(),
        overwrite=True,
    )
    array[:] = pixels
    np.testing.assert_array_equal(StoreReader(copy).array("pixels").read([7, 1]), pixels[[7, 1]])
    root = json.loads((copy / "zarr.json").read_text())
    root["consolidated_metadata"]["metadata"]["pixels"] = json.loads((copy / "pixels/zarr.json").read_text())
    (copy / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(DamagedStoreError, match="only read from a folder"):
        StoreReader(f"{server.url}/blosc.zarr").array("pixels").read([7])
    shutil.rmtree(copy)


def test_a_model_is_evaluated_on_a_store_from_afar(folder: Path, url: str) -> None:
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(3), torch.nn.Flatten(), torch.nn.Linear(27, 5)).eval()
    model = classifier_from_module(network, preprocessing=Preprocessing(resize=None, crop=(23, 26)), name="linear")
    there, here = (evaluate(store, models=[model], p=[70, 30], batch_size=3) for store in (url, folder / "toy.zarr"))
    assert there.rows == here.rows
