"""Stores from anywhere: whatever they hold, only igstore's own errors come out, and memory stays in proportion."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np
import pytest
from amounts import SEED, amount
from hypothesis import HealthCheck, given, seed, settings, strategies as st
from stores import checksum, image_ids, make_store

from igstore import (
    IgstoreError,
    MaskedImageNet,
    export_store,
    keep_mask,
    masked_view,
    merge_stores,
    open_store,
    rank_store,
    show_store,
    store_info,
    verify_store,
)
from igstore.building import Part
from igstore.building.repair import repair_store
from igstore.export import FORMATS
from igstore.files import sealed
from igstore.images import as_image_list
from igstore.info import describe as describe_info
from igstore.schema import BuildSpec, Preprocessing
from igstore.storage import StoreReader
from igstore.verify import describe as describe_findings
from igstore.view import save_page

# examples are damaged copies of one small store; the same ones every time
bounded = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
few = settings(bounded, max_examples=8)
# others with another seed
thorough = settings(bounded, max_examples=amount(10_000), derandomize=False, database=None)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("untrusted") / "store.zarr"
    return make_store(path, n=6, size=(7, 8), failed=(3,))


@pytest.fixture
def path(intact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(intact, tmp_path / "store.zarr")


def read_all(path: Path) -> None:
    store = StoreReader(path)
    for name, variable in store.variables.items():
        if variable.is_sharded:
            store.array(name).read([0, store.n_images - 1])
        else:
            store.scalars(name)
    for name in store.rankings:
        ranking = store.ranking(name)
        for array in ranking.variables:
            ranking.array(array).shard(0)


SETTINGS: dict[str, Any] = {  # of those stores
    "model": "toy",
    "weights": "own",
    "weights_sha256": "0" * 64,
    "preprocessing": Preprocessing(resize=None, crop=(7, 8)),
    "images_fingerprint": "f" * 64,
    "shard_size": 4,
}


# Everything that is done with stores from elsewhere: what looks at them, and what makes something of them in a folder.
LOOKS: dict[str, Callable[[Path], object]] = {
    "read": read_all,
    "info": lambda path: describe_info(store_info(path)),
    "verify": lambda path: describe_findings(path, verify_store(path)),
    "open": lambda path: open_store(path).isel(image=0).load(),
}
USES: dict[str, Callable[[Path, Path], object]] = {
    **{f"export {form}": lambda path, out, form=form: export_store(path, out / form, format=form) for form in FORMATS},
    "compress": lambda path, out: export_store(path, out / "compressed", compress="zstd"),
    "rank": lambda path, out: rank_store(path, score="absolute", block=4),
    "rank again": lambda path, out: rank_store(path),
    "merge": lambda path, out: merge_stores([path, path], out / "merged"),
    "masked view": lambda path, out: masked_view(path, p=30).isel(image=[0, -1]).load(),
    "masks": lambda path, out: keep_mask(path, p=30, select="count", order="random").load(),
    "data set": lambda path, out: MaskedImageNet(path, fill="noise")[1],
    "show": lambda path, out: show_store(path, p=[40]),
    "view": lambda path, out: save_page(path, out / "page"),
    "repair": lambda path, out: repair(path),
}


def repair(path: Path) -> None:
    """What `build` does with a store of its own settings that it finds."""
    spec = BuildSpec(**SETTINGS)
    images = as_image_list([(name, np.zeros((7, 8, 3), np.uint8), None) for name in image_ids(6)])
    repair_store(path, spec, images, {"complete": False}, part=Part())


def look(path: Path) -> None:
    """Each look until its first error, which must be one of igstore's."""
    for act in LOOKS.values():
        with suppress(IgstoreError):
            act(path)


def use(path: Path, names: Iterable[str] = USES) -> None:
    """Each use, likewise; they leave nothing half done behind."""
    out = path.with_name("out")
    for name in names:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        with suppress(IgstoreError):
            USES[name](path, out)
        assert not list(out.glob("*.partial"))


def test_what_is_done_with_an_intact_store_raises_nothing(path):
    for look in LOOKS.values():
        look(path)
    (out := path.with_name("out")).mkdir()
    for act in USES.values():
        act(path, out)


# any JSON value, and such as mean something here
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**30, 1e308, float("inf"), float("nan")])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["../../outside", "/etc/passwd", "object", "bytes", "pickle", "numcodecs.pickle", "\ud800", "\x1b[2J"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is something in a JSON value: keys and indices, from the outside."""
    yield where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*where, key))


def changed(data: st.DataObject, document: Any) -> Any:
    """A JSON value with something in it replaced, or left out."""
    *outer, last = data.draw(st.sampled_from([place for place in places(document) if place]), label="place")
    inner = document
    for key in outer:
        inner = inner[key]
    if data.draw(st.booleans(), label="left out"):
        del inner[last]
    else:
        inner[last] = data.draw(VALUES, label="value")
    return document


def mutate_json(data: st.DataObject, path: Path, pattern: str) -> None:
    file = data.draw(st.sampled_from(sorted(path.glob(pattern))), label="file")
    document = json.loads(file.read_text())
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        document = changed(data, document)
    if data.draw(st.booleans(), label="sealed"):
        if isinstance(document, dict) and isinstance(document.get("attributes"), dict):
            document["attributes"] = sealed(document["attributes"])
        elif isinstance(document, dict):
            document = sealed(document)
    file.write_text(json.dumps(document))


def mutated(data: st.DataObject, content: bytes) -> bytes:
    """Bytes with some of them replaced, left out or added."""
    start = data.draw(st.integers(0, len(content)), label="start")
    end = data.draw(st.integers(start, len(content)), label="end")
    return content[:start] + data.draw(st.binary(max_size=40), label="bytes") + content[end:]


def mutate_bytes(data: st.DataObject, path: Path) -> None:
    file = data.draw(st.sampled_from(sorted(file for file in path.rglob("*") if file.is_file())), label="file")
    file.write_bytes(mutated(data, file.read_bytes()))
    if data.draw(st.booleans(), label="resealed"):
        reseal(path)


def mutate_index(data: st.DataObject, path: Path) -> None:
    """Of a shard: where its images are, and how long; its own checksum and those on record are right."""
    shards = sorted(file for file in path.rglob("c/*/0/**/0") if file.is_file())
    file = data.draw(st.sampled_from(shards), label="file")
    content = file.read_bytes()
    index = bytearray(content[-4 * 16 - 4 : -4])
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        number = data.draw(st.sampled_from([0, 1, 111, 112, 113, 2**31, 2**63, 2**64 - 2, 2**64 - 1]), label="number")
        place = data.draw(st.integers(0, 7), label="place")
        index[8 * place : 8 * place + 8] = number.to_bytes(8, "little")
    crc = google_crc32c.value(bytes(index)).to_bytes(4, "little")
    file.write_bytes(content[: -4 * 16 - 4] + bytes(index) + crc)
    reseal(path)


def reseal(path: Path) -> None:
    """Make records say what the files hold, as whoever can write can."""
    for file in path.rglob("records/**/*.json"):
        with suppress(ValueError, TypeError, KeyError, AttributeError, FileNotFoundError):
            record = json.loads(file.read_text())
            record["files"] = {name: checksum((path / name).read_bytes()) for name in record["files"]}
            file.write_text(json.dumps(sealed(record)))
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        root = json.loads((path / "zarr.json").read_text())
        root["attributes"] = sealed(root["attributes"])
        (path / "zarr.json").write_text(json.dumps(root))


def afresh(intact: Path, path: Path) -> Path:
    shutil.rmtree(path)
    return shutil.copytree(intact, path)


KINDS = {
    "the root": lambda data, path: mutate_json(data, path, "zarr.json"),
    "arrays": lambda data, path: mutate_json(data, path, "*/zarr.json"),
    "rankings": lambda data, path: mutate_json(data, path, "ranks/**/zarr.json"),
    "records": lambda data, path: mutate_json(data, path, "records/**/*.json"),
    "bytes": mutate_bytes,
    "indices": mutate_index,
}


@pytest.mark.parametrize("mutate", KINDS.values(), ids=KINDS)
class TestMutated:
    @bounded
    @given(data=st.data())
    def test_only_own_errors_come_out(self, intact, path, mutate, data):
        mutate(data, afresh(intact, path))
        look(path)

    @few
    @given(data=st.data())
    def test_only_own_errors_come_out_of_use(self, intact, path, mutate, data):
        mutate(data, afresh(intact, path))
        use(path)


FAMILIES = {
    "metadata": ("the root", "arrays", "rankings"),
    "records": ("records",),
    "shard indices": ("indices",),
    "any file": ("bytes",),
}


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("kinds", FAMILIES.values(), ids=FAMILIES)
@seed(SEED)
@thorough
@given(data=st.data())
def test_only_own_errors_come_out_of_many(intact, path, kinds, data):
    KINDS[data.draw(st.sampled_from(kinds), label="kind")](data, afresh(intact, path))
    look(path)
    use(path, data.draw(st.permutations(list(USES)), label="uses")[:3])


@pytest.fixture(scope="module")
def intact_hdf5(intact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_store(intact, tmp_path_factory.mktemp("hdf5") / "store.h5", format="hdf5")


def mutate_hdf5_bytes(data: st.DataObject, path: Path) -> None:
    path.write_bytes(mutated(data, path.read_bytes()))


def mutate_hdf5_texts(data: st.DataObject, path: Path) -> None:
    """The attributes or a record, which are JSON."""
    with h5py.File(path, "r+") as file:
        name = data.draw(st.sampled_from(["", "records/build", "records/positive-3"]), label="text")
        texts, key = (file.attrs, "igstore") if not name else (file[name], data.draw(st.integers(0, 1), label="shard"))
        document = changed(data, json.loads(texts[key]))
        texts[key] = json.dumps(sealed(document) if data.draw(st.booleans(), label="sealed") else document)


def mutate_hdf5_datasets(data: st.DataObject, path: Path) -> None:
    """One in another shape or of another type, or a link or a group in its place."""
    with h5py.File(path, "r+") as file:
        names = ["attribution", "image_id", "label", "scale", "records/build", "ranks/positive-3/rank", "ranks"]
        name = data.draw(st.sampled_from(names), label="dataset")
        del file[name]
        match data.draw(
            st.sampled_from(["gone", "group", "soft", "external", "values", "texts", "chunks"]), label="now"
        ):
            case "group":
                file.create_group(name)
            case "soft":
                file[name] = h5py.SoftLink("/pixels")
            case "external":
                file[name] = h5py.ExternalLink("/etc/passwd", "/pixels")
            case "values":
                shape = data.draw(
                    st.sampled_from([(), (6,), (2,), (6, 7, 8), (6, 3, 3), (0,), (6, 10**6)]), label="shape"
                )
                dtype = data.draw(st.sampled_from(["f2", "i4", "i8", "u1", ">f4", "c8", "S5", "O"]), label="dtype")
                file.create_dataset(name, shape, h5py.string_dtype() if dtype == "O" else dtype)
            case "texts":
                odd = [b"\xff\xfe", b"", b"[]", b"{" * 1000]
                file[name] = np.array(data.draw(st.lists(st.sampled_from(odd), min_size=1, max_size=6)), object)
            case "chunks":
                file.create_dataset(name, (6,), "i4", chunks=(1,))


HDF5_KINDS = {"bytes": mutate_hdf5_bytes, "texts": mutate_hdf5_texts, "datasets": mutate_hdf5_datasets}
HDF5_USES = ("export zarr", "export ranks", "merge", "masked view", "masks", "data set", "show")


def use_hdf5(path: Path) -> None:
    look(path)
    out = path.with_name("out")
    for name in HDF5_USES:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        with suppress(IgstoreError):
            USES[name](path, out)


@pytest.mark.parametrize("mutate", HDF5_KINDS.values(), ids=HDF5_KINDS)
class TestMutatedHdf5:
    @bounded
    @given(data=st.data())
    def test_only_own_errors_come_out(self, intact_hdf5, tmp_path, mutate, data):
        mutate(data, path := Path(shutil.copy(intact_hdf5, tmp_path)))
        look(path)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@seed(SEED)
@thorough
@given(data=st.data())
def test_only_own_errors_come_out_of_many_hdf5_files(intact_hdf5, tmp_path, data):
    mutate = HDF5_KINDS[data.draw(st.sampled_from(sorted(HDF5_KINDS)), label="kind")]
    mutate(data, path := Path(shutil.copy(intact_hdf5, tmp_path)))
    use_hdf5(path)
