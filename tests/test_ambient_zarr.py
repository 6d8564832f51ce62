"""The format of stores is igstore's own to state, however zarr-python is configured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from stores import make_store
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from igstore import MaskedImageNet, export_store, open_store, rank_store, store_info, verify_store
from igstore.errors import DamagedStoreError
from igstore.schema import IMAGE, BuildSpec, Preprocessing
from igstore.storage import StoreReader, layout, metadata, ranking_metadata
from igstore.storage.zarr_metadata import array_metadata

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "format 2": {"default_zarr_format": 2},
    "empty chunks left out": {"array.write_empty_chunks": False},
    "empty chunks written": {"array.write_empty_chunks": True},
    "order of Fortran": {"array.order": "F"},
    "shards of another size": {"array.target_shard_size_bytes": 100},
    "no indentation": {"json_indent": None},
    "a codec that is not there": {"codecs.zstd": "no.such.Codec", "codecs.sharding_indexed": "no.such.Codec"},
    "one at a time": {"async.concurrency": 1, "threading.max_workers": 1},
}


def contents(path: Path) -> dict[str, bytes]:
    """Every file but the records, which say when they were made."""
    found = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in found.items() if not name.startswith("records/")}


def make(path: Path) -> Path:
    return make_store(path, 6, size=(7, 8), failed=(3,))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make(tmp_path_factory.mktemp("plain") / "store.zarr")
    rank_store(path, score="absolute", block=4)
    return path


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_however_zarr_is_configured_everything_is_as_ever(plain, tmp_path, configuration):
    with zarr.config.set(configuration):
        made = make(tmp_path / "store.zarr")
        rank_store(made, score="absolute", block=4)
        assert set(verify_store(made)) == set(verify_store(plain))
        assert len(MaskedImageNet(made)) == 5
        assert store_info(made).is_complete
        assert open_store(made).compute().identical(open_store(plain).compute())
        for way in ({}, {"compress": "zstd"}, {"format": "ranks"}, {"format": "hdf5"}):
            copy = export_store(made, tmp_path / "copy", **way)
            np.testing.assert_array_equal(open_store(copy).label, open_store(plain).label)
            if "format" not in way:
                np.testing.assert_array_equal(open_store(copy).pixels, open_store(plain).pixels)
            shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
    assert contents(made) == contents(plain)


def test_the_environment_decides_no_more(plain, tmp_path):
    line = "import sys; sys.path.insert(0, 'tests'); from test_ambient_zarr import *; make(Path(sys.argv[1]))"
    ambient = {"ZARR_DEFAULT_ZARR_FORMAT": "2", "ZARR_ARRAY__ORDER": "F", "ZARR_ARRAY__WRITE_EMPTY_CHUNKS": "False"}
    subprocess.run(
        [sys.executable, "-c", line, tmp_path / "store.zarr"],
        env=os.environ | ambient,
        cwd=Path(__file__).parents[1],
        check=True,
    )
    made, expected = contents(tmp_path / "store.zarr"), contents(plain)
    assert {name: expected[name] for name in made if name != "zarr.json"} == {
        name: content for name, content in made.items() if name != "zarr.json"
    }


def test_images_that_zarr_reads_are_in_the_usual_order(tmp_path):
    """Whatever is compressed in other ways is read by zarr-python, which may be configured to turn axes round."""
    path = make(tmp_path / "store.zarr")
    pixels = np.asarray(zarr.open_array(path / "pixels", mode="r")[:])
    shutil.rmtree(path / "pixels")
    array = zarr.create_array(
        path / "pixels",
        shape=pixels.shape,
        chunks=(1, *pixels.shape[1:]),
        shards=(4, *pixels.shape[1:]),
        dtype="u1",
        compressors=zarr.codecs.BloscCodec(),
    )
    array[:] = pixels
    with zarr.config.set({"array.order": "F"}):
        read = StoreReader(path).array("pixels").read([0, 5])
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, pixels[[0, 5]])


# what is said is what zarr-python says of the same


def by_zarr(group: str, variables: dict[str, layout.Variable], sizes: dict[str, int], shard_size: int, compress: Any):
    memory: dict[str, Any] = {}
    made = zarr.create_group(MemoryStore(memory), path=group, attributes={"a": [1, "b"]}, zarr_format=3)
    for name, variable in variables.items():
        shape = tuple(sizes[dim] for dim in variable.dims)
        made.create_array(
            name,
            shape=shape,
            shards=(shard_size, *shape[1:]) if variable.is_sharded else None,
            chunks=(1, *shape[1:]) if variable.is_sharded else (shard_size,),
            dtype=variable.dtype,
            fill_value=variable.fill_value,
            compressors=ZstdCodec(level=3, checksum=False) if compress and variable.is_sharded else None,
            filters=None,
            dimension_names=variable.dims,
            attributes={"description": variable.description},
        )
    return {name: buffer.to_bytes() for name, buffer in memory.items()}


@pytest.mark.parametrize("compress", [None, "zstd"])
@pytest.mark.parametrize("reduce", ["sum", "none"])
@pytest.mark.parametrize("n", [1, 9])
def test_metadata_are_those_that_zarr_writes(compress, reduce, n):
    spec = BuildSpec(
        model="m",
        weights="w",
        weights_sha256="0" * 64,
        preprocessing=Preprocessing(resize=None, crop=(7, 8)),
        images_fingerprint="f",
        shard_size=4,
        reduce=reduce,
    )
    sizes = {**layout.sizes(spec), IMAGE: n}
    ours = metadata(spec, n, {"compress": compress} if compress else {})
    theirs = by_zarr("", layout.variables(spec), sizes, 4, compress)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"zarr.json"}:
        assert ours[name] == theirs[name], name
    assert {**json.loads(ours["zarr.json"]), "attributes": 0} == {**json.loads(theirs["zarr.json"]), "attributes": 0}
    ours = ranking_metadata(spec, n, "signed-2", block=2, attributes={"a": [1, "b"]}, compress=compress)
    sizes = {IMAGE: n, "block_y": 4, "block_x": 4}
    theirs = by_zarr("ranks/signed-2", layout.rank_variables(16), sizes, 4, compress)
    del theirs["zarr.json"]
    assert ours == theirs


def document(**changes: Any) -> dict[str, Any]:
    variable = layout.Variable(("image", "y", "x"), "float16", 0.0, "maps")
    theirs = by_zarr("", {"maps": variable}, {"image": 9, "y": 7, "x": 8}, 4, changes.pop("compress", None))
    return json.loads(theirs["maps/zarr.json"]) | changes


@pytest.mark.parametrize(
    ("changes", "encoding"),
    [
        ({}, "raw"),
        ({"compress": "zstd"}, "zstd"),
        ({"codecs": ["bytes"]}, None),  # no order of bytes
        ({"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]}, "plain"),
        ({"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]}, None),
        ({"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip"}]}, None),
    ],
    ids=str,
)
def test_how_arrays_are_encoded(changes, encoding):
    found = array_metadata(document(**changes))
    assert found.encoding == encoding
    assert (found.shape, found.chunks, found.dtype) == ((9, 7, 8), (4, 7, 8), np.dtype("float16"))


def test_other_shards_are_left_to_zarr():
    def changed(**configuration: Any) -> dict[str, Any]:
        made = document()
        made["codecs"][0]["configuration"] |= configuration
        return made

    assert array_metadata(changed(index_location="start")).encoding is None
    assert array_metadata(changed(chunk_shape=[2, 7, 8])).encoding is None
    assert array_metadata(changed(index_codecs=["bytes"])).encoding is None
    short = changed()
    del short["codecs"][0]["configuration"]["index_location"]
    assert array_metadata(short).encoding == "raw"  # the end is the default


@pytest.mark.parametrize(
    "changes",
    [
        {"zarr_format": 2},
        {"node_type": "group"},
        {"shape": [9, -1, 8]},
        {"shape": [9, 7.0, 8]},
        {"shape": [True, 7, 8]},
        {"shape": [9, 7]},
        {"shape": []},
        {"shape": 9},
        {"data_type": "object"},
        {"data_type": ["float16"]},
        {"data_type": {"name": "numpy.datetime64"}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 7, 8]}}},
        {"chunk_grid": "regular"},
        {"codecs": []},
        {"codecs": [None]},
        {"codecs": 3},
        {"codecs": [{"name": "sharding_indexed"}]},
    ],
    ids=str,
)
def test_what_is_no_array_is_damage(plain, tmp_path, changes):
    path = Path(shutil.copytree(plain, tmp_path / "store.zarr"))
    file = path / "attribution/zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(DamagedStoreError):
        StoreReader(path).array("attribution").read([0])
