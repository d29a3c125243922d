"""How does one run torch's profiler, one run at a time?

It writes a few lines of its own to file descriptor 2. They stay: hiding them from within the
process would hide a crash's message too. ``KINETO_LOG_LEVEL=6`` and ``TORCH_CPP_LOG_LEVEL=ERROR``
in the environment, set before Python starts, keep them back.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["need_no_recording", "recording"]

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
        with warnings.catch_warnings():
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
