"""Who may convert into a file? One process at a time, and never one that is dead.

The lock is the system's own and goes with the process that holds it, however that ends. It belongs
to the process and not to the open file (POSIX ``lockf``, not ``flock``): worker processes that
outlive their parent for a moment do not hold it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["only_writer"]

_guard = threading.Lock()
_held: set[tuple[int, str]] = set()  # (process, lock file): lockf does not tell threads apart


@contextmanager
def only_writer(target: Path) -> Iterator[None]:
    """Hold the lock of a target.

    Raises:
        BlockingIOError: somebody else holds it.
    """
    path = target.absolute().with_name(f".{target.name}.lock")
    mine = (os.getpid(), str(path))
    with _guard:
        # looked at before the file is: to close it would drop the lock of the other thread
        if mine in _held:
            raise _busy(target)
        handle = _acquire(path, target)
        _held.add(mine)
    try:
        yield
    finally:
        with _guard:
            _held.discard(mine)
            with suppress(OSError):
                os.unlink(path)  # while it is held, so that nobody waits at a file that goes
            os.close(handle)


def _acquire(path: Path, target: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            _lock(handle)
            if _is_at(handle, path):
                return handle
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise _busy(target) from None
            raise
        os.close(handle)  # its holder removed it between the two calls: take the new one


def _lock(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        return
    import fcntl

    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(handle: int, path: Path) -> bool:
    if os.name == "nt":  # a file that is open cannot be removed there
        return True
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)


def _busy(target: Path) -> BlockingIOError:
    return BlockingIOError(
        errno.EAGAIN, f"another process is converting into {target}: wait for it or stop it"
    )
