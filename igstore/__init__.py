"""Integrated Gradients once, masked images for ever.

`build_store` runs Integrated Gradients over a list of images and keeps the maps in a Zarr store; `rank_store` ranks
their 3x3 blocks; `open_store`, `masked_view`, `keep_mask` and `MaskedImageNet` read it; `evaluate` makes the tables.

Names are imported when first used, so that reading a store never waits for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "BuildSpec": "schema",
    "Classifier": "models",
    "IgstoreError": "errors",
    "MaskOptions": "masking",
    "MaskedBatches": "batches",
    "MaskedImageNet": "dataset",
    "Preprocessing": "schema",
    "StoreReader": "storage.reader",
    "UserError": "errors",
    "build_store": "build",
    "classifier_from_module": "models",
    "evaluate": "evaluate",
    "export_store": "export",
    "find_images": "images",
    "import_maps": "imported",
    "insertion_deletion": "curves",
    "integrated_gradients": "attribution",
    "keep_mask": "views",
    "learn_rules": "calibrate",
    "load_classifier": "models",
    "make_report": "report",
    "masked_view": "views",
    "merge_stores": "merge",
    "open_store": "views",
    "rank_store": "rank",
    "show_store": "show",
    "store_info": "info",
    "verify_store": "verify",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'igstore' has no attribute {name!r}")
    return getattr(importlib.import_module(f"igstore.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
