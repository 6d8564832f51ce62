"""Writing files so that a crash leaves either the old one or the new one, never half of one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # ends the name of a file that is being written; zarr-python uses the same


def write_atomically(path: Path, *pieces: bytes | memoryview) -> None:
    """Write `pieces` under a temporary name, flush them to the disk, then rename; the folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # the process id keeps two builders' temporary files apart
    temporary = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with temporary.open("wb") as file:
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


def flush(path: Path) -> None:
    """Wait until a file's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> dict[str, Any]:
    """A file's size in bytes and sha256 in hex, as a record holds them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
