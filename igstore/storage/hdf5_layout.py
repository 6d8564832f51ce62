"""A store as one HDF5 file: what things are called in it, and how its pieces are checked. No I/O.

Every variable is one contiguous dataset under the path that its array has in Zarr: ``attribution``, ``pixels``,
``ranks/positive-3/rank``; a reader may map it into memory at the dataset's offset. The records are JSON texts, one a
shard: ``records/build`` and ``records/positive-3``. A record's ``files`` are named as in Zarr, so that its fields mean
the same in both forms; their sizes and checksums are those of the pieces of the datasets (`piece_checksum`), which
differ from those of the Zarr shards that they were made from.

The attribute ``igstore`` of the root and of the group of each ranking holds all attributes of that group as one JSON
text, which is what igstore reads. For other programs they are there one by one too: strings and numbers as they are,
others as JSON texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igstore import files

ATTRIBUTES = "igstore"  # the attribute that holds them all
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
SUFFIXES = (".h5", ".hdf5")
SIGNATURE = b"\x89HDF\r\n\x1a\n"  # begins a file


def records_dataset(ranking: str | None) -> str:
    """Where the records of the build, or of a ranking, are: texts (shard,), "" for none."""
    return f"records/{ranking or 'build'}"


def piece_checksum(values: NDArray[Any]) -> dict[str, Any]:
    """What a record holds of a shard's piece of a dataset, (image, ...): `files.checksum_of` its bytes.

    Numbers count as they are in the file, little-endian; strings as UTF-8, each with a zero byte after it.
    """
    if values.dtype.kind in "TO":
        content: bytes | memoryview = b"".join(f"{text}\0".encode() for text in values.tolist())
    else:
        content = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data.cast("B")
    return files.checksum_of([content])


def attribute_values(attributes: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """The attributes of a group as HDF5 holds them."""
    plain = {
        name: value if _is_simple(value) else json.dumps(value, allow_nan=False) for name, value in attributes.items()
    }
    return {**plain, ATTRIBUTES: json.dumps(dict(attributes), allow_nan=False)}


def _is_simple(value: object) -> bool:
    """Whether HDF5 has such a value itself: texts are UTF-8 and end with a zero byte, whole numbers have 64 bits."""
    if isinstance(value, str):
        return _NO_TEXT.search(value) is None
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
