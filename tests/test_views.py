from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from PIL import Image
from stores import CLASS_NAMES, WNIDS, image_ids, make_store, recompute

from igstore.building import rank_store
from igstore.datasets import keep_mask, masked_view, open_store
from igstore.errors import (
    DamagedStoreError,
    DataNotFoundError,
    ImageError,
    SettingsMismatchError,
    StoreNotFoundError,
    UserError,
)
from igstore.export import export_store
from igstore.images import as_image_list
from igstore.masks import FILLS, FillContext
from igstore.masks.blocks import SCORES
from igstore.masks.selection import SELECTIONS
from igstore.schema import BUILT, FAILED, NOT_BUILT, Keep, Preprocessing
from igstore.storage import ImageArray, StoreReader, finish_store, layout

N = 10
OTHER_RANKINGS = [("positive", 3), ("absolute", 3), ("signed", 3), ("positive", 5)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images in shards of four, all of them built."""
    return make_store(tmp_path_factory.mktemp("views") / "toy.zarr", N, rankings=OTHER_RANKINGS)


@pytest.fixture(scope="module")
def partial_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards 0 and 2 of three; images 3 and 9 failed."""
    return make_store(tmp_path_factory.mktemp("views") / "part.zarr", N, shards={0, 2}, failed={3, 9})


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """(array, images) of every read from now on."""
    made: list[tuple[str, list[int]]] = []
    read = ImageArray.read

    def noted(self: ImageArray, images: np.ndarray) -> np.ndarray:
        made.append((self.name, list(images)))
        return read(self, images)

    monkeypatch.setattr(ImageArray, "read", noted)
    return made


@pytest.fixture
def nothing_computes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reading an image-shaped array, or computing anything with dask, fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed too early")

    monkeypatch.setattr(ImageArray, "read", refuse)
    with dask.config.set(scheduler=refuse):
        yield


# open_store


def test_a_store_opens_with_its_variables_coordinates_and_provenance(store: Path) -> None:
    ds = open_store(store)
    root = zarr.open_group(store, mode="r")
    assert dict(ds.sizes) == {"image": N, "channel": 3, "y": 23, "x": 26}
    assert set(ds.data_vars) == set(layout.variables(StoreReader(store).spec)) - {"image_id", "label"}
    for name in set(ds.data_vars) - {"attribution"}:
        assert ds[name].dtype == root[name].dtype
        np.testing.assert_array_equal(ds[name], root[name][:])
        assert ds[name].attrs["description"]
    assert ds.image.values.tolist() == image_ids(N)
    np.testing.assert_array_equal(ds.label, root["label"][:])
    assert ds.class_name.values.tolist() == ["", *CLASS_NAMES, "", "ant", "bee", "cat"]
    assert ds.wnid.values.tolist() == ["", *WNIDS, "", *WNIDS[:3]]
    of_lists = ("class_names", "wnids")
    expected = {name: value for name, value in root.attrs.items() if name not in of_lists and value is not None}
    assert ds.attrs == expected | {"versions": ""}
    assert ds.attrs["model"] == "toy"


def test_attributions_have_their_true_scale(store: Path) -> None:
    ds, root = open_store(store), zarr.open_group(store, mode="r")
    exact = root["attribution"][:].astype(np.float64) * root["scale"][:].astype(np.float64)[:, None, None]
    assert ds.attribution.dtype == np.float32
    np.testing.assert_array_equal(ds.attribution.values.astype(np.float64), exact)  # exact: scales are powers of two
    assert len(np.unique(ds.scale)) > 3


def test_maps_that_keep_their_channels(tmp_path: Path) -> None:
    path = make_store(tmp_path / "channels.zarr", 5, reduce="none")
    ds, root = open_store(path), zarr.open_group(path, mode="r")
    assert ds.attribution.dims == ("image", "channel", "y", "x")
    exact = root["attribution"][:].astype(np.float64) * root["scale"][:].astype(np.float64)[:, None, None, None]
    np.testing.assert_array_equal(ds.attribution, exact)
    np.testing.assert_array_equal(masked_view(path)[3], recompute(path, 3, 50)[0])


def test_a_store_without_pixels_or_known_classes(tmp_path: Path) -> None:
    path = make_store(tmp_path / "bare.zarr", 5, pixels=False, class_names=(), wnids=())
    ds = open_store(path)
    assert "pixels" not in ds
    assert set(ds.class_name.values) == set(ds.wnid.values) == {""}


def test_what_is_not_built_raises_and_what_failed_is_nan(partial_store: Path) -> None:
    ds = open_store(partial_store)
    assert ds.status.values.tolist() == [BUILT] * 3 + [FAILED] + [NOT_BUILT] * 4 + [BUILT, FAILED]
    for name in ("attribution", "pixels"):
        for image in range(4, 8):
            with pytest.raises(DamagedStoreError, match=f"shard 1 of {name} .* is not finished"):
                ds[name][image].compute()
    built = ds.isel(image=(ds.status == BUILT).values)
    assert built.sizes["image"] == 4
    assert np.isfinite(built.attribution).all()
    assert np.isnan(ds.attribution[[3, 9]]).all()


def test_a_store_opens_from_a_reader_and_a_string(store: Path) -> None:
    xr.testing.assert_identical(open_store(StoreReader(store)), open_store(str(store)))


@pytest.mark.parametrize("function", [open_store, masked_view, keep_mask])
def test_what_is_no_store_is_refused(function, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="igstore build"):
        function(tmp_path / "missing.zarr")
    zarr.create_group(tmp_path / "foreign.zarr")
    with pytest.raises(SettingsMismatchError, match="not a store made by igstore"):
        function(tmp_path / "foreign.zarr")


# laziness

VIEWS = {
    "attribution": lambda path: open_store(path).attribution,
    "pixels": lambda path: open_store(path).pixels,
    "masked_view": masked_view,
    "several p": partial(masked_view, p=[90, 50]),
    "random noise": partial(masked_view, order="random", fill="noise"),
    "keep_mask": keep_mask,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.usefixtures("nothing_computes")
def test_nothing_is_read_before_it_is_asked_for(view, store: Path) -> None:
    lazy = view(store)
    assert isinstance(lazy.data, da.Array)
    repr(lazy)
    picked = lazy.isel(y=slice(2, 9)).sel(image=image_ids(N)[3:5])
    assert picked.sizes["image"] == 2
    assert lazy.isel(image=lazy.label == 2).sizes["image"] == 2
    with pytest.raises(AssertionError, match="too early"):
        picked.compute()
    with pytest.raises(AssertionError, match="too early"), dask.config.set(scheduler="synchronous"):
        picked.compute()


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_one_chunk_a_shard(view, store: Path) -> None:
    lazy = view(store)
    assert lazy.chunksizes["image"] == (4, 4, 2)
    assert lazy.chunksizes["y"] == (23,)
    assert lazy.chunksizes.get("p", (1, 1)) == (1, 1)


PICKS = {
    "number": ("isel", {"image": 6}, [6]),
    "id": ("sel", {"image": "image_0006"}, [6]),
    "slice": ("isel", {"image": slice(5, 7)}, [5, 6]),
    "ids": ("sel", {"image": slice("image_0005", "image_0006")}, [5, 6]),
    "corner": ("isel", {"image": 6, "y": slice(0, 2), "x": 3}, [6]),
    "row": ("isel", {"image": -1, "y": 3}, [9]),
}


@pytest.mark.parametrize(("method", "indexers", "images"), PICKS.values(), ids=PICKS)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_picking_images_reads_those_alone(
    view, method: str, indexers: dict, images: list[int], store: Path, reads: list
) -> None:
    lazy = view(store)
    if "p" in lazy.dims:
        indexers = {"p": 50 if method == "sel" else 1, **indexers}
    picked = getattr(lazy, method)(indexers).compute(scheduler="synchronous")
    assert reads
    assert len({name for name, _ in reads}) == len(reads), "an array was read twice"
    assert [read for _, read in reads] == [images] * len(reads)
    xr.testing.assert_identical(picked, getattr(lazy.compute(), method)(indexers))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_survives_pickling(view, store: Path) -> None:
    lazy = view(store)
    xr.testing.assert_identical(pickle.loads(pickle.dumps(lazy)), lazy.compute())


# masked_view and keep_mask


@pytest.mark.parametrize("p", [0, 30, 50, 99.5, 100])
@pytest.mark.parametrize("keep", get_args(Keep))
@pytest.mark.parametrize("select", SELECTIONS)
def test_masks_are_those_of_a_recomputation(p: float, keep: str, select: str, store: Path) -> None:
    masked = masked_view(store, p, keep, select=select).values
    masks = keep_mask(store, p, keep, select=select).values
    assert masked.dtype == np.uint8
    assert masks.dtype == np.bool_
    for image in range(N):
        pixels, visible = recompute(store, image, p, keep, select=select)
        np.testing.assert_array_equal(masked[image], pixels)
        np.testing.assert_array_equal(masks[image], visible)


@pytest.mark.parametrize(("score", "block"), OTHER_RANKINGS, ids=lambda value: str(value))
def test_every_score_and_block_uses_its_own_ranking(score: str, block: int, store: Path) -> None:
    assert set(SCORES) == {score for score, _ in OTHER_RANKINGS}
    masked = masked_view(store, 40, score=score, block=block).values
    expected = [recompute(store, image, 40, score=score, block=block)[0] for image in range(N)]
    np.testing.assert_array_equal(masked, expected)


@pytest.mark.parametrize("fill", FILLS)
def test_every_fill_is_where_the_mask_is_not(fill: str, store: Path) -> None:
    ds, masks = open_store(store), keep_mask(store, 40).values[:, None]
    pixels = ds.pixels.values
    masked = masked_view(store, 40, fill=fill, seed=7).values
    filled = FILLS[fill](pixels, FillContext(tuple(ds.attrs["mean"]), image_ids(N), 7))
    np.testing.assert_array_equal(masked, np.where(masks, pixels, filled))


def test_the_random_order_shows_as_many_blocks_elsewhere(store: Path) -> None:
    attribution, one, other = (
        keep_mask(store, 40, "top", block=5, order=order, seed=seed).values
        for order, seed in (("attribution", 0), ("random", 0), ("random", 1))
    )
    assert not np.array_equal(one, attribution)
    assert not np.array_equal(one, other)
    corners = (slice(None), slice(0, None, 5), slice(0, None, 5))  # one pixel of each block
    np.testing.assert_array_equal(one[corners].sum((1, 2)), attribution[corners].sum((1, 2)))
    np.testing.assert_array_equal(keep_mask(store, 40, "bottom", block=5, order="random").values, ~one)


def test_several_p_become_a_dimension(store: Path) -> None:
    several = masked_view(store, [90, 50.5, 0])
    assert several.dims == ("p", "image", "channel", "y", "x")
    assert several.p.values.tolist() == [90, 50.5, 0]
    assert "p" not in several.attrs
    for p in (90, 50.5, 0):
        np.testing.assert_array_equal(several.sel(p=p), masked_view(store, p))
    np.testing.assert_array_equal(several[1:, 6], np.stack([masked_view(store, p)[6] for p in (50.5, 0)]))
    assert keep_mask(store, np.array([90, 10])).dims == ("p", "image", "y", "x")
    assert masked_view(store, (50,)).sizes["p"] == 1


def test_a_view_says_what_it_is_of(store: Path) -> None:
    view = masked_view(store, 30, "top", fill="mean")
    assert view.name == "masked"
    assert view.attrs == {
        "store": str(store),
        "model": "toy",
        "weights": "own",
        "p": 30.0,
        "keep": "top",
        "select": "mass",
        "score": "positive",
        "block": 3,
        "fill": "mean",
        "order": "attribution",
        "seed": 0,
    }
    json.dumps(view.attrs)
    assert "fill" not in keep_mask(store).attrs


def test_a_view_has_the_coordinates_of_its_store(store: Path) -> None:
    ds, view = open_store(store), masked_view(store)
    for name in ("image", "label", "wnid", "class_name"):
        xr.testing.assert_identical(view[name].reset_coords(drop=True), ds[name].reset_coords(drop=True))
    assert (ds.pixels - view).sizes == view.sizes  # they align


def test_views_leave_out_what_is_not_built_or_failed(partial_store: Path) -> None:
    view, masks = masked_view(partial_store, 30), keep_mask(partial_store, 30)
    built = [0, 1, 2, 8]
    assert view.image.values.tolist() == masks.image.values.tolist() == [image_ids(N)[image] for image in built]
    assert view.chunksizes["image"] == (3, 1)
    expected = [recompute(partial_store, image, 30) for image in built]
    np.testing.assert_array_equal(view, [pixels for pixels, _ in expected])
    np.testing.assert_array_equal(masks, [visible for _, visible in expected])
    np.testing.assert_array_equal(view.sel(image="image_0008"), expected[3][0])


# labels


def test_images_are_picked_by_label(store: Path) -> None:
    view = masked_view(store)
    np.testing.assert_array_equal(view.isel(image=view.label == 2), view.values[[3, 9]])
    np.testing.assert_array_equal(view[view.label == -1], view.values[[0, 6]])
    np.testing.assert_array_equal(view[view.label.isin([4, 1])], view.values[[2, 5, 8]])
    assert view[view.label == 4].dims == view.dims  # also where there is one image
    assert view.sel(image="image_0003").label == 2
    assert view[view.label == 7].sizes["image"] == 0


# xarray's own operations, on what is lazy and on the same things in memory

OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "reindex": lambda some: some.reindex(image=["image_0003", "image_0001", "nobody"]),
    "reindex_like": lambda some: some.reindex_like(some.isel(image=[4, 2])),
    "align": lambda some: xr.align(some, xr.DataArray([1.0, 2], {"image": ["image_0007", "image_0002"]}, "image"))[0],
    "outer align": lambda some: xr.align(some.isel(image=[1, 2]), some.isel(image=[2, 3]), join="outer")[1],
    "combine_by_coords": lambda some: xr.combine_by_coords(
        [some.isel(image=slice(0, 4)), some.isel(image=slice(4, N))]
    ),
    "concat": lambda some: xr.concat([some.isel(image=slice(4, N)), some.isel(image=slice(0, 4))], "image"),
    "arithmetic": lambda some: some + some.isel(image=[3, 1]),
    "merge": lambda some: xr.merge(
        [some.rename("one"), some.isel(image=[1]).rename("two")], join="left", compat="override"
    ),
    "groupby": lambda some: some.groupby("label").mean(),
    "sortby": lambda some: some.sortby("label"),
    "where": lambda some: some.where(some.label > 1, drop=True),
    "swap_dims": lambda some: some.swap_dims(image="label").sortby("label").sel(label=slice(1, 3)),
    "set_xindex": lambda some: some.set_xindex("label").sel(label=2),
    "rename": lambda some: some.rename(label="class", image="picture"),
    "stack": lambda some: some.stack(pixel=("y", "x")),
    "drop_sel": lambda some: some.drop_sel(image=["image_0000"]),
    "roll": lambda some: some.roll(image=2),
    "expand": lambda some: some.expand_dims(run=[1, 2]),
    "isel by label": lambda some: some.isel(image=some.label == 2),
    "to_dataset": lambda some: some.to_dataset(name="values"),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("view", [VIEWS["attribution"], VIEWS["several p"], keep_mask], ids=["maps", "views", "masks"])
def test_xarray_s_operations_are_as_with_any_array(view, operation, store: Path) -> None:
    lazy = view(store)
    plain = xr.DataArray(
        np.asarray(lazy.values),
        {name: (coordinate.dims, coordinate.values) for name, coordinate in lazy.coords.items()},
        lazy.dims,
        lazy.name,
        lazy.attrs,
    )
    xr.testing.assert_equal(operation(lazy).compute(), operation(plain))


WHOLE: dict[str, Callable[[xr.Dataset], Any]] = {
    "reindex": lambda ds: ds.reindex(image=["image_0003", "image_0001"]),
    "combine_by_coords": lambda ds: xr.combine_by_coords([ds.isel(image=slice(0, 3)), ds.isel(image=slice(3, N))]),
    "align": lambda ds: xr.align(ds, ds.isel(image=[2]), join="inner")[0],
    "groupby": lambda ds: ds[["scale", "output"]].groupby("class_name").mean(),
    "to_dataframe": lambda ds: ds[["scale", "prediction"]].to_dataframe().to_xarray(),
}


@pytest.mark.parametrize("operation", WHOLE.values(), ids=WHOLE)
def test_xarray_s_operations_are_as_with_any_dataset(operation, store: Path) -> None:
    lazy = open_store(store)
    plain = xr.Dataset.from_dict(lazy.to_dict())
    plain = plain.assign({name: variable.astype(lazy[name].dtype) for name, variable in plain.data_vars.items()})
    xr.testing.assert_equal(operation(lazy).compute(), operation(plain))


def test_no_index_but_that_of_ids(store: Path) -> None:
    for lazy in (open_store(store), masked_view(store), keep_mask(store)):
        assert list(lazy.indexes) == ["image"]
        assert lazy.label.dtype == np.int32


@pytest.mark.parametrize("engine", ["h5netcdf", "scipy"])
def test_a_store_becomes_a_netcdf_file(engine: str, store: Path, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    whole = make_store(tmp_path / "whole.zarr", 4, max_error=0.1, max_steps=200)  # as earlier versions could
    exported = export_store(whole, tmp_path / "thin.zarr", format="ranks")
    for number, path in enumerate((store, exported)):
        ds = open_store(path)
        if engine == "scipy":  # netCDF's older form has no bytes above 127
            ds = ds.drop_vars("pixels", errors="ignore")
        file = tmp_path / f"{number}.nc"
        ds.to_netcdf(file, engine=engine)
        with xr.open_dataset(file, engine=engine) as again:
            xr.testing.assert_equal(again.load(), ds.load())
            assert set(again.attrs) == set(ds.attrs)
            for name, value in ds.attrs.items():
                np.testing.assert_array_equal(again.attrs[name], value)
    assert open_store(exported).attrs["omitted"] == "attribution, pixels"
    masked_view(store, p=[90, 50]).astype(np.int16).to_netcdf(tmp_path / "view.nc", engine=engine)
    keep_mask(store).to_netcdf(tmp_path / "mask.nc", engine=engine)


# pixels from elsewhere


@pytest.fixture(scope="module")
def pictures() -> list[tuple[str, Image.Image, int | None]]:
    random = np.random.default_rng(5)
    return [
        (name, Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)), index % 5)
        for index, name in enumerate(image_ids(N))
    ]


@pytest.fixture(scope="module")
def list_store(tmp_path_factory: pytest.TempPathFactory, pictures: list) -> Path:
    """A store without pixels of the list of these pictures."""
    listed = as_image_list(pictures)
    path = tmp_path_factory.mktemp("views") / "list.zarr"
    labels = listed.labels.tolist()
    return make_store(path, N, labels=labels, images_fingerprint=listed.fingerprint, pixels=False)


def test_pixels_from_the_images_themselves(list_store: Path, pictures: list) -> None:
    view = masked_view(list_store, 30, images=as_image_list(pictures))
    np.testing.assert_array_equal(masked_view(list_store, 30, images=pictures), view)
    for image, (_, picture, _) in enumerate(pictures):
        cropped = np.asarray(picture.crop((7, 4, 33, 27))).transpose(2, 0, 1)  # 23x26 of 30x40, half to even
        np.testing.assert_array_equal(view[image], recompute(list_store, image, 30, pixels=cropped)[0])


def test_pixels_from_a_folder(tmp_path: Path, pictures: list) -> None:
    for name, picture, _ in pictures:
        (tmp_path / "pictures").mkdir(exist_ok=True)
        picture.save(tmp_path / "pictures" / f"{name}.png")
    unlabelled = as_image_list([(name, picture, None) for name, picture, _ in pictures])
    settings = {"labels": [-1] * N, "images_fingerprint": unlabelled.fingerprint}
    path = make_store(tmp_path / "toy.zarr", N, pixels=False, **settings)
    expected = masked_view(path, images=unlabelled)
    np.testing.assert_array_equal(masked_view(path, images=str(tmp_path / "pictures")), expected)
    (tmp_path / "pictures" / "image_0003.png").write_bytes(b"no image")
    view = masked_view(path, images=tmp_path / "pictures")
    np.testing.assert_array_equal(view[2], expected[2])
    with pytest.raises(ImageError, match="image_0003: not an image"):
        view[3].compute()
    with pytest.raises(DataNotFoundError, match="does not exist"):
        masked_view(path, images=tmp_path / "elsewhere")


def test_pixels_from_another_store(store: Path, tmp_path: Path) -> None:
    path = make_store(tmp_path / "thin.zarr", N, pixels=False, seed=1)
    expected = [recompute(path, image, 50, pixels=open_store(store).pixels[image].values)[0] for image in range(N)]
    for images in (store, str(store), StoreReader(store)):
        np.testing.assert_array_equal(masked_view(path, images=images), expected)


def test_a_store_without_pixels_says_what_to_give(list_store: Path) -> None:
    with pytest.raises(UserError, match="made without pixels; give images=PATH"):
        masked_view(list_store)
    with pytest.raises(UserError, match="made without pixels; give a store that holds them"):
        masked_view(list_store, images=list_store)
    assert keep_mask(list_store).sizes["image"] == N


def test_other_images_are_refused(list_store: Path, pictures: list, store: Path, tmp_path: Path) -> None:
    relabelled = [*pictures[:-1], (*pictures[-1][:2], 0)]
    with pytest.raises(SettingsMismatchError, match="the 10 images given are not the images"):
        masked_view(list_store, images=relabelled)
    with pytest.raises(SettingsMismatchError, match=r"toy\.zarr are not the images"):
        masked_view(list_store, images=store)
    with pytest.raises(UserError, match="lack 3 images that are built in the store, the first being image 7"):
        masked_view(list_store, images=as_image_list(pictures).head(7))
    with pytest.raises(UserError, match="images is"):
        masked_view(list_store, images=5)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("crop", Preprocessing(resize=None, crop=(26, 23))),
        ("resize", Preprocessing(resize=40, crop=(23, 26))),
        ("interpolation", Preprocessing(resize=None, crop=(23, 26), interpolation="bicubic")),
    ],
)
def test_another_input_is_refused(field: str, other: Preprocessing, store: Path, tmp_path: Path) -> None:
    path = make_store(tmp_path / "other.zarr", N, preprocessing=other)
    with pytest.raises(SettingsMismatchError, match=f"have {field} "):
        masked_view(store, images=path)


def test_another_normalisation_is_not(store: Path, tmp_path: Path) -> None:
    path = make_store(tmp_path / "other.zarr", N, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    np.testing.assert_array_equal(masked_view(store, images=path), masked_view(store))


def test_a_store_of_fewer_images_is_refused(store: Path, partial_store: Path) -> None:
    with pytest.raises(UserError, match="lack 6 images that are built in the store, the first being image 3"):
        masked_view(store, images=partial_store)
    np.testing.assert_array_equal(masked_view(partial_store, images=store), masked_view(partial_store))


# mistakes

MISTAKES = {
    "p": (120, "from 0 to 100"),
    "keep": ("middle", "top, bottom"),
    "select": ("area", "mass, count"),
    "score": ("best", "positive, absolute, signed"),
    "block": (0, "at least 1"),
    "order": ("sorted", "attribution, random"),
    "seed": ("zero", "a whole number"),
    "fill": ("pink", "black, mean"),
}


@pytest.mark.parametrize("option", MISTAKES)
def test_options_that_are_not_allowed(option: str, store: Path) -> None:
    value, message = MISTAKES[option]
    for function in (masked_view,) if option == "fill" else (masked_view, keep_mask):
        with pytest.raises(UserError, match=message) as caught:
            function(store, **{option: value})
        assert repr(value) in str(caught.value)


def test_no_p_at_all(store: Path) -> None:
    with pytest.raises(UserError, match="p is empty"):
        masked_view(store, [])
    with pytest.raises(UserError, match="p is 101"):
        masked_view(store, [50, 101])
    with pytest.raises(UserError, match="p is '50'"):
        masked_view(store, "50")


def test_a_ranking_that_is_not_there(store: Path) -> None:
    with pytest.raises(StoreNotFoundError, match=r"igstore rank .*toy\.zarr --score positive --block 4") as caught:
        keep_mask(store, block=4)
    assert "absolute-3, positive-3, positive-5, signed-3" in str(caught.value)


def test_a_ranking_that_is_behind_its_store(tmp_path: Path) -> None:
    path = make_store(tmp_path / "toy.zarr", N, shards={0})
    assert masked_view(path).sizes["image"] == 4
    other = make_store(tmp_path / "other.zarr", N, rankings=())
    ranks = path / "ranks"
    ranks.rename(other / "ranks")
    (path / "records" / "positive-3").rename(other / "records" / "positive-3")
    finish_store(other, {})
    with pytest.raises(StoreNotFoundError, match=r"lacks 2 of the 3 shards .* `igstore rank .*other\.zarr --score"):
        masked_view(other)
    rank_store(other)
    np.testing.assert_array_equal(masked_view(other)[5], recompute(other, 5, 50)[0])


def test_a_ranking_of_older_maps(tmp_path: Path) -> None:
    path = make_store(tmp_path / "toy.zarr", 4)
    record_path = path / layout.record_file(0)
    record = json.loads(record_path.read_bytes())
    record["files"][layout.shard_file("attribution", 0, 3)]["sha256"] = "1" * 64
    record_path.write_text(json.dumps(record))
    with pytest.raises(StoreNotFoundError, match="or is older than they are; run `igstore rank"):
        keep_mask(path)


def test_nothing_is_built_yet(tmp_path: Path) -> None:
    path = make_store(tmp_path / "empty.zarr", N, shards=(), rankings=())
    assert open_store(path).sizes["image"] == N
    for function in (masked_view, keep_mask):
        with pytest.raises(UserError, match=r"no image of .* is built yet; run `igstore build`"):
            function(path)
