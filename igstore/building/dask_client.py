"""A client of a dask.distributed scheduler that is running somewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from igstore.errors import UserError, option


@contextmanager
def connect(address: str) -> Iterator[Any]:
    """A client of the scheduler at `address`, such as ``tcp://host:8786``, for as long as the context lasts.

    Raises
    ------
    UserError
        dask.distributed is not installed, or no scheduler answers.
    """
    try:
        from distributed import Client
    except ImportError:
        raise UserError(
            f"{option('scheduler')} is {address}, which needs dask.distributed; install it with `pip install "
            "'igstore[cluster]'`"
        ) from None
    try:
        client = Client(address, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(f"no dask scheduler answers at {address}: {error}") from error
    with client:
        yield client
