"""What a network and its modules are given and give when an image passes through, and other modules in their place."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from igstore.errors import ModelError

_Source = TypeVar("_Source", bound=nn.Module)
_Reader = TypeVar("_Reader", bound=nn.Module)


def scores_of(network: nn.Module, images: Tensor) -> Tensor:
    """A classifier's outputs (image, class).

    Raises
    ------
    ModelError
        They are something else.
    """
    # the clone is what a network that begins with an in-place operation writes to, instead of its caller's tensor
    result = network(images.clone())
    if not isinstance(result, Tensor) or result.ndim != 2 or len(result) != len(images):
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ModelError(
            f"the network returned {got} for a batch of {len(images)} images; a classifier returns a tensor "
            f"({len(images)}, number of classes): wrap it in a module that selects that tensor"
        )
    return result


def copied(network: nn.Module, *, sharing_tensors: bool = False) -> nn.Module:
    """A deep copy, with the same parameters and buffers themselves if they are to be shared.

    What a forward pass has left in an attribute, as the older ways to re-parametrise and prune do with weights, is
    copied without its history, which torch would refuse to copy.
    """
    memo: dict[int, Any] = {}
    for module in network.modules():
        for left in tree_leaves(list(vars(module).values())):
            if isinstance(left, Tensor) and not left.is_leaf:
                memo[id(left)] = left.detach().clone()
    if sharing_tensors:
        memo |= {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    with torch.no_grad():  # or the parameters of one compiled by TorchScript would be computed from the others
        return copy.deepcopy(network, memo)


def frozen(network: nn.Module) -> nn.Module:
    """`network` itself, in evaluation mode and without gradients to its parameters."""
    for parameter in network.eval().parameters():  # compiled by TorchScript, it has no `requires_grad_`
        parameter.requires_grad_(False)
    return network


def timm_layers(*names: str) -> list[type[Any]]:
    """Classes of timm's by name; none where nobody has made a network of timm's."""
    layers = sys.modules.get("timm.layers")
    return [getattr(layers, name) for name in names if hasattr(layers, name)]


def is_plain(module: nn.Module, kinds: Iterable[type[nn.Module]]) -> bool:
    """Whether a module does what one of `kinds` does, with a weight of its own, and no more.

    A subclass may do more, and so may hooks, another `forward`, and what makes the weight anew each time.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if "forward" in vars(module) or any(vars(module).get(name) for name in hooks):
        return False
    # nothing is read from the module itself: a graph that is being traced would have it
    own_weight = "weight" not in vars(module) and not hasattr(type(module), "weight")
    return own_weight and any(isinstance(module, kind) and _way(type(module)) == _way(kind) for kind in kinds)


def _way(kind: type[nn.Module]) -> tuple[Any, ...]:
    """What a kind of module does; `torch.nn.Conv2d` leaves a part of it to another method."""
    return kind.forward, getattr(kind, "_conv_forward", None)


def replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `root` has `old`, in place."""
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):  # `named_children` names a module once
            if child is old:
                setattr(parent, name, new)


def input_sizes(network: nn.Module, image: Tensor, modules: Iterable[_Source]) -> dict[_Source, set[tuple[int, int]]]:
    """(y, x) of the inputs (image, channel, y, x) of each of `modules` while `image` passes through `network`.

    A call with an input of another number of dimensions, or by name, leaves (0, 0). Modules that are not called have
    no sizes.
    """
    seen: dict[_Source, set[tuple[int, int]]] = {module: set() for module in modules}

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        plain = len(inputs) == 1 and inputs[0].ndim == 4
        size = (inputs[0].shape[2], inputs[0].shape[3]) if plain else (0, 0)
        seen[module].add(size)  # type: ignore[index]  # it is one of them

    with ExitStack() as hooks, torch.no_grad():
        for module in seen:
            hooks.callback(module.register_forward_pre_hook(look).remove)
        network(image.clone())
    return seen


def readers(network: nn.Module, image: Tensor, sources: type[_Source], of: type[_Reader]) -> dict[_Reader, _Source]:
    """Modules of type `of` that read the output of one of type `sources`, and which, each being called once.

    It is seen while `image` (1, channel, y, x) passes through, so nothing about the network's code is assumed. That the
    output is read by nothing else is not seen.
    """
    made: dict[int, tuple[_Source, Tensor, int]] = {}  # keeping the tensor keeps its id unique
    calls: dict[nn.Module, int] = {}
    pairs: dict[_Reader, _Source] = {}

    def note_source(module: nn.Module, _: object, output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, sources):
            made[id(output)] = (module, output, output._version)

    def note_reader(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[module] = calls.get(module, 0) + 1
        source = made.get(id(inputs[0])) if inputs else None
        # another version means an in-place operation between the two
        if isinstance(module, of) and source is not None and source[2] == inputs[0]._version:
            pairs[module] = source[0]

    with ExitStack() as hooks, torch.no_grad():
        for module in network.modules():
            if isinstance(module, sources):
                hooks.callback(module.register_forward_hook(note_source).remove)
            elif isinstance(module, of):
                hooks.callback(module.register_forward_pre_hook(note_reader).remove)
        network(image.clone())
    # a module that is called twice would be changed for both calls
    return {reader: source for reader, source in pairs.items() if calls[reader] == calls[source] == 1}
