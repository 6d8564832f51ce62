from __future__ import annotations

import json
import multiprocessing
import pickle
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray as xr
import zarr
from stores import checksum, mapped_file, text

from igstore.errors import DamagedStoreError, SettingsMismatchError, StoreExistsError, StoreNotFoundError, UserError
from igstore.files import Folder, atomic
from igstore.schema import BUILT, BuildSpec, Preprocessing
from igstore.storage import (
    StoreReader,
    create_store,
    extend_store,
    finish_store,
    hold,
    layout,
    metadata,
    staging,
    write_shard,
    writer,
)

SPEC = BuildSpec(
    model="model",
    weights="own",
    weights_sha256="0" * 64,
    preprocessing=Preprocessing(resize=None, crop=(11, 14)),
    images_fingerprint="f",
    shard_size=4,
)
RECORD = {"failed": {}, "in_top5": 0}


def shard_arrays(spec: BuildSpec, first: int, last: int) -> dict[str, np.ndarray]:
    """Random contents of a shard, with a black image whose chunk is all zero."""
    random = np.random.default_rng(first)
    arrays = layout.unbuilt(spec, last - first)
    arrays["attribution"][:] = random.standard_normal(arrays["attribution"].shape)
    if "pixels" in arrays:
        arrays["pixels"][:] = random.integers(0, 256, arrays["pixels"].shape)
    for name in ("attribution", "pixels"):
        if name in arrays:
            arrays[name][0] = 0
    arrays["scale"][:] = 2.0 ** random.integers(-20, 20, last - first)
    arrays["prediction"][:] = random.integers(0, 10, last - first)
    arrays["status"][:] = BUILT
    return arrays | layout.listed(spec, IDS[first:last], LABELS[first:last])


IDS = [f"image_{i:04d}" for i in range(30)]
LABELS = np.arange(30, dtype=np.int32) % 5 - 1


def make(path: Path, spec: BuildSpec = SPEC, n: int = 10, shards: list[int] | None = None) -> dict[str, np.ndarray]:
    """A store of `n` images, the given shards of it written; returns what all shards would hold."""
    create_store(path, spec, image_ids=IDS[:n], labels=LABELS[:n], attributes={"complete": False})
    parts = []
    for shard in range(layout.shard_count(n, spec.shard_size)):
        first, last = layout.shard_bounds(shard, n, spec.shard_size)
        parts.append(shard_arrays(spec, first, last))
        if shards is None or shard in shards:
            write_shard(path, spec, n, shard, parts[-1], RECORD)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.zarr"


@pytest.mark.parametrize(
    "spec", [SPEC, replace(SPEC, pixels=False), replace(SPEC, reduce="none")], ids=["sum", "no pixels", "none"]
)
@pytest.mark.parametrize("n", [1, 4, 10], ids=lambda n: f"{n} images")
def test_every_reader_sees_what_was_written(path, spec, n):
    expected = make(path, spec, n)
    finish_store(path, {"complete": True})
    dataset = xr.open_zarr(path)
    group = zarr.open_group(path, mode="r")
    store = StoreReader(path)
    for name, variable in layout.variables(spec).items():
        assert dataset[name].dims == variable.dims
        if name in layout.LISTED:
            continue
        assert dataset[name].dtype == variable.dtype
        np.testing.assert_array_equal(dataset[name], expected[name])
        np.testing.assert_array_equal(group[name][:], expected[name])
        np.testing.assert_array_equal(store.array(name).read(range(n)), expected[name])
        remote = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{path / name}"}).result()
        np.testing.assert_array_equal(remote.read().result(), expected[name])
    assert dataset["image_id"].values.tolist() == list(store.image_ids) == [f"image_{i:04d}" for i in range(n)]
    assert dataset.attrs["model"] == "model"
    assert dataset.attrs["crop"] == [11, 14]


def test_layout_is_shards_of_many_images_with_an_uncompressed_chunk_each(path):
    make(path)
    for name in ("attribution", "pixels"):
        array = zarr.open_array(path / name)
        assert array.shards[0] == 4
        assert array.chunks == (1, *array.shape[1:])
        assert array.compressors == ()
    # four maps of 11x14 float16, an index of 16 bytes a chunk, a checksum
    assert (path / "attribution/c/0/0/0").stat().st_size == 4 * 11 * 14 * 2 + 4 * 16 + 4
    assert zarr.open_array(path / "scale").chunks == (4,)


@pytest.mark.parametrize("images", [[3], [0, 1, 2, 3], [9, 0, 5, 5, 4], [], range(2, 9)], ids=str)
def test_images_are_read_in_the_order_asked_for(path, images):
    expected = make(path)["attribution"]
    array = StoreReader(path).array("attribution")
    np.testing.assert_array_equal(array.read(images), expected[list(images)])


def test_raw_shards_are_mapped_and_others_are_not(path, tmp_path):
    expected = make(path)["attribution"]
    array = StoreReader(path).array("attribution")
    assert mapped_file(array.shard(0)) == str(path / "attribution/c/0/0/0")
    assert mapped_file(array.shard(2)) == str(path / "attribution/c/2/0/0")  # the short one
    np.testing.assert_array_equal(array.shard(2), expected[8:])
    # the same data, compressed, is not a run of bytes, and reads the same
    compressed = zarr.create_array(
        tmp_path / "compressed",
        shape=expected.shape,
        shards=(4, 11, 14),
        chunks=(1, 11, 14),
        dtype="float16",
        config={"write_empty_chunks": True},
    )
    compressed[:] = expected
    (path / "attribution").rename(tmp_path / "aside")
    (tmp_path / "compressed").rename(path / "attribution")
    array = StoreReader(path).array("attribution")
    assert array._map(0) is None
    np.testing.assert_array_equal(array.read([9, 0, 5, 6, 7]), expected[[9, 0, 5, 6, 7]])


@pytest.mark.parametrize("index", [-1, 10])
def test_images_beyond_the_store_are_refused(path, index):
    make(path)
    with pytest.raises(IndexError, match="10"):
        StoreReader(path).array("attribution").read([index])


def test_a_shard_without_its_record_does_not_exist(path):
    make(path, shards=[0, 2])
    store = StoreReader(path)
    assert store.missing_shards == [1]
    assert store.not_built.tolist() == [4, 5, 6, 7]
    with pytest.raises(DamagedStoreError, match="shard 1 of attribution"):
        store.array("attribution").read([5])
    # the files of a shard may be there, whole: without the record they are not read
    make(path.with_name("whole.zarr"))
    record = path.with_name("whole.zarr") / layout.record_file(1)
    record.unlink()
    store = StoreReader(path.with_name("whole.zarr"))
    assert store.status.tolist() == [1] * 4 + [0] * 4 + [1] * 2
    assert (store.scalars("prediction")[4:8] == -1).all()
    with pytest.raises(DamagedStoreError, match="not finished"):
        store.array("pixels").read([4])


def test_records_hold_the_checksums_of_the_files(path):
    make(path)
    record = json.loads((path / "records/00002.json").read_text())
    assert record["images"] == [8, 10]
    assert set(record["files"]) == {
        layout.shard_file(name, 2, len(variable.dims)) for name, variable in layout.variables(SPEC).items()
    }
    for file, entry in record["files"].items():
        content = (path / file).read_bytes()
        assert entry == checksum(content)


@pytest.mark.parametrize("n_bytes", [0, 9, 2**18, 2**18 + 1, 10**6])
def test_checksums_do_not_depend_on_the_pieces(tmp_path, n_bytes):
    content = b"123456789" + np.random.default_rng(0).bytes(max(0, n_bytes - 9)) if n_bytes else b""
    file = tmp_path / "file"
    file.write_bytes(content)
    whole = atomic.checksum(file)
    assert whole == atomic.checksum_of([content]) == checksum(content)
    assert whole == atomic.checksum_of([content[:5], memoryview(content)[5:]])
    assert atomic.crc32c(file) == whole["crc32c"]
    if n_bytes == 9:
        assert whole["crc32c"] == "e3069283"  # the check value of CRC-32C in RFC 3720's polynomial


@pytest.mark.parametrize(
    "spoil",
    [
        lambda arrays: {name: values[:-1] for name, values in arrays.items()},
        lambda arrays: arrays | {"attribution": arrays["attribution"].astype(np.float32)},
        lambda arrays: {name: values for name, values in arrays.items() if name != "scale"},
        lambda arrays: arrays | {"other": arrays["scale"]},
    ],
    ids=["too short", "another dtype", "one missing", "one too many"],
)
def test_anything_but_a_whole_shard_is_refused_and_nothing_is_written(path, spoil):
    make(path, shards=[])
    before = sorted(path.rglob("*"))
    with pytest.raises(UserError):
        write_shard(path, SPEC, 10, 1, spoil(shard_arrays(SPEC, 4, 8)), RECORD)
    assert sorted(path.rglob("*")) == before


def test_a_store_appears_whole_or_not_at_all(path, monkeypatch):
    monkeypatch.setattr(atomic.Folder, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="disk full"):
        make(path)
    assert list(path.parent.iterdir()) == []


def test_what_is_in_the_way_is_left_alone(path):
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreExistsError, match="another store"):
        make(path)
    assert (path / "thesis.tex").read_text() == "years of work"


def test_a_deleted_store_is_not_resurrected(path):
    make(path, shards=[0])
    path.rename(path.with_name("moved.zarr"))
    with pytest.raises(StoreNotFoundError, match="gone"):
        write_shard(path, SPEC, 10, 1, shard_arrays(SPEC, 4, 8), RECORD)
    assert not path.exists()


@pytest.mark.parametrize(("n", "more"), [(8, 10), (10, 11), (10, 30)], ids=lambda n: str(n))
def test_a_store_grows_and_keeps_its_whole_shards(path, n, more):
    expected = make(path, n=n)
    extend_store(path, image_ids=IDS[:more], labels=LABELS[:more])
    store = StoreReader(path)
    whole = n - n % 4
    assert store.n_images == more
    assert list(store.image_ids) == IDS[:more]
    np.testing.assert_array_equal(store.scalars("label"), LABELS[:more])
    assert store.not_built.tolist() == list(range(whole, more))
    np.testing.assert_array_equal(store.array("pixels").read(range(whole)), expected["pixels"][:whole])
    for shard in store.missing_shards:
        first, last = layout.shard_bounds(shard, more, 4)
        write_shard(path, SPEC, more, shard, shard_arrays(SPEC, first, last), RECORD)
    assert StoreReader(path).is_complete
    np.testing.assert_array_equal(xr.open_zarr(path)["status"], np.ones(more))


@pytest.mark.parametrize("name", layout.LISTED)
@pytest.mark.parametrize("spoil", [lambda c: bytes([c[0] ^ 1]) + c[1:], lambda c: c[::-1], lambda c: c + c])
def test_a_list_that_is_damaged_before_a_shard_is_written_is_not_what_is_recorded(path, name, spoil):
    make(path, shards=[0])
    file = path / layout.shard_file(name, 1, 1)
    before = file.read_bytes()
    file.write_bytes(spoil(before))
    write_shard(path, SPEC, 10, 1, shard_arrays(SPEC, 4, 8), RECORD)
    assert file.read_bytes() == before
    entry = StoreReader(path).records[1]["files"][layout.shard_file(name, 1, 1)]
    assert entry == checksum(before)


@pytest.mark.parametrize("n", [9, 10])
def test_readers_of_a_store_that_is_being_extended_see_what_it_was(path, n):
    """The arrays' metadata are longer already, and the root's are not."""
    expected = make(path, n=n)
    longer = metadata(SPEC, 20, {})
    for name in layout.variables(SPEC):
        (path / name / "zarr.json").write_bytes(longer[f"{name}/zarr.json"])
    store = StoreReader(path)
    for name in ("attribution", "pixels", "scale"):
        np.testing.assert_array_equal(store.values(name, 2, store.records[2]), expected[name][8:])
    np.testing.assert_array_equal(store.array("attribution").read(range(n)), expected["attribution"])
    assert len(store.array("pixels")) == n


@pytest.mark.parametrize("n", [1, 9, 30])
def test_lists_are_what_zarr_writes(path, tmp_path, n):
    ids = [("é" if i % 2 else "") + f"image {i}" * (i % 7) for i in range(n)]
    create_store(path, SPEC, image_ids=ids, labels=LABELS[:n], attributes={})
    for name, values in (("image_id", text(ids)), ("label", LABELS[:n])):
        metadata = json.loads((path / name / "zarr.json").read_text())
        (tmp_path / name).mkdir()
        (tmp_path / name / "zarr.json").write_text(json.dumps(metadata))
        zarr.open_array(tmp_path / name).with_config({"write_empty_chunks": True})[:] = values
        for file in (tmp_path / name / "c").iterdir():
            assert (path / name / "c" / file.name).read_bytes() == file.read_bytes()
        assert len(list((path / name / "c").iterdir())) == layout.shard_count(n, SPEC.shard_size)


def test_the_number_of_images_never_falls(path):
    make(path, n=10)
    extend_store(path, image_ids=IDS[:20], labels=LABELS[:20])
    extend_store(path, image_ids=IDS[:15], labels=LABELS[:15])  # by a process that was slower
    assert StoreReader(path).n_images == 20
    finish_store(path, {"complete": True})
    assert StoreReader(path).attributes["complete"] is False


def test_a_shard_that_somebody_else_has_finished_is_left_to_them(path):
    make(path, shards=[0])
    theirs = write_shard(path, SPEC, 10, 1, shard_arrays(SPEC, 4, 8), RECORD | {"seconds": 1.0})
    ours = shard_arrays(SPEC, 4, 8)
    ours["output"][:] = 0.5
    assert write_shard(path, SPEC, 10, 1, ours, RECORD) == theirs
    assert np.isnan(StoreReader(path).scalars("output")[4:8]).all()
    # but whoever knows what is there, and means to put something else in its place, does
    assert write_shard(path, SPEC, 10, 1, ours, RECORD, instead_of=theirs) != theirs
    assert (StoreReader(path).scalars("output")[4:8] == 0.5).all()


def test_a_store_is_opened_once_for_a_shard(path, monkeypatch):
    make(path, shards=[])
    opened = []
    monkeypatch.setattr(writer, "StoreReader", lambda where: opened.append(where) or StoreReader(where))
    write_shard(path, SPEC, 10, 1, shard_arrays(SPEC, 4, 8), RECORD)
    assert opened == [path]


def test_a_store_that_changes_while_a_shard_is_written(path, monkeypatch):
    """Other attributes do not matter; another number of images does."""
    make(path, shards=[])
    write = Folder.write

    def write_and(then):
        def write_one(folder, name, *pieces):
            write(folder, name, *pieces)
            if name.startswith("attribution/"):
                then()

        monkeypatch.setattr(Folder, "write", write_one)

    def edit(**attributes):
        root = json.loads((path / "zarr.json").read_text())
        root["attributes"] |= attributes
        (path / "zarr.json").write_text(json.dumps(root))

    write_and(lambda: edit(device="none"))
    write_shard(path, SPEC, 10, 0, shard_arrays(SPEC, 0, 4), RECORD)
    assert StoreReader(path).missing_shards == [1, 2]
    write_and(lambda: edit(n_images=9))
    with pytest.raises(StoreNotFoundError, match="is not the store that was being written"):
        write_shard(path, SPEC, 10, 1, shard_arrays(SPEC, 4, 8), RECORD)
    assert not (path / "records/00001.json").exists()


# units of an unfinished shard


@pytest.mark.parametrize("pixels", [True, False])
def test_a_unit_is_kept_without_its_pixels(path, pixels):
    spec = replace(SPEC, pixels=pixels)
    make(path, spec, shards=[])
    unit = layout.unbuilt(spec, 3)
    for name, values in unit.items():
        values[...] = np.random.default_rng(len(name)).integers(0, 100, values.shape)
    given = unit.get("pixels")
    with hold(path) as folder:
        staging.save_unit(folder, spec, 4, unit)
        (file,) = (path / "staging").iterdir()
        with np.load(BytesIO(file.read_bytes()[:-32])) as kept:
            assert {values.shape for values in kept.values()} == {(3,), unit["attribution"].shape}
        loaded = staging.load_unit(folder, spec, 4, 3, lambda: given)
        assert loaded.keys() == unit.keys()
        for name, values in unit.items():
            np.testing.assert_array_equal(loaded[name], values)
        assert staging.load_unit(folder, spec, 4, 2, lambda: given) is None
        assert staging.load_unit(folder, replace(spec, n_steps=3), 4, 3, lambda: given) is None
        if pixels:
            other = given.copy()
            other[2, 1, 5, 5] ^= 1
            assert staging.load_unit(folder, spec, 4, 3, lambda: other) is None
        file.write_bytes(file.read_bytes()[:-40] + bytes(40))
        assert staging.load_unit(folder, spec, 4, 3, lambda: given) is None


@pytest.mark.parametrize("folder", ["attribution", "records"])
def test_nothing_is_written_through_links(path, tmp_path, folder):
    make(path, shards=[])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if (path / folder).exists():
        (path / folder).rename(path / "aside")
    (path / folder).symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link"):
        write_shard(path, SPEC, 10, 1, shard_arrays(SPEC, 4, 8), RECORD)
    assert list(elsewhere.iterdir()) == []


def _read_in_child(store: StoreReader, queue) -> None:
    queue.put(store.array("attribution").read([9, 1]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_that_was_read_is_read_in_another_process(path, method):
    expected = make(path)["attribution"][[9, 1]]
    store = StoreReader(path)
    store.array("attribution").read([0])
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(store, queue))
    child.start()
    np.testing.assert_array_equal(queue.get(), expected)
    child.join()


def test_a_pickled_store_is_small(path):
    make(path)
    store = StoreReader(path)
    store.array("pixels").read(range(10))
    assert len(pickle.dumps(store)) < 10_000


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda path: None, StoreNotFoundError, "igstore build"),
        (lambda path: path.write_text("text"), StoreNotFoundError, "no store"),
        (lambda path: zarr.create_group(path), SettingsMismatchError, "not a store made by igstore"),
        (lambda path: zarr.create_group(path, attributes={"format_version": 99}), SettingsMismatchError, "99"),
        (lambda path: zarr.create_group(path, attributes={"format_version": 1}), SettingsMismatchError, "lack model"),
    ],
    ids=["nothing", "a file", "a foreign group", "a later version", "no settings"],
)
def test_what_is_not_a_store_is_refused_with_the_reason(path, spoil, error, says):
    spoil(path)
    with pytest.raises(error, match=says):
        StoreReader(path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"files": 3, "images": [0, 4]}'])
def test_a_broken_record_is_named(path, content):
    make(path)
    (path / "records/00001.json").write_text(content)
    with pytest.raises(DamagedStoreError, match=r"records/00001\.json"):
        _ = StoreReader(path).records


def test_a_missing_file_of_a_finished_shard_is_named(path):
    make(path)
    (path / "attribution/c/1/0/0").unlink()
    with pytest.raises(DamagedStoreError, match="attribution/c/1/0/0"):
        StoreReader(path).array("attribution").read([4])
