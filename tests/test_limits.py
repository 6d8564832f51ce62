"""What containers, jobs and shells leave a process: files of control groups made up in a folder, limits for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igstore import build_store
from igstore.machine import free_memory, usable_cores
from igstore.storage import StoreReader

GB = 10**9
UNLIMITED_V1 = 9223372036854771712

MINE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine(root: Path, *, group: str, mounts: list[str], files: dict[str, str], free: int = 64 * GB) -> Path:
    """A folder that looks like a machine with so much free memory, a process in these groups, and these files."""
    contents = {
        "proc/meminfo": f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {free // 1024} kB\n",
        "proc/self/cgroup": group,
        "proc/self/mountinfo": "\n".join(["22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw", *mounts]) + "\n",
    } | files
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "34 25 0:30 / /sys/fs/cgroup/memory rw,nosuid shared:15 - cgroup cgroup rw,memory"
V1_CPU = "35 25 0:31 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct"
HYBRID = "41 25 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"

# what is in the files of a machine, and how much of its memory is left
MEMORY: dict[str, tuple[str, list[str], dict[str, str], int]] = {
    "no groups": ("", [], {}, 64 * GB),
    "version 2, no limit": ("0::/a\n", [V2], {"sys/fs/cgroup/a/memory.max": "max\n"}, 64 * GB),
    "version 2": (
        "0::/a\n",
        [V2],
        {"sys/fs/cgroup/a/memory.max": f"{2 * GB}\n", "sys/fs/cgroup/a/memory.current": f"{GB // 2}\n"},
        3 * GB // 2,
    ),
    "version 2, files are given up": (
        "0::/a\n",
        [V2],
        {
            "sys/fs/cgroup/a/memory.max": f"{2 * GB}\n",
            "sys/fs/cgroup/a/memory.current": f"{2 * GB}\n",
            "sys/fs/cgroup/a/memory.stat": f"anon 5\nfile 9\ninactive_file {GB}\nactive_file {GB // 4}\n",
        },
        5 * GB // 4,
    ),
    "version 2, limited above, as Slurm does": (
        "0::/slurm/job_7/step_0/user/task_0\n",
        [V2],
        {
            "sys/fs/cgroup/slurm/job_7/step_0/user/task_0/memory.max": "max\n",
            "sys/fs/cgroup/slurm/job_7/memory.max": f"{8 * GB}\n",
            "sys/fs/cgroup/slurm/job_7/memory.current": f"{GB}\n",
        },
        7 * GB,
    ),
    "version 2, slowed down before it is killed": (
        "0::/a\n",
        [V2],
        {
            "sys/fs/cgroup/a/memory.max": f"{4 * GB}\n",
            "sys/fs/cgroup/a/memory.high": f"{3 * GB}\n",
            "sys/fs/cgroup/a/memory.current": f"{GB}\n",
        },
        2 * GB,
    ),
    "version 2, in a container with a namespace": (
        "0::/\n",
        [V2.replace(" / /sys", " /../../docker/abc /sys")],
        {"sys/fs/cgroup/memory.max": f"{2 * GB}\n", "sys/fs/cgroup/memory.current": "0\n"},
        2 * GB,
    ),
    "version 1": (
        "4:memory:/job\n1:name=systemd:/\n",
        [V1],
        {
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2 * GB}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{GB}\n",
            "sys/fs/cgroup/memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {GB // 2}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{UNLIMITED_V1}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{9 * GB}\n",
        },
        3 * GB // 2,
    ),
    "version 1, in a container that sees its group at the mount": (
        "4:memory:/docker/abc\n",
        [V1.replace(" / /sys", " /docker/abc /sys")],
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
        },
        3 * GB,
    ),
    "version 1, beside an empty version 2": (
        "4:memory:/job\n0::/\n",
        [V1, HYBRID],
        {
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{GB}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "0\n",
        },
        GB,
    ),
    "more is used than allowed": (
        "0::/a\n",
        [V2],
        {"sys/fs/cgroup/a/memory.max": "100\n", "sys/fs/cgroup/a/memory.current": "200\n"},
        0,
    ),
    "the machine has less than the group": (
        "0::/a\n",
        [V2],
        {"sys/fs/cgroup/a/memory.max": f"{999 * GB}\n", "sys/fs/cgroup/a/memory.current": "0\n"},
        64 * GB,
    ),
    "nonsense": ("4:memory:/a\n0::/a\n", [V1, V2], {"sys/fs/cgroup/a/memory.max": "?\n"}, 64 * GB),
}


@pytest.mark.parametrize("kind", MEMORY)
def test_memory_that_is_left(kind, tmp_path):
    group, mounts, files, expected = MEMORY[kind]
    root = machine(tmp_path, group=group, mounts=mounts, files=files)
    assert free_memory(root) == pytest.approx(expected, abs=1024)  # the machine's are in kB


CORES: dict[str, tuple[str, list[str], dict[str, str], float]] = {
    "no groups": ("", [], {}, np.inf),
    "version 2, no quota": ("0::/a\n", [V2], {"sys/fs/cgroup/a/cpu.max": "max 100000\n"}, np.inf),
    "version 2": ("0::/a\n", [V2], {"sys/fs/cgroup/a/cpu.max": "100000 100000\n"}, 1),
    "version 2, a part of a core": ("0::/a\n", [V2], {"sys/fs/cgroup/a/cpu.max": "20000 100000\n"}, 1),
    "version 2, a core and a half": ("0::/a\n", [V2], {"sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 2),
    "version 2, limited above": (
        "0::/a/b\n",
        [V2],
        {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "sys/fs/cgroup/a/cpu.max": "50000 50000\n"},
        1,
    ),
    "version 1": (
        "3:cpu,cpuacct:/job\n",
        [V1_CPU],
        {
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        },
        1,
    ),
    "version 1, no quota": (
        "3:cpu,cpuacct:/job\n",
        [V1_CPU],
        {
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        },
        np.inf,
    ),
    "more than there are": ("0::/a\n", [V2], {"sys/fs/cgroup/a/cpu.max": "99900000 100000\n"}, np.inf),
}


@pytest.mark.parametrize("kind", CORES)
def test_cores_that_are_left(kind, tmp_path):
    group, mounts, files, expected = CORES[kind]
    assert usable_cores(machine(tmp_path, group=group, mounts=mounts, files=files)) == min(MINE, expected)


def test_this_machine_has_some():
    assert 0 < free_memory() < 1e15
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


# --- For real


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinities here")
def test_an_affinity_of_one_core():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from igstore.machine.limits import usable_cores; from igstore.building.decoding import most_workers\n"
    assert run(code + "print(usable_cores(), most_workers())").split() == ["1", "1"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not enforce it")
@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_the_shell(name):
    code = f"""
import resource
from igstore.machine.limits import _fields, free_memory, Path
used = 1024 * _fields(Path("/proc/self/status"))[{("VmSize" if name == "RLIMIT_AS" else "VmData")!r}]
resource.setrlimit(resource.{name}, (used + 10_000_000_000,) * 2)
print(free_memory())
held = bytearray(2_000_000_000)
print(free_memory())
"""
    before, after = map(int, run(code).split())
    threads = (2 * usable_cores() + 4) * (72 if name == "RLIMIT_AS" else 9) * 2**20
    assert before == pytest.approx(max(0, 10e9 - threads), abs=50e6)
    assert after == pytest.approx(max(0, 8e9 - threads), abs=50e6)


BUILD = """
import os, resource, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # as many threads as two cores take
import torch, torchvision.models
from igstore import build_store, load_classifier
from igstore.machine.limits import _fields, Path
classifier = load_classifier("squeezenet1_1", "random:0")
if sys.argv[3] != "0":
    used = 1024 * _fields(Path("/proc/self/status"))["VmSize"]
    resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]),) * 2)
build_store(classifier, sys.argv[1], sys.argv[2], n_steps=32, rank=False, device="cpu", workers=1)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not enforce it")
def test_a_build_fits_its_batches_to_the_limit(tmp_path):
    (tmp_path / "images").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "images" / "one.png")
    sizes = {}
    for limit in (0, 1_200_000_000):
        run(BUILD, str(tmp_path / "images"), str(tmp_path / f"{limit}.zarr"), str(limit))
        sizes[limit] = StoreReader(tmp_path / f"{limit}.zarr").records[0]["batch_size"][0]
    assert sizes[1_200_000_000] < sizes[0]


def test_too_little_memory_is_said_before_the_work(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("igstore.building.worker.free_memory", lambda: 50_000)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 100))
    images = [("p", np.zeros((8, 8, 3), np.uint8), 1)]
    build_store(network, images, tmp_path / "one.zarr", n_steps=1, device="cpu")
    [said] = [record.getMessage() for record in caplog.records]
    assert "has 77.2 kB of parameters, of which 3 copies are made, and 50.0 kB of memory is free" in said
    caplog.clear()
    monkeypatch.undo()
    monkeypatch.setattr("igstore.attribution.memory.free_memory", lambda: 0)
    build_store(network, images, tmp_path / "two.zarr", n_steps=1, device="cpu")
    assert [record.getMessage() for record in caplog.records] == ["little memory is free on cpu: batches of 1"]
