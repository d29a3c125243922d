"""Where do the images of a batch go, and who decodes them?

Decoders let go of Python's lock while they work, so that threads decode at the same time. What they
decode lies where it is needed; worker processes have to hand it over first.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch.utils.data import get_worker_info

__all__ = ["BatchBuffer", "Threads"]


class BatchBuffer:
    """Room for one batch at a time: in each thread the same memory again, in a worker fresh
    shared memory."""

    def __init__(self) -> None:
        self._local = threading.local()

    def room(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor of ``count`` times the shape and dtype of one image."""
        shape = (count, *like.shape)
        if get_worker_info() is not None:  # what is sent may not be written again
            storage = torch.UntypedStorage._new_shared(like.element_size() * like.numel() * count)
            return torch.empty(0, dtype=like.dtype).set_(storage, 0, shape)
        kept = getattr(self._local, "kept", None)
        if kept is None or kept.dtype != like.dtype or kept.shape[1:] != like.shape:
            kept = None
        if kept is None or len(kept) < count:
            kept = self._local.kept = torch.empty(shape, dtype=like.dtype)
        return kept[:count]

    def __getstate__(self) -> dict[str, Any]:
        return {"_local": None}  # the memory stays where it is

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._local = threading.local()


class Threads:
    """Threads that share work, started when there is some, in each process anew."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None
        self._pid = 0

    def share(self, function: Callable[[Sequence[int]], None], numbers: range) -> None:
        """Call the function with a part of the numbers in each thread, this one among them.

        Raises:
            What the function raises, once no thread works any more.
        """
        if self.count == 1 or len(numbers) < 2:
            function(numbers)
            return
        if self._pool is None or self._pid != os.getpid():
            self._pool, self._pid = ThreadPoolExecutor(self.count - 1), os.getpid()
        parts = [numbers[first :: self.count] for first in range(self.count)]
        others = [self._pool.submit(function, part) for part in parts[1:]]
        try:
            function(parts[0])
        finally:
            wait(others)
        for other in others:
            other.result()

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "_pool": None, "_pid": 0}
