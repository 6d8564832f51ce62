"""From a network to the steps of a `LineNetwork`."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, fx, nn

from igstore.acceleration.lines.filters import LineConvolution
from igstore.acceleration.lines.graph import (
    BatchNorm,
    Clamping,
    MaxPooling,
    MeanPooling,
    affine_nodes,
    is_concatenation,
    module_of,
    recognised,
    shape_of,
    traced,
)
from igstore.acceleration.lines.points import UNBOUNDED, Bounds
from igstore.acceleration.lines.scales import set_scales
from igstore.acceleration.lines.steps import (
    Affine,
    Concatenate,
    Convolve,
    LineNetwork,
    LineTensor,
    LineValue,
    Materialise,
    MaxPool,
    MeanPool,
    Operation,
    Represent,
    Step,
    Torch,
)

logger = logging.getLogger(__name__)


def line_network(network: nn.Module, images: Tensor) -> LineNetwork | None:
    """`network` in steps; None where its graph cannot be had, or none of its convolutions can be computed on values.

    Parameters
    ----------
    network
        In evaluation mode, batch norms folded or `igstore.acceleration.activations.ScaleAndShift`; left as it is, its
        parameters shared.
    images
        (image, channel, y, x), at least two, much like those to come: they say how large values become.
    """
    try:
        graph = traced(network, images)
    except Exception as error:  # see `traced`
        logger.info("the network's graph cannot be had: %s", error)
        return None
    return _Builder(graph, images).network()


class _Builder:
    """Makes steps of a graph's nodes, which are held as values, as torch's tensors, or both; affine ones on lines."""

    def __init__(self, graph: fx.GraphModule, images: Tensor) -> None:
        self._graph, self._images = graph, images
        self._nodes = list(graph.graph.nodes)
        self._on_lines = affine_nodes(graph)
        self._lines: list[fx.Node] = []  # those that steps read
        self._steps: list[Step] = []
        self._pending: list[fx.Node] = []  # that torch is to compute together
        self._names = fx.Graph()  # of nodes that stand for others in another form
        self._originals: dict[fx.Node, fx.Node] = {}  # of those
        self._values: dict[fx.Node, fx.Node] = {}  # as which a node is held
        self._tensors: dict[fx.Node, fx.Node] = {}
        self._makers: dict[fx.Node, Operation] = {}  # of values
        self._read: set[fx.Node] = set()
        self._clamps: dict[fx.Node, Bounds] = {}  # left to the max pooling that reads them
        self._concatenations: dict[tuple[fx.Node, ...], fx.Node] = {}  # by their parts

    def network(self) -> LineNetwork | None:
        """The network, if some of it is convolutions of values."""
        output = self._nodes[-1].args[0]
        for node in self._nodes[:-1]:
            if node not in self._on_lines and not self._take(node):
                self._pending.append(node)
        if not isinstance(output, fx.Node) or not any(isinstance(step, Convolve) for step in self._steps):
            return None
        scores = self._tensor(output)
        self._flush()
        self._make_room()
        set_scales(self._steps, self._graph, self._images, self._originals)
        prefix = self._function(self._on_lines[1:], self._on_lines[:1], self._lines)
        shapes = filter(None, map(shape_of, self._nodes))
        largest = 2 * max(math.prod(shape[1:]) for shape in shapes)
        return LineNetwork(prefix, self._lines, self._steps, scores, largest)

    # --- What a node does

    def _take(self, node: fx.Node) -> bool:
        """Add the step that computes a node on values, if there is one."""
        if node in self._values:  # a clamp that another step sees to
            return True
        module = module_of(node, self._graph)
        if isinstance(module, LineConvolution) and not node.kwargs:
            values = [self._value(one) for one in node.args if isinstance(one, fx.Node)]
            addend = values[1] if len(values) > 1 else None
            self._read.update(values[1:])  # to their gradients is added before x's
            self._add(Convolve(module, values[0], addend, node))
            return True
        if is_concatenation(node, self._graph) and any(part in self._values for part in node.all_input_nodes):
            self._concatenate(node)
            return True
        x = node.args[0] if node.args else None
        if not isinstance(x, fx.Node) or not (x in self._values or x in self._on_lines):
            return False
        match recognised(node, self._graph):
            case MaxPooling(window):
                bounds = self._clamps.get(x, UNBOUNDED)
                self._add(MaxPool(window, bounds, self._value(x), node))
            case MeanPooling(window):
                self._add(MeanPool(window, self._value(x), node))
            case BatchNorm(scale, shift):
                bounds, last = self._clamp_after(node)
                self._add(Affine(scale, shift, bounds, self._value(x), last))
                self._values[node] = last
            case Clamping(bounds):
                self._clamp(node, x, bounds)
            case _:
                return False
        return True

    def _add(self, step: Operation) -> None:
        """Add a step, and have it see to the clamp of what it reads if it is the first to do so.

        It is the last to add to that gradient.
        """
        x, (node,) = step.x, step.writes
        if x in self._makers and x not in self._read:
            self._makers[x].reader_gates = step.gates = True
        self._read.add(x)
        self._steps.append(step)
        self._values[node] = node
        self._makers[node] = step

    def _clamp(self, node: fx.Node, x: fx.Node, bounds: Bounds) -> None:
        """Max pooling that alone reads a clamp can as well clamp its results, of which there are fewer."""
        readers = list(node.users)
        if len(readers) == 1 and isinstance(recognised(readers[0], self._graph), MaxPooling):
            self._values[node] = self._value(x)
            self._clamps[node] = bounds
            return
        channels, device = shape_of(node)[1], self._images.device  # type: ignore[index]
        scale, shift = torch.ones(channels, device=device), torch.zeros(channels, device=device)
        self._add(Affine(scale, shift, bounds, self._value(x), node))

    def _clamp_after(self, node: fx.Node) -> tuple[Bounds, fx.Node]:
        """The bounds of a clamp that alone reads a node, and its node; else none, and the node."""
        readers = list(node.users)
        found = recognised(readers[0], self._graph) if len(readers) == 1 else None
        return (found.bounds, readers[0]) if isinstance(found, Clamping) else (UNBOUNDED, node)

    def _concatenate(self, node: fx.Node) -> None:
        """Concatenate what is concatenated already, as dense blocks do again and again, and the rest."""
        whole = tuple(self._value(one) for one in node.all_input_nodes)
        parts = list(whole)
        for n in range(len(whole) - 1, 1, -1):
            if whole[:n] in self._concatenations:
                parts = [self._concatenations[whole[:n]], *whole[n:]]
                break
        self._concatenations[whole] = node
        self._read.update(parts)
        self._steps.append(Concatenate(parts, node))
        self._values[node] = node

    def _make_room(self) -> None:
        """Have concatenations that others extend make room for these."""
        made = {step.writes[0]: step for step in self._steps if isinstance(step, Concatenate)}
        extended: set[fx.Node] = set()
        for node, step in reversed(made.items()):
            first = step.reads[0]
            if first in made and first not in extended:
                extended.add(first)
                made[first].room = max(step.room, shape_of(node)[1])  # type: ignore[index]
                step.extends = True

    # --- How a node is held

    def _name(self, node: fx.Node, form: str) -> fx.Node:
        name = self._names.placeholder(f"{node.name}_{form}")
        self._originals[name] = node
        return name

    def _is_line(self, node: fx.Node) -> bool:
        """Whether a node is on lines; if so, steps read it."""
        if node in self._on_lines and node not in self._lines:
            self._lines.append(node)
        return node in self._on_lines

    def _value(self, node: fx.Node) -> fx.Node:
        """The node as which another one is held as a value."""
        if node in self._pending:
            self._flush()
        if node not in self._values:
            self._values[node] = self._name(node, "value")
            self._steps.append((LineValue if self._is_line(node) else Represent)(node, self._values[node]))
        return self._values[node]

    def _tensor(self, node: fx.Node) -> fx.Node:
        """The node as which another one is held as torch's tensor."""
        is_value = self._values.get(node) is node
        if node not in self._tensors and (is_value or node in self._on_lines):
            self._tensors[node] = self._name(node, "tensor")
            self._steps.append((LineTensor if self._is_line(node) else Materialise)(node, self._tensors[node]))
            self._read.add(node)
        return self._tensors.get(node, node)

    def _flush(self) -> None:
        """Add a step for what torch is to compute."""
        nodes, self._pending = self._pending, []
        if not nodes:
            return
        inside = set(nodes)
        inputs = list(dict.fromkeys(one for node in nodes for one in node.all_input_nodes if one not in inside))
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        reads = [self._tensor(node) for node in inputs]
        self._steps.append(Torch(self._function(nodes, inputs, outputs), reads, outputs))

    def _function(self, nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
        """Some nodes as a function from what some hold to what others hold, a tuple."""
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in inputs}
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in outputs))
        return fx.GraphModule(self._graph, graph)
