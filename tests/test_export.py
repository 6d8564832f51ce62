from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tensorstore
import xarray as xr
import zarr
from networks import Smooth
from servers import http_server
from stores import checksum, make_store

from igstore import (
    MaskedImageNet,
    Preprocessing,
    build_store,
    cli,
    export_store,
    keep_mask,
    open_store,
    rank_store,
    show_store,
    store_info,
    verify_store,
)
from igstore.errors import DamagedStoreError, StoreExistsError, StoreNotFoundError, UserError
from igstore.export import main
from igstore.files import is_sealed, sealed
from igstore.schema import BuildSpec
from igstore.storage import StoreReader, layout

N, SHARD_SIZE, N_CLASSES = 21, 8, 7  # three shards, the last of five images
NETWORK = Smooth(N_CLASSES).eval()
SETTINGS = {"preprocessing": Preprocessing(resize=18, crop=(16, 16)), "n_steps": 4, "shard_size": SHARD_SIZE}
RANKINGS = {"positive-3": ("positive", 3), "absolute-5": ("absolute", 5)}
FORMS = {
    "zarr": {},
    "zstd": {"compress": "zstd"},
    "ranks": {"format": "ranks"},
    "ranks zstd": {"format": "ranks", "compress": "zstd"},
    "hdf5": {"format": "hdf5"},
}
each_form = pytest.mark.parametrize("options", FORMS.values(), ids=list(FORMS))


class Images:
    """A data set of random images, of which number 3 cannot be read and each fifth has no label."""

    classes = tuple(f"class {index}" for index in range(N_CLASSES))
    targets = tuple(-1 if index % 5 == 2 else index % N_CLASSES for index in range(N))

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index == 3:
            raise OSError("torn out")
        return np.random.default_rng(index).integers(0, 256, (18, 18, 3), np.uint8), self.targets[index]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.zarr"
    build_store(NETWORK, Images(), path, **SETTINGS)
    rank_store(path, score="absolute", block=5)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model"


@pytest.fixture(autouse=True)
def _folder(out: Path) -> None:
    out.parent.mkdir()


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def paths(spec: BuildSpec) -> list[str]:
    """Every array of the store, by its path."""
    return [*layout.variables(spec), *(f"ranks/{name}/{array}" for name in RANKINGS for array in ("rank", "share"))]


def own(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says besides the checksums of files."""
    return {name: value for name, value in record.items() if name not in ("files", "seal", "attribution_sha256")}


def test_a_copy_is_the_store_byte_for_byte(store, out):
    assert export_store(store, out) == out
    assert contents(out) == contents(store)


def test_a_store_behind_a_url_is_copied(store, out):
    with http_server(store.parent) as served:
        export_store(f"{served.url}/{store.name}", out, format="ranks")
        assert not served.asked("attribution/c")  # what is left out is not fetched
    assert contents(out) == contents(export_store(store, out.with_name("local"), format="ranks"))


@pytest.mark.parametrize("way", ["zstd", "ranks zstd"])
def test_copies_hold_the_same_as_zarr_and_tensorstore_read_them(store, out, way):
    export_store(store, out, **FORMS[way])
    left_out = layout.OMISSIBLE if "ranks" in way else ()
    for name in paths(StoreReader(store).spec):
        if name in left_out:
            assert not (out / name).exists()
            continue
        expected = zarr.open_array(store / name, mode="r")
        found = zarr.open_array(out / name, mode="r")
        np.testing.assert_array_equal(found[:], expected[:])
        assert (found.shards, found.chunks, found.dtype) == (expected.shards, expected.chunks, expected.dtype)
        if name != "image_id":
            other = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{out / name}"}).result()
            np.testing.assert_array_equal(other.read().result(), expected[:])
    opened = xr.open_zarr(out)
    assert set(opened.data_vars) == set(layout.variables(StoreReader(store).spec)) - set(left_out)
    # the copy says all that the store says, and how it differs
    added = {"compress": "zstd", **({"omitted": ["attribution", "pixels"]} if left_out else {})}
    attributes = StoreReader(store).attributes
    assert opened.attrs == sealed(attributes | added)
    assert verify_store(out) == []


def test_records_go_with_the_copy(store, out):
    export_store(store, out, compress="zstd")
    for group, copy in [(StoreReader(store), StoreReader(out))] + [
        (StoreReader(store).ranking(name), StoreReader(out).ranking(name)) for name in RANKINGS
    ]:
        assert copy.records.keys() == group.records.keys() == {0, 1, 2}
        for shard, record in copy.records.items():
            assert own(record) == own(group.records[shard])
            assert is_sealed(record)
            for file, recorded in record["files"].items():
                content = (out / file).read_bytes()
                assert recorded == checksum(content)


def test_compression_is_a_codec_that_other_programs_have(store, out):
    export_store(store, out, compress="zstd")
    document = json.loads((out / "attribution/zarr.json").read_text())
    (sharding,) = document["codecs"]
    assert sharding["configuration"]["chunk_shape"] == [1, 16, 16]
    names = [codec["name"] for codec in sharding["configuration"]["codecs"]]
    assert names == ["bytes", "zstd"]
    assert sharding["configuration"]["codecs"][1]["configuration"]["checksum"] is False
    assert [codec["name"] for codec in json.loads((out / "scale/zarr.json").read_text())["codecs"]] == ["bytes"]


def test_a_compressed_store_is_smaller_where_maps_are_plain(tmp_path, out):
    plain = make_store(tmp_path / "plain.zarr", size=(48, 48), failed=range(10))  # maps and pixels all zero
    export_store(plain, out, compress="zstd")
    for name in ("attribution/c/0/0/0", "pixels/c/0/0/0/0"):
        assert (out / name).stat().st_size < (plain / name).stat().st_size / 20


def test_and_back(store, out):
    packed, unpacked = out.with_name("packed"), out.with_name("unpacked")
    export_store(store, packed, compress="zstd")
    export_store(packed, unpacked)
    assert contents(unpacked) == contents(store)


@pytest.mark.parametrize("compress", ["lzma", ["zstd"], 3], ids=str)
def test_a_codec_that_nobody_knows_is_no_store(tmp_path, compress):
    path = make_store(tmp_path / "small.zarr", n=2)
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"] = sealed(document["attributes"] | {"compress": compress})
    (path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(DamagedStoreError, match="compressed by"):
        StoreReader(path)


def test_a_compressed_store_can_be_built_on(store, out):
    """A damaged shard is made again, in the form that the others have."""
    export_store(store, out, compress="zstd")
    before = contents(out)
    file = out / layout.shard_file("attribution", 1, 3)
    file.write_bytes(file.read_bytes()[:-1])
    build_store(NETWORK, Images(), out, **SETTINGS)
    assert verify_store(out) == []
    after = contents(out)
    assert {name for name in before if before[name] != after[name]} <= {"zarr.json", "records/00001.json"}
    assert after[layout.shard_file("attribution", 1, 3)] == before[layout.shard_file("attribution", 1, 3)]


def test_ranks_serve_masked_images_with_the_pixels_elsewhere(store, out):
    export_store(store, out, format="ranks")
    for options in ({"p": 50}, {"p": 30, "keep": "top", "score": "absolute", "block": 5}):
        thin, whole = MaskedImageNet(out, images=Images(), **options), MaskedImageNet(store, **options)
        assert len(thin) == len(whole) == N - 1
        for (image, label), (expected, target) in zip(thin, whole, strict=True):
            assert label == target
            np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(keep_mask(out), keep_mask(store))
    np.testing.assert_array_equal(MaskedImageNet(out, images=store)[0][0], MaskedImageNet(store)[0][0])
    assert set(open_store(out).data_vars) == set(open_store(store).data_vars) - {"attribution", "pixels"}
    assert store_info(out).omitted == ("attribution", "pixels")


@pytest.mark.parametrize(
    ("attempt", "remedy"),
    [
        (lambda thin: rank_store(thin), "whole store"),
        (lambda thin: rank_store(thin, block=7), "whole store"),
        (lambda thin: verify_store(thin, recompute=1, images=Images()), "whole store"),
        (lambda thin: show_store(thin, images=Images()), "whole store"),
        (lambda thin: build_store(NETWORK, Images(), thin, **SETTINGS), "whole store"),
        (lambda thin: StoreReader(thin).array("attribution"), "whole store"),
        (lambda thin: MaskedImageNet(thin), "images=PATH"),
        (lambda thin: StoreReader(thin).array("pixels"), "images=PATH"),
    ],
    ids=["rank", "rank anew", "recompute", "show", "build", "maps", "masked images", "pixels"],
)
def test_what_ranks_cannot_do_is_refused_with_a_remedy(store, out, attempt, remedy):
    export_store(store, out, format="ranks")
    before = contents(out)
    with pytest.raises(UserError, match=remedy):
        attempt(out)
    assert contents(out) == before


def test_ranks_stay_tied_to_the_maps_that_were_left_out(store, out):
    export_store(store, out, format="ranks")
    maps = hashlib.sha256((store / layout.shard_file("attribution", 1, 3)).read_bytes()).hexdigest()
    file = out / layout.record_file(1)
    record = json.loads(file.read_text())
    assert record["attribution_sha256"] == maps
    file.write_text(json.dumps(sealed(record | {"attribution_sha256": "0" * 64})))
    assert StoreReader(out).ranking("positive-3").missing_shards == [1]


def test_a_thin_copy_of_a_thin_copy_is_the_same(store, out):
    export_store(store, out, format="ranks")
    again = out.with_name("again")
    export_store(out, again, format="ranks")
    assert contents(again) == contents(out)
    assert contents(export_store(out, out.with_name("copy"))) == contents(out)


def test_only_what_was_there_is_said_to_be_left_out(tmp_path, out):
    export_store(make_store(tmp_path / "small.zarr", pixels=False), out, format="ranks")
    assert StoreReader(out).omitted == ("attribution",)
    assert StoreReader(out).attributes["omitted"] == ["attribution"]


def test_ranks_need_a_ranking(tmp_path, out):
    with pytest.raises(UserError, match="igstore rank"):
        export_store(make_store(tmp_path / "small.zarr", rankings=()), out, format="ranks")
    assert list(out.parent.iterdir()) == []


def thin_bytes(spec: BuildSpec, n_images: int, n_blocks: int) -> int:
    """Bytes of the image-shaped arrays and scalars of a thin copy with one ranking, ids apart."""
    n_shards = layout.shard_count(n_images, spec.shard_size)
    ranks = sum(np.dtype(variable.dtype).itemsize * n_blocks for variable in layout.rank_variables(n_blocks).values())
    scalars = sum(
        np.dtype(variable.dtype).itemsize
        for name, variable in layout.variables(spec, layout.OMISSIBLE).items()
        if name != "image_id"
    )
    index = 2 * (16 * spec.shard_size + 4)
    return n_images * ranks + n_shards * (spec.shard_size * scalars + index)


def test_ranks_of_imagenet_are_under_1800_megabytes(tmp_path, out):
    path = make_store(tmp_path / "small.zarr", size=(24, 24))
    export_store(path, out, format="ranks")
    spec = StoreReader(path).spec
    arrays = {name: content for name, content in contents(out).items() if "/c/" in name}
    on_disk = sum(len(content) for name, content in arrays.items() if not name.startswith("image_id"))
    assert on_disk == thin_bytes(spec, 10, 64)
    imagenet = BuildSpec(
        **{**vars(spec), "preprocessing": Preprocessing(resize=256, crop=(224, 224)), "shard_size": 500}
    )
    ids = 50_000 * (4 + len("ILSVRC2012_val_00000293"))
    records, metadata = 2 * 100 * 8_000, 1_000_000  # generously
    total = thin_bytes(imagenet, 50_000, 75 * 75) + ids + records + metadata
    assert 1.68e9 < total < 1.8e9


def test_hdf5_is_datasets_to_be_mapped(store, out):
    export_store(store, out, format="hdf5")
    with h5py.File(out) as file:
        for name in paths(StoreReader(store).spec):
            expected, dataset = zarr.open_array(store / name, mode="r")[:], file[name]
            assert dataset.chunks is None
            assert dataset.compression is None
            if name == "image_id":
                assert h5py.check_string_dtype(dataset.dtype).encoding == "utf-8"
                assert dataset.asstr()[:].tolist() == expected.tolist()
                continue
            np.testing.assert_array_equal(dataset[:], expected)
            mapped = np.memmap(out, dataset.dtype, "r", dataset.id.get_offset(), dataset.shape)
            np.testing.assert_array_equal(mapped, expected)


def test_hdf5_says_all_that_the_store_says(store, out):
    export_store(store, out, format="hdf5")
    reader = StoreReader(store)
    with h5py.File(out) as file:
        assert json.loads(file.attrs["igstore"]) == reader.attributes
        assert file.attrs["model"] == reader.spec.model
        assert file.attrs["n_steps"] == 4
        assert file.attrs["pixels"]
        assert json.loads(file.attrs["crop"]) == [16, 16]
        group = zarr.open_group(store / "ranks/absolute-5", mode="r")
        assert json.loads(file["ranks/absolute-5"].attrs["igstore"]) == dict(group.attrs)
        ranked = {name: reader.ranking(name).records for name in RANKINGS}
        for name, records in ({"build": reader.records} | ranked).items():
            found = [json.loads(record) for record in file[f"records/{name}"].asstr()]
            assert [own(record) for record in found] == [own(records[shard]) for shard in range(3)]
            assert all(map(is_sealed, found))


@pytest.mark.parametrize("way", ["zarr", "zstd", "ranks"])
def test_hdf5_is_a_store_and_leads_back(store, out, way):
    """Whatever a store is copied to and from, what it holds stays the same."""
    first, file, back = out.with_name("first"), out.with_name("file.h5"), out.with_name("back")
    export_store(store, first, **FORMS[way])
    export_store(first, file, format="hdf5")
    assert verify_store(file) == []
    export_store(file, back)
    assert verify_store(back) == []
    if way == "ranks":
        assert contents(back) == contents(first)
        assert StoreReader(file).omitted == ("attribution", "pixels")
    else:
        assert contents(back) == contents(store)
        for (image, label), (expected, target) in zip(MaskedImageNet(file), MaskedImageNet(store), strict=True):
            assert label == target
            np.testing.assert_array_equal(image, expected)


def test_damage_to_an_hdf5_file_is_found(store, out):
    export_store(store, out, format="hdf5")
    with h5py.File(out) as file:
        offset = file["attribution"].id.get_offset()
    with out.open("r+b") as file:
        file.seek(offset + 8 * 16 * 16 * 2)  # the first byte of shard 1
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    (finding,) = [finding for finding in verify_store(out) if not finding.is_missing]
    assert (finding.shard, finding.array) == (1, "attribution")
    with pytest.raises(DamagedStoreError, match="attribution/c/1/0/0 has changed"):
        export_store(out, out.with_name("back"))


def test_hdf5_records_check_the_pieces(store, out):
    export_store(store, out, format="hdf5")
    spec = StoreReader(store).spec
    with h5py.File(out) as file:
        built = [json.loads(record) for record in file["records/build"].asstr()]
        ranked = [json.loads(record) for record in file["records/positive-3"].asstr()]
        for name, variable in layout.variables(spec).items():
            for shard, record in enumerate(built):
                piece = file[name][slice(*record["images"])]
                content = b"".join(one + b"\0" for one in piece) if name == "image_id" else piece.tobytes()
                recorded = record["files"][layout.shard_file(name, shard, len(variable.dims))]
                assert recorded == checksum(content)
        for shard in range(3):
            maps = built[shard]["files"][layout.shard_file("attribution", shard, 3)]
            assert ranked[shard]["attribution_sha256"] == maps["sha256"]


def test_xarray_opens_hdf5_with_names_of_dimensions(store, out):
    export_store(store, out, format="hdf5")
    with xr.open_dataset(out, engine="h5netcdf") as opened:
        expected = xr.open_zarr(store).load()
        assert set(opened.data_vars) == set(expected.data_vars)
        for name, variable in expected.data_vars.items():
            assert opened[name].dims == variable.dims
            assert opened[name].attrs["description"] == variable.attrs["description"]
            np.testing.assert_array_equal(opened[name].astype(variable.dtype), variable)
    with xr.open_dataset(out, engine="h5netcdf", group="ranks/positive-3") as ranks:
        assert dict(ranks.sizes) == {"image": N, "block_y": 6, "block_x": 6}
        assert ranks["rank"].dims == ranks["share"].dims == ("image", "block_y", "block_x")


def test_hdf5_holds_as_many_class_names_as_there_are(tmp_path, out):
    names = [f"a class with a rather long name, number {index}" for index in range(22_000)]  # 1 MB
    path = make_store(tmp_path / "small.zarr", n=2, class_names=names)
    export_store(path, out, format="hdf5")
    with h5py.File(out) as file:
        assert json.loads(file.attrs["class_names"]) == names
        assert json.loads(file.attrs["igstore"])["class_names"] == names


@pytest.mark.parametrize("options", [{"reduce": "none", "rankings": ()}, {"pixels": False}], ids=["none", "no pixels"])
def test_hdf5_has_what_the_store_has(tmp_path, out, options):
    path = make_store(tmp_path / "small.zarr", **options)
    export_store(path, out, format="hdf5")
    with xr.open_dataset(out, engine="h5netcdf") as opened:
        expected = xr.open_zarr(path)
        assert {name: one.dims for name, one in opened.items()} == {name: one.dims for name, one in expected.items()}
        np.testing.assert_array_equal(opened["attribution"], expected["attribution"])


def test_without_h5py_it_says_what_to_install(store, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="pip install"):
        export_store(store, out, format="hdf5")


@each_form
def test_unfinished_stores_are_refused(tmp_path, out, options):
    unbuilt = make_store(tmp_path / "unbuilt.zarr", shards=[0, 2])
    with pytest.raises(UserError, match=r"1 of 3 shards .*igstore build"):
        export_store(unbuilt, out, **options)
    unranked = make_store(tmp_path / "unranked.zarr")
    (unranked / layout.record_file(1, "positive-3")).unlink()
    with pytest.raises(UserError, match="igstore rank"):
        export_store(unranked, out, **options)
    assert list(out.parent.iterdir()) == []


@each_form
def test_what_is_there_is_left_alone(store, out, options):
    out.write_text("mine")
    with pytest.raises(StoreExistsError):
        export_store(store, out, **options)
    assert out.read_text() == "mine"
    assert list(out.parent.iterdir()) == [out]


@each_form
def test_damage_is_not_passed_on(tmp_path, out, options):
    path = make_store(tmp_path / "small.zarr")
    file = path / "ranks/positive-3/share/c/1/0/0"
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedStoreError, match=r"ranks/positive-3/share/c/1/0/0 has changed"):
        export_store(path, out, **options)
    assert list(out.parent.iterdir()) == []


def test_damaged_records_and_attributes_are_not_passed_on(tmp_path, out):
    for name, field in (("records/00001.json", ("seconds", 7.0)), ("zarr.json", None)):
        path = make_store(tmp_path / Path(name).stem)
        content = json.loads((path / name).read_text())
        if field:
            content |= [field]
        else:
            content["attributes"]["class_names"][0] = "wasp"
        (path / name).write_text(json.dumps(content))
        with pytest.raises(DamagedStoreError, match="changed since"):
            export_store(path, out)


@each_form
def test_an_interrupted_export_leaves_nothing(store, out, monkeypatch, options):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("igstore.cli.progress.Progress.advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_store(store, out, **options)
    assert list(out.parent.iterdir()) == []


KILLED = """
import os, signal, sys
import igstore
from igstore.cli.progress import Progress
Progress.advance = lambda *_: os.kill(os.getpid(), getattr(signal, sys.argv[4]))
igstore.export_store(sys.argv[1], sys.argv[2], format=sys.argv[3])
"""


@pytest.mark.parametrize("form", ["zarr", "hdf5"])
def test_a_killed_export_leaves_nothing_that_looks_done_and_is_begun_anew(store, out, form):
    command = [sys.executable, "-c", KILLED, store, out, form]
    done = subprocess.run([*command, "SIGKILL"], check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert [path.suffix for path in out.parent.iterdir()] == [".partial"]
    # what somebody is making at the same time is not swept
    with subprocess.Popen([*command, "SIGSTOP"], cwd=Path(__file__).parents[1]) as stopped:
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)
        assert len(list(out.parent.iterdir())) == 1  # that of the killed one is gone
        export_store(store, out, format=form)
        assert sorted(path.suffix for path in out.parent.iterdir()) == ["", ".partial"]
        stopped.kill()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tar"}, "format is 'tar'; it must be one of zarr, ranks, hdf5"),
        ({"format": "hdf5", "compress": "zstd"}, "compress does not go with format hdf5"),
        ({"compress": "blosc"}, "compress is 'blosc'; it must be one of zstd"),
    ],
    ids=["format", "both", "codec"],
)
def test_mistakes_are_named(store, out, options, message):
    with pytest.raises(UserError, match=message):
        export_store(store, out, **options)
    with pytest.raises(StoreNotFoundError):
        export_store(out.with_name("nothing"), out)


def test_a_folder_that_is_not_there_is_not_made(store, out):
    with pytest.raises(UserError, match="cannot be made"):
        export_store(store, out / "deeper")


def test_the_command(store, out, capsys):
    assert main([str(store), str(out), "--format", "ranks"]) == cli.DONE
    assert capsys.readouterr().out.startswith(f"{out}: ")
    assert verify_store(out) == []
    assert cli.run(main, [str(store), str(out)]) == cli.MISUSED
    assert "exists" in capsys.readouterr().err
    quiet = [str(store), str(out.with_name("b")), "--compress", "zstd", "--json", "--quiet"]
    assert cli.run(main, quiet) == cli.DONE
    assert json.loads(capsys.readouterr().out)["format"] == "zarr"


# full disks

# Exports to a path with room for ever more: bytes of a file at most, or "mount" a file system of that size there.
FULL = """
import json, resource, signal, subprocess, sys
from pathlib import Path
import igstore, igstore.errors

store, folder, form, how, *sizes = sys.argv[1:]
out = Path(folder, "out")
for size in map(int, sizes):
    if how == "mount":
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        igstore.export_store(store, out, format=form)
        said = ""
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    left = sorted(path.name for path in Path(folder).iterdir())
    print(json.dumps([said, left]), flush=True)
    if how == "mount":
        subprocess.run(["umount", folder], check=True)
    elif left:
        break
"""


@pytest.mark.parametrize("form", ["zarr", "ranks", "hdf5", "quantus", "virelay"])
@pytest.mark.parametrize("how", ["mount", "limit"])
def test_a_full_disk_is_told_and_nothing_is_left(store, tmp_path, form, how):
    folder = tmp_path / "small"
    folder.mkdir()
    if how == "mount":
        probe = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
        if subprocess.run(probe, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a file system")
        subprocess.run(["umount", folder], check=True)
        sizes = [2**13 * 2**step for step in range(9)] + [2**24]
    else:
        sizes = [100, 3000, 9000, 2**14, 2**15, 2**16, 2**17, 2**24]
    done = subprocess.run(
        [sys.executable, "-c", FULL, store, folder, form, how, *map(str, sizes)],
        capture_output=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()  # a signal, rather than an error, ended it before
    results = [json.loads(line) for line in done.stdout.splitlines()]
    *failed, (said, left) = results
    assert (said, left) == ("", ["out"])
    assert len(failed) >= 3
    for said, left in failed:
        if said:  # the disk was too small, and by whatever margin it is said
            assert left == []
            assert str(folder / "out") in said
            assert "No space left on device" in said or "File too large" in said


@pytest.mark.parametrize("form", ["hdf5", "virelay"])
@pytest.mark.parametrize("event", ["open", "os.rename", "os.rmdir"])
def test_whenever_an_export_is_killed_the_next_one_leaves_nothing_of_it(store, out, form, event):
    killed = KILLED_AT.format(event=event)
    for count in (1, 2, 5):
        command = [sys.executable, "-c", killed, store, out, form, str(count)]
        done = subprocess.run(command, check=False, capture_output=True, cwd=Path(__file__).parents[1])
        assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
        with contextlib.suppress(StoreExistsError):  # it was killed just after the rename
            export_store(store, out, format=form)
        assert [path.name for path in out.parent.iterdir()] == [out.name]
        shutil.rmtree(out) if out.is_dir() else out.unlink()


KILLED_AT = """
import os, signal, sys
import igstore, igstore.files.all_or_nothing
left = int(sys.argv[4])

def hook(event, arguments):
    global left
    if event == {event!r} and ".partial" in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
igstore.export_store(sys.argv[1], sys.argv[2], format=sys.argv[3])
"""


def test_hdf5_names_an_id_that_it_cannot_hold(tmp_path, out):
    ids = [("a\0b", np.zeros((18, 18, 3), np.uint8), 0), ("c", np.zeros((18, 18, 3), np.uint8), 1)]
    build_store(NETWORK, ids, tmp_path / "zero.zarr", **SETTINGS)
    with pytest.raises(UserError, match=r"a.x00b' has a zero byte"):
        export_store(tmp_path / "zero.zarr", out, format="hdf5")
