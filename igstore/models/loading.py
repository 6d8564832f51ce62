"""A model's name -> its network, its weights and the preprocessing that comes with them.

Names that a user types may name code, and files: `load_classifier`. Names that a store records may not, since a store
may come from anywhere: `recorded_classifier` looks them up among the sources that are fixed, and nothing else in
igstore loads what a store names.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torchvision.models
from torch import nn

from igstore.errors import SettingsMismatchError, UserError, option
from igstore.machine import fresh_torch
from igstore.models.classifier import Classifier, classifier_from_module
from igstore.models.sources import FIXED, SOURCES, find_among, is_word
from igstore.schema import BuildSpec, Interpolation, check_resize, names_code


@fresh_torch()
def load_classifier(
    name: str,
    weights: str | os.PathLike[str] | torchvision.models.WeightsEnum | None = None,
    *,
    resize: int | None = None,
    crop: int | tuple[int, int] | None = None,
    interpolation: Interpolation | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
) -> Classifier:
    """The classifier of that name. Global random state is left as it was.

    Parameters
    ----------
    name
        A torchvision classifier such as ``resnet50``, ``efficientnet_lite0|1|2``, ``timm:NAME``, or
        ``package.module:function``.
    weights
        None for the source's own (torchvision: ``IMAGENET1K_V1`` where it exists, else the model's default); one of
        torchvision's weights, or their name; a file of tensors, whose code is never run; or ``random[:SEED]``, a
        network that has learnt nothing but whose gradients are of ordinary size. A file is taken to want the input
        that the default weights want.
    resize, crop, interpolation, mean, std
        Each replaces that field of the preprocessing that comes with the weights. A single number crops a square.

    Raises
    ------
    UserError
        Nothing is known by that name, the weights do not fit it, or `resize` is smaller than `crop`.
    WeightsNotFoundError
        The weights are neither on this machine nor to be downloaded.

    >>> found = load_classifier("squeezenet1_1", "random:0")
    >>> found.preprocessing.resize, found.preprocessing.crop
    (256, (224, 224))
    """
    check_resize(resize, crop)
    if not isinstance(name, str):
        raise UserError(
            f"the model is a {type(name).__name__}; it must be a name, and networks go to classifier_from_module"
        )
    if isinstance(weights, torchvision.models.WeightsEnum):
        weights = f"{type(weights).__name__}.{weights.name}"
    if not isinstance(weights, str | os.PathLike | None):
        raise UserError(
            f"weights is a {type(weights).__name__}; it must be a name or the path of a file, and a network that has "
            "loaded its weights goes to classifier_from_module"
        )
    classifier = find_among(name, None if weights is None else os.fspath(weights), SOURCES)
    given = {
        "resize": resize,
        "crop": (crop, crop) if isinstance(crop, int) else crop,
        "interpolation": interpolation,
        "mean": mean,
        "std": std,
    }
    changes: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    changed = dataclasses.replace(classifier.preprocessing, **changes)
    if {"resize", "crop"} & changes.keys():
        check_resize(changed.resize, changed.crop)
    return dataclasses.replace(classifier, preprocessing=changed)


def recorded_classifier(
    spec: BuildSpec,
    where: str,
    *,
    parameter: str,
    model: str | Classifier | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> Classifier:
    """The classifier that made a store, with the preprocessing that it was made with.

    What the store records is looked up among torchvision's, timm's and the built-in models and their weights. Code of
    somebody's own, ``package.module:function``, and files of weights are used only where the user names them.

    Parameters
    ----------
    spec, where
        What the store was made with, and its path or URL.
    parameter
        What a user names a model by, for messages.
    model, weights
        What the user has given, as `load_classifier` takes it, or a `Classifier`; None is what the store records.

    Raises
    ------
    UserError
        It is not known here by that name, or only the user can name it.
    SettingsMismatchError
        What is found has other weights than those that made the store.
    """
    what = f"{where} was made by {spec.model} with weights {spec.weights} (sha256 {spec.weights_sha256[:12]})"
    remedy = f"give {option('weights')} for it, or name a model yourself: {option(parameter)}"
    if model is None and names_code(spec.model):
        raise UserError(
            f"{what}, which is code of somebody's own, and no store chooses code that is run here; if you know and "
            f"trust that code, name it yourself: {option(parameter, spec.model)}"
        )
    try:
        if weights is None and is_word(spec.model, spec.weights):
            weights = spec.weights
        if isinstance(model, Classifier):
            found = model
        elif model is not None:
            found = load_classifier(model, weights)
        else:
            found = find_among(spec.model, None if weights is None else os.fspath(weights), FIXED)
    except UserError as error:
        raise UserError(f"{what}, which cannot be loaded: {error}; {remedy}") from error
    if found.weights_sha256 != spec.weights_sha256:
        raise SettingsMismatchError(
            f"{what}, but the weights found are {found.weights} (sha256 {found.weights_sha256[:12]}); {remedy}"
        )
    return dataclasses.replace(found, preprocessing=spec.preprocessing)


def as_shown(model: Classifier | nn.Module, spec: BuildSpec) -> Classifier:
    """A classifier as it is, and a network with the preprocessing of the store whose images it is shown."""
    if isinstance(model, Classifier):
        return model
    prepared = dataclasses.replace(spec.preprocessing, resize=None)  # by the store
    return classifier_from_module(model, preprocessing=prepared)
