"""`igstore evaluate`: show masked images to models, and make the article's tables. Each image is read once for all."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from igstore import cli, provenance
from igstore.acceleration import accelerate
from igstore.attribution import logits, numerics
from igstore.batches import MaskedBatch, MaskedBatches
from igstore.blocks import DEFAULT_BLOCK, SCORES
from igstore.devices import find_device
from igstore.errors import ModelError, SettingsMismatchError, UserError, WeightsNotFoundError
from igstore.masking import MaskOptions
from igstore.masks import FILLS, SELECTIONS
from igstore.models import Classifier, load_classifier
from igstore.progress import Progress
from igstore.reader import StoreReader
from igstore.report import check_out, write_report
from igstore.results import Pairing, Row, Shown, measure, predictions, settings_sha256
from igstore.schema import BUILT, FAILED, UNKNOWN_LABEL, Fill, Keep, Order, Preprocessing, Score, Select
from igstore.tables import article_tables

_BATCH = {"cpu": 32, "cuda": 128}  # images; larger ones gain nothing

Store = str | os.PathLike[str] | StoreReader


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found.

    Attributes
    ----------
    rows
        One `Row` for each store, model and mask.
    predictions
        The predicted class of every image; see `igstore.results.predictions`.
    """

    rows: list[Row]
    predictions: xr.Dataset


def evaluate(
    stores: Store | Sequence[Store],
    *,
    models: Sequence[str | Classifier] | None = None,
    weights: str | Sequence[str] | None = None,
    p: float | Sequence[float] = (90, 70, 50, 30),
    keep: Keep | Sequence[Keep] = ("top", "bottom"),
    select: Select | Sequence[Select] = "mass",
    score: Score | Sequence[Score] = "positive",
    block: int | Sequence[int] = DEFAULT_BLOCK,
    fill: Fill | Sequence[Fill] = "black",
    order: Order | Sequence[Order] = ("attribution", "random"),
    seed: int = 0,
    images: Any = None,
    out: str | os.PathLike[str] | None = None,
    device: str = "auto",
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
        Who is shown the images: names as `load_classifier` takes them, or `Classifier`s. None is each store's own
        model, loaded by the name and weights that it records.
    weights
        As `load_classifier` takes them, for the models given by name, else for the stores' own: one for each, or one
        for all.
    p, keep, select, score, block, fill, order
        As `MaskOptions`; several values make the cross product.
    seed
        Of the random order and of the noise.
    images
        As `MaskedImageNet`, for stores without pixels.
    out
        Folder to write the results to, see `igstore.report.write_report`.
    device
        ``auto`` (a CUDA device where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
    batch_size
        Images that a network is shown at once; None is 32 on a CPU, 128 on a GPU.
    limit
        Only the first so many built images of each store.
    show_progress
        A progress bar on stderr.

    Raises
    ------
    UserError
        A value is not allowed, a ranking or the pixels are missing, no image is labelled, or two stores give one image
        different labels.
    SettingsMismatchError
        A store's own model cannot be loaded with the weights that made the store.
    ModelError
        A network does not classify such images.
    """
    readers = [store if isinstance(store, StoreReader) else StoreReader(store) for store in _several(stores)]
    options = {"p": p, "keep": keep, "select": select, "score": score, "block": block, "fill": fill, "order": order}
    cells = _cells({name: _several(values) for name, values in options.items()}, seed)
    target = find_device(device)
    ...
