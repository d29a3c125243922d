"""Where in its file does a value lie, and how is it read without LMDB?

What LMDB hands out is gone with its environment, which a forked child closes. A map of its own is
not: it lasts as long as an array that is made of it, and processes share its pages.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["mapped"]

_WORTH_IT = 1 << 16
_PAGE_HEADER = 16  # of LMDB's pages; begins with the page's number
_COMPARED = 24


def mapped(view: memoryview, path: Path, page_size: int) -> Any:
    """Return the bytes of a value as a read-only map of the file, or a copy of a small one.

    A long value has pages of its own, and the header before it says which. Whatever else is found
    there is answered by a copy.

    Args:
        view: what a transaction gave; it must be open.
        path: the file.
        page_size: of the file, in bytes.
    """
    if len(view) < _WORTH_IT:
        return bytes(view)
    address = np.frombuffer(view, np.uint8).ctypes.data
    number = int.from_bytes(ctypes.string_at(address - _PAGE_HEADER, 8), sys.byteorder)
    offset = number * page_size + _PAGE_HEADER
    first = offset - offset % mmap.ALLOCATIONGRANULARITY
    try:
        with open(path, "rb") as file:
            size = offset - first + len(view)
            whole = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=first)
    except (OSError, ValueError, OverflowError):  # no map, or not a page's number
        return bytes(view)
    found = memoryview(whole)[offset - first :]
    return found if found[:_COMPARED] == view[:_COMPARED] else bytes(view)
