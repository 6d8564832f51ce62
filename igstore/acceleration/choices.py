"""Operations of a network that choose among numbers, which rounding may decide.

Max pooling hands its gradient to the largest of some numbers. Where a picture is flat many are equal, and the first of
them gets the gradient. An algorithm that rounds differently from place to place breaks these ties, and any of them may
get it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that choose or step, and whose results are numbers like any others. Operations that compare, or that say
# which numbers they chose, need no list: they make integers or truth values of numbers.
_CHOOSING = frozenset(
    "amax amin aminmax max min maximum minimum fmax fmin round floor ceil trunc frac sign sgn heaviside "
    "fmod remainder floor_divide renorm local_scalar_dense mkldnn_max_pool2d mkldnn_max_pool3d "
    "grid_sampler_2d grid_sampler_3d deform_conv2d".split()
)
# Of infinite order, these are the largest of some numbers.
_NORMS = frozenset("norm linalg_vector_norm dist cdist_forward pdist_forward".split())


def called_before_choices(network: nn.Module, image: Tensor, modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Those of `modules` that are called before the last choice that `network` makes while `image` passes through.

    Whether the choice is among their results is not seen, so there may be too many.
    """
    seen: set[nn.Module] = set()
    before: set[nn.Module] = set()

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = function(*args, **(kwargs or {}))
            if _chooses(function, tree_leaves((args, kwargs)), tree_leaves(results)):
                before.update(seen)
            return results

    with ExitStack() as hooks, torch.no_grad():
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(lambda module, _: seen.add(module)).remove)
        hooks.enter_context(Watch())  # type: ignore[no-untyped-call]
        network(image.clone())
    return before


def _chooses(function: Any, given: list[Any], made: list[Any]) -> bool:
    """Whether an operation, which has made some tensors of others, has chosen among numbers."""
    of_numbers = any(isinstance(one, Tensor) and one.is_floating_point() for one in given)
    whole = any(isinstance(one, Tensor) and not (one.is_floating_point() or one.is_complex()) for one in made)
    name = str(function.overloadpacket.__name__).strip("_")
    of_infinite_order = name in _NORMS and any(isinstance(one, float) and math.isinf(one) for one in given)
    return of_numbers and (whole or name in _CHOOSING or of_infinite_order)
