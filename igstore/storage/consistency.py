"""What the values of a finished shard must be, whatever their checksums say: pure functions of arrays.

Each yields (variable, problem) for what is wrong; the variable is "" where the problem is in the shard's record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igstore.masks import block_ranks, block_shares, block_sums
from igstore.schema import BUILT, FAILED, UNKNOWN_LABEL, BuildSpec
from igstore.storage import layout

Values = Mapping[str, NDArray[Any]]
Problems = Iterator[tuple[str, str]]

_BATCH = 32  # images in memory at a time

_FLOAT16_ERROR = 2.0**-11  # relative, of rounding
_FLOAT16_STEP = 2.0**-24  # between its smallest values
_FLOAT32_ERROR = 2.0**-24


def check_images(spec: BuildSpec, values: Values, record: Mapping[str, Any], *, n_classes: int) -> Problems:
    """What is wrong with the values of a shard of a store.

    Parameters
    ----------
    spec
        What the store was made with.
    values
        Every variable of the shard, (image, ...), but those that a thin copy leaves out.
    record
        The shard's.
    n_classes
        Class indices are below it.
    """
    ids = values["image_id"].tolist()
    label, status = values["label"], values["status"]
    built, failed = status == BUILT, status == FAILED
    labelled = built & (label != UNKNOWN_LABEL)
    rules: list[tuple[str, NDArray[np.bool_], str]] = [
        ("status", ~built & ~failed, "says neither built nor failed"),
        ("label", (label < UNKNOWN_LABEL) | (label >= n_classes), "is no class"),
    ]
    for name in ("target", "prediction"):
        rules.append((name, built & ((values[name] < 0) | (values[name] >= n_classes)), "is no class"))
    chosen = "label" if spec.target == "label" else "prediction"
    rules.append(("target", built & (values["target"] != values[chosen]), f"is not the {chosen}"))
    for name in ("output", "baseline_output"):
        is_wrong = ~np.isfinite(values[name])
        if spec.output == "probability":
            is_wrong |= (values[name] < 0) | (values[name] > 1)
        rules.append((name, built & is_wrong, f"is no {spec.output}"))
    rules.append(("completeness_error", built & ~(values["completeness_error"] >= 0), "is negative or no number"))
    steps = spec.n_steps * 2 ** np.arange(16)
    allowed = steps[steps <= (spec.max_steps or spec.n_steps)]
    rules.append(("n_steps", built & ~np.isin(values["n_steps"], allowed), "is no number of steps of this build"))
    mantissa, _ = np.frexp(values["scale"])
    rules.append(("scale", built & ((mantissa != 0.5) | (values["scale"] == np.inf)), "is no power of two"))
    if "attribution" in values:
        rules += _map_rules(spec, values, built)
    for name, fill in layout.unbuilt(spec, 1).items():
        if name in values and name not in ("status", "pixels"):
            kept = failed.copy()
            differs = ~np.isclose(values[name][failed], fill, rtol=0, atol=0, equal_nan=True)
            kept[failed] = differs.any(axis=tuple(range(1, differs.ndim)))
            rules.append((name, kept, "is filled in, although it failed,"))
    for name, wrong, problem in rules:
        if wrong.any():
            yield name, f"{problem} for {_images(ids, wrong)}"

    if {ids[place] for place in np.flatnonzero(failed)} != set(record.get("failed", {})):
        yield "", "names other failed images than their statuses do"
    if record.get("evaluations") != values["n_steps"].sum():
        yield "", f"says {record.get('evaluations')} evaluations; the images' steps are {values['n_steps'].sum()}"
    if "zero_maps" in record and "attribution" in values and record["zero_maps"] != layout.zero_maps(values):
        yield "", f"says that {record['zero_maps']} maps are 0 everywhere; {layout.zero_maps(values)} are"
    first = int((values["prediction"] == label)[labelled].sum())
    if "in_top5" in record and not first <= record["in_top5"] <= labelled.sum():
        yield "", f"says {record.get('in_top5')} in the top 5; it must be between {first} and {labelled.sum()}"


def _map_rules(spec: BuildSpec, values: Values, built: NDArray[np.bool_]) -> list[tuple[str, NDArray[np.bool_], str]]:
    """Whether maps, scales, outputs and completeness errors fit each other."""
    maps, scale = values["attribution"], values["scale"].astype(np.float64)
    n_pixels = maps[0].size
    flat = maps.reshape(len(maps), -1, maps.shape[-1])  # a map with channels as one tall one
    whole = max(flat.shape[1:])  # a block that covers all of it
    total, size = np.zeros(len(maps)), np.zeros(len(maps))  # of the values, and of their absolutes
    largest, is_negative = np.zeros(len(maps), np.float16), np.zeros(len(maps), bool)
    for start in range(0, len(maps), _BATCH):
        batch = slice(start, start + _BATCH)
        total[batch] = block_sums(flat[batch], whole, "signed")[:, 0, 0]
        size[batch] = block_sums(flat[batch], whole, "absolute")[:, 0, 0]
        largest[batch] = (flat[batch].view(np.uint16) & 0x7FFF).max(axis=(1, 2)).view(np.float16)
        is_negative[batch] = total[batch] < size[batch]
    # rounding to float16 may bring 1.9999 to 2
    fits = np.where(largest > 0, (largest >= 1) & (largest <= 2), scale == 1)
    rules = [
        ("attribution", built & ~np.isfinite(total), "is not finite"),
        ("attribution", built & ~fits, "has no largest value in [1, 2]"),
    ]
    if spec.reduce in ("positive", "absolute"):
        return [*rules, ("attribution", built & is_negative, "has negative values")]
    output, baseline = (values[name].astype(np.float64) for name in ("output", "baseline_output"))
    error = values["completeness_error"].astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        difference, rounding = output - baseline, _FLOAT32_ERROR * (np.abs(output) + np.abs(baseline))
        tolerance = 2 * (scale * (_FLOAT16_ERROR * size + _FLOAT16_STEP * n_pixels) + (1 + error) * rounding)
        gap = np.abs(np.abs(scale * total - difference) - error * np.abs(difference))
        contradicts = built & np.isfinite(error) & ~(gap <= tolerance)
    return [*rules, ("completeness_error", contradicts, "is not what map and outputs give")]


def check_ranks(
    maps: NDArray[np.float16] | None, values: Values, ids: list[str], *, score: str, block: int
) -> Problems:
    """What is wrong with the values of a shard of a ranking.

    Parameters
    ----------
    maps
        What was ranked, (image, ...); None where that is damaged, so that only ranks and shares are looked at.
    values
        ``rank`` and ``share``, (image, block_y, block_x).
    ids
        One an image.
    score, block
        How the blocks were scored.
    """
    names = (
        "is no permutation of the blocks",
        "decreases with rank, or is not between 0 and 1",
        *2 * ("is not what the map gives",),
    )
    wrong = np.zeros((4, len(ids)), bool)
    for start in range(0, len(ids), _BATCH):
        batch = slice(start, start + _BATCH)
        rank, share = values["rank"][batch], values["share"][batch]
        flat = rank.reshape(len(rank), -1)
        order = np.argsort(flat, axis=1)
        wrong[0, batch] = (np.take_along_axis(flat, order, axis=1) != np.arange(flat.shape[1])).any(axis=1)
        ranked = np.take_along_axis(share.reshape(flat.shape), order, axis=1)
        wrong[1, batch] = ~((np.diff(ranked) >= 0).all(axis=1) & (ranked[:, 0] >= 0) & (ranked[:, -1] <= 1))
        if maps is not None:
            scores = block_sums(maps[batch], block, score)
            ranks = block_ranks(scores)
            wrong[2, batch] = (rank != ranks).any(axis=(1, 2))
            wrong[3, batch] = (share != block_shares(scores, ranks)).any(axis=(1, 2))
    for name, problem, flags in zip(("rank", "share", "rank", "share"), names, wrong, strict=True):
        if flags.any():
            yield name, f"{problem} for {_images(ids, flags)}"


def _images(ids: list[str], wrong: NDArray[np.bool_]) -> str:
    """The images that are flagged, in words."""
    count = int(wrong.sum())
    return f"image {ids[int(wrong.argmax())]}" + (f" and {count - 1} more" if count > 1 else "")
