"""The first convolution of a network taken out of the path integral, which it commutes with."""

from __future__ import annotations

import copy
import logging
from contextlib import ExitStack

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# More than this, relative to the size of the logits, is a mistake and no rounding.
_TOLERANCE = 1e-3
# A stem whose output has this many times the numbers of its input costs more to keep than to compute.
_LARGEST_GROWTH = 8


class Hoisted(nn.Module):
    """A network in two parts, ``body(stem(x))``, of which the stem is affine: a convolution.

    With ``u = stem(x)`` and ``v = stem(b)``, ``stem(b + alpha (x - b)) = v + alpha (u - v)``, and the gradient at the
    input is the stem's transpose applied to the gradient at its output. So the stem runs once an image instead of once
    a step, forwards and backwards, and Integrated Gradients stay what they are.
    """

    def __init__(self, stem: nn.Conv2d, body: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.body = body

    def forward(self, inputs: Tensor) -> Tensor:
        """What the whole network makes of `inputs`."""
        outputs: Tensor = self.body(self.stem(inputs))
        return outputs


def hoist_stem(network: nn.Module, probe: Tensor) -> nn.Module:
    """`network` as a `Hoisted`, sharing its parameters, or as it is where that cannot be done.

    The stem is the convolution that reads the network's input as it is. That nothing else reads the input, and that
    the network would take the stem's output for it, shows when both forms see a random image and agree.

    Parameters
    ----------
    network
        In evaluation mode; left as it is.
    probe
        One image (1, channel, y, x) of the right size, on the network's device.
    """
    image = torch.randn(probe.shape, generator=torch.Generator().manual_seed(0)).to(probe)
    stem = _reader_of(network, image)
    if stem is None:
        logger.info("no convolution reads the image itself: the whole network runs at every step")
        return network
    body = copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})
    place = next(name for name, module in network.named_modules() if module is stem)
    parent, _, name = place.rpartition(".")
    setattr(body.get_submodule(parent), name, nn.Identity())
    hoisted = Hoisted(stem, body)
    try:
        with torch.no_grad():
            difference = (hoisted(image) - network(image.clone())).abs().max()
            size = network(image.clone()).abs().max()
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        logger.info("the first convolution stays in the path: the rest of the network does not run alone (%s)", error)
        return network
    if not difference <= _TOLERANCE * size:
        logger.info("the first convolution stays in the path: it is not the only one to read the image")
        return network
    return hoisted


def _reader_of(network: nn.Module, image: Tensor) -> nn.Conv2d | None:
    """The convolution that reads `image` itself and does not make it much larger; None where there is none."""
    found: list[nn.Conv2d] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], made: Tensor) -> None:
        small = isinstance(made, Tensor) and made.numel() <= _LARGEST_GROWTH * image.numel()
        if isinstance(module, nn.Conv2d) and inputs and inputs[0] is image and small:
            found.append(module)

    with ExitStack() as hooks, torch.no_grad():
        for module in network.modules():
            if module is not network and isinstance(module, nn.Conv2d):
                hooks.callback(module.register_forward_hook(look).remove)
        version = image._version
        network(image)
    # a network that writes to its input has other plans for it
    return found[0] if len(found) == 1 and image._version == version else None
