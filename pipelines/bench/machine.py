"""What a benchmark ran on, and the two rates that limit it: of matrix products, and of copies."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import igstore
from igstore.attribution import numerics
from igstore.machine import device_name
from igstore.schema import Precision

_LIBRARIES = ("torch", "torchvision", "numpy", "zarr", "captum", "h5py")
_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices: large enough to be limited by arithmetic
_COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes: larger than any cache
_CONVOLVED = ((128, 28), (256, 14))  # channels and size of the images of 3x3 convolutions
_IMAGES = {"cpu": 16, "cuda": 256}
_REPEATS = 7


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory, device and library versions, ready for JSON."""
    versions = {"igstore": igstore.__version__}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def in_words(machine: dict[str, Any]) -> str:
    """One line of `describe`, for people."""
    device = "" if machine["device"].startswith("cpu") else f"{machine['device']}, "
    return (
        f"machine: {device}{machine['processor']}, {machine['cores']} cores, {machine['threads']} torch threads, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, torch {machine['versions']['torch']}, load {machine['load']}"
    )


def matrix_rate(device: torch.device, precision: Precision = "float32") -> float:
    """Floating-point operations a second at the machine's best: of a large matrix product, or of convolutions.

    The library for matrix products is not the fastest one on every processor: on an AMD one the convolutions are ahead.
    Of ``mixed`` it is that of float16 on GPUs.
    """
    is_half = precision == "float16" or (precision == "mixed" and device.type == "cuda")
    dtype = torch.float16 if is_half else torch.float32
    generator = torch.Generator().manual_seed(0)
    side = _SIDE[device.type]
    one, other = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    out = torch.empty_like(one)
    with numerics(precision, device), torch.no_grad():
        rates = [2 * side**3 / _fastest(lambda: torch.mm(one, other, out=out), device)]
        for channels, size in _CONVOLVED:
            images = torch.randn(_IMAGES[device.type], channels, size, size, generator=generator).to(device, dtype)
            weight = torch.randn(channels, channels, 3, 3, generator=generator).to(device, dtype)
            images, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (images, weight))
            run = partial(torch.conv2d, images, weight, padding=1)
            rates.append(18 * images.numel() * channels / _fastest(run, device))
    return max(rates)


def copy_rate(device: torch.device) -> float:
    """Bytes read plus bytes written a second of the fastest of a few large copies within the device's memory."""
    source = torch.arange(_COPIED[device.type] // 8, device=device)  # int64, and no two pages alike
    copy = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: copy.copy_(source), device)


def _fastest(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest run: a limit is what the machine does when nothing is in its way."""
    seconds = []
    for _ in range(_REPEATS):
        synchronise(device)
        started = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked to; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
