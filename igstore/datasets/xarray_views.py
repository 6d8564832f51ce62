"""A store as xarray: maps at their true scale, and masked images that are made when they are looked at.

Nothing is read before it is asked for. Arrays are dask's, one chunk a shard. Picking images by number, id or slice in
one step, as in ``view.sel(p=50, image=ID)``, reads those images alone; a second step, a list or a condition reads the
whole of each shard that it touches.
"""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from igstore.datasets.masked_images import Images, MaskedImages
from igstore.masks import MaskOptions, options_of_each
from igstore.schema import BUILT, CHANNEL, IMAGE, UNKNOWN_LABEL, Fill, Keep, Order, Score, Select, X, Y
from igstore.storage import ImageArray, StoreReader, layout

Store = str | os.PathLike[str] | StoreReader
P = float | Sequence[float]

_CLASS_LISTS = ("class_names", "wnids")
_COORDINATES = ("image_id", "label")


def open_store(store: Store) -> xr.Dataset:
    """A store as one lazy Dataset.

    `attribution` is at its true scale, float32: what is stored times `scale`, exact. It is NaN for images that failed.
    Reading `attribution` or `pixels` of an image that is not built yet raises `DamagedStoreError`; `status` says which
    are: ``ds.isel(image=(ds.status == 1).values)``.

    Parameters
    ----------
    store
        Its path or URL, or a `StoreReader`.

    Returns
    -------
    Dataset with the variables of the store, images listed by the coordinates `image` (the id), `label` (the class
    index, -1 unknown), `wnid` and `class_name` ("" where unknown): ``.sel(image=ID)`` picks by id, which is what xarray
    aligns by, and ``.isel(image=ds.label == INDEX)`` by class. Its attributes are the store's, everything that made
    it, as netCDF takes them: what is None is left out, truth is 1 or 0, and lists of words are one text.

    Raises
    ------
    StoreNotFoundError
        There is no store.
    SettingsMismatchError
        It is not a store of this format version.

    >>> store = open_store("toy.zarr")
    >>> store.attribution.dims, store.attribution.shape
    (('image', 'y', 'x'), (4, 24, 24))
    >>> store.isel(image=store.label == 2).image.values.tolist()
    ['picture_2']
    """
    reader = StoreReader.of(store)
    images = np.arange(reader.n_images)
    true_scale = np.where(reader.status == BUILT, reader.scalars("scale"), np.float32(np.nan))
    data = {}
    for name, variable in reader.variables.items():
        if name in _COORDINATES:
            continue
        attributes = {"description": variable.description}
        if not variable.is_sharded:
            data[name] = xr.Variable(variable.dims, reader.scalars(name), attributes)
            continue
        array = reader.array(name)
        read: Callable[[Images], NDArray[Any]] = array.read
        dtype = array.dtype
        if name == "attribution":
            read, dtype = partial(_read_attribution, array, true_scale), np.dtype(np.float32)
            made = f"made by {reader.spec.maps_by}" if reader.spec.maps_by else "Integrated Gradients"
            attributes = {"description": f"attribution of the target's output, {made}"}
        values = _lazy(name, _Lazy(read, images, array.shape[1:], dtype), _chunks(reader, images))
        data[name] = xr.Variable(variable.dims, values, attributes)
    provenance = {name: value for name, value in reader.attributes.items() if name not in _CLASS_LISTS}
    return xr.Dataset(data, _coordinates(reader, images), _as_of_netcdf(provenance))


def masked_view(
    store: Store,
    p: P = MaskOptions.p,
    keep: Keep = MaskOptions.keep,
    *,
    select: Select = MaskOptions.select,
    score: Score = MaskOptions.score,
    block: int = MaskOptions.block,
    fill: Fill = MaskOptions.fill,
    order: Order = MaskOptions.order,
    seed: int = MaskOptions.seed,
    images: Any = None,
) -> xr.DataArray:
    """Masked pixels of all built images, made when they are looked at.

    Parameters
    ----------
    store
        Its path or URL, or a `StoreReader`.
    p
        0 to 100: a percentage of the image's attribution, or of its blocks; see `select`. Several values
        become a leading dimension ``p``.
    keep
        ``"top"`` shows the blocks that hold the top p%, ``"bottom"`` all others.
    select
        What p is a percentage of: ``"mass"``, the image's total score, or ``"count"``, its blocks.
    score, block
        The ranking: the score of a block (``"positive"``, ``"absolute"`` or ``"signed"``), and its side in pixels.
    fill
        What a hidden pixel becomes: ``"black"``, the model's ``"mean"`` colour, the ``"image_mean"``, a ``"blur"`` or
        ``"noise"``.
    order
        ``"attribution"``, or the control ``"random"``: as many blocks, chosen at random.
    seed
        Of the random order and of the noise.
    images
        Where the pixels are, for a store without: the path of the images or of a store that has their pixels, an
        `ImageList`, or a `StoreReader`.

    Returns
    -------
    uint8 DataArray (image, channel, y, x), or (p, image, channel, y, x), with the coordinates of `open_store`. Images
    that are not built or failed are left out, as `MaskedImageNet` does. Its attributes are the options and the model.

    Raises
    ------
    UserError
        A value is not allowed, or there is no such store, ranking or pixels; the message says what to run.
    SettingsMismatchError
        `images` are others than the store's, or resized or cropped in another way.

    >>> view = masked_view("toy.zarr", p=[90, 50], keep="top")
    >>> view.shape, str(view.dtype)
    ((2, 4, 3, 24, 24), 'uint8')
    >>> untouched = masked_view("toy.zarr", p=0, keep="bottom")
    >>> bool((untouched == open_store("toy.zarr").pixels).all())
    True
    """
    options = {"keep": keep, "select": select, "score": score, "block": block, "fill": fill, "order": order}
    source = MaskedImages(store, images)
    source.check_pixels()
    inner = dict(zip((CHANNEL, Y, X), (3, *source.size), strict=True))
    return _view("masked", source, p, options | {"seed": seed}, _read_masked, inner, np.uint8)


def keep_mask(
    store: Store,
    p: P = MaskOptions.p,
    keep: Keep = MaskOptions.keep,
    *,
    select: Select = MaskOptions.select,
    score: Score = MaskOptions.score,
    block: int = MaskOptions.block,
    order: Order = MaskOptions.order,
    seed: int = MaskOptions.seed,
) -> xr.DataArray:
    """The masks alone, True where visible, for pixels and augmentations of one's own; needs no pixels in the store.

    Parameters
    ----------
    store
        Its path or URL, or a `StoreReader`.
    p
        0 to 100: a percentage of the image's attribution, or of its blocks; see `select`. Several values
        become a leading dimension ``p``.
    keep
        ``"top"`` shows the blocks that hold the top p%, ``"bottom"`` all others.
    select
        What p is a percentage of: ``"mass"``, the image's total score, or ``"count"``, its blocks.
    score, block
        The ranking: the score of a block (``"positive"``, ``"absolute"`` or ``"signed"``), and its side in pixels.
    order
        ``"attribution"``, or the control ``"random"``: as many blocks, chosen at random.
    seed
        Of the random order.

    Returns
    -------
    bool DataArray (image, y, x), or (p, image, y, x), otherwise as `masked_view`.

    Raises
    ------
    UserError
        A value is not allowed, or there is no such store or ranking; the message says what to run.

    >>> top, bottom = (keep_mask("toy.zarr", p=50, keep=keep) for keep in ("top", "bottom"))
    >>> bool((top ^ bottom).all())
    True
    """
    options = {"keep": keep, "select": select, "score": score, "block": block, "order": order, "seed": seed}
    source = MaskedImages(store)
    inner = dict(zip((Y, X), source.size, strict=True))
    return _view("visible", source, p, options, MaskedImages.masks, inner, np.bool_)


def _view(
    name: str,
    source: MaskedImages,
    p: P,
    options: Mapping[str, Any],
    read: Callable[..., NDArray[Any]],
    inner: Mapping[str, int],
    dtype: type[np.generic],
) -> xr.DataArray:
    cells = options_of_each(p, **options)
    source.check(*cells)
    images, shape = source.built, tuple(inner.values())
    layers = [_Lazy(partial(read, source, options=cell), images, shape, np.dtype(dtype)) for cell in cells]
    chunks = _chunks(source.reader, images)
    coordinates = _coordinates(source.reader, images)
    spec = source.reader.spec
    attributes: dict[str, Any] = {"store": source.reader.where, "model": spec.model, "weights": spec.weights}
    used = dataclasses.asdict(cells[0])
    attributes |= {option: used[option] for option in ("p", *options)}
    if not np.ndim(p):
        return xr.DataArray(_lazy(name, layers[0], chunks), coordinates, (IMAGE, *inner), name, attributes)
    del attributes["p"]
    values = _lazy(name, _Layers(layers), (1, chunks))
    coordinates = coordinates.assign(p=[cell.p for cell in cells])
    return xr.DataArray(values, coordinates, ("p", IMAGE, *inner), name, attributes)


def _read_masked(source: MaskedImages, images: Images, options: MaskOptions) -> NDArray[np.uint8]:
    return source.masked(images, options)[0]


def _read_attribution(array: ImageArray, scale: NDArray[np.float32], images: Images) -> NDArray[np.float32]:
    maps = array.read(images).astype(np.float32)  # (image, y, x) or (image, channel, y, x)
    maps *= scale[images].reshape(-1, *[1] * (maps.ndim - 1))
    return maps


@dataclass(frozen=True)
class _Lazy:
    """An array (image, ...) whose images are made by `read` when it is sliced, from their numbers in the store."""

    read: Callable[[Images], NDArray[Any]]
    images: Images
    inner: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.images), *self.inner

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, key: tuple[Any, ...]) -> NDArray[Any]:
        picked, *rest = key
        images = self.images[picked]
        values = self.read(np.atleast_1d(images))[(slice(None), *rest)]
        return values if images.ndim else np.asarray(values[0])


@dataclass(frozen=True)
class _Layers:
    """Several `_Lazy` of one shape as one array with a leading dimension, sliced by dask one layer at a time."""

    layers: Sequence[_Lazy]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.layers), *self.layers[0].shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.layers[0].dtype

    def __getitem__(self, key: tuple[Any, ...]) -> NDArray[Any]:
        picked, rest = key[0], key[1:]
        if isinstance(picked, slice):
            return np.stack([layer[rest] for layer in self.layers[picked]])
        layer: _Lazy = self.layers[picked]
        return layer[rest]


def _chunks(reader: StoreReader, images: Images) -> tuple[int, ...]:
    """How many of these images are in each shard: dask's chunks along the image dimension."""
    return tuple(np.unique_counts(images // reader.shard_size).counts.tolist())


def _lazy(name: str, values: _Lazy | _Layers, leading: tuple[Any, ...]) -> da.Array:
    """`values` as a dask array, without computing anything.

    dask puts a slice of such an array into the read itself. For the same reason nothing may stand between the two:
    scaling, masking and stacking are done inside `values`, where a slice reaches them.
    """
    chunks = leading if isinstance(values, _Layers) else (leading,)
    return da.from_array(
        values,
        chunks=(*chunks, *values.shape[len(chunks) :]),
        name=f"{name}-{uuid.uuid4().hex}",
        asarray=False,
        meta=np.empty((0,) * values.ndim, values.dtype),
    )


def _coordinates(reader: StoreReader, images: Images) -> xr.Coordinates:
    labels = reader.scalars("label")[images]
    coordinates = {
        IMAGE: np.array(reader.image_ids, dtype=np.str_)[images],
        "label": xr.Variable(IMAGE, labels, {"description": layout.LISTED["label"].description}),
    }
    for name, attribute in (("wnid", "wnids"), ("class_name", "class_names")):
        known = np.array([*reader.attributes.get(attribute, ()), ""], dtype=np.str_)  # the last one is for unknown
        places = np.where((labels >= 0) & (labels < len(known) - 1), labels, UNKNOWN_LABEL)
        coordinates[name] = xr.Variable(IMAGE, known[places])
    return xr.Dataset(coords=coordinates).coords


def _as_of_netcdf(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's values as those that attributes of netCDF files may have: numbers, lists of numbers, texts."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return ", ".join(f"{name} {one}" for name, one in value.items())
        if isinstance(value, list):
            is_numbers = value and all(isinstance(one, int | float) for one in value)
            return value if is_numbers else ", ".join(map(str, value))
        if isinstance(value, int):  # and so bool
            return int(value) if -(2**63) <= value < 2**63 else str(value)
        return value

    return {name: plain(value) for name, value in attributes.items() if value is not None}
