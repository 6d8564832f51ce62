"""`igstore curves`: deletion and insertion, how fast an answer goes and comes with the blocks that matter most.

torch is imported when the work begins, so that wrong options and ``--help`` do not wait for it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from igstore import cli, files
from igstore.cli import add_options, csv_text
from igstore.datasets import MaskedImages
from igstore.errors import StoreExistsError, UserError, option
from igstore.masks import MaskOptions, block_grid
from igstore.reporting import LOOKS, Chart, Panel, Series
from igstore.schema import BUILT, IMAGE, Fill, Keep, Order, Score, whole_number
from igstore.storage import StoreReader

if TYPE_CHECKING:
    import torch

    from igstore.models import Classifier

DELETION, INSERTION = "deletion", "insertion"
CURVE, ORDER, STEP = "curve", "order", "step"  # dims

_AUC, _CURVES, _PICTURE = "auc.csv", "curves.csv", "curves.png"

_KEEP: dict[str, Keep] = {DELETION: "bottom", INSERTION: "top"}
_LABELS: dict[Order, str] = {"attribution": "the highest rank first", "random": "in a random order"}
_LOOKS = {"attribution": "top", "random": "random"}


def insertion_deletion(
    store: str | os.PathLike[str] | StoreReader,
    model: str | Classifier | torch.nn.Module | None = None,
    *,
    weights: str | None = None,
    steps: int = 50,
    deletion_fill: Fill = "mean",
    insertion_fill: Fill = "blur",
    score: Score = MaskOptions.score,
    block: int = MaskOptions.block,
    seed: int = MaskOptions.seed,
    images: Any = None,
    limit: int | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    show_progress: bool = False,
) -> xr.Dataset:
    """The deletion and insertion curves of a store's images, with the areas under them.

    Petsiuk, Das and Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", 2018: deletion fills
    an image's blocks from the highest rank on, insertion starts from the fill and shows them from the highest on, and
    the probability of the target is measured after each step. Ranks that are right make the first area small and the
    second large. As there, what is deleted becomes the model's mean colour and insertion starts from a blurred image,
    unless other fills are given; here a step changes whole blocks, and the control changes them in a random order.

    Parameters
    ----------
    store
        A ranked store's path, or a reader of it.
    model
        Who is shown the images: a name as `load_classifier` takes it, a `Classifier`, or a network, which then gets the
        store's preprocessing. None is the store's own model, as for `evaluate`.
    weights
        As `load_classifier` takes them, for a model given by name or the store's own.
    steps
        How many steps change all blocks, 1 to the number of blocks; each curve has one point more.
    deletion_fill, insertion_fill
        What a hidden pixel becomes: names in `igstore.masks.FILLS`.
    score, block
        The ranking that is used.
    seed
        Of the random order and of the noise.
    images
        Where the pixels are, for stores without: the path of the images or of a store that has their pixels, an
        `ImageList`, or a `StoreReader`.
    limit
        Only the first so many built images.
    device
        ``auto`` (a CUDA device where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
    batch_size
        Images at once; None is 32 on a CPU, 128 on a GPU.
    show_progress
        A progress bar on stderr.

    Returns
    -------
    Dataset of ``probability``, float32 (curve, order, image, step), the model's softmax output for the image's target,
    the class that was attributed; and of ``auc``, float64 (curve, order, image), the area under that curve by the
    trapezoid rule, 0 to 1. Coordinates: ``curve`` is deletion or insertion, ``order`` attribution or random, ``image``
    the id, ``target`` (image) the class index, ``changed`` (step) the fraction of the blocks that were deleted or
    inserted. Attributes say which store, model and settings.

    Raises
    ------
    UserError
        A value is not allowed, a ranking or the pixels are missing, or a target is none of the model's classes.
    SettingsMismatchError
        The weights found for the store's own model are not those that made the store.
    ModelError
        The network does not classify such images, or its outputs are not finite.

    >>> curves = insertion_deletion("toy.zarr", steps=4)
    >>> sorted(curves.data_vars), curves.sizes["image"]
    (['auc', 'probability'], 4)
    """
    from igstore.evaluation import target_probabilities
    from igstore.machine import find_device

    reader = StoreReader.of(store)
    n_blocks = math.prod(block_grid(*reader.spec.preprocessing.crop, block))
    steps = whole_number("steps", steps, 1)
    if steps > n_blocks:
        raise UserError(
            f"{option('steps')} is {steps}; it must be between 1 and {n_blocks}, the number of blocks of an image"
        )
    limit = None if limit is None else whole_number("limit", limit, 1)
    changed = [-(-step * n_blocks // steps) for step in range(steps + 1)]  # blocks, rounded up
    every_p = [max(0.0, 100 * (count - 0.5) / n_blocks) for count in changed]  # the middle of what selects so many
    fills = {DELETION: deletion_fill, INSERTION: insertion_fill}
    ranking: dict[str, Any] = {"select": "count", "score": score, "block": block, "seed": seed}
    cells = [
        MaskOptions(p=p, keep=_KEEP[curve], fill=fill, order=order, **ranking)
        for curve, fill in fills.items()
        for order in _LABELS
        for p in every_p
    ]
    on = find_device(device)
    source = MaskedImages(reader, images)  # before weights are fetched from far
    source.check(*cells)
    source.check_pixels()
    classifier = _classifier(reader, model, weights)
    shown = np.flatnonzero(reader.status == BUILT)[:limit]
    found = target_probabilities(
        reader,
        shown,
        classifier,
        cells,
        images=images,
        device=on,
        batch_size=batch_size,
        label="curves",
        show_progress=show_progress,
    )
    by_step = found.reshape(len(fills), len(_LABELS), len(every_p), len(shown))
    probability = by_step.swapaxes(2, 3)  # (curve, order, image, step)
    fraction = np.array(changed) / n_blocks
    return xr.Dataset(
        {
            "probability": ((CURVE, ORDER, IMAGE, STEP), probability),
            "auc": ((CURVE, ORDER, IMAGE), np.trapezoid(probability.astype(np.float64), fraction, axis=-1)),
        },
        {
            CURVE: list(fills),
            ORDER: list(_LABELS),
            IMAGE: np.array([reader.image_ids[image] for image in shown.tolist()], dtype=object),
            "target": (IMAGE, reader.scalars("target")[shown]),
            "changed": (STEP, fraction),
        },
        {
            "store": reader.where.rpartition("/")[2],
            "model": classifier.name,
            "weights": classifier.weights,
            "weights_sha256": classifier.weights_sha256,
            "deletion_fill": deletion_fill,
            "insertion_fill": insertion_fill,
            "score": score,
            "block": block,
            "seed": seed,
        },
    )


def _classifier(
    store: StoreReader, model: str | Classifier | torch.nn.Module | None, weights: str | None
) -> Classifier:
    from torch.nn import Module

    from igstore.models import Classifier, as_shown, fitted, load_classifier, recorded_classifier

    if model is None:
        return recorded_classifier(store.spec, store.where, parameter="model", weights=weights)
    if isinstance(model, str):
        return fitted(load_classifier(model, weights), store.spec)
    if not isinstance(model, Classifier | Module):
        raise UserError(f"model is a {type(model).__name__}; it must be a name, a Classifier or a network")
    if weights is not None:
        raise UserError(f"{option('weights')} goes with a model given by name; a network brings its own")
    return as_shown(model, store.spec)


# --- What is made of them


def mean_auc(curves: xr.Dataset, curve: str, order: str) -> float:
    """The mean area under the curves of all images, 0 to 1; `curves` as `insertion_deletion` returns them."""
    return float(curves.auc.sel({CURVE: curve, ORDER: order}).mean())


def chart_of(curves: xr.Dataset) -> Chart:
    """The means over images, the middle half of the images as a band; a panel for each curve, with the areas."""
    percent = (100 * curves.changed.values).tolist()
    panels = []
    for curve in _KEEP:
        series = []
        for order, label in _LABELS.items():
            values = curves.probability.sel({CURVE: curve, ORDER: order}).values.astype(np.float64)  # (image, step)
            low, high = np.quantile(values, (0.25, 0.75), axis=0).tolist()
            look = dataclasses.replace(LOOKS[_LOOKS[order]], marker="")
            series.append(Series(label=label, look=look, x=percent, y=values.mean(axis=0).tolist(), low=low, high=high))
        areas = ", ".join(f"{mean_auc(curves, curve, order):.3f} {order}" for order in _LABELS)
        panels.append(Panel(f"{curve}: area {areas}", series))
    return Chart(
        name="curves",
        x_label="blocks changed (%)",
        y_label="probability of the target",
        panels=panels,
        y_limits=(0, 1),
        x_limits=(0, 100),
    )


def write_curves(out: Path, curves: xr.Dataset) -> list[str]:
    """Write ``auc.csv``, every image's areas, ``curves.csv``, the means, and ``curves.png`` where matplotlib is there.

    Returns
    -------
    The names of the files that were written into the folder `out`.

    Raises
    ------
    UserError
        They cannot be written.
    """
    chart = chart_of(curves)
    contents = {_AUC: _auc_csv(curves).encode(), _CURVES: chart.csv().encode()}
    if importlib.util.find_spec("matplotlib"):
        contents[_PICTURE] = chart.png()
    try:
        for name, content in contents.items():
            files.write_atomically(out / name, content)
    except OSError as error:
        raise UserError(f"the curves cannot be written to {out}: {error.strerror or error}") from error
    return list(contents)


def _auc_csv(curves: xr.Dataset) -> str:
    columns = {f"{curve} {order}": curves.auc.sel({CURVE: curve, ORDER: order}) for curve in _KEEP for order in _LABELS}
    values = (curves[IMAGE], curves.target, *columns.values())
    lines = zip(*(column.values.tolist() for column in values), strict=True)
    return csv_text([IMAGE, "target", *columns], lines)


# --- The command


def parser() -> cli.Parser:
    """The options of the command."""
    parser = cli.Parser(
        "curves",
        "Insertion and deletion: how the probability of the target goes when blocks are deleted from the highest rank "
        "on, and comes when they are inserted, against a random order.",
    )
    parser.add_argument("store", metavar="STORE", help="a ranked store")
    parser.add_argument("--model", metavar="NAME", help="who is shown the images (default: the store's own model)")
    add_options(parser, "weights")
    parser.add_argument("--steps", type=cli.positive, metavar="N", help="in which all blocks are changed")
    parser.add_argument("--deletion-fill", choices=cli.choices_of(Fill), help="what a deleted pixel becomes")
    parser.add_argument("--insertion-fill", choices=cli.choices_of(Fill), help="what insertion starts from")
    add_options(parser, "score", "block", "seed", "limit", "images")
    parser.add_argument("--out", metavar="DIR", help="folder for auc.csv, curves.csv and curves.png")
    add_options(parser, "overwrite", help="replace the curves that are there")
    add_options(parser, "device", "batch_size")
    return parser.of(insertion_deletion)


def main(argv: Sequence[str]) -> int:
    """``igstore curves STORE``."""
    parsed, output = parser().parse(argv)
    options = vars(parsed)
    out, overwrite = options.pop("out"), options.pop("overwrite")
    if out is not None and Path(out).is_file():
        raise UserError(f"--out is {out}, which is a file; give a folder")
    there = [name for name in (_AUC, _CURVES, _PICTURE) if out is not None and (Path(out) / name).exists()]
    if there and not overwrite:
        raise StoreExistsError(f"{out} holds {there[0]} of other curves: give another --out, or --overwrite")
    curves = insertion_deletion(**options, show_progress=output.show_progress)
    areas = {curve: {order: mean_auc(curves, curve, order) for order in _LABELS} for curve in _KEEP}
    said = {name: curves.attrs[name] for name in ("store", "model")} | {"images": curves.sizes[IMAGE], "auc": areas}
    lines = [
        f"{said['store']}, {said['model']}: {said['images']} images, {options['steps']} steps",
        f"{'mean area under the curve':<28}" + "".join(f"{curve:>10}" for curve in _KEEP),
        *(
            f"{label:<28}" + "".join(f"{areas[curve][order]:>10.4f}" for curve in _KEEP)
            for order, label in _LABELS.items()
        ),
    ]
    output.result(said, lines)
    if out is not None:
        output.note(f"{', '.join(write_curves(Path(out), curves))} in {out}")
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
