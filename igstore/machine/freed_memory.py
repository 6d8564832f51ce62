"""Keeping the memory of freed arrays and tensors for the next ones, where the C library would give it back."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# (mmap, trim) as they are now: where glibc's own adaptation ends in a process that frees large blocks
_thresholds = (32 << 20, 64 << 20)


def keep_freed_memory(n_bytes: int) -> None:
    """Keep up to `n_bytes` of freed memory in this process, for the next arrays and tensors.

    glibc would give them back to the system at the end of each batch, and the system clears their pages again for the
    next one, which costs more than all else that is done to a batch of images. Where the C library is another one,
    nothing changes. Repeated calls cost nothing.
    """
    if _thresholds != (n_bytes, n_bytes):
        _set_thresholds(mmap=n_bytes, trim=n_bytes)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have this process keep the memory of freed tensors for the next ones, instead of giving it back to the system.

    glibc gives every block above 32 MiB back at once, and the system clears its pages again for the next batch: up to a
    third of the time of a gradient on a CPU. Where the C library is another one, nothing changes.
    """
    mmap, trim = _thresholds
    _set_thresholds(mmap=1 << 30, trim=(1 << 31) - 1)
    try:
        yield
    finally:
        _set_thresholds(mmap=mmap, trim=trim)


def _set_thresholds(*, mmap: int, trim: int) -> None:
    """Bytes from which glibc maps a block on its own, and from which it gives free memory back."""
    global _thresholds
    _thresholds = (mmap, trim)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mmap)
        mallopt(_M_TRIM_THRESHOLD, trim)
