"""Small networks whose Integrated Gradients are known, or that misbehave in a known way."""

from __future__ import annotations

import os
import sys
import time

import torch
from torch import Tensor, nn


class Smooth(nn.Module):
    """A small convolutional classifier, smooth, so that float64 comparisons mean something."""

    def __init__(self, n_classes: int = 7, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2), nn.Softplus(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Tanh()
            )
            self.head = nn.Linear(8, n_classes)
            nn.init.uniform_(self.body[3].running_mean, -0.5, 0.5)
            nn.init.uniform_(self.body[3].running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(dim=(2, 3)))


class Linear(nn.Module):
    """Logits linear in the pixels: IG is exactly w (x - b), for every rule and any number of steps."""

    def __init__(self, n_classes: int = 5, size: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_classes, 3, size, size, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ncyx,kcyx->nk", x, self.weight)


class Quadratic(nn.Module):
    """Logit k is (k + 1) times the sum of squares: the gradient at b + a (x - b) is 2 (k + 1) (b + a (x - b))."""

    def forward(self, x: Tensor) -> Tensor:
        total = (x**2).sum(dim=(1, 2, 3))
        return torch.stack([total, 2 * total, 3 * total], dim=1)


class InPlace(nn.Module):
    """Begins with an in-place operation on its own input, which a leaf refuses and a captured tensor gets wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Smooth()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.relu_(x))


class Slow(nn.Module):
    """Another network, with a pause in front, so that a test can act in the middle of a build."""

    def __init__(self, inner: nn.Module, seconds: float) -> None:
        super().__init__()
        self.inner, self.seconds = inner, seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.inner(x)


def demo_network() -> nn.Module:
    """What ``--model networks:demo_network`` finds; IGSTORE_TEST_SLOW makes it slow."""
    return Slow(Smooth().eval(), float(os.environ.get("IGSTORE_TEST_SLOW", "0")))


class Greedy(nn.Module):
    """Runs out of memory above two images, as a device does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Smooth()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.inner(x)


class Noisy(nn.Module):
    """Forgets that dropout is for training."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Smooth()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(nn.functional.dropout(x, 0.5, training=True))


class Undefined(nn.Module):
    """Has no number for images whose first value is high."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Smooth()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) / (x[:, 0, :1, 0] < 1)


class Flat(nn.Module):
    """Returns one number an image."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Smooth()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[:, 0]


class Named(nn.Module):
    """Returns its scores under a name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Smooth()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x)}


class Leaving(nn.Module):
    """Ends the program as if all were done, when it is asked for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Smooth()

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            sys.exit(0)
        return self.inner(x)


def leaving() -> nn.Module:
    """Ends it before there is a network."""
    sys.exit()


class Broken(nn.Module):
    """Fails when gradients are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Smooth()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)
