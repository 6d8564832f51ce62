"""Networks that take or give other than igstore's classifiers do: one channel of colour, one output."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from igstore.models.classifier import Classifier
from igstore.schema import Output


class Grey(nn.Module):
    """Three channels for one: a network of grey images is shown the mean over the colours.

    An image that is grey has the same value in each, so nothing changes for it: the attribution of its one channel is
    the sum over the three.

    Parameters
    ----------
    network
        Takes (image, 1, y, x).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """Of inputs (image, 3, y, x)."""
        scores: Tensor = self.network(inputs.mean(dim=1, keepdim=True))
        return scores


class TwoClasses(nn.Module):
    """Two outputs for one, z, which speaks for class 1 and against class 0.

    Where logits are wanted, they are -z and z, the log-odds of the classes. Where probabilities are wanted, they are
    -z/2 and z/2, whose softmax is 1 - sigmoid(z) and sigmoid(z). So whatever takes classes apart goes on as ever.

    Parameters
    ----------
    network
        Maps (image, channel, y, x) to z, (image, 1).
    output
        What will be made of the outputs.
    """

    def __init__(self, network: nn.Module, output: Output) -> None:
        super().__init__()
        self.network = network
        self._share = 1.0 if output == "logit" else 0.5

    def forward(self, inputs: Tensor) -> Tensor:
        """(image, 2)."""
        z = self.network(inputs) * self._share
        return torch.cat([-z, z], dim=1)


def adapted(classifier: Classifier, output: Output) -> Classifier:
    """The classifier itself, or one whose network is wrapped so that it takes three channels and tells classes apart.

    A network that fails on images of either kind stays as it is: whoever uses it says how.

    Parameters
    ----------
    classifier
        With any network.
    output
        As `TwoClasses` takes it.
    """
    network, probe = classifier.network, torch.zeros(1, 3, *classifier.preprocessing.crop, dtype=torch.float32)
    found = _tried(network, probe)
    if found is None:
        found = _tried(network, probe[:, :1])
        network = network if found is None else Grey(network)
    if found == (1, 1):
        network = TwoClasses(network, output)
    return classifier if network is classifier.network else dataclasses.replace(classifier, network=network)


def _tried(network: nn.Module, probe: Tensor) -> tuple[int, ...] | None:
    """The shape of what a network makes of a probe; None where it fails."""
    try:
        with torch.no_grad():
            found = network(probe.clone())
    except Exception:  # networks may raise anything
        return None
    return tuple(found.shape) if isinstance(found, Tensor) else ()
