"""How others run Integrated Gradients: the same maps, from the same pixels, the way their users get them.

Each function takes uint8 pixels (image, channel, y, x) to float32 maps (image, y, x) on the host: normalised, black
baseline, right-hand Riemann steps, the logit of the network's own prediction, summed over channels.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from captum.attr import IntegratedGradients
from numpy.typing import NDArray
from torch import Tensor, nn

from igstore.models import Classifier, normalise
from igstore.schema import Preprocessing

Pixels = NDArray[np.uint8]
Maps = NDArray[np.float32]


def network_as_it_comes(classifier: Classifier, device: torch.device) -> nn.Module:
    """The network as its library hands it out: in evaluation mode, its parameters ready to be trained."""
    return copy.deepcopy(classifier.network).requires_grad_(True).to(device)


def captum(
    network: nn.Module,
    pixels: Pixels,
    preprocessing: Preprocessing,
    *,
    n_steps: int,
    batch_size: int,
    device: torch.device,
) -> Maps:
    """Captum's `IntegratedGradients` with ``internal_batch_size=batch_size``, on as many images at once as fit in it.

    Quantus calls it so too, with all steps of all images in one batch, and with a number of steps of its own (10).
    """
    method = IntegratedGradients(network)
    at_once = max(1, batch_size // n_steps)
    maps = []
    for first in range(0, len(pixels), at_once):
        x, black = _inputs(pixels[first : first + at_once], preprocessing, device)
        with torch.no_grad():
            target = network(x).argmax(dim=1)
        attributions = method.attribute(
            x, black, target=target, n_steps=n_steps, method="riemann_right", internal_batch_size=batch_size
        )
        maps.append(attributions.sum(dim=1).detach().float().cpu().numpy())
    return np.concatenate(maps)


def step_loop(
    network: nn.Module, pixels: Pixels, preprocessing: Preprocessing, *, n_steps: int, device: torch.device
) -> Maps:
    """Plain PyTorch, one step of one image at a time, ``backward()`` to the parameters as well.

    This is how Tianhong Dai's widely used implementation works, which takes the left-hand steps.
    """
    maps = []
    for image in pixels:
        x, black = _inputs(image[None], preprocessing, device)
        with torch.no_grad():
            target = int(network(x).argmax())
        gradients = []
        for step in range(1, n_steps + 1):
            point = (black + step / n_steps * (x - black)).requires_grad_()
            network.zero_grad()
            network(point)[0, target].backward()
            gradients.append(torch.as_tensor(point.grad)[0].cpu().numpy())
        difference = (x - black)[0].cpu().numpy()
        maps.append((difference * np.mean(gradients, axis=0)).sum(axis=0))
    network.zero_grad()
    return np.stack(maps)


def _inputs(pixels: Pixels, preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(pixels).to(device)
    return normalise(x, preprocessing), normalise(torch.zeros_like(x), preprocessing)
