"""Which device a user's word for one means."""

from __future__ import annotations

import torch

from igstore.errors import UserError


def find_device(name: str) -> torch.device:
    """The device called ``auto`` (a CUDA device where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises
    ------
    UserError
        There is no such device on this machine.
    """
    available = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= available:
        raise UserError(f"device is {name!r}, but this machine has {available} CUDA devices that torch can use")
    return device
