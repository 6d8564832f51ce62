"""Integrated Gradients by a `LineNetwork`: batches of points, and how they lie on their images' lines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from igstore.acceleration.lines import reference
from igstore.acceleration.lines.points import Points, points_of
from igstore.acceleration.lines.steps import LineNetwork, Path
from igstore.acceleration.lines.tracing import line_network

Floats = NDArray[np.float64]
Select = Callable[[Tensor, Tensor], Tensor]  # from scores (point, class) and targets (point,) to outputs (point,)
_Found = tuple[Tensor, Tensor]
_Key = tuple[Any, ...]  # what tells batches apart that are computed alike
_Tensors = TypeVar("_Tensors", bound=tuple[Tensor, ...])

_MOST_NUMBERS = 2**31 - 1

# Runs before a batch's kernels are captured: what is compiled or chosen at the first run must be there.
_WARM_UP = 2
_GRAPHS = 6  # kept: of the full batches, the last one, and the same without gradients
_LAYOUTS = 50  # kept


class OnLines(nn.Module):
    """A network beside its form for points of lines. Called, it gives the network's outputs.

    Attributes
    ----------
    most_points
        How many points a batch may have, so that no tensor has more numbers than offsets of 32 bits reach.
    """

    def __init__(self, network: nn.Module, lines: LineNetwork) -> None:
        super().__init__()
        self.network, self.lines = network, lines
        self.most_points = _MOST_NUMBERS // lines.largest
        self._layouts: dict[_Key, _Layout] = {}
        self._runs: dict[_Key, int] = {}
        self._graphs: dict[_Key, _Captured] = {}

    @classmethod
    def of(cls, network: nn.Module, pictures: Tensor) -> OnLines | None:
        """As `line_network`."""
        lines = line_network(network, pictures)
        return None if lines is None else cls(network, lines)

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's outputs on `inputs`; on CUDA devices without gradients, by the same kernels as on lines."""
        if inputs.device.type == "cuda" and not torch.is_grad_enabled():
            return torch.cat([self._scores(some) for some in torch.split(inputs, self.most_points)])
        outputs: Tensor = self.network(inputs)
        return outputs

    def add_gradients(
        self,
        sums: Tensor,
        f_x: Tensor,
        alphas: Floats,
        weights: Floats,
        start: Tensor,
        difference: Tensor,
        targets: Tensor,
        select: Select,
        batch_size: int,
    ) -> None:
        """``sums[i] += sum over h of weights[h] * df/dx(start[i] + alphas[h] difference[i])`` for each image i.

        Where the last alpha is 1, ``f_x[i]`` becomes the output there. Batches have whole images where they can.
        """
        m = len(alphas)
        batch_size = min(batch_size, self.most_points)
        for chosen, part in _batches(len(sums), m, batch_size):
            layout = self._layout(chosen.stop - chosen.start, alphas[part], weights[part], sums.device)
            found, outputs = self._integrate(layout, start[chosen], difference[chosen], targets[chosen], select)
            sums[chosen] += found
            if alphas[-1] == 1 and part.stop == m:
                f_x[chosen] = outputs[layout.last].to(f_x.dtype)

    def _layout(self, n_images: int, alphas: Floats, weights: Floats, device: torch.device) -> _Layout:
        key = (n_images, alphas.tobytes(), weights.tobytes())
        if key not in self._layouts:
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = _Layout.of(key, n_images, alphas, weights, device)
        return self._layouts[key]

    def _scores(self, images: Tensor) -> Tensor:
        """The outputs (image, class) on images, each of which is a reference at the start of a line of its own."""
        layout = self._layout(len(images), np.zeros(1), np.zeros(1), images.device)

        def run(images: Tensor) -> tuple[Tensor]:
            return (self.lines.scores(layout.path(images, torch.zeros_like(images))),)

        (scores,) = self._run(("scores", *layout.key), run, images)
        return scores.clone()

    def _integrate(self, layout: _Layout, start: Tensor, difference: Tensor, targets: Tensor, select: Select) -> _Found:
        def run(start: Tensor, difference: Tensor, targets: Tensor) -> _Found:
            at_points = targets[layout.image]
            return self.lines.integrate(layout.path(start, difference), lambda scores: select(scores, at_points))

        return self._run(layout.key, run, start, difference, targets)

    def _run(self, key: _Key, function: Callable[..., _Tensors], *inputs: Tensor) -> _Tensors:
        """What the function makes of the inputs; on CUDA devices, from some runs on, as a graph for this key."""
        if key not in self._graphs:
            self._runs[key] = self._runs.get(key, 0) + 1
            if inputs[0].device.type != "cuda" or self._runs[key] <= _WARM_UP or len(self._graphs) >= _GRAPHS:
                return function(*inputs)
            self._graphs[key] = _Captured(function, *inputs)
        found: _Tensors = self._graphs[key](*inputs)
        return found


def _batches(n_images: int, m: int, batch_size: int) -> Iterator[tuple[slice, slice]]:
    """Which images, and which of their m points, each batch has; batches are as equal as can be."""
    if m <= batch_size:
        count = -(-n_images // (batch_size // m))
        size = -(-n_images // count)
        for begin in range(0, n_images, size):
            yield slice(begin, min(begin + size, n_images)), slice(0, m)
        return
    size = -(-m // -(-m // batch_size))
    for image in range(n_images):
        for begin in range(0, m, size):
            yield slice(image, image + 1), slice(begin, min(begin + size, m))


def _operations(device: torch.device) -> Any:
    """What computes on values: kernels on CUDA devices, and wherever Triton's interpreter is asked for."""
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        from igstore.acceleration.lines import launches

        return launches
    return reference


class _Captured:
    """A function of tensors whose kernels are launched together, without Python: a CUDA graph."""

    def __init__(self, function: Callable[..., Any], *inputs: Tensor) -> None:
        self._inputs = [one.clone() for one in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """The function's results, which the next call overwrites."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._outputs


@dataclass
class _Layout:
    """How a batch's points lie on their images' lines; the tensors as `Path` has them.

    Attributes
    ----------
    last
        Of each image, its last point in the batch's order, int64 (image,).
    """

    key: _Key
    points: Points
    image: Tensor
    alpha: Tensor
    order: Tensor
    begin: Tensor
    weights: Tensor
    last: Tensor

    @classmethod
    def of(cls, key: _Key, n_images: int, alphas: Floats, weights: Floats, device: torch.device) -> _Layout:
        """Every image has points at the same alphas."""
        m = len(alphas)
        points = points_of([alphas] * n_images, device)
        image = torch.arange(n_images, device=device).repeat_interleave(m)
        alpha, weight = (torch.tensor(one, dtype=torch.float32, device=device) for one in (alphas, weights))
        order = torch.argsort(points.order)  # where the batch has each point
        return cls(
            key=key,
            points=points,
            image=image[points.order],
            alpha=alpha.repeat(n_images)[points.order],
            order=order,
            begin=torch.arange(n_images + 1, dtype=torch.int32, device=device) * m,
            weights=weight.repeat(n_images),
            last=order[m - 1 :: m],
        )

    def path(self, start: Tensor, difference: Tensor) -> Path:
        """The points of images (image, channel, y, x), on their way by `difference`."""
        return Path(
            start, difference, self.points, self.image, self.alpha, self.order, self.begin, self.weights,
            _operations(start.device),
        )  # fmt: skip
