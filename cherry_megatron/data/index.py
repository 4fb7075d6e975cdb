"""Megatron's index of tokens, looked over before it is used: it has no hashes, and Megatron reads what it says."""

import struct
from pathlib import Path
from typing import Any

import numpy as np

_HEAD = struct.Struct("<9sQBQQ")  # magic, version, code of the tokens' type, documents, borders between them
_CODES = {"uint16": 8, "int32": 4}
_BLOCK = 1 << 20  # documents looked at together


def is_index(path: Path, documents: int, tokens: int, dtype: np.dtype[Any]) -> bool:
    """Whether an index has so many documents, one behind the other, with so many tokens.

    Args:
        path: a .idx file of the right size.
        documents, tokens: more than 0.
        dtype: of a token.
    """
    with path.open("rb") as file:
        head = _HEAD.unpack(file.read(_HEAD.size))
    if head != (b"MMIDIDX\0\0", 1, _CODES[dtype.name], documents, documents + 1):
        return False
    lengths = np.memmap(path, np.int32, "r", _HEAD.size, documents)
    places = np.memmap(path, np.int64, "r", _HEAD.size + 4 * documents, documents)
    borders = np.memmap(path, np.int64, "r", _HEAD.size + 12 * documents, documents + 1)
    at = 0
    for first in range(0, documents, _BLOCK):
        block = slice(first, first + _BLOCK)
        ends = at + np.cumsum(lengths[block], dtype=np.int64) * dtype.itemsize
        begins = np.concatenate(([at], ends[:-1]))
        if lengths[block].min() < 0 or not np.array_equal(places[block], begins):
            return False
        if not np.array_equal(borders[first : first + len(ends)], np.arange(first, first + len(ends))):
            return False
        at = int(ends[-1])
    return int(borders[-1]) == documents and at == tokens * dtype.itemsize
