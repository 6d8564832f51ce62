"""Integrated Gradients once, masked images for ever.

`build_store` runs Integrated Gradients over a list of images and keeps the maps in a Zarr store; `rank_store` ranks
their 3x3 blocks; `open_store`, `masked_view`, `keep_mask` and `MaskedImageNet` read it; `evaluate` makes the tables.

Names are imported when first used, so that reading a store never waits for torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BuildSpec": "schema",
    "Classifier": "models",
    "Evaluation": "evaluate",
    "IgstoreError": "errors",
    "MaskOptions": "masks",
    "MaskedBatches": "batches",
    "MaskedImageNet": "dataset",
    "Preprocessing": "schema",
    "StoreInfo": "info",
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

if TYPE_CHECKING:  # the same names for type checkers and editors, which do not run what is below
    from igstore.attribution import integrated_gradients as integrated_gradients
    from igstore.batches import MaskedBatches as MaskedBatches
    from igstore.build import build_store as build_store
    from igstore.calibrate import learn_rules as learn_rules
    from igstore.curves import insertion_deletion as insertion_deletion
    from igstore.dataset import MaskedImageNet as MaskedImageNet
    from igstore.errors import IgstoreError as IgstoreError
    from igstore.errors import UserError as UserError
    from igstore.evaluate import Evaluation as Evaluation
    from igstore.evaluate import evaluate as evaluate
    from igstore.export import export_store as export_store
    from igstore.images import find_images as find_images
    from igstore.imported import import_maps as import_maps
    from igstore.info import StoreInfo as StoreInfo
    from igstore.info import store_info as store_info
    from igstore.masks import MaskOptions as MaskOptions
    from igstore.merge import merge_stores as merge_stores
    from igstore.models import Classifier as Classifier
    from igstore.models import classifier_from_module as classifier_from_module
    from igstore.models import load_classifier as load_classifier
    from igstore.rank import rank_store as rank_store
    from igstore.report import make_report as make_report
    from igstore.schema import BuildSpec as BuildSpec
    from igstore.schema import Preprocessing as Preprocessing
    from igstore.show import show_store as show_store
    from igstore.storage.reader import StoreReader as StoreReader
    from igstore.verify import verify_store as verify_store
    from igstore.views import keep_mask as keep_mask
    from igstore.views import masked_view as masked_view
    from igstore.views import open_store as open_store
else:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'igstore' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"igstore.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Importing the module `igstore.evaluate` would replace the function of that name; a public name stays itself."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
