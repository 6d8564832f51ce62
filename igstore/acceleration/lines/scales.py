"""By what values and gradients are multiplied where they are held in float16, which goes from 6e-8 to 65504."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from igstore.acceleration.lines.steps import Concatenate, Convolve, Operation, Scaled, Step, Torch

# What the largest of values, and of gradients, are brought near: far from both ends.
_VALUES, _GRADIENTS = 2.0**6, 2.0**4


def set_scales(steps: Sequence[Step], graph: fx.GraphModule, images: Tensor, originals: dict[fx.Node, fx.Node]) -> None:
    """Choose powers of two for all nodes of values, and tell the steps.

    Values that are summed or concatenated have one in common, and so have those that stay as large as they are.
    Convolutions and batch norms change it.

    Parameters
    ----------
    graph, images
        What is evaluated to see how large values and gradients are.
    originals
        The graph's nodes, of those that stand for them.
    """
    groups = _Groups()
    for step in steps:
        if isinstance(step, Concatenate) or (isinstance(step, Operation) and step.keeps_scale):
            for node in step.reads:
                groups.join(node, step.writes[0])
        elif isinstance(step, Convolve) and step.addend is not None:
            groups.join(step.addend, step.writes[0])
    values, gradients = _largest(graph, images)
    largest: dict[fx.Node, float] = {}
    steepest: dict[fx.Node, float] = {}
    nodes = {node for step in steps if not isinstance(step, Torch) for node in (*step.reads, *step.writes)}
    for node in nodes:
        group, original = groups.of(node), originals.get(node, node)
        largest[group] = max(largest.get(group, 0.0), values.get(original, 0.0))
        steepest[group] = max(steepest.get(group, 0.0), gradients.get(original, 0.0))

    def scales(node: fx.Node) -> tuple[float, float]:
        group = groups.of(node)
        return _power(largest[group], _VALUES), _power(steepest[group], _GRADIENTS)

    for step in steps:
        if isinstance(step, Operation):
            (x, at_x), (y, at_y) = scales(step.x), scales(step.writes[0])
            step.set_scales((x, y), (at_x, at_y))
        elif isinstance(step, Scaled):
            step.scale, step.gradient_scale = scales(step.value)


def _power(size: float, target: float) -> float:
    """The power of two that brings `size` near `target`."""
    return 2.0 ** round(math.log2(target / size)) if 0 < size < math.inf else 1.0


class _Groups:
    """Nodes that have a scale in common."""

    def __init__(self) -> None:
        self._parents: dict[fx.Node, fx.Node] = {}

    def of(self, node: fx.Node) -> fx.Node:
        """The node that stands for a node's group."""
        while node in self._parents:
            node = self._parents[node]
        return node

    def join(self, one: fx.Node, other: fx.Node) -> None:
        """Make one group of those of two nodes."""
        if self.of(one) is not self.of(other):
            self._parents[self.of(one)] = self.of(other)


def _largest(graph: fx.GraphModule, images: Tensor) -> tuple[dict[fx.Node, float], dict[fx.Node, float]]:
    """The largest absolute value that each node holds, and of the largest logit's gradient there, for some images."""
    held: dict[fx.Node, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor) and result.requires_grad:
                result.retain_grad()
                held[n] = result
            return result

    with torch.enable_grad():
        scores = Recorder(graph).run(images.detach().clone().requires_grad_())
        scores.amax(dim=1).sum().backward()
    values = {node: float(one.detach().abs().max()) for node, one in held.items()}
    gradients = {node: float(one.grad.abs().max()) for node, one in held.items() if one.grad is not None}
    return values, gradients
