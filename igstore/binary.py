"""A network of one output z as a classifier of two classes: 1, which z speaks for, and 0, which it speaks against."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from igstore.models import Classifier
from igstore.schema import Output


class TwoClasses(nn.Module):
    """Two outputs for one, from which everything that takes classes apart goes on as ever.

    Where logits are wanted, they are -z and z, the log-odds of the classes. Where probabilities are wanted, they are
    -z/2 and z/2, whose softmax is 1 - sigmoid(z) and sigmoid(z).

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


def with_classes(classifier: Classifier, output: Output) -> Classifier:
    """The classifier itself, or if its network has one output, one whose network has two; parameters as `TwoClasses`.

    A network that fails stays as it is: whoever uses it says how.
    """
    probe = torch.zeros(1, 3, *classifier.preprocessing.crop, dtype=torch.float32)
    try:
        with torch.no_grad():
            found = classifier.network(probe)
    except Exception:  # networks may raise anything
        return classifier
    if not isinstance(found, Tensor) or found.shape != (1, 1):
        return classifier
    return dataclasses.replace(classifier, network=TwoClasses(classifier.network, output))
