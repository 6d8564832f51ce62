"""torch's modes and switches, which a caller may have set for work of its own, as they are in a fresh process."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

# Where float32 may be rounded to fewer bits, by torch's names of the places. "ieee" is float32 itself.
_CUDA = ("cuda.matmul", "cudnn.conv", "cudnn.rnn")
_CPU = ("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


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
        _put_float32(stack, tf32)
        yield


def _put(stack: ExitStack, read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> None:
    before = read()
    if before != value:
        stack.callback(write, before)
        write(value)


def _put_attribute(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    _put(stack, lambda: getattr(owner, name), lambda new: setattr(owner, name, new), value)


def _put_float32(stack: ExitStack, tf32: bool) -> None:
    """Say how float32 is rounded, by torch's newer switches and by the older ones, which are to agree with them."""
    owners = {place: operator.attrgetter(place)(torch.backends) for place in (*_CUDA, *_CPU)}
    for owner in owners.values():
        stack.callback(_write_precision, owner, owner.fp32_precision)
    older: list[tuple[Callable[[], Any], Callable[[Any], None], Any]] = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high" if tf32 else "highest"),
        (lambda: torch.backends.cudnn.allow_tf32, lambda new: setattr(torch.backends.cudnn, "allow_tf32", new), tf32),
    ]
    for read, write, value in older:
        with suppress(RuntimeError):  # torch does not tell where a caller has set the newer ones alone
            _put(stack, read, write, value)
    for place, owner in owners.items():
        _write_precision(owner, "tf32" if tf32 and place in _CUDA else "ieee")


def _write_precision(owner: Any, value: str) -> None:
    # one that goes by a more general switch reads as that one does, and is to go by it again
    owner.fp32_precision = "none"
    if owner.fp32_precision != value:
        owner.fp32_precision = value
