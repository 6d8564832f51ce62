"""What goes wrong when files are read or written, as errors of igstore's own: of the system, or of what files hold.

The system says that no more files may be open, that there is no permission, no memory, no space, no such device. None
of that is damage: only bytes that contradict a record or the layout are.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from igstore.errors import AccessError, DamagedStoreError, IgstoreError, OutOfMemoryError

Recorded = Mapping[str, Any]  # a file's ``bytes``, ``crc32c`` and ``sha256``, as its record has them
Part = tuple[int, int]  # of a file: first byte, and the one after the last

NOT_THERE = (FileNotFoundError, NotADirectoryError)

MOST_METADATA = 2**24  # bytes of a file of metadata
MOST_SMALL = 2**28  # bytes of small files that are read together
_MOST_CONTAINERS = 100_000  # of a JSON text: each takes thirty times the memory of the text that makes it

_NO_FILE_SYSTEM = "the disk or mount that it is on is not there any more; look whether it is mounted"
_NO_PERMISSION = "this user has no permission"
_NOT_ABLE = "the file system cannot do that; use a folder of another one, such as a local disk"

# What is so of the machine at the moment, whichever file is asked for.
_OF_THE_MACHINE = {
    errno.EMFILE: "this process has as many files open as it may; raise the limit (`ulimit -n`), or use fewer workers",
    errno.ENFILE: "all processes together have as many files open as this machine allows; try again later",
    errno.ENOMEM: "there is not enough memory",
    errno.ENODEV: _NO_FILE_SYSTEM,
    errno.ENXIO: _NO_FILE_SYSTEM,
    errno.ESTALE: _NO_FILE_SYSTEM,
    errno.ENOTCONN: _NO_FILE_SYSTEM,
    errno.EHOSTDOWN: _NO_FILE_SYSTEM,
    errno.EINTR: "it was interrupted; try again",
}
_ADVICE = _OF_THE_MACHINE | {
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "the disk is full; make room, or give a folder elsewhere",
    errno.EDQUOT: "this user's share of the disk is used up; make room, or give a folder elsewhere",
    errno.EFBIG: "the file is larger than the file system, or this process (`ulimit -f`), may write",
    errno.EIO: "the disk, or the network to it, fails",
    errno.ENOSYS: _NOT_ABLE,
    errno.EOPNOTSUPP: _NOT_ABLE,
    errno.ENOLCK: _NOT_ABLE,
}
# What a path or an offset that contents give may lead to: such errors do speak of the contents.
_OF_THE_CONTENTS = (None, errno.EISDIR, errno.EINVAL, errno.EOVERFLOW, errno.ENAMETOOLONG, errno.ELOOP)


def is_of_the_machine(error: Exception) -> bool:
    """Whether an error would come of any file at the moment: no more may be open, no memory, a mount that is gone."""
    return isinstance(error, OSError) and error.errno in _OF_THE_MACHINE


def access_error(what: str, error: OSError | MemoryError) -> IgstoreError:
    """What the system said, as igstore's own error.

    Parameters
    ----------
    what
        Begins the message: such as "toy.zarr cannot be read".
    error
        What was raised.
    """
    if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
        return OutOfMemoryError(f"{what}: there is not enough memory ({' '.join(str(error).split()):.200})")
    said = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0)
    found = AccessError(f"{what}: {advice} ({said})" if advice else f"{what}: {said}")
    found.errno = error.errno
    return found


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Whatever is raised of contents that are not what they should be comes out as `DamagedStoreError`.

    What the system says of itself, as that no more files may be open, does not: see `access_error`.
    """
    try:
        yield
    except (IgstoreError, *NOT_THERE):
        raise
    except Exception as error:  # zarr, its codecs and HDF5 raise almost anything
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in _OF_THE_CONTENTS):
            raise access_error(f"{what} cannot be read", error) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DamagedStoreError(f"{what} cannot be read: {reason}") from error


def parse_json(content: bytes | str) -> Any:
    """What a JSON text says; a ValueError where it is none, or so made that it would cost much more than its length."""
    text = content.encode(errors="surrogatepass") if isinstance(content, str) else content
    if text.count(b"[") + text.count(b"{") > _MOST_CONTAINERS:
        raise ValueError(f"it holds more than {_MOST_CONTAINERS} lists and objects")
    try:
        return json.loads(content, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.20} is no number of JSON's")
    return number


def open_regular(path: Path) -> int:
    """A descriptor of a file to read from; what is no file, such as a pipe, is not waited for.

    Raises
    ------
    ValueError
        It is no regular file.
    OSError
        It cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise ValueError("it is not a regular file")


def read_whole(path: Path, most: int) -> bytes:
    """A whole file; what is no file, or has more than `most` bytes, is a ValueError, and not read."""
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"it has {size} bytes; such a file has at most {most}")
        return file.read()


def read_parts(path: Path, parts: Sequence[Part]) -> list[bytes]:
    """Parts of a file; a ValueError where it is too short."""
    contents = []
    with open(open_regular(path), "rb") as file:
        for first, last in parts:
            file.seek(first)
            contents.append(file.read(last - first))
            if len(contents[-1]) != last - first:
                raise ValueError("it is shorter than it must be")
    return contents
