"""Writing files so that a crash leaves either the old one or the new one, and knowing that one is what was written."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

_PIECE_BYTES = 1 << 18  # stays in the processor's cache

PARTIAL = ".partial"  # ends the name of a file that is being written; zarr-python uses the same

# What we put before it is a UUID of version 8, "custom", whose first digits say which machine is writing.
_OURS = re.compile(r"\.([0-9a-f]{12})8[0-9a-f]{19}" + re.escape(PARTIAL))


def temporary_name(path: Path) -> Path:
    """Where to write what will be at `path`; each call gives another, as several machines may write it at once."""
    return path.with_name(f"{path.name}.{_machine()}8{uuid.uuid4().hex[13:]}{PARTIAL}")


def is_of_another_machine(temporary: Path) -> bool:
    """Whether a temporary name was given on another machine than this one."""
    ours = _OURS.search(temporary.name)
    return ours is not None and ours[1] != _machine()


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12]


def temporaries(path: Path) -> list[Path]:
    """What interrupted writers of `path` left under such names."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.{'?' * 32}{PARTIAL}"))


def write_atomically(path: Path, *pieces: bytes | memoryview) -> None:
    """Write `pieces` under a temporary name, flush them to the disk, then rename; the folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with _naming(path), temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object atomically, readable by people; NaN and infinity are refused (ValueError)."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the sha256 of its own contents added, under ``seal``, in place of an older one."""
    unsealed = {name: value for name, value in content.items() if name != "seal"}
    text = json.dumps(unsealed, sort_keys=True)
    return {**unsealed, "seal": hashlib.sha256(text.encode()).hexdigest()}


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object is as `sealed` made it: nothing in it has changed since."""
    return sealed(content).get("seal") == content.get("seal")


def flush(path: Path) -> None:
    """Wait until a file's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name into errors of disks, full or failing ones, which do not say which file it was."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def checksum(path: Path) -> dict[str, Any]:
    """What a record holds of a file: `checksum_of` its pieces."""
    return checksum_of(_pieces(path))


def checksum_of(pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Size in bytes, CRC-32C and sha256, both in hex, of pieces one after the other.

    The CRC-32C tells in a tenth of the time whether something is still what was written; the sha256 is its name, from
    which others know it.
    """
    n_bytes, crc, digest = 0, 0, hashlib.sha256()
    for piece in pieces:
        n_bytes += memoryview(piece).nbytes  # its length may be in images
        crc = _extended(crc, piece)
        digest.update(piece)
    return {"bytes": n_bytes, "crc32c": f"{crc:08x}", "sha256": digest.hexdigest()}


def crc32c(path: Path) -> str:
    """A file's CRC-32C in hex, as a record holds it."""
    crc = 0
    for piece in _pieces(path):
        crc = _extended(crc, piece)
    return f"{crc:08x}"


def _extended(crc: int, piece: bytes | memoryview) -> int:
    # through NumPy, because it does not take a memoryview
    return int(google_crc32c.extend(crc, np.frombuffer(piece, np.uint8)))


def _pieces(path: Path) -> Iterator[memoryview]:
    """A file's contents, piece by piece; each is gone when the next one is asked for."""
    piece = memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while n_bytes := file.readinto(piece):
            yield piece[:n_bytes]
