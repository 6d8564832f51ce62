"""Copies to a device and back for which the host does not wait: through pinned memory, in the order of the work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Result = TypeVar("_Result")


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """`values` on `device`; on a CPU they are shared where they are contiguous."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def to_host(tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, NDArray[Any]]]:
    """A function that waits for `tensors` and returns them as arrays; the device is asked for them now."""
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return lambda: {name: tensor.numpy() for name, tensor in tensors.items()}
    host = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for name, tensor in tensors.items()
    }
    arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def wait() -> dict[str, NDArray[Any]]:
        arrived.synchronize()
        return {name: tensor.numpy() for name, tensor in host.items()}

    return wait


def one_behind(waiting: Iterable[Callable[[], _Result]], device: torch.device) -> Iterator[_Result]:
    """Results in order, of functions that wait for a device.

    A function is made where the device is told what to do. On a GPU each is called only after the next one has been
    made, so that the device has work while the host looks at results. On a CPU there is nothing to wait for.
    """
    ahead = 1 if device.type == "cuda" else 0
    made: deque[Callable[[], _Result]] = deque()
    for wait in waiting:
        made.append(wait)
        if len(made) > ahead:
            yield made.popleft()()
    for wait in made:
        yield wait()
