"""Running a function in a process of its own, so that its time and peak memory are its own too."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a function returned, the seconds that it took, imports apart, and the peak memory of its process.

    Peak memory is resident memory: mapped files count as long as they are mapped.
    """

    result: Any
    seconds: float
    peak_bytes: int


def in_fresh_process(function: Callable[..., Any], *arguments: Any, **options: Any) -> Outcome:
    """Call a module's function in a newly started Python, which has imported nothing but that module."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_measured, function, arguments, options).result()


def _measured(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Outcome:
    started = time.perf_counter()
    result = function(*arguments, **options)
    return Outcome(result, time.perf_counter() - started, _peak_bytes())


def _peak_bytes() -> int:
    try:
        # getrusage would say what the parent had when it started this process, if that was more
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
