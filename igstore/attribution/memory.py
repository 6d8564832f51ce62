"""How much memory a device has free, and how much one gradient evaluation takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from igstore.machine import free_memory


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now without swapping, failing or being killed."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch's allocator holds but does not use is free too
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return free_memory()


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
