"""How long does it take to begin and to end an epoch of a DataLoader? Marks in torch's record.

torch marks the fetching of a batch alone. Where workers are started and stopped for each epoch, or
in each step by ``next(iter(loader))``, that takes far longer than a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from dlhelpers.patching import patched

__all__ = ["loaders_marked"]

_MARK = "enumerate(DataLoader)#"  # as torch's own, so it counts as data loading


@contextmanager
def loaders_marked() -> Iterator[None]:
    """Mark ``DataLoader.__iter__``, and where its workers are stopped, in torch's record."""
    from torch.utils.data import DataLoader, dataloader

    workers = getattr(dataloader, "_MultiProcessingDataLoaderIter", None)
    with ExitStack() as stack:
        stack.enter_context(_marked(DataLoader, "__iter__"))
        if hasattr(workers, "_shutdown_workers"):
            stack.enter_context(_marked(workers, "_shutdown_workers"))
        yield


@contextmanager
def _marked(owner: type, name: str) -> Iterator[None]:
    from torch.profiler import record_function

    def marked(call: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        with record_function(f"{_MARK}{type(self).__name__}.{name}"):
            return call(self, *args, **kwargs)

    with patched(owner, name, marked):
        yield
