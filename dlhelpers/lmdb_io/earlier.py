"""What do the keys and targets of a file look like that has an index and no columns?

Files of earlier versions. Their index is read once, in its own order, into arrays.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

from dlhelpers.lmdb_io import schema
from dlhelpers.lmdb_io.columns import Texts

__all__ = ["keys_of_index", "targets_of_index"]

_ENTRY = re.compile(rb"\[(\d{1,12}),(-?\d+)(,.*)?\]", re.DOTALL)  # where the target is an integer


def targets_of_index(file: Any) -> np.ndarray | Texts:
    """Return the targets of a file: int32 or int64 [N], or JSON where one is no such integer.

    Args:
        file: as LMDBDataset opens it.

    Raises:
        DatabaseError: an entry is damaged or missing.
    """
    positions, targets = array("q"), array("q")
    environment = file.open()
    for _, value in environment.items(environment.index):
        entry = _ENTRY.fullmatch(value)
        if entry is None or len(entry[2]) > 18:  # damaged, other JSON, or perhaps beyond 64 bits
            return _texts(file, lambda _, target: schema.encode_target(target))
        positions.append(int(entry[1]))
        targets.append(int(entry[2]))
    found = np.frombuffer(targets, np.int64)
    narrow = found.astype(np.int32)
    return _in_order(file, positions, narrow if np.array_equal(narrow, found) else found)


def keys_of_index(file: Any) -> Texts:
    """Return the source keys of a file.

    Raises:
        DatabaseError: an entry is damaged or missing.
    """
    return _texts(file, lambda key, _: schema.encode_key(key))


def _texts(file: Any, part: Callable[[str, Any], bytes]) -> Texts:
    """Return a part of every entry, a function of its key and its target."""
    positions, ends, data = array("q"), array("q", [0]), bytearray()
    environment = file.open()
    for key, value in environment.items(environment.index):
        position, target, source_key = schema.read_index(key, value)
        positions.append(position)
        data += part(source_key, target)
        ends.append(len(data))
    bounds = np.frombuffer(ends, np.int64)
    starts, ends_ = (_in_order(file, positions, part) for part in (bounds[:-1], bounds[1:]))
    return Texts(starts, ends_, data)


def _in_order(file: Any, positions: array[int], values: np.ndarray) -> np.ndarray:
    """Return the values in order of their positions, of which none is missing."""
    count, where = file.meta["count"], np.frombuffer(positions, np.int64)
    inside = (where >= 0) & (where < count)
    found, is_there = np.zeros(count, values.dtype), np.zeros(count, bool)
    found[where[inside]], is_there[where[inside]] = values[inside], True
    if not is_there.all():
        raise schema.DatabaseError(
            f"{file.path}: the index misses record {int(is_there.argmin())}; verify_lmdb lists "
            "what is damaged"
        )
    return found
