"""From a network to the steps of a `LineNetwork`: its graph, what is computed on values in it, and their sizes."""

from __future__ import annotations

import copy
import logging
import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional

from igstore.engine import fusion
from igstore.engine.activations import Clamp, ScaleAndShift
from igstore.engine.line_convolution import LineConvolution, fits
from igstore.engine.line_integral import OnLines
from igstore.engine.line_network import (
    Clamped,
    Concatenate,
    Convolve,
    LineNetwork,
    Materialise,
    Operate,
    LineTensor,
    LineValue,
    Represent,
    Step,
    Torch,
)
from igstore.engine.line_operations import UNBOUNDED, Affine, MaxPool, MeanPool, Operation
from igstore.engine.modules import replace

logger = logging.getLogger(__name__)

_CONCATENATIONS = (torch.cat, torch.concat)
_MAX_POOLS = (functional.max_pool2d, torch.max_pool2d)
_MEAN_POOLS = (functional.avg_pool2d, torch._C._nn.avg_pool2d)
_ADAPTIVE_POOLS = (functional.adaptive_avg_pool2d,)
_DROPOUTS = (nn.Dropout, nn.Dropout2d, functional.dropout, functional.dropout2d)

# What the largest of values, and of gradients, are brought near. float16 goes from 6e-8 to 65504.
_VALUES, _GRADIENTS = 2.0**6, 2.0**4


def on_lines(network: nn.Module, pictures: Tensor) -> OnLines | None:
    """A network with its form for points of lines, or None where it has none; as `line_network`."""
    lines = line_network(network, pictures)
    return None if lines is None else OnLines(network, lines)


def line_network(network: nn.Module, images: Tensor) -> LineNetwork | None:
    """`network` in steps; None where its graph cannot be had, or nothing in it can be computed on values.

    Parameters
    ----------
    network
        In evaluation mode, batch norms folded or `ScaleAndShift`; left as it is, and its parameters shared.
    images
        (image, channel, y, x), at least two, as they will come: they say how large values become.
    """
    network = copy.deepcopy(network, {id(one): one for one in (*network.parameters(), *network.buffers())})
    for module in list(network.modules()):
        if fits(module):
            replace(network, module, LineConvolution(module))  # type: ignore[arg-type]
        elif getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    try:
        traced = fx.GraphModule(network, _Tracer().trace(network))
        if not _out_of_place(traced):
            return None
        _simplify(traced)
        with torch.no_grad():
            ShapeProp(traced).propagate(images.clone())
    except Exception as error:  # what a network's code does with a stand-in for a tensor is anyone's guess
        logger.info("the network's graph cannot be had: %s", error)
        return None
    for node in list(traced.graph.nodes):
        module = fusion._module_of(node, traced)
        if isinstance(module, LineConvolution) and len(node.args) == 1 and not node.kwargs:
            fusion._take_sum(node, traced)
            fusion._take_activation(node, module, traced)  # type: ignore[arg-type]
    traced.graph.eliminate_dead_code()
    traced.recompile()
    with torch.no_grad():
        ShapeProp(traced).propagate(images.clone())
    builder = _Builder(traced, images)
    return builder.network()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = (LineConvolution, Clamp, ScaleAndShift, nn.Conv2d)
        return isinstance(m, own) or super().is_leaf_module(m, module_qualified_name)


def _out_of_place(traced: fx.GraphModule) -> bool:
    """Rewrite what happens in place; False where it is not known how."""
    for node in traced.graph.nodes:
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.kwargs.get("inplace") is True:
            node.kwargs = {**node.kwargs, "inplace": False}
        if node.target is operator.iadd:
            node.target = operator.add
        elif node.target is torch.relu_:
            node.target = torch.relu
        elif node.op == "call_method" and name in ("add_", "relu_"):
            node.target = name[:-1]
        elif node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__"):
            return False
    return True


def _simplify(traced: fx.GraphModule) -> None:
    """Leave out what does nothing in evaluation mode."""
    fusion._skip_identities(traced)
    for node in list(traced.graph.nodes):
        if fusion._is_call(node, traced, _CONCATENATIONS) and isinstance(node.args[0], (list, tuple)) and len(node.args[0]) == 1:
            fusion._take_the_place_of(node.args[0][0], node, traced)
        elif fusion._is_call(node, traced, _DROPOUTS) and isinstance(node.args[0], fx.Node):
            fusion._take_the_place_of(node.args[0], node, traced)


def _number(size: Any) -> int | None:
    """The one number that an option for both axes is."""
    numbers = {size} if isinstance(size, int) else set(size) if isinstance(size, (tuple, list)) else set()
    return numbers.pop() if len(numbers) == 1 else None


def _options(node: fx.Node, traced: fx.GraphModule, kinds: tuple[Any, ...], **defaults: Any) -> list[Any] | None:
    """The options of a node that calls one of some functions or modules, in the order of `defaults`; None if it does not."""
    if not fusion._is_call(node, traced, kinds):
        return None
    module = fusion._module_of(node, traced)
    if module is not None:
        return [getattr(module, name, default) for name, default in defaults.items()]
    given = dict(zip(defaults, node.args[1:], strict=False)) | dict(node.kwargs)
    return [given.get(name, default) for name, default in defaults.items()]


def _operation_of(node: fx.Node, traced: fx.GraphModule) -> Operation | None:
    """What a node does to images (image, channel, y, x), if it is an `Operation`."""
    x = node.args[0] if node.args else None
    shape = fusion._shape(x) if isinstance(x, fx.Node) else None
    if shape is not None and len(shape) != 4:
        return None
    module = fusion._module_of(node, traced)
    if isinstance(module, ScaleAndShift):
        return Affine(module.scale.flatten(), module.shift.flatten(), UNBOUNDED, keeps_size=False)
    names = {"kernel_size": None, "stride": None, "padding": 0}
    found = _options(node, traced, (nn.MaxPool2d, *_MAX_POOLS), **names, dilation=1, ceil_mode=False, return_indices=False)
    if found is not None:
        window, stride, padding = (_number(one) for one in (found[0], found[1] or found[0], found[2]))
        plain = _number(found[3]) == 1 and not found[4] and not found[5]
        if plain and window is not None and stride is not None and padding is not None:
            return MaxPool(window, stride, padding)
        return None
    found = _options(
        node, traced, (nn.AvgPool2d, *_MEAN_POOLS), **names, ceil_mode=False, count_include_pad=True, divisor_override=None
    )
    if found is not None:
        window, stride, padding = (_number(one) for one in (found[0], found[1] or found[0], found[2]))
        plain = not found[3] and (found[4] or padding == 0) and found[5] is None
        if plain and window is not None and stride is not None and padding is not None:
            return MeanPool(window, stride, padding)
        return None
    if shape is None:
        return None
    found = _options(node, traced, (nn.AdaptiveAvgPool2d, *_ADAPTIVE_POOLS), output_size=None)
    if found is not None:
        side, sides = _number(found[0]), set(shape[2:])
        if side is not None and len(sides) == 1 and sides.copy().pop() % side == 0:
            window = sides.pop() // side
            return MeanPool(window, window, 0)
        return None
    bounds = fusion._bounds(node, traced)
    if bounds is None:
        return None
    device = next(traced.parameters()).device
    return Affine(torch.ones(shape[1], device=device), torch.zeros(shape[1], device=device), bounds, keeps_size=True)


# What depends on its only argument affinely, whatever its options are.
_AFFINE_MODULES = (nn.Conv2d, nn.BatchNorm2d, ScaleAndShift, nn.AvgPool2d, nn.ZeroPad2d)
_AFFINE_FUNCTIONS = (operator.getitem, torch.unsqueeze, functional.pad, functional.avg_pool2d)
_AFFINE_METHODS = ("unsqueeze", "contiguous", "permute")
# What is affine if it is given numbers beside one argument.
_ARITHMETIC = (operator.mul, operator.truediv, operator.add, operator.sub, torch.mul, torch.div, torch.add, torch.sub)


def _affine_nodes(traced: fx.GraphModule) -> list[fx.Node]:
    """The network's input, and what depends on it affinely."""
    nodes: list[fx.Node] = []
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            nodes.append(node)
            continue
        inputs = node.all_input_nodes
        if not inputs or not all(one in nodes for one in inputs):
            continue
        module = fusion._module_of(node, traced)
        is_plain = isinstance(module, LineConvolution) and not module.bounded and len(inputs) == 1
        if (
            isinstance(module, _AFFINE_MODULES)
            or is_plain
            or (node.op == "call_function" and node.target in _AFFINE_FUNCTIONS)
            or (node.op == "call_function" and node.target in _ARITHMETIC and len(inputs) == 1)
            or (node.op == "call_method" and node.target in _AFFINE_METHODS)
            or fusion._is_call(node, traced, _CONCATENATIONS)
        ):
            nodes.append(node)
    return nodes


class _Builder:
    """Makes steps of a graph, whose nodes are on lines, values, or torch's tensors."""

    def __init__(self, traced: fx.GraphModule, images: Tensor) -> None:
        self._traced = traced
        self._images = images
        nodes = list(traced.graph.nodes)
        self._output = nodes[-1].args[0]
        self._on_lines = _affine_nodes(traced)
        self._lines: list[fx.Node] = []  # those that steps read
        self._steps: list[Step] = []
        self._pending: list[fx.Node] = []  # that torch is to compute together
        self._names = fx.Graph()  # of nodes that stand for others in another form
        self._values: dict[fx.Node, fx.Node] = {}  # as which a node is held
        self._tensors: dict[fx.Node, fx.Node] = {}
        self._makers: dict[fx.Node, Clamped] = {}  # of values
        self._read: set[fx.Node] = set()
        self._clamps: dict[fx.Node, tuple[float, float]] = {}  # left to the max pooling that reads them
        self._originals: dict[fx.Node, fx.Node] = {}
        self._concatenations: dict[tuple[fx.Node, ...], fx.Node] = {}  # by parts

    def network(self) -> LineNetwork | None:
        """The network, if some of it is convolutions of values."""
        for node in self._traced.graph.nodes:
            if node.op != "output" and node not in self._on_lines and not self._take(node):
                self._pending.append(node)
        if not isinstance(self._output, fx.Node) or not any(isinstance(step, Convolve) for step in self._steps):
            return None
        scores = self._tensor(self._output)
        self._flush()
        self._set_scales()
        self._make_room()
        prefix = self._function(self._on_lines[1:], self._on_lines[:1], self._lines)
        return LineNetwork(prefix, self._lines, self._steps, scores)

    def _take(self, node: fx.Node) -> bool:
        """Add the step that computes a node on values, if there is one."""
        if node in self._values:  # a clamp that another step has taken over
            return True
        module = fusion._module_of(node, self._traced)
        if isinstance(module, LineConvolution) and not node.kwargs:
            x, *addends = [self._value(one) for one in node.args if isinstance(one, fx.Node)]
            step: Step = Convolve(module, x, addends[0] if addends else None, node)
            self._read.update(addends)  # their gradients are added to before those of x
            self._gate(step, x)
        elif self._is_concatenation(node):
            parts = self._without_repetition([self._value(one) for one in node.args[0]])  # type: ignore[union-attr]
            step = Concatenate(parts, node)
            self._concatenations[tuple(self._value(one) for one in node.args[0])] = node  # type: ignore[union-attr]
            self._read.update(parts)
        elif self._is_near_values(node) and (operation := _operation_of(node, self._traced)) is not None:
            x = self._value(node.args[0])  # type: ignore[arg-type]
            if self._pools_only(node, operation):
                self._values[node] = x
                self._clamps[node] = operation.bounds  # type: ignore[attr-defined]
                return True
            operation, node = self._with_clamp(operation, node)
            step = Operate(operation, x, node)
            self._gate(step, x)
        else:
            return False
        self._steps.append(step)
        self._values[node] = node
        if isinstance(step, Clamped):
            self._makers[node] = step
        return True

    def _pools_only(self, node: fx.Node, operation: Operation) -> bool:
        """Whether max pooling alone reads a clamp: it can as well clamp its results, of which there are fewer."""
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        is_clamp = isinstance(operation, Affine) and operation.keeps_size
        return is_clamp and reader is not None and isinstance(_operation_of(reader, self._traced), MaxPool)

    def _with_clamp(self, operation: Operation, node: fx.Node) -> tuple[Operation, fx.Node]:
        """An operation with the clamp before it, if that was left to it, or the one that alone reads its results."""
        if isinstance(operation, MaxPool):
            operation.clamp(self._clamps.get(node.args[0], UNBOUNDED))  # type: ignore[arg-type]
        elif isinstance(operation, Affine) and not operation.keeps_size and len(node.users) == 1:
            (reader,) = node.users
            bounds = fusion._bounds(reader, self._traced)
            if bounds is not None:
                operation.clamp(bounds)
                node = reader
        return operation, node

    def _is_near_values(self, node: fx.Node) -> bool:
        """Whether what a node reads is, or can cheaply be, a value."""
        x = node.args[0] if node.args else None
        return isinstance(x, fx.Node) and (x in self._values or x in self._on_lines)

    def _without_repetition(self, parts: list[fx.Node]) -> list[fx.Node]:
        """What is to be concatenated, beginning with a concatenation that there is already."""
        whole = tuple(parts)
        for n in range(len(parts) - 1, 1, -1):
            if whole[:n] in self._concatenations:
                parts = [self._concatenations[whole[:n]], *parts[n:]]
                break
        return parts

    def _make_room(self) -> None:
        """Have concatenations that others extend make room for these."""
        made = {step.writes[0]: step for step in self._steps if isinstance(step, Concatenate)}
        extended: set[fx.Node] = set()
        for step in reversed(made.values()):
            first = made.get(step.reads[0])
            if first is not None and step.reads[0] not in extended:
                extended.add(step.reads[0])
                channels = fusion._shape(step.writes[0])[1]
                first.room = max(step.room, channels)
                step.room = 0

    def _is_concatenation(self, node: fx.Node) -> bool:
        if not fusion._is_call(node, self._traced, _CONCATENATIONS) or not isinstance(node.args[0], (list, tuple)):
            return False
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        shape = fusion._shape(node)
        parts = node.args[0]
        return dim in (1, -3) and shape is not None and len(shape) == 4 and any(part in self._values for part in parts)

    def _gate(self, step: Step, x: fx.Node) -> None:
        """The first to read a clamped value is the last to add to its gradient, and so does what the clamp would do."""
        if x in self._makers and x not in self._read and isinstance(step, Clamped):
            self._makers[x].reader_gates = step.gates = True
        self._read.add(x)

    def _name(self, node: fx.Node, form: str) -> fx.Node:
        name = self._names.placeholder(f"{node.name}_{form}")
        self._originals[name] = node
        return name

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
        made_as_value = self._values.get(node) is node
        if node not in self._tensors and (made_as_value or node in self._on_lines):
            self._tensors[node] = self._name(node, "tensor")
            self._steps.append((LineTensor if self._is_line(node) else Materialise)(node, self._tensors[node]))
            self._read.add(node)
        return self._tensors.get(node, node)

    def _is_line(self, node: fx.Node) -> bool:
        """Whether a node is on lines; it is noted that steps read it."""
        if node in self._on_lines and node not in self._lines:
            self._lines.append(node)
        return node in self._on_lines

    def _flush(self) -> None:
        """Add a step for what torch is to compute."""
        nodes, self._pending = self._pending, []
        if not nodes:
            return
        inside = set(nodes)
        outside = [one for node in nodes for one in node.all_input_nodes if one not in inside]
        inputs = list(dict.fromkeys(outside))
        outputs = [node for node in nodes if node is self._output or any(user not in inside for user in node.users)]
        reads = [self._tensor(node) for node in inputs]
        self._steps.append(Torch(self._function(nodes, inputs, outputs), reads, outputs))

    def _function(self, nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
        """Some nodes as a function from what some hold to what others hold, a tuple."""
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in inputs}
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in outputs))
        return fx.GraphModule(self._traced, graph)

    # --- Sizes

    def _set_scales(self) -> None:
        """Choose powers of two that values and gradients are multiplied by where they are held in float16.

        Values that are summed or concatenated, and those that stay as large as they are, have one in common;
        convolutions and batch norms change it.
        """
        parents: dict[fx.Node, fx.Node] = {}

        def root(node: fx.Node) -> fx.Node:
            while node in parents:
                node = parents[node]
            return node

        def join(one: fx.Node, other: fx.Node) -> None:
            if root(one) is not root(other):
                parents[root(one)] = root(other)

        for step in self._steps:
            if isinstance(step, Convolve) and step.addend is not None:
                join(step.addend, step.writes[0])
            elif isinstance(step, Concatenate) or (isinstance(step, Operate) and step.operation.keeps_size):
                for node in step.reads:
                    join(node, step.writes[0])
        values, gradients = _largest(self._traced, self._images)
        held = set(self._values.values())
        largest: dict[fx.Node, float] = {}
        steepest: dict[fx.Node, float] = {}
        for node in held:
            original = self._originals.get(node, node)
            largest[root(node)] = max(largest.get(root(node), 0.0), values.get(original, 0.0))
            steepest[root(node)] = max(steepest.get(root(node), 0.0), gradients.get(original, 0.0))
        scales = {
            node: (_power(largest[root(node)], _VALUES), _power(steepest[root(node)], _GRADIENTS)) for node in held
        }
        for step in self._steps:
            if isinstance(step, (LineValue, Represent)):
                step.scale, step.gradient_scale = scales[step.writes[0]]
            elif isinstance(step, Materialise):
                step.scale, step.gradient_scale = scales[step.reads[0]]
            elif isinstance(step, (Convolve, Operate)):
                (x, x_gradient), (y, y_gradient) = scales[step.x], scales[step.writes[0]]
                changed = step.module if isinstance(step, Convolve) else step.operation
                changed.set_scales((x, y), (x_gradient, y_gradient))


def _power(size: float, target: float) -> float:
    """The power of two that brings `size` near `target`."""
    return 2.0 ** round(math.log2(target / size)) if 0 < size < math.inf else 1.0


def _largest(traced: fx.GraphModule, images: Tensor) -> tuple[dict[fx.Node, float], dict[fx.Node, float]]:
    """The largest absolute value that each node holds, and of the largest logit's gradient there, for some images."""
    made: dict[fx.Node, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor) and result.requires_grad and result.is_floating_point():
                result.retain_grad()
                made[n] = result
            return result

    with torch.enable_grad():
        scores = Recorder(traced).run(images.detach().clone().requires_grad_())
        scores.amax(dim=1).sum().backward()
    values = {node: float(one.detach().abs().max()) for node, one in made.items()}
    slopes = {node: float(one.grad.abs().max()) for node, one in made.items() if one.grad is not None}
    return values, slopes
