from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import zarr
from PIL import Image
from stores import CLASS_NAMES, WNIDS, image_ids, make_store, recompute
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler
from torchvision.transforms import Compose, Normalize, ToTensor

from igstore.datasets import MaskedBatches, MaskedImageNet, masked_view, open_store
from igstore.errors import SettingsMismatchError, StoreNotFoundError, UserError
from igstore.images import as_image_list
from igstore.machine import freed_memory
from igstore.masks import MaskOptions, options
from igstore.models import look_up, normalisation_table, normalise
from igstore.schema import Preprocessing
from igstore.storage import StoreReader

N = 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

pytestmark = [
    # with zarr's own thread running, Python 3.12 warns of every fork
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images in shards of four, all of them built."""
    return make_store(tmp_path_factory.mktemp("dataset") / "toy.zarr", N, rankings=[("positive", 3), ("absolute", 3)])


@pytest.fixture(scope="module")
def partial_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards 0 and 2 of three; images 3 and 9 failed."""
    return make_store(tmp_path_factory.mktemp("dataset") / "part.zarr", N, shards={0, 2}, failed={3, 9})


def expected_items(path: Path, p: float = 50, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs (image, 3, y, x), labels and masks (image, y, x) of a whole store, from zarr, NumPy and torchvision."""
    pixels, masks = zip(*(recompute(path, image, p, **options) for image in range(N)), strict=True)
    transform = Compose([ToTensor(), Normalize(MEAN, STD)])
    inputs = [transform(Image.fromarray(image.transpose(1, 2, 0))) for image in pixels]
    labels = zarr.open_array(path / "label", mode="r")[:].astype(np.int64)
    return torch.stack(inputs), torch.from_numpy(labels), torch.from_numpy(np.stack(masks))


def collect(loader: DataLoader) -> list[torch.Tensor]:
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


def assert_same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# items


@pytest.mark.parametrize("keep", ["top", "bottom"])
@pytest.mark.parametrize("p", [0, 30, 50, 100])
def test_items_are_those_of_a_recomputation(p: float, keep: str, store: Path) -> None:
    data = MaskedImageNet(store, p, keep, return_mask=True)
    inputs, labels, masks = expected_items(store, p, keep=keep)
    assert len(data) == N
    for image in range(N):
        item, label, mask = data[image]
        assert (item.dtype, item.shape) == (torch.float32, (3, 23, 26))
        assert (type(label), mask.dtype) == (int, torch.bool)
        assert label == labels[image]
        assert_same([item, mask], [inputs[image], masks[image]])


@pytest.mark.parametrize("start", ["none", "fork", "forkserver", "spawn"])
def test_data_loaders_give_the_recomputation_bit_for_bit(start: str, store: Path) -> None:
    data = MaskedImageNet(store, p=50, keep="bottom", return_mask=True)
    data[0]  # opens the store in this process, too
    workers = {} if start == "none" else {"num_workers": 2, "multiprocessing_context": start}
    assert_same(collect(DataLoader(data, batch_size=3, **workers)), expected_items(store))


def test_persistent_workers_and_two_loaders_at_once(store: Path) -> None:
    settings = {"batch_size": 2, "num_workers": 2, "persistent_workers": True, "multiprocessing_context": "fork"}
    # random order and noise look image ids up, which are not memory-mapped but read by zarr
    one = DataLoader(MaskedImageNet(store, 50, order="random", fill="noise"), **settings)
    other = DataLoader(MaskedImageNet(store, 30, "top"), **settings)
    expected = [
        torch.cat([MaskedImageNet(store, 50, order="random", fill="noise")[image][0][None] for image in range(N)]),
        expected_items(store, 30, keep="top")[0],
    ]
    for _ in range(2):
        batches = [(first[0], second[0]) for first, second in zip(one, other, strict=True)]
        assert_same([torch.cat(parts) for parts in zip(*batches, strict=True)], expected)


def test_reading_many_is_reading_each(store: Path) -> None:
    data = MaskedImageNet(store, 50)
    inputs, labels, _ = expected_items(store, 50)
    order = [7, 0, 0, -1, np.int64(4), 2]
    many = data.__getitems__(order)
    assert isinstance(many, list)
    for (item, label), position in zip(many, order, strict=True):
        assert_same([item], [inputs[position]])
        assert label == labels[position]
    assert data.__getitems__([]) == []
    assert_same(data[-1][:1], data[N - 1][:1])


@pytest.mark.parametrize("position", [N, -N - 1])
def test_there_is_no_such_item(position: int, store: Path) -> None:
    with pytest.raises(IndexError):
        MaskedImageNet(store)[position]
    with pytest.raises(TypeError):
        MaskedImageNet(store)[1.5]


def test_iteration_ends(store: Path) -> None:
    assert [label for _, label in MaskedImageNet(store)] == open_store(store).label.values.tolist()


def test_subsets_and_distributed_samplers(store: Path) -> None:
    data = MaskedImageNet(store, 50)
    inputs, labels, _ = expected_items(store)
    assert_same(collect(DataLoader(Subset(data, [8, 1, 5]), batch_size=2)), [inputs[[8, 1, 5]], labels[[8, 1, 5]]])
    for rank in range(2):
        sampler = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
        assert_same(collect(DataLoader(data, batch_size=2, sampler=sampler)), [inputs[rank::2], labels[rank::2]])


# processes


def test_it_pickles_small_and_opens_again(tmp_path: Path) -> None:
    path = make_store(tmp_path / "toy.zarr", N, class_names=(), wnids=())
    data = MaskedImageNet(path, 50, return_mask=True)
    data[0]
    pickled = pickle.dumps(data)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    assert_same(again[3], data[3])
    assert repr(again) == repr(data)
    assert len(pickle.dumps(again)) == len(pickled)


def test_a_relative_path_means_the_same_in_every_folder(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    data = pickle.loads(pickle.dumps(MaskedImageNet(store.name)))
    monkeypatch.chdir(tmp_path)
    assert_same(data[3][:1], MaskedImageNet(store)[3][:1])


def test_siblings_share_the_open_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = MaskedImageNet(store, 50, return_mask=True, target_transform=str)
    data[0]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened again")

    expected = {p: MaskedImageNet(store, p, "top", score="absolute")[3][0] for p in (30, 70)}
    monkeypatch.setattr("igstore.storage.reader.StoreReader.__init__", refuse)
    for p, item in expected.items():
        sibling = data.with_mask(p=p, keep="top", score="absolute")
        assert_same([sibling[3][0]], [item])
        assert sibling[3][1] == "2"
    assert data.options.p == 50
    with pytest.raises(UserError, match="p is 130"):
        data.with_mask(p=130)
    with pytest.raises(StoreNotFoundError, match=r"igstore rank .* --score signed --block 3"):
        data.with_mask(score="signed")
    with pytest.raises(TypeError, match="colour"):
        data.with_mask(colour="pink")


# options


def test_normalisation_is_torchvisions_for_every_pixel_value() -> None:
    values = np.arange(256, dtype=np.uint8)
    picture = np.stack([values, values[::-1], np.roll(values, 77)], axis=1).reshape(16, 16, 3)
    for mean, std in ((MEAN, STD), ((127 / 255, 0.5, 0.1), (128 / 255, 0.5, 0.017))):
        preprocessing = Preprocessing(resize=None, crop=(16, 16), mean=mean, std=std)
        expected = Compose([ToTensor(), Normalize(mean, std)])(Image.fromarray(picture))
        pixels = torch.from_numpy(picture.transpose(2, 0, 1).copy())
        assert_same([normalise(pixels, preprocessing)], [expected])
        table = normalisation_table(preprocessing)
        assert_same(look_up(pixels[None], table), [expected])
        assert_same([normalise(pixels.float(), preprocessing)], [expected])
        exact = (picture.transpose(2, 0, 1) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
        torch.testing.assert_close(normalise(pixels.double(), preprocessing), torch.from_numpy(exact))


def test_a_transform_receives_masked_pixels(store: Path) -> None:
    data = MaskedImageNet(store, 50, transform=lambda pixels: pixels, target_transform=lambda label: label * 10)
    for image in range(N):
        pixels, label = data[image]
        assert pixels.dtype == torch.uint8
        np.testing.assert_array_equal(pixels, recompute(store, image, 50)[0])
        assert label == 10 * MaskedImageNet(store)[image][1]


@pytest.mark.parametrize(
    "options",
    [
        {"select": "count"},
        {"fill": "mean"},
        {"fill": "noise", "seed": 3},
        {"order": "random", "seed": 3},
        {"score": "absolute"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_options_mean_what_they_do_in_views(options: dict[str, Any], store: Path) -> None:
    data = MaskedImageNet(store, 40, "top", transform=lambda pixels: pixels, **options)
    np.testing.assert_array_equal(torch.stack([pixels for pixels, _ in data]), masked_view(store, 40, "top", **options))


def test_classes_as_torchvision_has_them(store: Path) -> None:
    data = MaskedImageNet(store)
    assert data.classes == list(CLASS_NAMES)
    assert data.wnids == list(WNIDS)
    assert data.class_to_idx == {name: index for names in (CLASS_NAMES, WNIDS) for index, name in enumerate(names)}
    assert data.targets == [-1, 0, 1, 2, 3, 4, -1, 0, 1, 2]
    assert data.targets == [label for _, label in data]


def test_two_classes_of_one_name(tmp_path: Path) -> None:
    path = make_store(tmp_path / "toy.zarr", 4, class_names=("crane", "bee", "crane", "dog", "eel"))
    data = MaskedImageNet(path)
    assert data.class_to_idx["crane"] == 0
    assert data.class_to_idx[WNIDS[2]] == 2
    assert len(data.classes) == 5


def test_where_picks_images(store: Path) -> None:
    ds = open_store(store)
    chosen = np.zeros(N, bool)
    chosen[[2, 3, 8]] = True
    inputs, labels, _ = expected_items(store)
    for where in (chosen, chosen.tolist(), (ds.label == 2) | (ds.label == 1)):
        data = MaskedImageNet(store, where=where)
        picked = data.indices
        np.testing.assert_array_equal(picked, np.flatnonzero(where))
        assert_same(collect(DataLoader(data, batch_size=2)), [inputs[picked], labels[picked]])
        assert data.targets == labels[picked].tolist()
        assert len(data.with_mask(p=30)) == len(picked)
    assert len(MaskedImageNet(store, where=np.zeros(N, bool))) == 0


@pytest.mark.parametrize(
    "where",
    [np.ones(N - 1, bool), np.ones((N, 1), bool), np.arange(N), [2, 3], True],
    ids=["short", "two dimensions", "numbers", "few numbers", "no array"],
)
def test_where_is_one_bool_an_image(where: Any, store: Path) -> None:
    with pytest.raises(UserError, match=r"it must be bool of shape \(10,\)"):
        MaskedImageNet(store, where=where)


def test_what_is_not_built_or_failed_is_left_out(partial_store: Path) -> None:
    data = MaskedImageNet(partial_store, 30, transform=lambda pixels: pixels)
    assert data.indices.tolist() == [0, 1, 2, 8]
    for image, (pixels, label) in zip([0, 1, 2, 8], data, strict=True):
        np.testing.assert_array_equal(pixels, recompute(partial_store, image, 30)[0])
        assert label == image % 6 - 1
    assert "Number of datapoints: 4\n" in repr(data)
    assert "Left out: 2 failed, 4 not built" in repr(data)
    picked = MaskedImageNet(partial_store, where=np.arange(N) > 1)
    assert picked.indices.tolist() == [2, 8]


def test_repr_says_what_it_is(store: Path) -> None:
    data = MaskedImageNet(store, 30, "top", fill="noise", seed=4, order="random", transform=ToTensor())
    assert repr(data) == (
        "Dataset MaskedImageNet\n"
        "    Number of datapoints: 10\n"
        f"    Root location: {store}\n"
        "    Mask: keep top, p=30 by mass, positive score of 3x3 blocks, fill noise, random order, seed 4\n"
        "    Made by: toy, weights own\n"
        "    Transform: ToTensor()"
    )
    assert "seed" not in repr(MaskedImageNet(store))


# mistakes


def test_mistakes_are_told_at_once(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"p is 101; it must be a number from 0 to 100"):
        MaskedImageNet(store, 101)
    with pytest.raises(UserError, match="keep is 'left'; it must be one of top, bottom"):
        MaskedImageNet(store, keep="left")
    with pytest.raises(StoreNotFoundError, match="igstore build"):
        MaskedImageNet(tmp_path / "missing.zarr")
    with pytest.raises(StoreNotFoundError, match=r"no ranking positive-7 .*igstore rank .* --block 7"):
        MaskedImageNet(store, block=7)
    zarr.create_group(tmp_path / "foreign.zarr")
    with pytest.raises(SettingsMismatchError, match="not a store made by igstore"):
        MaskedImageNet(tmp_path / "foreign.zarr")


def test_where_with_names_goes_by_them(store: Path, partial_store: Path) -> None:
    ds = open_store(store)
    chosen = ds.label == 2
    ids = ds.image.values[chosen.values].tolist()
    order = np.random.default_rng(3).permutation(N)
    column = pd.Series(chosen.values, index=ds.image.values)
    named = [chosen, chosen[order], ds.isel(image=order).label == 2, column, column.iloc[order], column.sort_values()]
    for where in named:
        data = MaskedImageNet(store, where=where)
        assert [StoreReader(store).image_ids[image] for image in data.indices] == ids
        assert set(data.targets) == {2}
        batches = MaskedBatches(store, [MaskOptions()], where=where)
        assert np.concatenate([batch.labels for batch in batches]).tolist() == data.targets
    plain = pd.Series(chosen.values)
    assert MaskedImageNet(store, where=plain).indices.tolist() == np.flatnonzero(chosen).tolist()
    # a view has only the images that are built, which are all that matter
    view = masked_view(partial_store, p=50)
    assert MaskedImageNet(partial_store, where=view.label == 1).targets == [1] * int((view.label == 1).sum())


@pytest.mark.parametrize("kind", ["shuffled rows", "other images", "images twice", "some images"])
def test_where_that_names_other_images(kind: str, store: Path) -> None:
    ids = open_store(store).image.values.tolist()
    index: Any = {
        "shuffled rows": list(range(N))[::-1],
        "other images": [*ids[:-1], "image_9999"],
        "images twice": [*ids[:-1], ids[0]],
        "some images": ids[:-1],
    }[kind]
    column = pd.Series(np.ones(len(index), bool), index=index)
    with pytest.raises(UserError, match=r"where names .*must be the store's image ids, such as 'image_0000'"):
        MaskedImageNet(store, where=column)
    if kind != "shuffled rows":
        with pytest.raises(UserError, match="where names"):
            MaskedImageNet(store, where=xr.DataArray(column.values, {"image": index}, "image"))


def test_pixels_from_elsewhere(store: Path, tmp_path: Path) -> None:
    pictures = [
        (name, Image.fromarray(np.moveaxis(open_store(store).pixels[image].values, 0, 2)), None)
        for image, name in enumerate(image_ids(N))
    ]
    listed = as_image_list(pictures)
    settings = {"labels": [-1] * N, "pixels": False, "images_fingerprint": listed.fingerprint}
    thin = make_store(tmp_path / "thin.zarr", N, **settings)
    with pytest.raises(UserError, match="made without pixels; give images=PATH"):
        MaskedImageNet(thin)
    with pytest.raises(SettingsMismatchError, match="are not the images"):
        MaskedImageNet(thin, images=store)
    expected = expected_items(store)[0]
    data = pickle.loads(pickle.dumps(MaskedImageNet(thin, images=listed)))
    assert_same(torch.stack([item for item, _ in data]), expected)
    other = make_store(tmp_path / "other.zarr", N, pixels=False)
    for images in (store, StoreReader(store)):
        data = MaskedImageNet(other, images=images)
        loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork")
        assert_same(collect(loader)[0], expected)
        assert len(pickle.dumps(data)) < 2000


# what is done once


def test_options_are_checked_once(store, monkeypatch):
    dataset = MaskedImageNet(store, 30, "top")
    expected = dataset[3][0]
    for check in ("check_choice", "check_block", "whole_number"):
        monkeypatch.delattr(options, check)
    assert torch.equal(dataset[3][0], expected)
    with pytest.raises(NameError):
        dataset.with_mask(p=50)


def test_a_process_is_told_once_to_keep_freed_memory(store, monkeypatch):
    monkeypatch.setattr(freed_memory, "_thresholds", (32 << 20, 64 << 20))
    calls = []
    set_thresholds = freed_memory._set_thresholds
    monkeypatch.setattr(freed_memory, "_set_thresholds", lambda **kept: calls.append(kept) or set_thresholds(**kept))
    dataset = MaskedImageNet(store)
    for _ in range(3):
        dataset.__getitems__([0, 1])
    assert calls == [{"mmap": 2**29, "trim": 2**29}]
    with freed_memory.freed_memory_kept():  # which restores what was kept before
        pass
    dataset.__getitems__([2])
    assert len(calls) == 3
