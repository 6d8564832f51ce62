"""A deterministic list of labelled images, read lazily and from any thread.

Images come from ImageNet or a folder (`find_images`) or from Python objects (`as_image_list`). The list is sorted by
image id.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import operator
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from igstore.errors import IgstoreError, ImageError, UserError
from igstore.files import access_error, as_seen, is_of_the_machine
from igstore.images.imagenet import locate, synsets
from igstore.images.labels import find_labels
from igstore.schema import UNKNOWN_LABEL, Split, as_path, check_choice, whole_number

_MAX_LABEL = np.iinfo(np.int32).max

_T = TypeVar("_T")
_warnings_lock = threading.Lock()
_items_lock = threading.Lock()


@dataclass(frozen=True, eq=False, repr=False)
class ImageList:
    """Labelled images in the order of their ids, read lazily.

    Made by `find_images` and `as_image_list`. It holds no open files: it may be pickled, and survives a fork.

    Attributes
    ----------
    ids
        One string an image, all different, sorted by code point.
    labels
        int32 (image,): the index of the class, -1 where it is unknown. Read-only.
    fingerprint
        sha256 in hexadecimal over the ids and labels of the whole list; `head` keeps it.
    class_names, wnids
        By class index: a readable name, and the WordNet id. None where they are not known.
    paths
        Of images found in a folder or tar: the POSIX path of each, relative to it. None for others.
    """

    ids: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    fingerprint: str
    class_names: tuple[str, ...] | None
    wnids: tuple[str, ...] | None
    paths: tuple[str, ...] | None
    _read_from_source: Callable[[int], Image.Image]  # from a position in the source to an image in mode RGB
    _positions: npt.NDArray[np.int64]  # (image,) where each image of the list is in the source

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        labelled = np.count_nonzero(self.labels != UNKNOWN_LABEL)
        return f"<ImageList: {len(self)} images, {labelled} labelled, fingerprint {self.fingerprint[:12]}>"

    @property
    def given_ids(self) -> tuple[str, ...]:
        """The ids in the order of the data set or sequence that the list was made from."""
        return tuple(self.ids[place] for place in np.argsort(self._positions).tolist())

    def head(self, n: int) -> ImageList:
        """The first `n` images by id, or all where there are fewer, under the same fingerprint."""
        n = whole_number("limit", n, 1)
        return dataclasses.replace(
            self,
            ids=self.ids[:n],
            labels=self.labels[:n],
            paths=self.paths and self.paths[:n],
            _positions=self._positions[:n],
        )

    def of_size(self, size: tuple[int, int]) -> ImageList:
        """The same list, from which images of another (height, width) than `size` cannot be read."""
        return dataclasses.replace(self, _read_from_source=_OfSize(self._read_from_source, size))

    def read(self, index: int) -> Image.Image:
        """Image `index` of the list, decoded, in mode RGB, as torchvision's ``pil_loader`` would return it.

        EXIF orientation is not applied. Several threads may read at once.

        Raises
        ------
        ImageError
            It cannot be read (missing, empty, truncated, not an image, too large ...); the message is the reason.
        AccessError
            No image can be read at the moment: no more files may be open, the mount is gone.
        UserError
            A dataset gave something else than a PIL image or a uint8 array.
        """
        return _attempt(self._read_from_source, int(self._positions[index]))


@dataclass(frozen=True, eq=False)
class _OfSize:
    """What `read` gives, if it is of a (height, width)."""

    read: Callable[[int], Image.Image]
    size: tuple[int, int]

    def __call__(self, position: int) -> Image.Image:
        image = self.read(position)
        height, width = self.size
        if image.size != (width, height):
            raise ImageError(
                f"is {image.height}x{image.width} pixels, and the others {height}x{width}: give a preprocessing for all"
            )
        return image


def _attempt(get: Callable[..., _T], *arguments: Any) -> _T:
    """What `get` returns. Whatever it raises comes out as `ImageError`, so that one bad image stops nothing.

    Pillow warns of oddities that do not hinder decoding (broken EXIF, large files). Where warnings are errors the image
    is read again with warnings off: only then, and under a lock, because the filters belong to the whole process.
    """
    try:
        try:
            return get(*arguments)
        except Warning:
            with _warnings_lock, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return get(*arguments)
    except IgstoreError:
        raise
    except (Exception, SystemExit) as error:  # Pillow's decoders and users' datasets may raise anything
        if isinstance(error, OSError) and is_of_the_machine(error):  # of every image, none of which is the worse for it
            raise access_error("an image cannot be read", error) from error
        raise ImageError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """One short line that is the same in every run (some of Pillow's messages hold a memory address)."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can identify"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def find_images(
    data: str | os.PathLike[str], *, split: Split = "val", labels: str | os.PathLike[str] | None = None
) -> ImageList:
    """The labelled images of ImageNet, or of a folder, at `data`.

    The first of these that holds images is taken, `data` being

    1. a root with a folder ``val/`` (or ``train/``, as `split` says), laid out as in 3;
    2. a root with ``ILSVRC2012_img_val.tar`` (or ``ILSVRC2012_img_train.tar``), which is read in place;
    3. such a folder itself: of folders named by wnid (``n01440764/*.JPEG``), or flat.

    Image ids are file stems, or the path relative to the folder where stems collide: the same for tar and folder.

    Labels come from `labels` where it is given; else from the wnid that names the folder (never from the order of
    folders); else, for a flat folder, from a CSV: the one ``*labels*.csv`` inside it, or the one beside it that names
    at least one of its images; else, for files named ``ILSVRC2012_val_*``, from the devkit, packed or unpacked, in
    the folder or beside it. A flat folder without any of these is unlabelled; a tar needs the devkit or `labels`.

    Parameters
    ----------
    data
        The root or folder; ``~`` is expanded.
    split
        ``"val"`` or ``"train"``: which folder or tar of a root.
    labels
        A CSV with a header and the columns ``file`` (path relative to the folder or its parent, or the bare file name)
        and ``wnid``, ``class_index`` or both, which must then agree; other columns are ignored. An image that has
        neither, or that is not named at all, is unlabelled; a file that is named and not there is an error.

    Raises
    ------
    DataNotFoundError
        Nothing there; the message says how to lay ImageNet out.
    UserError
        A folder that is no wnid, a CSV or devkit that does not fit the images, a damaged tar.

    >>> images = find_images("photographs")
    >>> images.ids, images.labels.tolist()
    (('cat', 'dog'), [281, 248])
    """
    check_choice("split", split, Split)
    layout = locate(as_path("images", data), split)
    indices, is_imagenet = find_labels(layout, None if labels is None else as_path("labels", labels))
    return _make_list(
        _ids_from_names(layout.names),
        indices,
        layout.read,
        class_names=tuple(name for _, name in synsets()) if is_imagenet else None,
        wnids=tuple(wnid for wnid, _ in synsets()) if is_imagenet else None,
        paths=layout.names,
    )


def as_image_list(images: Any) -> ImageList:
    """The image list of Python objects.

    Parameters
    ----------
    images
        One of

        - an `ImageList`, which is returned as it is;
        - a torchvision-style dataset: ``len(images)``, and ``images[i]`` gives (image, label). Labels come from its
          ``targets``, else from one pass over it; ids from the file stems of its ``samples`` or ``imgs``, else they
          are its indices, padded with zeros. Its ``classes`` become the class names. Labels are taken as they are:
          those of an ``ImageFolder`` that lacks some of ImageNet's classes are not ImageNet's; use `find_images` there;
        - a sequence of (id, image, label), the id a string, the label an int or None.

        An image is a PIL image of any mode, or a uint8 array of shape (y, x, 3) or (y, x), before any transform. Items
        are read again whenever an image is, one at a time: users' objects need not be safe for threads.

    Raises
    ------
    UserError
        Something else was given: a transformed dataset of float tensors, two equal ids, a label that is no integer.
    """
    if isinstance(images, ImageList):
        return images
    # pandas looks items up by their labels, and iterates in another order
    is_indexed = hasattr(images, "__len__") and hasattr(images, "__getitem__") and not hasattr(images, "iloc")
    if not is_indexed or isinstance(images, str | bytes | Mapping | np.ndarray):
        raise UserError(
            f"images is {_describe(images)}; it must be a dataset of (image, label), or a sequence of "
            f"(id, image, label or None). find_images(path) reads a folder or tar"
        )
    if len(images) == 0:
        raise UserError("images is empty")
    try:
        first = _attempt(operator.getitem, images, 0)
    except ImageError:  # the first file of a dataset is broken
        return _from_dataset(images)
    if not isinstance(first, tuple | list) or len(first) < 2:
        raise UserError(f"images[0] is {_describe(first)}; it must be (image, label), or (id, image, label or None)")
    if len(first) == 3 and isinstance(first[0], str):
        return _from_sequence(images)
    _attempt(_to_rgb, first[0], "images[0]")
    return _from_dataset(images)


def _from_sequence(images: Sequence[Any]) -> ImageList:
    ids, labels = [], []
    for position in range(len(images)):
        item = images[position]
        if not (isinstance(item, tuple | list) and len(item) == 3 and isinstance(item[0], str) and item[0]):
            raise UserError(f"images[{position}] is {_describe(item)}; it must be (id, image, label or None)")
        _check_image(item[1], f"images[{position}]")
        ids.append(item[0])
        labels.append(_to_label(item[2], f"images[{position}]"))
    return _make_list(ids, labels, _Items(images, 1), class_names=None, wnids=None)


def _from_dataset(dataset: Any) -> ImageList:
    names = _sample_names(dataset)
    digits = len(str(len(dataset) - 1))
    class_names, wnids = _classes(dataset)
    labels = _dataset_labels(dataset)
    _check_order(dataset, labels)
    return _make_list(
        [f"{index:0{digits}d}" for index in range(len(dataset))] if names is None else _ids_from_names(names),
        labels,
        _Items(dataset, 0),
        class_names=class_names,
        wnids=wnids,
    )


@dataclass(frozen=True, eq=False)
class _Items:
    """Images that are part `slot` of a user's items."""

    items: Any
    slot: int

    def __call__(self, position: int) -> Image.Image:
        with _items_lock:
            return _to_rgb(self.items[position][self.slot], f"images[{position}]")


def _sample_names(dataset: Any) -> list[str] | None:
    """POSIX paths of a dataset's samples, relative to its root where they are in it; None where it has none."""
    samples = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None)
    if not isinstance(samples, list | tuple) or len(samples) != len(dataset):
        return None
    if not all(isinstance(one, tuple | list) and one and isinstance(one[0], str | os.PathLike) for one in samples):
        return None
    root = f"{Path(getattr(dataset, 'root', '.')).as_posix()}/"
    return [Path(one[0]).as_posix().removeprefix(root) for one in samples]


def _dataset_labels(dataset: Any) -> list[int]:
    targets = getattr(dataset, "targets", None)
    if targets is not None and len(targets) == len(dataset):
        change = getattr(dataset, "target_transform", None) or (lambda target: target)
        return [_to_label(change(target), f"targets[{index}]") for index, target in enumerate(targets)]
    labels = []
    for index in range(len(dataset)):
        try:
            label = _attempt(lambda index: dataset[index][1], index)
        except ImageError:  # found again, and recorded, when the image is read
            label = None
        labels.append(_to_label(label, f"images[{index}]"))
    return labels


def _check_order(dataset: Any, labels: Sequence[int]) -> None:
    """Raise `UserError` where some of a dataset's items have other labels than its ``targets`` say in their places."""
    for index in sorted({0, len(dataset) // 2, len(dataset) - 1}):
        try:
            label = _to_label(_attempt(operator.getitem, dataset, index)[1], "")
        except (ImageError, UserError):  # found again when the image is read; not every dataset gives plain indices
            continue
        if label != labels[index]:
            raise UserError(
                f"images[{index}] has the label {label}, but images.targets[{index}] is {labels[index]}: the dataset "
                "changes the order of its items, or their labels, without its targets; give a list of "
                "(id, image, label) instead"
            )


def _classes(dataset: Any) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Class names and wnids, in the order of the dataset's own labels."""
    classes, wnids = getattr(dataset, "classes", None), getattr(dataset, "wnids", None)
    if not isinstance(classes, list | tuple):
        return None, None
    # torchvision's ImageNet has a tuple of synonyms for each class
    names = tuple(str(one[0] if isinstance(one, tuple | list) else one) for one in classes)
    readable = dict(synsets())
    if all(name in readable for name in names):  # an ImageFolder of wnids
        return tuple(readable[name] for name in names), names
    return names, tuple(map(str, wnids)) if isinstance(wnids, list | tuple) else None


def _to_label(label: Any, where: str) -> int:
    if label is None:
        return UNKNOWN_LABEL
    try:
        return operator.index(label)
    except TypeError:
        raise UserError(f"the label of {where} is {_describe(label)}; it must be a class index or None") from None


def _to_rgb(image: Any, where: str) -> Image.Image:
    _check_image(image, where)
    return (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")


def _check_image(image: Any, where: str) -> None:
    if isinstance(image, Image.Image):
        return
    pixels = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size > 0
    if pixels and (image.ndim == 2 or image.shape[2:] == (3,)):
        return
    raise UserError(
        f"the image of {where} is {_describe(image)}; it must be a PIL image, or a uint8 array of shape (y, x, 3) or "
        f"(y, x). Pass a dataset without its transform: igstore resizes, crops and normalises by itself"
    )


def _describe(value: Any) -> str:
    """A value in a few words: its type, with the shape and dtype of an array or tensor."""
    name = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {name} of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"a {name} of length {len(value)}" if isinstance(value, tuple | list) else f"a {name}"


def _ids_from_names(names: Sequence[str]) -> list[str]:
    """File stems; the whole name where stems collide."""
    names = [as_seen(name) for name in names]
    stems = [os.path.splitext(os.path.basename(name))[0] for name in names]
    counts = Counter(stems)
    return [stem if counts[stem] == 1 else name for stem, name in zip(stems, names, strict=True)]


def _make_list(
    ids: Sequence[str],
    labels: Sequence[int],
    read: Callable[[int], Image.Image],
    *,
    class_names: tuple[str, ...] | None,
    wnids: tuple[str, ...] | None,
    paths: Sequence[str] | None = None,
) -> ImageList:
    """Sort by id, check that ids differ, and take the fingerprint. Everything given is in the source's order."""
    ids = [as_seen(one) for one in ids]
    order = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
    sorted_ids = tuple(ids[position] for position in order)
    for one, other in itertools.pairwise(sorted_ids):
        if one == other:
            raise UserError(f"two images have the id {one!r}; every image needs an id of its own")
    too_far = next((label for label in labels if not UNKNOWN_LABEL <= label <= _MAX_LABEL), None)
    if too_far is not None:
        raise UserError(f"a label is {too_far}; labels are class indices from 0 to {_MAX_LABEL}, or None where unknown")
    sorted_labels = np.array(labels, dtype=np.int32)[order]
    sorted_labels.flags.writeable = False
    return ImageList(
        ids=sorted_ids,
        labels=sorted_labels,
        fingerprint=fingerprint(sorted_ids, sorted_labels),
        class_names=class_names,
        wnids=wnids,
        paths=None if paths is None else tuple(paths[position] for position in order),
        _read_from_source=read,
        _positions=order,
    )


def fingerprint(ids: Sequence[str], labels: npt.NDArray[np.int32]) -> str:
    """The fingerprint of a whole list: sha256 in hexadecimal over its sorted ids and their labels.

    Raises
    ------
    UserError
        An id is not valid Unicode.
    """
    digest = hashlib.sha256()
    for image_id, label in zip(ids, labels.tolist(), strict=True):
        try:
            digest.update(f"{len(image_id)} {image_id} {label}\n".encode())  # the length keeps odd ids apart
        except UnicodeEncodeError:
            raise UserError(f"the image id {image_id!r} is not valid Unicode; rename the file") from None
    return digest.hexdigest()
