"""Which pages are in memory, and which of them are shared?"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["evict", "files_of", "private_growth", "resident_share"]


def evict(path: str | os.PathLike[str]) -> float | None:
    """Ask the system to drop a file, or a folder's files, from the page cache.

    Close every memory map of it before: mapped pages stay, and so does what lies in memory anyway
    (tmpfs).

    Returns:
        As :func:`resident_share`: 0 where the next read comes from the disk. None where this
        system has no such call.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    for file in files_of(Path(path)):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident_share(path)


def resident_share(path: str | os.PathLike[str]) -> float | None:
    """Return which share of a file's pages, or of a folder's files, is in memory now.

    After :func:`evict` and a read it says how much of the file that read has touched, the
    system's read-ahead included. None where this system does not tell.
    """
    here = there = 0
    for file in files_of(Path(path)):
        with open(file, "rb") as opened:
            pages = _resident_pages(opened.fileno())
        if pages is None:
            return None
        here, there = here + sum(pages), there + len(pages)
    return here / max(there, 1)


def _resident_pages(descriptor: int) -> list[int] | None:
    """Return 1 for each page of a file that is in memory, by mincore."""
    size = os.fstat(descriptor).st_size
    if not size:
        return []
    count = -(-size // mmap.PAGESIZE)
    vector = (ctypes.c_ubyte * count)()
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as pages:
        address = ctypes.c_char.from_buffer(pages)
        call = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
        status = (
            -1
            if call is None
            else call(ctypes.c_void_p(ctypes.addressof(address)), ctypes.c_size_t(size), vector)
        )
        del address
    return None if status else [byte & 1 for byte in vector]


def private_growth(function: Callable[[], Any]) -> int | None:
    """Return by how many bytes a forked child's own memory grows while it calls a function.

    A forked worker shares its parent's pages until somebody writes to them; then it gets a copy of
    its own. What a call only reads of the parent's data therefore costs nothing, unless Python
    writes to it, as it does when it counts references.

    Returns:
        Bytes, from the system's accounts; None where there is no fork or no such account (only
        Linux has both).

    Raises:
        RuntimeError: the function raised in the child.
    """
    if _private_bytes() is None:
        return None
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            before = _private_bytes()
            function()
            os.write(writing, b"%d" % (_private_bytes() - before))
        finally:
            os._exit(0)  # nothing of the parent's is to be cleaned up here
    os.close(writing)
    with open(reading, "rb") as answer:
        grown = answer.read()
    os.waitpid(child, 0)
    if not grown:
        raise RuntimeError(f"{function!r} raised in the forked child: call it here to see why")
    return int(grown)


def _private_bytes() -> int | None:
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def files_of(path: Path) -> list[Path]:
    """Return a file itself, or all files below a folder."""
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    return [path]
