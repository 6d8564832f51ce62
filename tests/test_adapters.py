"""Networks of one output or one channel, held against captum, and what degenerate maps are called."""

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
from igstore.errors import ModelError
from igstore.evaluate import main as evaluate_main
from igstore.info import main as info_main
from igstore.models import Classifier, adapted
from igstore.models.adapters import TwoClasses
from igstore.schema import Preprocessing
from igstore.storage import StoreReader

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
    """A model that is loaded by the name ``test_adapters:head``."""
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
    build_store("test_adapters:head", pictures(), store, n_steps=STEPS, output="probability", device="cpu")
    assert verify_store(store, recompute=8, model="test_adapters:head", device="cpu") == []
    found = evaluate(store, models="test_adapters:head", p=0, keep="bottom", order="attribution", device="cpu")
    assert found.predictions.prediction.values.ravel().tolist() == RIGHT
    assert found.rows[0].correct == sum(one == index % 2 for index, one in enumerate(RIGHT))
    curves = insertion_deletion(store, "test_adapters:head", steps=2, device="cpu")
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
    assert adapted(classifier, "logit") is classifier
    assert adapted(adapted(head(), "logit"), "logit").network.network.__class__ is Head


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
    words = said(evaluate_main, [str(tmp_path / "all.zarr"), "--models", "test_adapters:head", "--p", "50"], capsys)
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
    from igstore.files import sealed

    file = store / StoreReader(store).record_file(0)
    record = {name: value for name, value in json.loads(file.read_text()).items() if name not in ("zero_maps", "seal")}
    file.write_text(json.dumps(sealed(record)))


def change(store: Path, **fields: Any) -> None:
    from igstore.files import sealed

    file = store / StoreReader(store).record_file(0)
    record = {name: value for name, value in json.loads(file.read_text()).items() if name != "seal"}
    file.write_text(json.dumps(sealed({**record, **fields})))


# --- One channel


class OneChannel(nn.Module):
    """As those for handwritten digits."""

    def __init__(self, n_outputs: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.convolution, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
            self.head = nn.Linear(6 * (SIZE - 2) ** 2, n_outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.norm(self.convolution(x))).flatten(1))


SAME = Preprocessing(resize=None, crop=(SIZE, SIZE), mean=(0.1307,) * 3, std=(0.3081,) * 3)


@pytest.mark.parametrize("n_outputs", [4, 1])
def test_grey_images_of_a_network_of_one_channel_are_as_captum_s(n_outputs, tmp_path):
    grey = [(name, array[..., 0], None) for name, array, _ in pictures()]  # (y, x)
    network = OneChannel(n_outputs).eval()
    build_store(network, grey, tmp_path / "grey.zarr", preprocessing=SAME, n_steps=STEPS, device="cpu")
    values = np.stack([array for _, array, _ in grey])[:, None]
    x, black = ((torch.from_numpy(some) / 255 - 0.1307) / 0.3081 for some in (values, np.zeros_like(values)))
    scores = network(x).detach()
    sign = torch.ones(8) if n_outputs > 1 else scores[:, 0].sign()
    target = scores.argmax(dim=1) if n_outputs > 1 else 0
    expected = IntegratedGradients(network).attribute(x, black, target=target, n_steps=STEPS, method="riemann_right")
    expected = (expected[:, 0] * sign[:, None, None]).detach().numpy()
    ds = open_store(tmp_path / "grey.zarr")
    np.testing.assert_allclose(ds.attribution.values, expected, atol=2e-3 * np.abs(expected).max())
    assert verify_store(tmp_path / "grey.zarr") == []


def test_a_network_of_one_channel_is_shown_masks(tmp_path):
    grey = [(name, array[..., 0], index % 4) for index, (name, array, _) in enumerate(pictures())]
    network = OneChannel().eval()
    build_store(network, grey, tmp_path / "grey.zarr", preprocessing=SAME, n_steps=2, device="cpu")
    found = evaluate(tmp_path / "grey.zarr", models=[network], p=0, keep="bottom", order="attribution", device="cpu")
    assert (
        found.predictions.prediction.values.ravel().tolist()
        == open_store(tmp_path / "grey.zarr").prediction.values.tolist()
    )
    assert insertion_deletion(tmp_path / "grey.zarr", network, steps=2, device="cpu").sizes["image"] == 8


class FourChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 2, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x).flatten(1)


def test_other_channels_are_one_line(tmp_path):
    with pytest.raises(
        ModelError, match=r"the network fails on an image of 3 x 9 x 9 \(RuntimeError: .*4 channels"
    ) as caught:
        build_store(FourChannels(), pictures(), tmp_path / "four.zarr", preprocessing=PREPROCESSING, device="cpu")
    assert "\n" not in str(caught.value)
