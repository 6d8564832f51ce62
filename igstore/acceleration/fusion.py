"""Activations, sums and batch norms beside convolutions, found in a network's graph and left to the convolutions."""

from __future__ import annotations

import logging
import math
import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from igstore.acceleration.activations import Clamp, ScaleAndShift
from igstore.acceleration.convolutions import Convolution
from igstore.models import is_plain

logger = logging.getLogger(__name__)

_OWN = (Convolution, Clamp, ScaleAndShift)
_RELUS = (functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_")
_RELU = (0.0, math.inf)
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
# What else may read a tensor that a convolution passes on: functions that leave it as it is.
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, functional.max_pool2d, functional.avg_pool2d)
_READERS = (*_POOLS, torch.cat, operator.add, torch.add, "add")


def fuse(network: nn.Module, images: Tensor) -> nn.Module:
    """`network` as a graph in which its `Convolution`s do what is done to their inputs and outputs.

    Its modules are shared, and changed: `network` itself is of no use afterwards, unless it is what is returned, which
    it is where there is nothing to gain, or its graph cannot be had.

    Parameters
    ----------
    network
        In evaluation mode; its forward pass takes one tensor.
    images
        (image, channel, y, x), of the size to come; two or more, which tells what every image has from what all share.
    """
    if not any(isinstance(module, Convolution) for module in network.modules()):
        return network
    if not is_plain(network, [type(network)]):
        logger.info("the network has hooks, which its graph would not have, so activations stay beside convolutions")
        return network
    try:
        traced = fx.GraphModule(network, _Tracer().trace(network))
        _reshape_instead_of_view(traced)
        with torch.no_grad():
            Shapes(traced).run(images.clone())
    except Exception as error:  # what a network's code does with a stand-in for a tensor is anyone's guess
        logger.info("the network's graph cannot be had, so activations stay beside convolutions: %s", error)
        return network
    skip_identities(traced)
    convolutions = dict(_convolutions(traced))
    for node, module in convolutions.items():
        take_sum(node, traced)
        take_activation(node, module, traced)
        _take_batch_norm(node, module, traced)
    for node, module in convolutions.items():
        _pass_on(node, module, traced)
    traced.recompile()
    traced.delete_all_unused_submodules()
    return traced


class _Tracer(fx.Tracer):
    """Traces what a graph can say. What calls are made under, it cannot: no gradients, autocast, hooks of modules."""

    def __init__(self) -> None:
        super().__init__()
        self._began_under = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own_way = not is_plain(m, [type(m)])
        return own_way or isinstance(m, (*_OWN, nn.Conv2d)) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        # the forward pass of a function with a gradient of its own has them switched off, too
        if _modes() != self._began_under:
            raise RuntimeError("part of its forward pass switches gradients or autocast")
        return super().create_node(*args, **kwargs)


class Shapes(fx.Interpreter):
    """Notes the shapes of what a graph computes. (torch's own class for that prints a traceback where it fails.)"""

    def run_node(self, n: fx.Node) -> Any:  # noqa: D102
        result = super().run_node(n)
        n.meta["shape"] = getattr(result, "shape", None)
        return result


def _modes() -> tuple[Any, ...]:
    """What torch computes under, where a network may change it for a part of its forward pass."""
    autocast = [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), *autocast)


def _reshape_instead_of_view(traced: fx.GraphModule) -> None:
    """A view of some tensors needs the layout that they have no longer."""
    for node in traced.graph.nodes:
        of_shape = not any(isinstance(one, torch.dtype) for one in (*node.args, *node.kwargs.values()))
        if node.op == "call_method" and node.target == "view" and of_shape:
            node.target = "reshape"


def module_of(node: fx.Node, traced: fx.GraphModule) -> nn.Module | None:
    """The module that a node calls, or None."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_call(node: fx.Node, traced: fx.GraphModule, targets: tuple[Any, ...]) -> bool:
    """Whether a node calls one of some functions, methods (by name) or types of modules."""
    if node.op == "call_module":
        return type(module_of(node, traced)) in targets
    return node.op in ("call_function", "call_method") and node.target in targets


def _convolutions(traced: fx.GraphModule) -> Iterator[tuple[fx.Node, Convolution]]:
    """Calls of convolutions that are called once, and with nothing but a tensor: others stay as they are."""
    modules = {node: module_of(node, traced) for node in traced.graph.nodes}
    calls = Counter(map(id, modules.values()))
    for node, module in modules.items():
        if isinstance(module, Convolution) and calls[id(module)] == 1 and len(node.args) == 1 and not node.kwargs:
            yield node, module


def shape_of(node: fx.Node) -> Any:
    """The shape of what a node computes, as `Shapes` has noted it, if that is a tensor."""
    return node.meta.get("shape")


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def take_the_place_of(node: fx.Node, other: fx.Node, traced: fx.GraphModule) -> None:
    """Have whoever reads `other` read `node`."""
    other.replace_all_uses_with(node)
    traced.graph.erase_node(other)


def skip_identities(traced: fx.GraphModule) -> None:
    """Leave out modules that return their input."""
    for node in list(traced.graph.nodes):
        if is_call(node, traced, (nn.Identity,)) and len(node.args) == 1 and isinstance(node.args[0], fx.Node):
            take_the_place_of(node.args[0], node, traced)


def take_sum(node: fx.Node, traced: fx.GraphModule) -> None:
    """A sum of the outputs and a tensor of their shape that is there before them becomes the convolution's."""
    user = _only_user(node)
    if user is None or not is_call(user, traced, _SUMS) or len(user.args) != 2 or user.kwargs:
        return
    addend = next((one for one in user.args if one is not node), None)
    if isinstance(addend, fx.Node) and shape_of(addend) == shape_of(node) is not None and addend < node:
        node.args = (node.args[0], addend)
        take_the_place_of(node, user, traced)


def take_activation(node: fx.Node, module: Convolution, traced: fx.GraphModule) -> None:
    """A ReLU, or another clamp, of the outputs becomes the convolution's bounds."""
    user = _only_user(node)
    found = None if user is None else bounds(user, traced)
    if user is not None and found is not None:
        module.bounds = found
        take_the_place_of(node, user, traced)


def bounds(node: fx.Node, traced: fx.GraphModule) -> tuple[float, float] | None:
    """Those that a node brings its input within, if that is what it does."""
    called = module_of(node, traced)
    if isinstance(called, Clamp):
        return called.low, called.high
    return _RELU if type(called) is nn.ReLU or is_call(node, traced, _RELUS) else None


def _take_batch_norm(node: fx.Node, module: Convolution, traced: fx.GraphModule) -> None:
    """The ReLU of a batch norm, of which the convolution alone reads, becomes what the convolution reads."""
    relu = node.args[0]
    if module.taps != [1, 1] or module.stride != [1, 1] or not isinstance(relu, fx.Node):
        return
    norm = relu.args[0] if relu.args else None
    if not isinstance(norm, fx.Node) or len(relu.users) != 1 or len(norm.users) != 1:
        return
    scaled = module_of(norm, traced)
    if isinstance(scaled, ScaleAndShift) and bounds(relu, traced) == _RELU:
        module.scale, module.shift = scaled.scale.flatten(), scaled.shift.flatten()
        node.args = (norm.args[0], *node.args[1:])
        traced.graph.erase_node(relu)
        traced.graph.erase_node(norm)


def _pass_on(node: fx.Node, module: Convolution, traced: fx.GraphModule) -> None:
    """What reads the convolution's input after it reads it from the convolution, which then adds up the gradients."""
    x = node.args[0]
    if not isinstance(x, fx.Node) or len(shape_of(x) or ()) != 4:
        return
    later = [user for user in x.users if user > node]
    if not later or not all(is_call(user, traced, (*_OWN, *_READERS)) for user in later):
        return
    module.passes_on = True
    users = list(node.users)
    with traced.graph.inserting_after(node):
        passed_on = traced.graph.call_function(operator.getitem, (node, 1))
        outputs = traced.graph.call_function(operator.getitem, (node, 0))
    passed_on.meta, outputs.meta = x.meta, node.meta
    for user in users:
        user.replace_input_with(node, outputs)
    for user in later:
        user.replace_input_with(x, passed_on)
