"""The first convolution of a network taken out of the path integral, which it commutes with."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from igstore.acceleration.guard import Guard, pictures
from igstore.machine import fresh_torch
from igstore.models import copied

logger = logging.getLogger(__name__)

# More than this, relative to the size of a stem's outputs, is a mistake and no rounding.
_TOLERANCE = 1e-4
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

    The stem is the convolution that reads the network's input as it is, while nothing else in the network so much as
    looks at it. That the network takes the stem's output for its input shows when both forms see some images.

    Parameters
    ----------
    network
        In evaluation mode; left as it is.
    probe
        One image (1, channel, y, x) of the right size, on the network's device.
    """
    with fresh_torch(probe.device):
        images = pictures(probe)
        try:
            stem = _reader_of(network, images[:1])
            if stem is None:
                logger.info("no convolution alone reads the image itself: the whole network runs at every step")
                return network
            hoisted = _without(network, stem)
            objection = Guard(network, images).objection(hoisted) if _is_affine(stem, images) else "it is not affine"
        except Exception as error:  # what the code of a network does without a part of it is anyone's guess
            objection = f"{type(error).__name__}: {error}"
        if objection is not None:
            logger.info("the first convolution stays in the path: %s", objection)
            return network
        return hoisted


def _without(network: nn.Module, stem: nn.Conv2d) -> Hoisted:
    """The two parts of `network`."""
    body = copied(network, sharing_tensors=True)
    place = next(name for name, module in network.named_modules() if module is stem)
    parent, _, name = place.rpartition(".")
    setattr(body.get_submodule(parent), name, nn.Identity())
    return Hoisted(stem, body)


def _is_affine(stem: nn.Module, images: Tensor) -> bool:
    """Whether a stem maps a point between two images to the point between their outputs, forwards and backwards.

    A convolution does. A subclass, or hooks, may do more.
    """
    if stem._backward_hooks or stem._backward_pre_hooks:
        return False
    with torch.no_grad():
        first, second, between = (
            stem(image) for image in (images[:1], images[1:2], images[:1].lerp(images[1:2], 0.25))
        )
    return bool((between - first.lerp(second, 0.25)).abs().max() <= _TOLERANCE * between.abs().max())


def _reader_of(network: nn.Module, image: Tensor) -> nn.Conv2d | None:
    """The convolution that alone reads `image` itself and does not make it much larger; None where there is none."""
    found: list[nn.Conv2d] = []
    largest = _LARGEST_GROWTH * image.numel()

    def look(module: nn.Module, inputs: tuple[Tensor, ...], made: Tensor) -> None:
        small = isinstance(made, Tensor) and made.numel() <= largest
        if isinstance(module, nn.Conv2d) and inputs and inputs[0] is image and small:
            found.append(module)

    readers = _Readers(image)
    with ExitStack() as hooks, torch.no_grad():
        for module in network.modules():
            if module is not network and isinstance(module, nn.Conv2d):
                hooks.callback(module.register_forward_pre_hook(readers.begin).remove)
                hooks.callback(module.register_forward_hook(look).remove)
                hooks.callback(module.register_forward_hook(readers.end).remove)
        hooks.enter_context(readers)
        network(image)
    return found[0] if len(found) == 1 and not readers.others else None


class _Readers(TorchFunctionMode):
    """Notes the functions of torch's that are given a tensor itself, if only for its shape, outside of convolutions."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.others: list[Any] = []
        self._tensor = tensor
        self._inside = 0  # convolutions

    def begin(self, *_: object) -> None:
        """A convolution begins."""
        self._inside += 1

    def end(self, *_: object) -> None:
        """A convolution ends."""
        self._inside -= 1

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._inside and any(given is self._tensor for given in tree_leaves((args, kwargs))):
            self.others.append(function)
        return function(*args, **kwargs)
