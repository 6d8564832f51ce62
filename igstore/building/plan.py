"""A build that has been checked and not begun."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igstore.attribution import with_rule
from igstore.errors import ImageError, UserError, option
from igstore.images import ImageList, as_image_list, find_images
from igstore.models import Classifier, adapted, check_preprocessing, classifier_from_module, load_classifier
from igstore.schema import FORMAT_VERSION, READ_VERSIONS, UNKNOWN_LABEL, BuildSpec, Preprocessing, Split, as_path
from igstore.storage import layout, read_json

_LOOKED_AT = 64  # images whose size is looked at before work begins

_SETTINGS = ("attributes", "settings")  # what holds a store's settings in its own document, and in its records


@dataclass(frozen=True)
class Names:
    """What finds a build's model and images on another machine, too: as `build_store` takes them, paths absolute."""

    model: str
    weights: str | None
    images: str
    split: Split
    labels: str | None

    @classmethod
    def of(cls, model: Any, weights: Any, images: Any, split: Split, labels: Any) -> Names | None:
        """The names that a user gave; None where the model or the images are objects of this process."""
        if not isinstance(model, str) or not isinstance(images, str | os.PathLike):
            return None
        is_file = isinstance(weights, str | os.PathLike) and Path(weights).is_file()
        return cls(
            model=model,
            weights=None if weights is None else absolute(weights) if is_file else str(weights),
            images=absolute(images),
            split=split,
            labels=None if labels is None else absolute(labels),
        )


def absolute(path: str | os.PathLike[str]) -> str:
    """A path that holds in other working folders, too."""
    return str(Path(path).expanduser().absolute())


@dataclass(frozen=True)
class Build:
    """The first `n_images` of `images` go into the store at `path`, attributed with `classifier` as `spec` says.

    `names` find classifier and images on other machines, where that is possible.
    """

    classifier: Classifier
    images: ImageList
    n_images: int
    spec: BuildSpec
    path: Path
    names: Names | None


def plan_build(
    model: str | Classifier | torch.nn.Module,
    images: Any,
    store: str | os.PathLike[str],
    *,
    weights: str | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    split: Split = "val",
    labels: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Build:
    """Check what can be checked before work begins; parameters as `build_store`, `settings` as `BuildSpec`."""
    settings = with_rule(settings)
    path = as_path("store", store)
    version = FORMAT_VERSION if overwrite else _format_there(path)
    listed = listed_images(images, split=split, labels=labels)
    names = Names.of(model, weights, images, split, labels)
    classifier, listed = chosen_classifier(model, weights, preprocessing, listed)
    classifier = adapted(classifier, settings.get("output", "logit"))
    spec = BuildSpec(
        model=classifier.name,
        weights=classifier.weights,
        weights_sha256=classifier.weights_sha256,
        preprocessing=classifier.preprocessing,
        images_fingerprint=listed.fingerprint,
        **{"format_version": version, **settings},
    )
    chosen = listed.head(limit) if limit is not None else listed
    if spec.target == "label" and (chosen.labels == UNKNOWN_LABEL).any():
        first = chosen.ids[int(np.argmax(chosen.labels == UNKNOWN_LABEL))]
        raise UserError(
            f"image {first} has no label, which {option('target', 'label')} needs; give {option('labels')}, or "
            f"{option('target', 'prediction')}"
        )
    layout.check_classes(spec, int(chosen.labels.max()))
    return Build(classifier, listed, len(chosen), spec, path, names)


def _format_there(path: Path) -> int:
    """The format version of the store that a build may go on with, which keeps it; the newest where there is none."""
    documents = (read_json(file) for file in (path / "zarr.json", *path.glob("records/*.json")))
    said = (document.get(key) for document in documents if isinstance(document, dict) for key in _SETTINGS)
    versions = (settings.get("format_version") for settings in said if isinstance(settings, dict))
    return next((version for version in versions if version in READ_VERSIONS), FORMAT_VERSION)


def listed_images(images: Any, *, split: Split, labels: str | os.PathLike[str] | None) -> ImageList:
    """The images that a user means; parameters as `build_store`."""
    if isinstance(images, (str, os.PathLike)):
        listed = find_images(images, split=split, labels=labels)
    elif labels is not None:
        raise UserError(f"{option('labels')} goes with images given as a path; otherwise each image brings its own")
    else:
        listed = as_image_list(images)
    if not len(listed):
        raise UserError("the list of images is empty")
    return listed


def chosen_classifier(
    model: str | Classifier | torch.nn.Module,
    weights: str | None,
    preprocessing: Preprocessing | Mapping[str, Any] | None,
    images: ImageList,
) -> tuple[Classifier, ImageList]:
    """The model that a user means, and the images as it can be shown them; parameters as `build_store`.

    Where nothing says how the images become a network's input, they must be of one size: those that are not cannot be
    read from the list that is returned.
    """
    if isinstance(preprocessing, Mapping):
        if not isinstance(model, str):
            raise UserError(
                "preprocessing is a dict, which changes that of a model given by name; give igstore.Preprocessing(...)"
            )
        model, weights, preprocessing = load_classifier(model, weights, **preprocessing), None, None
    elif isinstance(model, str):
        model, weights = load_classifier(model, weights), None
    if weights is not None:
        raise UserError("weights goes with a model given by name; a network brings its own")
    if preprocessing is not None:
        check_preprocessing(preprocessing)
    if isinstance(model, Classifier):
        given = model if preprocessing is None else dataclasses.replace(model, preprocessing=preprocessing)
        return given, images
    if not isinstance(model, torch.nn.Module):
        raise UserError(f"model is a {type(model).__name__}; it must be a name, a Classifier or a torch.nn.Module")
    if preprocessing is None:
        size = _one_size(images)
        preprocessing = Preprocessing(resize=None, crop=size, mean=(0, 0, 0), std=(1, 1, 1))
        images = images.of_size(size)
    return classifier_from_module(model, preprocessing=preprocessing), images


def _one_size(images: ImageList) -> tuple[int, int]:
    """The height and width that the images have, as far as a few of them say; raise `UserError` unless it is one."""
    sizes: dict[tuple[int, int], str] = {}
    for place in np.unique(np.linspace(0, len(images) - 1, _LOOKED_AT).round().astype(np.int64)).tolist():
        try:
            width, height = images.read(place).size
        except ImageError:  # recorded when it is its turn
            continue
        sizes.setdefault((height, width), images.ids[place])
    if len(sizes) != 1:
        some = [f"{one} is {height}x{width} pixels" for (height, width), one in sizes.items()][:2]
        why = f"the images are not of one size ({', '.join(some)})" if some else "no image can be read"
        raise UserError(
            f"{why}, so nothing says what the network is to be shown; give preprocessing=Preprocessing(resize=..., "
            "crop=...), with the mean and std that it was trained with"
        )
    return next(iter(sizes))
