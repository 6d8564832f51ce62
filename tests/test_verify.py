from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from networks import Smooth
from torch import Tensor, nn

from igstore import (
    Classifier,
    MaskedImageNet,
    Preprocessing,
    build_store,
    classifier_from_module,
    cli,
    export_store,
    open_store,
    rank_store,
    store_info,
    verify_store,
)
from igstore.attribution import Attributor
from igstore.building import Part
from igstore.building.repair import repair_store
from igstore.errors import SettingsMismatchError, StoreNotFoundError, UserError
from igstore.files import sealed
from igstore.images import as_image_list
from igstore.info import main as info_main
from igstore.schema import FAILED, BuildSpec
from igstore.storage import StoreReader, extend_store, finish_store, lay_out_store, write_rank_shard, write_shard
from igstore.verify import main

N, SHARD_SIZE, N_CLASSES = 21, 8, 7  # three shards, the last of five images
SETTINGS = {"preprocessing": Preprocessing(resize=18, crop=(16, 16)), "n_steps": 4, "shard_size": SHARD_SIZE}
NAMES = tuple(f"class {index}" for index in range(N_CLASSES))


class Picky(nn.Module):
    """A small classifier that makes nothing of an image whose first pixel is white."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Smooth(N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + torch.where(x[:, :1, 0, 0] > 2.2, torch.nan, 0.0)


class Images(list):
    """A data set of (image, label) with names of classes."""

    classes = NAMES


def images(n: int = N) -> Images:
    """Random images, of which number 3 fails and each fifth has no label."""
    random = np.random.default_rng(0)
    made = Images(
        (random.integers(0, 200, (18, 18, 3), np.uint8), None if i % 5 == 2 else i % N_CLASSES) for i in range(n)
    )
    made[3][0][1, 1] = 255
    return made


NETWORK = Picky().eval()


def build(path: Path, n: int = N, **settings: Any) -> Path:
    build_store(NETWORK, images(n), path, **SETTINGS | settings)
    return path


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = build(tmp_path_factory.mktemp("verify") / "model.zarr")
    rank_store(path, score="absolute", block=5)
    return path


@pytest.fixture
def path(intact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(intact, tmp_path / "model.zarr")


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_an_intact_store_has_nothing_wrong(path, capsys):
    before = contents(path)
    assert verify_store(path) == []
    assert main([str(path)]) == cli.DONE
    assert capsys.readouterr().out == f"{path}: nothing wrong\n"
    assert contents(path) == before


@pytest.mark.parametrize(
    "settings",
    [
        {"reduce": "none"},
        {"reduce": "absolute", "pixels": False},
        {"output": "probability", "n_steps": 9, "method": "gausslegendre"},
        {"baseline": "noise", "limit": 9},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_whatever_the_settings_are(tmp_path, settings):
    assert verify_store(build(tmp_path / "model.zarr", **settings)) == []


def flipped_and_missed(path: Path, n_files: int | None, n_bits: int) -> list[tuple[str, int]]:
    """Bits of files, (file, bit), that are flipped one at a time without `verify_store` naming the file."""
    random = np.random.default_rng(0)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    missed = []
    for file in random.choice(files, n_files or len(files), replace=False):
        content = file.read_bytes()
        name = file.relative_to(path).as_posix()
        for bit in random.integers(0, 8 * len(content), n_bits).tolist():
            flip(file, bit)
            if name not in [finding.file for finding in verify_store(path)] and not says_the_same(file, content):
                missed.append((name, bit))
            file.write_bytes(content)
    return missed


def says_the_same(file: Path, content: bytes) -> bool:
    """Whether a flipped bit leaves what a JSON file says: the E of an exponent, the digits of a \\u escape."""
    try:
        return file.suffix == ".json" and json.loads(file.read_bytes()) == json.loads(content)
    except ValueError:
        return False


def test_any_flipped_bit_is_found_and_its_file_named(path):
    assert flipped_and_missed(path, 20, 1) == []


@pytest.mark.slow
def test_many_flipped_bits_are_found_and_their_files_named(path):
    assert flipped_and_missed(path, None, 10) == []


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def edit(path: Path, change: Callable[[dict[str, Any]], Any], *, seal: bool = False) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(sealed(content) if seal else content))


def linked(file: Path) -> None:
    elsewhere = file.parents[3] / "elsewhere.json"
    shutil.move(file, elsewhere)
    file.symlink_to(elsewhere)


def folder_at(file: Path) -> None:
    file.unlink()
    (file / "inner").mkdir(parents=True)
    (file / "inner/file").write_text("something")


def pipe_at(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


# what to do to a store, what `verify` says of it, and the images that the same build attributes again
DAMAGES: dict[str, tuple[Callable[[Path], Any], str, range]] = {
    "a map": (
        lambda p: flip(p / "attribution/c/1/0/0", 999),
        "shard 1 of attribution: attribution/c/1/0/0 has changed",
        range(8, 16),
    ),
    "an index": (
        lambda p: flip(p / "attribution/c/0/0/0", -80),
        "shard 0 of attribution: attribution/c/0/0/0",
        range(8),
    ),
    "pixels": (lambda p: flip(p / "pixels/c/2/0/0/0", 5), "shard 2 of pixels: pixels/c/2/0/0/0", range(16, 21)),
    "a scale": (lambda p: flip(p / "scale/c/2", 30), "shard 2 of scale: scale/c/2", range(16, 21)),
    "what a short shard is filled up with": (lambda p: flip(p / "scale/c/2", 8 * 30), "scale/c/2", range(16, 21)),
    "a shard cut short": (
        lambda p: (p / "attribution/c/1/0/0").write_bytes((p / "attribution/c/1/0/0").read_bytes()[:-1]),
        "attribution/c/1/0/0 has 4227 bytes, and had 4228",
        range(8, 16),
    ),
    "an empty file": (
        lambda p: (p / "output/c/0").write_bytes(b""),
        "shard 0 of output: output/c/0 has 0 bytes",
        range(8),
    ),
    "shards swapped": (
        lambda p: swap(p / "attribution/c/0/0/0", p / "attribution/c/1/0/0"),
        "shard 0 of attribution",
        range(16),
    ),
    "a file gone": (lambda p: (p / "n_steps/c/1").unlink(), "shard 1 of n_steps: n_steps/c/1 is missing", range(8, 16)),
    "a link in its place": (
        lambda p: (
            shutil.copy(p / "output/c/1", p.parent),
            (p / "output/c/1").unlink(),
            (p / "output/c/1").symlink_to(p.parent / "1"),
        ),
        "output/c/1 is not a regular file",
        range(8, 16),
    ),
    "a record": (
        lambda p: edit(p / "records/00001.json", lambda record: record.update(seconds=99.0)),
        "shard 1: records/00001.json has changed",
        range(8, 16),
    ),
    "a record cut short": (
        lambda p: (p / "records/00001.json").write_text('{"shard": 1,'),
        "shard 1: records/00001.json is not the record of a shard",
        range(8, 16),
    ),
    "records swapped": (
        lambda p: swap(p / "records/00000.json", p / "records/00001.json"),
        "shard 0: records/00000.json is not the record",
        range(16),
    ),
    "another build's record": (
        lambda p: edit(p / "records/00000.json", lambda record: record["settings"].update(n_steps=5), seal=True),
        "shard 0: records/00000.json is of a shard that was made with other settings",
        range(8),
    ),
    "a record gone": (lambda p: (p / "records/00002.json").unlink(), "not finished: shard 2", range(16, 21)),
    "a label": (lambda p: flip(p / "label/c/1", 3), "shard 1 of label: label/c/1 has changed", range(0)),
    "names": (
        lambda p: (p / "image_id/c/0").write_bytes(b"?"),
        "shard 0 of image_id: image_id/c/0 has 1 bytes",
        range(0),
    ),
    "ranks": (
        lambda p: flip(p / "ranks/positive-3/rank/c/1/0/0", 77),
        "shard 1 of ranks/positive-3/rank: ranks/positive-3/rank/c/1/0/0 has changed",
        range(0),
    ),
    "shares swapped": (
        lambda p: swap(p / "ranks/positive-3/share/c/0/0/0", p / "ranks/positive-3/share/c/1/0/0"),
        "shard 0 of ranks/positive-3/share",
        range(0),
    ),
    "a record of ranks": (
        lambda p: edit(p / "records/positive-3/00002.json", lambda record: record.update(attribution_sha256="0")),
        "shard 2: records/positive-3/00002.json has changed",
        range(0),
    ),
    "metadata of an array": (
        lambda p: edit(p / "attribution/zarr.json", lambda meta: meta.update(fill_value=1.0)),
        "attribution: attribution/zarr.json is not as it was written: fill_value is 1.0, not 0.0",
        range(0),
    ),
    "names of dimensions": (
        lambda p: edit(p / "scale/zarr.json", lambda meta: meta.update(dimension_names=["picture"])),
        "dimension_names is ['picture'], not ['image']",
        range(0),
    ),
    "a codec": (
        lambda p: edit(p / "pixels/zarr.json", lambda meta: meta.update(codecs=[{"name": "numcodecs.pickle"}])),
        "pixels: pixels/zarr.json is not as it was written: codecs is",
        range(0),
    ),
    "metadata of ranks": (
        lambda p: (p / "ranks/positive-3/rank/zarr.json").write_text("{}"),
        "ranks/positive-3/rank: ranks/positive-3/rank/zarr.json is not as it was written",
        range(0),
    ),
    "the copy of the metadata": (
        lambda p: edit(p / "zarr.json", lambda meta: meta["consolidated_metadata"]["metadata"].pop("scale")),
        "store: zarr.json holds a copy of the others' metadata that differs",
        range(0),
    ),
    "the store's settings": (
        lambda p: edit(p / "zarr.json", lambda meta: meta["attributes"].update(n_steps=9)),
        "store: zarr.json has attributes that have changed",
        range(0),
    ),
    "the number of images": (
        lambda p: edit(p / "zarr.json", lambda meta: meta["attributes"].update(n_images=10**12)),
        "zarr.json is damaged, and nothing else can be looked at",
        range(0),
    ),
    "the store's metadata cut short": (
        lambda p: (p / "zarr.json").write_bytes((p / "zarr.json").read_bytes()[:500]),
        "zarr.json is damaged, and nothing else can be looked at",
        range(0),
    ),
    "a link to a right record": (
        lambda p: linked(p / "records/00001.json"),
        "records/00001.json is not a regular file",
        range(8, 16),
    ),
    "a link that leads nowhere": (
        lambda p: ((p / "records/00001.json").unlink(), (p / "records/00001.json").symlink_to("nothing")),
        "records/00001.json is not a regular file",
        range(8, 16),
    ),
    "a link among the records of ranks": (
        lambda p: linked(p / "records/positive-3/00001.json"),
        "records/positive-3/00001.json is not a regular file",
        range(0),
    ),
    "a folder in a record's place": (
        lambda p: folder_at(p / "records/00001.json"),
        "records/00001.json is not a regular file",
        range(8, 16),
    ),
    "a pipe in a record's place": (
        lambda p: pipe_at(p / "records/00001.json"),
        "records/00001.json is not a regular file",
        range(8, 16),
    ),
    "a folder in a file's place": (
        lambda p: folder_at(p / "attribution/c/1/0/0"),
        "attribution/c/1/0/0 is not a regular file",
        range(8, 16),
    ),
    "a pipe in a file's place": (
        lambda p: pipe_at(p / "scale/c/1"),
        "scale/c/1 is not a regular file",
        range(8, 16),
    ),
    "a pipe among the names": (
        lambda p: pipe_at(p / "image_id/c/1"),
        "image_id/c/1 is not a regular file",
        range(0),
    ),
    "a folder among the names": (
        lambda p: folder_at(p / "image_id/c/1"),
        "image_id/c/1 is not a regular file",
        range(0),
    ),
    "a pipe instead of metadata": (
        lambda p: pipe_at(p / "scale/zarr.json"),
        "scale/zarr.json is not as it was written: it cannot be read",
        range(0),
    ),
    "a folder instead of metadata": (
        lambda p: folder_at(p / "scale/zarr.json"),
        "scale/zarr.json is not as it was written: it cannot be read",
        range(0),
    ),
    "a file in a folder's place": (
        lambda p: (shutil.rmtree(p / "scale/c"), (p / "scale/c").write_text("something")),
        "scale/c/1 is missing",
        range(21),
    ),
    "parts of a ranking": (
        lambda p: (
            shutil.copytree(p / "records/positive-3", p / "records/signed-7"),
            shutil.copytree(p / "ranks/positive-3", p / "ranks/signed-5"),
            (p / "ranks/signed-5/zarr.json").unlink(),
        ),
        "belongs to nothing in this store",
        range(0),
    ),
    "what a killed writer leaves": (
        lambda p: (p / f"scale/c/1.{'0' * 32}.partial").write_bytes(b"half"),
        "store: scale/c/1.00000000000000000000000000000000.partial was left by an interrupted process",
        range(0),
    ),
}


@pytest.fixture
def attributed(monkeypatch) -> list[str]:
    """The ids of the images that are attributed from now on."""
    ids = []
    submit = Attributor.submit

    def spy(self, pixels, labels, image_ids, reasons):
        ids.extend(image_ids)
        return submit(self, pixels, labels, image_ids, reasons)

    monkeypatch.setattr(Attributor, "submit", spy)
    return ids


@pytest.mark.parametrize(("damage", "says", "again"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_the_same_build_repairs_just_that(intact, path, attributed, capsys, damage, says, again):
    damage(path)
    assert main([str(path)]) == cli.FAILED
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if says in line], lines
    build(path)
    retried = ["03"]  # the image that fails is tried each time
    assert attributed in ([f"{image:02d}" for image in again], retried + [f"{image:02d}" for image in again])
    assert verify_store(path) == []
    repaired, expected = contents(path), contents(intact)
    assert repaired.keys() == expected.keys()
    for file in expected:
        if "records" not in file and file != "zarr.json":  # which say how long it took
            assert repaired[file] == expected[file], file


@pytest.mark.parametrize("shards", ["finished", "unfinished"])
@pytest.mark.parametrize("count", [b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\x15"])
def test_a_list_that_says_it_is_long_costs_its_repair_no_memory(path, count, shards):
    content = (path / "image_id/c/1").read_bytes()
    (path / "image_id/c/1").write_bytes(count + content[4:])
    if shards == "unfinished":
        (path / "records/00001.json").unlink()
    store = StoreReader(path)
    listed = as_image_list(images())
    tracemalloc.start()
    repair_store(path, store.spec, listed, store.attributes, part=Part())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6
    assert (path / "image_id/c/1").read_bytes() == content
    build(path)
    assert verify_store(path) == []


def rewrite(path: Path, shard: int, change: Callable[[dict[str, np.ndarray]], Any], **record: Any) -> None:
    """Write a shard again with other values and a record that is right about its files."""
    store = StoreReader(path)
    there = store.records[shard]
    arrays = {name: np.array(store.values(name, shard, there)) for name in store.variables}
    change(arrays)
    write_shard(path, store.spec, store.n_images, shard, arrays, {**there, **record}, instead_of=there)


def rewrite_ranks(path: Path, shard: int, change: Callable[[dict[str, np.ndarray]], Any], **record: Any) -> None:
    store = StoreReader(path)
    ranking = store.ranking("positive-3")
    there = ranking.records[shard]
    arrays = {name: ranking.array(name).read(range(*ranking.bounds(shard))) for name in ranking.variables}
    change(arrays)
    write_rank_shard(path, "positive-3", shard, arrays, {**there, **record}, instead_of=there)


def put(name: str, value: object, image: int = 1) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][image] = value

    return change


def scale_by(name: str, factor: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][1] *= factor

    return change


def reverse(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][1] = arrays[name][1, ::-1].copy()

    return change


def swap_images(*names: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        for name in names:
            arrays[name][[0, 1]] = arrays[name][[1, 0]]

    return change


# what becomes of shard 0, in which image 3 failed; whose problem it is; what is said
CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str, str]] = {
    "a status": (put("status", 7), "status", "says neither built nor failed for image 01"),
    "a class": (put("prediction", 1000), "prediction", "is no class for image 01"),
    "a target": (put("target", 6, image=slice(None)), "target", "is not the prediction for image"),
    "an output": (put("output", np.nan), "output", "is no logit for image 01"),
    "an error": (put("completeness_error", -0.5), "completeness_error", "is negative or no number for image 01"),
    "steps": (put("n_steps", 5), "n_steps", "is no number of steps of this build for image 01"),
    "a scale": (scale_by("scale", 1.5), "scale", "is no power of two for image 01"),
    "no scale": (put("scale", 0), "scale", "is no power of two for image 01"),
    "a map's size": (scale_by("attribution", 0.125), "attribution", "has no largest value in [1, 2] for image 01"),
    "a map that is not finite": (put("attribution", np.inf), "attribution", "is not finite for image 01"),
    "a failed image": (put("output", 1.0, image=3), "output", "is filled in, although it failed, for image 03"),
    "another failed image": (put("status", FAILED), "", "names other failed images than their statuses do"),
    "another scale": (scale_by("scale", 2.0), "completeness_error", "is not what map and outputs give for image 01"),
    "another output": (scale_by("output", 1.01), "completeness_error", "is not what map and outputs give for image 01"),
    "another image's map": (
        swap_images("attribution", "scale"),
        "completeness_error",
        "is not what map and outputs give for image 00 and 1 more",
    ),
}


@pytest.mark.parametrize(("change", "array", "says"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_values_that_contradict_each_other_are_found_though_checksums_are_right(path, change, array, says):
    rewrite(path, 0, change)
    file = f"{array}/c/0" + "/0/0" * (array == "attribution") if array else "records/00000.json"
    found = [finding for finding in verify_store(path) if not finding.is_missing]
    assert ("shard", 0, array or None, file) in [("shard", f.shard, f.array, f.file) for f in found]
    assert [f for f in found if says in f.problem and "delete records/00000.json" in f.problem], found


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"failed": {}}, "names other failed images"),
        ({"evaluations": 5}, "says 5 evaluations; the images' steps are 28"),
        ({"in_top5": 8}, "says 8 in the top 5; it must be between"),
    ],
    ids=["failed", "evaluations", "in_top5"],
)
def test_records_that_contradict_the_values_are_found(path, record, says):
    rewrite(path, 0, lambda arrays: None, **record)
    [finding] = verify_store(path)
    assert (finding.shard, finding.array, finding.file) == (0, None, "records/00000.json")
    assert says in finding.problem


@pytest.mark.parametrize(
    ("change", "array", "says"),
    [
        (put("rank", 0), "rank", "is no permutation of the blocks for image 09"),
        (reverse("rank"), "rank", "is not what the map gives for image 09"),
        (swap_images("rank", "share"), "rank", "is not what the map gives for image 08 and 1 more"),
        (reverse("share"), "share", "decreases with rank, or is not between 0 and 1 for image 09"),
        (scale_by("share", 0.5), "share", "is not what the map gives for image 09"),
        (scale_by("share", 2.0), "share", "or is not between 0 and 1 for image 09"),
    ],
    ids=["no permutation", "another permutation", "another image's", "not monotone", "other shares", "above 1"],
)
def test_ranks_that_are_not_those_of_the_maps_are_found(path, change, array, says):
    rewrite_ranks(path, 1, change)
    found = verify_store(path)
    assert [f for f in found if says in f.problem and f.array == f"ranks/positive-3/{array}" and f.shard == 1], found
    assert {finding.shard for finding in found} == {1}
    # permutation and order are looked at where the maps themselves are damaged, too
    flip(path / "attribution/c/1/0/0", 0)
    assert ("no permutation" in says or "decreases" in says or "between 0" in says) == any(
        says in finding.problem for finding in verify_store(path)
    )


def test_ranks_of_maps_that_were_replaced_are_not_finished_ones(path, capsys):
    before = contents(path)
    rewrite_ranks(path, 1, lambda arrays: None, attribution_sha256="0" * 64)
    assert contents(path) == before
    rewrite(path, 1, reverse("attribution"))
    assert main([str(path)]) == cli.FAILED
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [f"not finished: shard 1 of ranks/{name}" for name in ("absolute-5", "positive-3")]


@pytest.mark.parametrize(
    ("ids", "problem"),
    [(["00", "00", *map(str, range(12, 31))], "different"), ([f"{i:02d}" for i in range(21)][::-1], "in order")],
    ids=["twice", "unsorted"],
)
def test_names_that_are_no_list_are_found(path, ids, problem):
    store = StoreReader(path)
    attributes = store.attributes
    lay_out_store(path, store.spec, image_ids=ids, labels=store.scalars("label"), attributes=attributes)
    assert [f for f in verify_store(path) if f.array == "image_id" and problem in f.problem and f.shard is None]


def test_an_unfinished_store_is_said_to_be_just_that(path, tmp_path, capsys):
    build(tmp_path / "started.zarr", limit=9)
    extend_store(tmp_path / "started.zarr", image_ids=[f"{i:02d}" for i in range(N)], labels=images_labels())
    assert main([str(tmp_path / "started.zarr")]) == cli.FAILED
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "not finished: shards 1, 2",
        f"{tmp_path / 'started.zarr'}: nothing that is there is wrong; the same `igstore build`, or `igstore rank`, "
        "goes on",
    ]
    flip(tmp_path / "started.zarr/scale/c/0", 0)
    assert main([str(tmp_path / "started.zarr")]) == cli.FAILED
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "shard 0 of scale: scale/c/0 has changed since it was written"
    assert said[1] == "not finished: shards 1, 2"
    assert said[2].startswith(f"{tmp_path / 'started.zarr'}: 1 thing is wrong")


def images_labels() -> np.ndarray:
    return np.array([-1 if label is None else label for _, label in images()], np.int16)


def test_a_store_that_was_not_marked_complete(path):
    finish_store(path, {"complete": False})
    [finding] = verify_store(path)
    assert finding.is_missing
    assert finding.file == "zarr.json"


LITTER = [
    ".DS_Store",
    "._zarr.json",
    "records/.DS_Store",
    "records/._00000.json",
    "ranks/.DS_Store",
    "ranks/._positive-3",
    "ranks/@eaDir/zarr.json",
    "ranks/Thumbs.db",
    "pixels/c/0/0/0/.nfs0000000012345",
    "status/c/.fuse_hidden0000000100000001",
    "@eaDir/zarr.json@SynoEAStream",
    "@eaDir/zarr.json/SYNOINDEX_MEDIA_INFO",
    "Thumbs.db",
    "desktop.ini",
    "Icon\r",
    "lost+found/#12345",
    ".Trash-1000/files/zarr.json",
]


def test_what_other_systems_leave_is_no_damage(path, tmp_path):
    for name in LITTER:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"left by another system")
    assert verify_store(path) == []
    store = StoreReader(path)
    assert store.rankings == ["absolute-5", "positive-3"]
    assert store_info(path).is_complete
    rank_store(path, score="absolute")
    export_store(path, tmp_path / "copy.zarr")
    assert verify_store(path) == []
    assert not [file for file in (tmp_path / "copy.zarr").rglob("*") if file.name in map(os.path.basename, LITTER[:2])]


def test_what_nobody_left_by_itself_is_still_found(path):
    for name in ("Thumbs.db.zarr", "records/notes.txt", "eaDir"):
        (path / name).write_bytes(b"put there")
    assert sorted(finding.file for finding in verify_store(path)) == ["Thumbs.db.zarr", "eaDir", "records/notes.txt"]


def test_what_is_no_store_is_a_mistake_and_not_damage(tmp_path):
    with pytest.raises(StoreNotFoundError):
        verify_store(tmp_path / "nothing.zarr")
    zarr.create_group(tmp_path / "foreign.zarr")
    with pytest.raises(SettingsMismatchError, match="not a store made by igstore"):
        verify_store(tmp_path / "foreign.zarr")


def test_another_format_version_is_no_damage(path):
    edit_root(path, format_version=99)
    with pytest.raises(SettingsMismatchError, match="install the igstore that wrote it"):
        verify_store(path)


def edit_root(path: Path, **attributes: Any) -> None:
    edit(path / "zarr.json", lambda root: root.update(attributes=sealed({**root["attributes"], **attributes})))


# recompute


def test_recomputed_images_are_those_of_the_store(tmp_path, monkeypatch, attributed):
    path = named(tmp_path / "model.zarr", monkeypatch)
    attributed.clear()
    assert verify_store(path, recompute=5, model=NAMED) == []
    first = list(attributed)
    assert len(set(first)) == 5
    assert verify_store(path, recompute=5, seed=1, model=named_network()) == []
    assert set(attributed[5:]) != set(first)
    assert main([str(path), "--recompute", "1000", "--model", NAMED]) == cli.DONE
    assert len(attributed[10:]) == N - 1  # but for the one that failed


def test_recomputing_by_a_model_that_igstore_knows(tmp_path):
    path, preprocessing = tmp_path / "model.zarr", Preprocessing(resize=None, crop=(32, 32))
    pictures = [(str(place), image, None) for place, (image, _) in enumerate(images(4))]
    build_store("shufflenet_v2_x0_5", pictures, path, weights="random:1", preprocessing=preprocessing, n_steps=1)
    assert verify_store(path, recompute=2) == []


def named(path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Path:
    """A store whose model is found by its name, if a user gives that."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    build_store(NAMED, images(), path, **SETTINGS | settings)
    return path


NAMED = "test_verify:named_network"


def named_network() -> Classifier:
    return classifier_from_module(NETWORK, preprocessing=SETTINGS["preprocessing"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (scale_by("output", 1.1), "holds another output for image 01 than the model gives now"),
        (reverse("attribution"), "holds other maps than the model gives now"),
    ],
    ids=["an output", "a map"],
)
def test_values_that_the_model_does_not_give_are_found_by_recomputing(tmp_path, monkeypatch, change, says):
    path = named(tmp_path / "model.zarr", monkeypatch, rank=False)
    arrays = {}
    rewrite(path, 0, lambda found: (change(found), arrays.update(found)))
    # with a completeness error that hides it
    spec, maps = StoreReader(path).spec, arrays["attribution"].astype(np.float64)
    total = maps.sum(axis=(1, 2)) * arrays["scale"]
    difference = arrays["output"].astype(np.float64) - arrays["baseline_output"]
    error = np.abs(total - difference) / np.abs(difference)
    rewrite(path, 0, lambda found: found["completeness_error"].__setitem__(1, error[1]))
    assert verify_store(path) == []
    assert spec.reduce == "sum"
    assert [finding for finding in verify_store(path, recompute=1000, model=NAMED) if says in finding.problem]


def test_recomputing_needs_the_pixels_or_the_images(tmp_path, monkeypatch):
    path = named(tmp_path / "model.zarr", monkeypatch, pixels=False)
    assert verify_store(path, recompute=3, model=NAMED, images=images()) == []
    with pytest.raises(UserError, match="made without pixels"):
        verify_store(path, recompute=3, model=NAMED)
    others = images()
    others[0] = (others[0][0], 6)
    with pytest.raises(SettingsMismatchError, match="not the images"):
        verify_store(path, recompute=3, model=NAMED, images=others)


def test_recomputing_needs_the_same_weights(path, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Picky"):  # which was given as it is, without a name to load it by
        verify_store(path, recompute=3)
    path = named(tmp_path / "named.zarr", monkeypatch)
    other = Picky().eval()
    other.inner = Smooth(N_CLASSES, seed=1).eval()
    monkeypatch.setattr("test_verify.NETWORK", other)
    with pytest.raises(UserError, match="weights found are own"):
        verify_store(path, recompute=3, model=NAMED)


# stores of earlier versions, which could double the steps of an image


@pytest.fixture
def doubled(tmp_path, monkeypatch) -> Path:
    """A store whose first image has 8 steps, and the others 4."""
    with monkeypatch.context() as patch:
        patch.setattr("igstore.building.plan.BuildSpec", partial(BuildSpec, max_error=0.05, max_steps=16))
        path = build(tmp_path / "doubled.zarr", rank=False)
    evaluations = StoreReader(path).records[0]["evaluations"]
    rewrite(path, 0, put("n_steps", 8, image=0), evaluations=evaluations + 4)
    finish_store(path, {})
    rank_store(path)
    return path


def test_a_store_with_doubled_steps_is_read_and_verified(doubled, tmp_path, capsys):
    assert verify_store(doubled) == []
    assert open_store(doubled).n_steps.values[:3].tolist() == [8, 4, 4]
    assert info_main([str(doubled)]) == cli.DONE
    assert "4 steps, doubled up to 16 while the completeness error exceeds 0.05" in capsys.readouterr().out
    assert len(MaskedImageNet(doubled, p=50)) == StoreReader(doubled).spec.shard_size * 3 - 4
    copy = export_store(doubled, tmp_path / "copy.h5", format="hdf5")
    assert verify_store(copy) == []


@pytest.mark.parametrize("steps", [3, 12, 32])
def test_only_doubled_steps_within_the_limit_are_right(doubled, steps):
    evaluations = StoreReader(doubled).records[0]["evaluations"]
    rewrite(doubled, 0, put("n_steps", steps, image=0), evaluations=evaluations + steps - 8)
    assert any("is no number of steps of this build" in finding.problem for finding in verify_store(doubled))


def test_doubled_steps_are_not_computed_again(doubled):
    with pytest.raises(UserError, match=r"doubled the steps of some images.*leave recompute out"):
        verify_store(doubled, recompute=2, model=NETWORK)
    with pytest.raises(SettingsMismatchError, match=r"max_error is 0\.05 there and None here"):
        build(doubled)
