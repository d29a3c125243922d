"""Why could a conversion not write its file, and what helps?"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dlhelpers.printable import printable

if TYPE_CHECKING:
    from dlhelpers.lmdb_io.converting import Conversion

__all__ = ["clear_errors"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_LEAST = 1 << 16  # bytes that LMDB needs for the smallest file


@contextmanager
def clear_errors(conversion: Conversion) -> Iterator[None]:
    """Say of an error that ends a conversion what helps, and how to go on.

    Errors of the source's own code stay as they are; a note says how to go on.

    Raises:
        OSError: in place of LMDB's errors, and where the disk is full.
    """
    import lmdb

    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(conversion.advice() or "nothing is kept: start again")
        raise
    except (lmdb.Error, OSError) as error:
        if not conversion.reading:
            _raise_clearly(error, conversion)
        if advice := conversion.advice():
            error.add_note(advice)
        raise


def _raise_clearly(error: Exception, conversion: Conversion) -> NoReturn:
    code, text = getattr(error, "errno", None), str(error)
    if code is None:  # LMDB's own errors have only a text
        known = (*_FULL, errno.EFBIG, errno.EMFILE)
        code = next((number for number in known if os.strerror(number) in text), errno.EIO)
        if code == errno.EIO:  # also what LMDB makes of a page that fitted only in part
            code = _reason_of_short_write(conversion)
    elif code not in (*_FULL, errno.EFBIG, errno.EMFILE):
        raise error
    parts = [_what_helps(code, conversion.partial.parent) or text]
    if advice := conversion.advice():
        parts.append(advice)
    else:
        parts.append("Nothing was kept, and nothing replaced")
        if conversion.is_fresh:  # it holds nothing that could be taken up, and needs space
            conversion.close()
            with suppress(OSError):
                conversion.partial.unlink()
    if code in _FULL and (old := _size(conversion.target)):
        name = conversion.target.name
        parts.append(f"The old {name} ({old / 1e6:.1f} MB) stays until the new one is whole")
    raise OSError(code, printable(f"{conversion.partial}: {'. '.join(parts)}")) from error


def _what_helps(code: int, folder: Path) -> str:
    if code == errno.EDQUOT:
        return "your quota on this disk is used up: remove files of yours, or ask for more"
    if code == errno.EFBIG:
        no_limit = _size_limit() < 0
        remedy = "shard= writes several" if no_limit else "raise it (ulimit -f)"
        return f"the file is larger than the limit for files here: {remedy}"
    if code == errno.ENOSPC:
        with suppress(OSError, AttributeError):  # Windows has no such call
            disk = os.statvfs(folder)
            if disk.f_files and not disk.f_favail:
                return "the disk has room for no more files (inodes): remove some"
        return "the disk is full: free some space"
    if code == errno.EMFILE:
        return "this process has too many files open: allow more (ulimit -n)"
    return ""


def _reason_of_short_write(conversion: Conversion) -> int:
    needed = max(conversion.pending_bytes, _LEAST)
    if 0 <= _size_limit() < _size(conversion.partial) + needed:
        return errno.EFBIG
    free = shutil.disk_usage(conversion.partial.parent).free
    return errno.ENOSPC if free < needed else errno.EIO


def _size_limit() -> int:
    """Return the bytes that a file of this process may have, -1 for any number."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return -1
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
