"""What can go wrong, as exceptions that are igstore's own and a builtin's at once.

A command turns them into its exit status: `UserError` is 2 (one line, no traceback), any other `IgstoreError` is 1.
Messages say what was given, what was expected and what to type next; `option` names parameters as the caller does:
``images=PATH`` in Python, ``--data PATH`` on the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# What the command that runs calls its parameters; None in Python. One for the process, whose threads serve one command.
_called: dict[str, str] | None = None


class IgstoreError(Exception):
    """Base of every error that igstore raises on purpose."""

    exit_status = 1


class UserError(IgstoreError, ValueError):
    """Something that was asked for is wrong or refused; nothing was changed.

    >>> issubclass(UserError, ValueError), UserError.exit_status
    (True, 2)
    """

    exit_status = 2


class DataNotFoundError(UserError, FileNotFoundError):
    """No images where they were looked for."""


class WeightsNotFoundError(UserError, FileNotFoundError):
    """A model's weights are neither on this machine nor to be downloaded."""


class StoreNotFoundError(UserError, FileNotFoundError):
    """No store, or no such array or ranking in it, where it was looked for."""


class StoreExistsError(UserError, FileExistsError):
    """Something that this command did not make is in the way."""


class SettingsMismatchError(UserError):
    """A store, or an image list, was made with other settings than the ones asked for."""


class ImageError(IgstoreError, OSError):
    """One image cannot be read; the reason is the message. Builders record it and go on."""


class DamagedStoreError(IgstoreError, RuntimeError):
    """A store's contents contradict its records or its own layout."""


class UnfinishedShardError(DamagedStoreError):
    """A shard that is needed is being written just now, or never was finished."""


class UnreachableError(IgstoreError, OSError):
    """A store behind a URL does not answer, or breaks off, however often it is asked."""


class ReplacedError(IgstoreError, RuntimeError):
    """A file of a store behind a URL is not the one any more that it was when the store was opened."""


class AccessError(IgstoreError, OSError):
    """The system does not let a file be read or written; that says nothing of what the file holds."""


class OutOfMemoryError(IgstoreError, MemoryError):
    """A device, or this machine, has not enough memory."""


class ModelError(IgstoreError, RuntimeError):
    """A network fails, or does not behave as a classifier must (one row of scores an image, always the same)."""


def option(parameter: str, value: str = "") -> str:
    """A parameter as its user knows it, with a value that it may be given.

    >>> option("images", "PATH"), option("images")
    ('images=PATH', 'images')
    >>> with command_line():
    ...     call({"images": "--data"})
    ...     option("images", "PATH"), option("images")
    ('--data PATH', '--data')
    """
    if _called is not None and parameter in _called:
        return f"{_called[parameter]} {value}".rstrip()
    return f"{parameter}={value}" if value else parameter


@contextmanager
def command_line() -> Iterator[None]:
    """A command runs inside; what it calls its parameters is forgotten afterwards."""
    global _called
    before, _called = _called, {}
    try:
        yield
    finally:
        _called = before


def call(names: Mapping[str, str]) -> None:
    """Call parameters by these names until the command ends; where none runs, nothing changes."""
    if _called is not None:
        _called.update(names)
