"""Several devices of one machine; there being one, its name stands for several."""

from __future__ import annotations

import os
import pickle
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Smooth
from test_faults import FLAT, Run, assert_undisturbed, build, folder, forks, run, store, whole  # noqa: F401
from torch import nn

from igstore import build_store, cli
from igstore.errors import UserError
from igstore.machine import devices, find_devices
from igstore.storage import StoreReader


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_cuda_devices", lambda: 2)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("all", ["cuda:0", "cuda:1"]),
        ("cuda:1", ["cuda:1"]),
        ("cuda:1,cuda:0", ["cuda:1", "cuda:0"]),
        ("cpu,cpu", ["cpu", "cpu"]),
        ("auto", ["cuda"]),
    ],
)
def test_devices_by_their_names(two_gpus, names, found):
    assert find_devices(names) == tuple(map(torch.device, found))


@pytest.mark.parametrize("names", ["cuda:0,cuda:2", "cpu,", "all,cpu", "cpu;cpu", ""])
def test_what_are_no_devices(two_gpus, names):
    with pytest.raises(UserError, match="device is"):
        find_devices(names)


def test_all_of_no_gpus(monkeypatch):
    monkeypatch.setattr(devices, "_cuda_devices", lambda: 0)
    with pytest.raises(UserError, match="device is all, which means every GPU, but this machine has no CUDA device"):
        find_devices("all")


def test_two_processes_make_the_store_of_one(run, store, folder, whole):  # noqa: F811
    both = run(*build(folder, store, "--device", "cpu,cpu"))
    assert both.wait() == cli.DONE, both.said
    assert_undisturbed(store, whole)
    assert "22/22 images" in both.said
    assert "somebody else" not in both.said
    assert "Traceback" not in both.said


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, cli.INTERRUPTED), (signal.SIGTERM, cli.TERMINATED)], ids=["SIGINT", "SIGTERM"]
)
def test_an_interruption_reaches_all(run, store, folder, whole, sent, status):  # noqa: F811
    """And none is left; what they staged is gone on with."""
    both = run(*build(folder, store, "--device", "cpu,cpu"), slow=0.05)
    both.until(lambda: len(list(store.glob("staging/*.npz"))) >= 2)
    processes = children(both.pid)
    assert len(processes) == 2
    os.kill(both.pid, sent)
    assert both.wait() == status
    assert both.said.splitlines()[-1].endswith("run the same command again to go on")
    assert "Traceback" not in both.said
    assert not any(map(is_running, processes))
    last = run(*build(folder, store))
    assert last.wait() == cli.DONE
    assert_undisturbed(store, whole)


def test_a_process_that_is_killed_ends_the_build_with_a_message(run, store, folder, whole):  # noqa: F811
    both = run(*build(folder, store, "--device", "cpu,cpu"), slow=0.05)
    both.until(lambda: len(list(store.glob("staging/*.npz"))) >= 2)
    os.kill(children(both.pid)[0], signal.SIGKILL)
    assert both.wait() == cli.FAILED
    last = both.said.splitlines()[-1]
    assert last.startswith("igstore: the process on cpu was ended by SIGKILL; what was finished is kept: run the same")
    assert "Traceback" not in both.said
    assert not StoreReader(store).is_complete
    assert run(*build(folder, store)).wait() == cli.DONE
    assert_undisturbed(store, whole)


def test_an_error_in_a_process_is_the_builds(run, store, folder):  # noqa: F811
    both = run(*build(folder, store, "--device", "cpu,cpu", model="Flat"))
    assert both.wait() == cli.FAILED
    assert re.search(f"^igstore: on cpu: {FLAT}", both.said.splitlines()[-1])
    assert "Traceback" not in both.said
    assert not store.exists()


class Unpicklable(Smooth):
    """A network that cannot be sent anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = lambda x: 2 * x

    def __deepcopy__(self, memo: object) -> nn.Module:
        return self


def test_a_network_that_cannot_be_sent(tmp_path):
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(Unpicklable())
    images = [("image", np.zeros((16, 16, 3), np.uint8), 0)]
    with pytest.raises(UserError, match="several devices need a network and images that other processes can be sent"):
        build_store(Unpicklable().eval(), images, tmp_path / "model.zarr", device="cpu,cpu")
    assert not (tmp_path / "model.zarr").exists()


def children(pid: int) -> list[int]:
    """The processes that a build has started to do the work."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for task in tasks for child in task.read_text().split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
