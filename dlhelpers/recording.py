"""How does one run torch's profiler, one run at a time, without its own lines on stderr?"""

from __future__ import annotations

import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["need_no_recording", "recording"]

# what torch's profiler writes past Python's stderr, whatever one does
_NOISE = re.compile(rb"(CPUAllocator|SyncActivityProfilerHandler|DeviceProperties)\.cpp")
_ALONE = threading.Lock()


@contextmanager
def recording(who: str, **options: Any) -> Iterator[Any]:
    """Give a ``torch.profiler.profile`` that is at work inside the ``with`` block.

    Args:
        who: the function that records, for the message of an error.
        options: of ``torch.profiler.profile``.

    Raises:
        RuntimeError: torch's profiler is at work already, in this thread or another one.
    """
    from torch.profiler import profile

    if torch._C._autograd._profiler_enabled() or not _ALONE.acquire(blocking=False):
        raise _busy(who)
    try:
        with _without_noise(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Pp]rofiler.*")
            with profile(**options) as session:
                yield session
    finally:
        _ALONE.release()


def need_no_recording(who: str) -> None:
    """Raise what :func:`recording` would raise, before anything has run."""
    if torch._C._autograd._profiler_enabled() or _ALONE.locked():
        raise _busy(who)


def _busy(who: str) -> RuntimeError:
    return RuntimeError(
        "torch's profiler is at work already, here or in another thread: it records one "
        f"run at a time, so stop it, or wait for it, before {who}"
    )


@contextmanager
def _without_noise() -> Iterator[None]:
    """Pass on at once what is written to file descriptor 2, all but the profiler's lines."""
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, AttributeError, ValueError):
        yield  # a program without a stderr
        return
    reading, writing = os.pipe()
    end = os.fdopen(writing, "wb", buffering=0)
    pump = threading.Thread(target=_pass_on, args=(reading, kept), daemon=True)
    pump.start()
    try:  # from here on Ctrl-C may come at any moment
        os.dup2(end.fileno(), 2)
        end.close()
        yield
    finally:
        try:
            if sys.stderr is not None:
                sys.stderr.flush()
        finally:
            os.dup2(kept, 2)
            end.close()
        pump.join(timeout=1.0)  # it lives on only for a child process that was started meanwhile


def _pass_on(reading: int, kept: int) -> None:
    with os.fdopen(reading, "rb", buffering=0) as pipe, os.fdopen(kept, "wb", buffering=0) as to:
        rest = b""
        while chunk := pipe.read(1 << 16):
            *lines, rest = re.split(rb"(?<=[\n\r])", rest + chunk)  # \r ends a progress bar's
            to.write(b"".join(line for line in lines if not _NOISE.search(line)))
        to.write(b"" if _NOISE.search(rest) else rest)
