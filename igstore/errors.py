"""What can go wrong, as exceptions that are igstore's own and a builtin's at once.

A command turns them into its exit status: `UserError` is 2 (one line, no traceback), any other `IgstoreError` is 1.
Messages say what was given, what was expected and what to type next.
"""

from __future__ import annotations


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
