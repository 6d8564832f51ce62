"""A network with its preprocessing and the identity of its weights: what igstore attributes and evaluates."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from igstore.errors import UserError
from igstore.machine import fresh_torch
from igstore.models.networks import copied, frozen
from igstore.models.weights import first_line, state_sha256
from igstore.schema import BuildSpec, Preprocessing, check_resize

_OWN = "own"  # recorded for a network that arrives with its parameters


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
        In hexadecimal; of the weights file where there is one, else of the state dict (`state_sha256`).
    """

    name: str
    network: nn.Module
    preprocessing: Preprocessing
    weights: str
    weights_sha256: str

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.network.parameters())
        asked = self.preprocessing
        height, width = asked.crop
        sized = f"resize {asked.resize}, crop {height}x{width}, {asked.interpolation}"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (asked.mean, asked.std))
        lines = [
            f"Classifier {self.name}",
            f"network: {type(self.network).__name__}, {count:,} parameters",
            f"weights: {self.weights} (sha256 {self.weights_sha256[:12]})",
            f"input: {sized}, mean ({mean}), std ({std})",
        ]
        return "\n    ".join(lines)


def fitted(classifier: Classifier, spec: BuildSpec) -> Classifier:
    """A classifier that was loaded by name, with a store's preprocessing where it is the one that made the store."""
    is_own = (classifier.name, classifier.weights_sha256) == (spec.model, spec.weights_sha256)
    return dataclasses.replace(classifier, preprocessing=spec.preprocessing) if is_own else classifier


@fresh_torch()
def classifier_from_module(
    network: nn.Module, *, preprocessing: Preprocessing, name: str | None = None, weights: str | None = None
) -> Classifier:
    """Any network as a `Classifier`, with the parameters that it has.

    Parameters
    ----------
    network
        Maps (image, 3, y, x) to logits (image, class), any number of classes. It is copied: the caller's own keeps
        its device, dtype and mode.
    preprocessing
        How an image becomes its input.
    name
        What to record as the model; by default its class's qualified name.
    weights
        What to record as the weights, e.g. the training run; by default ``own``. The sha256 is always recorded.

    Raises
    ------
    UserError
        It is not a `torch.nn.Module`, or the preprocessing gives images black margins.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    >>> found = classifier_from_module(network, preprocessing=Preprocessing(resize=None, crop=(8, 8)), name="line")
    >>> found.name, found.weights
    ('line', 'own')
    """
    if not isinstance(network, nn.Module):
        raise UserError(f"the network is a {type(network).__name__}; it must be a torch.nn.Module")
    check_preprocessing(preprocessing)
    kind = type(network)
    try:
        own = copied(network)
    except Exception as error:  # networks may hold anything, such as a lock
        raise UserError(
            f"the network cannot be copied ({type(error).__name__}: {first_line(error)}); it must be one that "
            "copy.deepcopy copies"
        ) from error
    return frozen_classifier(name or f"{kind.__module__}.{kind.__qualname__}", own, preprocessing, weights or _OWN)


def check_preprocessing(preprocessing: Any) -> None:
    """Raise `UserError` unless it is a `Preprocessing` that fills the crop."""
    if not isinstance(preprocessing, Preprocessing):
        raise UserError(
            f"preprocessing is a {type(preprocessing).__name__}; it must be igstore.Preprocessing(resize=..., "
            "crop=..., mean=..., std=...), which a store can say of itself"
        )
    check_resize(preprocessing.resize, preprocessing.crop)


def frozen_classifier(
    name: str, network: nn.Module, preprocessing: Preprocessing, weights: str, sha256: str | None = None
) -> Classifier:
    """A classifier of that network, on the CPU in float32; `sha256` is by default that of its parameters."""
    network = frozen(network.cpu().float())
    return Classifier(name, network, preprocessing, weights, sha256 or state_sha256(network))
