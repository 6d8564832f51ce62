"""Class indices of any size, and stores of the first version of the format, whose indices are int16."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from stores import make_store
from torch import nn

import igstore
from igstore import MaskedImageNet, build_store, evaluate, export_store, merge_stores, open_store, verify_store
from igstore.errors import SettingsMismatchError, UserError
from igstore.evaluation import Findings, settings_sha256
from igstore.images import as_image_list
from igstore.info import main as info_main
from igstore.models import Classifier, classifier_from_module
from igstore.schema import FORMAT_VERSION, BuildSpec, Preprocessing
from igstore.storage import StoreReader

SIZE = 6
PREPROCESSING = Preprocessing(resize=None, crop=(SIZE, SIZE))


class Favourite(nn.Module):
    """A classifier of `count` classes whose answer is always one of two: brighter than grey, or not."""

    def __init__(self, count: int, bright: int, dark: int) -> None:
        super().__init__()
        self.count, self.classes = count, (bright, dark)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        brightness = x.mean(dim=(1, 2, 3))
        scores = torch.zeros(len(x), self.count, device=x.device, dtype=x.dtype)
        bright = torch.zeros(self.count).index_fill(0, torch.tensor(self.classes[0]), 1.0)
        dark = torch.zeros(self.count).index_fill(0, torch.tensor(self.classes[1]), 1.0)
        return scores + brightness[:, None] * bright - (brightness[:, None] + 0.1) * dark


def pictures(*labels: int | None) -> list[tuple[str, np.ndarray, int | None]]:
    """Bright, dark, bright ..."""
    levels = [250 if index % 2 == 0 else 20 for index in range(len(labels))]
    return [
        (f"p{n}", np.full((SIZE, SIZE, 3), level, np.uint8), label)
        for n, (level, label) in enumerate(zip(levels, labels, strict=True))
    ]


def favourite(*classes: int, count: int) -> Classifier:
    return classifier_from_module(Favourite(count, *classes), preprocessing=PREPROCESSING)


# Powers of two and their neighbours: where a smaller type would begin anew
@pytest.mark.parametrize(("bright", "dark"), [(32_767, 32_768), (39_999, 7), (65_535, 65_536), (65_543, 131_071)])
def test_every_class_index_is_what_it_is(bright, dark, tmp_path):
    classifier = favourite(bright, dark, count=140_000)
    store, labels = tmp_path / "many.zarr", (bright, dark, bright % 2**15, None, bright % 2**16)
    info = build_store(classifier, pictures(*labels), store, n_steps=1, device="cpu")
    right = [bright, dark, bright, dark, bright]
    known = [label for label in labels if label is not None]
    hits = sum(one == other for one, other in zip(labels, right, strict=True))
    assert info.top1 == pytest.approx(100 * hits / len(known))
    raw = xr.open_zarr(store)
    for name in ("prediction", "target"):
        assert raw[name].values.tolist() == right
    assert raw.label.values.tolist() == [-1 if label is None else label for label in labels]
    assert MaskedImageNet(store, p=0).targets == raw.label.values.tolist()
    assert verify_store(store) == []
    found = evaluate(
        store, models=[classifier], p=0, keep="bottom", order="attribution", out=tmp_path / "out", device="cpu"
    )
    assert (found.rows[0].correct, found.rows[0].n) == (hits, len(known))
    assert found.predictions.prediction.values.ravel().tolist() == right
    [cases] = Findings.read(tmp_path / "out").cases.values()
    by_class = Findings.read(tmp_path / "out").by_class(cases[0], "bottom")
    assert by_class.classes.tolist() == sorted(set(known))
    targets = igstore.insertion_deletion(store, classifier, steps=2, device="cpu").target
    assert targets.values.tolist() == right
    copy = export_store(store, tmp_path / "many.h5", format="hdf5")
    assert StoreReader(copy).scalars("prediction").tolist() == right
    again = export_store(copy, tmp_path / "again.zarr")
    assert StoreReader(again).scalars("label").tolist() == raw.label.values.tolist()


def test_what_does_not_fit_is_refused(tmp_path):
    for label in (2**31, 2**40, -2, -(2**31) - 1):
        with pytest.raises(UserError, match=f"a label is {label}"):
            as_image_list(pictures(label))
    assert as_image_list(pictures(2**31 - 1)).labels.tolist() == [2**31 - 1]
    with pytest.raises(UserError, match="image p0 has class index 9, but the network has 9 classes"):
        build_store(favourite(1, 2, count=9), pictures(9), tmp_path / "nine.zarr", n_steps=1, device="cpu")
    build_store(favourite(65_535, 2, count=65_536), pictures(1, 1), tmp_path / "many.zarr", n_steps=1, device="cpu")
    with pytest.raises(UserError, match="has a class 65535; ViRelAy's go up to 65534"):
        export_store(tmp_path / "many.zarr", tmp_path / "project", format="virelay")
    assert not (tmp_path / "project").exists()


# --- Stores of version 1


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return make_store(tmp_path / "old.zarr", 10, format_version=1)


def test_stores_of_version_1_are_what_they_were(old, tmp_path, capsys):
    new = make_store(tmp_path / "new.zarr", 10)
    one, other = StoreReader(old), StoreReader(new)
    assert (one.spec.format_version, other.spec.format_version) == (1, FORMAT_VERSION)
    assert settings_sha256(one.spec) == settings_sha256(other.spec)
    for name in ("label", "target", "prediction"):
        assert zarr.open_array(old / name, mode="r").dtype == np.int16
        assert zarr.open_array(new / name, mode="r").dtype == np.int32
        assert one.scalars(name).tolist() == other.scalars(name).tolist()
    xr.testing.assert_equal(open_store(old).drop_vars("label").load(), open_store(new).drop_vars("label").load())
    assert MaskedImageNet(old).targets == MaskedImageNet(new).targets
    assert info_main([str(old)]) == 0
    assert "positive-3" in capsys.readouterr().out
    assert {finding.array for finding in verify_store(old)} == {finding.array for finding in verify_store(new)}
    for form in ({"format": "hdf5"}, {"format": "ranks"}, {"compress": "zstd"}):
        copy = StoreReader(export_store(old, tmp_path / f"copy.{form.get('format', 'zarr')}", **form))
        assert copy.spec == one.spec
        assert copy.scalars("label").dtype == np.int16


def settings(**changes: Any) -> dict[str, Any]:
    return {"n_steps": 1, "device": "cpu", "shard_size": 2, "preprocessing": PREPROCESSING} | changes


@pytest.fixture
def as_of_old(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Inside, stores are made as version 1 had them."""
    monkeypatch.setattr("igstore.building.plan.FORMAT_VERSION", 1)
    return monkeypatch


def test_a_build_of_version_1_goes_on_as_such(as_of_old, tmp_path):
    store, network = tmp_path / "old.zarr", Favourite(9, 1, 2)
    build_store(network, pictures(*range(7)), store, limit=3, **settings())
    assert StoreReader(store).spec.format_version == 1
    as_of_old.undo()
    info = build_store(network, pictures(*range(7)), store, **settings())
    assert (info.n_built, StoreReader(store).spec.format_version) == (7, 1)
    assert StoreReader(store).scalars("label").tolist() == list(range(7))
    assert verify_store(store) == []
    (store / "zarr.json").write_text("{}")  # what the records say of it is left
    (store / "target/c/1").write_bytes(b"")
    assert build_store(network, pictures(*range(7)), store, **settings()).n_built == 7
    assert (StoreReader(store).spec.format_version, verify_store(store)) == (1, [])
    build_store(network, pictures(*range(7)), store, overwrite=True, **settings())
    assert StoreReader(store).spec.format_version == FORMAT_VERSION


@pytest.mark.parametrize("what", ["labels", "network"])
def test_large_indices_do_not_go_into_version_1(as_of_old, what, tmp_path):
    store, network = tmp_path / "old.zarr", Favourite(32_769 if what == "network" else 9, 1, 2)
    labels = (0, 40_000) if what == "labels" else (0, 1)
    with pytest.raises(
        UserError, match=r"class indices end at 32767, and there is a class (32768|40000): give overwrite"
    ):
        build_store(network, pictures(*labels), store, **settings())
    assert not store.exists()


def test_parts_of_either_version_become_one_store(as_of_old, tmp_path):
    network, every = Favourite(9, 1, 2), pictures(*range(6))
    build_store(network, every, tmp_path / "one.zarr", part="1/2", **settings())
    as_of_old.undo()
    build_store(network, every, tmp_path / "two.zarr", part="2/2", **settings())
    for first, second in (("one", "two"), ("two", "one")):
        merged = tmp_path / f"{first}.merged.zarr"
        merge_stores([tmp_path / f"{first}.zarr", tmp_path / f"{second}.zarr"], merged)
        assert StoreReader(merged).spec.format_version == FORMAT_VERSION
        assert StoreReader(merged).scalars("prediction").tolist() == [1, 2, 1, 2, 1, 2]
        assert StoreReader(merged).scalars("label").tolist() == list(range(6))
        assert verify_store(merged) == []


def test_settings_of_other_versions(old):
    attributes = StoreReader(old).attributes
    assert BuildSpec.from_attributes(attributes) == dataclasses.replace(StoreReader(old).spec, format_version=1)
    for version in (0, 3, "1", None, True, 1.0):
        with pytest.raises(SettingsMismatchError, match=r"format.version is"):
            BuildSpec.from_attributes(attributes | {"format_version": version})
