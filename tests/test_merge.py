from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from networks import Smooth

from igstore import Preprocessing, build_store, cli, export_store, merge_stores, rank_store, store_info, verify_store
from igstore.errors import DamagedStoreError, SettingsMismatchError, StoreExistsError, UserError
from igstore.images import as_image_list
from igstore.merge import main
from igstore.storage import StoreReader, layout

N, SHARD_SIZE, N_CLASSES = 21, 4, 7  # six shards, the last of one image
NETWORK = Smooth(N_CLASSES).eval()
SETTINGS = {"preprocessing": Preprocessing(resize=18, crop=(16, 16)), "n_steps": 4, "shard_size": SHARD_SIZE}
BROKEN = 5
# fields of a record that say where and when, not what
CIRCUMSTANCES = ("seconds", "files", "seal", "attribution_sha256", "settings")


class Images:
    """A data set of the random images of these numbers, in torchvision's manner, of which one cannot be read."""

    classes = tuple(f"class {index}" for index in range(N_CLASSES))

    def __init__(self, numbers: list[int], broken: int | None = BROKEN) -> None:
        self.numbers = numbers
        self.broken = broken
        self.samples = [(f"image_{number:03d}.png", number % N_CLASSES) for number in numbers]
        self.targets = [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        number = self.numbers[index]
        if number == self.broken:
            raise OSError("torn out")
        return np.random.default_rng(number).integers(0, 256, (18, 18, 3), np.uint8), self.targets[index]


def build(path: Path, numbers: list[int] | range, *, broken: int | None = BROKEN, **settings: Any) -> Path:
    build_store(NETWORK, Images(list(numbers), broken), path, **SETTINGS | settings)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of all images, built in one place."""
    return build(tmp_path_factory.mktemp("merge") / "whole.zarr", range(N))


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Stores of the images with even and with odd numbers."""
    folder = tmp_path_factory.mktemp("merge")
    return build(folder / "even.zarr", range(0, N, 2)), build(folder / "odd.zarr", range(1, N, 2))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "merged.zarr"


def without(path: Path, to: Path, *shards: int) -> Path:
    """A copy of a store in which some shards are not finished, and have no files."""
    shutil.copytree(path, to)
    store = StoreReader(to)
    for shard in shards:
        (to / store.record_file(shard)).unlink()
        for group in (store, *map(store.ranking, store.rankings)):
            for name, file in group.shard_files(shard).items():
                if name not in layout.LISTED:
                    (to / file).unlink()
            (to / group.record_file(shard)).unlink(missing_ok=True)
    return to


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def images(path: Path) -> dict[str, dict[str, bytes]]:
    """What a store holds of each image, by its id, as zarr reads it."""
    arrays = {name: array[:] for name, array in zarr.open_group(path, mode="r").arrays()}
    ranks = zarr.open_group(path / "ranks", mode="r")
    arrays |= {f"{name}/{one}": array[:] for name, ranking in ranks.groups() for one, array in ranking.arrays()}
    ids = arrays.pop("image_id").tolist()
    return {image_id: {name: array[at].tobytes() for name, array in arrays.items()} for at, image_id in enumerate(ids)}


def pieces(path: Path) -> dict[str, bytes]:
    """The files of all arrays."""
    return {name: content for name, content in contents(path).items() if "/c/" in name}


def test_parts_of_one_list_make_the_store_that_one_place_would(whole, tmp_path, out):
    parts = without(whole, tmp_path / "a.zarr", 0, 1, 4), without(whole, tmp_path / "b.zarr", 2, 3, 5)
    summary = merge_stores(parts, out)
    assert (summary.path, summary.n_images, summary.missing_shards) == (out, N, ())
    assert summary.rankings == ("positive-3",)
    merged, expected = contents(out), contents(whole)
    assert merged.keys() == expected.keys()
    assert {name for name in merged if merged[name] != expected[name]} == {"zarr.json"}  # which sums up the time
    assert verify_store(out) == []


def test_three_parts_that_overlap(whole, tmp_path, out):
    a, b = without(whole, tmp_path / "a.zarr", 0, 1), without(whole, tmp_path / "b.zarr", 1, 2, 3)
    merge_stores([a, b, without(whole, tmp_path / "c.zarr", 0, 2, 3, 4)], out)
    assert pieces(out) == pieces(whole)
    assert verify_store(out) == []


def test_what_no_part_has_is_missing_and_built_later(whole, tmp_path, out):
    parts = without(whole, tmp_path / "a.zarr", 0, 1, 4), without(whole, tmp_path / "b.zarr", 1, 2, 3, 5)
    assert merge_stores(parts, out).missing_shards == (1,)
    store = StoreReader(out)
    assert store.missing_shards == [1]
    assert not store.attributes["complete"]
    build(out, range(N))
    assert pieces(out) == pieces(whole)
    assert verify_store(out) == []


def test_parts_with_a_limit_are_the_beginning_of_the_list(whole, tmp_path, out):
    short = build(tmp_path / "short.zarr", range(N), limit=8)  # two whole shards
    merge_stores([without(whole, tmp_path / "rest.zarr", 0, 1), short], out)
    assert pieces(out) == pieces(whole)
    assert StoreReader(out).spec == StoreReader(whole).spec


def test_lists_of_different_images_make_the_store_of_all(whole, halves, out):
    merge_stores(halves, out)
    assert images(out) == images(halves[0]) | images(halves[1])
    store = StoreReader(out)
    assert store.spec == StoreReader(whole).spec  # and so the fingerprint
    assert store.spec.images_fingerprint == as_image_list(Images(list(range(N)))).fingerprint
    assert verify_store(out) == []
    assert store.attributes["complete"]
    # plain xarray sees one list in order
    xr.testing.assert_allclose(xr.open_zarr(out), xr.open_zarr(whole), rtol=1e-3)  # batches were others
    before = contents(out)
    build(out, range(N), broken=None)  # it is the store of these images: only the one that failed is left to do
    changed = {name for name, content in contents(out).items() if content != before[name]}
    assert not any("00000" in name or "/c/0" in name for name in changed)
    assert verify_store(out) == []


def test_records_say_what_is_known_of_each_shard(whole, halves, out):
    merge_stores(halves, out)
    merged, expected, parts = StoreReader(out), StoreReader(whole), [StoreReader(half) for half in halves]
    for shard, record in merged.records.items():
        right = expected.records[shard]
        for name in right.keys() - {"in_top5", *CIRCUMSTANCES}:
            assert record[name] == right[name], name
        assert "in_top5" not in record  # is counted by shard, and these are of two halves
    seconds = sum(record["seconds"] for record in merged.records.values())
    assert seconds == pytest.approx(
        sum(record["seconds"] for part in parts for record in part.records.values()), abs=0.001 * merged.n_shards
    )
    info = store_info(out)
    assert info.failed == store_info(whole).failed == {"image_005": "OSError: torn out"}
    assert (info.top1, info.evaluations) == (store_info(whole).top1, store_info(whole).evaluations)
    assert info.top5 is None


def test_shards_that_stay_whole_keep_their_count_of_the_top_5(whole, tmp_path, out):
    first, second = build(tmp_path / "a.zarr", range(8)), build(tmp_path / "b.zarr", range(8, N))
    merge_stores([second, first], out)
    assert pieces(out) == pieces(whole)
    assert [record["in_top5"] for record in StoreReader(out).records.values()] == [
        record["in_top5"] for record in StoreReader(whole).records.values()
    ]
    assert store_info(out).top5 == store_info(whole).top5


def test_an_image_that_failed_in_one_place_is_taken_from_the_other(tmp_path, out):
    failed, whole = build(tmp_path / "a.zarr", range(10)), build(tmp_path / "b.zarr", range(10), broken=None)
    merge_stores([failed, whole], out)
    assert pieces(out) == pieces(whole)
    assert store_info(out).failed == {}
    assert verify_store(out) == []


def test_a_ranking_is_carried_over_where_all_parts_have_it(whole, halves, tmp_path, out):
    even, odd = shutil.copytree(halves[0], tmp_path / "a.zarr"), shutil.copytree(halves[1], tmp_path / "b.zarr")
    rank_store(even, score="absolute", block=5)
    summary = merge_stores([even, odd], out)
    assert (summary.rankings, summary.unranked) == (("positive-3",), ("absolute-5",))
    assert StoreReader(out).rankings == ["positive-3"]
    rank_store(odd, score="absolute", block=5)
    again = merge_stores([even, odd], out.with_name("again.zarr"))
    assert (again.rankings, again.unranked) == (("absolute-5", "positive-3"), ())
    rank_store(out, score="absolute", block=5)
    assert pieces(again.path) == pieces(out)
    assert verify_store(again.path) == []


def test_compressed_parts(halves, tmp_path, out):
    merge_stores([export_store(half, tmp_path / half.name, compress="zstd") for half in halves], out)
    assert images(out) == images(halves[0]) | images(halves[1])


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"n_steps": 5}, "n_steps is 4 there and 5 here"),
        ({"shard_size": 5}, "shard_size is 4 there and 5 here"),
        ({"baseline": "mean"}, "baseline is 'black' there and 'mean' here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused(halves, tmp_path, out, settings, difference):
    other = build(tmp_path / "other.zarr", range(1, N, 2), **settings)
    with pytest.raises(SettingsMismatchError, match=difference):
        merge_stores([halves[0], other], out)
    assert list(out.parent.iterdir()) == []


def test_other_weights_are_refused(halves, tmp_path, out):
    network = Smooth(N_CLASSES).eval()
    for parameter in network.parameters():
        parameter.data *= 1.01
    other = tmp_path / "other.zarr"
    build_store(network, Images([1, 3]), other, **SETTINGS)
    with pytest.raises(SettingsMismatchError, match="weights_sha256"):
        merge_stores([halves[0], other], out)


def test_other_names_of_classes_are_refused(halves, tmp_path, out, monkeypatch):
    monkeypatch.setattr(Images, "classes", tuple("abcdefg"))
    other = build(tmp_path / "other.zarr", [1, 3])
    with pytest.raises(SettingsMismatchError, match="class_names"):
        merge_stores([halves[0], other], out)


def test_other_labels_are_refused(halves, tmp_path, out):
    listed = Images([2, 3])
    listed.targets = [6, 3]
    other = tmp_path / "other.zarr"
    build_store(NETWORK, listed, other, **SETTINGS)
    with pytest.raises(SettingsMismatchError, match=r"image_002 has label 2 in .*even.zarr and 6 in .*other.zarr"):
        merge_stores([halves[0], other], out)


def test_other_maps_of_the_same_image_are_refused(halves, tmp_path, out, monkeypatch):
    read = Images.__getitem__
    monkeypatch.setattr(Images, "__getitem__", lambda self, index: (read(self, index)[0] // 2, self.targets[index]))
    other = build(tmp_path / "other.zarr", [2, 3])
    with pytest.raises(
        SettingsMismatchError, match=r"image_002 has another attribution in .*delete records/00000.json"
    ):
        merge_stores([halves[0], other], out)
    assert list(out.parent.iterdir()) == []


def test_nothing_finished_is_lost(halves, tmp_path, out):
    part = without(halves[1], tmp_path / "odd.zarr", 1)
    with pytest.raises(UserError, match=r"of .*odd.zarr is not finished, and its neighbours .*igstore build"):
        merge_stores([halves[0], part], out)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda whole, folder: [whole], "two or more"),
        (lambda whole, folder: [whole, export_store(whole, folder / "thin", format="ranks")], "merge the whole stores"),
        (lambda whole, folder: [without(whole, folder / name, *range(6)) for name in "ab"], "nothing to merge"),
    ],
    ids=["one", "thin", "nothing"],
)
def test_mistakes_are_named(whole, tmp_path, out, parts: Callable[..., Any], message):
    with pytest.raises(UserError, match=message):
        merge_stores(parts(whole, tmp_path), out)


@pytest.mark.parametrize("name", ["attribution", "ranks/positive-3/rank"])
def test_damage_is_not_passed_on(halves, tmp_path, out, name):
    part = shutil.copytree(halves[1], tmp_path / "odd.zarr")
    file = part / layout.shard_file(name, 1, 3)
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedStoreError, match=f"shard 1 of {name}"):
        merge_stores([halves[0], part], out)
    assert list(out.parent.iterdir()) == []


def test_an_interrupted_merge_leaves_nothing(halves, out, monkeypatch):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("igstore.merge.write_rank_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge_stores(halves, out)
    assert list(out.parent.iterdir()) == []


def test_what_is_there_is_left_alone(halves, out):
    out.mkdir()
    with pytest.raises(StoreExistsError):
        merge_stores(halves, out)
    assert list(out.iterdir()) == []


def test_the_command(whole, tmp_path, out, capsys):
    a, b = without(whole, tmp_path / "a.zarr", 0, 1), without(whole, tmp_path / "b.zarr", 1, 2)
    assert main([str(a), str(b), "--out", str(out)]) == cli.DONE
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 21 images, rankings positive-3",
        "shards that no part has finished: 1; `igstore build` goes on",
    ]
    assert main([str(a), str(b), "--out", str(out.with_name("b")), "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["missing_shards"] == [1]
