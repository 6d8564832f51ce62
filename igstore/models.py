"""A model's name -> its network, its weights and the preprocessing that comes with them.

A name is resolved by the first of the *sources* at the end of this file that knows it. To add a source, write one
function there and decorate it with the form of its names.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import math
import pickle
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision.models
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from igstore.errors import UserError, WeightsNotFoundError
from igstore.schema import Interpolation, Preprocessing

OWN_WEIGHTS = "own"  # recorded for a network that arrives with its parameters
_DOWNLOAD_TIMEOUT = 10.0  # seconds without an answer, for each address of the server
_AUXILIARY_HEADS = ("AuxLogits.", "aux1.", "aux2.")  # training's extra heads in Inception v3's and GoogLeNet's files


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network ready to be attributed.

    Parameters
    ----------
    name
        As a user types it.
    network
        Maps normalised float32 (image, 3, y, x) to logits (image, class). On the CPU, in eval mode, parameters frozen.
    preprocessing
        How an image becomes that input; `normalise` is its last step.
    weights
        What the parameters are: a name, a file's name, ``random:SEED`` or ``own``.
    weights_sha256
        Of the weights file where there is one, else of the state dict (`state_sha256`).
    """

    name: str
    network: nn.Module
    preprocessing: Preprocessing
    weights: str
    weights_sha256: str


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """``(pixels / 255 - mean) / std`` per channel.

    Parameters
    ----------
    pixels
        (..., 3, y, x), 0 to 255, uint8 or floating.

    Returns
    -------
    Same shape and device; float32, or the dtype of floating pixels.
    """
    dtype = pixels.dtype if pixels.is_floating_point() else torch.float32
    mean, std = (
        torch.tensor(values, dtype=dtype, device=pixels.device).view(3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return (pixels.to(dtype) / 255 - mean) / std


def load_classifier(
    name: str,
    weights: str | None = None,
    *,
    resize: int | None = None,
    crop: int | tuple[int, int] | None = None,
    interpolation: Interpolation | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
) -> Classifier:
    """The classifier of that name. Consumes no global random state.

    Parameters
    ----------
    name
        A torchvision classifier (``resnet50``), ``timm:NAME``, ``efficientnet_lite0|1|2``, or
        ``package.module:function``.
    weights
        None for the source's own (torchvision: ``IMAGENET1K_V1`` where it exists, else the model's default); a
        torchvision weights name; a file of tensors, which never runs code; or ``random[:SEED]``, a network that is
        good for nothing but trying things out. A file is taken to want the input that the default weights want.
    resize, crop, interpolation, mean, std
        Replace that field of the preprocessing that comes with the weights. One number crops a square.

    Raises
    ------
    UserError
        Nothing is known by that name, or the weights do not fit it.
    WeightsNotFoundError
        The weights are neither on this machine nor to be downloaded.
    """
    for _, source in _SOURCES:
        classifier = source(name, weights)
        if classifier is not None:
            break
    else:
        forms = ", ".join(form for form, _ in _SOURCES)
        raise UserError(
            f"no model is called {name!r}{_did_you_mean(name, [*torchvision_names(), *_LITE])}; model is one of: {forms}"
        )
    given = {"resize": resize, "interpolation": interpolation, "mean": mean, "std": std}
    given["crop"] = (crop, crop) if isinstance(crop, int) else crop
    changes: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    return dataclasses.replace(
        classifier, preprocessing=dataclasses.replace(classifier.preprocessing, **changes)
    )


def classifier_from_module(
    network: nn.Module, *, preprocessing: Preprocessing, name: str | None = None, weights: str = OWN_WEIGHTS
) -> Classifier:
    """Any network as a `Classifier`, with the parameters that it has.

    Parameters
    ----------
    network
        Maps (image, 3, y, x) to logits (image, class), any number of classes. It is copied: the caller's own keeps
        its device, dtype and mode.
    name
        What to record as the model; by default the class's qualified name.
    weights
        What to record as the weights, e.g. the training run. The parameters' sha256 is recorded beside it.
    """
    if not isinstance(network, nn.Module):
        raise UserError(f"the network is a {type(network).__name__}; it must be a torch.nn.Module")
    kind = type(network)
    # a copy of a frozen network shares nothing with it and carries no gradients
    copy = _duplicate(network)
    return _classifier(name or f"{kind.__module__}.{kind.__qualname__}", copy, preprocessing, weights)


def torchvision_names() -> list[str]:
    """Torchvision's classifiers. Its quantised ones have no gradient and are not among them."""
    return list(torchvision.models.list_models(module=torchvision.models))


def state_sha256(network: nn.Module) -> str:
    """Sha256, as hex, over the state dict in order: each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for key, tensor in network.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
