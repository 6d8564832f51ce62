"""What the metadata of Zarr 3 say, as igstore writes and reads them. No I/O, and no zarr-python.

zarr-python's defaults may be anything, since its users configure them: format 2, other codecs, another order. Whatever
this format needs is said here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from igstore.schema import Compress
from igstore.storage.layout import Variable

ZSTD: dict[str, Any] = {"level": 3, "checksum": False}  # how image-shaped arrays are compressed, one image at a time

_LITTLE_ENDIAN: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
_INDEX: list[dict[str, Any]] = [_LITTLE_ENDIAN, {"name": "crc32c"}]
_DTYPES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()


def group_document(attributes: Mapping[str, Any]) -> bytes:
    """The ``zarr.json`` of a group."""
    return _json({"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"})


def array_document(variable: Variable, shape: Sequence[int], shard_size: int, compress: Compress | None) -> bytes:
    """The ``zarr.json`` of an array: image-shaped ones in shards of chunks of one image, others in chunks as long.

    Parameters
    ----------
    variable, shape
        What it is, and its length in each of its dimensions.
    shard_size
        Images of a shard.
    compress
        How images are compressed; None leaves them raw.
    """
    if variable.dtype == "string":
        codecs: list[Any] = [{"name": "vlen-utf8", "configuration": {}}]
    else:
        codecs = [_plain(variable.numpy_dtype)]
    if variable.is_sharded:
        inner = [*codecs, {"name": compress, "configuration": ZSTD}] if compress else codecs
        sharding = {"chunk_shape": [1, *shape[1:]], "codecs": inner, "index_codecs": _INDEX, "index_location": "end"}
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    fill = variable.fill_value
    document = {
        "shape": list(shape),
        "data_type": variable.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_size, *shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if isinstance(fill, float) and math.isnan(fill) else fill,
        "codecs": codecs,
        "attributes": {"description": variable.description},
        "dimension_names": list(variable.dims),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    return _json(document)


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()


@dataclass(frozen=True)
class ArrayMetadata:
    """What an array is.

    Attributes
    ----------
    shape, dtype
        Of all of it.
    chunks
        The shape of what is in one file.
    encoding
        How that is encoded. ``raw`` and ``zstd``: a shard of chunks of one image, raw or compressed by zstd, with its
        index at the end. ``plain``: one raw chunk, or strings as ``vlen-utf8``. None is any other way.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]
    encoding: str | None


def array_metadata(document: Mapping[str, Any]) -> ArrayMetadata:
    """What an array's ``zarr.json`` says of it; a ValueError, TypeError or KeyError where it is none."""
    if document["node_type"] != "array" or document["zarr_format"] != 3:
        raise ValueError(f"it is a {document['node_type']!r:.40} of format {document['zarr_format']!r:.40}")
    shape, chunks = document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"]
    for lengths in (shape, chunks):
        if not isinstance(lengths, list) or not lengths or not all(type(one) is int and one > 0 for one in lengths):
            raise ValueError(f"{lengths!r:.80} is no shape")
    if len(shape) != len(chunks):
        raise ValueError(f"its chunks have {len(chunks)} dimensions, and it has {len(shape)}")
    name = document["data_type"]
    if name not in (*_DTYPES, "string"):
        raise ValueError(f"its data type is {name!r:.80}")
    dtype: np.dtype[Any] = np.dtype(np.dtypes.StringDType() if name == "string" else name)
    codecs = document["codecs"]
    return ArrayMetadata(tuple(shape), dtype, tuple(chunks), _encoding(codecs, dtype, shape))


def _encoding(codecs: Any, dtype: np.dtype[Any], shape: Sequence[int]) -> str | None:
    (name, sharding), *others = map(_codec, codecs)
    if others or name != "sharding_indexed":
        expected: dict[str, Any] = {"name": "vlen-utf8"} if dtype.kind == "T" else _plain(dtype)
        return "plain" if _are(codecs, [expected]) else None
    is_indexed = _are(sharding["index_codecs"], _INDEX) and sharding.get("index_location", "end") == "end"
    if not is_indexed or sharding["chunk_shape"] != [1, *shape[1:]] or dtype.kind == "T":
        return None
    first, *others = sharding["codecs"]
    if not _are([first], [_plain(dtype)]):
        return None
    names = [name for name, _ in map(_codec, others)]
    return {"": "raw", "zstd": "zstd"}.get("".join(names))


def _plain(dtype: np.dtype[Any]) -> dict[str, Any]:
    """The codec of little-endian bytes as they are; single bytes have no order."""
    return {"name": "bytes"} if dtype.itemsize == 1 else _LITTLE_ENDIAN


def _codec(codec: Any) -> tuple[str, dict[str, Any]]:
    """A codec's name and configuration; one without may be written as its name alone."""
    if isinstance(codec, str):
        return codec, {}
    return codec["name"], codec.get("configuration") or {}


def _are(codecs: Any, expected: Sequence[dict[str, Any]]) -> bool:
    return list(map(_codec, codecs)) == list(map(_codec, expected))
