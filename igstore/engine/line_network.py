"""A network in steps that compute on points of straight lines: forwards as exact as float32, backwards in float16.

Convolutions, what surrounds them, concatenations and pooling are computed on `igstore.engine.line` values; whatever else
there is, torch computes in float32 on all points. `igstore.engine.line_tracing` makes the steps of a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from igstore.engine.line import Batch, Value, interpolated, materialise, represent, split
from igstore.engine.line_convolution import LineConvolution
from igstore.engine.line_operations import Operation

Held = dict[Any, Any]  # by node: values, or torch's tensors; and by (ACTIVE, node), where gradients pass a clamp
Gradients = dict[fx.Node, Tensor]
Backward = Callable[[Gradients], None]

ACTIVE = "active"


@dataclass(frozen=True)
class Path:
    """The points of a batch, in its order: ``start[image] + alpha difference[image]``.

    Attributes
    ----------
    start, difference
        Float32 (image, channel, y, x), channels last.
    image, alpha
        int64 and float32 (point,).
    batch
        The order and the references.
    """

    start: Tensor
    difference: Tensor
    image: Tensor
    alpha: Tensor
    batch: Batch


class Gradient(NamedTuple):
    """Gradients at points (point, y, x, channel), the factor of each (point,), and the outputs (point,)."""

    values: Tensor
    factors: Tensor
    outputs: Tensor


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
    """Gradients of a network at batches of points.

    Parameters
    ----------
    steps
        In order.
    source, scores
        The nodes of the network's input and output. Steps that begin with the path write gradients at its points to the
        former.
    """

    def __init__(self, steps: Sequence[Step], source: fx.Node, scores: fx.Node) -> None:
        self.steps = steps
        self._source, self._scores = source, scores
        last_use = {scores: len(steps)}
        for place, step in enumerate(steps):
            last_use |= {node: max(last_use.get(node, 0), place) for node in step.reads}
        self._unused_after: list[list[fx.Node]] = [[] for _ in range(len(steps) + 1)]
        for node, place in last_use.items():
            self._unused_after[place].append(node)

    @torch.no_grad()
    def gradient(self, path: Path, select: Callable[[Tensor], Tensor]) -> Gradient:
        """Gradients at the points of a path.

        Parameters
        ----------
        select
            From scores (point, class) to outputs (point,), each of its own point's alone.
        """
        held: Held = {}
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
        # probabilities have slopes of any size; float16 has not
        _, exponents = torch.frexp(at_scores.abs().amax(dim=1))
        at_scores = torch.ldexp(at_scores, -exponents[:, None])
        gradients: Gradients = {self._scores: at_scores}
        while backwards:
            backwards.pop()(gradients)
        values = gradients[self._source]
        return Gradient(values, torch.ldexp(torch.ones_like(outputs), exponents), outputs.detach())


def _add(gradients: Gradients, node: fx.Node, gradient: Tensor) -> None:
    gradients[node] = gradients[node] + gradient if node in gradients else gradient


# --- Between the path, values and torch's tensors; scales are what values and gradients are multiplied by where held


class PathValue(Step):
    """The points themselves, as a value."""

    scale, gradient_scale = 1.0, 1.0

    def __init__(self, source: fx.Node, target: fx.Node) -> None:
        self.reads, self.writes, self._source = [], [target], source

    def forward(self, held: Held, path: Path) -> Backward:
        n = path.batch.n_references
        references = interpolated(path.start, path.difference, path.image[:n], path.alpha[:n])
        (target,) = self.writes
        held[target] = Value(split(references.permute(0, 2, 3, 1) * self.scale), None)

        def backward(gradients: Gradients) -> None:
            gradient = gradients.pop(target)
            before = gradients.pop(self._source, None)
            if before is None and self.gradient_scale == 1:
                gradients[self._source] = gradient
            else:
                gradient = gradient.float() / self.gradient_scale
                gradients[self._source] = gradient if before is None else gradient + before

        return backward


class PathPoints(Step):
    """The points themselves, as torch's tensor."""

    def __init__(self, source: fx.Node, target: fx.Node) -> None:
        self.reads, self.writes, self._source = [], [target], source

    def forward(self, held: Held, path: Path) -> Backward:
        (target,) = self.writes
        held[target] = interpolated(path.start, path.difference, path.image, path.alpha)

        def backward(gradients: Gradients) -> None:
            _add(gradients, self._source, gradients.pop(target).permute(0, 2, 3, 1).contiguous())

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
            _add(gradients, source, gradients.pop(target).permute(0, 3, 1, 2).float() / self.gradient_scale)

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
            _add(gradients, source, gradient.half().contiguous())

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
                    _add(gradients, node, gradient)

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
        return held.get((ACTIVE, node)) if self.gates else None

    def at_outputs(self, gradients: Gradients, active: Tensor | None) -> Tensor:
        """The gradient before the clamp."""
        gradient = gradients.pop(self.writes[0])
        return gradient if active is None or self.reader_gates else gradient * active


class Convolve(Clamped):
    """A convolution, with a sum and a clamp after it."""

    def __init__(self, module: LineConvolution, x: fx.Node, addend: fx.Node | None, node: fx.Node) -> None:
        self.module, self.x, self.addend = module, x, addend
        self.reads, self.writes = [x] if addend is None else [x, addend], [node]

    def forward(self, held: Held, path: Path) -> Backward:
        (target,) = self.writes
        x = held[self.x]
        held[target], active = self.module.outputs(x, None if self.addend is None else held[self.addend], path.batch)
        held[ACTIVE, target] = active
        gate = self.gate(held, self.x)
        height, width, _ = x.shape

        def backward(gradients: Gradients) -> None:
            gradient = self.at_outputs(gradients, active)
            if self.addend is not None:
                _add(gradients, self.addend, gradient)
            gradients[self.x] = self.module.gradient(gradient, (height, width), gradients.pop(self.x, None), gate)

        return backward


class Operate(Clamped):
    """A batch norm, a clamp or pooling."""

    def __init__(self, operation: Operation, x: fx.Node, node: fx.Node) -> None:
        self.operation, self.x = operation, x
        self.reads, self.writes = [x], [node]

    def forward(self, held: Held, path: Path) -> Backward:
        (target,) = self.writes
        held[target], active, back = self.operation.outputs(held[self.x], path.batch)
        held[ACTIVE, target] = active
        gate = self.gate(held, self.x)

        def backward(gradients: Gradients) -> None:
            gradient = self.at_outputs(gradients, active)
            gradients[self.x] = back(gradient, gradients.pop(self.x, None), gate)

        return backward


class Concatenate(Step):
    """Values one after the other, by channels."""

    def __init__(self, parts: list[fx.Node], node: fx.Node) -> None:
        self.reads, self.writes = parts, [node]

    def forward(self, held: Held, path: Path) -> Backward:
        (target,) = self.writes
        values: list[Value] = [held[node] for node in self.reads]
        n = path.batch.n_differences
        differences = [
            value.pair.new_zeros((n, *value.shape)) if value.difference is None else value.difference for value in values
        ]
        held[target] = Value(torch.cat([value.pair for value in values], dim=-1), torch.cat(differences, dim=-1))
        sizes = [value.shape[2] for value in values]

        def backward(gradients: Gradients) -> None:
            for node, part in zip(self.reads, gradients.pop(target).split(sizes, dim=-1), strict=True):
                _add(gradients, node, part)

        return backward
