from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from PIL import Image
from scipy.stats import norm
from stores import image_ids, make_store
from torch import Tensor, nn
from torch.utils.data import DataLoader

import igstore
from igstore import cli
from igstore.datasets import MaskedImages
from igstore.errors import ModelError, SettingsMismatchError, StoreExistsError, StoreNotFoundError, UserError
from igstore.evaluate import evaluate, main
from igstore.evaluation import Row, article_tables, read_rows
from igstore.evaluation.results import NOT_SHOWN
from igstore.masks import MaskOptions, selection
from igstore.models import Classifier, classifier_from_module
from igstore.schema import Preprocessing

N = 30
SIZE = (23, 26)
OTHER_SIZE = (30, 21)
CROSS = {"p": (0, 30, 50, 100), "select": ("mass", "count"), "fill": ("black", "image_mean")}


class Pooled(nn.Module):
    """Classes decided by where an image is bright: they differ between random images, and masks change them."""

    def __init__(self, n_classes: int = 7, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.convolution = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 16, n_classes)
        with torch.no_grad():
            for tensor in (*self.parameters(), self.norm.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            self.head.bias.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.norm(self.convolution(x)).relu(), 4)
        return self.head((x - x.mean(dim=(2, 3), keepdim=True)).flatten(1))


def classifier(
    size: tuple[int, int] = SIZE, *, n_classes: int = 7, seed: int = 0, name: str = "pooled", **fields: Any
) -> Classifier:
    preprocessing = Preprocessing(resize=None, crop=size, **fields)
    return classifier_from_module(Pooled(n_classes, seed).eval(), preprocessing=preprocessing, name=name)


def by_name() -> Classifier:
    """A model that is loaded by the name ``test_evaluate:by_name``."""
    return classifier(name="test_evaluate:by_name")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images in shards of 4, each sixth without a label, number 7 failed."""
    return make_store(tmp_path_factory.mktemp("stores") / "toy.zarr", N, failed=[7])


@pytest.fixture(scope="module")
def results(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, igstore.Evaluation]:
    """An evaluation of two models of different input sizes on one store, and its folder."""
    out = tmp_path_factory.mktemp("results") / "out"
    models = [classifier(), classifier(OTHER_SIZE, seed=1, name="other", mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.1))]
    return out, evaluate(store, models=models, **CROSS, out=out, batch_size=7)


# --- An independent path, one image at a time


def top_set(attribution: np.ndarray, p: float, select: str, block: int = 3) -> np.ndarray:
    """bool (block_y, block_x), from DESIGN's words alone."""
    positive = np.maximum(attribution.astype(np.float64), 0)
    starts = [np.arange(0, side, block) for side in positive.shape]
    scores = np.add.reduceat(np.add.reduceat(positive, starts[0], axis=0), starts[1], axis=1)
    flat = scores.ravel()
    best_first = np.argsort(-flat, kind="stable")
    top = np.zeros(flat.size, bool)
    if select == "count":
        top[[block for place, block in enumerate(best_first) if 100 * place < p * flat.size]] = True
    else:
        before = 0.0
        for index in best_first:
            if flat[index] > 0 and np.float32(before / flat.sum()) < np.float32(p / 100):
                top[index] = True
            before += flat[index]
    return top.reshape(scores.shape)


def expected(store: Path, model: Classifier, cell: MaskOptions | None) -> tuple[list[int], list[bool], list[float]]:
    """Predicted class, label in top five, share visible, of every image but the failed one."""
    arrays = {name: zarr.open_array(store / name, mode="r")[:] for name in ("status", "label", "attribution", "pixels")}
    preprocessing, (height, width) = model.preprocessing, model.preprocessing.crop
    found: tuple[list[int], list[bool], list[float]] = ([], [], [])
    for index, image_id in enumerate(image_ids(N)):
        if arrays["status"][index] != 1:
            continue
        visible = np.ones(SIZE, bool)
        if cell is not None:
            top = top_set(arrays["attribution"][index], cell.p, cell.select)
            if cell.order == "random":
                [ranks] = selection.random_ranks([image_id], top.shape, cell.seed)
                top = ranks < top.sum()
            blocks = top if cell.keep == "top" else ~top
            visible = np.kron(blocks, np.ones((3, 3), bool))[: SIZE[0], : SIZE[1]]
        # Pillow's own bilinear and nearest filters; both leave an image of the right size as it is
        picture = Image.fromarray(arrays["pixels"][index].transpose(1, 2, 0)).resize((width, height), Image.BILINEAR)
        mask = np.asarray(Image.fromarray(visible).resize((width, height), Image.NEAREST))
        pixels = np.array(picture)
        fill = np.zeros(3) if cell is None or cell.fill == "black" else np.floor(pixels.mean(axis=(0, 1)) + 0.5)
        pixels[~mask] = fill
        x = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - torch.tensor(preprocessing.mean).view(3, 1, 1)) / (
            torch.tensor(preprocessing.std).view(3, 1, 1)
        )
        [scores] = model.network(x[None]).tolist()
        order = sorted(range(len(scores)), key=lambda k: -scores[k])
        label = int(arrays["label"][index])
        for values, value in zip(found, (order[0], label in order[:5], mask.mean()), strict=True):
            values.append(value)
    return found


def row_of(rows: list[Row], model: Classifier, cell: MaskOptions) -> Row:
    [row] = [row for row in rows if row.model == model.name and row.cell == cell]
    return row


@pytest.mark.parametrize("order", ["attribution", "random"])
@pytest.mark.parametrize("fill", CROSS["fill"])
@pytest.mark.parametrize("select", CROSS["select"])
@pytest.mark.parametrize("keep", ["top", "bottom"])
@pytest.mark.parametrize("p", CROSS["p"])
def test_every_cell_is_what_a_loop_over_images_gives(
    store: Path, results: Any, p: float, keep: Any, select: Any, fill: Any, order: Any
) -> None:
    cell, model = MaskOptions(p=p, keep=keep, select=select, fill=fill, order=order), classifier()
    prediction, in_top5, visible = map(np.array, expected(store, model, cell))
    row = row_of(results[1].rows, model, cell)
    saved = results[1].predictions
    [place] = np.flatnonzero([MaskOptions(**record) == cell for record in records(saved, "cell")])
    np.testing.assert_array_equal(saved.prediction[0, place], prediction)
    labels = np.delete([index % 6 - 1 for index in range(N)], 7)
    labelled = labels >= 0
    assert row.n == labelled.sum() == 24
    assert row.correct == (prediction == labels)[labelled].sum()
    assert row.top1 == pytest.approx(100 * row.correct / 24, rel=1e-12)
    assert row.top5 == pytest.approx(100 * in_top5[labelled].mean(), rel=1e-12)
    assert row.visible == pytest.approx(100 * visible[labelled].mean(), rel=1e-12)
    low, high = wilson_interval(row.correct, 24)
    assert (row.low, row.high) == pytest.approx((100 * low, 100 * high), rel=1e-9, abs=1e-9)


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The proportions that a score test at 5% just rejects: ``(successes / n - p)**2 == z**2 * p * (1 - p) / n``."""
    p, z2 = successes / n, norm.ppf(0.975) ** 2
    low, high = sorted(np.roots([1 + z2 / n, -(2 * p + z2 / n), p**2]).tolist())
    return low, high


def binomial_tails(only_first: int, only_second: int) -> float:
    """The p-value of McNemar's exact test, by its definition, in whole numbers."""
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


def records(dataset: xr.Dataset, dim: str) -> list[dict[str, Any]]:
    """A dimension's coordinates, one dict for each place, in Python's own types."""
    names = [name for name, values in dataset.coords.items() if values.dims == (dim,)]
    columns = [dataset[name].values.tolist() for name in names]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def test_the_loop_sees_a_difference(store: Path) -> None:
    """The oracle's images are of many classes, and masks change their classes, so agreeing with it means something."""
    unmasked, _, _ = expected(store, classifier(), None)
    masked, _, _ = expected(store, classifier(), MaskOptions(p=50, keep="top"))
    assert len(set(unmasked)) >= 4
    assert np.mean(np.array(unmasked) != np.array(masked)) > 0.3


@pytest.mark.parametrize("model_index", [0, 1], ids=["own size", "another size"])
def test_unmasked_accuracies_are_of_the_same_pixels(store: Path, results: Any, model_index: int) -> None:
    model = [classifier(), classifier(OTHER_SIZE, seed=1, mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.1))][model_index]
    prediction, in_top5, _ = map(np.array, expected(store, model, None))
    labels = np.delete([index % 6 - 1 for index in range(N)], 7)
    name = ["pooled", "other"][model_index]
    assert 0 < in_top5[labels >= 0].mean() < 1  # or the next lines would say little
    originals = {(row.original_top1, row.original_top5) for row in results[1].rows if row.model == name}
    [(top1, top5)] = originals
    assert top1 == pytest.approx(100 * (prediction == labels)[labels >= 0].mean())
    assert top5 == pytest.approx(100 * in_top5[labels >= 0].mean())
    saved = results[1].predictions.unmasked[model_index]
    np.testing.assert_array_equal(saved, prediction)


@pytest.mark.parametrize("keep", ["top", "bottom"])
@pytest.mark.parametrize("fill", CROSS["fill"])
def test_transfer_to_a_model_of_another_size(store: Path, results: Any, keep: Any, fill: Any) -> None:
    """Resized by Pillow in the loop, masked by nearest neighbour, then filled."""
    model = classifier(OTHER_SIZE, seed=1, name="other", mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.1))
    cell = MaskOptions(p=50, keep=keep, fill=fill)
    prediction, _, visible = map(np.array, expected(store, model, cell))
    saved = results[1].predictions
    [place] = np.flatnonzero([MaskOptions(**record) == cell for record in records(saved, "cell")])
    np.testing.assert_array_equal(saved.prediction[1, place], prediction)
    labels = np.delete([index % 6 - 1 for index in range(N)], 7)
    assert row_of(results[1].rows, model, cell).visible == pytest.approx(100 * visible[labels >= 0].mean(), rel=1e-12)


def test_mcnemars_test_is_paired_image_by_image(results: Any) -> None:
    _, evaluation = results
    cells = records(evaluation.predictions, "cell")
    label = evaluation.predictions.label.values
    correct = (evaluation.predictions.prediction == label).values[:, :, label >= 0]
    assert len(evaluation.rows) == 2 * len(cells)
    n_differing = 0
    for row in evaluation.rows:
        pair = ["pooled", "other"].index(row.model)
        this, opposite = (
            correct[pair, cells.index(dataclasses.asdict(dataclasses.replace(row.cell, keep=keep)))]
            for keep in (row.keep, {"top": "bottom", "bottom": "top"}[row.keep])
        )
        assert (row.only_this, row.only_opposite) == ((this > opposite).sum(), (this < opposite).sum())
        n = row.only_this + row.only_opposite
        assert row.mcnemar_p == pytest.approx(binomial_tails(row.only_this, row.only_opposite), rel=1e-9)
        n_differing += n > 0
    assert n_differing > len(evaluation.rows) / 2


# --- What is left on disk


def test_results_json_holds_every_row(results: Any) -> None:
    out, evaluation = results
    found = json.loads((out / "results.json").read_text())
    assert found == [dataclasses.asdict(row) for row in evaluation.rows]
    assert len(found) == 2 * 4 * 2 * 2 * 2 * 2  # models, p, keep, select, fill, order
    wanted = "store_model model target p keep select score block fill order n correct top1 low high top5 original_top1"
    assert {*wanted.split(), "visible", "seed", "weights_sha256", "store_weights_sha256", "baseline"} <= set(found[0])
    assert {row["store_model"] for row in found} == {"toy"}
    assert {row["target"] for row in found} == {"prediction"}
    assert read_rows(out) == evaluation.rows


def test_results_csv_says_the_same(results: Any) -> None:
    out, evaluation = results
    with (out / "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert found == [{name: str(value) for name, value in dataclasses.asdict(row).items()} for row in evaluation.rows]


def test_predictions_open_with_plain_xarray(results: Any) -> None:
    out, evaluation = results
    found = xr.open_zarr(out / "predictions.zarr").load()
    assert found.prediction.dtype == found.unmasked.dtype == np.int32
    assert dict(found.sizes) == {"pair": 2, "cell": 64, "image": N - 1}
    for name, values in evaluation.predictions.variables.items():
        np.testing.assert_array_equal(found[name].values, values.values)
    one = found.prediction.isel(pair=0, cell=((found.p == 50) & (found.keep == "top")).values)
    assert one.sizes["cell"] == 8
    assert found.label.sel(image="image_0003") == 2


def test_tables_md_says_the_same(results: Any) -> None:
    out, evaluation = results
    found = {}
    text = (out / "tables.md").read_text()
    for number, select, fill, table in re.findall(
        r"\*\*Table (\d).*\n\n.*; p by (\w+), .*blocks; (.*) fill\..*\n\n((?:\|.*\n?)+)", text
    ):
        for line in table.splitlines():
            name, *values = (cell.strip() for cell in line.split("|")[1:-1])
            if name.startswith(("pooled", "other")):
                found[number, select, fill, name] = values
    expected: dict[tuple[str, ...], list[str]] = {}
    for row in sorted(evaluation.rows, key=lambda row: (-row.p, row.keep == "bottom")):
        label = row.model if row.order == "attribution" else f"{row.model}, random order"
        kind = (row.select, row.fill, label)
        number = {"top": "1", "bottom": "2"}[row.keep]
        expected.setdefault((number, *kind), [f"{row.original_top1:.1f}"]).append(f"{row.top1:.1f}")
        if row.p == 50:
            expected.setdefault(("3", *kind), []).append(f"{row.top1:.1f}")
            if row.keep == "bottom":
                p = "<0.001" if row.mcnemar_p < 0.001 else f"{row.mcnemar_p:.3f}"
                expected["3", *kind] += [str(row.only_opposite), str(row.only_this), p]
    assert found == expected


def test_an_earlier_evaluation_is_replaced_where_that_is_asked_for(store: Path, tmp_path: Path) -> None:
    for p in (30, 70):
        evaluate(store, models=[classifier()], p=p, order="attribution", out=tmp_path / "out", overwrite=True)
    with pytest.raises(StoreExistsError, match="holds the results of an evaluation: give another out, or overwrite"):
        evaluate(store, models=["no such model"], p=50, out=tmp_path / "out")
    assert {row.p for row in read_rows(tmp_path / "out")} == {70}
    assert xr.open_zarr(tmp_path / "out" / "predictions.zarr").p.values.tolist() == [70, 70]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def spoil_with_a_file(out: Path) -> None:
    out.write_text("mine")


def spoil_with_a_stranger(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("mine")


@pytest.mark.parametrize("spoil", [spoil_with_a_file, spoil_with_a_stranger])
def test_anything_else_at_out_is_refused_before_the_work(
    store: Path, tmp_path: Path, spoil: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(tmp_path / "out")
    before = {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")}
    monkeypatch.setattr(MaskedImages, "pixels", None)
    with pytest.raises(StoreExistsError, match="give another out, or remove it"):
        evaluate(store, models=[classifier()], out=tmp_path / "out")
    assert {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")} == before


def test_a_crash_while_writing_leaves_the_earlier_evaluation(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    earlier = evaluate(store, models=[classifier()], p=30, out=out)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xr.Dataset, "to_zarr", full)
    with pytest.raises(UserError, match="No space left"):
        evaluate(store, models=[classifier()], p=70, out=out, overwrite=True)
    assert read_rows(out) == earlier.rows
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- Which images


def test_each_image_is_read_once_for_all(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = MaskedImages.pixels
    counts = np.zeros(N, int)

    def counting(self: MaskedImages, images: np.ndarray) -> np.ndarray:
        np.add.at(counts, images, 1)
        return read(self, images)

    monkeypatch.setattr(MaskedImages, "pixels", counting)
    evaluate(store, models=[classifier(), classifier(OTHER_SIZE, name="other")], batch_size=4)
    assert counts.tolist() == [int(index != 7) for index in range(N)]


@pytest.mark.parametrize("batch_size", [1, 29, 1000])
def test_the_batch_size_changes_nothing(store: Path, batch_size: int) -> None:
    one, other = (evaluate(store, models=[classifier()], p=50, batch_size=size) for size in (batch_size, 5))
    xr.testing.assert_identical(one.predictions, other.predictions)
    assert one.rows == other.rows


def test_limit_takes_the_first_built_images(store: Path, results: Any) -> None:
    limited = evaluate(store, models=[classifier()], p=50, order="attribution", limit=9).predictions
    assert limited.image.values.tolist() == [name for name in image_ids(10) if name != "image_0007"]
    whole = results[1].predictions
    same = {"p": 50, "select": "mass", "fill": "black", "order": "attribution"}
    places = [place for place, record in enumerate(records(whole, "cell")) if record.items() >= same.items()]
    np.testing.assert_array_equal(limited.prediction[0], whole.prediction[0, places, :9])


def test_nothing_hidden_is_the_unmasked_image_and_no_opposite_is_no_test(store: Path) -> None:
    [row, _] = evaluate(store, models=[classifier()], p=0, keep="bottom").rows
    assert row.top1 == row.original_top1
    assert row.visible == 100
    assert (row.only_this, row.only_opposite, row.mcnemar_p) == (None, None, None)


def test_several_stores_and_models_make_pairs(store: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "longer.zarr", N + 3, seed=1, images_fingerprint="e" * 64)
    models = [classifier(), classifier(seed=1, name="second")]
    both = evaluate([store, other], models=models, p=50, order="attribution")
    alone = evaluate(other, models=models[1:], p=50, order="attribution")
    saved = both.predictions
    assert list(zip(saved.store.values, saved.model.values, strict=True)) == [
        ("toy.zarr", "pooled"),
        ("toy.zarr", "second"),
        ("longer.zarr", "pooled"),
        ("longer.zarr", "second"),
    ]
    assert saved.sizes["image"] == N + 3
    np.testing.assert_array_equal(saved.prediction[3], alone.predictions.prediction[0])
    assert (saved.prediction[:2, :, [7, N, N + 1, N + 2]] == NOT_SHOWN).all()
    assert (saved.unmasked[:2, [7, N, N + 1, N + 2]] == NOT_SHOWN).all()
    assert (saved.prediction[2:] != NOT_SHOWN).all()
    assert both.rows[-2:] == alone.rows


def test_pixels_from_another_store(store: Path, tmp_path: Path) -> None:
    without = make_store(tmp_path / "toy.zarr", N, failed=[7], pixels=False)
    with pytest.raises(UserError, match="without pixels"):
        evaluate(without, models=[classifier()])
    one = evaluate(without, models=[classifier()], p=50, images=store)
    there = evaluate(store, models=[classifier()], p=50)
    np.testing.assert_array_equal(one.predictions.prediction, there.predictions.prediction)


# --- Which models


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of real maps by a model that can be loaded by its name, in a preprocessing other than the model's own."""
    path = tmp_path_factory.mktemp("own") / "own.zarr"
    preprocessing = Preprocessing(resize=28, crop=SIZE, mean=(0.1, 0.2, 0.3))
    igstore.build_store("test_evaluate:by_name", colours(), path, preprocessing=preprocessing, n_steps=3, shard_size=5)
    return path


def colours() -> list[tuple[str, np.ndarray, int]]:
    """Labelled images of patches, which survive a resize."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 5, 5, 3), dtype=np.uint8)
    return [(f"image_{i:02d}", image.repeat(6, 0).repeat(6, 1), i % 5) for i, image in enumerate(coarse)]


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store by a model that igstore knows by itself, in another preprocessing than its own."""
    path, preprocessing = tmp_path_factory.mktemp("fixed") / "fixed.zarr", Preprocessing(resize=None, crop=(32, 32))
    given = {"weights": "random:1", "preprocessing": preprocessing, "n_steps": 1, "shard_size": 5}
    igstore.build_store("shufflenet_v2_x0_5", colours(), path, **given)
    return path


@pytest.mark.parametrize(
    ("name", "model", "given"),
    [("fixed", "shufflenet_v2_x0_5", {}), ("own", "test_evaluate:by_name", {"models": ["test_evaluate:by_name"]})],
    ids=["by the name that is recorded", "by the name that the user gives"],
)
def test_a_stores_own_model_is_evaluated_as_it_made_the_store(
    request: pytest.FixtureRequest, name: str, model: str, given: dict[str, Any]
) -> None:
    path = request.getfixturevalue(name)
    evaluation = evaluate(path, p=50, **given)
    assert {(row.model, row.store_model, row.is_own) for row in evaluation.rows} == {(model, model, True)}
    stored = igstore.open_store(path)
    np.testing.assert_array_equal(evaluation.predictions.unmasked[0], stored.prediction)
    assert evaluation.rows[0].original_top1 == igstore.store_info(path).top1
    assert len(set(stored.prediction.values)) > 1


def test_weights_that_did_not_make_the_store_are_refused(fixed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(fixed, tmp_path / "copy.zarr")
    metadata = (copy / "zarr.json").read_text()
    sha256 = igstore.store_info(fixed).settings["weights_sha256"]
    (copy / "zarr.json").write_text(metadata.replace(sha256, "0" * 64))
    with pytest.raises(SettingsMismatchError, match=r"sha256 000000000000.*give weights.*yourself: models"):
        evaluate(copy)
    other = igstore.load_classifier("shufflenet_v2_x0_5", "random:2").network
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(SettingsMismatchError, match=r"found are other\.pth"):
        evaluate(fixed, weights=str(tmp_path / "other.pth"))


def test_weights_from_a_file_that_the_store_knows_by_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user says where it is, even where a file of that name lies at hand."""
    file = tmp_path / "trained.pth"
    torch.save(igstore.load_classifier("shufflenet_v2_x0_5", "random:3").network.state_dict(), file)
    preprocessing = Preprocessing(resize=None, crop=(32, 32))
    given = {"weights": str(file), "preprocessing": preprocessing, "n_steps": 1}
    igstore.build_store("shufflenet_v2_x0_5", colours()[:2], tmp_path / "a.zarr", **given)
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"with weights trained\.pth.*give weights"):
        evaluate(tmp_path / "a.zarr")
    [row, *_] = evaluate(tmp_path / "a.zarr", weights=[str(file)]).rows
    assert row.is_own
    assert row.weights == "trained.pth"


def test_a_store_of_a_bare_network_asks_for_models(store: Path) -> None:
    with pytest.raises(UserError, match=r"was made by toy .*cannot be loaded.*yourself: models"):
        evaluate(store)


def test_models_by_name_take_one_weights_each_or_one_for_all(store: Path, tmp_path: Path) -> None:
    files = []
    for seed in (3, 4):
        files.append(str(tmp_path / f"{seed}.pth"))
        torch.save(Pooled(seed=seed).state_dict(), files[-1])
    names = ["test_evaluate:by_name", "test_evaluate:by_name"]
    each = evaluate(store, models=names, weights=files, p=50, order="attribution")
    assert [row.weights for row in each.rows] == ["3.pth", "3.pth", "4.pth", "4.pth"]
    for_all = evaluate(store, models=[classifier(), names[0]], weights=files[1], p=50, order="attribution")
    assert [row.weights for row in for_all.rows] == ["own", "own", *["4.pth"] * 2]
    assert {row.top1 for row in for_all.rows[2:4]} == {row.top1 for row in each.rows[2:]}
    with pytest.raises(
        UserError, match=r"2 models are called test_evaluate:by_name and have the same weights \(sha256"
    ):
        evaluate(store, models=names, weights=files[1], p=50)
    with pytest.raises(UserError, match="2 weights for 1 models"):
        evaluate(store, models=names[:1], weights=files)


class Infinite(Pooled):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"p": 101}, UserError, "p is 101"),
        ({"p": []}, UserError, "p is empty"),
        ({"keep": "middle"}, UserError, "keep is 'middle'"),
        ({"fill": ["black", "pink"]}, UserError, "fill is 'pink'"),
        ({"score": "absolute"}, StoreNotFoundError, "igstore rank .* --score absolute --block 3"),
        ({"limit": 0}, UserError, "limit is 0"),
        ({"batch_size": 0}, UserError, "batch_size is 0"),
        ({"device": "tpu"}, UserError, "device is 'tpu'"),
        ({"models": []}, UserError, r"models is empty"),
        ({"models": [3]}, UserError, r"models is \[3\]; it must be a name"),
        ({"models": ["no_such_model"]}, UserError, "no_such_model"),
        ({"models": [classifier(n_classes=4)]}, UserError, "class index 4, but pooled has 4 classes"),
        (
            {"models": [classifier_from_module(Infinite(), preprocessing=Preprocessing(resize=None, crop=SIZE))]},
            ModelError,
            "not finite",
        ),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_mistakes_are_named(store: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(store, **{"models": [classifier()], **changes})


def test_stores_must_agree_on_labels_and_have_some(store: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other.zarr", 3, labels=[-1, 0, 3])
    with pytest.raises(UserError, match="image_0002 has label 3 in"):
        evaluate([store, other], models=[classifier()])
    unknown = make_store(tmp_path / "unknown.zarr", 3, labels=[-1, -1, -1])
    with pytest.raises(UserError, match=r"no image of .* has a label"):
        evaluate(unknown, models=[classifier()])


# --- The command


def test_the_command_prints_the_tables(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    model = ["--models", "test_evaluate:by_name"]
    assert cli.run(main, [str(own), *model, "--p", "90", "50", "10", "--order", "attribution", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split(".")[0] for line in lines if line.startswith("Table")] == ["Table 1", "Table 2", "Table 3"]
    assert max(map(len, lines)) <= 100
    assert printed.err.splitlines()[-1] == f"results in {out}"
    assert "12/12 images" in printed.err
    [row] = [row for row in read_rows(out) if (row.p, row.keep) == (90, "top")]
    [line] = [line for line in lines if line.startswith("test_evaluate:by_name")][:1]
    assert line.split()[1:3] == [f"{row.original_top1:.1f}", f"{row.top1:.1f}"]


def test_the_command_makes_the_cross_product(own: Path, tmp_path: Path) -> None:
    arguments = "--p 50 --keep top --select mass count --fill black mean --order random --limit 6 --batch-size 4"
    options = [*arguments.split(), "--models", "test_evaluate:by_name", "--out", str(tmp_path / "out"), "--seed", "5"]
    assert cli.run(main, [str(own), *options]) == 0
    rows = read_rows(tmp_path / "out")
    assert [(row.select, row.fill) for row in rows] == [
        ("mass", "black"),
        ("count", "black"),
        ("mass", "mean"),
        ("count", "mean"),
    ]
    assert {(row.order, row.seed, row.n) for row in rows} == {("random", 5, 6)}


def test_the_command_mentions_images_that_are_left_out(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(main.__globals__, "evaluate", stop)  # what comes after the note does not matter here
    with pytest.raises(KeyboardInterrupt):
        main([str(store)])
    assert "1 images that failed and 0 not built" in capsys.readouterr().err


def test_the_command_reports_mistakes_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(main, [str(tmp_path / "none.zarr")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- Real images


def test_real_images_agree_with_the_data_set(imagenet_val: Path, tmp_path: Path) -> None:
    """A real network, real maps: the same predictions as the unaccelerated network on `MaskedImageNet`'s items."""
    path, name = tmp_path / "store.zarr", "shufflenet_v2_x0_5"
    igstore.build_store(name, imagenet_val, path, weights="random:1", n_steps=1, limit=20, shard_size=10)
    evaluation = evaluate(path, p=(70, 30), batch_size=8)
    np.testing.assert_array_equal(evaluation.predictions.unmasked[0], igstore.open_store(path).prediction)
    network = igstore.load_classifier(name, "random:1").network
    for place, cell in enumerate(records(evaluation.predictions, "cell")):
        items = DataLoader(igstore.MaskedImageNet(path, **cell), batch_size=20)
        with torch.no_grad():
            [prediction] = [network(inputs).argmax(dim=1) for inputs, _ in items]
        np.testing.assert_array_equal(evaluation.predictions.prediction[0, place], prediction)
    shares = {(row.keep, row.p): row.visible for row in evaluation.rows if row.order == "attribution"}
    for p in (70.0, 30.0):
        assert shares["top", p] + shares["bottom", p] == pytest.approx(100)
    assert 0 < shares["top", 30.0] < shares["top", 70.0] < 100
    assert len(np.unique(evaluation.predictions.unmasked)) > 1


# --- Rows that are called the same


def test_three_stores_of_one_name_are_three_tables(tmp_path: Path) -> None:
    images = [(f"p{n}", np.random.default_rng(n).integers(0, 256, (*SIZE, 3), np.uint8), n % 5) for n in range(6)]
    paths = []
    for number, settings in enumerate([{}, {"output": "probability"}, {"method": "gausslegendre"}]):
        paths.append(tmp_path / str(number) / "resnet50.zarr")
        igstore.build_store(classifier(), images, paths[-1], n_steps=4, device="cpu", **settings)
    found = evaluate(paths, models=[classifier()], p=[90, 50], order="attribution", out=tmp_path / "out")
    tables = article_tables(found.rows)
    assert [table.title.split(".")[0] for table in tables] == ["Table 1", "Table 2", "Table 3"] * 3
    assert len({table.note.split("; p by")[0] for table in tables}) == 3
    shown = [cell for table in tables if "Table 3" not in table.title for cell in table.groups[0][0][2:]]
    assert len(shown) == len(found.rows) == 12
    assert read_rows(tmp_path / "out") == found.rows


def test_checkpoints_of_one_name_are_lines_of_their_own(store: Path, tmp_path: Path) -> None:
    files = []
    for seed in (3, 4):
        (tmp_path / str(seed)).mkdir()
        files.append(str(tmp_path / str(seed) / "best.pth"))
        torch.save(Pooled(seed=seed).state_dict(), files[-1])
    found = evaluate(store, models=["test_evaluate:by_name"] * 2, weights=files, p=50, order="attribution")
    assert {row.weights for row in found.rows} == {"best.pth"}
    for table in article_tables(found.rows):
        names = [group[0][0] for group in table.groups]
        assert names == [f"test_evaluate:by_name, {row.weights_sha256[:8]}" for row in found.rows[::2]]


def test_a_store_and_its_copy_have_the_same_rows(store: Path, tmp_path: Path) -> None:
    copy = igstore.export_store(make_store(tmp_path / "toy.zarr", N), tmp_path / "copy.zarr")
    with pytest.raises(UserError, match=r"toy.zarr and .*copy.zarr hold the same maps, of the same settings"):
        evaluate([store, copy], models=[classifier()], p=50)
    twice = ["test_evaluate:by_name"] * 2
    assert cli.run(main, [str(store), "--models", *twice]) == cli.MISUSED


def test_networks_are_shown_what_the_store_prepares(store: Path) -> None:
    named = evaluate(store, models=[classifier()], p=50, order="attribution").rows
    for models in ([Pooled().eval()], Pooled().eval(), (Pooled().train(),), classifier()):
        rows = evaluate(store, models=models, p=50, order="attribution").rows
        assert [row.top1 for row in rows] == [row.top1 for row in named]
    layers = nn.Sequential(Pooled(), nn.Identity()).eval()  # itself a sequence of networks
    assert len(evaluate(store, models=layers, p=50, keep="top", order="attribution").rows) == 1
    both = evaluate(store, models=[Pooled(seed=1), Pooled(seed=2)], p=50, keep="top", order="attribution").rows
    assert len({group[0][0] for group in article_tables(both)[0].groups}) == 2


@pytest.mark.parametrize(("p", "named"), [(0.5, "0.5"), ([90, 0.9, 0.1], "0.9, 0.1")], ids=str)
def test_fractions_are_said_to_be_small_percentages(
    store: Path, p: Any, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    several: list[Callable[[], object]] = [
        lambda: evaluate(store, models=[classifier()], p=p, keep="top", order="attribution"),
        lambda: igstore.keep_mask(store, p=p),
        lambda: igstore.masked_view(store, p=p),
        lambda: igstore.show_store(store, p=p),
    ]
    if isinstance(p, float):
        several += [lambda: igstore.MaskedImageNet(store, p=p), lambda: igstore.MaskedImageNet(store).with_mask(p=p)]
    for function in several:
        caplog.clear()
        function()
        assert [record.getMessage() for record in caplog.records] == [
            f"p is a percentage, from 0 to 100, so {named} is less than one percent; one half is 50"
        ]
    caplog.clear()
    igstore.insertion_deletion(store, classifier(), steps=3, device="cpu")
    for fine in (0, 1, 100, 50.5):
        igstore.keep_mask(store, p=fine)
    assert not caplog.records
