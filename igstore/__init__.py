"""Integrated Gradients once, masked images for ever.

`build_store` runs Integrated Gradients over a list of images and keeps the maps in a Zarr store; `rank_store` ranks
their 3x3 blocks; `open_store`, `masked_view`, `keep_mask` and `MaskedImageNet` read it; `evaluate` makes the tables.

Names are imported when first used, so that reading a store never waits for torch.
"""

from __future__ import annotations

import sys
from types import ModuleType

from igstore._faces import face

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = face(__name__)


class _Package(ModuleType):
    """Importing the module `igstore.evaluate` would replace the function of that name; a public name stays itself."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
