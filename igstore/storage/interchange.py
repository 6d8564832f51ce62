"""A store in the forms that other programs of this field read: Quantus's batches, a project of ViRelAy's.

Each holds the images that are built, in order. Shards are read one after the other, so memory does not grow with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from igstore import files
from igstore.cli import Progress
from igstore.errors import UserError
from igstore.schema import BUILT, UNKNOWN_LABEL, Preprocessing
from igstore.storage.copies import read_shard
from igstore.storage.hdf5_writer import new_file
from igstore.storage.reader import StoreReader

_CHANNELS = 3
_BATCH = 32  # images at a time, besides a shard
_NO_CLASS = "not known"
_MOST_CLASSES = np.iinfo(np.uint16).max  # and one more for it


@dataclass(frozen=True, eq=False)
class Piece:
    """Some built images of a store, and where they come among all that are built.

    Attributes
    ----------
    first, last
        The place of the first one, and the place after the last one.
    pixels
        uint8 (image, channel, y, x).
    attribution
        float32 (image, channel, y, x), multiplied by its scale; one channel where channels were reduced.
    """

    first: int
    last: int
    pixels: NDArray[np.uint8]
    attribution: NDArray[np.float32]


def _pieces(store: StoreReader, progress: Progress) -> Iterator[Piece]:
    place = 0
    for shard in range(store.n_shards):
        _, arrays = read_shard(store, shard)
        built = np.flatnonzero(arrays["status"] == BUILT)
        for start in range(0, len(built), _BATCH):
            some = built[start : start + _BATCH]
            maps = arrays["attribution"][some].astype(np.float32)
            maps *= arrays["scale"][some].reshape(-1, *[1] * (maps.ndim - 1))  # a power of two: exact
            maps = maps if maps.ndim == 4 else maps[:, np.newaxis]
            yield Piece(place, place + len(some), arrays["pixels"][some], maps)
            place += len(some)
        first, last = store.bounds(shard)
        progress.advance(last - first)


def _built(store: StoreReader) -> NDArray[np.int64]:
    """The numbers of the built images; raises `UserError` where there are none, or no maps or pixels of them."""
    lacking = [name for name in ("attribution", "pixels") if name not in store.variables]
    if lacking:
        raise UserError(
            f"{store.where} has no {' and no '.join(lacking)}, which this format is made of; export a store that has"
        )
    built = np.flatnonzero(store.status == BUILT)
    if not len(built):
        raise UserError(f"no image of {store.where} is built")
    return built


def write_quantus(store: StoreReader, path: Path, *, progress: Progress) -> None:
    """Write what Quantus's metrics take, as ``.npy`` files in a folder.

    ``x_batch.npy`` is float32 (image, channel, y, x), normalised as the store's model wants it; ``y_batch.npy`` int64
    (image,), the classes that were attributed, which is what Quantus measures against; ``a_batch.npy`` float32
    (image, 1, y, x), the maps, or (image, channel, y, x) where the store keeps channels. ``image_ids.txt`` has an id a
    line, ``settings.json`` the store's settings. In Python::

        batches = {f"{k}_batch": np.load(f"FOLDER/{k}_batch.npy") for k in "xya"}
        scores = quantus.PixelFlipping()(model=network, **batches)

    Quantus refuses memory maps by their type; ``np.asarray(np.load(..., mmap_mode="r"))`` gives it one all the same.

    Parameters
    ----------
    store
        As `igstore.storage.check_finished` wants it.
    path
        The folder, empty.
    progress
        Counts the images.

    Raises
    ------
    UserError
        The store has no maps or no pixels, or no image is built.
    DamagedStoreError
        A shard is not what its record says.
    """
    built = _built(store)
    size, n_channels = store.spec.preprocessing.crop, _CHANNELS if store.spec.reduce == "none" else 1
    table = normalised_values(store.spec.preprocessing)
    with (
        _npy(path / "x_batch.npy", np.float32, (len(built), _CHANNELS, *size)) as x,
        _npy(path / "a_batch.npy", np.float32, (len(built), n_channels, *size)) as a,
        _npy(path / "y_batch.npy", np.int64, (len(built),)) as y,
    ):
        y.write(store.scalars("target")[built].astype(np.int64).data)
        for piece in _pieces(store, progress):
            normalised = [values[piece.pixels[:, channel]] for channel, values in enumerate(table)]
            x.write(np.stack(normalised, axis=1).data)
            a.write(np.ascontiguousarray(piece.attribution).data)
    ids = "".join(f"{store.image_ids[image]}\n" for image in built.tolist())
    files.write_atomically(path / "image_ids.txt", ids.encode())
    files.write_json(path / "settings.json", store.spec.to_attributes())


@contextmanager
def _npy(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> Iterator[BinaryIO]:
    """A new ``.npy`` file, whose values are to be written to it in order; on the disk when the context ends.

    A map into memory would take fewer words, and a full disk would end the process.
    """
    with path.open("xb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file
    files.flush(path)


def normalised_values(preprocessing: Preprocessing) -> NDArray[np.float32]:
    """float32 (3, 256): what each pixel value becomes in each channel, with the bits of torchvision's ``Normalize``."""
    mean, std = (np.array(values, np.float32)[:, np.newaxis] for values in (preprocessing.mean, preprocessing.std))
    return (np.arange(256, dtype=np.float32) / np.float32(255) - mean) / std


def write_virelay(store: StoreReader, path: Path, *, progress: Progress) -> None:
    """Write a project of ViRelAy's, to look at and to give to CoRelAy for analyses.

    The folder holds ``project.yaml``; ``input.h5`` with ``data``, the pixels, uint8 (image, channel, y, x), and
    ``label``, uint16 (image,); ``attribution.h5`` with ``attribution``, float32 (image, channel, y, x), ``label``, the
    classes attributed, uint16 (image,), and ``prediction``, float32 (image, class); and ``label-map.json``. ViRelAy
    sums over channels and shows no map of one, so maps that were reduced are shared out equally among three. A store
    keeps no outputs but the target's, so ``prediction`` is 1 for the class predicted and 0 for all others. Images
    without a label get a class of their own, the last one. The schema is that of ViRelAy's documentation, "Database
    Specification"; its analyses are left out, since nothing has been analysed.

    Parameters
    ----------
    store
        As `igstore.storage.check_finished` wants it.
    path
        The folder, empty.
    progress
        Counts the images.

    Raises
    ------
    UserError
        h5py is not installed, the store has no maps or no pixels, no image is built, or a class index is too large.
    DamagedStoreError
        A shard is not what its record says.
    """
    built = _built(store)
    labels, targets, predictions = (store.scalars(name)[built] for name in ("label", "target", "prediction"))
    largest = int(max(labels.max(), targets.max(), predictions.max()))
    if largest >= _MOST_CLASSES:
        raise UserError(f"{store.where} has a class {largest}; ViRelAy's go up to {_MOST_CLASSES - 1}")
    classes = _label_map(store, largest)
    unknown = len(classes) - 1
    shape = (len(built), _CHANNELS, *store.spec.preprocessing.crop)
    with (
        new_file(path / "input.h5") as (inputs, check_inputs),
        new_file(path / "attribution.h5") as (attributions, check_attributions),
    ):
        inputs["label"] = np.where(labels == UNKNOWN_LABEL, unknown, labels).astype(np.uint16)
        attributions["label"] = targets.astype(np.uint16)
        data = inputs.create_dataset("data", shape, np.uint8)
        maps = attributions.create_dataset("attribution", shape, np.float32)
        prediction = attributions.create_dataset("prediction", (len(built), len(classes)), np.float32)
        prediction.attrs["description"] = "1 for the class that the model predicts, 0 for all others"
        for piece in _pieces(store, progress):
            of_piece = slice(piece.first, piece.last)
            data[of_piece] = piece.pixels
            maps[of_piece] = piece.attribution * np.float32(piece.attribution.shape[1] / _CHANNELS)
            prediction[of_piece] = predictions[of_piece, np.newaxis] == np.arange(len(classes))
            check_inputs()
            check_attributions()
    files.write_atomically(path / "label-map.json", (json.dumps(classes, indent=1) + "\n").encode())
    files.write_json(path / "project.yaml", _project(store))  # JSON is YAML


def _label_map(store: StoreReader, largest: int) -> list[dict[str, Any]]:
    """An entry for each class, by index, and one more for images without a label."""
    names, wnids = (store.attributes.get(name, []) for name in ("class_names", "wnids"))
    n_classes = max(len(names), len(wnids), largest + 1)
    named = [
        (
            wnids[index] if index < len(wnids) else f"class{index}",
            names[index] if index < len(names) else f"class {index}",
        )
        for index in range(n_classes)
    ]
    every = [*named, (_NO_CLASS, _NO_CLASS)]
    return [{"index": index, "word_net_id": wnid, "name": name} for index, (wnid, name) in enumerate(every)]


def _project(store: StoreReader) -> dict[str, Any]:
    spec = store.spec
    height, width = spec.preprocessing.crop
    name = store.where.rpartition("/")[2]
    return {
        "project": {
            "name": name,
            "model": f"{spec.model} ({spec.weights})",
            "label_map": "label-map.json",
            "dataset": {
                "name": f"images of {name}",
                "type": "hdf5",
                "path": "input.h5",
                "input_width": width,
                "input_height": height,
                "down_sampling_method": "none",
                "up_sampling_method": "none",
            },
            "attributions": {
                "attribution_method": spec.made_by,
                "attribution_strategy": "true_label" if spec.target == "label" else "predicted_label",
                "sources": ["attribution.h5"],
            },
        }
    }
