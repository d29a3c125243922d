"""What would a step take with another DataLoader? Its fetches are answered by a twin of the loader.

The program's own iterator stands still meanwhile, and goes on where it was. A twin that is not in
its turn does not work ahead: its workers wait at a gate, or they would make its batches in the time
of the other one.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from dlhelpers.patching import patched
from dlhelpers.profiling.loaders import copied_dataset, copied_sampler
from dlhelpers.profiling.watching import Loader

__all__ = ["TwinError", "TwinStep", "epoch_of", "steps_in_a_call"]

_BATCHES = 512  # of an epoch, at most
_CALL_MS = 20.0  # what one call of several steps takes at least


class TwinError(RuntimeError):
    """A twin could not give a batch; the program's own loader gave it."""


class TwinStep:
    """Steps of the program whose batches come from a twin of its loader.

    Args:
        step: the program's.
        loader: whose place is taken.
        batches: lists of indices, an epoch of them.
        count: steps that a call makes.
        workers, persistent: of the twin.
        dataset, collate: of the twin, by default the loader's own.
        single: whether a step that makes an iterator gets the one that is at work already.
    """

    def __init__(
        self,
        step: Callable[[], Any],
        loader: Loader,
        batches: list[Any],
        *,
        count: int = 1,
        workers: int = 0,
        persistent: bool = True,
        dataset: Any = None,
        collate: Any = None,
        single: bool = False,
    ) -> None:
        self.step, self.loader, self.count, self.single = step, loader, count, single
        self.failure: Exception | None = None
        self._gate = _Gate() if workers else None
        data = copied_dataset(loader.dataset) if dataset is None else dataset
        options: dict[str, Any] = {
            "num_workers": workers,
            "collate_fn": loader.collate if collate is None else collate,
            "pin_memory": loader.pinned,
        }
        if workers:
            options |= {
                "persistent_workers": persistent,
                "prefetch_factor": loader.prefetch,
                "worker_init_fn": loader.worker_init,
            }
        if self._gate:
            data = _gated(data, self._gate)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of more workers than cores, which is told already
            if loader.batched:
                self.twin = DataLoader(data, batch_sampler=batches, **options)
            else:
                self.twin = DataLoader(data, None, sampler=[b[0] for b in batches], **options)
        self._running: Any = None

    def __call__(self) -> None:
        """Make the steps; raise TwinError where one of their batches came from elsewhere."""
        with self._in_its_turn():
            for _ in range(self.count):
                self.step()
                if self.failure is not None:
                    raise TwinError(str(self.failure)) from self.failure

    def begin_ms(self, clock: Callable[[], float]) -> float:
        """Return how long it takes to begin an epoch of the twin's and to get its first batch."""
        if self._gate:
            self._gate.open()
        begin = clock()
        next(iter(self.twin))
        return 1000 * (clock() - begin)

    def close(self) -> None:
        """End the twin's workers."""
        if self._gate:
            self._gate.open()
        for iterator in (self._running, getattr(self.twin, "_iterator", None)):
            if shut_down := getattr(iterator, "_shutdown_workers", None):
                shut_down()  # where the traceback of a failure holds it, it would end late
        self._running = self.twin = self.failure = None

    @contextmanager
    def _in_its_turn(self) -> Iterator[None]:
        def is_replaced(sampler: Any, dataset: Any) -> bool:
            return sampler is self.loader.sampler and dataset is self.loader.dataset

        def next_batch(give: Any, iterator: Any) -> Any:
            if not is_replaced(iterator._index_sampler, iterator._dataset):
                return give(iterator)
            try:
                return self.next_batch()
            except Exception as error:  # into a generator of the program's, it would end that
                self.failure = error
                return give(iterator)

        def begin(begin_epoch: Any, loader: Any) -> Any:
            sampler = getattr(loader, "_index_sampler", None)
            if not is_replaced(sampler, getattr(loader, "dataset", None)):
                return begin_epoch(loader)
            try:
                return _Lent(self, loader)
            except Exception as error:
                self.failure = error
                return begin_epoch(loader)

        with (
            patched(_BaseDataLoaderIter, "__next__", next_batch) as self._give,
            patched(DataLoader, "__iter__", begin) as self._begin_epoch,
        ):
            _Lent.turn = self
            if self._gate:
                self._gate.open()
            try:
                yield
            finally:
                if self._gate:
                    self._gate.shut()
                _Lent.turn = None

    def next_batch(self) -> Any:
        """Return the twin's next batch, from a new epoch where one has ended."""
        if self._running is None:
            self._running = self._begin_epoch(self.twin)
        try:
            return self._give(self._running)
        except StopIteration:
            self._running = self._begin_epoch(self.twin)
        return self._give(self._running)

    def begin(self) -> Any:
        """Return an iterator over an epoch of the twin's."""
        return self._begin_epoch(self.twin)


class _Lent:
    """What a step gets that makes an iterator; the program may keep it longer than the trial."""

    turn: TwinStep | None = None  # whose turn it is

    def __init__(self, owner: TwinStep, loader: Any) -> None:
        self.owner, self.loader, self._own = owner, loader, None
        self._epoch = None if owner.single else owner.begin()

    def __iter__(self) -> _Lent:
        return self

    def __len__(self) -> int:
        return len(self.loader)

    def __next__(self) -> Any:
        turn = type(self).turn
        if turn is not None:
            try:
                if turn is self.owner and self._epoch is not None:
                    return turn._give(self._epoch)
                return turn.next_batch()
            except StopIteration:
                raise
            except Exception as error:
                turn.failure = error
        if self._own is None:
            self._epoch = None
            self._own = (turn._begin_epoch if turn else DataLoader.__iter__)(self.loader)
        return next(self._own)


class _Gate:
    """Where workers wait while it is not their turn."""

    def __init__(self) -> None:
        from torch import multiprocessing

        self._is_open = multiprocessing.get_context().RawValue(ctypes.c_bool, False)
        self._event = multiprocessing.get_context().Event()

    def open(self) -> None:
        self._is_open.value = True
        self._event.set()

    def shut(self) -> None:
        self._is_open.value = False
        self._event.clear()

    def wait(self) -> None:
        """Pass, or wait until it is open or nobody is left to open it."""
        if self._is_open.value:
            return
        parent = os.getppid()
        while not self._event.wait(1.0) and os.getppid() == parent:
            pass


class _Gated:
    """A data set whose samples are made while a gate is open."""

    def __init__(self, dataset: Any, gate: _Gate) -> None:
        self._dataset, self._gate = dataset, gate

    def __getitem__(self, index: Any) -> Any:
        self._gate.wait()
        return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # as a copy asks, that has no attributes yet
            raise AttributeError(name)
        return getattr(self._dataset, name)


class _GatedBatches(_Gated):
    """The same for a data set that gives a whole batch at a time."""

    def __getitems__(self, indices: Any) -> Any:
        self._gate.wait()
        return self._dataset.__getitems__(indices)


def _gated(dataset: Any, gate: _Gate) -> _Gated:
    by_batch = callable(getattr(dataset, "__getitems__", None))
    return (_GatedBatches if by_batch else _Gated)(dataset, gate)


def epoch_of(loader: Loader) -> list[Any]:
    """Return the lists of indices of an epoch, or of its beginning; of a copy of its sampler.

    Raises:
        ValueError: the sampler gives none, or cannot be copied.
    """
    batches = list(itertools.islice(iter(copied_sampler(loader)), _BATCHES))
    if not batches:
        raise ValueError("the DataLoader's sampler gives no index: its data set is empty")
    return batches if loader.batched else [[index] for index in batches]


def steps_in_a_call(step_ms: float, steps_of_epoch: int, group: int, most_ms: float) -> int:
    """Return how many steps make one measured call.

    So many that a call is long beside its timer; whole epochs, whose beginning is a part of what is
    measured, where that is affordable; else whole rounds of the workers, who deliver in bursts.
    """
    least = max(1, math.ceil(_CALL_MS / max(step_ms, 1e-3)))
    if max(steps_of_epoch, least) * step_ms <= most_ms:
        return steps_of_epoch * math.ceil(least / steps_of_epoch)
    return group * math.ceil(least / group)
