from igstore.attribution import integrated_gradients as integrated_gradients
from igstore.build import build_store as build_store
from igstore.building import rank_store as rank_store
from igstore.calibrate import learn_rules as learn_rules
from igstore.curves import insertion_deletion as insertion_deletion
from igstore.datasets import (
    MaskedBatches as MaskedBatches,
    MaskedImageNet as MaskedImageNet,
    keep_mask as keep_mask,
    masked_view as masked_view,
    open_store as open_store,
)
from igstore.errors import IgstoreError as IgstoreError, UserError as UserError
from igstore.evaluate import Evaluation as Evaluation, evaluate as evaluate
from igstore.export import export_store as export_store
from igstore.images import find_images as find_images
from igstore.imported import import_maps as import_maps
from igstore.info import StoreInfo as StoreInfo, store_info as store_info
from igstore.masks import MaskOptions as MaskOptions
from igstore.merge import merge_stores as merge_stores
from igstore.models import (
    Classifier as Classifier,
    classifier_from_module as classifier_from_module,
    load_classifier as load_classifier,
)
from igstore.report import make_report as make_report
from igstore.schema import BuildSpec as BuildSpec, Preprocessing as Preprocessing
from igstore.show import show_store as show_store
from igstore.storage import StoreReader as StoreReader
from igstore.verify import verify_store as verify_store

__version__: str
