"""Small stores with made-up maps, for tests of whatever reads one."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr

from igstore.building import rank_store
from igstore.schema import BUILT, FAILED, BuildSpec, Preprocessing
from igstore.storage import create_store, finish_store, layout, write_shard

CLASS_NAMES = ("ant", "bee", "cat", "dog", "eel")
WNIDS = tuple(f"n{index:08d}" for index in range(len(CLASS_NAMES)))


def checksum(content: bytes) -> dict[str, Any]:
    """What a record holds of a file with this content."""
    crc32c = f"{google_crc32c.value(content):08x}"
    return {"bytes": len(content), "crc32c": crc32c, "sha256": hashlib.sha256(content).hexdigest()}


def text(strings: Sequence[str]) -> np.ndarray:
    """Strings as a store's arrays hold them."""
    return np.array(strings, np.dtypes.StringDType())


def mapped_file(array: np.ndarray) -> str | None:
    """The file whose bytes an array's are, as the system says; None where they are a copy."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, *_, name = line.split(maxsplit=5)
        first, last = (int(bound, 16) for bound in bounds.split("-"))
        if first <= array.ctypes.data < last:
            return name if name.startswith("/") else None
    return None


def image_ids(n: int) -> list[str]:
    return [f"image_{index:04d}" for index in range(n)]


def make_store(
    path: Path,
    n: int = 10,
    *,
    size: tuple[int, int] = (23, 26),
    shard_size: int = 4,
    shards: Container[int] | None = None,
    failed: Container[int] = (),
    labels: Sequence[int] | None = None,
    class_names: Sequence[str] = CLASS_NAMES,
    wnids: Sequence[str] = WNIDS,
    rankings: Sequence[tuple[str, int]] = (("positive", 3),),
    seed: int = 0,
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
    std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    **spec: Any,
) -> Path:
    """Write a store of `n` random images and maps of `size`, the same for the same arguments, and return its path.

    The maps are heavy-tailed; image 1 has no positive attribution, image 2 is black. Every image but the unlabelled
    ones (label -1, by default each sixth) is predicted right, but for each fourth.

    Parameters
    ----------
    shards
        Numbers of the shards that are built; None is all.
    failed
        Numbers of the images that failed.
    labels
        Class indices; by default -1, 0, 1, 2, 3, 4, -1, ...
    rankings
        (score, block) of those that are made of the shards that are built.
    spec
        Other fields of `BuildSpec`, such as ``pixels=False`` or ``reduce="none"``.
    """
    labels = np.array([index % 6 - 1 for index in range(n)] if labels is None else labels, dtype=np.int32)
    settings = {
        "model": "toy",
        "weights": "own",
        "weights_sha256": "0" * 64,
        "preprocessing": Preprocessing(resize=None, crop=size, mean=mean, std=std),
        "images_fingerprint": "f" * 64,
        "shard_size": shard_size,
    }
    build = BuildSpec(**settings | spec)
    attributes = {"complete": False, "class_names": list(class_names), "wnids": list(wnids), "versions": {}}
    create_store(path, build, image_ids=image_ids(n), labels=labels, attributes=attributes)
    all_shards = range(layout.shard_count(n, shard_size))
    for shard in all_shards:
        if shards is None or shard in shards:
            first, last = layout.shard_bounds(shard, n, shard_size)
            images = [(index, int(labels[index]), index in failed) for index in range(first, last)]
            record = {
                "failed": {image_ids(n)[index]: "made to fail" for index, _, has_failed in images if has_failed},
                "in_top5": 0,
                "evaluations": 50 * len(images),
                "batch_size": [1],
                "seconds": 1.0,
                "device": "none",
            }
            listed = layout.listed(build, image_ids(n)[first:last], labels[first:last])
            write_shard(path, build, n, shard, _arrays(build, images, seed) | listed, record)
    if shards is None:
        finish_store(path, {"complete": True})
    for score, block in rankings:
        rank_store(path, score=score, block=block)
    return path


def _arrays(spec: BuildSpec, images: Sequence[tuple[int, int, bool]], seed: int) -> dict[str, np.ndarray]:
    arrays = layout.unbuilt(spec, len(images))
    for place, (index, label, has_failed) in enumerate(images):
        if has_failed:
            arrays["status"][place] = FAILED
            continue
        random = np.random.default_rng((seed, index))
        values = random.standard_t(2, arrays["attribution"].shape[1:])
        values *= 1.5 / np.abs(values).max()
        arrays["attribution"][place] = -np.abs(values) if index == 1 else values
        if spec.pixels and index != 2:
            arrays["pixels"][place] = random.integers(0, 256, arrays["pixels"].shape[1:])
        arrays["scale"][place] = 2.0 ** random.integers(-12, 4)
        arrays["prediction"][place] = label if label >= 0 and index % 4 else 0
        arrays["target"][place] = arrays["prediction"][place]
        for name in ("output", "baseline_output", "completeness_error"):
            arrays[name][place] = random.random()
        arrays["n_steps"][place] = spec.n_steps
        arrays["status"][place] = BUILT
    return arrays


def recompute(
    path: Path,
    image: int,
    p: float,
    keep: str = "bottom",
    *,
    select: str = "mass",
    score: str = "positive",
    block: int = 3,
    pixels: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Masked pixels (channel, y, x), hidden ones black, and mask (y, x) of one image, from zarr and NumPy alone."""
    attribution = zarr.open_array(path / "attribution", mode="r")[image].astype(np.float64)
    attribution = attribution.sum(axis=0) if attribution.ndim == 3 else attribution
    values = {"positive": attribution.clip(0), "absolute": np.abs(attribution), "signed": attribution}[score]
    height, width = values.shape
    sums = np.add.reduceat(np.add.reduceat(values, range(0, height, block), 0), range(0, width, block), 1)
    order = np.argsort(-sums, axis=None, kind="stable")
    ranked = sums.ravel()[order].clip(0)
    before = np.cumsum(ranked) - ranked  # exact: sums of float16 values
    share = np.minimum((before / max(ranked.sum(), 1e-300)).astype(np.float32), np.nextafter(np.float32(1), 0))
    share[ranked == 0] = 1
    top = share < np.float32(p / 100) if select == "mass" else 100 * np.arange(len(order)) < p * len(order)
    blocks = np.zeros(sums.size, bool)
    blocks[order[top]] = True
    visible = np.kron(blocks.reshape(sums.shape) ^ (keep == "bottom"), np.ones((block, block), bool))[:height, :width]
    pixels = zarr.open_array(path / "pixels", mode="r")[image] if pixels is None else pixels
    return np.where(visible, pixels, np.uint8(0)), visible
