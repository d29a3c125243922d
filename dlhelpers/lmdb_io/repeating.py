"""Which items of a dataset are the same when they are loaded twice?

Only those tell one version of a dataset from another. One that draws random numbers does not, nor
one that is replaced by another image when it cannot be read.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from dlhelpers.lmdb_io.loading import load_chunks

__all__ = ["load_repeated"]

_FEW = 4  # up to a quarter of the items may be others each time


def load_repeated(load: Callable[[Any], bytes], tasks: Sequence[Any], workers: int) -> list[Any]:
    """Return what each task gives; None where it draws random numbers or gives another the next
    time; None of all where so many do that others may be the same by chance.

    The streams of random numbers are left as they were.

    Args:
        load: from a task to bytes; picklable where workers are spawned.
        tasks: to load, in order.
        workers: processes that load them; 0 does it here.
    """
    with _kept_streams():
        # where the conversion loads them: what a dataset opens here would be open in the workers
        chunks = load_chunks(_Twice(load), iter(tasks), workers)
        first, again, draws = zip(*chain.from_iterable(chunks), strict=True) if tasks else ((),) * 3
    differ = sum(
        one != two and not drew for one, two, drew in zip(first, again, draws, strict=True)
    )
    if differ * _FEW > len(tasks):  # others may have been the same by chance
        return [None] * len(tasks)
    return [
        None if drew or one != two else one
        for one, two, drew in zip(first, again, draws, strict=True)
    ]


class _Twice:
    """Loads tasks twice, here or in a worker."""

    def __init__(self, load: Callable[[Any], bytes]) -> None:
        self._load = load

    def __getitems__(self, tasks: list[Any]) -> list[tuple[bytes, bytes, bool]]:
        return [self._loaded(task) for task in tasks]

    def _loaded(self, task: Any) -> tuple[bytes, bytes, bool]:
        """Return what a task gives, what it gives again, and whether it draws."""
        before = [_comparable(get()) for get, _ in _streams()]
        found = self._load(task)
        after = [_comparable(get()) for get, _ in _streams()]
        # it may have imported what has a stream of its own
        return found, self._load(task), before != after[: len(before)]


def _streams() -> list[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """Return (getter, setter) of the streams of random numbers that are in use."""
    found: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
        (random.getstate, random.setstate)
    ]
    if numpy := sys.modules.get("numpy"):
        found.append((numpy.random.get_state, numpy.random.set_state))
    if torch := sys.modules.get("torch"):
        found.append((torch.get_rng_state, torch.set_rng_state))
    return found


def _comparable(state: Any) -> Any:
    if hasattr(state, "numpy"):  # torch's
        return state.numpy().tobytes()
    if isinstance(state, dict):  # numpy's, of another generator than its first
        return repr(state)
    return tuple(part.tobytes() if hasattr(part, "tobytes") else part for part in state)


@contextmanager
def _kept_streams() -> Iterator[None]:
    states = [(put, get()) for get, put in _streams()]
    try:
        yield
    finally:
        for put, state in states:
            put(state)
