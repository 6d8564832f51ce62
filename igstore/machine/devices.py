"""Devices: found by name, and described with the versions of libraries in what a run records."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from igstore.errors import UserError, option

_LIBRARIES = ("torch", "torchvision", "zarr", "numpy", "pillow")


def find_device(name: str | torch.device) -> torch.device:
    """The device called ``auto`` (a CUDA device where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises
    ------
    UserError
        There is no such device on this machine.
    """
    available = _cuda_devices()
    if isinstance(name, str) and name == "auto":
        return torch.device("cuda" if available else "cpu")
    try:
        device = torch.device(name) if isinstance(name, str | torch.device) else None
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"{option('device')} is {name!r:.80}; it must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= available:
        raise UserError(
            f"{option('device')} is {str(name)!r}, but this machine has {available} CUDA devices that torch can use"
        )
    return device


def find_devices(names: str | torch.device) -> tuple[torch.device, ...]:
    """The device that `find_device` finds, those of a list like ``cuda:0,cuda:2``, or all CUDA devices: ``all``.

    A device that is listed twice is given twice.

    Raises
    ------
    UserError
        There is no such device on this machine, or ``all`` are none.
    """
    if not isinstance(names, str):
        return (find_device(names),)
    if names != "all":
        return tuple(find_device(name) for name in names.split(","))
    available = _cuda_devices()
    if not available:
        raise UserError(
            f"{option('device')} is all, which means every GPU, but this machine has no CUDA device that torch can "
            "use; give cpu to do without"
        )
    return tuple(torch.device("cuda", index) for index in range(available))


def _cuda_devices() -> int:
    return torch.cuda.device_count()


def versions() -> dict[str, Any]:
    """Versions of igstore, Python and the libraries that decide what is computed, under ``versions``."""
    from igstore import __version__

    libraries = {name: version(name) for name in _LIBRARIES}
    return {"versions": {"igstore": __version__, "python": platform.python_version(), **libraries}}


def device_name(device: torch.device) -> str:
    """The device's own name: ``NVIDIA H100 80GB HBM3``, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def runtime(device: torch.device) -> dict[str, Any]:
    """What the record of a shard says of the run that made it."""
    return {"device": device_name(device), "threads": torch.get_num_threads(), **versions()}
