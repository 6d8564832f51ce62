"""The labels of images on disk: from folders' names, from CSVs, from ImageNet's development kit.

Labels are ImageNet's class indices by wnid, or whatever index a CSV gives; never the order of folders.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import struct
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from igstore.errors import DataNotFoundError, UserError, option
from igstore.files import as_seen, is_foreign, open_regular, read_whole
from igstore.images.imagenet import DEVKIT, Layout, synsets
from igstore.schema import UNKNOWN_LABEL

_MOST_OF_DEVKIT = 2**26  # bytes, unpacked: ten times what it has

_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)


@cache
def _class_index() -> dict[str, int]:
    return {wnid: index for index, (wnid, _) in enumerate(synsets())}


def find_labels(layout: Layout, csv_path: Path | None) -> tuple[list[int], bool]:
    """The class index of each of `layout.names`, -1 where unknown, and whether the classes are ImageNet's.

    `igstore.images.find_images` documents where they are looked for.
    """
    if csv_path is not None:
        return _labels_from_csv(layout, _read_csv(csv_path))
    if any("/" in name for name in layout.names):
        return _labels_from_folders(layout), True
    if layout.place.is_dir() and (table := _find_csv(layout)):
        return _labels_from_csv(layout, table)
    devkit = _find_devkit(layout.place)
    if devkit and (layout.place.is_file() or all(map(_VAL_NAME.fullmatch, layout.names))):
        return _labels_from_devkit(layout, devkit), True
    if layout.place.is_file():
        raise DataNotFoundError(
            f"no labels for {layout.place}: put {DEVKIT}.tar.gz beside it, or give a CSV by {option('labels')}"
        )
    return [UNKNOWN_LABEL] * len(layout.names), False


def _labels_from_folders(layout: Layout) -> list[int]:
    labels = []
    for name in layout.names:
        wnid, slash, _ = name.partition("/")
        if not slash:
            raise UserError(
                f"{layout.place} holds images ({name}) beside folders of images: keep one of the two, or give "
                f"a CSV by {option('labels')}"
            )
        if wnid not in _class_index():
            raise UserError(
                f"the folder {wnid!r} in {layout.place} is not one of ImageNet's 1000 wnids (such as n01440764). "
                f"For other classes give a CSV (file,class_index) by {option('labels')}, or a dataset to build_store "
                "in Python"
            )
        labels.append(_class_index()[wnid])
    return labels


@dataclass(frozen=True)
class _LabelTable:
    """A CSV of labels: class index (-1 unknown) by what its column ``file`` says."""

    path: Path
    label_of: dict[str, int]
    has_wnids: bool


def _read_csv(path: Path) -> _LabelTable:
    label_of: dict[str, int] = {}
    try:
        with open(open_regular(path), encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            header = rows.fieldnames or []
            if "file" not in header or not {"wnid", "class_index"} & set(header):
                raise UserError(f"{path} begins {','.join(header)!r}; it must begin file,wnid or file,class_index")
            for row in rows:
                where = f"{path} line {rows.line_num}"
                name, wnid, index = ((row.get(column) or "").strip() for column in ("file", "wnid", "class_index"))
                name = as_seen(name.removeprefix("./"))
                if not name or name in label_of:
                    raise UserError(f"{where} names {f'{name!r} a second time' if name else 'no file'}")
                label_of[name] = _parse_label(wnid, index, where)
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"the labels CSV {path} cannot be read: {error}") from error
    return _LabelTable(path, label_of, "wnid" in header)


def _parse_label(wnid: str, class_index: str, where: str) -> int:
    try:
        index = int(class_index or UNKNOWN_LABEL)
    except ValueError:
        raise UserError(f"{where}: class_index is {class_index!r}; it must be a whole number") from None
    if not wnid:
        return index
    if wnid not in _class_index():
        raise UserError(f"{where}: {wnid!r} is not one of ImageNet's 1000 wnids; give other classes by class_index")
    if class_index and index != _class_index()[wnid]:
        raise UserError(f"{where}: class_index is {index}, but {wnid} is class {_class_index()[wnid]}")
    return _class_index()[wnid]


def _find_csv(layout: Layout) -> _LabelTable | None:
    """The one ``*labels*.csv`` inside the folder; else the one beside it that names at least one of its images."""
    folder = Path(os.path.abspath(layout.place))
    tables = _read_csvs_in(folder)
    if not tables and (beside := _read_csvs_in(folder.parent)):
        positions = _positions(layout)
        tables = [table for table in beside if not positions.keys().isdisjoint(table.label_of)]
    if len(tables) > 1:
        paths = ", ".join(str(table.path) for table in tables)
        raise UserError(f"several CSVs may hold the labels of {layout.place}: {paths}; give one by {option('labels')}")
    return tables[0] if tables else None


def _read_csvs_in(folder: Path) -> list[_LabelTable]:
    return [_read_csv(path) for path in sorted(folder.glob("*labels*.csv")) if not is_foreign(path.name)]


def _positions(layout: Layout) -> dict[str, int]:
    """Position of an image by each way to name it: relative to the folder or its parent, or bare if that is unique."""
    names, place = [as_seen(name) for name in layout.names], as_seen(layout.place.name)
    bare = [os.path.basename(name) for name in names]
    counts = Counter(bare)
    positions = {name: position for position, name in enumerate(bare) if counts[name] == 1}
    for position, name in enumerate(names):
        positions[f"{place}/{name}"] = positions[name] = position
    return positions


def _labels_from_csv(layout: Layout, table: _LabelTable) -> tuple[list[int], bool]:
    positions = _positions(layout)
    missing = [name for name in table.label_of if name not in positions]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(table.label_of)} files named in {table.path} are not in {layout.place}, "
            f"the first being {missing[0]!r}: remove those rows, or add the images"
        )
    labels: dict[int, int] = {}
    for name, label in table.label_of.items():
        if labels.setdefault(positions[name], label) != label:
            raise UserError(f"{table.path} gives two labels to {layout.names[positions[name]]!r}")
    return [labels.get(position, UNKNOWN_LABEL) for position in range(len(layout.names))], table.has_wnids


def _find_devkit(place: Path) -> Path | None:
    """The devkit, packed or unpacked: in the folder, or beside the folder or tar."""
    folders = (place, Path(os.path.abspath(place)).parent)
    candidates = (folder / name for folder in folders for name in (f"{DEVKIT}.tar.gz", DEVKIT))
    return next((path for path in candidates if path.exists()), None)


def _labels_from_devkit(layout: Layout, devkit: Path) -> list[int]:
    truth = _read_devkit(devkit)
    labels = []
    for name in layout.names:
        match = _VAL_NAME.fullmatch(name)
        if match is None or not 1 <= int(match[1]) <= len(truth):
            raise UserError(
                f"{devkit} labels ILSVRC2012_val_00000001.JPEG to {len(truth):08d}, and {name!r} in {layout.place} is "
                f"not one of them: remove it, or give a CSV by {option('labels')}"
            )
        labels.append(truth[int(match[1]) - 1])
    return labels


def _read_devkit(devkit: Path) -> list[int]:
    """The class index of each validation image, by its number less one.

    The ground truth gives the devkit's own ids, which are not the class order: meta.mat says which wnid an id is.
    """
    import scipy.io  # slow to load, and only this layout needs it

    wanted = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
    try:
        if devkit.is_dir():
            meta, truth = (read_whole(devkit / name, _MOST_OF_DEVKIT) for name in wanted)
        else:
            with tarfile.open(fileobj=io.BytesIO(_unzipped(devkit))) as tar:
                files = (tar.extractfile(f"{DEVKIT}/{name}") for name in wanted)
                meta, truth = (file.read() for file in files if file is not None)
        table = np.atleast_1d(scipy.io.loadmat(io.BytesIO(_decompressed(meta)), squeeze_me=True)["synsets"])
        wnid_of = dict(zip(map(int, table["ILSVRC2012_ID"]), map(str, table["WNID"]), strict=True))
        return [_class_index()[wnid_of[int(line)]] for line in truth.split()]
    except Exception as error:  # on damaged bytes scipy's reader may raise anything
        raise UserError(f"{devkit} is damaged, or not the devkit ({type(error).__name__}: {error})") from error


def _unzipped(path: Path) -> bytes:
    """What a packed tar holds, which may be far more than it has bytes."""
    with open(open_regular(path), "rb") as file:
        is_packed = file.peek(2)[:2] == b"\x1f\x8b"
        content = (gzip.GzipFile(fileobj=file) if is_packed else file).read(_MOST_OF_DEVKIT + 1)
    if len(content) > _MOST_OF_DEVKIT:
        raise ValueError(f"unpacked it has more than {_MOST_OF_DEVKIT} bytes")
    return content


def _decompressed(mat: bytes) -> bytes:
    """A MATLAB file of version 5 without its compression, by which a few bytes may stand for any number of them."""
    header, compressed = 128, 15
    order = "<" if mat[126:128] == b"IM" else ">"
    pieces, place, left = [mat[:header]], header, _MOST_OF_DEVKIT
    while place < len(mat):
        kind, n_bytes = struct.unpack_from(f"{order}II", mat, place)
        after = place + 8 + n_bytes
        if kind == compressed:
            pieces.append(zlib.decompressobj().decompress(mat[place + 8 : after], left + 1))
        else:
            pieces.append(mat[place:after])
        left -= len(pieces[-1])
        if left < 0:
            raise ValueError(f"decompressed it has more than {_MOST_OF_DEVKIT} bytes")
        place = after
    return b"".join(pieces)
