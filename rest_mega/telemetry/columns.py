"""Nested data with numpy arrays <-> text that a page can hold: arrays as raw bytes, all of it
gzipped, in base64.

    uint32 n | n bytes of JSON | arrays, each at a multiple of 8 bytes from the first

In the JSON an array is {"$": [dtype, offset in bytes, number of elements]}; everything is
little-endian. Base64 has no character that HTML knows, so no text of a model can leave its element.
"""

from __future__ import annotations

import base64
import gzip
import json
import struct
from typing import Any

import numpy as np

_DTYPES = {"int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32", "float64"}


def pack(tree: Any) -> str:
    """The text of dicts, lists, strings, numbers and one-dimensional arrays of these dtypes."""
    body = bytearray()
    header = json.dumps(_lift(tree, body), ensure_ascii=False, allow_nan=False).encode()
    whole = struct.pack("<I", len(header)) + header
    whole += b"\0" * (-len(whole) % 8) + body
    return base64.b64encode(gzip.compress(whole, compresslevel=6, mtime=0)).decode("ascii")


def unpack(text: str) -> Any:
    """What `pack` was given; arrays are read-only."""
    whole = gzip.decompress(base64.b64decode(text, validate=True))
    (size,) = struct.unpack_from("<I", whole)
    start = 4 + size + -(4 + size) % 8
    return _lower(json.loads(whole[4 : 4 + size]), memoryview(whole)[start:])


def _lift(tree: Any, body: bytearray) -> Any:
    """`tree` with its arrays moved into `body`."""
    if isinstance(tree, dict):
        return {name: _lift(value, body) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_lift(value, body) for value in tree]
    if not isinstance(tree, np.ndarray):
        return tree
    name = tree.dtype.name
    assert name in _DTYPES, f"no page reads arrays of {name}"
    assert tree.ndim == 1, f"an array of shape {tree.shape} is no column"
    place = {"$": [name, len(body), len(tree)]}
    body += tree.astype(tree.dtype.newbyteorder("<"), copy=False).tobytes()
    body += b"\0" * (-len(body) % 8)
    return place


def _lower(tree: Any, body: memoryview) -> Any:
    if isinstance(tree, list):
        return [_lower(value, body) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {"$"}:
        name, offset, count = tree["$"]
        return np.frombuffer(body, np.dtype(name).newbyteorder("<"), count, offset)
    return {name: _lower(value, body) for name, value in tree.items()}
