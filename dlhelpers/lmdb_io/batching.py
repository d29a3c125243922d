"""Where do the images of a batch go, and who decodes them?

Decoders let go of Python's lock while they work, so that threads decode at the same time. What they
decode lies where it is needed; worker processes have to hand it over first.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

__all__ = ["BatchBuffer", "Threads"]


class BatchBuffer:
    """Room for one batch at a time: in each thread the same memory again, in a worker fresh
    shared memory."""

    def __init__(self) -> None:
        self._local = threading.local()

    def room(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor [count, *shape], which begins at a page of memory."""
        if get_worker_info() is not None:  # what is sent may not be written again
            storage = torch.UntypedStorage._new_shared(dtype.itemsize * math.prod(shape) * count)
            return torch.empty(0, dtype=dtype).set_(storage, 0, (count, *shape))
        kept = getattr(self._local, "kept", None)
        if kept is None or kept.dtype != dtype or kept.shape[1:] != torch.Size(shape):
            kept = None
        if kept is None or len(kept) < count:
            kept = self._local.kept = _at_a_page((count, *shape), dtype)
        return kept[:count]

    def __getstate__(self) -> dict[str, Any]:
        return {"_local": None}  # the memory stays where it is

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._local = threading.local()


def _at_a_page(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    # Where a copy goes to an address that is some bytes past its source's, counted within a page,
    # `rep movsb` is several times slower on Zen 3 and 4 (glibc, bug 30994). Images stand some tens
    # of bytes behind the start of a page in an LMDB file, and torch's large tensors 64.
    # NumPy asks for huge pages, which Linux fills sooner and finds again sooner; torch does not.
    size = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.empty(size + mmap.PAGESIZE, np.uint8))
    start = -memory.data_ptr() % mmap.PAGESIZE
    return memory[start : start + size].view(dtype).view(*shape)


class Threads:
    """Threads that share work, started when there is some, in each process anew."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None
        self._pid = 0

    def share(self, function: Callable[[Sequence[int]], None], numbers: Sequence[int]) -> None:
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
