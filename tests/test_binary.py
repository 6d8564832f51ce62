"""A network of one output as a classifier of two classes, held against captum, and what degenerate maps are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from torch import nn

from igstore import (
    build_store,
    classifier_from_module,
    cli,
    evaluate,
    import_maps,
    insertion_deletion,
    integrated_gradients,
    merge_stores,
    open_store,
    store_info,
    verify_store,
)
from igstore.binary import TwoClasses, with_classes
from igstore.evaluate import main as evaluate_main
from igstore.info import main as info_main
from igstore.models import Classifier
from igstore.schema import Preprocessing
from igstore.storage.reader import StoreReader

SIZE, STEPS = 9, 8
PREPROCESSING = Preprocessing(resize=None, crop=(SIZE, SIZE), mean=(0.5, 0.4, 0.6), std=(0.2, 0.3, 0.25))


class Head(nn.Module):
    """One number an image, above 0 for some images and below for others."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(3, SIZE, SIZE, generator=generator) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x) * self.weight).sum(dim=(1, 2, 3))[:, None]


def head() -> Classifier:
    """A model that is loaded by the name ``test_binary:head``."""
    return classifier_from_module(Head(), preprocessing=PREPROCESSING)


def pictures(n: int = 8) -> list[tuple[str, np.ndarray, int]]:
    random = np.random.default_rng(5)
    return [(f"p{index}", random.integers(0, 256, (SIZE, SIZE, 3), np.uint8), index % 2) for index in range(n)]


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """Of pixels (image, y, x, channel)."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (PREPROCESSING.mean, PREPROCESSING.std))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std


INPUTS = normalised(np.stack([array for _, array, _ in pictures()]))
BLACK = normalised(np.zeros((8, SIZE, SIZE, 3), np.uint8))
Z = Head()(INPUTS)[:, 0].detach().numpy()
RIGHT = [int(z > 0) for z in Z]


def test_the_pictures_are_of_either_class():
    assert set(RIGHT) == {0, 1}


@pytest.mark.parametrize("target", ["prediction", "label"])
@pytest.mark.parametrize("output", ["logit", "probability"])
def test_maps_are_those_of_captum(output, target, tmp_path):
    store = tmp_path / "binary.zarr"
    info = build_store(
        Head(),
        pictures(),
        store,
        preprocessing=PREPROCESSING,
        n_steps=STEPS,
        output=output,
        target=target,
        device="cpu",
    )
    classes = [index % 2 for index in range(8)] if target == "label" else RIGHT
    sign = np.array([1 if chosen else -1 for chosen in classes])
    network = Head() if output == "logit" else nn.Sequential(Head(), nn.Sigmoid())
    of_one = IntegratedGradients(network).attribute(INPUTS, BLACK, target=0, n_steps=STEPS, method="riemann_right")
    expected = sign[:, None, None] * of_one.sum(dim=1).detach().numpy()  # 1 - sigmoid(z) has the opposite gradient
    ds = open_store(store)
    np.testing.assert_allclose(ds.attribution.values, expected, atol=2e-3 * np.abs(expected).max())
    assert ds.target.values.tolist() == classes
    assert ds.prediction.values.tolist() == RIGHT
    values = network(INPUTS)[:, 0].detach().numpy()
    of_class = np.where(sign > 0, values, -values if output == "logit" else 1 - values)
    np.testing.assert_allclose(ds.output.values, of_class, rtol=1e-5, atol=1e-6)
    hits = np.mean([prediction == index % 2 for index, prediction in enumerate(RIGHT)])
    assert (info.top1, info.top5, info.n_zero_maps) == (pytest.approx(100 * hits), 100, 0)
    assert verify_store(store) == []


def test_everything_else_knows_both_classes(tmp_path, monkeypatch):
    store = tmp_path / "binary.zarr"
    build_store("test_binary:head", pictures(), store, n_steps=STEPS, output="probability", device="cpu")
    assert verify_store(store, recompute=8, device="cpu") == []
    found = evaluate(store, p=0, keep="bottom", order="attribution", device="cpu")
    assert found.predictions.prediction.values.ravel().tolist() == RIGHT
    assert found.rows[0].correct == sum(one == index % 2 for index, one in enumerate(RIGHT))
    curves = insertion_deletion(store, steps=2, device="cpu")
    unmasked = curves.probability.sel(curve="deletion", order="attribution").values[:, 0]
    np.testing.assert_allclose(unmasked, 1 / (1 + np.exp(-np.abs(Z))), rtol=1e-5)
    ours = integrated_gradients(
        Head(), INPUTS, BLACK, torch.zeros(8, dtype=torch.int64), n_steps=4, output="probability"
    )
    sigmoid = IntegratedGradients(nn.Sequential(Head(), nn.Sigmoid()))
    theirs = sigmoid.attribute(INPUTS, BLACK, target=0, n_steps=4, method="riemann_right").sum(dim=1)
    torch.testing.assert_close(ours.maps, theirs, rtol=1e-4, atol=1e-6)
    maps = IntegratedGradients(Head()).attribute(INPUTS, BLACK, target=0, n_steps=64).detach()
    maps = torch.from_numpy(np.sign(Z))[:, None, None, None] * maps
    given = import_maps(maps.float(), head(), pictures(), tmp_path / "given.zarr", made_by="captum", device="cpu")
    assert given.completeness_median is not None
    assert given.completeness_median < 0.05


@pytest.mark.parametrize("n_outputs", [2, 3])
def test_other_networks_stay_as_they_are(n_outputs):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, n_outputs))
    classifier = classifier_from_module(network, preprocessing=PREPROCESSING)
    assert with_classes(classifier, "logit") is classifier
    assert with_classes(with_classes(head(), "logit"), "logit").network.network.__class__ is Head


def test_probabilities_of_two_classes_are_the_sigmoid():
    for output, of_z in (("logit", lambda z: torch.stack([-z, z], 1)), ("probability", None)):
        found = TwoClasses(Head(), output)(INPUTS)
        z = Head()(INPUTS)[:, 0]
        if of_z is None:
            torch.testing.assert_close(found.softmax(dim=1)[:, 1], z.sigmoid())
        else:
            torch.testing.assert_close(found, of_z(z))


# --- Maps that say nothing


class Constant(nn.Module):
    """Sees nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(dim=(1, 2, 3))[:, None] * torch.zeros(5) + torch.arange(5.0)


class Stepwise(nn.Module):
    """Sees only which side of a threshold the image is on, so that its gradient is 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = (x.mean(dim=(1, 2, 3)) > -0.5).float()[:, None]
        return side * torch.arange(5.0) + 0 * x.sum(dim=(1, 2, 3))[:, None]


class Certain(nn.Module):
    """So sure of class 0 that its softmax, in float32, has no gradient, for images and baselines."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.mean(dim=(1, 2, 3)) + 1e4, x.sum(dim=(1, 2, 3))], dim=1)


class Detached(nn.Module):
    """Hides its input from the gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().mean(dim=(2, 3)) + 0 * x.sum(dim=(1, 2, 3))[:, None]


# the network, what is attributed, and how many of the maps have equal outputs on image and baseline
DEGENERATE: dict[str, tuple[nn.Module, str, bool]] = {
    "constant output": (Constant(), "logit", True),
    "zero gradient": (Stepwise(), "logit", False),
    "saturated softmax": (Certain(), "probability", True),
    "hidden input": (Detached(), "logit", False),
}


def said(main: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.run(main, arguments) == cli.DONE
    out = capsys.readouterr()
    return out.out + out.err


@pytest.mark.parametrize("kind", DEGENERATE)
def test_maps_of_nothing_are_counted_and_said(kind, tmp_path, capsys):
    network, output, is_same = DEGENERATE[kind]
    store = tmp_path / "nothing.zarr"
    settings: dict[str, Any] = {"preprocessing": PREPROCESSING, "n_steps": 2, "output": output, "device": "cpu"}
    info = build_store(network, pictures(), store, shard_size=3, **settings)
    assert not open_store(store).attribution.values.any()
    assert (info.n_zero_maps, info.n_same_output) == (8, 8 if is_same else 0)
    words = said(info_main, [str(store)], capsys)
    assert "zero maps    8 of 8 images have an attribution of 0 everywhere" in words
    assert ("same output  8 of 8 images" in words) == is_same
    found = json.loads(said(info_main, [str(store), "--json"], capsys))
    assert (found["n_zero_maps"], found["n_same_output"]) == (8, info.n_same_output)
    assert verify_store(store) == []


def black_and_other(n_black: int) -> list[tuple[str, np.ndarray, int]]:
    """Pictures that are the baseline, so that their map is 0, and others."""
    return [(name, array * (index >= n_black), label) for index, (name, array, label) in enumerate(pictures())]


def test_the_count_goes_with_the_images(tmp_path, capsys):
    settings: dict[str, Any] = {"preprocessing": PREPROCESSING, "n_steps": 2, "device": "cpu", "shard_size": 3}
    images = black_and_other(4)
    every = build_store(head(), images, tmp_path / "all.zarr", **settings)
    assert (every.n_zero_maps, every.n_same_output) == (4, 4)
    words = said(evaluate_main, [str(tmp_path / "all.zarr"), "--models", "test_binary:head", "--p", "50"], capsys)
    assert f"note: 4 images of {tmp_path / 'all.zarr'} have an attribution of 0 everywhere" in words
    for part, some in (("one", images[:5]), ("two", images[5:])):
        build_store(head(), some, tmp_path / f"{part}.zarr", **settings)
    merge_stores([tmp_path / "one.zarr", tmp_path / "two.zarr"], tmp_path / "merged.zarr")
    assert store_info(tmp_path / "merged.zarr").n_zero_maps == 4
    assert verify_store(tmp_path / "merged.zarr") == []
    zeros = np.zeros((8, SIZE, SIZE), np.float32)
    zeros[7] = 1
    given = import_maps(zeros, head(), pictures(), tmp_path / "given.zarr", made_by="hand", device="cpu")
    assert given.n_zero_maps == 7
    build_store(head(), pictures(), tmp_path / "good.zarr", **settings)
    assert "zero maps" not in said(info_main, [str(tmp_path / "good.zarr")], capsys)


def test_records_that_do_not_say_it_are_of_older_stores(tmp_path, capsys):
    store = tmp_path / "old.zarr"
    build_store(Constant(), pictures(3), store, preprocessing=PREPROCESSING, n_steps=2, device="cpu")
    forget(store)
    assert (store_info(store).n_zero_maps, store_info(store).n_same_output) == (None, 3)
    assert "same output  3 of 3" in said(info_main, [str(store)], capsys)
    assert verify_store(store) == []
    change(store, zero_maps=2)
    assert any("says that 2 maps are 0 everywhere; 3 are" in str(finding) for finding in verify_store(store))


def forget(store: Path) -> None:
    from igstore.storage.files import sealed

    file = store / StoreReader(store).record_file(0)
    record = {name: value for name, value in json.loads(file.read_text()).items() if name not in ("zero_maps", "seal")}
    file.write_text(json.dumps(sealed(record)))


def change(store: Path, **fields: Any) -> None:
    from igstore.storage.files import sealed

    file = store / StoreReader(store).record_file(0)
    record = {name: value for name, value in json.loads(file.read_text()).items() if name != "seal"}
    file.write_text(json.dumps(sealed({**record, **fields})))
