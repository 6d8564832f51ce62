"""Insertion and deletion, against a plain loop that changes pixels step by step, and against closed forms."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from PIL import Image
from scipy.ndimage import gaussian_filter
from stores import image_ids, make_store
from torch import Tensor, nn

from igstore import cli
from igstore.curves import insertion_deletion, main
from igstore.errors import ModelError, SettingsMismatchError, StoreNotFoundError, UserError
from igstore.masks import selection
from igstore.models import Classifier, classifier_from_module
from igstore.schema import Preprocessing

N, FAILED, SIZE = 9, 3, (23, 26)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
RANKINGS = [("positive", 3), ("absolute", 5)]


class Patterns(nn.Module):
    """Each class looks for a pattern of its own, all over the image, so that every block matters to every class."""

    def __init__(self, n_classes: int = 5, size: tuple[int, int] = SIZE) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.convolution = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * size[0] * size[1], n_classes)
        with torch.no_grad():
            for tensor in (*self.parameters(), self.norm.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            self.head.weight.mul_(0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.convolution(x)).tanh().flatten(1))


class Sum(nn.Module):
    """Two classes; the second one's logit is the sum of the normalised input times weights, the first one's is 0."""

    def __init__(self) -> None:
        super().__init__()
        weights = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(2))
        self.weights = nn.Parameter(weights / 20)

    def forward(self, x: Tensor) -> Tensor:
        total = (self.weights * x).sum(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(total), total], dim=1)


class Constant(nn.Module):
    """Says the same of every image."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor([1.0, 2.0, 0.0, -1.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scores.expand(len(x), -1)


class Undefined(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 5), torch.nan)


def classifier(network: nn.Module, size: tuple[int, int] = SIZE, mean: Any = MEAN, std: Any = STD) -> Classifier:
    preprocessing = Preprocessing(resize=None, crop=size, mean=mean, std=std)
    return classifier_from_module(network.eval(), preprocessing=preprocessing)


def by_name() -> Classifier:
    """A model that is loaded by the name ``test_curves:by_name``."""
    return classifier(Patterns())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images in shards of four, number 3 failed."""
    path = tmp_path_factory.mktemp("curves") / "toy.zarr"
    return make_store(path, N, failed=[FAILED], rankings=RANKINGS, mean=MEAN, std=STD)


# --- The plain loop


def changed_blocks(n_blocks: int, steps: int) -> list[int]:
    return [int(np.ceil(step * n_blocks / steps - 1e-9)) for step in range(steps + 1)]


def fill_of(pixels: np.ndarray, name: str) -> np.ndarray:
    """uint8 (3, y, x): what hidden pixels become."""
    if name == "black":
        return np.zeros_like(pixels)
    if name == "mean":
        return np.broadcast_to(np.floor(255 * np.array(MEAN) + 0.5).reshape(3, 1, 1), pixels.shape).astype(np.uint8)
    blurred = [gaussian_filter(channel.astype(float), 10, truncate=4, mode="nearest") for channel in pixels]
    return np.floor(np.array(blurred) + 0.5).astype(np.uint8)


def blocks_in_order(store: Path, image: int, score: str, block: int, order: str) -> list[tuple[slice, slice]]:
    """The pixels of every block, the one with the highest score first."""
    values = zarr.open_array(store / "attribution", mode="r")[image].astype(np.float64)
    values = np.abs(values) if score == "absolute" else np.maximum(values, 0)
    squares = [
        (slice(y, y + block), slice(x, x + block))
        for y in range(0, values.shape[0], block)
        for x in range(0, values.shape[1], block)
    ]
    if order == "random":
        grid = -(-values.shape[0] // block), -(-values.shape[1] // block)
        [ranks] = selection.random_ranks([image_ids(N)[image]], grid, seed=4)
        places = np.argsort(ranks.ravel())
    else:
        places = np.argsort([-values[square].sum() for square in squares], kind="stable")
    return [squares[place] for place in places]


def one_curve(
    network: nn.Module, before: np.ndarray, after: np.ndarray, blocks: list[Any], target: int, steps: int
) -> list[float]:
    """The target's probability as blocks of one picture become those of another, both uint8 (3, y, x)."""
    picture, curve, done = before.copy(), [], 0
    for count in changed_blocks(len(blocks), steps):
        for rows, columns in blocks[done:count]:
            picture[:, rows, columns] = after[:, rows, columns]
        done = count
        x = (torch.from_numpy(picture) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        with torch.no_grad():
            curve.append(float(torch.softmax(network(x[None])[0], 0)[target]))
    return curve


def trapezoid(x: list[float], y: list[float]) -> float:
    return sum((x[i + 1] - x[i]) * (y[i] + y[i + 1]) / 2 for i in range(len(x) - 1))


@pytest.mark.parametrize(
    ("score", "block", "steps", "fills"),
    [
        ("positive", 3, 9, ("mean", "blur")),  # 72 blocks: every step changes 8
        ("positive", 3, 7, ("blur", "black")),  # some steps change 11, some 10
        ("absolute", 5, 30, ("black", "mean")),  # block by block
    ],
)
@pytest.mark.parametrize("order", ["attribution", "random"])
@pytest.mark.parametrize("curve", ["deletion", "insertion"])
def test_curves_are_what_a_loop_over_images_gives(store, score, block, steps, fills, order, curve):
    network = Patterns().eval()
    options = {"score": score, "block": block, "steps": steps, "deletion_fill": fills[0], "insertion_fill": fills[1]}
    found = insertion_deletion(store, classifier(network), seed=4, batch_size=4, **options)
    targets = zarr.open_array(store / "target", mode="r")[:]
    pixels = zarr.open_array(store / "pixels", mode="r")[:]
    expected = {}
    for image in range(N):
        if image != FAILED:
            fill = fill_of(pixels[image], fills[curve == "insertion"])
            ends = (pixels[image], fill) if curve == "deletion" else (fill, pixels[image])
            blocks = blocks_in_order(store, image, score, block, order)
            expected[image_ids(N)[image]] = one_curve(network, *ends, blocks, int(targets[image]), steps)
    assert found.image.values.tolist() == list(expected)
    of_curve = found.sel(curve=curve, order=order)
    # folding batch norm into the convolution rounds a few float32 operations otherwise
    np.testing.assert_allclose(of_curve.probability, list(expected.values()), rtol=0, atol=1e-5)
    n_blocks = len(blocks)
    changed = [count / n_blocks for count in changed_blocks(n_blocks, steps)]
    np.testing.assert_array_equal(found.changed, changed)
    areas = [trapezoid(changed, values) for values in expected.values()]
    np.testing.assert_allclose(of_curve.auc, areas, rtol=0, atol=1e-5)


def test_the_loop_sees_differences(store):
    """Curves rise and fall, and differ between orders and images, so agreeing with the loop means something."""
    found = insertion_deletion(store, classifier(Patterns()), steps=9, seed=4)
    assert found.probability.std("step").median() > 0.01
    for dim in ("curve", "order", "image"):
        assert found.auc.std(dim).mean() > 0.01


# --- Closed forms


@pytest.mark.parametrize("fills", [("black", "black"), ("noise", "image_mean")], ids=str)
def test_a_constant_answer_has_its_probability_as_area(store, fills):
    found = insertion_deletion(store, classifier(Constant()), steps=5, deletion_fill=fills[0], insertion_fill=fills[1])
    scores = np.exp([1.0, 2.0, 0.0, -1.0, 0.5])
    expected = (scores / scores.sum())[found.target]
    assert len(set(expected)) > 2
    for curve in ("deletion", "insertion"):
        for order in ("attribution", "random"):
            np.testing.assert_allclose(found.auc.sel(curve=curve, order=order), expected, rtol=1e-6)


def test_a_sum_is_what_is_visible_of_it(tmp_path):
    """With a mean of 0 a black pixel adds nothing: after any deletion the logit is the sum over what is left."""
    path = make_store(tmp_path / "sum.zarr", 6, labels=[1] * 6, mean=(0, 0, 0), std=(1, 1, 1))
    network = Sum()
    found = insertion_deletion(
        path,
        classifier(network, mean=(0, 0, 0), std=(1, 1, 1)),
        steps=72,
        deletion_fill="black",
        insertion_fill="black",
    )
    terms = network.weights.detach().numpy() * zarr.open_array(path / "pixels", mode="r")[:] / 255  # (image, 3, y, x)
    ranks = zarr.open_array(path / "ranks/positive-3/rank", mode="r")[:]
    of_pixels = np.kron(ranks, np.ones((1, 3, 3), int))[:, : SIZE[0], : SIZE[1]]  # (image, y, x)
    targets = found.target.values
    assert set(targets) == {0, 1}
    for step in (0, 1, 20, 71, 72):
        deleted = (of_pixels < step)[:, None]
        for curve, visible in (("deletion", ~deleted), ("insertion", deleted)):
            logit = (terms * visible).sum(axis=(1, 2, 3))
            expected = 1 / (1 + np.exp(np.where(targets == 1, -logit, logit)))
            values = found.probability.sel(curve=curve, order="attribution").isel(step=step)
            np.testing.assert_allclose(values, expected, atol=1e-5)


def test_both_orders_meet_at_the_ends(store):
    found = insertion_deletion(store, classifier(Patterns()), steps=3).probability
    for step in (0, -1):
        np.testing.assert_array_equal(*(found.isel(step=step).sel(order=order) for order in ("attribution", "random")))
    # nothing deleted is everything inserted
    np.testing.assert_array_equal(found.sel(curve="deletion")[..., 0], found.sel(curve="insertion")[..., -1])


# --- Other models, other pixels


def test_a_model_of_another_size_sees_the_images_resized(store):
    size = (31, 35)
    network = Patterns(size=size).eval()
    found = insertion_deletion(store, classifier(network, size), steps=2, limit=2)
    for place in range(2):
        pixels = zarr.open_array(store / "pixels", mode="r")[place].transpose(1, 2, 0)
        picture = np.array(Image.fromarray(pixels).resize(size[::-1], Image.BILINEAR)).transpose(2, 0, 1)
        [expected] = one_curve(network, picture, picture, [], int(found.target[place]), 1)[:1]
        assert float(found.probability[0, 0, place, 0]) == pytest.approx(expected, abs=1e-5)


def test_pixels_may_come_from_another_store(store, tmp_path):
    bare = make_store(tmp_path / "bare.zarr", N, failed=[FAILED], rankings=RANKINGS, mean=MEAN, std=STD, pixels=False)
    with pytest.raises(UserError, match="images=PATH"):
        insertion_deletion(bare, classifier(Patterns()))
    one, other = (insertion_deletion(path, classifier(Patterns()), steps=2, images=store) for path in (bare, store))
    xr.testing.assert_identical(one.drop_attrs(), other.drop_attrs())


# --- Mistakes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, UserError, "steps is 0"),
        ({"steps": 73}, UserError, "between 1 and 72"),
        ({"limit": 0}, UserError, "limit is 0"),
        ({"deletion_fill": "pink"}, UserError, "fill is 'pink'"),
        ({"block": 4, "steps": 5}, StoreNotFoundError, "igstore rank .* --block 4"),
        ({"weights": "random"}, UserError, "weights goes with a model given by name"),
        ({"model": 3}, UserError, "model is a int"),
        ({"model": Patterns(), "weights": "random"}, UserError, "a network brings its own"),
        ({"model": classifier(Sum())}, UserError, "has 2 classes"),
        ({"model": classifier(Undefined())}, ModelError, "not finite"),
        ({"model": None}, UserError, "made by toy"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_mistakes(store, options, error, message):
    with pytest.raises(error, match=message):
        insertion_deletion(store, **{"model": classifier(Patterns())} | options)


# --- The command


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A store that names its model as `by_name`."""
    model = by_name()
    settings = {"model": "test_curves:by_name", "weights": model.weights, "weights_sha256": model.weights_sha256}
    return make_store(tmp_path / "own.zarr", N, failed=[FAILED], mean=MEAN, std=STD, **settings)


def test_the_command_prints_mean_areas_and_writes_files(own, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "out"
    options = ["--model", "test_curves:by_name", "--steps", "6", "--limit", "5", "--out", str(out), "--quiet"]
    assert cli.run(main, [str(own), *options]) == cli.DONE
    lines = capsys.readouterr().out.splitlines()
    found = insertion_deletion(own, by_name(), steps=6, limit=5)
    areas = found.auc.mean("image")
    assert "5 images, 6 steps" in lines[0]
    for line, order in zip(lines[2:4], ("attribution", "random"), strict=True):
        expected = [f"{float(areas.sel(order=order, curve=curve)):.4f}" for curve in ("deletion", "insertion")]
        assert line.split()[-2:] == expected
    assert sorted(path.name for path in out.iterdir()) == ["auc.csv", "curves.csv", "curves.png"]
    with Image.open(out / "curves.png") as picture:
        assert picture.format == "PNG"
    with (out / "auc.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == found.image.values.tolist()
    random = [float(row["insertion random"]) for row in rows]
    np.testing.assert_allclose(random, found.auc.sel(curve="insertion", order="random"))
    with (out / "curves.csv").open() as file:
        points = [row for row in csv.DictReader(file) if row["panel"].startswith("deletion")][:7]
    mean = found.probability.sel(curve="deletion", order="attribution").mean("image")
    np.testing.assert_allclose([float(point["probability of the target"]) for point in points], mean, rtol=1e-6)


def test_earlier_curves_are_replaced_where_that_is_asked_for(own, tmp_path, capsys):
    arguments = [str(own), "--model", "test_curves:by_name", "--steps", "2", "--out", str(tmp_path / "out")]
    assert cli.run(main, arguments) == cli.DONE
    before = (tmp_path / "out" / "curves.csv").read_bytes()
    capsys.readouterr()
    assert cli.run(main, [*arguments, "--seed", "5"]) == cli.MISUSED
    assert "holds auc.csv of other curves: give another --out, or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "curves.csv").read_bytes() == before
    assert cli.run(main, [*arguments, "--seed", "5", "--overwrite"]) == cli.DONE
    assert (tmp_path / "out" / "curves.csv").read_bytes() != before


def test_without_matplotlib_there_are_only_tables(own, tmp_path, monkeypatch):
    monkeypatch.setattr("igstore.curves.importlib.util.find_spec", lambda name: None)
    options = ["--model", "test_curves:by_name", "--steps", "2", "--out", str(tmp_path / "out"), "--quiet"]
    assert cli.run(main, [str(own), *options]) == cli.DONE
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["auc.csv", "curves.csv"]


def test_the_command_refuses_what_it_cannot_write(own, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="which is a file"):
        main([str(own), "--out", str(tmp_path / "file")])


def test_other_weights_than_the_store_s_are_refused(tmp_path):
    settings = {"model": "shufflenet_v2_x0_5", "weights": "random:1"}
    path = make_store(tmp_path / "other.zarr", N, mean=MEAN, std=STD, **settings)
    with pytest.raises(SettingsMismatchError, match="weights found are random:1"):
        insertion_deletion(path)
