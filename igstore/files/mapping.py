"""An array in a file, mapped into memory. Unlike `numpy.memmap`, a map keeps no file open."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igstore.files.access import open_regular

# Python's own maps hold a descriptor each, and a store may have more shards than a process may open files.
_libc = ctypes.CDLL(None)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


def map_array(path: Path, dtype: np.dtype[Any], offset: int, shape: tuple[int, ...]) -> NDArray[Any] | None:
    """An array that begins at byte `offset` of a file, read when it is looked at; it cannot be written to.

    None where the system does not map the file: some file systems cannot, and address space may be limited. Then
    reading does.

    Raises
    ------
    ValueError
        It is no regular file, or shorter than it must be.
    OSError
        It cannot be opened.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    before = offset % mmap.ALLOCATIONGRANULARITY
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if offset + n_bytes > size:
            raise ValueError(f"it has {size} bytes; it must have {offset + n_bytes} or more")
        length = before + n_bytes
        address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset - before)
    finally:
        os.close(descriptor)
    if address == _FAILED:
        return None
    buffer = (ctypes.c_ubyte * length).from_address(address)
    weakref.finalize(buffer, _libc.munmap, address, length).atexit = False  # other threads may look at it to the end
    return np.frombuffer(memoryview(buffer).toreadonly(), dtype, math.prod(shape), before).reshape(shape)
