"""The switch of the two kernels that are compiled from C++, for CPUs, when igstore is installed."""

from __future__ import annotations

import os

from igstore.errors import UserError

VARIABLE = "IGSTORE_KERNELS"


def kernels_allowed() -> bool:
    """Whether compiled kernels may be used; the environment variable ``IGSTORE_KERNELS=0`` rules them out.

    Raises
    ------
    UserError
        The variable is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE) or "1"
    if value not in ("0", "1"):
        raise UserError(f"{VARIABLE} is {value!r}; it must be 0, to do without the compiled kernels, or 1")
    return value == "1"
