"""Builds on a dask.distributed cluster of two processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster
from networks import Smooth
from test_faults import SHARD_SIZE, N, assert_undisturbed, folder, forks, has_begun, store, whole  # noqa: F401

from igstore import Preprocessing, build_store
from igstore.building.plan import Names
from igstore.errors import SettingsMismatchError, UserError
from igstore.storage import StoreReader

TESTS = Path(__file__).parent
SETTINGS: dict[str, Any] = {
    "preprocessing": Preprocessing(resize=18, crop=(16, 16)),
    "n_steps": 40,
    "shard_size": SHARD_SIZE,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Each of the workers has a GPU, or says so."""
    with LocalCluster(
        n_workers=2,
        threads_per_worker=2,
        processes=True,
        dashboard_address="127.0.0.1:0",
        silence_logs="CRITICAL",
        resources={"GPU": 1},
        env={"IGSTORE_TEST_SLOW": "0.02"},
    ) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def networks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TESTS))


def test_a_worker_that_is_killed_in_the_middle(cluster, folder, store, whole, capsys):  # noqa: F811
    """Its shard goes to another, and the store is that of one process."""
    with Client(cluster, set_as_default=False) as client:
        killed: list[int] = []

        def kill() -> None:
            deadline = time.monotonic() + 60
            while not list(store.glob("staging/*.npz")) and time.monotonic() < deadline:
                time.sleep(0.005)
            running = [address for address, tasks in client.processing().items() if tasks]
            killed.extend(client.run(os.getpid, workers=running[:1]).values())
            os.kill(killed[0], signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        info = build_store(
            "networks:demo_network", folder, store, scheduler=cluster.scheduler_address, show_progress=True, **SETTINGS
        )
        thread.join()
        assert len(killed) == 1
        assert info.n_built == N
        assert info.is_complete
    assert f"{N}/{N} images" in capsys.readouterr().err
    assert_undisturbed(store, whole)


def test_workers_load_the_network_once_and_forget_it(cluster, folder, store, whole):  # noqa: F811
    def held(dask_worker: Any) -> int:
        from igstore.building.cluster import _worker

        return _worker.cache_info().currsize

    with Client(cluster, set_as_default=False) as client:
        build_store("networks:demo_network", folder, store, scheduler=cluster.scheduler_address, **SETTINGS)
        assert_undisturbed(store, whole)
        assert set(client.run(held).values()) == {0}


def test_a_part_of_it(cluster, folder, store):  # noqa: F811
    build_store(
        "networks:demo_network", folder, store, scheduler=cluster.scheduler_address, part="2/3", limit=20, **SETTINGS
    )
    assert sorted(StoreReader(store).records) == [1]


def test_workers_that_see_other_images(cluster, folder, store, tmp_path, monkeypatch):  # noqa: F811
    """Said before anything is written."""
    others = tmp_path / "others"
    others.mkdir()
    (others / "image_000.png").symlink_to(folder / "image_000.png")
    of = Names.of
    monkeypatch.setattr(Names, "of", lambda *given: replace(of(*given), images=str(others)))
    with pytest.raises(SettingsMismatchError, match="does not find what the client has found: images_fingerprint is"):
        build_store("networks:demo_network", folder, store, scheduler=cluster.scheduler_address, **SETTINGS)
    assert not store.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": Smooth().eval()}, "scheduler needs a model given by name, package.module:function"),
        ({"images": [("image", np.zeros((18, 18, 3), np.uint8), 0)]}, "images given by path"),
        ({"device": "all"}, "device is all, which with scheduler is each worker's one device"),
        ({"device": "cuda:0,cuda:1"}, "start one worker a GPU"),
    ],
    ids=["a network", "images", "all devices", "a list of devices"],
)
def test_what_workers_cannot_find(folder, store, change, says):  # noqa: F811
    given = {"model": "networks:demo_network", "images": folder, "store": store, **SETTINGS} | change
    with pytest.raises(UserError, match=says):
        build_store(scheduler="tcp://127.0.0.1:9", **given)
    assert not store.exists()
