"""What is a whole number is taken as one, whoever's type it is; anything else is refused, and nothing is cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import make_store
from test_many_classes import Favourite, favourite, pictures, settings

from igstore import (
    MaskedBatches,
    MaskedImageNet,
    Preprocessing,
    build_store,
    evaluate,
    import_maps,
    insertion_deletion,
    integrated_gradients,
    keep_mask,
    masked_view,
    rank_store,
    show_store,
    verify_store,
)
from igstore.errors import UserError
from igstore.masks import MaskOptions
from igstore.storage import StoreReader

MODEL = favourite(1, 2, count=5)

# A number's name, the function that takes it, and what is too small for it and too large: None where nothing is
NUMBERS: dict[str, tuple[Any, int | None, int | None]] = {}


def takes(name: str, least: int | None, most: int | None = None) -> Any:
    def register(function: Any) -> Any:
        too_small, too_large = (None if least is None else least - 1), (None if most is None else most + 1)
        NUMBERS[f"{function.__name__} {name}"] = function, too_small, too_large
        return function

    return register


@takes("n_steps", 1, 2**15 - 1)
@takes("shard_size", 1, 2**20)
@takes("batch_size", 1, 2**31 - 1)
@takes("workers", 1, 2**31 - 1)
@takes("limit", 1)
@takes("seed", 0)
def build(store: Path, **number: Any) -> None:
    build_store(Favourite(5, 1, 2), pictures(1, 2, 3), store.parent / "built.zarr", **settings() | number)


@takes("batch_size", 1, 2**31 - 1)
@takes("limit", 1)
def imported(store: Path, **number: Any) -> None:
    maps = np.ones((1 if "limit" in number else 3, 6, 6), np.float32)
    import_maps(maps, MODEL, pictures(1, 2, 3), store.parent / "given.zarr", made_by="hand", device="cpu", **number)


@takes("limit", 1)
@takes("batch_size", 1)
@takes("seed", None, 2**63 - 1)
def evaluation(store: Path, **number: Any) -> None:
    evaluate(store, models=[MODEL], p=50, device="cpu", **number)


@takes("steps", 1, 72)
@takes("limit", 1)
@takes("seed", None, 2**63 - 1)
def curves(store: Path, **number: Any) -> None:
    insertion_deletion(store, MODEL, device="cpu", **{"steps": 2} | number)


@takes("block", 1, 10**9 - 1)
@takes("seed", None, 2**63 - 1)
def mask(store: Path, **number: Any) -> None:
    MaskedImageNet(store, **number)
    masked_view(store, **number)
    keep_mask(store, **number)
    show_store(store, **number)


@takes("batch_size", 1)
def batches(store: Path, **number: Any) -> None:
    next(iter(MaskedBatches(store, [MaskOptions()], **number)))


@takes("block", 1, 10**9 - 1)
def ranks(store: Path, **number: Any) -> None:
    rank_store(store, **number)


@takes("recompute", 0)
def verification(store: Path, **number: Any) -> None:
    verify_store(store.parent / "built.zarr", **number)


@takes("n_steps", 1)
@takes("batch_size", 1)
def gradients(store: Path, **number: Any) -> None:
    inputs = torch.rand(1, 3, 6, 6)
    integrated_gradients(MODEL.network, inputs, torch.zeros_like(inputs), torch.tensor([1]), **{"n_steps": 1} | number)


@takes("resize", 1)
@takes("crop", 1, 2**26)
def preprocessing(store: Path, **number: Any) -> None:
    Preprocessing(**{"crop": 6} | number)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    build(tmp_path / "toy.zarr", n_steps=1, shard_size=2)
    return make_store(tmp_path / "toy.zarr", 5, labels=range(5), rankings=[("positive", block) for block in (1, 3)])


@pytest.mark.parametrize("number", NUMBERS)
def test_whole_numbers_of_any_type_and_nothing_else(number, store):
    function, too_small, too_large = NUMBERS[number]
    name = number.split()[1]
    options = {"overwrite": True} if function in (build, imported) else {}
    if function is not verification:  # which needs a model that is loaded by its name
        for one in (1, np.int64(1), np.uint8(1)):
            function(store, **{name: one} | options)
    wrong = [1.5, 1.0, np.float32(1), True, np.True_, "1", [1], (1, 1, 1), too_small, too_large, -(2**70)]
    for one in wrong:
        if one is not None:
            with pytest.raises(UserError, match=rf"^{name} is "):
                function(store, **{name: one} | options)


def test_what_is_built_with_numpy_s_numbers_is_a_store(tmp_path):
    numbers = {"n_steps": np.int64(2), "shard_size": np.uint16(2), "seed": np.int8(3)}
    build_store(Favourite(5, 1, 2), pictures(1, 2, 3), tmp_path / "one.zarr", **settings() | numbers)
    plain = {"n_steps": 2, "shard_size": 2, "seed": 3}
    build_store(Favourite(5, 1, 2), pictures(1, 2, 3), tmp_path / "one.zarr", **settings() | plain)
    assert verify_store(tmp_path / "one.zarr") == []
    assert StoreReader(tmp_path / "one.zarr").spec.n_steps == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 1.5}, "n_steps is 1.5"),
        ({"n_steps": 2**15}, "n_steps is 32768"),
        ({"pixels": 1}, "pixels is 1; it must be True or False"),
        ({"pixels": "no"}, "pixels is 'no'"),
        ({"baseline": ["black"]}, r"baseline is \['black'\]"),
        ({"target": 3}, "target is 3; it must be one of prediction, label"),
    ],
    ids=str,
)
def test_other_settings_that_are_nothing_of_the_kind(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build_store(Favourite(5, 1, 2), pictures(1, 2), tmp_path / "one.zarr", **settings() | options)
    assert not (tmp_path / "one.zarr").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"crop is \(\)"),
        ({"crop": None}, "crop is None"),
        ({"crop": "56"}, "crop is '56'"),
        ({"crop": (56,)}, r"crop is \(56,\)"),
        ({"crop": (1, 2, 3)}, "crop is"),
        ({"crop": (5.5, 5)}, "crop is"),
        ({"crop": 56, "mean": 0.5}, "mean 0.5 and std"),
        ({"crop": 56, "std": (1, 1)}, r"std \(1, 1\) must be three numbers"),
        ({"crop": 56, "std": (1, 1, 0)}, "std above 0"),
        ({"crop": 56, "mean": ("a", "b", "c")}, "three numbers"),
        ({"crop": 56, "interpolation": 2}, "interpolation is 2"),
    ],
    ids=str,
)
def test_preprocessing_that_is_none(fields, message):
    with pytest.raises(UserError, match=message):
        Preprocessing(**fields)


@pytest.mark.parametrize(
    "crop", [56, (56, 56), [56, 56], np.array([56, 56]), torch.tensor([56, 56]), np.int64(56)], ids=repr
)
def test_every_way_to_give_a_square(crop):
    made = Preprocessing(crop=crop, mean=np.array([0.5] * 3), std=[0.25] * 3)
    assert made == Preprocessing(resize=None, crop=(56, 56), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    assert {type(side) for side in made.crop} == {int}
