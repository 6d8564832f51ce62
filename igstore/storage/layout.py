"""How a store is laid out: its variables, its shards, the names of its files. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igstore.errors import UserError, option
from igstore.masks import rank_dtype
from igstore.schema import (
    BLOCK_X,
    BLOCK_Y,
    BUILT,
    CHANNEL,
    FAILED,
    IMAGE,
    IMPORTED,
    NOT_BUILT,
    UNKNOWN_LABEL,
    BuildSpec,
    X,
    Y,
)


@dataclass(frozen=True)
class Variable:
    """An array of a store: its dimensions, dtype, and the value that stands for "not built yet"."""

    dims: tuple[str, ...]
    dtype: str
    fill_value: float | int | str
    description: str

    @property
    def is_sharded(self) -> bool:
        """Image-shaped: shards of many images with an inner chunk of one."""
        return len(self.dims) > 1

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Its dtype in memory."""
        return np.dtype(np.dtypes.StringDType() if self.dtype == "string" else self.dtype)


def _scalar(dtype: str, fill_value: float | int | str, description: str) -> Variable:
    return Variable((IMAGE,), dtype, fill_value, description)


_CLASS = "int32"  # of class indices
_CLASS_OF_VERSION_1 = "int16"

# What the image list says; known before anything is computed.
LISTED = {
    "image_id": _scalar("string", "", "file stem, or relative path where stems collide"),
    "label": _scalar(_CLASS, UNKNOWN_LABEL, "ground-truth class index, -1 unknown"),
}

CLASS_INDICES = ("label", "target", "prediction")

# What an export may leave out.
OMISSIBLE = ("attribution", "pixels")

# What a failed image holds: the same as one that is not built, but for `status`.
_COMPUTED = {
    "scale": _scalar("float32", 1.0, "power of two that multiplies the stored map"),
    "target": _scalar(_CLASS, -1, "class index that was attributed"),
    "prediction": _scalar(_CLASS, -1, "class index that the model predicts on the unmasked image"),
    "output": _scalar("float32", np.nan, "f(x), the target's output on the image"),
    "baseline_output": _scalar("float32", np.nan, "f(b), the target's output on the baseline"),
    "completeness_error": _scalar("float32", np.nan, "|sum - (f(x)-f(b))| / |f(x)-f(b)| before float16 rounding"),
    "n_steps": _scalar("int16", 0, "gradient evaluations behind the stored map"),
    # last: a shard's statuses are written after everything else that they speak of
    "status": _scalar("uint8", NOT_BUILT, f"{NOT_BUILT} not built, 1 built, {FAILED} failed"),
}


def variables(spec: BuildSpec, omitted: Iterable[str] = ()) -> dict[str, Variable]:
    """The variables of a store made with `spec`, by name, in the order in which a shard's pieces are written.

    Those that are `omitted` are left out, as thin copies of stores do.
    """
    map_dims = (IMAGE, CHANNEL, Y, X) if spec.reduce == "none" else (IMAGE, Y, X)
    method = "attribution" if spec.method == IMPORTED and spec.format_version > 1 else "Integrated Gradients"
    image_shaped = {"attribution": Variable(map_dims, "float16", 0.0, f"{method} divided by scale")}
    if spec.pixels:
        dims = (IMAGE, CHANNEL, Y, X)
        image_shaped["pixels"] = Variable(
            dims, "uint8", 0, "the model's resized and cropped input, before normalisation"
        )
    every = image_shaped | LISTED | _COMPUTED
    if spec.format_version == 1:
        every |= {name: replace(every[name], dtype=_CLASS_OF_VERSION_1) for name in CLASS_INDICES}
    return {name: variable for name, variable in every.items() if name not in omitted}


def check_classes(spec: BuildSpec, largest: int) -> None:
    """Raise `UserError` unless class indices up to `largest` can be written into a store made with `spec`."""
    most = int(np.iinfo(variables(spec)["label"].dtype).max)
    if largest > most:
        raise UserError(
            f"the store is of format version {spec.format_version}, whose class indices end at {most}, and there is a "
            f"class {largest}: give {option('overwrite')} to begin it anew, or another {option('store')}"
        )


def listed(spec: BuildSpec, image_ids: Iterable[str], labels: NDArray[np.integer[Any]]) -> dict[str, NDArray[Any]]:
    """Those variables of a store made with `spec` that say which images it lists, (image,)."""
    ids = np.array(list(image_ids), np.dtypes.StringDType())
    return {"image_id": ids, "label": labels.astype(variables(spec)["label"].dtype)}


def unbuilt(spec: BuildSpec, count: int, omitted: Iterable[str] = ()) -> dict[str, NDArray[Any]]:
    """The variables of `count` images that hold nothing yet, which is what a failed image keeps; none that are listed.

    Those that are `omitted` are left out.
    """
    lengths = sizes(spec)
    return {
        name: np.full((count, *(lengths[dim] for dim in variable.dims[1:])), variable.fill_value, variable.dtype)
        for name, variable in variables(spec, omitted).items()
        if name not in LISTED
    }


def zero_maps(arrays: Mapping[str, NDArray[Any]]) -> int:
    """How many built images have a map that is 0 everywhere, of the variables of some images."""
    maps = arrays["attribution"].reshape(len(arrays["status"]), -1)
    return int(np.count_nonzero((arrays["status"] == BUILT) & ~maps.any(axis=1)))


def rank_variables(n_blocks: int) -> dict[str, Variable]:
    """The variables of a ranking of `n_blocks` blocks an image."""
    dims = (IMAGE, BLOCK_Y, BLOCK_X)
    return {
        "rank": Variable(dims, rank_dtype(n_blocks).name, 0, "0 = highest score, a permutation"),
        "share": Variable(dims, "float32", 0.0, "share of the total score held by the blocks ranked before this one"),
    }


def sizes(spec: BuildSpec) -> dict[str, int]:
    """Length of every dimension of an image in pixels, by name."""
    height, width = spec.preprocessing.crop
    return {CHANNEL: 3, Y: height, X: width}


def image_bytes(spec: BuildSpec) -> int:
    """Bytes on disk that a build writes for one image, ids, labels and metadata apart."""
    return sum(array.nbytes for array in unbuilt(spec, 1).values())


def shard_count(n_images: int, shard_size: int) -> int:
    """Shards that hold `n_images`; the last may be short."""
    return -(-n_images // shard_size)


def shard_bounds(shard: int, n_images: int, shard_size: int) -> tuple[int, int]:
    """First image of a shard, and the one after its last."""
    return shard * shard_size, min((shard + 1) * shard_size, n_images)


def shard_file(array: str, shard: int, n_dims: int) -> str:
    """The file that holds a shard of an array, relative to the store's root, in Zarr's default chunk-key encoding."""
    return "/".join([array, "c", str(shard), *["0"] * (n_dims - 1)])


def record_file(shard: int, ranking: str | None = None) -> str:
    """The record of a shard of the build, or of one of a ranking's shards, relative to the store's root."""
    return f"records/{ranking}/{shard:05d}.json" if ranking else f"records/{shard:05d}.json"


def parse_record_file(file: str) -> tuple[str | None, int]:
    """The ranking, None for the build, and the shard that `record_file` named a file for."""
    *_, ranking, name = file.split("/")
    return None if ranking == "records" else ranking, int(name.removesuffix(".json"))


def parse_shard_file(file: str) -> tuple[str, int]:
    """The array and the shard that `shard_file` named a file for."""
    array, _, chunk = file.rpartition("/c/")
    return array, int(chunk.partition("/")[0])


def record_mistake(record: object, shard: int, files: Iterable[str]) -> str:
    """What makes a JSON value no record of a shard that consists of `files`; "" where nothing does."""
    if not isinstance(record, dict):
        return f"it is a {type(record).__name__}"
    if type(record.get("shard")) is not int or record["shard"] != shard:
        return f"shard is {record.get('shard')!r:.40}, not {shard}"
    for field, is_right in _RECORD_FIELDS.items():
        if field in record and not is_right(record[field]):
            return f"{field} is {record[field]!r:.40}"
    if "images" not in record or set(record.get("files", ())) != set(files):
        return "it does not say which images and files it is of"
    return ""


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


# What readers rely on, where it is there.
_RECORD_FIELDS: dict[str, Callable[[Any], bool]] = {
    "images": lambda bounds: isinstance(bounds, list) and len(bounds) == 2 and all(map(_is_count, bounds)),
    "files": lambda files: isinstance(files, dict) and all(map(_is_checksum, files.values())),
    "failed": lambda failed: isinstance(failed, dict) and all(isinstance(reason, str) for reason in failed.values()),
    "in_top5": _is_count,
    "zero_maps": _is_count,
    "evaluations": _is_count,
    "seconds": lambda seconds: type(seconds) in (int, float) and 0 <= seconds < 2**63,
    "device": lambda device: isinstance(device, str),
    "attribution_sha256": lambda sha256: isinstance(sha256, str),
}


def _is_checksum(value: object) -> bool:
    return (
        isinstance(value, dict)
        and _is_count(value.get("bytes"))
        and all(isinstance(value.get(name), str) for name in ("crc32c", "sha256"))
    )


def ranking_attributes(spec: BuildSpec, score: str, block: int) -> dict[str, Any]:
    """What a reader of the ranking alone has to know, to recompute it and to lay its blocks over the pixels."""
    crop = list(spec.preprocessing.crop)
    return {"format_version": spec.format_version, "score": score, "block": block, "crop": crop}
