from __future__ import annotations

import itertools
import math
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stores import image_ids, make_store
from torch.nn.functional import interpolate
from torchvision.transforms.functional import pil_to_tensor, resize

from igstore.datasets import MaskedBatches, MaskedImageNet, keep_mask, open_store
from igstore.datasets.masked_batches import nearest
from igstore.errors import SettingsMismatchError, StoreNotFoundError, UserError
from igstore.masks import FILLS, FillContext, MaskOptions
from igstore.masks.selection import SELECTIONS
from igstore.models import normalise
from igstore.schema import Preprocessing
from igstore.storage import ImageArray

N = 10
CELLS = [
    MaskOptions(p=p, keep=keep, select=select, fill=fill, order=order, seed=3)
    for p, keep, select, fill, order in itertools.product(
        (0, 40, 100), ("top", "bottom"), SELECTIONS, FILLS, ("attribution", "random")
    )
]
# other sizes, larger, smaller, and so small that blocks are skipped; the same size with another normalisation
NETWORKS = [
    Preprocessing(resize=None, crop=(31, 35), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    Preprocessing(resize=None, crop=(17, 15), mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3)),
    Preprocessing(resize=None, crop=(4, 3), mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3)),
    Preprocessing(resize=12, crop=(23, 26), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images in shards of four, all of them built."""
    rankings = [("positive", 3), ("signed", 5)]
    return make_store(tmp_path_factory.mktemp("batches") / "toy.zarr", N, rankings=rankings)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def items(data: MaskedImageNet) -> torch.Tensor:
    return torch.stack([item for item, *_ in data.__getitems__(range(len(data)))])


def test_every_cell_equals_the_data_set_bit_for_bit(store: Path, device: str) -> None:
    batches = list(MaskedBatches(store, CELLS, batch_size=4, device=device))
    data = MaskedImageNet(store)
    for cell in CELLS:
        found = torch.cat([batch.masked(cell) for batch in batches])
        assert found.device.type == device
        options = {name: getattr(cell, name) for name in MaskOptions.__dataclass_fields__}
        assert torch.equal(found.cpu(), items(data.with_mask(**options))), cell
    unmasked = torch.cat([batch.unmasked() for batch in batches])
    assert torch.equal(unmasked.cpu(), items(data.with_mask(p=0, keep="bottom")))


def test_every_ranking_is_its_own(store: Path) -> None:
    cells = [MaskOptions(p=40, score=score, block=block) for score, block in (("positive", 3), ("signed", 5))]
    (batch,) = MaskedBatches(store, cells)
    for cell in cells:
        expected = items(MaskedImageNet(store, 40, score=cell.score, block=cell.block))
        assert torch.equal(batch.masked(cell), expected)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 64])
def test_batches_are_the_images_in_order(batch_size: int, store: Path) -> None:
    batches = MaskedBatches(store, [], batch_size=batch_size)
    found = list(batches)
    assert len(batches) == len(found) == -(-N // batch_size)
    assert {len(batch) for batch in found[:-1]} <= {batch_size}
    np.testing.assert_array_equal(np.concatenate([batch.images for batch in found]), np.arange(N))
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in found]), open_store(store).label)
    assert torch.equal(torch.cat([batch.unmasked() for batch in found]), items(MaskedImageNet(store, 0)))


def test_each_image_is_read_once_for_all_cells_and_networks(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[str, tuple[int, ...], str]] = []
    read = ImageArray.read

    def noted(self: ImageArray, images: np.ndarray) -> np.ndarray:
        reads.append((self.name, tuple(images), threading.current_thread().name))
        return read(self, images)

    monkeypatch.setattr(ImageArray, "read", noted)
    for batch in MaskedBatches(store, CELLS, networks=NETWORKS, batch_size=4):
        for cell, network in itertools.product(CELLS[:20], NETWORKS):
            batch.masked(cell, network)
            batch.visible(cell)
    names = ["pixels", "ranks/positive-3/rank", "ranks/positive-3/share"]
    runs = [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert sorted((name, run) for name, run, _ in reads) == sorted(itertools.product(names, runs))
    assert all(thread.startswith("batches") for _, _, thread in reads)


def test_the_next_batch_is_read_while_this_one_is_worked_on(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = threading.Event()
    read = ImageArray.read

    def noted(self: ImageArray, images: np.ndarray) -> np.ndarray:
        if 3 in images:
            second.set()
        return read(self, images)

    monkeypatch.setattr(ImageArray, "read", noted)
    batches = iter(MaskedBatches(store, [], batch_size=2))
    next(batches)
    assert second.wait(timeout=30)


def test_the_reading_thread_stops_with_the_loop(store: Path) -> None:
    for _ in MaskedBatches(store, CELLS, batch_size=1):
        break
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_visible_is_the_share_of_pixels_shown(store: Path) -> None:
    (batch,) = MaskedBatches(store, CELLS, networks=NETWORKS)
    for cell in CELLS:
        if cell.fill == "black":
            view = keep_mask(store, cell.p, cell.keep, select=cell.select, order=cell.order, seed=3)
            assert batch.visible(cell).tolist() == view.mean(("y", "x")).values.tolist()


# other sizes


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: str(network.crop))
def test_other_networks_see_resized_pixels_under_the_nearest_mask(
    network: Preprocessing, store: Path, device: str
) -> None:
    ds = open_store(store)
    pixels = ds.pixels.values
    resized = torch.from_numpy(pixels)
    if network.crop != (23, 26):
        pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in pixels]
        resized = torch.stack([pil_to_tensor(resize(picture, list(network.crop))) for picture in pictures])
    (batch,) = MaskedBatches(store, CELLS, networks=NETWORKS, device=device)
    own, own_masked = batch.unmasked(), batch.masked(CELLS[0])
    assert torch.equal(batch.unmasked(network).cpu(), normalise(resized, network))
    context = FillContext(tuple(ds.attrs["mean"]), image_ids(N), 3)
    for cell in CELLS:
        mask = keep_mask(store, cell.p, cell.keep, select=cell.select, order=cell.order, seed=3).values
        nearest_mask = interpolate(torch.from_numpy(mask)[:, None].float(), network.crop, mode="nearest-exact") > 0
        fill = torch.from_numpy(FILLS[cell.fill](resized.numpy(), context))
        expected = normalise(torch.where(nearest_mask, resized, fill), network)
        assert torch.equal(batch.masked(cell, network).cpu(), expected), cell
        visible = batch.visible(cell, network).cpu()
        torch.testing.assert_close(visible, nearest_mask.double().mean((1, 2, 3)), rtol=1e-15, atol=0)
    assert torch.equal(batch.unmasked(), own)
    assert torch.equal(batch.masked(CELLS[0]), own_masked)


@pytest.mark.parametrize(("length", "wanted"), [(224, 299), (299, 224), (224, 240), (224, 224), (5, 2), (2, 5), (1, 7)])
def test_nearest_is_what_the_centre_falls_into(length: int, wanted: int) -> None:
    expected = [math.floor((place + Fraction(1, 2)) * length / wanted) for place in range(wanted)]
    assert nearest(length, wanted).tolist() == expected


# which images, and mistakes


def test_images_are_picked_as_in_the_data_set(tmp_path: Path) -> None:
    path = make_store(tmp_path / "part.zarr", N, shards={0, 2}, failed={3, 9}, pixels=False)
    whole = make_store(tmp_path / "whole.zarr", N)
    where = np.arange(N) != 1
    batches = MaskedBatches(path, [MaskOptions(p=30)], images=whole, where=where, batch_size=2)
    assert [batch.images.tolist() for batch in batches] == [[0, 2], [8]]
    expected = items(MaskedImageNet(path, 30, images=whole, where=where))
    assert torch.equal(torch.cat([batch.masked(MaskOptions(p=30)) for batch in batches]), expected)
    with pytest.raises(UserError, match="made without pixels"):
        MaskedBatches(path, [])


def test_an_error_in_the_reading_thread_comes_out(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise SettingsMismatchError("the disk is gone")

    batches = MaskedBatches(store, [])
    monkeypatch.setattr(ImageArray, "read", fail)
    with pytest.raises(SettingsMismatchError, match="the disk is gone"):
        list(batches)


def test_what_was_not_asked_for_in_advance_is_refused(store: Path) -> None:
    (batch,) = MaskedBatches(store, [MaskOptions()], networks=NETWORKS[:1])
    batch.masked(MaskOptions(p=10, keep="top"))  # the same ranking and fill: there is nothing to read
    for cell in (MaskOptions(fill="mean"), MaskOptions(order="random"), MaskOptions(score="signed", block=5)):
        with pytest.raises(UserError, match="none of the cells that MaskedBatches was given needs"):
            batch.masked(cell)
    for ask in (batch.unmasked, lambda network: batch.masked(MaskOptions(), network)):
        with pytest.raises(UserError, match="not among the networks"):
            ask(NETWORKS[1])
    with pytest.raises(StoreNotFoundError, match="igstore rank"):
        MaskedBatches(store, [MaskOptions(block=9)])
    with pytest.raises(UserError, match="batch_size is 0"):
        MaskedBatches(store, [], batch_size=0)
