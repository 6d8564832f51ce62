"""Writing files so that a crash leaves either the old one or the new one, and knowing that one is what was written."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from igstore.errors import UserError
from igstore.files.access import NOT_THERE

_PIECE_BYTES = 1 << 18  # stays in the processor's cache

_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)

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


class Folder:
    """A folder that is held by its descriptor; a context manager.

    What is done in it is done in this one, wherever it is moved meanwhile, and never in another that takes its place.
    Links in it are not followed. Names are relative to it, and folders on the way are made. What is written is on the
    disk, under its name, when the call returns.

    Parameters
    ----------
    path
        Where it is.

    Attributes
    ----------
    path
        Where it was when it was opened.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        There is no folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, _FOLDER)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    @property
    def is_in_place(self) -> bool:
        """Whether its path still leads to it."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except NOT_THERE:
            return False

    @contextmanager
    def _reached(self, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """The folder that holds `name`, open, and its name there; raises `FileNotFoundError` unless it is made."""
        *parents, last = name.split("/")
        descriptor = os.dup(self._descriptor)
        try:
            with _naming(self.path / name):
                for parent in parents:
                    if make:
                        _make_folder(descriptor, parent, self.path / name)
                    within = os.open(parent, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
                    os.close(descriptor)
                    descriptor = within
                yield descriptor, last
        finally:
            os.close(descriptor)

    def open(self, name: str, flags: int) -> int:
        """A descriptor of a file, made if that is among the flags; whoever calls closes it."""
        with self._reached(name, make=bool(flags & os.O_CREAT)) as (home, last):
            return os.open(last, flags | os.O_NOFOLLOW, 0o666, dir_fd=home)

    def write(self, name: str, *pieces: bytes | memoryview) -> None:
        """Write a file under a temporary name, and then rename it, over the file or link that is there."""
        with self._reached(name, make=True) as (home, last):
            temporary = temporary_name(Path(last)).name
            try:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=home)
                with open(descriptor, "wb") as file:
                    for piece in pieces:
                        file.write(piece)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, last, src_dir_fd=home, dst_dir_fd=home)
                _flush_folder(home)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=home)
                raise

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON object, readable by people; NaN and infinity are refused (ValueError)."""
        self.write(name, _json(content))

    def read(self, name: str) -> bytes | None:
        """What a file holds; None where there is no such file, or something else in its place."""
        try:
            descriptor = self.open(name, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
        except NOT_THERE:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise
        with open(descriptor, "rb") as file:
            return file.read() if stat.S_ISREG(os.fstat(descriptor).st_mode) else None

    def names(self, name: str) -> list[str]:
        """What is in a folder, in order; nothing where there is none."""
        try:
            with self._reached(f"{name}/.") as (home, _):
                return sorted(os.listdir(home))
        except NOT_THERE:
            return []

    def remove(self, name: str) -> None:
        """Remove what is there, if anything: a file, a link, or a folder with all that is in it."""
        try:
            with self._reached(name) as (home, last):
                if stat.S_ISDIR(os.stat(last, dir_fd=home, follow_symlinks=False).st_mode):
                    shutil.rmtree(last, dir_fd=home, ignore_errors=True)
                else:
                    os.unlink(last, dir_fd=home)
                _flush_folder(home)
        except NOT_THERE:
            pass  # or somebody else has removed it in this moment

    def remove_empty(self, name: str) -> None:
        """Remove a folder if there is nothing in it."""
        with suppress(OSError), self._reached(name) as (home, last):
            os.rmdir(last, dir_fd=home)


def _make_folder(within: int, name: str, path: Path) -> None:
    """Make a folder in an open one, unless it is there; also in the place of a file. `path` is for messages."""
    try:
        kind = os.stat(name, dir_fd=within, follow_symlinks=False).st_mode
        if stat.S_ISDIR(kind):
            return
        if stat.S_ISLNK(kind):
            raise UserError(f"{path} is not written: {name} on the way to it is a link; put the folder itself there")
        os.unlink(name, dir_fd=within)
    except (FileNotFoundError, IsADirectoryError):
        pass  # another process is making it in this moment
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=within)
    _flush_folder(within)


def write_atomically(path: Path, *pieces: bytes | memoryview) -> None:
    """As `Folder.write`, in the folder of `path`, which is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Folder(path.parent) as folder:
        folder.write(path.name, *pieces)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As `Folder.write_json`."""
    write_atomically(path, _json(content))


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the sha256 of its own contents added, under ``seal``, in place of an older one."""
    unsealed = {name: value for name, value in content.items() if name != "seal"}
    text = json.dumps(unsealed, sort_keys=True)
    return {**unsealed, "seal": hashlib.sha256(text.encode()).hexdigest()}


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object is as `sealed` made it: nothing in it has changed since."""
    return sealed(content).get("seal") == content.get("seal")


def flush(path: Path) -> None:
    """Wait until what a file holds, or a folder with all that is in it, is on the disk.

    The name of `path` itself is on the disk after `flush_names` of its folder.
    """
    for home, _, names in os.walk(path):
        for name in names:
            _flush_one(Path(home, name))
        _flush_one(Path(home))
    if not path.is_dir():
        _flush_one(path)


def flush_names(path: Path) -> None:
    """Wait until the names of what is in a folder are on the disk."""
    _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _naming(path):
            if path.is_dir():
                _flush_folder(descriptor)
            else:
                os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(descriptor: int) -> None:
    """Wait until the names in an open folder are on the disk, where the file system knows how to."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's path into errors of disks, full or failing ones, which do not say which file it was."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # one of igstore's own
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


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
