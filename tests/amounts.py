"""How much the slow tests try, and from which seed: with others, they try others."""

from __future__ import annotations

import os

SEED = int(os.environ.get("IGSTORE_TEST_SEED", "0"))


def amount(usual: int) -> int:
    """How many cases to try: as many as ``IGSTORE_TEST_CASES`` says, or as usual."""
    return int(os.environ.get("IGSTORE_TEST_CASES", usual))
