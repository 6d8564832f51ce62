"""A file or folder that takes long to make: it appears whole under its name, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from igstore.errors import IgstoreError, StoreExistsError, UserError
from igstore.storage import files
from igstore.storage.reading import access_error


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Give a path to make something at, which is renamed to `out` when the context ends well, and else removed.

    What a process that was killed left of `out` is removed first, where locks say that it is not alive.

    Raises
    ------
    StoreExistsError
        There is something at `out`.
    UserError
        Nothing can be made beside it.
    AccessError
        The system does not let it be written: the disk is full, among other things.
    """
    for leftover in files.temporaries(out):  # before anything else: it may have come as far as the rename
        _remove_unless_alive(leftover)
    _check_free(out)
    workshop = files.temporary_name(out)
    try:
        workshop.mkdir()
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}; give a path in a folder that is there") from error
    try:
        with _locked(workshop):
            yield workshop / out.name
            _check_free(out)
            (workshop / out.name).replace(out)
    except IgstoreError:
        raise
    except OSError as error:
        raise access_error(f"{out} cannot be written", error) from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _check_free(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise StoreExistsError(f"{out} exists, and nothing is ever written over; give another name, or remove it")


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the system's own lock of a folder, which it takes from a process that dies; yields whether there are any."""
    descriptor = os.open(folder, os.O_RDONLY)
    has_locks = True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            has_locks = False
        yield has_locks
    finally:
        os.close(descriptor)


def _remove_unless_alive(workshop: Path) -> None:
    if files.is_of_another_machine(workshop) or not workshop.is_dir():
        return
    try:
        with _locked(workshop) as has_locks:
            if has_locks:
                shutil.rmtree(workshop, ignore_errors=True)
    except OSError:
        pass  # somebody is at work in it, or has just finished
