"""torch's modes and switches, which a caller may have set for work of its own, as they are in a fresh process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# Where float32 may be rounded to fewer bits, by torch's names of the places. "ieee" is float32 itself.
_CUDA = ("cuda.matmul", "cudnn.conv", "cudnn.rnn")
_CPU = ("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
_INHERITED = "none"  # what a place holds that goes by a more general one


@contextmanager
def fresh_torch(device: torch.device | str = "cpu", *, tf32: bool = False) -> Iterator[None]:
    """Within it torch computes on `device` as in a fresh process, in float32; afterwards all is as it was.

    Gradients are recorded, also within `torch.no_grad` and `torch.inference_mode`. Autocast and anomaly detection are
    off. New tensors are float32, and on the CPU, unless they are asked for elsewhere. float32 is rounded nowhere, or
    with `tf32` in the matrix products and convolutions of CUDA devices alone. cuDNN takes deterministic algorithms,
    without trying out which is fastest; of other operations nothing is asked.

    It can decorate a function, too. Some of these settings are the whole process's, others the thread's.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", torch.device(device).type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_anomaly_enabled():
            stack.enter_context(torch.autograd.set_detect_anomaly(False, torch.is_anomaly_check_nan_enabled()))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        _put(stack, torch.get_default_dtype, torch.set_default_dtype, torch.float32)
        _put(stack, torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0)
        for name, value in {"deterministic": True, "benchmark": False}.items():
            _put_attribute(stack, torch.backends.cudnn, name, value)
        # by their own switches alone: torch refuses to read the older ones of a process that has set these
        for places, value in ((_CUDA, "tf32" if tf32 else "ieee"), (_CPU, "ieee")):
            for place in places:
                _put_precision(stack, place, value)
        yield


def _put(stack: ExitStack, read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> None:
    before = read()
    if before != value:
        stack.callback(write, before)
        write(value)


def _put_attribute(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    _put(stack, lambda: getattr(owner, name), lambda new: setattr(owner, name, new), value)


def _put_precision(stack: ExitStack, place: str, value: str) -> None:
    owner: Any = torch.backends
    for part in place.split("."):
        owner = getattr(owner, part)

    def write(new: str) -> None:
        # one that goes by a more general place reads as what that one holds; so it does again afterwards
        owner.fp32_precision = _INHERITED
        if owner.fp32_precision != new:
            owner.fp32_precision = new

    _put(stack, lambda: owner.fp32_precision, write, value)
