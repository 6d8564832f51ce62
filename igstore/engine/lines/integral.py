"""Integrated Gradients by a `LineNetwork`: batches of points, and how they lie on their images' lines."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from igstore.engine.lines import reference
from igstore.engine.lines.points import Points, points_of
from igstore.engine.lines.steps import LineNetwork, Path
from igstore.engine.lines.tracing import line_network

Floats = NDArray[np.float64]
Select = Callable[[Tensor, Tensor], Tensor]  # from scores (point, class) and targets (point,) to outputs (point,)
_Found = tuple[Tensor, Tensor]

# Runs before a batch's kernels are captured: what is compiled or chosen at the first run must be there.
_WARM_UP = 2
_GRAPHS = 4  # kept
_LAYOUTS = 400  # kept


class OnLines(nn.Module):
    """A network beside its form for points of lines. Called, it is the network."""

    def __init__(self, network: nn.Module, lines: LineNetwork) -> None:
        super().__init__()
        self.network, self.lines = network, lines
        self._layouts: dict[bytes, _Layout] = {}
        self._graphs: dict[bytes, _Captured] = {}

    @classmethod
    def of(cls, network: nn.Module, pictures: Tensor) -> OnLines | None:
        """As `line_network`."""
        lines = line_network(network, pictures)
        return None if lines is None else cls(network, lines)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the network makes of `inputs`."""
        outputs: Tensor = self.network(inputs)
        return outputs

    def add_gradients(
        self,
        sums: Tensor,
        f_x: Tensor,
        images: list[int],
        alphas: Floats,
        weights: Floats,
        start: Tensor,
        difference: Tensor,
        targets: Tensor,
        select: Select,
        batch_size: int,
    ) -> None:
        """``sums[i] += sum over h of weights[h] * df/dx(start[i] + alphas[h] difference[i])`` for i in `images`.

        Where the last alpha is 1, ``f_x[i]`` becomes the output there.
        """
        m = len(alphas)
        count = -(-len(images) * m // batch_size)
        size = -(-len(images) * m // count)
        for begin in range(0, len(images) * m, size):
            end = min(begin + size, len(images) * m)
            places = range(begin // m, (end - 1) // m + 1)
            parts = [slice(max(begin - place * m, 0), min(end - place * m, m)) for place in places]
            layout = self._layout([(alphas[part], weights[part]) for part in parts], sums.device)
            chosen = torch.tensor([images[place] for place in places], device=sums.device)
            found, outputs = self._integrate(layout, start[chosen], difference[chosen], targets[chosen], select)
            sums[chosen] += found
            if alphas[-1] == 1:
                ended = [place for place, part in enumerate(parts) if part.stop == m]
                f_x[chosen[ended]] = outputs[layout.last[ended]].to(f_x.dtype)

    def _layout(self, parts: list[tuple[Floats, Floats]], device: torch.device) -> _Layout:
        key = b"".join(one.tobytes() + b"/" + other.tobytes() + b";" for one, other in parts)
        if key not in self._layouts:
            if len(self._layouts) >= _LAYOUTS:  # images may have numbers of steps of their own
                self._layouts.clear()
            self._layouts[key] = _Layout.of(key, parts, device)
        return self._layouts[key]

    def _integrate(self, layout: _Layout, start: Tensor, difference: Tensor, targets: Tensor, select: Select) -> _Found:
        def run(start: Tensor, difference: Tensor, targets: Tensor) -> _Found:
            at_points = targets[layout.image]
            path = Path(
                start, difference, layout.points, layout.image, layout.alpha, layout.order, layout.begin,
                layout.weights, _operations(start.device),
            )  # fmt: skip
            return self.lines.integrate(path, lambda scores: select(scores, at_points))

        layout.runs += 1
        if layout.key not in self._graphs:
            if start.device.type != "cuda" or layout.runs <= _WARM_UP or len(self._graphs) >= _GRAPHS:
                return run(start, difference, targets)
            self._graphs[layout.key] = _Captured(run, start, difference, targets)
        return self._graphs[layout.key](start, difference, targets)


def _operations(device: torch.device) -> Any:
    """What computes on values: kernels on CUDA devices, and wherever Triton's interpreter is asked for."""
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        from igstore.engine.lines import launches

        return launches
    return reference


class _Captured:
    """A function of tensors whose kernels are launched together, without Python: a CUDA graph."""

    def __init__(self, function: Callable[..., _Found], *inputs: Tensor) -> None:
        self._inputs = [one.clone() for one in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> _Found:
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
    runs
        Batches that had it.
    """

    key: bytes
    points: Points
    image: Tensor
    alpha: Tensor
    order: Tensor
    begin: Tensor
    weights: Tensor
    last: Tensor
    runs: int = 0

    @classmethod
    def of(cls, key: bytes, parts: list[tuple[Floats, Floats]], device: torch.device) -> _Layout:
        points = points_of([alphas for alphas, _ in parts], device)
        counts = [len(alphas) for alphas, _ in parts]
        image = torch.tensor(np.repeat(np.arange(len(parts)), counts), device=device)
        alpha, weights = (
            torch.tensor(np.concatenate(some), dtype=torch.float32, device=device) for some in zip(*parts, strict=True)
        )
        order = torch.argsort(points.order)  # where the batch has each point
        begin = np.concatenate([[0], np.cumsum(counts)])
        return cls(
            key=key,
            points=points,
            image=image[points.order],
            alpha=alpha[points.order],
            order=order,
            begin=torch.tensor(begin, dtype=torch.int32, device=device),
            weights=weights,
            last=order[torch.tensor(begin[1:] - 1, device=device)],
        )
