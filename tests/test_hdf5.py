"""A store as one HDF5 file: what igstore, h5py and xarray read from it, and what it refuses."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from stores import make_store, mapped_file
from torch.utils.data import DataLoader

from igstore import MaskedImageNet, export_store, keep_mask, masked_view, open_store
from igstore.building import rank_store
from igstore.errors import DamagedStoreError, IgstoreError, StoreNotFoundError, UserError
from igstore.info import store_info
from igstore.storage import StoreReader
from igstore.verify import verify_store

N, SHARD = 10, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rankings = (("positive", 3), ("absolute", 4))
    return make_store(tmp_path_factory.mktemp("zarr") / "toy.zarr", N, failed=(5,), rankings=rankings)


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return export_store(folder, folder.with_suffix(".h5"), format="hdf5")


@pytest.fixture
def copy(file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(file, tmp_path / "copy.h5"))


def test_igstore_reads_the_same_from_both(folder: Path, file: Path) -> None:
    xr.testing.assert_identical(open_store(file).compute(), open_store(folder).compute())
    np.testing.assert_array_equal(masked_view(file, p=[70, 30]), masked_view(folder, p=[70, 30]))
    np.testing.assert_array_equal(
        keep_mask(file, score="absolute", block=4), keep_mask(folder, score="absolute", block=4)
    )
    here, there = store_info(folder), store_info(file)
    assert (here.failed, here.top1, here.rankings) == (there.failed, there.top1, there.rankings)


def test_other_programs_read_it(folder: Path, file: Path) -> None:
    group = zarr.open_group(folder, mode="r")
    with h5py.File(file) as opened:
        for name in ("attribution", "pixels", "scale", "ranks/positive-3/share"):
            np.testing.assert_array_equal(opened[name][:], group[name][:])
        assert [text.decode() for text in opened["image_id"]] == group["image_id"][:].tolist()
        assert opened.attrs["model"] == "toy"
    ours = xr.open_zarr(folder, consolidated=True)
    theirs = xr.open_dataset(file, engine="h5netcdf")
    for name in ("attribution", "label", "status"):
        assert theirs[name].dims == ours[name].dims
        np.testing.assert_array_equal(theirs[name], ours[name])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_many_workers_read_it(folder: Path, file: Path, start: str) -> None:
    data = MaskedImageNet(file)
    expected = torch.stack([image for image, _ in MaskedImageNet(folder)])
    assert torch.equal(data[0][0], expected[0])
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=start)
    assert torch.equal(torch.cat([images for images, _ in loader]), expected)
    assert len(pickle.dumps(data)) < 5000


def test_images_are_mapped(file: Path) -> None:
    shard = StoreReader(file).array("pixels").shard(2)
    assert mapped_file(shard) == str(file)
    assert len(shard) == N - 2 * SHARD


def test_it_lends_its_pixels(folder: Path, file: Path, tmp_path: Path) -> None:
    thin = make_store(tmp_path / "thin.zarr", N, failed=(5,), pixels=False)
    np.testing.assert_array_equal(masked_view(thin, images=file), masked_view(folder))


# damage


@pytest.mark.parametrize("name", ["attribution", "pixels", "scale", "ranks/positive-3/rank"])
def test_a_changed_value_is_found(folder: Path, file: Path, copy: Path, name: str) -> None:
    before = set(verify_store(file))
    with h5py.File(copy, "r+") as opened:
        values = opened[name][6]
        opened[name][6] = values + np.ones_like(values)
    [finding] = {found for found in verify_store(copy) if "has changed" in str(found)} - before
    assert (finding.shard, finding.array) == (1, name)


def test_changed_attributes_are_found(copy: Path) -> None:
    with h5py.File(copy, "r+") as opened:
        opened.attrs["igstore"] = opened.attrs["igstore"].replace('"own"', '"others"')
    assert any("attributes that have changed" in str(finding) for finding in verify_store(copy))


def test_a_shard_without_its_record_is_not_read(copy: Path) -> None:
    with h5py.File(copy, "r+") as opened:
        opened["records/build"][1] = ""
    store = StoreReader(copy)
    assert store.missing_shards == [1]
    with pytest.raises(DamagedStoreError, match=r"shard 1 of pixels .* is not finished"):
        store.array("pixels").read([4])


# what it refuses


def test_what_needs_a_folder_says_so(file: Path) -> None:
    with pytest.raises(UserError, match=f"igstore export {file} FOLDER"):
        rank_store(file, score="signed")


@pytest.mark.parametrize("content", [b"", b"text", b"\x89HDF\r\n\x1a\n" + bytes(100)], ids=["empty", "text", "broken"])
def test_what_is_no_store(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.h5"
    path.write_bytes(content)
    with pytest.raises(IgstoreError):
        StoreReader(path)


def test_a_truncated_file(copy: Path) -> None:
    copy.write_bytes(copy.read_bytes()[:5000])
    with pytest.raises(DamagedStoreError):
        StoreReader(copy)


def relink(opened: h5py.File, link: object) -> None:
    del opened["pixels"]
    opened["pixels"] = link


HOSTILE = {
    "another file": lambda opened: relink(opened, h5py.ExternalLink("secret.h5", "/pixels")),
    "a link": lambda opened: relink(opened, h5py.SoftLink("/attribution")),
    "bytes of another file": lambda opened: (
        opened.pop("pixels"),
        opened.create_dataset("pixels", (N, 3, 23, 26), "u1", external=[("secret", 0, N * 3 * 23 * 26)]),
    ),
    "chunks": lambda opened: (opened.pop("pixels"), opened.create_dataset("pixels", (N, 3, 23, 26), "u1", chunks=True)),
    "nothing written": lambda opened: (opened.pop("pixels"), opened.create_dataset("pixels", (N, 3, 23, 26), "u1")),
    "another shape": lambda opened: (
        opened.pop("pixels"),
        opened.create_dataset("pixels", data=np.zeros((N, 3, 5, 5), "u1")),
    ),
    "another dtype": lambda opened: (
        opened.pop("pixels"),
        opened.create_dataset("pixels", data=np.zeros((N, 3, 23, 26), "f4")),
    ),
    "no pixels": lambda opened: opened.pop("pixels"),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_an_untrusted_file(copy: Path, make) -> None:
    shutil.copy(copy, copy.with_name("secret.h5"))
    copy.with_name("secret").write_bytes(bytes(N * 3 * 23 * 26))
    with h5py.File(copy, "r+") as opened:
        make(opened)
    with pytest.raises((DamagedStoreError, StoreNotFoundError)):
        StoreReader(copy).array("pixels").read([0])


@pytest.mark.parametrize("n_images", [0, -1, 10**12, "10", None])
def test_a_file_that_lists_more_than_it_has(copy: Path, n_images: object) -> None:
    with h5py.File(copy, "r+") as opened:
        attributes = json.loads(opened.attrs["igstore"]) | {"n_images": n_images}
        opened.attrs["igstore"] = json.dumps(attributes)
    with pytest.raises(DamagedStoreError, match="says that it lists"):
        StoreReader(copy)


def test_records_and_names_that_are_no_texts(copy: Path) -> None:
    with h5py.File(copy, "r+") as opened:
        del opened["records/build"]
        opened["records/build"] = np.arange(3)
    with pytest.raises(DamagedStoreError, match="no texts"):
        _ = StoreReader(copy).status
    with h5py.File(copy, "r+") as opened:
        ids = opened["image_id"]
        ids[1] = b"\xff\xfe"
    with pytest.raises(DamagedStoreError, match="UnicodeDecodeError"):
        _ = StoreReader(copy).image_ids
    assert "cannot be read" in StoreReader(copy).form.problem("image_id/c/0", {})
