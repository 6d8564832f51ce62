"""What the modules of a network are given when an image passes through, and other modules in their place."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor, nn

_Source = TypeVar("_Source", bound=nn.Module)
_Reader = TypeVar("_Reader", bound=nn.Module)


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
