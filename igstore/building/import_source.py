"""Maps that were made elsewhere: an array of them and the images that they are of, read a few at a time. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from igstore.errors import UserError
from igstore.files import as_seen

if TYPE_CHECKING:
    import torch

_BATCH = 64  # maps in memory at a time


class GivenMaps:
    """Attribution maps by the ids of their images.

    Parameters
    ----------
    maps
        A ``.npy`` file, which is mapped into memory, or an array or a torch tensor: float16, float32 or float64 (of
        tensors also bfloat16), (image, y, x) or (image, channel, y, x).
    image_ids
        The images that maps are wanted of, sorted as igstore lists them.
    order
        The ids of the images in the order of the maps; None where that is the order of `image_ids`.

    Raises
    ------
    UserError
        It is no such array, or there is not one map for each image.
    """

    def __init__(
        self,
        maps: str | os.PathLike[str] | NDArray[Any] | torch.Tensor,
        image_ids: Sequence[str],
        order: Sequence[str] | None = None,
    ) -> None:
        values = _open(Path(maps)) if isinstance(maps, str | os.PathLike) else _as_array(maps)
        if values.dtype.type not in (np.float16, np.float32, np.float64) or values.ndim not in (3, 4):
            raise UserError(
                f"the maps are {values.dtype} of shape {values.shape}; they must be float16, float32 or float64, "
                "(image, y, x) or (image, channel, y, x)"
            )
        self._values = values if values.ndim == 4 else values[:, np.newaxis]  # (image, channel, y, x)
        self._image_ids = image_ids
        of = image_ids if order is None else order
        if len(of) != len(values):
            raise UserError(f"there are {len(values)} maps for {len(of)} images; there must be one for each")
        self._places = {image_id: place for place, image_id in enumerate(of)}
        if self._places.keys() != set(image_ids) or len(self._places) != len(of):
            strange = sorted(set(of) - set(image_ids)) or sorted(set(image_ids) - set(of)) or [_twice(of)]
            raise UserError(
                f"the maps are of other images than those listed: {strange[0]!r} is only in one of the lists, or twice "
                f"in the maps'; igstore's ids are file stems such as {image_ids[0]!r}"
            )

    @property
    def n_channels(self) -> int:
        """1 for maps without channels."""
        return int(self._values.shape[1])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self._values.shape[2:]
        return int(height), int(width)

    def read(self, image_ids: Sequence[str]) -> NDArray[np.float64]:
        """The maps of some images, (image, channel, y, x)."""
        places = [self._places[image_id] for image_id in image_ids]
        return self._values[places].astype(np.float64)

    def sha256(self) -> str:
        """In hexadecimal, over dtype, shape and values in the order of the images: the same whatever the maps' own."""
        digest = hashlib.sha256(f"{self._values.dtype.name} {self._values.shape}".encode())
        for start in range(0, len(self._image_ids), _BATCH):
            places = [self._places[image_id] for image_id in self._image_ids[start : start + _BATCH]]
            values = np.ascontiguousarray(self._values[places])
            digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).data)
        return digest.hexdigest()


def _as_array(maps: Any) -> NDArray[Any]:
    if hasattr(maps, "detach"):  # a torch tensor, maybe on a GPU, or part of a graph
        maps = maps.detach().cpu()
        maps = maps.float() if str(maps.dtype) == "torch.bfloat16" else maps  # NumPy has none
    try:
        values = np.asarray(maps)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the maps are a {type(maps).__name__}, of which no array can be made: {error}") from error
    return values


def _open(path: Path) -> NDArray[Any]:
    path = path.expanduser()
    try:
        try:
            values: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError:  # there are file systems without maps; whatever else is wrong is so again
            values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"the maps cannot be read from {path}: {error}; it must be a .npy file of numbers") from error
    if not isinstance(values, np.ndarray):
        raise UserError(f"{path} holds several arrays; save the maps alone: numpy.save('maps.npy', maps)")
    return values


def _twice(ids: Sequence[str]) -> str:
    return next(one for place, one in enumerate(ids) if one in ids[:place])


def read_ids(path: str | os.PathLike[str]) -> list[str]:
    """The image ids of a text file, one a line; empty lines do not count.

    Raises
    ------
    UserError
        It cannot be read.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the ids cannot be read from {path}: {error}; it must be text, an id a line") from error
    return [as_seen(line.strip()) for line in lines if line.strip()]
