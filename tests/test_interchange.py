"""Exports for Quantus and ViRelAy: shapes and values, and the programs themselves where they are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from stores import CLASS_NAMES, WNIDS, image_ids, make_store
from test_curves import Patterns, classifier

from igstore import cli, export_store
from igstore.errors import UserError
from igstore.export import main
from igstore.models import normalisation_table
from igstore.schema import Preprocessing
from igstore.storage.interchange import normalised_values

N, FAILED, SIZE = 10, 5, (23, 26)
BUILT = [index for index in range(N) if index != FAILED]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)


@pytest.fixture(scope="module", params=["sum", "none"], ids=["one channel", "three channels"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images in shards of four, number 5 failed, every sixth without a label."""
    path = tmp_path_factory.mktemp("stores") / "toy.zarr"
    rankings = [("positive", 3)]
    return make_store(path, N, failed=[FAILED], mean=MEAN, std=STD, reduce=request.param, rankings=rankings)


def stored(store: Path, name: str) -> np.ndarray:
    return np.asarray(zarr.open_array(store / name, mode="r")[:])[BUILT]


def maps_of(store: Path) -> np.ndarray:
    """float64 (image, 1 or channel, y, x)."""
    maps = stored(store, "attribution").astype(np.float64)
    maps = maps if maps.ndim == 4 else maps[:, None]
    return maps * stored(store, "scale").reshape(-1, 1, 1, 1)


# --- Quantus


@pytest.fixture(scope="module")
def batches(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = export_store(store, tmp_path_factory.mktemp("quantus") / "out", format="quantus")
    return {f"{key}_batch": np.asarray(np.load(folder / f"{key}_batch.npy", mmap_mode="r")) for key in "xya"}


def test_quantus_batches(store, batches):
    maps = maps_of(store)
    assert {name: (values.dtype.name, values.shape) for name, values in batches.items()} == {
        "x_batch": ("float32", (N - 1, 3, *SIZE)),
        "y_batch": ("int64", (N - 1,)),
        "a_batch": ("float32", (N - 1, maps.shape[1], *SIZE)),
    }
    np.testing.assert_array_equal(batches["a_batch"], maps)
    np.testing.assert_array_equal(batches["y_batch"], stored(store, "target"))
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (MEAN, STD))
    np.testing.assert_allclose(batches["x_batch"], (stored(store, "pixels") / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_pixels_are_normalised_bit_for_bit():
    for mean, std in (
        (MEAN, STD),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((127 / 255,) * 3, (128 / 255,) * 3),
    ):
        preprocessing = Preprocessing(resize=None, crop=SIZE, mean=mean, std=std)
        np.testing.assert_array_equal(normalised_values(preprocessing), normalisation_table(preprocessing).numpy())


def test_quantus_ids_and_settings(store, tmp_path):
    folder = export_store(store, tmp_path / "out", format="quantus")
    assert (folder / "image_ids.txt").read_text().splitlines() == [image_ids(N)[index] for index in BUILT]
    assert json.loads((folder / "settings.json").read_text())["model"] == "toy"


def test_quantus_metrics_take_them(batches):
    quantus = pytest.importorskip("quantus")
    options: dict[str, Any] = {"disable_warnings": True, "display_progressbar": False}
    scores = quantus.Sparseness(**options)(model=None, **batches, device="cpu")
    magnitudes = np.sort(np.abs(batches["a_batch"]).reshape(N - 1, -1), axis=1).astype(np.float64)
    magnitudes = magnitudes / magnitudes.max() + 1e-7  # Quantus divides by the batch's largest, and adds a little
    n = magnitudes.shape[1]
    gini = (2 * np.arange(1, n + 1) - n - 1) @ magnitudes.T / (n * magnitudes.sum(axis=1))
    np.testing.assert_allclose(scores, gini, atol=1e-3)
    network = Patterns().eval()
    if batches["a_batch"].shape[1] == 1:
        flipping = quantus.PixelFlipping(features_in_step=46, **options)
        curves = np.array(flipping(model=network, **batches, device="cpu"))  # (image, step)
        assert curves.shape == (N - 1, 3 * SIZE[0] * SIZE[1] // 46)
        assert ((curves > 0) & (curves < 1)).all()


# --- ViRelAy


@pytest.fixture(scope="module")
def project(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_store(store, tmp_path_factory.mktemp("virelay") / "out", format="virelay")


def test_virelay_files(store, project):
    unlabelled = [place for place, index in enumerate(BUILT) if index % 6 == 0]
    with h5py.File(project / "input.h5") as inputs:
        assert set(inputs) == {"data", "label"}
        np.testing.assert_array_equal(inputs["data"], stored(store, "pixels"))
        labels = inputs["label"][:]
    assert labels.dtype == np.uint16  # what ViRelAy takes for the index of a class
    assert (labels[unlabelled] == len(CLASS_NAMES)).all()
    known = np.delete(np.arange(N - 1), unlabelled)
    np.testing.assert_array_equal(labels[known], stored(store, "label")[known])
    with h5py.File(project / "attribution.h5") as attributions:
        assert set(attributions) == {"attribution", "label", "prediction"}
        assert attributions["attribution"].dtype == np.float32
        assert attributions["attribution"].shape == (N - 1, 3, *SIZE)
        # thirds are rounded to float32
        sums, expected = np.sum(attributions["attribution"], axis=1), maps_of(store).sum(axis=1)
        np.testing.assert_allclose(sums, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
        np.testing.assert_array_equal(attributions["label"], stored(store, "target"))
        prediction = attributions["prediction"][:]
    assert prediction.shape == (N - 1, len(CLASS_NAMES) + 1)
    np.testing.assert_array_equal(prediction.argmax(axis=1), stored(store, "prediction"))
    np.testing.assert_array_equal(prediction.sum(axis=1), 1)


def test_virelay_project_and_classes(project):
    described = json.loads((project / "project.yaml").read_text())["project"]
    assert described["dataset"]["type"] == "hdf5"
    assert described["attributions"]["attribution_strategy"] == "predicted_label"
    for path in (described["label_map"], described["dataset"]["path"], *described["attributions"]["sources"]):
        assert (project / path).is_file()
    classes = json.loads((project / "label-map.json").read_text())
    assert [entry["index"] for entry in classes] == list(range(len(CLASS_NAMES) + 1))
    assert [entry["name"] for entry in classes] == [*CLASS_NAMES, "not known"]
    assert [entry["word_net_id"] for entry in classes[:-1]] == list(WNIDS)


def test_classes_without_names_are_numbered(tmp_path):
    path = make_store(tmp_path / "toy.zarr", 3, class_names=(), wnids=(), labels=[2, 0, 1])
    project = export_store(path, tmp_path / "out", format="virelay")
    classes = json.loads((project / "label-map.json").read_text())
    assert [entry["name"] for entry in classes] == ["class 0", "class 1", "class 2", "not known"]


def test_virelay_opens_the_project(store, project):
    model = pytest.importorskip("virelay.model")
    opened = model.Project(str(project / "project.yaml"))
    try:
        for place in (0, 1, N - 2):
            sample, attribution = opened.get_sample(place), opened.get_attribution(place)
            np.testing.assert_array_equal(sample.data, stored(store, "pixels")[place].transpose(1, 2, 0))
            expected = maps_of(store)[place].sum(axis=0)
            np.testing.assert_allclose(attribution.data.sum(axis=2), expected, atol=1e-6 * np.abs(expected).max())
            assert attribution.labels[0].index == stored(store, "target")[place]
            assert attribution.render_heatmap("blue-white-red").shape[:2] == SIZE
    finally:
        opened.close()


# --- Both


@pytest.mark.parametrize("form", ["quantus", "virelay"])
def test_a_store_without_pixels_is_refused(form, tmp_path):
    bare = make_store(tmp_path / "bare.zarr", 4, pixels=False)
    with pytest.raises(UserError, match="has no pixels"):
        export_store(bare, tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["quantus", "virelay"])
def test_a_store_of_failures_is_refused(form, tmp_path):
    failures = make_store(tmp_path / "failures.zarr", 4, failed=range(4))
    with pytest.raises(UserError, match=r"no image of .* is built"):
        export_store(failures, tmp_path / "out", format=form)


@pytest.mark.parametrize("form", ["quantus", "virelay"])
def test_a_store_as_one_hdf5_file_gives_the_same(store, form, tmp_path):
    export_store(store, tmp_path / "store.h5", format="hdf5")
    one, other = (
        export_store(source, tmp_path / f"out{place}", format=form)
        for place, source in enumerate((store, tmp_path / "store.h5"))
    )
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if name.endswith((".npy", ".json", ".txt")):
            assert (one / name).read_bytes() == (other / name).read_bytes()


def test_the_command(store, tmp_path, capsys):
    assert cli.run(main, [str(store), str(tmp_path / "out"), "--format", "quantus"]) == cli.DONE
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert (tmp_path / "out" / "a_batch.npy").is_file()


def test_a_network_says_the_same_of_the_batches(store, batches):
    """Normalised as the model wants them: what igstore itself shows it gives the same outputs."""
    model = classifier(Patterns())
    from igstore.datasets import MaskedImageNet

    data = MaskedImageNet(store, p=0, keep="bottom")
    shown = torch.stack([image for image, *_ in data.__getitems__(range(len(data)))])
    assert torch.equal(model.network(shown), model.network(torch.from_numpy(np.array(batches["x_batch"]))))
