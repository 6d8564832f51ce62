"""Integrated Gradients of a `LineNetwork`: batches of points, and sums of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from igstore.engine.line import Batch, add_weighted, batch_of
from igstore.engine.line_network import Gradient, LineNetwork, Path

Floats = NDArray[np.float64]
Select = Callable[[Tensor, Tensor], Tensor]  # from scores (point, class) and targets (point,) to outputs (point,)

# Runs before a batch's kernels are captured: what is compiled or chosen at the first run must be there.
_WARM_UP = 2
_GRAPHS = 4  # kept


class OnLines(nn.Module):
    """A network beside its form for points of lines, which begins at the outputs of `stem`.

    Called, it is the network.
    """

    def __init__(self, network: nn.Module, stem: nn.Module, body: nn.Module, lines: LineNetwork) -> None:
        super().__init__()
        self.network, self.stem, self.body, self.lines = network, stem, body, lines
        self._layouts: dict[bytes, _Layout] = {}
        self._graphs: dict[object, _Captured] = {}

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

        Where the last alpha is 1, ``f_x[i]`` becomes the output there. Sums, start and difference are channels last.
        """
        m = len(alphas)
        count = -(-len(images) * m // batch_size)
        size = -(-len(images) * m // count)
        for begin in range(0, len(images) * m, size):
            end = min(begin + size, len(images) * m)
            places = range(begin // m, (end - 1) // m + 1)
            parts = [slice(max(begin - place * m, 0), min(end - place * m, m)) for place in places]
            layout = self._layout([alphas[part] for part in parts], [weights[part] for part in parts], sums.device)
            chosen = [images[place] for place in places]
            found = self._gradient(layout, start[chosen], difference[chosen], targets[chosen], select)
            some = sums[chosen].contiguous(memory_format=torch.channels_last)
            add_weighted(
                some.permute(0, 2, 3, 1), found.values, layout.order, layout.begin,
                layout.weights * found.factors[layout.order],
            )  # fmt: skip
            sums[chosen] = some
            for i, part, last in zip(chosen, parts, layout.last, strict=True):
                if alphas[-1] == 1 and part.stop == m:
                    f_x[i] = found.outputs[last]

    def _layout(self, alphas: list[Floats], weights: list[Floats], device: torch.device) -> _Layout:
        key = b"".join(b"%d;" % len(one) + one.tobytes() + other.tobytes() for one, other in zip(alphas, weights, strict=True))
        if key not in self._layouts:
            if len(self._layouts) > 100 * _GRAPHS:  # each image may have steps of its own
                self._layouts.clear()
            self._layouts[key] = _Layout.of(alphas, weights, device)
        return self._layouts[key]

    def _gradient(self, layout: _Layout, start: Tensor, difference: Tensor, targets: Tensor, select: Select) -> Gradient:
        def run(start: Tensor, difference: Tensor, targets: Tensor) -> Gradient:
            path = Path(start, difference, layout.image, layout.alpha, layout.batch)
            at_points = targets[layout.image]
            return self.lines.gradient(path, lambda scores: select(scores, at_points))

        if start.device.type != "cuda":
            return run(start, difference, targets)
        key = id(layout)
        if key not in self._graphs:
            layout.runs += 1
            if layout.runs <= _WARM_UP or len(self._graphs) >= _GRAPHS:
                return run(start, difference, targets)
            self._graphs[key] = _Captured(run, start, difference, targets)
        return self._graphs[key](start, difference, targets)


class _Captured:
    """A function of tensors whose kernels are launched together, without Python: a CUDA graph."""

    def __init__(self, function: Callable[..., Gradient], *inputs: Tensor) -> None:
        self._inputs = [one.clone() for one in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Gradient:
        """The function's results, which the next call overwrites."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._outputs


@dataclass
class _Layout:
    """How a batch's points lie on their images' lines.

    Attributes
    ----------
    image, alpha
        Of the points in the batch's order: the image's place in the batch, int64, and the place on its line, float32.
    order, begin, weights
        The points image by image, int64; where each image's begin, int32; and their weights, float32.
    last
        Of each image, its last point in the batch's order.
    """

    batch: Batch
    image: Tensor
    alpha: Tensor
    order: Tensor
    begin: Tensor
    weights: Tensor
    last: list[int]
    runs: int = 0

    @classmethod
    def of(cls, alphas: list[Floats], weights: list[Floats], device: torch.device) -> _Layout:
        batch = batch_of(alphas, device)
        counts = [len(one) for one in alphas]
        image = torch.arange(len(alphas), device=device).repeat_interleave(torch.tensor(counts, device=device))
        alpha = torch.tensor(np.concatenate(alphas), dtype=torch.float32, device=device)
        order = torch.argsort(batch.order)  # the batch's place of each point
        begin = np.concatenate([[0], np.cumsum(counts)])
        return cls(
            batch=batch,
            image=image[batch.order],
            alpha=alpha[batch.order],
            order=order,
            begin=torch.tensor(begin, dtype=torch.int32, device=device),
            weights=torch.tensor(np.concatenate(weights), dtype=torch.float32, device=device),
            last=order.cpu()[begin[1:] - 1].tolist(),
        )
