"""A file or folder that takes long to make: it appears whole under its name, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from igstore.errors import IgstoreError, StoreExistsError, UserError
from igstore.files import atomic
from igstore.files.access import access_error
from igstore.files.locks import lock


@contextmanager
def appearing(out: Path, *, is_file: bool = False) -> Iterator[Path]:
    """Give an empty folder, or file, to be filled, which is renamed to `out` when the context ends well, or is removed.

    What a process that was killed left of `out` is removed first, where locks say that it is not alive. A kill at any
    moment leaves either the one or the other, and nothing beside them.

    Parameters
    ----------
    out
        Where it is to be. When the context has ended, it is on the disk.
    is_file
        A file rather than a folder.

    Raises
    ------
    StoreExistsError
        There is something at `out`.
    UserError
        Nothing can be made beside it.
    AccessError
        The system does not let it be written: the disk is full, among other things.
    """
    for leftover in atomic.temporaries(out):
        if not atomic.is_of_another_machine(leftover):
            _remove_unless_alive(leftover)
    _check_free(out)
    making = atomic.temporary_name(out)
    try:
        if is_file:
            making.touch(exist_ok=False)
        else:
            making.mkdir()
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}; give a path in a folder that is there") from error
    try:
        with _opened(making) as descriptor:
            lock(descriptor)
            yield making
            atomic.flush(making)
            _check_free(out)
            making.replace(out)
            atomic.flush_names(out.parent)
    except BaseException as error:
        _remove(making)
        if isinstance(error, OSError) and not isinstance(error, IgstoreError):
            raise access_error(f"{out} cannot be written", error) from error
        raise


def _check_free(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise StoreExistsError(f"{out} exists, and nothing is ever written over; give another name, or remove it")


def _remove_unless_alive(leftover: Path) -> None:
    try:
        with _opened(leftover) as descriptor:
            if lock(descriptor):
                _remove(leftover)
    except OSError:
        pass  # it has just been finished or removed, or is somebody else's


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
