"""How much memory a device has free, how much one gradient evaluation takes, and keeping what was freed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now without swapping or failing."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch's allocator holds but does not use is free too
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: half of the physical memory is a fair guess
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def gradient_bytes(network: nn.Module, probe: Tensor) -> int:
    """Bytes that one gradient evaluation of one image takes, the same on every machine.

    Counted, not timed: the tensors that autograd keeps for the backward pass of `probe` (1, channel, y, x), parameters
    apart, and as much again for what passes through.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.enable_grad():
        network(probe.detach().clone().requires_grad_().clone())
    return max(1, 2 * (sum(kept.values()) + probe.nbytes))


def keep_freed_memory(n_bytes: int) -> None:
    """From now on, have this process keep up to so many bytes of freed tensors for the next ones.

    glibc would give them back to the system at the end of each batch, and the system clears their pages again for the
    next one, which costs more than all else that is done to a batch of images. Where the C library is another one,
    nothing changes.
    """
    _set_thresholds(mmap=n_bytes, trim=n_bytes)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have this process keep the memory of freed tensors for the next ones, instead of giving it back to the system.

    glibc gives every block above 32 MiB back at once, and the system clears its pages again for the next batch: up to a
    third of the time of a gradient on a CPU. Where the C library is another one, nothing changes.
    """
    _set_thresholds(mmap=1 << 30, trim=(1 << 31) - 1)
    try:
        yield
    finally:
        # where glibc's own adaptation ends in a process that frees large blocks
        _set_thresholds(mmap=32 << 20, trim=64 << 20)


def _set_thresholds(*, mmap: int, trim: int) -> None:
    """Bytes from which glibc maps a block on its own, and from which it gives free memory back."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mmap)
        mallopt(_M_TRIM_THRESHOLD, trim)
