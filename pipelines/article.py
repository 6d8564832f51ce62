"""The article's study: four models on masked ImageNet, their accuracies beside the published ones.

The article: Sean Saito, "What happens when we mask out the 'unimportant' parts of an image?", 2019,
https://seansaito.github.io/2019/12/03/masked-accuracy

The study is done twice: by the article's formula, which is igstore's default (`plain`), and with the settings that the
article's code has (`article`). Each time every model is shown its own masked images, and all are shown DenseNet-121's.
If it is interrupted, run the same command again: stores resume, and complete evaluations are kept.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np

from igstore import cli, files
from igstore.build import build_store
from igstore.errors import UserError
from igstore.evaluate import evaluate
from igstore.evaluation import Row, Table, article_tables, images_of, kinds, percent, read_rows, settings_sha256
from igstore.images import ImageList, find_images
from igstore.info import StoreInfo
from igstore.masks import MaskOptions
from igstore.schema import BUILT, UNKNOWN_LABEL, BuildSpec, Keep
from igstore.storage import StoreReader

P = (90.0, 70.0, 50.0, 30.0)
CELLS = [MaskOptions(p=p, keep=keep) for keep, p in product(get_args(Keep), P)]

SHARED_MASKS = "densenet121"  # whose masks the article showed to all
ARTICLE_WEIGHTS = "IMAGENET1K_V1"

# What `build_store` is given besides a model and images
SETTINGS: dict[str, dict[str, str]] = {
    "plain": {},
    "article": {"baseline": "noise", "output": "probability", "method": "riemann_left", "reduce": "positive"},
}
TITLES = {"plain": "The article's formula", "article": "The settings of the article's code"}

CITATION = (
    'The article: Sean Saito, What happens when we mask out the "unimportant" parts of an image?, 2019, '
    "https://seansaito.github.io/2019/12/03/masked-accuracy"
)

# model: top-1 in percent unmasked, and at each p of P
ARTICLE: dict[Keep, dict[str, tuple[float, ...]]] = {
    "top": {
        "vgg16": (71.59, 31.79, 8.38, 0.91, 0.17),
        "inception_v3": (77.45, 50.13, 18.89, 1.71, 0.17),
        "resnet50": (76.15, 46.97, 16.66, 1.73, 0.19),
        "densenet121": (74.65, 59.21, 25.82, 2.98, 0.26),
    },
    "bottom": {
        "vgg16": (71.59, 0.16, 2.53, 16.06, 30.30),
        "inception_v3": (77.45, 0.15, 3.47, 23.31, 43.97),
        "resnet50": (76.15, 0.14, 3.35, 22.50, 41.83),
        "densenet121": (74.65, 0.26, 5.68, 31.55, 52.79),
    },
}


@dataclass(frozen=True)
class Study:
    """What to do the study with.

    Parameters
    ----------
    data
        As `igstore.find_images` takes it.
    out
        Folder for the stores, the evaluations and the tables.
    models
        By name, as `igstore.load_classifier` takes it, the weights that it takes with it.
    settings
        Names in `SETTINGS`.
    n_steps, limit, device
        As `igstore.build_store` takes them; of a store that has more images, the first `limit` are evaluated.
    """

    data: str
    out: Path
    models: dict[str, str | None]
    settings: Sequence[str]
    n_steps: int
    limit: int | None
    device: str


@dataclass(frozen=True)
class Found:
    """What a study finds with one of `SETTINGS`.

    Attributes
    ----------
    own, shared
        The rows of each model under its own masks, and, where there are several models, of all under the shared masks.
    stores
        Of each model.
    """

    own: list[Row]
    shared: list[Row]
    stores: list[StoreInfo]


def run(study: Study) -> dict[str, Found]:
    """Build, rank and evaluate what is not done yet; the results by the name of their settings."""
    images = find_images(study.data)
    return {settings: _run(study, images, settings) for settings in study.settings}


def _run(study: Study, images: ImageList, settings: str) -> Found:
    stores = {model: _build(study, images, model, settings) for model in study.models}
    sha256s = {model: str(info.settings["weights_sha256"]) for model, info in stores.items()}
    shared = SHARED_MASKS if SHARED_MASKS in stores else list(stores)[-1]
    rows = {
        model: _evaluate(study, Path(info.path), sha256s if model == shared else {model: sha256s[model]})
        for model, info in stores.items()
    }
    own = [row for model, of_model in rows.items() for row in of_model if row.model == model]
    return Found(own, rows[shared] if len(stores) > 1 else [], list(stores.values()))


def _build(study: Study, images: ImageList, model: str, settings: str) -> StoreInfo:
    name = model.replace(":", "-").replace("/", "-")
    return build_store(
        model,
        images,
        study.out / "stores" / f"{name}-{settings}.zarr",
        weights=study.models[model],
        n_steps=study.n_steps,
        limit=study.limit,
        device=study.device,
        show_progress=True,
        **SETTINGS[settings],  # type: ignore[arg-type]
    )


def _evaluate(study: Study, path: Path, sha256s: dict[str, str]) -> list[Row]:
    """Show a store's images to models, given with the sha256 of their weights; or read what an earlier run found."""
    store = StoreReader(path)
    out = study.out / "evaluations" / path.stem
    labels = store.scalars("label")[np.flatnonzero(store.status == BUILT)[: study.limit]]
    settings, n = settings_sha256(store.spec), int((labels != UNKNOWN_LABEL).sum())
    rows = read_rows(out)
    found = {(row.store_settings_sha256, row.n, row.model, row.weights_sha256, row.cell) for row in rows}
    if found == {(settings, n, model, sha256, cell) for (model, sha256), cell in product(sha256s.items(), CELLS)}:
        return rows
    return evaluate(
        store,
        models=list(sha256s),
        weights=[study.models[model] for model in sha256s],
        p=P,
        order="attribution",
        out=out,
        overwrite=True,
        device=study.device,
        limit=study.limit,
        show_progress=True,
    ).rows


def beside_the_article(rows: Sequence[Row]) -> list[Table]:
    """The article's Tables 1 and 2 with ours above theirs, for the models and weights that it used; none for others."""
    tables = []
    for number, (keep, published) in enumerate(ARTICLE.items(), start=1):
        known = [row for row in rows if row.keep == keep and row.model in published and row.weights == ARTICLE_WEIGHTS]
        if known:
            title = f"Table {number} beside the article's: top-1 accuracy (%), keep {keep}, {images_of(known)}"
            models = dict.fromkeys(row.model for row in known)
            groups = tuple(_compared([row for row in known if row.model == one], published[one]) for one in models)
            header = ("model", "unmasked", *(f"p={p:g}" for p in P))
            masks = next(sentence for sentence, of_masks in kinds(rows).items() if known[0] in of_masks)
            tables.append(Table(title, f"{masks} {CITATION}.", header, groups))
    return tables


def _compared(rows: Sequence[Row], theirs: Sequence[float]) -> tuple[tuple[str, ...], ...]:
    at = {row.p: row.top1 for row in rows}
    ours = [rows[0].original_top1, *(at[p] for p in P)]
    return (
        (rows[0].model, *(percent(value, rows[0].n) for value in ours)),
        ("article", *(f"{value:.2f}" for value in theirs)),
        ("difference", *(f"{mine - their:+.2f}" for mine, their in zip(ours, theirs, strict=True))),
    )


def _tables(rows: Sequence[Row]) -> list[Table]:
    return [*article_tables(rows), *beside_the_article(rows)]


def main(argv: Sequence[str]) -> int:
    """``python -m pipelines.article --data PATH --out DIR``."""
    parser = cli.BareParser(prog="python -m pipelines.article", description=__doc__)
    parser.add_argument("--data", default=os.environ.get("IMAGENET_DIR"), help="the images; default: $IMAGENET_DIR")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that the study makes")
    parser.add_argument("--models", nargs="+", default=list(ARTICLE["top"]), help="default: the article's four")
    parser.add_argument("--weights", nargs="+", help="one for each model, or one for all; default: their own")
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=list(SETTINGS),
        default=list(SETTINGS),
        help="default: both, one after the other",
    )
    parser.add_argument("--n-steps", type=cli.positive, default=BuildSpec.n_steps, help="gradient evaluations an image")
    parser.add_argument("--limit", type=cli.positive, help="only the first so many images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options = parser.parse_args(argv)
    weights = options.weights or [None]
    if len(weights) not in (1, len(options.models)):
        raise UserError(
            f"there are {len(weights)} weights for {len(options.models)} models; give one each, or one for all"
        )
    if options.data is None:
        raise UserError("no images: give --data PATH, or set IMAGENET_DIR")
    models = dict(zip(options.models, weights * (len(options.models) // len(weights)), strict=True))
    study = Study(options.data, options.out, models, options.settings, options.n_steps, options.limit, options.device)
    results = run(study)
    sections = []
    for settings, found in results.items():
        tables = [table for rows in (found.own, found.shared) for table in _tables(rows)]
        cli.say("", TITLES[settings], *(line for table in tables for line in ("", table.text())))
        sections += [f"## {TITLES[settings]}", *(table.markdown() for table in tables)]
    files.write_atomically(options.out / "tables.md", "\n\n".join([*sections, ""]).encode())
    cli.say("", f"tables in {options.out / 'tables.md'}")
    return cli.SOME_IMAGES_FAILED if any(one.failed for found in results.values() for one in found.stores) else cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
