"""Whether a changed network still gives the answers, and the gradients, of the one that it was made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from igstore.errors import IgstoreError, ModelError
from igstore.models import first_line, scores_of

# Of a gradient's length. Where rounding moves a unit across the kink of its ReLU a gradient jumps: float32 is off by
# some 1e-3, now and then by more. A mistake shows as 0.1 or more on one picture or another.
_GRADIENTS = 1e-2
# Of a logit's spread over the pictures. Rounding leaves 1e-5 to 1e-4.
_OUTPUTS = 1e-3
# Where the network as it comes is less certain than that, this many times its own uncertainty is allowed.
_LEEWAY = 3.0
# To measure it, pictures are scaled by these: all numbers are rounded anew, and equal ones stay equal.
_SCALES = (1 + 2.0**-17, 1 - 2.0**-18)

_LEAST_SPREAD = 1e-4  # of a logit, from picture to picture, over its size: less may be rounding


def pictures(probe: Tensor) -> Tensor:
    """Three images of the size of `probe`, (3, channel, y, x): noise, a picture, white.

    The picture has shades, edges, an even half, and a part that is 0. In even parts of an image the numbers in a
    network are equal, too, and rounding must not tell them apart.
    """
    generator = torch.Generator().manual_seed(0)
    _, channels, height, width = probe.shape
    noise = torch.randn(channels, height, width, generator=generator)
    y, x = torch.linspace(0, 12, height)[:, None], torch.linspace(0, 12, width)
    waves = [
        torch.sin(y * torch.rand((), generator=generator) + x * torch.rand((), generator=generator) + phase)
        for phase in range(channels)
    ]
    picture = torch.stack(waves) + 0.1 * noise
    picture[:, height // 8 : height // 3, width // 4 : width // 2] = 1.5
    picture[:, :, : width // 6] = 0.0
    picture[:, height // 2 :] = torch.linspace(-1, 1, channels)[:, None, None]
    return torch.stack([noise, picture, torch.full_like(noise, 2.25)]).to(probe)


class Answers(NamedTuple):
    """Of a network, to some pictures; gradients are None where it has none."""

    outputs: Tensor  # (picture, class)
    gradients: Tensor | None  # (picture, channel, y, x)


class Guard:
    """Compares changed networks with the one that they were made from, by their answers to some pictures.

    It compares the logits that differ from picture to picture, and the gradient of their sum, where each weighs the
    same. Logits that are the same for all pictures, such as those of classes that are masked out, are left out: they
    say nothing, however large they are.

    Parameters
    ----------
    network
        In evaluation mode, its parameters frozen.
    images
        (picture, channel, y, x), more than one; as `pictures`.

    Raises
    ------
    ModelError
        It fails on an image of this size, or does not return a tensor.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self._network, self._images = network, images
        outputs, self._singly = _first_outputs(network, images)
        finite = outputs.isfinite().all(dim=0)
        spread = torch.where(finite, outputs.amax(dim=0) - outputs.amin(dim=0), 0.0)
        clear = spread > _LEAST_SPREAD * outputs.abs().amax(dim=0)
        self._compared = clear if bool(clear.any()) else spread > 0  # (class,)
        self._spread = spread[self._compared]
        weights = torch.randn(len(self._spread), generator=torch.Generator().manual_seed(1))
        self._weights = weights.to(self._spread) / self._spread
        try:
            self._expected = self._answers(network, images)
        except Exception as error:  # there are many ways to have no gradient
            if is_out_of_memory(error):
                raise
            self._expected = Answers(outputs, None)
        self._uncertainty: Sequence[Tensor] | None = None

    @property
    def has_gradients(self) -> bool:
        """Whether the network's outputs have gradients, that are numbers, at one of its images."""
        gradients = self._expected.gradients
        return gradients is not None and bool(gradients.flatten(1).isfinite().all(dim=1).any())

    def objection(self, changed: nn.Module) -> str | None:
        """What is wrong with the answers of `changed`, in words, where that is more than rounding; else None."""
        differences = self._differences(self._answers(changed, self._images))
        for place, (what, tolerance) in enumerate((("outputs", _OUTPUTS), ("gradients", _GRADIENTS))):
            found = differences[place]
            if bool((found <= tolerance).all()):  # which what is not a number is not
                continue
            if not bool((found <= (_LEEWAY * self._uncertain()[place]).clamp(min=tolerance)).all()):
                return f"it would change {what} by {found.nan_to_num(math.inf).max():.1e} of their size"
        return None

    def _uncertain(self) -> Sequence[Tensor]:
        """The `_differences` of the network from itself where everything is rounded otherwise."""
        if self._uncertainty is None:
            scaled = [self._differences(self._answers(self._network, self._images * scale)) for scale in _SCALES]
            self._uncertainty = [torch.stack(found).nan_to_num(0.0).amax(dim=0) for found in zip(*scaled, strict=True)]
        return self._uncertainty

    def _differences(self, found: Answers) -> tuple[Tensor, Tensor]:
        """Of outputs and of gradients from what is expected, (picture,) each."""
        outputs = ((found.outputs - self._expected.outputs)[:, self._compared] / self._spread).norm(dim=1)
        outputs = outputs / max(1, len(self._spread)) ** 0.5
        if found.gradients is None or self._expected.gradients is None:
            same = (found.gradients is None) == (self._expected.gradients is None)
            return outputs, torch.full_like(outputs, 0.0 if same else math.inf)
        apart = (found.gradients - self._expected.gradients).flatten(1).norm(dim=1)
        length = self._expected.gradients.flatten(1).norm(dim=1)
        # the network's own need not be a number, e.g. where it divides something even by its spread
        return outputs, torch.where((apart == 0) | ~length.isfinite(), 0.0, apart / length)

    def _answers(self, network: nn.Module, images: Tensor) -> Answers:
        parts = [self._answer(network, part) for part in torch.split(images, 1 if self._singly else len(images))]
        outputs, gradients = zip(*parts, strict=True)
        return Answers(torch.cat(outputs), None if None in gradients else torch.cat(gradients))

    def _answer(self, network: nn.Module, images: Tensor) -> Answers:
        leaf = images.detach().clone().requires_grad_()
        outputs = scores_of(network, leaf)
        selected = (outputs[:, self._compared] * self._weights).sum()
        gradients = None
        if selected.requires_grad:
            (gradients,) = torch.autograd.grad(selected, leaf, allow_unused=True)
        return Answers(outputs.detach(), gradients)


def _first_outputs(network: nn.Module, images: Tensor) -> tuple[Tensor, bool]:
    """The network's outputs, and whether it wants images one by one: some take no more, or the memory does not."""
    try:
        with torch.no_grad():
            return scores_of(network, images), False
    except ModelError:
        raise
    except Exception:  # whatever it is, with a single image it may not be
        pass
    try:
        with torch.no_grad():
            return torch.cat([scores_of(network, image) for image in torch.split(images, 1)]), True
    except Exception as error:  # networks may raise anything
        if isinstance(error, IgstoreError) or is_out_of_memory(error):
            raise
        size = " x ".join(map(str, images.shape[1:]))
        raise ModelError(
            f"the network fails on an image of {size} ({type(error).__name__}: {first_line(error)})"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an exception of torch's says."""
    # torch has a class for CUDA's, and only a message for the CPU's
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
