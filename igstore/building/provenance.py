"""What a run ran on: library versions and device, as JSON-ready attributes."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

_LIBRARIES = ("torch", "torchvision", "zarr", "numpy", "pillow")


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
