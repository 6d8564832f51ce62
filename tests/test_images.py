"""igstore.images against torchvision's own loader, transforms and ImageNet parser."""

from __future__ import annotations

import errno
import hashlib
import io
import multiprocessing
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import scipy.io
import torch
import torchvision
from conftest import IMAGENET
from hypothesis import given, settings, strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import InterpolationMode

from igstore.errors import AccessError, DataNotFoundError, ImageError, OutOfMemoryError, UserError
from igstore.images import ImageList, as_image_list, find_images, prepare, synsets
from igstore.schema import Interpolation, Preprocessing

needs_imagenet = pytest.mark.skipif(not IMAGENET.is_dir(), reason="real images are not here")

WNIDS = [wnid for wnid, _ in synsets()]
# validation image -> class index: not in the order of the classes, one class twice
TRUTH = {
    "ILSVRC2012_val_00000001": 490,
    "ILSVRC2012_val_00000002": 361,
    "ILSVRC2012_val_00000003": 171,
    "ILSVRC2012_val_00000004": 490,
    "ILSVRC2012_val_00000005": 7,
}


# --- files to read --------------------------------------------------------------------------------------------------


def picture(name: str, size: tuple[int, int] = (23, 17), mode: str = "RGB") -> Image.Image:
    """A picture of random pixels that depends on its name alone."""
    rng = np.random.default_rng(list(name.encode()))
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write(path: Path, data: bytes | None = None) -> Path:
    """`path` holding `data`, or a JPEG of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(path.name)) if data is None else data)
    return path


def tar_bytes(members: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def devkit_id(class_index: int) -> int:
    """An id from 1 to 1000 for each class, in another order than the classes', as in the real devkit."""
    return (class_index * 377 + 123) % 1000 + 1


def devkit_members() -> dict[str, bytes]:
    """The two files of ILSVRC2012_devkit_t12 that tell labels: its structure, and 1000 synsets with 2 parents."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss"]
    fields += ["num_children", "children", "wordnet_height", "num_train_images"]
    table = np.empty((1002, 1), dtype=[(field, object) for field in fields])
    for index, (wnid, name) in enumerate(synsets()):
        row = devkit_id(index)
        table[row - 1, 0] = (float(row), wnid, f"{name}, of class {index}", "gloss", 0.0, np.zeros((1, 0)), 0.0, 1300.0)
    table[1000, 0] = (1001.0, "n00001740", "entity", "gloss", 2.0, np.array([[1.0, 2.0]]), 19.0, 0.0)
    table[1001, 0] = (1002.0, "n00015388", "animal", "gloss", 1.0, np.array([[3.0]]), 12.0, 0.0)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": table})
    truth = "".join(f"{devkit_id(index)}\n" for index in TRUTH.values())
    return {
        "ILSVRC2012_devkit_t12/readme.txt": b"readme",
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }


@pytest.fixture(scope="module")
def devkit() -> dict[str, bytes]:
    return devkit_members()


@pytest.fixture
def official(tmp_path: Path, devkit: dict[str, bytes]) -> Path:
    """A root with the official tars as they come: val, devkit, and train (a tar of a tar for each wnid)."""
    root = tmp_path / "official"
    images = {f"{name}.JPEG": encoded(picture(f"{name}.JPEG")) for name in reversed(TRUTH)}
    write(root / "ILSVRC2012_img_val.tar", tar_bytes(images))
    write(root / "ILSVRC2012_devkit_t12.tar.gz", tar_bytes(devkit, "w:gz"))
    train = {}
    for index in (490, 7, 999):
        names = [f"{WNIDS[index]}_{number}.JPEG" for number in (10, 9, 100)]
        train[f"{WNIDS[index]}.tar"] = tar_bytes({name: encoded(picture(name)) for name in names})
    write(root / "ILSVRC2012_img_train.tar", tar_bytes(train))
    return root


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """The same images, unpacked into a folder for each wnid."""
    root = tmp_path / "unpacked"
    for name, index in TRUTH.items():
        write(root / "val" / WNIDS[index] / f"{name}.JPEG")
    for index in (490, 7, 999):
        for number in (10, 9, 100):
            write(root / "train" / WNIDS[index] / f"{WNIDS[index]}_{number}.JPEG")
    return root


def content(images: ImageList) -> tuple[Any, ...]:
    """Everything that two equal lists agree on, pixels included."""
    pixels = tuple(images.read(index).tobytes() for index in range(len(images)))
    return images.ids, images.labels.tolist(), images.fingerprint, images.class_names, images.wnids, pixels


# --- ImageNet's classes ---------------------------------------------------------------------------------------------


def test_synsets_are_the_classes_of_torchvisions_weights() -> None:
    categories = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    ours = [name for _, name in synsets()]
    assert len(ours) == len(set(WNIDS)) == 1000
    assert sorted(WNIDS) == WNIDS  # ILSVRC2012's class order is that of the wnids
    # torchvision tells apart the two cranes and the two maillots, and spells a few names otherwise
    assert [(a, b) for a, b in zip(ours, categories, strict=True) if a != b and not b.startswith(a)] == []


@needs_imagenet
def test_synsets_are_the_published_ones() -> None:
    lines = (IMAGENET / "synset_words.txt").read_text().splitlines()
    assert [f"{wnid} {name}" for wnid, name in synsets()] == [line.split(", ")[0] for line in lines]


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["val", "train"])
def test_tar_equals_folder(official: Path, unpacked: Path, split: Any) -> None:
    packed, folder = find_images(official, split=split), find_images(unpacked, split=split)
    assert content(packed) == content(folder)
    assert content(find_images(unpacked / split)) == content(folder)


def test_val_labels_are_the_truth(official: Path) -> None:
    images = find_images(official)
    assert dict(zip(images.ids, images.labels.tolist(), strict=True)) == TRUTH
    assert images.labels.dtype == np.int32
    assert not images.labels.flags.writeable
    assert images.class_names is not None
    assert images.wnids is not None
    assert (images.wnids[361], images.class_names[361]) == ("n02445715", "skunk")


def test_train_ids_and_labels(official: Path) -> None:
    images = find_images(official, split="train")
    expected = sorted((f"{WNIDS[index]}_{number}", index) for index in (490, 7, 999) for number in (10, 9, 100))
    assert list(zip(images.ids, images.labels.tolist(), strict=True)) == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchvision unpacks tars as Python 3.12 advises against
@pytest.mark.parametrize("split", ["val", "train"])
def test_torchvision_parses_the_same_tars_to_the_same_labels(
    official: Path, tmp_path: Path, split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture is a real one: torchvision's parser accepts all of it but the checksums."""
    root = Path(shutil.copytree(official, tmp_path / "copy"))
    ours = find_images(official, split=split)
    meta = {
        key: (name, hashlib.md5((root / name).read_bytes()).hexdigest())
        for key, (name, _) in torchvision.datasets.imagenet.ARCHIVE_META.items()
    }
    monkeypatch.setattr(torchvision.datasets.imagenet, "ARCHIVE_META", meta)
    theirs = torchvision.datasets.ImageNet(str(root), split=split)
    by_id = {Path(path).stem: theirs.wnids[target] for path, target in theirs.samples}
    assert ours.wnids is not None
    assert {one: ours.wnids[label] for one, label in zip(ours.ids, ours.labels, strict=True)} == by_id
    # torchvision has unpacked the tars into folders: the list stays the same
    assert content(find_images(root, split=split)) == content(ours)
    # and as a Python dataset its labels index its own, fewer classes
    listed = as_image_list(theirs)
    assert listed.wnids is not None
    assert [listed.wnids[label] for label in listed.labels] == [by_id[one] for one in listed.ids]
    assert listed.ids == ours.ids


@pytest.mark.parametrize("place", ["inside", "beside"])
@pytest.mark.parametrize("packed", [True, False], ids=["devkit packed", "devkit unpacked"])
def test_flat_val_takes_labels_from_the_devkit(
    tmp_path: Path, official: Path, devkit: dict[str, bytes], place: str, packed: bool
) -> None:
    flat = tmp_path / "root" / "val"
    for name in TRUTH:
        write(flat / f"{name}.JPEG")
    where = flat if place == "inside" else flat.parent
    if packed:
        shutil.copy(official / "ILSVRC2012_devkit_t12.tar.gz", where)
    else:
        for name, data in devkit.items():
            write(where / name, data)
    assert content(find_images(flat.parent)) == content(find_images(official))
    assert content(find_images(flat)) == content(find_images(official))


def test_a_subset_of_flat_val_keeps_its_labels(tmp_path: Path, official: Path) -> None:
    write(official / "val" / "ILSVRC2012_val_00000003.JPEG")
    images = find_images(official)
    assert (images.ids, images.labels.tolist()) == (("ILSVRC2012_val_00000003",), [171])


def test_other_images_near_a_devkit_are_unlabelled(official: Path) -> None:
    write(official / "mine" / "ILSVRC2012_val_00000001.JPEG")
    write(official / "mine" / "cat.jpg")
    assert find_images(official / "mine").labels.tolist() == [-1, -1]


def test_folder_labels_do_not_depend_on_which_folders_there_are(tmp_path: Path) -> None:
    write(tmp_path / WNIDS[999] / "a.JPEG")
    assert find_images(tmp_path).labels.tolist() == [999]


def test_tar_without_devkit_names_it(official: Path) -> None:
    (official / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(DataNotFoundError, match=r"ILSVRC2012_devkit_t12\.tar\.gz"):
        find_images(official)
    labels = write(official / "truth.csv", b"file,class_index\nILSVRC2012_val_00000002.JPEG,5\n")
    assert find_images(official, labels=labels).labels.tolist() == [-1, 5, -1, -1, -1]


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_cut_tar_is_refused(official: Path, split: Any) -> None:
    tar = official / f"ILSVRC2012_img_{split}.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with pytest.raises(UserError, match="cut short"):
        find_images(official, split=split)


@pytest.mark.parametrize("damage", ["meta", "archive", "missing file", "unknown id"])
def test_a_damaged_devkit_is_refused(official: Path, devkit: dict[str, bytes], damage: str) -> None:
    meta, truth = (name for name in devkit if "/data/" in name)
    members = dict(devkit)
    if damage == "meta":
        members[meta] = devkit[meta][:1000]
    elif damage == "missing file":
        del members[truth]
    elif damage == "unknown id":
        members[truth] = b"1\n2\n1861\n"
    data = tar_bytes(members, "w:gz")
    write(official / "ILSVRC2012_devkit_t12.tar.gz", data[: len(data) // 2] if damage == "archive" else data)
    with pytest.raises(UserError, match=r"devkit_t12\.tar\.gz is damaged"):
        find_images(official)


def nothing(window: int, *first: bytes) -> bytes:
    """So many bytes, and then 256 MB of zeros, compressed."""
    made = zlib.compressobj(9, zlib.DEFLATED, window)
    return b"".join(map(made.compress, [*first, *[bytes(2**20)] * 256])) + made.flush()


def bomb(kind: str, devkit: dict[str, bytes]) -> bytes:
    """The packed devkit, made to cost a quarter of a gigabyte."""
    if kind == "zeros":
        return nothing(31)
    if kind == "a long name":  # whose length a header says, and which is read at once
        header = tarfile.TarInfo("name")
        header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**28
        return nothing(31, header.tobuf(tarfile.GNU_FORMAT))
    _, meta, _ = devkit
    packed = nothing(15, struct.pack("<II", 14, 2**28))
    content = devkit[meta][:128] + struct.pack("<II", 15, len(packed)) + packed
    return tar_bytes(devkit | {meta: content}, "w:gz")


@pytest.mark.parametrize("kind", ["zeros", "a long name", "a large table"])
def test_a_devkit_that_is_far_larger_than_it_looks_costs_little(
    official: Path, devkit: dict[str, bytes], kind: str
) -> None:
    (official / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(bomb(kind, devkit))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="is damaged, or not the devkit"):
            find_images(official)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2e8


@pytest.mark.parametrize("what", ["labels", "devkit"])
def test_a_pipe_instead_of_labels_is_not_waited_for(official: Path, tmp_path: Path, what: str) -> None:
    if what == "devkit":
        file = official / "ILSVRC2012_devkit_t12.tar.gz"
        file.unlink()
    else:
        write(tmp_path / "flat/a.png", encoded(picture("a.png")))
        official, file = tmp_path / "flat", tmp_path / "flat/labels.csv"
    os.mkfifo(file)
    with pytest.raises(UserError, match="not a regular file"):
        find_images(official)


def test_a_name_that_the_devkit_does_not_label_is_refused(official: Path) -> None:
    write(official / "val" / "ILSVRC2012_val_00000006.JPEG")
    with pytest.raises(UserError, match="00000006"):
        find_images(official)
    (official / "val" / "ILSVRC2012_val_00000006.JPEG").rename(official / "val" / "ILSVRC2012_val_00000000.JPEG")
    with pytest.raises(UserError, match="00000000"):
        find_images(official)


def test_extensions_hidden_files_and_others(tmp_path: Path) -> None:
    taken = ["a.jpeg", "b.jpg", "c.png", "d.bmp", "e.webp", "f.ppm", "g.tif", "h.tiff", "i.JPEG", "j.PNG"]
    for name in [*taken, ".hidden.jpg", "._a.jpeg", "notes.txt", "thumbs.db", "jpeg", "k.gif"]:
        write(tmp_path / WNIDS[3] / name, b"")
    write(tmp_path / ".cache" / "l.jpg", b"")
    write(tmp_path / "logs" / "run.txt", b"")
    assert find_images(tmp_path).ids == tuple("abcdefghij")


def test_colliding_stems_become_paths(tmp_path: Path) -> None:
    first, second = sorted(WNIDS[:2])
    for name in (f"{first}/1.jpg", f"{first}/1.png", f"{second}/1.jpg", f"{second}/2.jpg"):
        write(tmp_path / name)
    images = find_images(tmp_path)
    assert images.ids == ("2", f"{first}/1.jpg", f"{first}/1.png", f"{second}/1.jpg")
    assert images.labels.tolist() == [1, 0, 0, 1]
    expected = pil_loader(tmp_path / second / "1.jpg")
    assert images.read(3).tobytes() == expected.tobytes()


def test_a_path_that_equals_a_stem_is_refused(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.jpg.png"):
        write(tmp_path / name)
    with pytest.raises(UserError, match=r"'a\.jpg'"):
        find_images(tmp_path)


def test_a_folder_that_is_no_wnid_is_named(tmp_path: Path) -> None:
    write(tmp_path / WNIDS[0] / "1.jpg")
    write(tmp_path / "cats" / "2.jpg")
    with pytest.raises(UserError, match="'cats'") as caught:
        find_images(tmp_path)
    assert "CSV" in str(caught.value)
    labels = write(tmp_path / "mine.csv", f"file,class_index\ncats/2.jpg,1\n{WNIDS[0]}/1.jpg,0\n".encode())
    images = find_images(tmp_path, labels=labels)
    assert (images.ids, images.labels.tolist(), images.class_names) == (("1", "2"), [0, 1], None)


def test_images_beside_folders_of_images_are_refused(tmp_path: Path) -> None:
    write(tmp_path / WNIDS[0] / "1.jpg")
    write(tmp_path / "loose.jpg")
    with pytest.raises(UserError, match=r"loose\.jpg"):
        find_images(tmp_path)


@pytest.mark.parametrize("what", ["missing", "empty", "file", "empty val", "only train"])
def test_nothing_there_says_how_to_lay_imagenet_out(tmp_path: Path, what: str) -> None:
    data = tmp_path / "imagenet"
    if what == "file":
        write(data)
    elif what == "only train":
        write(data / "train" / WNIDS[0] / "1.JPEG")
    elif what != "missing":
        (data / "val" if what == "empty val" else data).mkdir(parents=True)
    with pytest.raises(DataNotFoundError) as caught:
        find_images(data)
    message = str(caught.value)
    for part in (
        str(data),
        "ILSVRC2012_img_val.tar",
        "ILSVRC2012_devkit_t12.tar.gz",
        "val/n01440764",
        "data/README.md",
    ):
        assert part in message


def test_an_unknown_split_is_refused(unpacked: Path) -> None:
    with pytest.raises(UserError, match="val, train"):
        find_images(unpacked, split="test")  # type: ignore[arg-type]


def test_home_is_expanded(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(unpacked.parent))
    assert len(find_images("~/unpacked")) == len(TRUTH)


# --- CSVs of labels -------------------------------------------------------------------------------------------------


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for name in ("b.png", "a.jpg", "c.jpg"):
        write(tmp_path / "photos" / name, encoded(picture(name), "PNG"))
    return tmp_path / "photos"


def test_a_flat_folder_without_labels(flat: Path) -> None:
    images = find_images(flat)
    assert (images.ids, images.labels.tolist()) == (("a", "b", "c"), [-1, -1, -1])
    assert images.class_names is None
    assert images.wnids is None


@pytest.mark.parametrize(
    ("text", "labels", "imagenet"),
    [
        (f"file,wnid\na.jpg,{WNIDS[5]}\nb.png,{WNIDS[2]}\nc.jpg,\n", [5, 2, -1], True),
        ("file,class_index\nc.jpg,12000\n./a.jpg, 3\nphotos/b.png,-1\n", [3, -1, 12000], False),
        (f"split,class_index, wnid,file\nx,5,{WNIDS[5]} ,a.jpg \nx,7,,b.png\n", [5, 7, -1], True),
        ("\ufefffile,class_index\r\na.jpg,1\r\n\r\nb.png,2\r\n", [1, 2, -1], False),
    ],
    ids=["wnid", "class_index", "both and more", "as a spreadsheet writes it"],
)
@pytest.mark.parametrize("place", ["inside", "beside", "given"])
def test_labels_csv(flat: Path, text: str, labels: list[int], imagenet: bool, place: str) -> None:
    path = {"inside": flat / "my_labels.csv", "beside": flat.parent / "labels.csv", "given": flat / "truth.csv"}[place]
    write(path, text.encode())
    images = find_images(flat, labels=path if place == "given" else None)
    assert (images.ids, images.labels.tolist()) == (("a", "b", "c"), labels)
    assert (images.class_names is not None) == (images.wnids is not None) == imagenet


def test_a_csv_beside_that_names_other_files_is_not_taken(flat: Path) -> None:
    write(flat.parent / "other_labels.csv", b"file,class_index\nx.jpg,1\n")
    assert find_images(flat).labels.tolist() == [-1, -1, -1]


def test_a_csv_inside_comes_before_one_beside_and_two_are_refused(flat: Path) -> None:
    write(flat.parent / "labels.csv", b"file,class_index\na.jpg,1\n")
    write(flat / "labels.csv", b"file,class_index\na.jpg,2\n")
    assert find_images(flat).labels.tolist() == [2, -1, -1]
    write(flat / "old_labels.csv", b"file,class_index\na.jpg,3\n")
    with pytest.raises(UserError, match="give one by labels"):
        find_images(flat)


def test_a_given_csv_overrules_wnid_folders(unpacked: Path) -> None:
    rows = [f"{WNIDS[490]}/ILSVRC2012_val_00000001.JPEG,3", "ILSVRC2012_val_00000002.JPEG,4"]
    labels = write(unpacked / "l.csv", "\n".join(["file,class_index", *rows]).encode())
    assert find_images(unpacked, labels=labels).labels.tolist() == [3, 4, -1, -1, -1]


def test_a_bare_name_that_is_not_unique_names_nothing(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write(tmp_path / folder / "1.jpg")
    labels = write(tmp_path / "l.csv", b"file,class_index\n1.jpg,3\n")
    with pytest.raises(UserError, match=r"'1\.jpg'"):
        find_images(tmp_path, labels=labels)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class_index\na.jpg,1\nd.jpg,1\ne.jpg,1\n", r"2 of the 3 files .*'d\.jpg'"),
        ("file,class_index\na.jpg,1\na.jpg,1\n", r"line 3 names 'a\.jpg' a second time"),
        ("file,class_index\na.jpg,1\nphotos/a.jpg,2\n", r"two labels to 'a\.jpg'"),
        ("file,class_index\n,1\n", "line 2 names no file"),
        ("file,class_index\na.jpg,cat\n", "line 2: class_index is 'cat'"),
        ("file,class_index\na.jpg,4000000000\n", "a label is 4000000000"),
        ("file,class_index\na.jpg,-2\n", "a label is -2"),
        ("file,wnid\na.jpg,n00001740\n", "line 2: 'n00001740' is not one of"),
        (f"file,wnid,class_index\na.jpg,{WNIDS[5]},6\n", "line 2: class_index is 6, but n01496331 is class 5"),
        ("name,wnid\na.jpg,n01440764\n", "begins 'name,wnid'; it must begin file,wnid"),
        ("file,label\na.jpg,1\n", "begins 'file,label'"),
        ("", "begins ''"),
        ("file,class_index\n\xff.jpg,1\n", "cannot be read"),
    ],
)
@pytest.mark.parametrize("place", ["inside", "given"])
def test_a_labels_csv_that_does_not_fit_is_refused(flat: Path, text: str, message: str, place: str) -> None:
    path = write(flat / "labels.csv", text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        find_images(flat, labels=path if place == "given" else None)


def test_a_labels_csv_that_is_not_there_is_named(flat: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv"):
        find_images(flat, labels=flat / "nowhere.csv")


# --- the list -------------------------------------------------------------------------------------------------------


def test_head_keeps_the_fingerprint(official: Path) -> None:
    images = find_images(official)
    head = images.head(2)
    assert (len(head), head.ids, head.labels.tolist()) == (2, images.ids[:2], images.labels[:2].tolist())
    assert head.fingerprint == images.fingerprint
    assert head.read(1).tobytes() == images.read(1).tobytes()
    assert images.head(99).ids == images.ids
    with pytest.raises(UserError, match="at least 1"):
        images.head(0)


def test_fingerprint_tells_lists_apart() -> None:
    image = Image.new("L", (2, 2))
    lists = [
        [("a", image, 1), ("b", image, 2)],
        [("a", image, 1), ("b", image, 3)],
        [("a", image, 1), ("c", image, 2)],
        [("a", image, 1)],
        [("a", image, None), ("b", image, 2)],
        [("a 1\nb", image, 2)],
    ]
    prints = [as_image_list(one).fingerprint for one in lists]
    assert len(set(prints)) == len(lists)
    assert prints[0] == hashlib.sha256(b"1 a 1\n1 b 2\n").hexdigest()  # stores hold it: it may never change
    assert as_image_list(lists[0][::-1]).fingerprint == prints[0]


@pytest.mark.parametrize("layout", ["official", "unpacked"])
def test_threads_and_pickles_read_the_same(layout: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(layout)
    images = find_images(root, split="train")
    expected = [picture(f"{one}.JPEG") for one in images.ids]
    expected_pixels = [Image.open(io.BytesIO(encoded(one))).tobytes() for one in expected]
    copy = pickle.loads(pickle.dumps(images))
    assert content(copy) == content(images)
    indices = random.Random(0).choices(range(len(images)), k=400)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda index: images.read(index).tobytes(), indices))
    assert read == [expected_pixels[index] for index in indices]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 warns of any fork beside threads
def test_forked_readers_share_nothing(official: Path) -> None:
    images = find_images(official)
    expected = content(images)

    def check() -> None:
        sys.exit(any(content(images) != expected for _ in range(10)))

    children = [multiprocessing.get_context("fork").Process(target=check) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]


def test_an_image_list_says_what_it_is(official: Path) -> None:
    images = find_images(official)
    assert repr(images) == f"<ImageList: 5 images, 5 labelled, fingerprint {images.fingerprint[:12]}>"


# --- decoding -------------------------------------------------------------------------------------------------------


def sixteen_bit() -> bytes:
    return encoded(Image.fromarray(np.arange(0, 60000, 200, dtype=np.uint16).reshape(15, 20)), "PNG")


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be shown turned by 90 degrees
    return encoded(picture("r"), exif=exif)


def transparent_palette() -> bytes:
    image = picture("p").quantize(8)
    return encoded(image, "PNG", transparency=bytes(range(0, 240, 30)))


def corrupt_exif() -> bytes:
    """A JPEG whose EXIF block ends before the value that its one entry points to."""
    entry = b"\x01\x00" + b"\x1a\x01\x05\x00\x01\x00\x00\x00\xff\xff\x00\x00" + b"\x00\x00\x00\x00"
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + entry
    return encoded(picture("x"), exif=exif)


ODD_FILES: dict[str, Callable[[], bytes]] = {
    "cmyk.jpg": lambda: encoded(picture("k", mode="CMYK")),
    "grey.jpg": lambda: encoded(picture("g", mode="L")),
    "grey16.png": sixteen_bit,
    "exif_rotated.jpg": rotated,
    "corrupt_exif.jpg": corrupt_exif,
    "palette.png": transparent_palette,
    "alpha.png": lambda: encoded(picture("a", mode="RGBA"), "PNG"),
    "grey_alpha.png": lambda: encoded(picture("a", mode="LA"), "PNG"),
    "bilevel.tif": lambda: encoded(picture("1").convert("1"), "TIFF"),
    "animated.webp": lambda: encoded(picture("w"), "WEBP", save_all=True, append_images=[picture("v")], lossless=True),
    "tiny.png": lambda: encoded(picture("t", (1, 1)), "PNG"),
    "a_png_by_content.jpg": lambda: encoded(picture("j"), "PNG"),
    "plain.ppm": lambda: encoded(picture("m"), "PPM"),
    "plain.bmp": lambda: encoded(picture("b"), "BMP"),
}


@pytest.mark.parametrize("strict", [True, False], ids=["warnings are errors", "warnings are ignored"])
@pytest.mark.parametrize("name", ODD_FILES)
def test_odd_files_are_read_as_torchvision_reads_them(tmp_path: Path, name: str, strict: bool) -> None:
    path = write(tmp_path / name, ODD_FILES[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pil_loader(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        image = find_images(tmp_path).read(0)
    assert (image.mode, image.size) == ("RGB", expected.size)
    assert image.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("name", "message"), [("corrupt_exif.jpg", "(?i)truncated|corrupt"), ("palette.png", "Transparency")]
)
def test_the_odd_files_that_pillow_warns_of_do_warn(tmp_path: Path, name: str, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        pil_loader(write(tmp_path / name, ODD_FILES[name]()))


def test_a_large_file_is_read_and_a_bomb_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.png", encoded(picture("a", (30, 20)), "PNG"))
    images = find_images(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # 600 pixels: above the limit, Pillow warns
    assert images.read(0).size == (30, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # above twice the limit, it refuses
    with pytest.raises(ImageError, match="DecompressionBombError"):
        images.read(0)


BROKEN_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated.jpg": (lambda: encoded(picture("t", (200, 200)))[:5000], "truncated"),
    "truncated.png": (lambda: encoded(picture("t", (200, 200)), "PNG")[:5000], "truncated"),
    "empty.jpg": (lambda: b"", "empty file"),
    "text.jpg": (lambda: b"<html>404</html>", "^not an image that Pillow can identify$"),
    "no_pixels.png": (lambda: encoded(picture("b"), "PNG").replace(b"IDAT", b"IDXT"), "not an image"),
    "header_only.bmp": (lambda: encoded(picture("b"), "BMP")[:20], "Truncated"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files_have_a_reason(tmp_path: Path, name: str) -> None:
    make, reason = BROKEN_FILES[name]
    write(tmp_path / name, make())
    images = find_images(tmp_path)
    with pytest.raises(ImageError, match=reason) as caught:
        images.read(0)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert " at 0x" not in message
    with pytest.raises(ImageError) as again:
        images.read(0)
    assert str(again.value) == message


def test_a_file_that_disappeared_has_a_reason(unpacked: Path, official: Path) -> None:
    folder, tar = find_images(unpacked), find_images(official)
    shutil.rmtree(unpacked)
    (official / "ILSVRC2012_img_val.tar").unlink()
    for images in (folder, tar):
        with pytest.raises(ImageError, match="No such file"):
            images.read(0)


def test_a_broken_image_in_a_tar_hurts_no_other(official: Path) -> None:
    names = [f"{name}.JPEG" for name in TRUTH]
    members = {name: encoded(picture(name)) for name in names}
    members[names[2]] = members[names[2]][:100]
    write(official / "ILSVRC2012_img_val.tar", tar_bytes(members))
    images = find_images(official)
    with pytest.raises(ImageError):
        images.read(2)
    assert images.read(3).tobytes() == Image.open(io.BytesIO(members[names[3]])).tobytes()


def test_an_index_out_of_range_is_no_broken_image(unpacked: Path) -> None:
    with pytest.raises(IndexError):
        find_images(unpacked).read(len(TRUTH))


# --- Python objects -------------------------------------------------------------------------------------------------


class Dataset:
    """A dataset of (image, label) and nothing else; attributes are added by the tests."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def test_an_image_list_passes_through(unpacked: Path) -> None:
    images = find_images(unpacked)
    assert as_image_list(images) is images


def test_a_sequence_of_pil_images_and_arrays() -> None:
    colour, grey = np.asarray(picture("c")), np.asarray(picture("g", mode="L"))
    cmyk = picture("k", mode="CMYK")
    images = as_image_list([("z", colour, None), ("b", grey, np.int64(31999)), ("a", cmyk, 0)])
    assert (images.ids, images.labels.tolist()) == (("a", "b", "z"), [0, 31999, -1])
    assert images.read(0).tobytes() == cmyk.convert("RGB").tobytes()
    np.testing.assert_array_equal(np.asarray(images.read(1)), np.repeat(grey[:, :, None], 3, axis=2))
    np.testing.assert_array_equal(np.asarray(images.read(2)), colour)
    assert images.class_names is None


def test_an_image_folder_has_path_stems_and_its_own_labels(unpacked: Path) -> None:
    folder = torchvision.datasets.ImageFolder(str(unpacked / "val"))
    images = as_image_list(folder)
    assert images.ids == tuple(TRUTH)
    assert images.labels.tolist() == [folder.class_to_idx[WNIDS[index]] for index in TRUTH.values()]
    assert images.wnids == tuple(folder.classes)
    assert images.class_names == tuple(dict(synsets())[wnid] for wnid in folder.classes)
    assert images.read(4).tobytes() == pil_loader(unpacked / "val" / WNIDS[7] / f"{images.ids[4]}.JPEG").tobytes()


def test_an_image_folder_of_colliding_stems_has_relative_paths(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "dog/1.jpg", "dog/2.jpg"):
        write(tmp_path / name)
    images = as_image_list(torchvision.datasets.ImageFolder(str(tmp_path)))
    assert images.ids == ("2", "cat/1.jpg", "dog/1.jpg")
    assert (images.labels.tolist(), images.class_names, images.wnids) == ([1, 0, 1], ("cat", "dog"), None)


def test_target_transform_is_applied(unpacked: Path) -> None:
    folder = torchvision.datasets.ImageFolder(str(unpacked / "val"), target_transform=lambda target: target + 100)
    images = as_image_list(folder)
    by_id = {Path(path).stem: folder[index][1] for index, (path, _) in enumerate(folder.samples)}
    assert images.labels.tolist() == [by_id[one] for one in images.ids]


def test_a_dataset_without_paths_has_padded_indices() -> None:
    items = [(picture(str(index)), index % 3) for index in range(11)]
    images = as_image_list(Dataset(items))
    assert images.ids == tuple(f"{index:02d}" for index in range(11))
    assert images.labels.tolist() == [index % 3 for index in range(11)]
    assert [images.read(index).tobytes() for index in range(11)] == [image.tobytes() for image, _ in items]


def test_targets_spare_the_pass_over_a_dataset() -> None:
    items = [(picture("0"), 4), RuntimeError("must not be read"), RuntimeError("must not be read")]
    images = as_image_list(Dataset(items, targets=torch.tensor([4, 5, 6]), classes=[("tench", "Tinca tinca"), "b"]))
    assert images.labels.tolist() == [4, 5, 6]
    assert images.class_names == ("tench", "b")
    with pytest.raises(ImageError, match="RuntimeError: must not be read"):
        images.read(1)


@pytest.mark.parametrize("change", ["order", "labels"])
def test_targets_of_other_items_are_refused(change: str) -> None:
    items = [(picture(str(index)), index) for index in range(5)]

    class Changed(Dataset):
        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__((index + 2) % 5 if change == "order" else index)
            return image, label + (change == "labels")

    with pytest.raises(UserError, match=r"images\[0\] has the label [12], but images.targets\[0\] is 0"):
        as_image_list(Changed(items, targets=list(range(5))))
    hot = [(image, torch.nn.functional.one_hot(torch.tensor(label), 5).float()) for image, label in items]
    assert as_image_list(Dataset(hot, targets=list(range(5)))).labels.tolist() == list(range(5))


@pytest.mark.parametrize("broken", [0, 1])
def test_a_broken_image_of_a_dataset_is_found_when_read(broken: int) -> None:
    items: list[Any] = [(picture("0"), 3), (picture("1"), 4)]
    items[broken] = OSError("image file is truncated")
    images = as_image_list(Dataset(items))
    assert images.labels[broken] == -1
    assert images.labels[1 - broken] == 4 - broken
    with pytest.raises(ImageError, match="truncated"):
        images.read(broken)


def test_a_dataset_is_read_by_one_thread_at_a_time() -> None:
    busy, clashes = threading.Lock(), []

    class Delicate(Dataset):
        def __getitem__(self, index: int) -> Any:
            if not busy.acquire(blocking=False):
                clashes.append(index)
                return super().__getitem__(index)
            try:
                image, label = super().__getitem__(index)
                return image.resize((200, 200)), label
            finally:
                busy.release()

    images = as_image_list(Delicate([(picture(str(index)), 0) for index in range(64)]))
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(images.read, range(64)))) == 64
    assert clashes == []


def test_a_list_of_a_dataset_is_pickled() -> None:
    images = as_image_list([("a", picture("a"), 1)])
    assert content(pickle.loads(pickle.dumps(images))) == content(images)


PICTURE = Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("/data/imagenet", r"find_images\(path\)"),
        (Path("/data/imagenet"), r"find_images\(path\)"),
        ({"a": PICTURE}, "a dict"),
        (iter([("a", PICTURE, 1)]), "list_iterator"),
        (pd.Series([("b", PICTURE, 1), ("a", PICTURE, 0)], index=[1, 0]), "a Series"),
        (pd.DataFrame({"id": ["a"], "image": [PICTURE], "label": [1]}), "a DataFrame"),
        (np.zeros((3, 4, 4, 3), np.uint8), r"a ndarray of shape \(3, 4, 4, 3\)"),
        ([], "empty"),
        ([PICTURE], r"images\[0\] is a Image"),
        ([("a", PICTURE, 1), ("b", PICTURE)], r"images\[1\] is a tuple of length 2"),
        ([("a", PICTURE, 1), ("a", PICTURE, 1)], "two images have the id 'a'"),
        ([("", PICTURE, 1)], r"images\[0\]"),
        ([(0, PICTURE, 1)], r"images\[0\] is a int"),
        ([("a", PICTURE, "cat")], "the label .* is a str"),
        ([("a", PICTURE, 1.0)], "the label .* is a float"),
        ([("a", PICTURE, 2**31)], "a label is 2147483648"),
        ([("a", PICTURE, -2)], "a label is -2"),
        ([("\udcff", PICTURE, 1)], "not valid Unicode"),
        ([("a", np.zeros((3, 8, 8), np.uint8), 1)], r"shape \(3, 8, 8\) and dtype uint8"),
        ([("a", np.zeros((8, 8, 4), np.uint8), 1)], r"shape \(8, 8, 4\)"),
        ([("a", np.zeros(8, np.uint8), 1)], r"shape \(8,\)"),
        ([("a", np.zeros((0, 8), np.uint8), 1)], r"shape \(0, 8\)"),
        ([("a", np.zeros((8, 8, 3)), 1)], "dtype float64"),
        ([("a", "a.jpg", 1)], "the image of .* is a str"),
        (Dataset([(torch.zeros(3, 8, 8), 1)]), "without its transform"),
        (Dataset([(np.zeros((8, 8, 3), np.float32), 1)]), "without its transform"),
        (Dataset([{"image": PICTURE, "label": 1}]), r"images\[0\] is a dict"),
        (Dataset([(PICTURE, [0, 1])]), "the label .* is a list"),
        (Dataset([(PICTURE, 1), (PICTURE, 0.5)]), r"images\[1\] is a float"),
    ],
)
def test_what_is_not_images_is_refused(images: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_image_list(images)


def test_a_dataset_that_turns_to_tensors_later_is_refused_when_read() -> None:
    images = as_image_list(Dataset([(PICTURE, 1), (torch.zeros(3, 8, 8), 1)], targets=[1, 1]))
    with pytest.raises(UserError, match=r"Tensor of shape \(3, 8, 8\)"):
        images.read(1)


# --- prepare --------------------------------------------------------------------------------------------------------

MODES = {name: InterpolationMode[name.upper()] for name in get_args(Interpolation)}


def reference(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray[Any, Any]:
    steps: list[Any] = [transforms.CenterCrop(preprocessing.crop), transforms.PILToTensor()]
    if preprocessing.resize is not None:
        steps.insert(0, transforms.Resize(preprocessing.resize, MODES[preprocessing.interpolation]))
    pixels: np.ndarray[Any, Any] = transforms.Compose(steps)(image).numpy()
    return pixels


@pytest.mark.parametrize("interpolation", MODES)
@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    resize=st.none() | st.integers(1, 60),
    crop=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_prepare_is_torchvisions_pipeline(
    interpolation: Any, size: tuple[int, int], resize: int | None, crop: tuple[int, int]
) -> None:
    image = picture("hypothesis", size)
    preprocessing = Preprocessing(resize=resize, crop=crop, interpolation=interpolation)
    pixels = prepare(image, preprocessing)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, *crop)
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, reference(image, preprocessing))


@needs_imagenet
def test_originals_are_prepared_as_torchvision_prepares_them() -> None:
    images = find_images(IMAGENET / "originals")
    paths = {path.stem: path for path in (IMAGENET / "originals").glob("*/*.JPEG")}
    assert len(images) == len(paths) == 150
    preprocessing = [Preprocessing(256, (224, 224)), Preprocessing(342, (299, 299), "bicubic")]
    for index, image_id in enumerate(images.ids):
        ours, theirs = images.read(index), pil_loader(paths[image_id])
        settings_ = preprocessing[index % 2]
        np.testing.assert_array_equal(prepare(ours, settings_), reference(theirs, settings_), err_msg=image_id)
        assert images.wnids is not None
        assert images.wnids[images.labels[index]] == paths[image_id].parent.name


@needs_imagenet
def test_real_validation_images_and_their_csv_agree() -> None:
    by_folder = find_images(IMAGENET)
    by_csv = find_images(IMAGENET, labels=IMAGENET / "val_labels.csv")
    assert len(by_folder) == 900
    assert len(set(by_folder.labels.tolist())) == 588
    np.testing.assert_array_equal(by_folder.labels, by_csv.labels)
    assert by_folder.fingerprint == by_csv.fingerprint


def test_prepare_converts_other_modes() -> None:
    grey = picture("g", (40, 30), "L")
    preprocessing = Preprocessing(resize=20, crop=(20, 20))
    np.testing.assert_array_equal(prepare(grey, preprocessing), prepare(grey.convert("RGB"), preprocessing))


def test_prepare_refuses_what_would_not_fit_in_memory() -> None:
    thread = Image.new("RGB", (10000, 1))
    with pytest.raises(ImageError, match="too long and narrow"):
        prepare(thread, Preprocessing(resize=256, crop=(224, 224)))
    assert prepare(thread, Preprocessing(resize=None, crop=(224, 224))).shape == (3, 224, 224)


def test_images_do_not_need_torch() -> None:
    code = "import sys, igstore.images.image_list; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[1]).returncode == 0


# what other systems leave, and how they write names

LITTER = [
    ".DS_Store",
    "._cat.jpg",
    ".nfs000000000123.jpg",
    ".fuse_hidden00000001.png",
    "Thumbs.db",
    "desktop.ini",
    "Icon\r",
    "~$labels.csv",
    ".Spotlight-V100/store.jpg",
    "@eaDir/cat.jpg/SYNOPHOTO_THUMB_M.jpg",
    "@eaDir/thumb.jpg",
    "@eaDir/folder.jpg/x.jpg",
    "#recycle/dog.jpg",
    "$RECYCLE.BIN/dog.jpg",
    "System Volume Information/x.jpg",
    "lost+found/dog.jpg",
    "__MACOSX/._cat.jpg",
    "__MACOSX/dog.jpg",
]


@pytest.mark.parametrize("inside", ["", f"{WNIDS[3]}/"], ids=["flat", "folders"])
def test_what_other_systems_leave_is_no_image(tmp_path: Path, inside: str) -> None:
    write(tmp_path / f"{inside}cat.jpg")
    if not inside:
        (tmp_path / "labels.csv").write_text("file,class_index\ncat.jpg,1\n")
    before = find_images(tmp_path)
    for name in LITTER:
        for home in {"", inside}:
            write(tmp_path / home / name, b"file,class_index\nnothing.jpg,1\n" if name.endswith("csv") else b"")
    assert find_images(tmp_path).fingerprint == before.fingerprint
    assert find_images(tmp_path).ids == ("cat",)


def test_what_other_systems_leave_in_a_tar_is_no_image(official: Path) -> None:
    before = find_images(official)
    with tarfile.open(official / "ILSVRC2012_img_val.tar", "a") as tar:
        for name in ("._ILSVRC2012_val_00000001.JPEG", "__MACOSX/._ILSVRC2012_val_00000001.JPEG"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert find_images(official).ids == before.ids


def test_a_folder_named_like_an_image_is_none(tmp_path: Path) -> None:
    write(tmp_path / WNIDS[3] / "cat.jpg")
    (tmp_path / WNIDS[3] / "dog.jpg").mkdir()
    assert find_images(tmp_path).ids == ("cat",)


def test_a_pipe_named_like_an_image_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path / "cat.jpg")
    os.mkfifo(tmp_path / "dog.jpg")
    images = find_images(tmp_path)
    assert images.ids == ("cat", "dog")
    with pytest.raises(ImageError, match="not a regular file"):
        images.read(1)


COMPOSED, DECOMPOSED = "Caf\u00e9 \u00c5ngstr\u00f6m", "Cafe\u0301 A\u030angstro\u0308m"


@pytest.mark.parametrize("on_disk", [COMPOSED, DECOMPOSED], ids=["NFC", "NFD"])
@pytest.mark.parametrize("in_csv", [COMPOSED, DECOMPOSED], ids=["NFC", "NFD"])
@pytest.mark.parametrize("place", ["", "folder/", "parent"])
def test_names_are_compared_as_people_see_them(tmp_path: Path, on_disk: str, in_csv: str, place: str) -> None:
    root = tmp_path / f"{on_disk} images"
    inside = f"{on_disk}/" if place == "folder/" else ""
    write(root / f"{inside}{on_disk}.jpg")
    write(root / f"{inside}zebra.jpg")
    named = {"": "", "folder/": f"{in_csv}/", "parent": f"{in_csv} images/"}[place]
    (tmp_path / "labels.csv").write_text(f"file,class_index\n{named}{in_csv}.jpg,1\nzebra.jpg,2\n")
    images = find_images(root, labels=tmp_path / "labels.csv")
    assert images.ids == (COMPOSED, "zebra")
    assert images.labels.tolist() == [1, 2]
    for image in range(2):
        images.read(image)


def test_lists_of_the_same_names_are_the_same(tmp_path: Path) -> None:
    prints = set()
    for form in (COMPOSED, DECOMPOSED):
        for name in (form, "Cafd", "Cafz"):
            write(tmp_path / form[:4].encode().hex() / f"{name}.jpg")
        prints.add(find_images(tmp_path / form[:4].encode().hex()).fingerprint)
        given = [(name, Image.new("RGB", (4, 4)), None) for name in (form, "Cafd", "Cafz")]
        prints.add(as_image_list(given).fingerprint)
    assert len(prints) == 1


def test_two_names_that_people_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    for form in (COMPOSED, DECOMPOSED):
        write(tmp_path / f"{form}.jpg")
    with pytest.raises(UserError, match="two images have the id"):
        find_images(tmp_path)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENODEV, errno.ENOTCONN])
def test_no_image_fails_for_what_the_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """It would be recorded as a failure of the image for good."""
    write(tmp_path / "cat.jpg")
    images = find_images(tmp_path)

    def refuse(_: Path) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises((AccessError, OutOfMemoryError), match=os.strerror(code)):
        images.read(0)
