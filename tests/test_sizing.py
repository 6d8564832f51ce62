"""What `pipelines/CLUSTER.md` says of sizes, against the code and against a real store; and the SLURM examples."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from stores import make_store

from igstore import store_info
from igstore.storage import StoreReader
from pipelines.sizing import _ID_LENGTH, _RECORD_IN_MEMORY, Size, main, spec_of, table
from pipelines.slurm import dask_cluster

PIPELINES = Path(__file__).resolve().parents[1] / "pipelines"
PAGE = (PIPELINES / "CLUSTER.md").read_text()

SIZES = [(50_000, 500), (1_281_167, 500), (1_281_167, 5_000), (14_197_122, 500), (14_197_122, 20_000)]


@pytest.mark.parametrize(("n_images", "shard_size"), SIZES)
def test_the_page_says_what_the_code_does(n_images, shard_size):
    head, line, row = table([Size(n_images, spec_of(shard_size=shard_size))])
    assert "\n".join((head, line)) in PAGE
    assert row in PAGE


def test_the_arithmetic_in_words():
    one = Size(500, spec_of())
    index = 500 * 16 + 4
    assert (one.maps - index, one.pixels - index) == (500 * 100_352, 500 * 150_528)
    assert one.ranks - 2 * index == 500 * 33_750
    assert one.scalars == 500 * (27 + 4 + 27) + 4
    for number in ("100,352", "150,528", "250,907", "33,750", "8,004"):
        assert number in PAGE
    training = Size(1_281_167, spec_of())
    assert training.gpu_hours == pytest.approx(1_281_167 * 50 / 7000 / 3600)
    assert f"{Size(1_281_167, spec_of(pixels=False)).total / 1e9:.0f} GB from the start" in PAGE
    assert training.shard_memory == 2 * 500 * 250_907


@pytest.mark.parametrize("pixels", [True, False], ids=["pixels", "no pixels"])
@pytest.mark.parametrize("n", [7, 8, 9])
def test_a_real_store_has_these_sizes(tmp_path, n, pixels):
    path = make_store(tmp_path / "model.zarr", n, shard_size=4, pixels=pixels)
    size = Size(n, StoreReader(path).spec)
    found = [file for file in path.rglob("*") if file.is_file()]
    assert len(found) == size.files

    def n_bytes(*names: str) -> int:
        return sum(file.stat().st_size for name in names for file in path.glob(f"{name}/c/**/*") if file.is_file())

    assert n_bytes("attribution") == size.maps
    assert n_bytes("pixels") == size.pixels
    assert n_bytes("ranks/positive-3/*") == size.ranks
    others = {name for name, variable in StoreReader(path).variables.items() if not variable.is_sharded}
    shorter = n * (_ID_LENGTH - len("image_0000"))
    assert n_bytes(*others) == size.scalars - shorter
    # a record names files, and the device and versions, whose names differ in length
    records = sum(file.stat().st_size for file in path.glob("records/**/*.json"))
    assert records == pytest.approx(size.records, rel=0.3)


def test_a_record_in_memory(tmp_path):
    text = next(make_store(tmp_path / "model.zarr").glob("records/*.json")).read_bytes()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        records = [json.loads(text) for _ in range(50)]
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / len(records) == pytest.approx(_RECORD_IN_MEMORY, rel=0.3)


def test_sizes_are_printed(capsys):
    assert main(["--images", "1281167", "--shard-size", "5000"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] in PAGE
    assert main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


# the examples


@pytest.fixture
def igstore_stand_in(tmp_path: Path) -> Path:
    """A folder with a program `igstore`, which says what it was told and waits to be terminated if it should."""
    program = tmp_path / "bin" / "igstore"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/bash\n"
        f"trap 'echo terminated >> {tmp_path}/said; exit 143' TERM\n"
        f'echo "$@" >> {tmp_path}/said\n'
        '[ -z "$WAITS" ] || for _ in {1..200}; do sleep 0.05; done\n'
        'exit "$STATUS"\n'
    )
    program.chmod(0o755)
    return program.parent


@pytest.fixture
def environment(igstore_stand_in: Path) -> dict[str, str]:
    return {
        "PATH": f"{igstore_stand_in}:{os.environ['PATH']}",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_COUNT": "8",
        "STATUS": "0",
        "WAITS": "",
    }


SCRIPT = PIPELINES / "slurm" / "array.sbatch"


def test_the_script_is_sound():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True)


@pytest.mark.parametrize(("status", "said"), [(0, 0), (1, 1), (2, 2), (3, 0)])
def test_a_task_builds_its_part(environment, tmp_path, status, said):
    """Images that cannot be read make no task a failed one."""
    done = subprocess.run(
        ["bash", SCRIPT, "--model", "resnet50", "--data", "a b"],
        env=environment | {"STATUS": str(status)},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (said, b"")
    assert (tmp_path / "said").read_text() == "build --device all --part 3/8 --model resnet50 --data a b\n"


def test_a_task_whose_time_is_over(environment, tmp_path):
    """The batch script alone is sent the signal."""
    task = subprocess.Popen(["bash", SCRIPT], env=environment | {"WAITS": "yes"})
    while not (tmp_path / "said").exists():
        assert task.poll() is None
    task.send_signal(signal.SIGTERM)
    assert task.wait() == 143
    assert (tmp_path / "said").read_text().splitlines()[-1] == "terminated"


def test_the_dask_example_builds_a_store(tmp_path, monkeypatch):
    """On processes of this machine in place of SLURM's jobs."""
    distributed = pytest.importorskip("distributed")
    asked: dict[str, Any] = {}
    made = []

    class SLURMCluster(distributed.LocalCluster):
        def __init__(self, **options: Any) -> None:
            asked.update(options)
            _, gpus = options["worker_extra_args"]
            name, count = gpus.split("=")
            super().__init__(
                n_workers=0,
                threads_per_worker=options["cores"],
                resources={name: int(count)},
                dashboard_address="127.0.0.1:0",
                silence_logs="CRITICAL",
            )
            made.append(self)

        def adapt(self, **limits: int) -> Any:
            asked.update(limits)
            return super().adapt(**limits)

    monkeypatch.setitem(sys.modules, "dask_jobqueue", SimpleNamespace(SLURMCluster=SLURMCluster))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(3):
        Image.new("RGB", (16, 16), (80 * index, 10, 99)).save(pictures / f"{index}.png")
    store = tmp_path / "toy.zarr"
    model = ["--model", "networks:demo_network", "--resize", "16", "--crop", "16", "--n-steps", "2"]
    places = ["--data", str(pictures), "--store", str(store), "--shard-size", "2", "--device", "cpu"]
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert dask_cluster.main(["--gpus", "2", "--partition", "short", *model, *places]) == 0
    assert store_info(store).n_built == 3
    assert (asked["queue"], asked["maximum"]) == ("short", 2)
    assert made[0].status.name == "closed"


def test_the_dask_example_asks_slurm_for_a_gpu(monkeypatch):
    jobqueue = pytest.importorskip("dask_jobqueue")
    scripts = []

    def build(_: Any) -> int:
        return 0

    class Recorded(jobqueue.SLURMCluster):
        def adapt(self, **_: Any) -> None:
            scripts.append(self.job_script())

    monkeypatch.setattr(dask_cluster, "build", build)
    monkeypatch.setattr(jobqueue, "SLURMCluster", Recorded)
    assert dask_cluster.main(["--partition", "short"]) == 0
    for words in ("#SBATCH --gpus=1", "#SBATCH -p short", "--resources GPU=1"):
        assert words in scripts[0]
