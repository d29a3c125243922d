"""Where may files be kept, and how does one appear whole or not at all?"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dlhelpers.printable import printable

__all__ = ["cache_dir", "write_whole"]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_dir() -> Path:
    """Return the user's cache folder of this package; it need not exist yet."""
    from platformdirs import user_cache_path

    return user_cache_path("dlhelpers", appauthor=False)


def write_whole(path: str | Path, suffixes: Sequence[str], write: Callable[[str], Any]) -> Path:
    """Let ``write`` make a file beside the path, then put it there: whole, or not at all.

    Args:
        suffixes: one of which the path must end in; any may, if there are none.

    Raises:
        ValueError: the suffix is another one.
        FileNotFoundError: there is no such folder.
        PermissionError: nothing may be written into it.
        OSError: there is no room for all of it.
    """
    path = Path(path).expanduser()
    if suffixes and not path.name.endswith(tuple(suffixes)):
        raise ValueError(f"path must end in {' or '.join(suffixes)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(printable(f"there is no folder {path.parent}: make it first"))
    partial = path.with_name(f".{os.getpid()}-{threading.get_ident()}.part{path.suffix}")
    try:
        write(str(partial))
        partial.replace(path)
    except PermissionError as error:
        raise PermissionError(
            printable(
                f"cannot write {path.name!r} into {path.parent}: choose a folder of your own, or "
                f"allow it there ({error.strerror})"
            )
        ) from None
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        told = f"there is no room for {path.name} in {path.parent} ({error.strerror}): make some, "
        told += "or give a path elsewhere. Nothing was written, and nothing replaced"
        raise OSError(error.errno, printable(told)) from None
    finally:
        with suppress(OSError):
            partial.unlink()
    return path
