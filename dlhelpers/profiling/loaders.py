"""What does a batch of a DataLoader cost, and which part of it? Decoding, transforms, collate.

A few samples and one batch are made again in this process, by copies of the data set and of the
sampler, with the random states put back afterwards, so that the program goes on with the numbers
that it would have seen.
"""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from time import perf_counter, sleep
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset, Sampler

from dlhelpers.profiling.program_lines import decodes
from dlhelpers.profiling.python_profile import profile_python
from dlhelpers.profiling.watching import Loader

__all__ = [
    "LoaderCosts",
    "copied_dataset",
    "copied_sampler",
    "decoding_share",
    "loader_costs",
    "random_states_kept",
    "workers_ms",
]

_SAMPLES_S = 3.0  # for the samples of one batch, made once more
_WORKERS_S = 10.0  # for trying workers
_DRAWING = (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState)


@dataclass(frozen=True)
class LoaderCosts:
    """Milliseconds of one process, without workers.

    Attributes:
        workers: that the loader has.
        batch: samples in a batch.
        sample_ms: one sample, read and transformed.
        decoding: share of it in reading and decoding, 0 to 1.
        repeats: whether a sample comes out the same when it is asked for again.
        copy_ms: copying a sample that is there, which no store is faster at.
        collate_ms: putting a batch together.
        plain_collate_ms: the same by torch's own collate, where that gives the same; else None.
        workers_ms: what a batch takes with ``tried`` workers; None where that was not tried.
        ready_ms: what it takes to fetch a batch from a worker that has it ready.
        tried: how many workers were tried.
        collate_at, sample_at: where their code is, as ``file.py:12``, or empty.
    """

    workers: int
    batch: int
    sample_ms: float
    decoding: float
    repeats: bool
    copy_ms: float
    collate_ms: float
    plain_collate_ms: float | None
    workers_ms: float | None = None
    ready_ms: float = 0.0
    tried: int = 0
    collate_at: str = ""
    sample_at: str = ""

    @property
    def batch_ms(self) -> float:
        """One batch, in one process."""
        return self.batch * self.sample_ms + self.collate_ms


def loader_costs(
    loader: Loader,
    *,
    cores: int,
    try_workers: bool = True,
    clock: Callable[[], float] = perf_counter,
) -> LoaderCosts | None:
    """Measure the parts of one batch; try workers where there are none and there are cores.

    Without ``try_workers`` only a loader that has workers is tried with them.

    None for a stream that cannot be copied: what is read for a trial would be missing. Of samples
    so slow that a batch of them takes seconds a smaller one is made, and its times scaled.
    """
    stream = None if loader.by_index else _copied(loader.dataset)
    if not loader.by_index and stream is None:
        return None
    with random_states_kept(loader):
        batches = _some_batches(loader)
        first = batches[0]
        size = len(first) if loader.batched else 1
        make = copied_dataset(loader.dataset).__getitem__ if loader.by_index else lambda s: s
        few = first[: min(8, len(first))] if loader.batched else first
        if loader.by_index:
            make(few[0])  # files are opened, caches are warm
            each: list[float] = []
            for index in few:
                each.append(_ms(lambda index=index: make(index), clock))
                if sum(each) > 1000 * _SAMPLES_S / 4:
                    break
            few = few[: len(each)]
            sample_ms = statistics.fmean(each)
            first = first[: max(1, int(1000 * _SAMPLES_S / max(sample_ms, 1e-6)))]
            repeats = all(_equal(make(index), make(index)) for index in few[:2])
            decoding = decoding_share(lambda: [make(index) for index in few])
            samples = [make(index) for index in first]
        else:
            begin = clock()
            samples = list(islice(iter(stream), size))
            sample_ms = 1000 * (clock() - begin) / max(1, len(samples))
            repeats, decoding = False, 0.0
        copying = min(_ms(lambda: copy.deepcopy(samples[0]), clock) for _ in range(3))
        collate_ms, plain_ms = _collate_ms(loader, samples, clock)
        if loader.batched and len(samples) < size and loader.by_index:
            collate_ms *= size / len(samples)
            plain_ms = None if plain_ms is None else plain_ms * size / len(samples)
        tried, with_workers, ready = 0, None, 0.0
        seconds = 4 * size * sample_ms / 1000  # some three batches for each worker, one ahead
        share = min(1.0, _WORKERS_S / max(seconds, 1e-9))
        if loader.workers and loader.by_index:
            _, ready = workers_ms(loader, loader.workers, clock, share=share)
        elif loader.by_index and cores > 1 and try_workers:
            tried = min(4, cores)
            with_workers, ready = workers_ms(loader, tried, clock, share=share)
    places = _place(loader.collate), _place(type(loader.dataset))
    times = sample_ms, decoding, repeats, copying, collate_ms, plain_ms, with_workers, ready
    return LoaderCosts(loader.workers, size, *times, tried, *places)


def _copied(dataset: Any) -> Any:
    """Return a stream's copy, which reads on from the same place; None where it has none.

    Tensors and arrays that it holds are shared: they may be large, and reading leaves them alone.
    """
    held = getattr(dataset, "__dict__", {}).values()
    shared = {id(t): t for t in held if isinstance(t, torch.Tensor) or hasattr(t, "__array__")}
    try:
        return copy.deepcopy(dataset, shared)
    except Exception:  # an open file, a generator, a queue
        return None


def copied_dataset(dataset: Any) -> Any:
    """Return a copy of a data set: what it opens or counts is none of the program's.

    Samples are shared, since they may be large; data sets inside, and generators of random numbers,
    are copied as well. A data set that has no copy is returned as it is.
    """

    def copied(value: Any) -> Any:
        if isinstance(value, Dataset):
            return copied_dataset(value)
        if isinstance(value, _DRAWING):
            return copy.deepcopy(value)
        if type(value) in (list, tuple) and any(isinstance(part, Dataset) for part in value):
            return type(value)(map(copied, value))
        return value

    try:
        made = copy.copy(dataset)
        for name, value in getattr(dataset, "__dict__", {}).items():
            made.__dict__[name] = copied(value)
    except Exception:
        return dataset
    return made


def copied_sampler(loader: Loader) -> Any:
    """Return a copy of a loader's sampler, in whose place it can be gone through.

    The data set that it knows is shared.

    Raises:
        ValueError: it has no copy, as a generator has none.
    """
    shared: dict[int, Any] = {}
    todo = [loader.sampler]
    while todo:
        sampler = todo.pop()
        for value in getattr(sampler, "__dict__", {}).values():
            if isinstance(value, Dataset) or value is loader.dataset:
                shared[id(value)] = value
            elif isinstance(value, Sampler) and id(value) not in shared:
                todo.append(value)
    try:
        return copy.deepcopy(loader.sampler, shared)
    except Exception as error:
        kind = type(loader.sampler).__name__
        raise ValueError(
            f"the DataLoader's sampler, {kind}, cannot be copied ({error}), and to go through the "
            "program's own would take its indices away"
        ) from error


def decoding_share(fn: Callable[[], Any]) -> float:
    """Return the share of ``fn`` in functions that decode or read images, by their names.

    A function counts with all that it calls, and only where none of these calls it.
    """
    stats = profile_python(fn).stats
    whole = sum(own for _, _, own, _, _ in stats.stats.values())
    decoding = 0.0
    for where, (_, _, _, total, callers) in stats.stats.items():
        if not decodes(where):
            continue
        inside = sum(entry[3] for caller, entry in callers.items() if decodes(caller))
        decoding += max(0.0, total - inside)
    return min(1.0, decoding / whole) if whole else 0.0


def workers_ms(
    loader: Loader, workers: int, clock: Callable[[], float], *, share: float = 1.0
) -> tuple[float | None, float]:
    """Try ``workers`` processes: ms between two batches, and ms to fetch one that is ready.

    None for the first where they cannot run. With a ``share`` below 1 batches are that much
    smaller, one sample at least, and the times are scaled.
    """
    from torch.utils.data import DataLoader, Subset

    batches = 3 * workers + 1
    whole = _some_batches(loader, batches)
    given = [batch[: max(1, int(share * len(batch)))] for batch in whole]
    scale = len(whole[0]) / len(given[0])
    indices = [index for batch in given for index in batch]
    try:
        trial = DataLoader(
            Subset(copied_dataset(loader.dataset), indices),
            batch_size=len(given[0]) if loader.batched else None,
            num_workers=workers,
            collate_fn=loader.collate,
        )
        fetching, ends = iter(trial), []
        for _ in range(2 * workers + 1):  # workers in step deliver as many at once
            next(fetching)
            ends.append(clock())
        kept = ends[workers:]  # the first ones were made while the processes began
        between = (kept[-1] - kept[0]) / (len(kept) - 1)
        sleep(min(0.2, 3 * workers * between))  # now the rest are ready
        ready = min(_ms(lambda: next(fetching), clock) for _ in range(workers))
    except Exception:  # cannot be sent to a process, or fails there
        return None, 0.0
    return 1000 * between * scale, ready * scale


def _some_batches(loader: Loader, count: int = 1) -> list[Any]:
    """Return lists of indices as the loader's sampler gives them, from its beginning."""
    if not loader.by_index:
        return [[0] * (getattr(loader.sampler, "batch_size", 1) or 1)]
    batches = list(islice(iter(copied_sampler(loader)), count))
    if not batches:
        raise ValueError("the DataLoader's sampler gives no index: its data set is empty")
    while len(batches) < count:
        batches += batches[: count - len(batches)]
    return batches if loader.batched else [[index] for index in batches]


def _collate_ms(
    loader: Loader, samples: Sequence[Any], clock: Callable[[], float]
) -> tuple[float, float | None]:
    from torch.utils.data import default_collate

    if not loader.batched:
        return 0.0, None
    batch = loader.collate(list(samples))
    collate_ms = statistics.median(
        _ms(lambda: loader.collate(list(samples)), clock) for _ in range(3)
    )
    if loader.collate is default_collate:
        return collate_ms, collate_ms
    try:
        same = _equal(default_collate(list(samples)), batch)
    except Exception:  # samples that it cannot put together
        same = False
    if not same:
        return collate_ms, None
    plain = statistics.median(_ms(lambda: default_collate(list(samples)), clock) for _ in range(3))
    return collate_ms, plain


def _ms(fn: Callable[[], Any], clock: Callable[[], float]) -> float:
    begin = clock()
    fn()
    return 1000 * (clock() - begin)


def _equal(one: Any, other: Any) -> bool:
    """Compare samples of any make: tensors, arrays, pictures, numbers, and what holds them."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and list(one) == list(other)
            and all(_equal(one[key], other[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return (
            isinstance(other, list | tuple)
            and len(one) == len(other)
            and all(map(_equal, one, other))
        )
    try:
        same = one == other
        return bool(same.all()) if hasattr(same, "all") else bool(same)
    except Exception:
        return False


def _place(thing: Any) -> str:
    import inspect

    from dlhelpers.profiling.code_report import place_of

    try:
        code = inspect.unwrap(thing)
        return place_of(inspect.getsourcefile(code) or "", inspect.getsourcelines(code)[1])
    except (OSError, TypeError):
        return ""


@contextmanager
def random_states_kept(loader: Loader) -> Iterator[None]:
    """Put the random states back afterwards: Python's, NumPy's, torch's and the sampler's own."""
    samplers = loader.sampler, getattr(loader.sampler, "sampler", None)
    own = [g for s in samplers if isinstance(g := getattr(s, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in own]
    python, numbers = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)
        random.setstate(python)
        numpy.random.set_state(numbers)
