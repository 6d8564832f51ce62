"""`igstore evaluate`: show masked images to models, and make the article's tables. Each image is read once for all.

torch is imported when the work begins, so that wrong options and ``--help`` do not wait for it.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xarray as xr

from igstore import cli
from igstore.cli import add_options
from igstore.datasets import MaskedImages
from igstore.errors import UserError, option
from igstore.evaluation import (
    Row,
    article_tables,
    check_out,
    measure,
    overview,
    predictions,
    settings_sha256,
    write_report,
)
from igstore.masks import MaskOptions, warn_of_fractions
from igstore.schema import (
    FAILED,
    NOT_BUILT,
    Fill,
    ForwardPrecision,
    Keep,
    Order,
    Score,
    Select,
    as_path,
    check_choice,
    several,
)
from igstore.storage import StoreReader

if TYPE_CHECKING:
    import torch

    from igstore.models import Classifier

    Model = str | Classifier | torch.nn.Module

Store = str | os.PathLike[str] | StoreReader

_MOST_LINES = 40  # of a screen


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found. Printed, or shown by a notebook, it is a table of the top-1 accuracies.

    Attributes
    ----------
    rows
        One `Row` for each store, model and mask: accuracies with intervals, the share of visible pixels, the
        provenance. ``pandas.DataFrame(rows)`` is a table of them.
    predictions
        The predicted class of every image; see `igstore.evaluation.predictions`.
    """

    rows: list[Row]
    predictions: xr.Dataset

    def __repr__(self) -> str:
        return "\n\n".join(table.text() for table in overview(self.rows, _MOST_LINES))

    def _repr_markdown_(self) -> str:
        return "\n\n".join(table.markdown() for table in overview(self.rows, _MOST_LINES))


def evaluate(
    stores: Store | Sequence[Store],
    *,
    models: Model | Sequence[Model] | None = None,
    weights: str | Sequence[str | None] | None = None,
    p: float | Sequence[float] = (90, 70, 50, 30),
    keep: Keep | Sequence[Keep] = ("top", "bottom"),
    select: Select | Sequence[Select] = MaskOptions.select,
    score: Score | Sequence[Score] = MaskOptions.score,
    block: int | Sequence[int] = MaskOptions.block,
    fill: Fill | Sequence[Fill] = MaskOptions.fill,
    order: Order | Sequence[Order] = ("attribution", "random"),
    seed: int = MaskOptions.seed,
    images: Any = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    device: str = "auto",
    precision: ForwardPrecision = "float32",
    batch_size: int | None = None,
    limit: int | None = None,
    show_progress: bool = False,
) -> Evaluation:
    """Measure how well models classify a store's masked images. Each image is read once for all masks and models.

    Parameters
    ----------
    stores
        Ranked stores, as paths or readers.
    models
        Who is shown the images: names as `load_classifier` takes them, or each a `Classifier`, or a network, which then
        gets each store's preprocessing. None is each store's own model, by the name and weights that it records; where
        that is code, `package.module:function`, it must be named here. A store's own model that is named gets the
        preprocessing that the store was made with.
    weights
        As `load_classifier` takes them (None is a model's default), for the models given by name, or for the stores'
        own: one for each, or one for all.
    p
        0 to 100: a percentage of the image's attribution, or of its blocks; see `select`. Of this and the
        options down to `order`, several values make the cross product.
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
        Where the pixels are, for stores without: the path of the images or of a store that has their pixels, an
        `ImageList`, or a `StoreReader`.
    out
        Folder to write the results to, see `igstore.evaluation.write_report`.
    overwrite
        Replace the results of an earlier evaluation that are there.
    device
        ``auto`` (a CUDA device where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
    precision
        ``float32``; ``tf32``, on GPUs; or ``float16``, which is fastest on GPUs. A few predictions may differ.
    batch_size
        Images that a network is shown at once; None is 32 on a CPU, 128 on a GPU.
    limit
        Only the first so many built images of each store.
    show_progress
        A progress bar on stderr.

    Raises
    ------
    UserError
        A value is not allowed, a ranking or the pixels are missing, no image is labelled, two stores give one image
        different labels, or two rows would be of one store, model and mask.
    StoreExistsError
        Something is at `out`.
    SettingsMismatchError
        The weights found for a store's own model are not those that made the store.
    ModelError
        A network does not classify such images.

    >>> found = evaluate("toy.zarr", p=[90, 50], keep="top", order="attribution")
    >>> [(row.p, row.n) for row in found.rows]
    [(90.0, 4), (50.0, 4)]
    """
    from igstore.attribution import check_precision
    from igstore.evaluation import ShowingPlan, show
    from igstore.machine import find_device

    out = None if out is None else as_path("out", out)
    given = several("stores", stores, str | os.PathLike | StoreReader, "a path, a URL or a StoreReader")
    readers = [StoreReader.of(store) for store in dict.fromkeys(given)]
    cells = _cells(seed, p=p, keep=keep, select=select, score=score, block=block, fill=fill, order=order)
    warn_of_fractions(*cells)
    on = find_device(device)
    if out is not None:
        check_out(out, overwrite=overwrite)
    check_choice("precision", precision, ForwardPrecision)
    check_precision(precision, on)
    _check_labels(readers)
    for reader in readers:  # before weights are fetched from far
        source = MaskedImages(reader, images)
        source.check(*cells)
        source.check_pixels()
    shown_to = _classifiers(readers, models, weights)
    _check_different(readers, shown_to)
    plans = [
        ShowingPlan(store, some, cells, images=images, limit=limit, batch_size=batch_size, device=on)
        for store, some in zip(readers, shown_to, strict=True)
    ]
    shown = show(plans, precision=precision, show_progress=show_progress)
    evaluation = Evaluation([row for one in shown for row in measure(one, cells)], predictions(shown, cells))
    if out is not None:
        write_report(out, evaluation.rows, evaluation.predictions, overwrite=overwrite)
    return evaluation


def _several(values: Any) -> tuple[Any, ...]:
    """One value or a sequence of them as a tuple without repetitions."""
    one = isinstance(values, str) or not isinstance(values, Iterable)
    return tuple(dict.fromkeys([values] if one else values))


def _cells(seed: int, **options: Any) -> list[MaskOptions]:
    each = {name: _several(values) for name, values in options.items()}
    for name, values in each.items():
        if not values:
            raise UserError(f"{option(name)} is empty; give at least one value")
    # in the order of the tables: p changes first, the order of the blocks last
    names = ["order", "fill", "block", "score", "select", "keep", "p"]
    product = itertools.product(*(each[name] for name in names))
    return [MaskOptions(**dict(zip(names, values, strict=True)), seed=seed) for values in product]


def _check_labels(stores: Sequence[StoreReader]) -> None:
    labels: dict[str, int] = {}
    for store in stores:
        for image_id, label in zip(store.image_ids, store.scalars("label").tolist(), strict=True):
            if labels.setdefault(image_id, label) != label:
                raise UserError(
                    f"image {image_id} has label {label} in {store.where} and {labels[image_id]} in another store: "
                    "they are of different data sets; evaluate them one by one"
                )


def _check_different(stores: Sequence[StoreReader], shown_to: Sequence[Sequence[Classifier]]) -> None:
    """Raise `UserError` where rows would be of one store's settings and one model."""
    seen: dict[tuple[str, str, str], int] = {}
    for number, (store, classifiers) in enumerate(zip(stores, shown_to, strict=True)):
        for one in classifiers:
            other = seen.setdefault((settings_sha256(store.spec), one.name, one.weights_sha256), number)
            if other != number:
                raise UserError(
                    f"{stores[other].where} and {store.where} hold the same maps, of the same settings, so {one.name} "
                    "would have two rows of each mask; give one of them"
                )
        names = Counter((one.name, one.weights_sha256) for one in classifiers)
        (name, sha256), count = names.most_common(1)[0]
        if count > 1:
            raise UserError(
                f"{count} models are called {name} and have the same weights (sha256 {sha256[:12]}), so nothing would "
                "tell their rows apart; give one, or other names (in Python, classifier_from_module(..., name=...))"
            )


# --- Which models


def _classifiers(
    stores: Sequence[StoreReader], models: Model | Sequence[Model] | None, weights: str | Sequence[str | None] | None
) -> list[list[Classifier]]:
    """For each store, the classifiers that its images are shown to."""
    from torch.nn import Module

    from igstore.models import Classifier, as_shown, fitted, load_classifier, recorded_classifier

    if models is None:
        pairs = zip(stores, _one_each(weights, len(stores)), strict=True)
        return [[recorded_classifier(one.spec, one.where, parameter="models", weights=own)] for one, own in pairs]
    given = several("models", models, str | Classifier | Module, "a name, a Classifier or a network")
    if not given:
        raise UserError(f"{option('models')} is empty; give at least one, or leave it out for the store's own model")
    names = [model for model in given if isinstance(model, str)]
    loaded = [load_classifier(*pair) for pair in zip(names, _one_each(weights, len(names)), strict=True)]

    def shown_to(store: StoreReader) -> list[Classifier]:
        named = iter(loaded)
        return [
            fitted(next(named), store.spec) if isinstance(model, str) else as_shown(model, store.spec)
            for model in given
        ]

    return list(map(shown_to, stores))


def _one_each(weights: str | Sequence[str | None] | None, n_models: int) -> Sequence[str | None]:
    if weights is None or isinstance(weights, str):
        return [weights] * n_models
    if not isinstance(weights, list | tuple):
        raise UserError(f"{option('weights')} is {weights!r:.80}; it must be weights, or several in a list")
    if len(weights) == 1:
        return list(weights) * n_models
    if len(weights) != n_models:
        raise UserError(
            f"there are {len(weights)} weights for {n_models} models by name; give one for each, or one for all"
        )
    return weights


# --- The command


def parser() -> cli.Parser:
    """The options of the command."""
    parser = cli.Parser(
        "evaluate",
        "Measure models on a store's masked images and print the article's tables. Options that take several values "
        "make the cross product; each image is read once for all of it.",
    )
    parser.add_argument("stores", metavar="STORE", nargs="+", help="ranked stores, as igstore build makes them")
    who = parser.add_argument_group("who is shown the images")
    who.add_argument("--models", nargs="+", metavar="NAME", help="these models (default: each store's own)")
    who.add_argument(
        "--weights", nargs="+", metavar="W", help="as igstore build takes them: one for each model, or one for all"
    )
    what = parser.add_argument_group("masks")
    add_options(what, "p", "keep", "select", "score", "block", "fill", "order", nargs="+")
    add_options(what, "seed", "limit", "images")
    parser.add_argument(
        "--out", metavar="DIR", help="folder for results.json, results.csv, tables.md and predictions.zarr"
    )
    add_options(parser, "overwrite", help="replace the results of an earlier evaluation there")
    add_options(parser, "device", "batch_size")
    parser.add_argument(
        "--precision",
        choices=cli.choices_of(ForwardPrecision),
        help="arithmetic of the networks; tf32 and float16 are faster on GPUs, and a few predictions may differ",
    )
    return parser.of(evaluate)


def main(argv: Sequence[str]) -> int:
    """``igstore evaluate STORE [STORE ...]``."""
    parsed, output = parser().parse(argv)
    options = vars(parsed)
    stores = [StoreReader(path) for path in options.pop("stores")]
    for store in stores:
        n_failed, n_missing = (int((store.status == status).sum()) for status in (FAILED, NOT_BUILT))
        if n_failed or n_missing:
            output.note(
                f"note: {store.where} has {n_failed} images that failed and {n_missing} not built; they are left out"
            )
        if store.zero_maps:
            output.note(
                f"note: {store.zero_maps} images of {store.where} have an attribution of 0 everywhere, and so an empty "
                "top set"
            )
    rows = evaluate(stores, **options, show_progress=output.show_progress).rows
    lines = [line for table in article_tables(rows) for line in (table.text(), "")]
    output.result({"rows": rows, "out": options["out"]}, lines)
    if options["out"]:
        output.note(f"results in {options['out']}")
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
