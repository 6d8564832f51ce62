"""Maps made elsewhere, here by captum, as stores: held against NumPy, against igstore's own build, and as any store."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import zarr
from captum.attr import IntegratedGradients, Saliency
from PIL import Image
from stores import make_store
from test_curves import Patterns
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

from igstore import (
    build_store,
    cli,
    evaluate,
    import_maps,
    insertion_deletion,
    open_store,
    show_store,
    store_info,
    verify_store,
)
from igstore.building import GivenMaps
from igstore.datasets import MaskedImageNet
from igstore.errors import SettingsMismatchError, UserError
from igstore.evaluation import article_tables
from igstore.images import as_image_list, find_images
from igstore.imported import main
from igstore.models import Classifier, classifier_from_module, normalise
from igstore.schema import BuildSpec, Preprocessing
from igstore.storage import StoreReader

N, SIZE = 7, (23, 26)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
PREPROCESSING = Preprocessing(resize=None, crop=SIZE, mean=MEAN, std=STD)
IDS = [f"picture_{index}" for index in range(N)]


def by_name() -> Classifier:
    """A model that is loaded by the name ``test_import:by_name``."""
    return classifier_from_module(Patterns().eval(), preprocessing=PREPROCESSING, name="test_import:by_name")


def pictures() -> list[tuple[str, np.ndarray, int]]:
    random = np.random.default_rng(0)
    return [(name, random.integers(0, 256, (*SIZE, 3), np.uint8), index % 5) for index, name in enumerate(IDS)]


def explained(method: str) -> np.ndarray:
    """What captum makes of the pictures, for the class that the network predicts: (image, channel, y, x)."""
    network = by_name().network
    pixels = torch.from_numpy(np.stack([array for _, array, _ in pictures()]).transpose(0, 3, 1, 2).copy())
    x, black = (normalise(values, PREPROCESSING) for values in (pixels, torch.zeros_like(pixels)))
    target = network(x).argmax(dim=1)
    if method == "Saliency":
        maps = Saliency(network).attribute(x.requires_grad_(), target=target, abs=False)
    else:
        maps = IntegratedGradients(network).attribute(x, black, target=target, n_steps=8, method="riemann_right")
    return maps.detach().numpy().astype(np.float32)


@pytest.fixture(scope="module", params=["IntegratedGradients", "Saliency"])
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A store of captum's maps, and the maps; shards of 3, 3 and 1 images."""
    folder = tmp_path_factory.mktemp(request.param)
    maps = explained(request.param)
    np.save(folder / "maps.npy", maps)
    store = folder / "maps.zarr"
    import_maps(
        folder / "maps.npy", by_name(), pictures(), store, made_by=f"captum {request.param}", shard_size=3, device="cpu"
    )
    return store, maps


def stored(store: Path, name: str) -> np.ndarray:
    return np.asarray(zarr.open_array(store / name, mode="r")[:])


def test_ranks_are_numpy_s(imported):
    store, maps = imported
    reduced = maps.astype(np.float64).sum(axis=1)
    scale = 2.0 ** np.floor(np.log2(np.abs(reduced).max(axis=(1, 2), keepdims=True)))
    np.testing.assert_array_equal(stored(store, "scale"), scale[:, 0, 0])
    halves = (reduced.astype(np.float32) / scale.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(stored(store, "attribution"), halves)
    positive = halves.astype(np.float64).clip(0)
    starts = [range(0, side, 3) for side in SIZE]
    scores = np.add.reduceat(np.add.reduceat(positive, starts[0], 1), starts[1], 2).reshape(N, -1)
    order = np.argsort(-scores, axis=1, kind="stable")
    ranks = np.argsort(order, axis=1)
    np.testing.assert_array_equal(stored(store, "ranks/positive-3/rank").reshape(N, -1), ranks)


def test_outputs_and_completeness_are_those_of_the_model(imported):
    store, maps = imported
    network = by_name().network
    x = normalise(torch.from_numpy(stored(store, "pixels")), PREPROCESSING)
    with torch.no_grad():
        logits, of_black = network(x), network(normalise(torch.zeros_like(x), PREPROCESSING))
    prediction = logits.argmax(dim=1).numpy()
    np.testing.assert_array_equal(stored(store, "prediction"), prediction)
    np.testing.assert_array_equal(stored(store, "target"), prediction)
    for name, values in (("output", logits), ("baseline_output", of_black)):
        np.testing.assert_allclose(stored(store, name), values.numpy()[np.arange(N), prediction], rtol=1e-4, atol=1e-5)
    difference = stored(store, "output").astype(np.float64) - stored(store, "baseline_output")
    error = np.abs(maps.sum(axis=(1, 2, 3), dtype=np.float64) - difference) / np.abs(difference)
    np.testing.assert_allclose(stored(store, "completeness_error"), error, rtol=1e-3)
    assert (stored(store, "n_steps") == 0).all()


def test_captum_s_integrated_gradients_are_as_if_built_here(tmp_path):
    maps = explained("IntegratedGradients")
    import_maps(maps, by_name(), pictures(), tmp_path / "imported.zarr", made_by="captum", device="cpu")
    build_store(by_name(), pictures(), tmp_path / "built.zarr", n_steps=8, device="cpu")
    one, other = (StoreReader(tmp_path / f"{name}.zarr") for name in ("imported", "built"))
    for name in ("prediction", "target", "label", "status", "image_id"):
        np.testing.assert_array_equal(one.scalars(name), other.scalars(name))
    for name in ("output", "baseline_output"):
        np.testing.assert_allclose(one.scalars(name), other.scalars(name), rtol=1e-5, atol=1e-5)
    # a relative error of small numbers, from float32 sums in another order
    np.testing.assert_allclose(
        one.scalars("completeness_error"), other.scalars("completeness_error"), rtol=1e-2, atol=1e-4
    )
    mine, theirs = (store.array("attribution").read(range(N)).astype(np.float64) for store in (one, other))
    np.testing.assert_allclose(mine, theirs, atol=2e-3)  # float16 below 2


def test_it_is_a_store_like_any_other(imported):
    store, _ = imported
    assert verify_store(store) == []
    rows = evaluate(store, models=[by_name()], p=(50, 90), device="cpu").rows
    assert {row.n for row in rows} == {N}
    assert {row.method for row in rows} == {f"captum {store.parent.name.rstrip('0123456789')}"}
    assert f"(made by {rows[0].method}, prediction as target)" in article_tables(rows)[0].note
    named = "test_import:by_name"
    assert evaluate(store, models=[named], p=50, device="cpu").rows[0].model == named
    assert show_store(store, p=50).size > (0, 0)
    image, label = MaskedImageNet(store, p=50, keep="bottom")[2]
    assert (image.shape, label) == ((3, *SIZE), 2)
    assert insertion_deletion(store, by_name(), steps=2, device="cpu").auc.shape == (2, 2, N)


def test_the_store_says_what_it_is(imported, capsys):
    store, _ = imported
    info = store_info(store)
    assert (info.n_built, info.evaluations, info.settings["method"]) == (N, 0, "imported")
    assert info.settings["maps_by"].startswith("captum ")
    assert cli.run(__import__("igstore.info", fromlist=["main"]).main, [str(store)]) == cli.DONE
    assert f"imported, made by {info.settings['maps_by']} (sha256 " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"made by captum .* cannot make them again"):
        verify_store(store, recompute=1)


# --- Forms of maps


@pytest.mark.parametrize("n_channels", [None, 1, 3], ids=lambda n: f"{n} channels")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda dtype: dtype.__name__)
def test_every_form_of_maps(dtype, n_channels, tmp_path):
    shape = (N, *SIZE) if n_channels is None else (N, n_channels, *SIZE)
    maps = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    np.save(tmp_path / "maps.npy", np.asfortranarray(maps))
    store = tmp_path / "maps.zarr"
    import_maps(tmp_path / "maps.npy", by_name(), pictures(), store, made_by="hand", rank=False, device="cpu")
    expected = maps.astype(np.float64) if n_channels is None else maps.sum(axis=1, dtype=np.float64)
    found = stored(store, "attribution").astype(np.float64) * stored(store, "scale")[:, None, None]
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    assert verify_store(store) == []


@pytest.mark.parametrize("reduce", ["sum", "positive", "absolute", "none"])
def test_channels_are_reduced_as_asked(reduce, tmp_path):
    maps = explained("Saliency")
    store = tmp_path / "maps.zarr"
    import_maps(maps, by_name(), pictures(), store, made_by="captum", reduce=reduce, device="cpu")
    expected = {
        "sum": maps.sum(axis=1),
        "positive": maps.clip(0).sum(axis=1),
        "absolute": np.abs(maps).sum(axis=1),
        "none": maps,
    }[reduce]
    scale = stored(store, "scale").reshape((N,) + (1,) * (expected.ndim - 1))
    np.testing.assert_allclose(stored(store, "attribution") * scale, expected, atol=2e-3 * np.abs(expected).max())
    assert verify_store(store) == []


def test_the_order_of_the_maps_is_free(tmp_path):
    maps, order = explained("Saliency"), np.random.default_rng(2).permutation(N)
    options: dict[str, Any] = {"made_by": "captum", "device": "cpu"}
    import_maps(maps, by_name(), pictures(), tmp_path / "one.zarr", **options)
    shuffled = [IDS[place] for place in order]
    import_maps(maps[order], by_name(), pictures()[::-1], tmp_path / "other.zarr", ids=shuffled, **options)
    one, other = (StoreReader(tmp_path / f"{name}.zarr") for name in ("one", "other"))
    assert one.spec == other.spec  # the same maps of the same images, whatever their order was
    for name in ("attribution", "pixels"):
        np.testing.assert_array_equal(one.array(name).read(range(N)), other.array(name).read(range(N)))


def test_a_file_is_never_whole_in_memory(tmp_path):
    shape = (400, 3, 100, 100)  # 48 MB
    maps = np.lib.format.open_memmap(tmp_path / "maps.npy", "w+", np.float32, shape)
    maps[7] = 3
    maps.flush()
    ids = [f"{index:03d}" for index in range(400)]
    tracemalloc.start()
    given = GivenMaps(tmp_path / "maps.npy", ids)
    given.sha256()
    assert (given.read(["007", "008"])[:, 0, 0, 0] == (3, 0)).all()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24e6


def test_maps_of_the_first_images_only(tmp_path):
    maps = explained("Saliency")[:4]
    info = import_maps(maps, by_name(), pictures(), tmp_path / "some.zarr", made_by="captum", limit=4, device="cpu")
    assert (info.n_images, info.n_built) == (4, 4)


# --- Which image a map is of: map i is of images[i]


class Given:
    """Anything with a length and items: a sequence that reads its images when they are asked for."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


NAMES = ["zebra", "apple", "mango", "10", "9", "Zoo", "étude"]  # nothing sorts them so


def write_tree(folder: Path, tree: dict[str, list[str]]) -> list[str]:
    """Make images, by folder, and return their paths."""
    for kind, names in tree.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for name in names:
            Image.fromarray(pictures()[0][1]).save(folder / kind / name)
    return [name if kind == "." else f"{kind}/{name}" for kind, names in tree.items() for name in names]


def as_folders(folder: Path) -> tuple[Any, list[str]]:
    write_tree(folder, {"ant": ["z.png"], "bee": ["x.png", "y.png"]})
    return ImageFolder(folder), ["z", "x", "y"]  # classes come first


def as_list_of_folders(folder: Path) -> tuple[Any, list[str]]:
    return as_image_list(as_folders(folder)[0]), ["x", "y", "z"]


ARRAY = pictures()[0][1]
KINDS: dict[str, Any] = {
    "list": lambda _: ([(name, ARRAY, 0) for name in NAMES], NAMES),
    "tuple": lambda _: (tuple((name, ARRAY, None) for name in NAMES), NAMES),
    "own sequence": lambda _: (Given([(name, ARRAY, 0) for name in NAMES]), NAMES),
    "ImageList": lambda _: (as_image_list([(name, ARRAY, 0) for name in NAMES]), sorted(NAMES)),
    "data set of pairs": lambda _: (Given([(ARRAY, 0)] * 12), [f"{index:02d}" for index in range(12)]),
    "ImageFolder": as_folders,
    "ImageList of an ImageFolder": as_list_of_folders,
    "subset": lambda folder: (Subset(as_folders(folder)[0], [2, 0]), ["0", "1"]),
}


def stored_constants(store: Path) -> dict[str, float]:
    """What the constant map of each image is, by id."""
    values = stored(store, "attribution")[:, 0, 0].astype(float) * stored(store, "scale")
    return dict(zip(stored(store, "image_id").tolist(), values.tolist(), strict=True))


def import_constants(images: Any, n: int, store: Path, **options: Any) -> dict[str, float]:
    maps = np.ones((n, *SIZE), np.float32) * np.arange(1, n + 1, dtype=np.float32)[:, None, None]
    import_maps(maps, by_name(), images, store, **{"made_by": "hand", "device": "cpu", "rank": False} | options)
    return stored_constants(store)


@pytest.mark.parametrize("kind", KINDS)
def test_map_i_is_of_image_i(kind, tmp_path):
    images, ids = KINDS[kind](tmp_path / "images")
    found = import_constants(images, len(ids), tmp_path / "maps.zarr")
    assert found == {image_id: index for index, image_id in enumerate(ids, start=1)}


@pytest.mark.parametrize(
    "make",
    [list, tuple, np.array, pd.Index, lambda ids: pd.Series(ids, index=range(len(ids))[::-1]), xr.DataArray],
    ids=["list", "tuple", "array", "index", "column", "DataArray"],
)
def test_ids_of_any_kind_say_the_order(make, tmp_path):
    order = NAMES[::-1]
    images = [(name, ARRAY, 0) for name in NAMES]
    found = import_constants(images, len(order), tmp_path / "maps.zarr", ids=make(order))
    assert found == {image_id: index for index, image_id in enumerate(order, start=1)}


def test_maps_may_name_their_images(tmp_path):
    images = [(name, ARRAY, 0) for name in NAMES]
    import_constants(images, len(NAMES), tmp_path / "one.zarr")
    with_names = open_store(tmp_path / "one.zarr").attribution[::-1]
    assert with_names.image.values.tolist() != NAMES
    import_maps(with_names, by_name(), images, tmp_path / "other.zarr", made_by="hand", device="cpu")
    assert stored_constants(tmp_path / "other.zarr") == stored_constants(tmp_path / "one.zarr")


@pytest.mark.parametrize(
    "ids",
    ["ids.txt", list(range(7)), pd.DataFrame({"id": NAMES}), iter(NAMES), Path("ids")],
    ids=lambda ids: type(ids).__name__,
)
def test_what_is_no_list_of_ids(ids, tmp_path):
    with pytest.raises(UserError, match="must be a list of the images' ids, such as '10'"):
        import_constants([(name, ARRAY, 0) for name in NAMES], 7, tmp_path / "maps.zarr", ids=ids)


def test_a_limit_must_mean_the_same_images(tmp_path):
    images = [(name, ARRAY, 0) for name in ("b", "a", "d", "c")]
    assert import_constants(images, 2, tmp_path / "two.zarr", limit=2) == {"b": 1, "a": 2}
    with pytest.raises(UserError, match="limit is 3, which means the first images by id"):
        import_constants(images, 3, tmp_path / "three.zarr", limit=3)
    found = import_constants(images, 3, tmp_path / "three.zarr", limit=3, ids=["c", "b", "a"])
    assert found == {"c": 1, "b": 2, "a": 3}


# names of folders and files, and whether every way to sort them is one
TREES = {
    "flat": ({".": ["a.png", "b.png", "c.png"]}, True),
    "folders whose files come in their order": ({"ant": ["1.png", "2.png"], "bee": ["3.png"]}, True),
    "stems against folders": ({"ant": ["2.png"], "bee": ["1.png"]}, False),
    "stems against names": ({".": ["pic.png", "pic-1.png"]}, False),
    "a folder whose name begins another's": ({"a": ["y.png"], "a-b": ["x.png"]}, False),
    "stems that collide": ({"a": ["1.png", "5.png"], "b": ["1.png"]}, False),
    "mixed extensions": ({".": ["a.png", "a1.bmp", "b.png"]}, True),
}


@pytest.mark.parametrize("tree", TREES)
def test_of_a_path_the_order_must_be_beyond_doubt(tree, tmp_path, monkeypatch, capsys):
    content, is_plain = TREES[tree]
    paths = write_tree(tmp_path / "images", content)
    monkeypatch.chdir(tmp_path)
    labels = tmp_path / "labels.csv"
    labels.write_text("file,class_index\n")
    arguments = ["maps.npy", "--made-by", "hand", "--images", "images", "--labels", "labels.csv"]
    arguments += ["--model", "test_import:by_name", "--device", "cpu"]
    np.save("maps.npy", np.ones((len(paths), *SIZE), np.float32))
    assert cli.run(main, arguments) == (cli.DONE if is_plain else cli.MISUSED)
    said = capsys.readouterr().err
    if is_plain:
        ids = stored(tmp_path / "maps.zarr", "image_id").tolist()
        assert f"maps in the order of the image ids: the first is of {ids[0]}, the last of {ids[-1]}\n" in said
    else:
        assert "which image is a map of?" in said
        assert "give --ids" in said
        with pytest.raises(UserError, match=r"by path after it: give ids, the images' ids"):
            import_constants("images", len(paths), tmp_path / "maps.zarr", labels=labels)
        assert not (tmp_path / "maps.zarr").exists()
    listed = find_images("images", labels=labels)
    shuffled = list(listed.ids)[::-1]
    found = import_constants("images", len(paths), tmp_path / "other.zarr", labels=labels, ids=shuffled)
    assert found == {image_id: index for index, image_id in enumerate(shuffled, start=1)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_tensor_is_as_good_as_its_array(dtype, tmp_path):
    maps = torch.from_numpy(explained("Saliency")).to(dtype).requires_grad_()
    options: dict[str, Any] = {"made_by": "captum", "device": "cpu"}
    import_maps(2 * maps, by_name(), pictures(), tmp_path / "tensor.zarr", **options)
    array = (2 * maps).detach().to(torch.float32 if dtype == torch.bfloat16 else dtype).numpy()
    import_maps(array, by_name(), pictures(), tmp_path / "array.zarr", **options)
    one, other = (StoreReader(tmp_path / f"{name}.zarr") for name in ("tensor", "array"))
    assert one.spec == other.spec
    np.testing.assert_array_equal(one.array("attribution").read(range(N)), other.array("attribution").read(range(N)))


def test_what_becomes_an_array_is_as_good_as_one(tmp_path):
    maps, store = explained("Saliency"), tmp_path / "maps.zarr"
    options: dict[str, Any] = {"made_by": "captum", "device": "cpu"}
    import_maps(maps, by_name(), pictures(), store, **options)
    for other in (list(maps), xr.DataArray(maps), np.asfortranarray(maps), maps.astype(">f4"), zarr.array(maps)):
        assert import_maps(other, by_name(), pictures(), store, **options).n_built == N  # the same sha256, or refused
    for wrong in (None, 3.5, [maps[0], maps[1][:, :-1]], {"maps": maps}, torch.ones(7, *SIZE, dtype=torch.int32)):
        with pytest.raises(UserError, match=r"^the maps are"):
            import_maps(wrong, by_name(), pictures(), store, **options)


# --- What goes wrong


def test_a_map_that_is_not_finite_fails_alone(tmp_path):
    maps = explained("Saliency").astype(np.float64)
    maps[2, 0, 5, 5] = np.nan
    maps[4] *= 1e60  # beyond float32
    info = import_maps(maps, by_name(), pictures(), tmp_path / "some.zarr", made_by="captum", device="cpu")
    assert sorted(info.failed) == [IDS[2], IDS[4]]
    assert "not finite" in info.failed[IDS[2]]
    assert verify_store(tmp_path / "some.zarr") == []


def test_it_goes_on_where_it_stopped(tmp_path):
    store, options = tmp_path / "maps.zarr", {"made_by": "captum", "shard_size": 3, "device": "cpu"}
    maps = explained("Saliency")
    import_maps(maps, by_name(), pictures(), store, **options)
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file() and "records" not in path.parts}
    first = (store / "records/00000.json").stat().st_mtime_ns
    (store / "records/00001.json").unlink()
    assert import_maps(maps, by_name(), pictures(), store, **options).n_built == N
    assert (store / "records/00000.json").stat().st_mtime_ns == first
    assert {path: path.read_bytes() for path in before} == before
    assert verify_store(store) == []


def test_other_maps_are_another_store_s(tmp_path):
    store, options = tmp_path / "maps.zarr", {"made_by": "captum", "device": "cpu"}
    import_maps(explained("Saliency"), by_name(), pictures(), store, **options)
    with pytest.raises(SettingsMismatchError, match="maps_sha256 is"):
        import_maps(-explained("Saliency"), by_name(), pictures(), store, **options)
    with pytest.raises(SettingsMismatchError, match="maps_by is captum there and hand here"):
        import_maps(explained("Saliency"), by_name(), pictures(), store, **options | {"made_by": "hand"})
    with pytest.raises(SettingsMismatchError, match="method is imported there and riemann_right here"):
        build_store(by_name(), pictures(), store, device="cpu")
    import_maps(-explained("Saliency"), by_name(), pictures(), store, overwrite=True, **options)


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        (np.zeros((N, *SIZE), np.int32), {}, "are int32"),
        (np.zeros((N, 5), np.float32), {}, r"of shape \(7, 5\)"),
        (np.zeros((N - 1, *SIZE), np.float32), {}, "6 maps for 7 images"),
        (np.zeros((N, 23, 23), np.float32), {}, "are 23x23 pixels; the input of .* is 23x26"),
        (np.zeros((N, 2, *SIZE), np.float32), {"reduce": "none"}, "the maps have 2"),
        (np.zeros((N, *SIZE), np.float32), {"ids": IDS[:-1]}, "7 maps for 6 images"),
        (np.zeros((N, *SIZE), np.float32), {"ids": [*IDS[:-1], "strange"]}, "'strange' is only in one"),
        (np.zeros((N, *SIZE), np.float32), {"ids": [*IDS[:-1], IDS[0]]}, "'picture_6' is only in one"),
        (np.zeros((N, *SIZE), np.float32), {"made_by": " "}, "made_by is ' '; say what made the maps"),
        (np.zeros((N, *SIZE), np.float32), {"target": "other"}, "target is 'other'"),
        ("nothing.npy", {}, "cannot be read from nothing.npy"),
    ],
    ids=lambda value: "" if isinstance(value, np.ndarray) else str(value)[:40],
)
def test_mistakes(maps, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        import_maps(
            maps, by_name(), pictures(), tmp_path / "store.zarr", **{"made_by": "hand", "device": "cpu"} | options
        )
    assert not (tmp_path / "store.zarr").exists()


def test_several_arrays_in_a_file_are_refused(tmp_path):
    np.savez(tmp_path / "maps.npz", one=np.zeros(3), other=np.zeros(3))
    with pytest.raises(UserError, match="several arrays"):
        GivenMaps(tmp_path / "maps.npz", IDS)


def test_settings_of_other_stores_say_nothing_of_imports(tmp_path):
    """Stores from before there were imports keep their settings, word for word."""
    path = make_store(tmp_path / "toy.zarr", 3)
    attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
    assert not {"maps_by", "maps_sha256"} & attributes.keys()
    assert BuildSpec.from_attributes(attributes).maps_by is None


# --- The command


def test_the_command(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, array, _ in pictures():
        Image.fromarray(array).save(folder / f"{name}.png")
    order = [3, 1, 4, 0, 5, 2, 6]
    np.save(tmp_path / "saliency.npy", explained("Saliency")[order])
    (tmp_path / "ids.txt").write_text("\n".join(IDS[place] for place in order) + "\n")
    monkeypatch.chdir(tmp_path)
    arguments = ["saliency.npy", "--made-by", "captum Saliency", "--images", "images", "--ids", "ids.txt"]
    arguments += ["--model", "test_import:by_name", "--device", "cpu", "--no-pixels"]
    assert cli.run(main, arguments) == cli.DONE
    assert "igstore evaluate saliency.zarr" in capsys.readouterr().out
    store = StoreReader(tmp_path / "saliency.zarr")
    reduced = explained("Saliency").sum(axis=1)
    found = store.array("attribution").read(range(N)) * store.scalars("scale")[:, None, None]
    np.testing.assert_allclose(found, reduced, atol=2e-3 * np.abs(reduced).max())
    assert cli.run(main, arguments[:1]) == cli.MISUSED
