from igstore.files.access import (
    MOST_METADATA as MOST_METADATA,
    NOT_THERE as NOT_THERE,
    Part as Part,
    Recorded as Recorded,
    access_error as access_error,
    is_of_the_machine as is_of_the_machine,
    open_regular as open_regular,
    parse_json as parse_json,
    read_parts as read_parts,
    read_whole as read_whole,
    reading as reading,
)
from igstore.files.all_or_nothing import appearing as appearing
from igstore.files.atomic import (
    PARTIAL as PARTIAL,
    Folder as Folder,
    checksum as checksum,
    checksum_of as checksum_of,
    flush as flush,
    flush_names as flush_names,
    is_of_another_machine as is_of_another_machine,
    is_sealed as is_sealed,
    sealed as sealed,
    temporaries as temporaries,
    temporary_name as temporary_name,
    write_atomically as write_atomically,
    write_json as write_json,
)
from igstore.files.locks import lock as lock
from igstore.files.mapping import map_array as map_array
from igstore.files.names import as_seen as as_seen, is_foreign as is_foreign, is_url as is_url, shown as shown
from igstore.files.sources import LocalFiles as LocalFiles, Source as Source, open_source as open_source
