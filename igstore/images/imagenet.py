"""Where images lie on disk: ImageNet packed or unpacked, other folders."""

from __future__ import annotations

import importlib.resources
import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from igstore.errors import DataNotFoundError, ImageError, UserError, option
from igstore.files import is_foreign
from igstore.schema import Split

EXTENSIONS = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
DEVKIT = "ILSVRC2012_devkit_t12"

LAYOUT_HELP = f"""\
igstore never downloads ImageNet. Lay it out in one of these ways, and give ROOT (--data ROOT, or IMAGENET_DIR=ROOT):
  ROOT/ILSVRC2012_img_val.tar and ROOT/{DEVKIT}.tar.gz    the official files, kept packed
  ROOT/val/n01440764/ILSVRC2012_val_00000293.JPEG ...                  one folder for each wnid
For the training images: ROOT/ILSVRC2012_img_train.tar, or ROOT/train/n01440764/*.JPEG. A flat folder of images, with
or without a CSV of labels, is read too. data/README.md in igstore's repository says it at length."""


@dataclass(frozen=True)
class Layout:
    """Images in one place, in no particular order.

    Attributes
    ----------
    place
        The folder or tar that holds them.
    names
        POSIX path of each image, relative to the folder; a tar's are those of the unpacked folder.
    read
        From a position in `names` to the decoded image in mode RGB. Safe to call from several threads.
    """

    place: Path
    names: list[str]
    read: Callable[[int], Image.Image]


@cache
def synsets() -> tuple[tuple[str, str], ...]:
    """ImageNet's 1000 classes in the order of their index: (wnid, first synonym)."""
    text = importlib.resources.files("igstore.images").joinpath("synset_words.txt").read_text(encoding="utf-8")
    pairs = (line.split(" ", 1) for line in text.splitlines())
    return tuple((wnid, words.split(", ")[0]) for wnid, words in pairs)


def locate(root: Path, split: Split) -> Layout:
    """The first of ``root/<split>/``, ``root/ILSVRC2012_img_<split>.tar`` and `root` itself that holds images.

    Raises
    ------
    DataNotFoundError
        None of them does; the message says how to lay ImageNet out.
    UserError
        A folder cannot be listed, or a tar is damaged.
    """
    if not root.is_dir():
        what = "is a file; give the folder that holds it" if root.exists() else "does not exist"
        raise DataNotFoundError(f"{root} {what}.\n{_layout_help()}")
    tar = root / f"ILSVRC2012_img_{split}.tar"
    if names := _list_folder(root / split):
        return Layout(root / split, names, _Files(str(root / split), tuple(names)))
    if tar.is_file():
        names, offsets, sizes = _list_tar(tar, split)
        if names:
            return Layout(tar, names, _TarSlices(str(tar), np.array(offsets), np.array(sizes)))
    if names := _list_folder(root):
        return Layout(root, names, _Files(str(root), tuple(names)))
    raise DataNotFoundError(f"no images of split {split!r} in {root}.\n{_layout_help()}")


def _layout_help() -> str:
    return LAYOUT_HELP.replace("--data ROOT", option("images", "ROOT"))


@dataclass(frozen=True)
class _Files:
    """Images that are files of their own."""

    folder: str
    names: tuple[str, ...]

    def __call__(self, position: int) -> Image.Image:
        path = Path(self.folder, self.names[position])
        if not path.is_file() and path.exists():  # a pipe would be waited for
            raise ImageError("not a regular file")
        return _decode(path.read_bytes())


@dataclass(frozen=True, eq=False)
class _TarSlices:
    """Images that are runs of bytes in a tar. Each read opens the tar anew, so threads and processes share nothing."""

    path: str
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    def __call__(self, position: int) -> Image.Image:
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offsets[position])
            return _decode(file.read(self.sizes[position]))


def _decode(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("empty file (0 bytes)")
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def _is_image(name: str) -> bool:
    return not is_foreign(name) and os.path.splitext(name)[1].lower() in EXTENSIONS


def _list_folder(folder: Path) -> list[str]:
    """Names of the images in `folder` and in those directly inside it; what other systems leave is passed over."""
    names: list[str] = []
    if not folder.is_dir():
        return names
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir():
                    names += [entry.name] if _is_image(entry.name) else []
                elif not is_foreign(entry.name):
                    with os.scandir(entry) as inner:
                        found = [one.name for one in inner if _is_image(one.name) and not one.is_dir()]
                        names += [f"{entry.name}/{name}" for name in found]
    except OSError as error:
        raise UserError(f"cannot list {error.filename or folder}: {error.strerror}") from error
    return names


def _list_tar(path: Path, split: Split) -> tuple[list[str], list[int], list[int]]:
    """Names, offsets in the file and sizes of the images in an official tar: of images (val), or of tars (train)."""
    names: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []

    def add_images(tar: tarfile.TarFile, start: int, prefix: str) -> None:
        for member in tar:
            name = os.path.basename(member.name)
            if member.isfile() and _is_image(name):
                names.append(prefix + name)
                offsets.append(start + member.offset_data)
                sizes.append(member.size)

    try:
        with tarfile.open(path, "r:") as tar:
            if split == "val":
                add_images(tar, 0, "")
            else:
                for member in tar:
                    wnid, extension = os.path.splitext(os.path.basename(member.name))
                    inner = tar.extractfile(member) if extension == ".tar" and not is_foreign(wnid) else None
                    if inner is not None:
                        with inner, tarfile.open(fileobj=inner, mode="r:") as inner_tar:
                            add_images(inner_tar, member.offset_data, f"{wnid}/")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); fetch or copy it again") from error
    return names, offsets, sizes
