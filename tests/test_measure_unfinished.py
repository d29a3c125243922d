"""Calls that only begin their work, and those that merely look like it."""

import asyncio
import concurrent.futures
import csv
import functools
import io
import itertools
import multiprocessing.pool
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from dlhelpers.measure import compare, compare_many


def generator():
    yield 1


async def coroutine():
    return 1


async def stream():
    yield 1


class Lazy:
    def __call__(self):
        yield 1

    async def method(self):
        return 1


LAZY = {
    "generator": generator,
    "coroutine": coroutine,
    "async generator": stream,
    "partial": functools.partial(generator),
    "bound method": Lazy().method,
    "callable object": Lazy(),
    "partial of an object": functools.partial(Lazy()),
    "partial of a method": functools.partial(Lazy().method),
}


@pytest.mark.parametrize("lazy", LAZY.values(), ids=LAZY)
def test_what_only_begins_its_work_is_refused_by_name(lazy):
    for call in (
        lambda: compare(lazy, int),
        lambda: compare(int, lazy),
        lambda: compare_many({"old": int, "new": lazy}, baseline="old"),
        lambda: compare(int, int, setup=lazy),
    ):
        with pytest.raises(TypeError, match=r"(baseline|candidate|new|setup) must be .* begins it"):
            call()


class Later:
    def __await__(self):
        yield


class Countdown:
    def __iter__(self):
        return self

    def __next__(self):
        raise StopIteration


@pytest.fixture(scope="module")
def executor():
    with concurrent.futures.ThreadPoolExecutor(1) as made:
        yield made


HANDED_OUT = {
    "generator": generator,
    "coroutine": coroutine,
    "async generator": stream,
    "map": lambda: map(abs, [1]),
    "filter": lambda: filter(None, [1]),
    "zip": lambda: zip([1], [2], strict=True),
    "enumerate": lambda: enumerate([1]),
    "reversed": lambda: reversed([1]),
    "chain": lambda: itertools.chain([1], [2]),
    "iterator over a list": lambda: iter([1]),
    "iterator of a class": Countdown,
    "csv": lambda: csv.reader(["1,2"]),
    "awaitable": Later,
    "torch future": torch.futures.Future,
    "future": concurrent.futures.Future,
    "futures": lambda: [concurrent.futures.Future()],
    "awaitables": lambda: (Later(), Later()),
}


@pytest.mark.parametrize("lazy", HANDED_OUT.values(), ids=HANDED_OUT)
@pytest.mark.filterwarnings("error")
def test_what_a_call_hands_out_unused_is_refused(lazy):
    with pytest.raises(TypeError, match=r"candidate returned an? \w+, so that its work is not"):
        compare(int, lambda: lazy(), budget_s=0.01)


def test_work_handed_to_another_thread_or_process_is_refused(executor):
    with multiprocessing.pool.ThreadPool(1) as pool:
        for begin in (lambda: executor.submit(int), lambda: pool.apply_async(int)):
            with pytest.raises(TypeError, match=r"baseline returned an? \w+, so that its work"):
                compare(begin, int, budget_s=0.01)
    children, go = [], threading.Event()

    def process():
        children.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1))
        return children[-1]

    def thread():
        children.append(threading.Thread(target=go.wait, daemon=True))
        children[-1].start()
        return children[-1]

    with pytest.raises(TypeError, match="baseline returned a Popen"):
        compare(process, int, budget_s=0.01)
    with pytest.raises(TypeError, match="baseline returned a Thread"):
        compare(thread, int, budget_s=0.01)
    children[0].communicate(b"\n")
    go.set()


def test_what_the_caller_holds_is_left_as_it_was():
    mine = (i for i in range(3))
    with pytest.raises(TypeError, match="returned a generator"):
        compare(int, lambda: mine, budget_s=0.01)
    assert list(mine) == [0, 1, 2]
    held = coroutine()
    with pytest.raises(TypeError, match="returned a coroutine"):
        compare(int, lambda: held, budget_s=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asyncio.run(held) == 1


def finished():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child


def joined():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    return thread


DONE = {
    "nothing": lambda: None,
    "list": lambda: [1],
    "range": lambda: range(3),
    "dict's items": lambda: {1: 2}.items(),
    "tensor": lambda: torch.zeros(2),
    "tensors": lambda: (torch.zeros(2), torch.zeros(2)),
    "module": lambda: torch.nn.Linear(1, 1),
    "a class": lambda: concurrent.futures.Future,
    "open file": lambda: io.StringIO("text"),
    "process that ended": finished,
    "thread that ended": joined,
    "event": threading.Event,
    "loader": lambda: torch.utils.data.DataLoader([1, 2]),
}


@pytest.mark.parametrize("call", DONE.values(), ids=DONE)
def test_what_has_done_its_work_is_measured(call):
    assert compare(call, int, budget_s=0.01).pairs


def test_a_step_that_returns_an_iterator_can_be_tried(monkeypatch):
    from dlhelpers.profiling import diagnosing  # what a training step returns is its own affair

    monkeypatch.setattr(diagnosing, "_TRIED_S", 0.05)
    assert diagnosing._speedup(lambda: iter([1]), lambda: iter([1])) > 0
