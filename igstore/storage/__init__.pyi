from igstore.storage import hdf5_layout as hdf5_layout, layout as layout, staging as staging
from igstore.storage.arrays import ImageArray as ImageArray
from igstore.storage.concurrency import at_work as at_work, check_in_place as check_in_place, hold as hold
from igstore.storage.consistency import Problems as Problems, check_images as check_images, check_ranks as check_ranks
from igstore.storage.copies import (
    check_finished as check_finished,
    check_sealed as check_sealed,
    own_fields as own_fields,
    write_copy as write_copy,
)
from igstore.storage.hdf5_form import Hdf5Form as Hdf5Form
from igstore.storage.hdf5_writer import write_hdf5 as write_hdf5
from igstore.storage.integrity import (
    Finding as Finding,
    check_shard as check_shard,
    check_shards as check_shards,
    withdraw_damaged as withdraw_damaged,
)
from igstore.storage.interchange import write_quantus as write_quantus, write_virelay as write_virelay
from igstore.storage.layout import LISTED as LISTED, ranking_attributes as ranking_attributes
from igstore.storage.reader import (
    Form as Form,
    RankingReader as RankingReader,
    Sharded as Sharded,
    StoreReader as StoreReader,
)
from igstore.storage.staging import kept_images as kept_images
from igstore.storage.writer import (
    Contents as Contents,
    bring_about as bring_about,
    check_there as check_there,
    consolidated as consolidated,
    contents as contents,
    create_ranking as create_ranking,
    create_store as create_store,
    extend_store as extend_store,
    finish_store as finish_store,
    lay_out_store as lay_out_store,
    metadata as metadata,
    ranking_metadata as ranking_metadata,
    read_json as read_json,
    write_rank_shard as write_rank_shard,
    write_shard as write_shard,
)
from igstore.storage.zarr_form import ZarrForm as ZarrForm
