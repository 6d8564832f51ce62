"""A network in steps that compute on points of lines, forwards and backwards. `tracing` makes them.

Convolutions, what surrounds them, concatenations and pooling are computed on values
(`igstore.acceleration.lines.points`); whatever else there is, torch computes in float32 at every point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from igstore.acceleration.lines import reference
from igstore.acceleration.lines.filters import LineConvolution
from igstore.acceleration.lines.points import Bounds, Points, Value, Window, empty_value, split

Held = dict[Any, Any]  # by node: values or torch's tensors; by (LINE, node) and (PASSES, node) what these say
LINE = "line"  # the node's start and difference, (image, channel, y, x), as it is affine along the path
PASSES = "passes"  # where gradients pass the clamp of what the node holds


@dataclass(frozen=True)
class Path:
    """The points of a batch: ``start[image] + alpha difference[image]``.

    Attributes
    ----------
    start, difference
        Float32 (image, channel, y, x).
    points, image, alpha
        Which points are references; and of each point, in that order, its image, int64, and its place, float32.
    order, begin, weights
        The points image by image, int64 (point,); where each image's begin, int32 (image + 1,); and, in the order of
        `order`, the weights of their gradients in the image's sum, float32 (point,).
    operations
        What computes on values: `igstore.acceleration.lines.reference`, or a module of the same functions.
    """

    start: Tensor
    difference: Tensor
    points: Points
    image: Tensor
    alpha: Tensor
    order: Tensor
    begin: Tensor
    weights: Tensor
    operations: Any = reference


class Gradients(dict[fx.Node, Tensor]):
    """By node, gradients at points, multiplied by the node's scale; at affine nodes, each image's weighted sum of them.

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
        self.operations = path.operations

    def add(self, node: fx.Node, gradient: Tensor) -> None:
        """Add to a node's gradient."""
        self[node] = self[node] + gradient if node in self else gradient

    def add_sums(self, node: fx.Node, gradient: Tensor, scale: float) -> None:
        """Add to the sums of an affine node those of gradients at points, which were multiplied by `scale`."""
        path = self._path
        self.add(node, self.operations.weighted_sums(gradient, path.order, path.begin, self._weights / scale))


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
        """Write to `held`; what is returned takes the gradients at `writes` away and adds those at `reads`."""
        raise NotImplementedError


class LineNetwork:
    """Integrals of a network's gradients along lines.

    Parameters
    ----------
    prefix, lines
        A network from images (image, channel, y, x) to the values of some nodes, a tuple, and these nodes. It is
        affine, so it maps lines to lines, and two evaluations an image suffice.
    steps
        The rest, in order.
    scores
        The node of the network's output.
    largest
        How many numbers the largest value has, of one point, both halves of pairs counting.
    """

    def __init__(
        self,
        prefix: Callable[[Tensor], tuple[Tensor, ...]],
        lines: Sequence[fx.Node],
        steps: Sequence[Step],
        scores: fx.Node,
        largest: int,
    ) -> None:
        self.steps, self.largest = steps, largest
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
            From scores (point, class) to outputs (point,), each of its own point's scores alone.
        """
        backwards: list[Backward] = []
        with torch.enable_grad():
            start = path.start.detach().requires_grad_()
            at_start = self._prefix(start)
        scores = self._forward(path, at_start, backwards.append)
        with torch.enable_grad():
            scores.requires_grad_()
            outputs = select(scores)
            (at_scores,) = torch.autograd.grad(outputs.sum(), scores)
        # the slopes of probabilities are of any size, and numbers of float16 are not
        _, exponents = torch.frexp(at_scores.abs().amax(dim=1))
        gradients = Gradients(path, torch.ldexp(path.weights, exponents[path.order]))
        gradients[self._scores] = torch.ldexp(at_scores, -exponents[:, None])
        while backwards:
            backwards.pop()(gradients)
        sums = [gradients[node].permute(0, 3, 1, 2) for node in self._lines]
        (at_images,) = torch.autograd.grad(at_start, start, sums)
        return at_images, outputs.detach()

    @torch.no_grad()
    def scores(self, path: Path) -> Tensor:
        """The network's outputs, float32 (point, class)."""
        return self._forward(path, self._prefix(path.start), lambda _: None)

    def _forward(self, path: Path, at_start: Sequence[Tensor], keep: Callable[[Backward], None]) -> Tensor:
        at_end = self._prefix(path.start + path.difference)
        held: Held = {}
        for node, first, last in zip(self._lines, at_start, at_end, strict=True):
            first, last = (one.detach().contiguous(memory_format=torch.channels_last) for one in (first, last))
            held[LINE, node] = first, last - first
        for place, step in enumerate(self.steps):
            keep(step.forward(held, path))
            for node in self._unused_after[place]:
                held.pop(node, None)
        scores: Tensor = held[self._scores].detach()
        return scores


# --- Between lines, values and torch's tensors


class Scaled(Step):
    """A step between a value and something else.

    Attributes
    ----------
    value
        The value's node.
    scale, gradient_scale
        What the value, and its gradient, are multiplied by.
    """

    value: fx.Node
    scale, gradient_scale = 1.0, 1.0


class LineValue(Scaled):
    """Points on lines as a value."""

    def __init__(self, line: fx.Node, target: fx.Node) -> None:
        self._line, self.value = line, target
        self.reads, self.writes = [], [target]

    def forward(self, held: Held, path: Path) -> Backward:  # noqa: D102
        (target,) = self.writes
        n = path.points.n_references
        references = path.operations.interpolated(*held[LINE, self._line], path.image[:n], path.alpha[:n])
        held[target] = Value(split(references.permute(0, 2, 3, 1) * self.scale), None)

        def backward(gradients: Gradients) -> None:
            gradients.add_sums(self._line, gradients.pop(target), self.gradient_scale)

        return backward


class LineTensor(Step):
    """Points on lines as torch's tensor."""

    def __init__(self, line: fx.Node, target: fx.Node) -> None:
        self._line = line
        self.reads, self.writes = [], [target]

    def forward(self, held: Held, path: Path) -> Backward:  # noqa: D102
        (target,) = self.writes
        held[target] = path.operations.interpolated(*held[LINE, self._line], path.image, path.alpha)

        def backward(gradients: Gradients) -> None:
            gradients.add_sums(self._line, gradients.pop(target).permute(0, 2, 3, 1), 1.0)

        return backward


class Represent(Scaled):
    """What torch computed as a value."""

    def __init__(self, source: fx.Node, target: fx.Node) -> None:
        self.value = target
        self.reads, self.writes = [source], [target]

    def forward(self, held: Held, path: Path) -> Backward:  # noqa: D102
        (source,), (target,) = self.reads, self.writes
        held[target] = path.operations.represent(held[source].detach().permute(0, 2, 3, 1), path.points, self.scale)

        def backward(gradients: Gradients) -> None:
            gradients.add(source, gradients.pop(target).permute(0, 3, 1, 2).float() / self.gradient_scale)

        return backward


class Materialise(Scaled):
    """A value as torch's tensor."""

    def __init__(self, source: fx.Node, target: fx.Node) -> None:
        self.value = source
        self.reads, self.writes = [source], [target]

    def forward(self, held: Held, path: Path) -> Backward:  # noqa: D102
        (source,), (target,) = self.reads, self.writes
        held[target] = path.operations.materialise(held[source], path.points, 1 / self.scale).permute(0, 3, 1, 2)

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

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], reads: list[fx.Node], writes: list[fx.Node]
    ) -> None:
        self.function, self.reads, self.writes = function, reads, writes

    def forward(self, held: Held, path: Path) -> Backward:  # noqa: D102
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


# --- On values


class Operation(Step):
    """From a value x to another one, which may be clamped.

    Attributes
    ----------
    keeps_scale
        Whether the outputs are as large as the inputs, so that they are multiplied by the same.
    reader_gates
        The step that reads the outputs first is the last to add to their gradient; it lets none pass where they are
        clamped.
    gates
        This step does so for x.
    """

    keeps_scale = False
    reader_gates = False
    gates = False

    def __init__(self, x: fx.Node, node: fx.Node) -> None:
        self.x = x
        self.reads, self.writes = [x], [node]

    def set_scales(self, values: tuple[float, float], gradients: tuple[float, float]) -> None:
        """Say by what values, and gradients, are multiplied where they are held: at the inputs and at the outputs."""

    def passes_of_x(self, held: Held) -> Tensor | None:
        """Where gradients pass the clamp of x, if that is for this step to see to."""
        return held.get((PASSES, self.x)) if self.gates else None

    def gradient_at_outputs(self, gradients: Gradients, passes: Tensor | None) -> Tensor:
        """The gradient before the outputs' clamp."""
        gradient = gradients.pop(self.writes[0])
        if passes is None or self.reader_gates:
            return gradient
        return gradients.operations.affine_backward(gradient, None, None, passes)  # type: ignore[no-any-return]


class Convolve(Operation):
    """A convolution, with a sum and a clamp after it."""

    def __init__(self, module: LineConvolution, x: fx.Node, addend: fx.Node | None, node: fx.Node) -> None:
        super().__init__(x, node)
        self._module, self.addend = module, addend
        if addend is not None:
            self.reads.append(addend)

    def set_scales(self, values: tuple[float, float], gradients: tuple[float, float]) -> None:  # noqa: D102
        self._module.set_scales(values, gradients)

    def forward(self, held: Held, path: Path) -> Backward:  # noqa: D102
        (target,) = self.writes
        x = held[self.x]
        addend = None if self.addend is None else held[self.addend]
        held[target], passes = path.operations.convolve(x, addend, self._module, path.points)
        held[PASSES, target] = passes
        passes_of_x, sides = self.passes_of_x(held), x.shape[:2]

        def backward(gradients: Gradients) -> None:
            gradient = self.gradient_at_outputs(gradients, passes)
            if self.addend is not None:
                gradients.add(self.addend, gradient)
            before = gradients.pop(self.x, None)
            gradients[self.x] = path.operations.convolve_backward(gradient, sides, self._module, before, passes_of_x)

        return backward


class Affine(Operation):
    """``clamp(scale x + shift, *bounds)``, scale and shift being float32 (channel,): a batch norm, or a clamp alone."""

    def __init__(self, scale: Tensor, shift: Tensor, bounds: Bounds, x: fx.Node, node: fx.Node) -> None:
        super().__init__(x, node)
        self._own_scale, self._own_shift, self._own_bounds = scale, shift, bounds
        self.set_scales((1.0, 1.0), (1.0, 1.0))

    def set_scales(self, values: tuple[float, float], gradients: tuple[float, float]) -> None:  # noqa: D102
        at_input, at_output = values
        self._scale, self._shift = self._own_scale * (at_output / at_input), self._own_shift * at_output
        self._bounds = self._own_bounds[0] * at_output, self._own_bounds[1] * at_output
        self._backward_scale = self._own_scale * (gradients[0] / gradients[1])

    def forward(self, held: Held, path: Path) -> Backward:  # noqa: D102
        (target,) = self.writes
        x = held[self.x]
        held[target], passes = path.operations.affine(x, self._scale, self._shift, self._bounds, path.points)
        held[PASSES, target] = passes
        passes_of_x = self.passes_of_x(held)

        def backward(gradients: Gradients) -> None:
            gradient = self.gradient_at_outputs(gradients, passes)
            before = gradients.pop(self.x, None)
            scale = self._backward_scale
            gradients[self.x] = path.operations.affine_backward(gradient, scale, before, passes_of_x)

        return backward


class MaxPool(Operation):
    """The largest value of each window, clamped."""

    keeps_scale = True

    def __init__(self, window: Window, bounds: Bounds, x: fx.Node, node: fx.Node) -> None:
        super().__init__(x, node)
        self._window, self._own_bounds = window, bounds
        self._bounds = bounds

    def set_scales(self, values: tuple[float, float], gradients: tuple[float, float]) -> None:  # noqa: D102
        self._bounds = self._own_bounds[0] * values[1], self._own_bounds[1] * values[1]

    def forward(self, held: Held, path: Path) -> Backward:  # noqa: D102
        (target,) = self.writes
        x = held[self.x]
        held[target], passes, where = path.operations.max_pool(x, self._window, self._bounds, path.points)
        held[PASSES, target] = passes
        passes_of_x, sides = self.passes_of_x(held), x.shape[:2]

        def backward(gradients: Gradients) -> None:
            gradient = self.gradient_at_outputs(gradients, passes)
            before = gradients.pop(self.x, None)
            gradients[self.x] = path.operations.max_pool_backward(
                gradient, where, sides, self._window, before, passes_of_x
            )

        return backward


class MeanPool(Operation):
    """The mean of each window."""

    keeps_scale = True

    def __init__(self, window: Window, x: fx.Node, node: fx.Node) -> None:
        super().__init__(x, node)
        self._window = window

    def forward(self, held: Held, path: Path) -> Backward:  # noqa: D102
        (target,) = self.writes
        x = held[self.x]
        held[target] = path.operations.mean_pool(x, self._window, path.points)
        passes_of_x, sides = self.passes_of_x(held), x.shape[:2]

        def backward(gradients: Gradients) -> None:
            gradient, before = gradients.pop(target), gradients.pop(self.x, None)
            gradients[self.x] = path.operations.mean_pool_backward(gradient, sides, self._window, before, passes_of_x)

        return backward


class Concatenate(Step):
    """Values one after the other, by channels.

    Attributes
    ----------
    room
        Channels to make room for, where other concatenations extend this one.
    extends
        Whether the first part has made room for the others.
    """

    room = 0
    extends = False

    def __init__(self, parts: list[fx.Node], node: fx.Node) -> None:
        self.reads, self.writes = parts, [node]

    def forward(self, held: Held, path: Path) -> Backward:  # noqa: D102
        (target,) = self.writes
        parts: list[Value] = [held[node] for node in self.reads]
        sizes = [part.shape[2] for part in parts]
        total = sum(sizes)
        room = parts[0].room if self.extends else None
        new = list(zip(parts, accumulate(sizes), strict=True))  # what is to be written, and where it ends
        if room is None:
            height, width, _ = parts[0].shape
            room = empty_value(path.points, height, width, max(total, self.room), parts[0].pair.device)
        else:
            new = new[1:]
        assert room.difference is not None
        for part, last in new:
            first = last - part.shape[2]
            room.pair[..., first:last] = part.pair
            room.difference[..., first:last] = 0 if part.difference is None else part.difference
        held[target] = Value(room.pair[..., :total], room.difference[..., :total], room)

        def backward(gradients: Gradients) -> None:
            for node, part in zip(self.reads, torch.split(gradients.pop(target), sizes, dim=-1), strict=True):
                gradients.add(node, part)

        return backward
