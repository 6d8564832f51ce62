from igstore.building.builder import run_build as run_build
from igstore.building.dry_run import Forecast as Forecast, forecast as forecast
from igstore.building.import_attributor import Importer as Importer
from igstore.building.import_source import GivenMaps as GivenMaps, read_ids as read_ids
from igstore.building.parts import Part as Part
from igstore.building.placement import check_sizes as check_sizes, choose_workers as choose_workers
from igstore.building.plan import (
    chosen_classifier as chosen_classifier,
    listed_images as listed_images,
    plan_build as plan_build,
)
from igstore.building.ranking import rank_store as rank_store
from igstore.building.recomputation import Recomputation as Recomputation
from igstore.building.worker import Worker as Worker
