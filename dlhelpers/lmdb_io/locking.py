"""Who may convert into a file? One process at a time, and never one that is dead.

The lock is the system's own and goes with the process that holds it, however that ends. It belongs
to the process and not to the open file (POSIX ``lockf``, not ``flock``): worker processes that
outlive their parent for a moment do not hold it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dlhelpers.printable import printable

__all__ = ["in_turn", "only_writer"]

_PATIENCE_S = 60.0  # a turn takes a moment: who holds it for so long is stopped, or dead

_guard = threading.Lock()
_held: set[tuple[int, str]] = set()  # (process, lock file): lockf does not tell threads apart


@contextmanager
def only_writer(target: Path, lock: bool = True) -> Iterator[None]:
    """Hold the lock of a target.

    Args:
        target: the file to convert into.
        lock: False keeps only the threads of this process apart, where a mount has no locks.

    Raises:
        BlockingIOError: somebody else holds it.
        OSError: the file system has no locks; says what to do.
    """
    path = target.absolute().with_name(f".{target.name}.lock")
    mine = (os.getpid(), str(path))
    with _guard:
        # looked at before the file is: to close it would drop the lock of the other thread
        if mine in _held:
            raise _busy(target)
        handle = _acquire(path, target) if lock else None
        _held.add(mine)
    try:
        yield
    finally:
        with _guard:
            _held.discard(mine)
            if handle is not None:
                with suppress(OSError):
                    os.unlink(path)  # while it is held, so that nobody waits at a file that goes
                os.close(handle)


@contextmanager
def in_turn(folder: Path, lock: bool = True) -> Iterator[None]:
    """Wait until nobody else finishes a shard of this folder; after a minute go on all the same.

    Args:
        folder: of the shards.
        lock: False uses a file that only one process can create in place of the system's locks.
    """
    target, until = folder / "shards", time.monotonic() + _PATIENCE_S
    created = target.with_name(f".{target.name}.turn")
    with ExitStack() as held:
        while time.monotonic() < until:
            try:
                with ExitStack() as taken:
                    taken.enter_context(only_writer(target, lock))
                    if not lock:
                        os.close(os.open(created, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
                        taken.callback(_remove, created)
                    held.push(taken.pop_all())
                break
            except (BlockingIOError, FileExistsError, PermissionError):  # Windows has the last
                time.sleep(0.01)
        else:
            _remove(created)  # its owner was killed
        yield


def _remove(path: Path) -> None:
    with suppress(OSError):
        os.unlink(path)


def _acquire(path: Path, target: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            _lock(handle)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                os.close(handle)
                raise _busy(target) from None
            with suppress(OSError):
                os.unlink(path)  # nobody can hold it
            os.close(handle)
            raise _no_locks(error, target) from error
        if _is_at(handle, path):
            return handle
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
        errno.EAGAIN,
        printable(f"another process is converting into {target}: wait for it or stop it"),
    )


def _no_locks(error: OSError, target: Path) -> OSError:
    return OSError(
        error.errno,
        printable(
            f"the file system of {target.parent} gives no lock ({error.strerror}). Mount it with "
            "locks (Lustre: -o flock; NFS: with its lock service), or convert on a local disk and "
            f"copy the file; if nothing else converts into {target.name}, lock=False (--no-lock) "
            "goes without"
        ),
    )
