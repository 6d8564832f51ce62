"""The graph of a network, and what its nodes do."""

from __future__ import annotations

import copy
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from igstore.acceleration import fusion
from igstore.acceleration.activations import Clamp, ScaleAndShift
from igstore.acceleration.lines.filters import LineConvolution, fits
from igstore.acceleration.lines.points import Bounds, Window
from igstore.models import replace

_CONCATENATIONS = (torch.cat, torch.concat)
_MAX_POOLS = (nn.MaxPool2d, functional.max_pool2d, torch.max_pool2d)
_MEAN_POOLS = (nn.AvgPool2d, functional.avg_pool2d)
_ADAPTIVE_POOLS = (nn.AdaptiveAvgPool2d, functional.adaptive_avg_pool2d)
_DROPOUTS = (nn.Dropout, nn.Dropout2d, functional.dropout, functional.dropout2d)

# What is affine in its only argument, whatever its options are, and what is if it is given numbers beside one argument.
_AFFINE_MODULES = (nn.Conv2d, nn.BatchNorm2d, ScaleAndShift, nn.AvgPool2d, nn.ZeroPad2d)
_AFFINE_FUNCTIONS = (operator.getitem, torch.unsqueeze, functional.pad, functional.avg_pool2d)
_AFFINE_METHODS = ("unsqueeze", "contiguous", "permute")
_ARITHMETIC = (operator.mul, operator.truediv, operator.add, operator.sub, torch.mul, torch.div, torch.add, torch.sub)


class MaxPooling(NamedTuple):
    """The largest value of each window."""

    window: Window


class MeanPooling(NamedTuple):
    """The mean of each window, in which zeros beyond the image count."""

    window: Window


class BatchNorm(NamedTuple):
    """``scale x + shift``, of each channel."""

    scale: Tensor
    shift: Tensor


class Clamping(NamedTuple):
    """A clamp to some bounds: a ReLU, for example."""

    bounds: Bounds


def traced(network: nn.Module, images: Tensor) -> fx.GraphModule:
    """A copy of `network` as a graph, in which convolutions are `LineConvolution` where these fit.

    Sums and activations after convolutions are theirs, nothing happens in place, and what does nothing is left out.

    Parameters
    ----------
    network
        In evaluation mode; its parameters are shared.
    images
        (image, channel, y, x), of the size to come, at least two: shapes are taken from them.

    Raises
    ------
    Exception
        The graph cannot be had: what a network's code does with a stand-in for a tensor is anyone's guess.
    """
    network = copy.deepcopy(network, {id(one): one for one in (*network.parameters(), *network.buffers())})
    for module in list(network.modules()):
        if fits(module):
            replace(network, module, LineConvolution(module))  # type: ignore[arg-type]
        elif getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    graph = fx.GraphModule(network, _Tracer().trace(network))
    _write_nothing_in_place(graph)
    _skip_what_does_nothing(graph)
    _note_shapes(graph, images)
    for node in list(graph.graph.nodes):
        called = module_of(node, graph)
        if isinstance(called, LineConvolution) and len(node.args) == 1 and not node.kwargs:
            fusion.take_sum(node, graph)
            fusion.take_activation(node, called, graph)  # type: ignore[arg-type]
    graph.graph.eliminate_dead_code()
    graph.recompile()
    _note_shapes(graph, images)
    return graph


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = (LineConvolution, Clamp, ScaleAndShift, nn.Conv2d)
        return isinstance(m, own) or super().is_leaf_module(m, module_qualified_name)


def _note_shapes(graph: fx.GraphModule, images: Tensor) -> None:
    with torch.no_grad():
        fusion.Shapes(graph).run(images.clone())


def _write_nothing_in_place(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
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
            raise NotImplementedError(f"the network calls {name}, which writes in place")


def _skip_what_does_nothing(graph: fx.GraphModule) -> None:
    fusion.skip_identities(graph)
    for node in list(graph.graph.nodes):
        if fusion.is_call(node, graph, _DROPOUTS):
            fusion.take_the_place_of(node.args[0], node, graph)
        elif is_concatenation(node, graph) and len(node.args[0]) == 1:
            fusion.take_the_place_of(node.args[0][0], node, graph)


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of what a node holds, if that is a tensor."""
    shape = fusion.shape_of(node)
    return None if shape is None else tuple(shape)


def module_of(node: fx.Node, graph: fx.GraphModule) -> nn.Module | None:
    """The module that a node calls, if it does."""
    return fusion.module_of(node, graph)


def is_concatenation(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Whether a node concatenates images, (image, channel, y, x), by channels."""
    if not fusion.is_call(node, graph, _CONCATENATIONS) or not isinstance(node.args[0], (list, tuple)):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return dim in (1, -3) and len(shape_of(node) or (1,) * 4) == 4


def affine_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """The network's input, and what is affine in it, in order."""
    found: list[fx.Node] = []
    for node in graph.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "placeholder" or (inputs and all(one in found for one in inputs) and _is_affine(node, graph)):
            found.append(node)
    return found


def _is_affine(node: fx.Node, graph: fx.GraphModule) -> bool:
    module = module_of(node, graph)
    if isinstance(module, LineConvolution):
        return not module.bounded
    if node.op == "call_function":
        numbers = node.target in _ARITHMETIC and len(node.all_input_nodes) == 1
        return numbers or node.target in (*_AFFINE_FUNCTIONS, *_CONCATENATIONS)
    return isinstance(module, _AFFINE_MODULES) or (node.op == "call_method" and node.target in _AFFINE_METHODS)


def recognised(node: fx.Node, graph: fx.GraphModule) -> MaxPooling | MeanPooling | BatchNorm | Clamping | None:
    """What a node does to images (image, channel, y, x), if it is one of these."""
    x = node.args[0] if node.args else None
    shape = shape_of(x) if isinstance(x, fx.Node) else None
    if shape is None or len(shape) != 4:
        return None
    module = module_of(node, graph)
    if isinstance(module, ScaleAndShift):
        return BatchNorm(module.scale.flatten(), module.shift.flatten())
    pooling = _max_pooling(node, graph) or _mean_pooling(node, graph) or _adaptive_pooling(node, graph, shape)
    if pooling is not None:
        return pooling
    bounds = fusion.bounds(node, graph)
    return None if bounds is None else Clamping(bounds)


def _max_pooling(node: fx.Node, graph: fx.GraphModule) -> MaxPooling | None:
    found = _options(
        node, graph, _MAX_POOLS, kernel_size=None, stride=None, padding=0, dilation=1, ceil_mode=False,
        return_indices=False,
    )  # fmt: skip
    if found is None or _number(found[3]) != 1 or found[4] or found[5]:
        return None
    window = _window(*found[:3])
    return None if window is None else MaxPooling(window)


def _mean_pooling(node: fx.Node, graph: fx.GraphModule) -> MeanPooling | None:
    found = _options(
        node, graph, _MEAN_POOLS, kernel_size=None, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
        divisor_override=None,
    )  # fmt: skip
    if found is None or found[3] or not (found[4] or _number(found[2]) == 0) or found[5] is not None:
        return None
    window = _window(*found[:3])
    return None if window is None else MeanPooling(window)


def _adaptive_pooling(node: fx.Node, graph: fx.GraphModule, shape: tuple[int, ...]) -> MeanPooling | None:
    found = _options(node, graph, _ADAPTIVE_POOLS, output_size=None)
    side = None if found is None else _number(found[0])
    _, _, height, width = shape
    if side is None or height != width or height % side:
        return None
    return MeanPooling(Window(height // side, height // side, 0))


def _options(node: fx.Node, graph: fx.GraphModule, kinds: tuple[Any, ...], **defaults: Any) -> list[Any] | None:
    """The options of a node that calls one of some functions or modules, in the order of `defaults`; None if not."""
    if not fusion.is_call(node, graph, kinds):
        return None
    module = module_of(node, graph)
    if module is not None:
        return [getattr(module, name, default) for name, default in defaults.items()]
    given = dict(zip(defaults, node.args[1:], strict=False)) | dict(node.kwargs)
    return [given.get(name, default) for name, default in defaults.items()]


def _window(size: Any, stride: Any, padding: Any) -> Window | None:
    numbers = _number(size), _number(size if stride is None or stride == [] else stride), _number(padding)
    return None if None in numbers else Window(*numbers)  # type: ignore[arg-type]


def _number(size: Any) -> int | None:
    """The one number that an option for both axes is."""
    numbers = {size} if isinstance(size, int) else set(size) if isinstance(size, (tuple, list)) else set()
    return numbers.pop() if len(numbers) == 1 else None
