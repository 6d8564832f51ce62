"""A network in steps that compute on points of straight lines: forwards as exact as float32, backwards in float16.

Convolutions, what surrounds them, concatenations and pooling are computed on `igstore.engine.line` values; whatever else
there is, torch computes in float32 on all points. `igstore.engine.line_tracing` makes the steps of a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from igstore.engine.line import Batch, Value, empty_value, gated, interpolated, materialise, represent, split, weighted_sums
from igstore.engine.line_convolution import LineConvolution
from igstore.engine.line_operations import Operation

Held = dict[Any, Any]  # by node: values or torch's tensors; by (LINE, node) and (PASSES, node) what these say
LINE = "line"  # the node's start and difference, (image, channel, y, x): it depends on the place on the path linearly
PASSES = "passes"  # where gradients pass the clamp of what the node holds


@dataclass(frozen=True)
class Path:
    """The points of a batch, in its order: ``start[image] + alpha difference[image]``.

    Attributes
    ----------
    start, difference
        Float32 (image, channel, y, x).
    image, alpha
        int64 and float32 (point,).
    batch
        The order and the references.
    order, begin, weights
        The points image by image, int64 (point,); where each image's begin, int32 (image + 1,); and what their gradients
        weigh in the image's sum, float32 (point,), as `order` has them.
    """

    start: Tensor
    difference: Tensor
    image: Tensor
    alpha: Tensor
    batch: Batch
    order: Tensor
    begin: Tensor
    weights: Tensor


class Gradients(dict[fx.Node, Tensor]):
    """By node, gradients at points; at nodes on lines, each image's sum, float32 (image, y, x, channel).

    Parameters
    ----------
    path
        The points.
    weights
        As `Path.weights`, for the gradients as they are here.
    """

    def __init__(self, path: Path, weights: Tensor) -> None:
        super().__init__()
        self._path, self._weights = path, weights

    def add(self, node: fx.Node, gradient: Tensor) -> None:
        """Add to a node's gradient."""
        self[node] = self[node] + gradient if node in self else gradient

    def add_sums(self, node: fx.Node, gradient: Tensor, scale: float) -> None:
        """Add to the sums of a node on lines those of gradients (point, y, x, channel), which were multiplied by `scale`."""
        self.add(node, weighted_sums(gradient, self._path.order, self._path.begin, self._weights / scale))


Backward = Callable[[Gradients], None]


class Step:
    """Computes what some nodes hold from what others hold.

    Attributes
    ----------
    reads, writes
        Nodes.
    """

    reads: list[fx.Node]
    writes: list[fx.Node]

    def forward(self, held: Held, path: Path) -> Backward:
        """Write to `held`; what is returned takes gradients at `writes` away and adds those at `reads`."""
        raise NotImplementedError


class LineNetwork:
    """Integrals of a network's gradients along lines.

    Parameters
    ----------
    prefix, lines
        From images (image, channel, y, x) to what some nodes hold, a tuple, affinely: with the path they are on lines too.
    steps
        The rest, in order.
    scores
        The node of the network's output.
    """

    def __init__(
        self,
        prefix: Callable[[Tensor], tuple[Tensor, ...]],
        lines: Sequence[fx.Node],
        steps: Sequence[Step],
        scores: fx.Node,
    ) -> None:
        self.steps = steps
        self._prefix, self._lines, self._scores = prefix, lines, scores
        last_use = {scores: len(steps)}
        for place, step in enumerate(steps):
            last_use |= {node: max(last_use.get(node, 0), place) for node in step.reads}
        self._unused_after: list[list[fx.Node]] = [[] for _ in range(len(steps) + 1)]
        for node, place in last_use.items():
            self._unused_after[place].append(node)

    @torch.no_grad()
    def integrate(self, path: Path, select: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Each image's weighted sum of gradients, float32 (image, channel, y, x), and the outputs, (point,).

        Parameters
        ----------
        select
            From scores (point, class) to outputs (point,), each of its own point's alone.
        """
        with torch.enable_grad():
            start = path.start.detach().requires_grad_()
            at_start = self._prefix(start)
        at_end = self._prefix(path.start + path.difference)
        held: Held = {}
        for node, first, last in zip(self._lines, at_start, at_end, strict=True):
            first, last = (one.detach().contiguous(memory_format=torch.channels_last) for one in (first, last))
            held[LINE, node] = first, last - first
        backwards: list[Backward] = []
        for place, step in enumerate(self.steps):
            backwards.append(step.forward(held, path))
            for node in self._unused_after[place]:
                held.pop(node, None)
        with torch.enable_grad():
            scores = held[self._scores].detach().requires_grad_()
            outputs = select(scores)
            (at_scores,) = torch.autograd.grad(outputs.sum(), scores)
        held.clear()
        # slopes of probabilities have any size; numbers of float16 have not
        _, exponents = torch.frexp(at_scores.abs().amax(dim=1))
        weights = torch.ldexp(path.weights, exponents[path.order])
        gradients = Gradients(path, weights)
        gradients[self._scores] = torch.ldexp(at_scores, -exponents[:, None])
        while backwards:
            backwards.pop()(gradients)
        sums = [gradients[node].permute(0, 3, 1, 2) for node in self._lines]
        (at_images,) = torch.autograd.grad(at_start, start, sums)
        return at_images, outputs.detach()


# --- Between lines, values and torch's tensors. Scales are what values and gradients are multiplied by where held.


class LineValue(Step):
    """Points on lines, as a value."""

    scale, gradient_scale = 1.0, 1.0

    def __init__(self, line: fx.Node, target: fx.Node) -> None:
        self._line = line
        self.reads, self.writes = [], [target]

    def forward(self, held: Held, path: Path) -> Backward:
        (target,) = self.writes
        start, difference = held[LINE, self._line]
        n = path.batch.n_references
        references = interpolated(start, difference, path.image[:n], path.alpha[:n])
        held[target] = Value(split(references.permute(0, 2, 3, 1) * self.scale), None)

        def backward(gradients: Gradients) -> None:
            gradients.add_sums(self._line, gradients.pop(target), self.gradient_scale)

        return backward


class LineTensor(Step):
    """Points on lines, as torch's tensor."""

    def __init__(self, line: fx.Node, target: fx.Node) -> None:
        self._line = line
        self.reads, self.writes = [], [target]

    def forward(self, held: Held, path: Path) -> Backward:
        (target,) = self.writes
        held[target] = interpolated(*held[LINE, self._line], path.image, path.alpha)

        def backward(gradients: Gradients) -> None:
            gradients.add_sums(self._line, gradients.pop(target).permute(0, 2, 3, 1), 1.0)

        return backward


class Represent(Step):
    """What torch computed, as a value."""

    scale, gradient_scale = 1.0, 1.0

    def __init__(self, source: fx.Node, target: fx.Node) -> None:
        self.reads, self.writes = [source], [target]

    def forward(self, held: Held, path: Path) -> Backward:
        (source,), (target,) = self.reads, self.writes
        held[target] = represent(held[source].detach().permute(0, 2, 3, 1), path.batch, self.scale)

        def backward(gradients: Gradients) -> None:
            gradients.add(source, gradients.pop(target).permute(0, 3, 1, 2).float() / self.gradient_scale)

        return backward


class Materialise(Step):
    """A value as torch's tensor."""

    scale, gradient_scale = 1.0, 1.0

    def __init__(self, source: fx.Node, target: fx.Node) -> None:
        self.reads, self.writes = [source], [target]

    def forward(self, held: Held, path: Path) -> Backward:
        (source,), (target,) = self.reads, self.writes
        held[target] = materialise(held[source], path.batch, 1 / self.scale).permute(0, 3, 1, 2)

        def backward(gradients: Gradients) -> None:
            gradient = gradients.pop(target).permute(0, 2, 3, 1) * self.gradient_scale
            gradients.add(source, gradient.half().contiguous())

        return backward


class Torch(Step):
    """What torch computes in float32, and differentiates.

    Parameters
    ----------
    function
        From what `reads` hold to what `writes` hold, a tuple.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], reads: list[fx.Node], writes: list[fx.Node]) -> None:
        self.function, self.reads, self.writes = function, reads, writes

    def forward(self, held: Held, path: Path) -> Backward:
        inputs = [held[node].detach().requires_grad_() for node in self.reads]
        with torch.enable_grad():
            outputs = self.function(*inputs)
        held.update(zip(self.writes, outputs, strict=True))

        def backward(gradients: Gradients) -> None:
            pairs = zip(self.writes, outputs, strict=True)
            at_outputs = [(output, gradients.pop(node)) for node, output in pairs if node in gradients]
            found = torch.autograd.grad(
                [output for output, _ in at_outputs], inputs, [one for _, one in at_outputs], allow_unused=True
            )
            for node, gradient in zip(self.reads, found, strict=True):
                if gradient is not None:
                    gradients.add(node, gradient)

        return backward


# --- Of values


class Clamped(Step):
    """A step whose outputs may be clamped.

    Attributes
    ----------
    reader_gates
        The step that reads the outputs first, and so is the last to add to their gradient, lets none pass where they are
        clamped.
    gates
        This step does so for what it reads.
    """

    reader_gates = False
    gates = False

    def gate(self, held: Held, node: fx.Node) -> Tensor | None:
        """Where gradients pass the clamp of what a node holds, if that is for this step to see to."""
        return held.get((PASSES, node)) if self.gates else None

    def at_outputs(self, gradients: Gradients, passes: Tensor | None) -> Tensor:
        """The gradient before the clamp."""
        gradient = gradients.pop(self.writes[0])
        return gradient if passes is None or self.reader_gates else gated(gradient, passes)


class Convolve(Clamped):
    """A convolution, with a sum and a clamp after it."""

    def __init__(self, module: LineConvolution, x: fx.Node, addend: fx.Node | None, node: fx.Node) -> None:
        self.module, self.x, self.addend = module, x, addend
        self.reads, self.writes = [x] if addend is None else [x, addend], [node]

    def forward(self, held: Held, path: Path) -> Backward:
        (target,) = self.writes
        x = held[self.x]
        held[target], passes = self.module.outputs(x, None if self.addend is None else held[self.addend], path.batch)
        held[PASSES, target] = passes
        gate = self.gate(held, self.x)
        height, width, _ = x.shape

        def backward(gradients: Gradients) -> None:
            gradient = self.at_outputs(gradients, passes)
            if self.addend is not None:
                gradients.add(self.addend, gradient)
            gradients[self.x] = self.module.gradient(gradient, (height, width), gradients.pop(self.x, None), gate)

        return backward


class Operate(Clamped):
    """A batch norm, a clamp or pooling."""

    def __init__(self, operation: Operation, x: fx.Node, node: fx.Node) -> None:
        self.operation, self.x = operation, x
        self.reads, self.writes = [x], [node]

    def forward(self, held: Held, path: Path) -> Backward:
        (target,) = self.writes
        held[target], passes, back = self.operation.outputs(held[self.x], path.batch)
        held[PASSES, target] = passes
        gate = self.gate(held, self.x)

        def backward(gradients: Gradients) -> None:
            gradient = self.at_outputs(gradients, passes)
            gradients[self.x] = back(gradient, gradients.pop(self.x, None), gate)

        return backward


class Concatenate(Step):
    """Values one after the other, by channels.

    Attributes
    ----------
    room
        Channels to make room for, as more is to follow; 0 where the first part has made room for the others.
    """

    room = -1  # no more than there are

    def __init__(self, parts: list[fx.Node], node: fx.Node) -> None:
        self.reads, self.writes = parts, [node]

    def forward(self, held: Held, path: Path) -> Backward:
        (target,) = self.writes
        parts: list[Value] = [held[node] for node in self.reads]
        sizes = [part.shape[2] for part in parts]
        height, width, _ = parts[0].shape
        total = sum(sizes)
        room = parts[0].room
        begin = sizes[0]
        if self.room or room is None:
            room = empty_value(path.batch, height, width, max(total, self.room), parts[0].pair.device)
            begin = 0
        assert room.difference is not None
        for part, first in zip(parts, [0, *accumulate(sizes)], strict=False):
            if first >= begin:
                last = first + part.shape[2]
                room.pair[..., first:last] = part.pair
                room.difference[..., first:last] = 0 if part.difference is None else part.difference
        held[target] = Value(room.pair[..., :total], room.difference[..., :total], room)

        def backward(gradients: Gradients) -> None:
            for node, part in zip(self.reads, gradients.pop(target).split(sizes, dim=-1), strict=True):
                gradients.add(node, part)

        return backward
