"""What a GPU's host does while it waits: the order of work, with stand-ins that say when they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluate import Pooled

from igstore import build_store, evaluate, open_store
from igstore.attribution import Attributor
from igstore.errors import UserError
from igstore.machine import one_behind, to_device, to_host

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "order"),
    [
        (CPU, ["made 0", "waited 0", "made 1", "waited 1", "made 2", "waited 2"]),
        (CUDA, ["made 0", "made 1", "waited 0", "made 2", "waited 1", "waited 2"]),
    ],
)
def test_a_gpu_has_the_next_work_before_its_results_are_waited_for(device, order):
    happened: list[str] = []

    def made() -> Iterator[Callable[[], int]]:
        for number in range(3):
            happened.append(f"made {number}")
            yield lambda number=number: happened.append(f"waited {number}") or number

    assert list(one_behind(made(), device)) == [0, 1, 2]
    assert happened == order


def pictures() -> list[tuple[str, np.ndarray, int]]:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 24, 24, 3), np.uint8)
    return [(f"image {place}", image, place % 3) for place, image in enumerate(pixels)]


def test_units_of_a_build_are_with_the_gpu_while_others_are_finished(tmp_path, monkeypatch):
    settings = {"n_steps": 2, "device": "cpu", "shard_size": 6, "show_progress": False}
    monkeypatch.setattr("igstore.building.worker._UNIT_EVALUATIONS", {"cpu": 4})  # two images
    build_store(Pooled(), pictures(), tmp_path / "plain.zarr", **settings)
    happened: list[str] = []
    submit = Attributor.submit

    def submitting(self: Attributor, pixels: Any, labels: Any, image_ids: Any, reasons: Any) -> Callable[[], Any]:
        happened.append(f"submitted {image_ids[0]}")
        wait = submit(self, pixels, labels, image_ids, reasons)
        return lambda: happened.append(f"finished {image_ids[0]}") or wait()

    def as_on_a_gpu(waiting: Iterable[Callable[[], Any]], device: torch.device) -> Iterator[Any]:
        return one_behind(waiting, CUDA)

    monkeypatch.setattr(Attributor, "submit", submitting)
    monkeypatch.setattr("igstore.building.worker.one_behind", as_on_a_gpu)
    build_store(Pooled(), pictures(), tmp_path / "ahead.zarr", **settings)
    images = ["image 0", "image 2", "image 4"]
    for before, after in pairwise(images):
        assert happened.index(f"submitted {after}") < happened.index(f"finished {before}")
    one, other = (open_store(tmp_path / f"{name}.zarr") for name in ("plain", "ahead"))
    assert one.attribution.equals(other.attribution)
    assert one.output.equals(other.output)


def test_copies():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    there = to_device(values[:, ::2], CPU)
    assert there.is_contiguous()
    back = to_host({"values": there, "sum": there.sum()})()
    np.testing.assert_array_equal(back["values"], values[:, ::2])
    assert back["sum"] == values[:, ::2].sum()


def test_evaluations_in_float16(tmp_path):
    """On a CPU that is slow, and the same; a few predictions of a network that is undecided may differ."""
    store = tmp_path / "store.zarr"
    build_store(Pooled(), pictures(), store, n_steps=2, device="cpu", show_progress=False)
    options = {"models": [Pooled()], "p": [50, 30], "device": "cpu"}
    exact, half = (evaluate(store, precision=precision, **options) for precision in ("float32", "float16"))
    assert [row.precision for row in (exact.rows[0], half.rows[0])] == ["float32", "float16"]
    different = exact.predictions.prediction.values != half.predictions.prediction.values
    assert different.mean() <= 0.1
    with pytest.raises(UserError, match="tf32 is a mode of CUDA devices"):
        evaluate(store, precision="tf32", **options)
    with pytest.raises(UserError, match="must be one of float32, tf32, float16"):
        evaluate(store, precision="mixed", **options)
