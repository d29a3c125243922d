"""A remedy for a DataLoader is tried on the step; its parts are bounds that hold."""

import copy
import dataclasses
import random
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    get_worker_info,
)

from dlhelpers.profiling import profile_torch
from dlhelpers.profiling.diagnosing import rank
from dlhelpers.profiling.loaders import LoaderCosts, copied_sampler, loader_costs
from dlhelpers.profiling.phases import phase_spans
from dlhelpers.profiling.seen import Seen
from dlhelpers.profiling.trace import MODEL, Event, Trace
from dlhelpers.profiling.twins import TwinError, TwinStep, _Gate, _Gated, epoch_of, steps_in_a_call
from dlhelpers.profiling.watching import watch

BATCHES = [[0, 1], [2, 3], [4, 5], [6, 7]]


def forever(loader):
    while True:
        yield from loader


def found_in(iterator):
    """Return the loader that an iterator belongs to, as diagnose sees it."""
    with watch() as noted:
        next(iterator)
    [loader] = noted.loaders.values()
    return loader


def trace_of(loading_ms, computing_ms, steps=3):
    whole, events, ends = loading_ms + computing_ms, [], []
    for number in range(steps):
        begin, middle = 1e3 * number * whole, 1e3 * (number * whole + loading_ms)
        end = 1e3 * (number + 1) * whole
        name = "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"
        events += [Event(name, begin, middle, 1, "mark"), Event(MODEL, middle, end, 1, "mark")]
        ends.append((begin, end))
    return Trace(tuple(events), tuple(ends))


def costs(**given):
    facts = {
        "workers": 0, "batch": 2, "sample_ms": 1.0, "decoding": 0.0, "repeats": False,
        "copy_ms": 1.0, "collate_ms": 0.0, "plain_collate_ms": 0.0,
    }  # fmt: skip
    return LoaderCosts(**facts | given)


def seen_of(make_step, loader, *, loading=60.0, computing=40.0, **facts):
    """What is known of a step that runs, with times that nobody measured."""
    known = {"cores": 2, "fetches": 1.0, "costs": costs(workers=loader.workers)} | facts
    trace = trace_of(loading, computing)
    return Seen(trace, loading + computing, loader=loader, step=make_step, **known)


def outcome(facts, factor):
    """Return what is found where each remedy makes the step ``factor`` times as fast."""
    return {found.name: found for found in rank(facts, 0.05, lambda before, after: factor)}


# ---- beginning an epoch is data loading ----


@pytest.mark.parametrize("fetch", [lambda loader: next(iter(loader)), lambda loader: list(loader)])
def test_to_begin_and_to_end_an_epoch_is_data_loading(fetch):
    loader = DataLoader(torch.zeros(4, 2), 2, num_workers=1)
    trace = profile_torch(lambda: fetch(loader), steps=1, warmup=0).trace
    marks = [e for e in trace.on() if e.name.endswith((".__iter__", "._shutdown_workers"))]
    assert {e.name.rpartition(".")[2] for e in marks} == {"__iter__", "_shutdown_workers"}
    spans = [s for s in phase_spans(trace) if s.phase == "data loading"]
    for mark in marks:
        assert any(s.start_us <= mark.start_us and mark.end_us <= s.end_us for s in spans)
    assert DataLoader.__iter__.__module__ == "torch.utils.data.dataloader"


def test_iterators_batches_and_ends_of_epochs_are_counted():
    loader = DataLoader(torch.zeros(6, 2), 2)
    with watch() as noted:
        next(iter(loader))
        list(loader)
    key = id(loader.dataset)
    assert (noted.starts[key], noted.fetches[key], noted.ends[key]) == (2, 4, 1)


# ---- the step with a twin of its loader ----


@pytest.mark.parametrize("workers", [0, 1])
def test_the_programs_own_iterator_goes_on_where_it_was(workers):
    batches = forever(DataLoader(torch.arange(40), 2, num_workers=workers))
    given = []
    loader = found_in(batches)
    with watch():  # the twin's batches are not the program's
        step = TwinStep(lambda: given.append(next(batches).tolist()), loader, BATCHES, count=3)
        step()
        step()
    assert given == [*BATCHES, BATCHES[0], BATCHES[1]]
    assert next(batches).tolist() == [2, 3]


def test_a_twin_with_workers_gives_the_same():
    batches, given = forever(DataLoader(torch.arange(40), 2)), []
    step = TwinStep(
        lambda: given.append(next(batches).tolist()), found_in(batches), BATCHES, count=5, workers=2
    )
    step()
    step.close()
    assert given == [*BATCHES, BATCHES[0]]
    assert next(batches).tolist() == [2, 3]


def test_an_epoch_in_a_step_ends_with_the_twins():
    loader = DataLoader(torch.arange(40), 2)
    given = []
    step = TwinStep(lambda: given.extend(loader), found_in(iter(loader)), BATCHES)
    step()
    assert [batch.tolist() for batch in given] == BATCHES


def test_an_iterator_that_outlives_the_trial_is_the_programs_again():
    loader, kept = DataLoader(torch.arange(8), 2), []
    step = TwinStep(lambda: kept.append(iter(loader)), found_in(iter(loader)), BATCHES[2:])
    step()
    step.close()
    assert [batch.tolist() for batch in kept[0]] == BATCHES


def test_another_loader_and_another_thread_are_left_alone():
    one, other = (DataLoader(torch.arange(i, i + 8), 2) for i in (0, 100))
    batches, others, given = forever(one), forever(other), []

    def step():
        given.append(next(others).tolist())
        thread = threading.Thread(target=lambda: given.append(next(batches).tolist()))
        thread.start()
        thread.join()

    TwinStep(step, found_in(batches), [[7, 7]])()
    assert given == [[100, 101], [2, 3]]


class OnlyHere(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if get_worker_info() is not None:
            raise OSError("a handle that is this process's")
        return index


def test_a_twin_that_fails_does_not_reach_the_program():
    batches, given = forever(DataLoader(OnlyHere(), 2)), []
    loader = found_in(batches)
    step = TwinStep(lambda: given.append(next(batches).tolist()), loader, BATCHES, workers=1)
    with pytest.raises(TwinError):
        step()
    step.close()
    assert given == [[2, 3]]
    assert next(batches).tolist() == [4, 5]  # an exception would have ended the generator


def test_workers_wait_while_it_is_not_their_turn():
    gate, made = _Gate(), []
    data = _Gated([5], gate)
    worker = threading.Thread(target=lambda: made.append(data[0]), daemon=True)
    worker.start()
    worker.join(0.05)
    assert made == []
    gate.open()
    worker.join(10)
    assert made == [5]


@pytest.mark.parametrize(
    ("step_ms", "steps_of_epoch", "group", "wanted"),
    [(1.0, 8, 2, 24), (50.0, 2, 2, 2), (5.0, 1000, 2, 4), (50.0, 1000, 4, 4), (50.0, 1, 2, 1)],
)
def test_a_call_is_whole_epochs_or_whole_rounds_of_the_workers(
    step_ms, steps_of_epoch, group, wanted
):
    assert steps_in_a_call(step_ms, steps_of_epoch, group, 400.0) == wanted


# ---- rules: a remedy that was tried counts as tried ----


def of_items(workers=0, **options):
    batches = forever(DataLoader(torch.arange(40), 2, num_workers=workers, **options))
    loader = found_in(batches)
    return lambda: next(batches), loader


def test_workers_that_bring_nothing_are_not_recommended():
    """Data in memory: a worker that makes a batch in no time still makes the step slower."""
    step, loader = of_items()
    facts = seen_of(step, loader, costs=costs(workers_ms=0.1, tried=2))
    assert outcome(facts, 1.0) == {}
    assert facts.tried == ["num_workers=2, persistent_workers=True"]


def test_the_gain_of_workers_is_that_of_the_step():
    step, loader = of_items()
    found = outcome(seen_of(step, loader), 4.0)["no-workers"]
    assert found.saves_ms == pytest.approx(75)
    assert not found.is_estimated


def test_workers_that_fail_on_the_step_are_not_recommended():
    batches = forever(DataLoader(OnlyHere(), 2))
    slow = costs(sample_ms=25.0, copy_ms=25.0)
    found = outcome(seen_of(lambda: next(batches), found_in(batches), costs=slow), 4.0)
    assert set(found) == {"slow-loading"}
    assert "2 workers were tried and failed" in found["slow-loading"].what


def test_workers_that_cost_more_than_they_bring_are_told():
    step, loader = of_items(1, persistent_workers=True)
    found = outcome(seen_of(step, loader), 2.0)
    assert found["needless-workers"].saves_ms == pytest.approx(50)
    assert "num_workers=0" in found["needless-workers"].remedy
    facts = seen_of(step, loader)
    assert "needless-workers" not in outcome(facts, 1.01)
    assert "num_workers=0" in facts.tried


def test_workers_are_not_given_up_where_one_process_is_too_slow():
    step, loader = of_items(1, persistent_workers=True)
    slow = costs(workers=1, sample_ms=200.0)
    assert "needless-workers" not in outcome(seen_of(step, loader, costs=slow), 2.0)


def test_workers_that_are_started_for_each_epoch_are_told():
    step, loader = of_items(1)
    found = outcome(seen_of(step, loader, fetches=10.0), 2.0)["workers-restarted"]
    assert (found.saves_ms, found.is_estimated) == (pytest.approx(50), False)
    assert "every 2 steps" in found.what
    found = outcome(seen_of(step, loader, fetches=20.0), 2.0)["workers-restarted"]
    assert found.what.endswith("anew every step")
    step, loader = of_items(1, persistent_workers=True)
    assert "workers-restarted" not in outcome(seen_of(step, loader, fetches=10.0), 2.0)


def test_an_iterator_for_each_step_is_told_and_one_for_each_epoch_is_not():
    loader = DataLoader(torch.arange(8), 2)
    known = found_in(iter(loader))
    each = seen_of(lambda: next(iter(loader)), known, starts=1.0)
    assert set(outcome(each, 2.0)) == {"iterator-every-step"}
    assert "iterator-every-step" not in outcome(each, 1.0)
    epoch = seen_of(lambda: list(loader), known, starts=1.0, ends=1.0, fetches=4.0)
    assert "iterator-every-step" not in outcome(epoch, 2.0)


def test_a_loader_without_indices_is_bounded_and_not_tried():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(100))

    batches = forever(DataLoader(Stream(), 2))
    found = outcome(seen_of(lambda: next(batches), found_in(batches)), 4.0)
    assert all(finding.is_estimated for finding in found.values())
    assert next(batches).tolist() == [2, 3]


def test_parts_that_can_be_replaced_are_tried_on_the_step():
    def collate(samples):
        return torch.tensor(samples)

    step, loader = of_items(collate_fn=collate)
    slow = costs(collate_ms=50.0, plain_collate_ms=1.0)
    assert outcome(seen_of(step, loader, costs=slow), 2.0)["slow-collate"].saves_ms == 50
    assert "slow-collate" not in outcome(seen_of(step, loader, costs=slow), 1.0)
    fixed = costs(sample_ms=25.0, repeats=True, copy_ms=0.0)
    found = outcome(seen_of(step, loader, costs=fixed), 2.0)["repeated-transforms"]
    assert (found.saves_ms, found.is_estimated) == (50, False)
    assert "repeated-transforms" not in outcome(seen_of(step, loader, costs=fixed), 1.0)


# ---- bounds hold ----


def step_ms(batch_ms, workers, cores, computing, ready):
    """A step whose batches are made by workers on some of the cores, by its own account."""
    if not workers:
        return computing + batch_ms
    made = batch_ms / min(workers, cores)
    return max(computing + ready, made, (batch_ms + computing) / cores if workers >= cores else 0)


ms = st.floats(0.5, 100)


@settings(max_examples=200, deadline=None)
@given(
    workers=st.integers(0, 6), cores=st.integers(1, 8), computing=ms, sample=ms, collate=ms,
    decoding=st.floats(0, 1), repeats=st.booleans(), has_plain=st.booleans(),
    ready=st.floats(0, 5), copying=st.floats(0, 0.5),
)  # fmt: skip
def test_a_bound_is_no_less_than_what_the_cause_costs_and_not_much_more(
    workers, cores, computing, sample, collate, decoding, repeats, has_plain, ready, copying
):
    size, tried = 2, min(4, cores)
    batch = size * sample + collate
    before = step_ms(batch, workers, cores, computing, ready)
    facts = costs(
        workers=workers, batch=size, sample_ms=sample, decoding=decoding, repeats=repeats,
        copy_ms=copying, collate_ms=collate, plain_collate_ms=0.1 if has_plain else None,
        ready_ms=ready, tried=0 if workers or cores == 1 else tried,
        workers_ms=None if workers or cores == 1 else batch / tried,
    )  # fmt: skip
    parts = {
        "slow-collate": collate - 0.1 * has_plain,
        "slow-transforms": size * sample * (1 - decoding),
        "repeated-transforms": size * (sample - copying),
        "slow-decoding": size * sample * decoding,
        "slow-loading": batch,
    }
    truths = {
        name: before - step_ms(batch - part, workers, cores, computing, ready)
        for name, part in parts.items()
    }
    hidden = max(computing + ready, batch / tried, (batch + computing) / cores)
    truths["no-workers"] = before - hidden
    seen = Seen(trace_of(before - computing, computing), before, costs=facts, cores=cores)
    for finding in rank(seen, 0.01, lambda *trials: 1.0):
        truth, slack = truths[finding.name], 1e-6 * before
        assert finding.is_estimated
        assert truth - slack <= finding.saves_ms <= 1.5 * truth + slack, finding


# ---- what the trials leave alone ----


class Numbers(Dataset):
    """It opens its file where it is first asked, and draws by a generator of its own."""

    def __init__(self):
        self.file, self.draws = None, np.random.default_rng(0)

    def __len__(self):
        return 64

    def __getitem__(self, index):
        self.file = self.file or "open"
        return index + self.draws.random()


class Resumed(Sampler):
    """It goes on where it was left."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return self.at - 1


class Epochs(Sampler):
    """It counts epochs, and shuffles its list in place by a generator of its own."""

    def __init__(self):
        self.epoch, self.order, self.draws = 0, list(range(64)), random.Random(0)

    def __iter__(self):
        self.epoch += 1
        self.draws.shuffle(self.order)
        return iter(self.order)


def state_of(sampler):
    draws = getattr(sampler, "draws", None)
    held = {name: copy.copy(value) for name, value in vars(sampler).items() if name != "draws"}
    return held, draws and draws.getstate()


def of_a_loader(dataset, **options):
    return found_in(iter(DataLoader(dataset, **options)))


@pytest.mark.parametrize("kind", [Resumed, Epochs])
def test_the_programs_sampler_stands_still(kind):
    sampler = kind()
    loader = of_a_loader(Numbers(), batch_size=4, sampler=sampler)
    before = state_of(sampler)
    expected = next(iter(copy.deepcopy(sampler)))
    assert epoch_of(loader)[0][0] == expected
    loader_costs(loader, cores=1)
    assert state_of(sampler) == before


def test_a_sampler_without_a_copy_is_not_gone_through():
    numbers = iter(n for n in range(64))
    loader = of_a_loader(Numbers(), batch_size=4, sampler=numbers)
    with pytest.raises(ValueError, match="cannot be copied"):
        epoch_of(loader)
    assert next(numbers) == 4


def test_a_sampler_shares_its_data_set_with_its_copy():
    loader = of_a_loader(Numbers(), batch_size=4, shuffle=True)
    made = copied_sampler(loader)
    assert made is not loader.sampler
    assert made.sampler.data_source is loader.dataset


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(32)),
                                  lambda d: ConcatDataset([d, d])])  # fmt: skip
def test_the_programs_data_set_is_not_asked(wrap):
    dataset = Numbers()
    loader = of_a_loader(wrap(Numbers()), batch_size=4)
    loader = dataclasses.replace(loader, dataset=wrap(dataset))
    before = dataset.draws.bit_generator.state
    loader_costs(loader, cores=1)
    twin = TwinStep(lambda: None, loader, [[0, 1]])
    next(iter(twin.twin))
    assert dataset.file is None
    assert dataset.draws.bit_generator.state == before


def test_a_stream_is_told_the_remedy_of_a_stream():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from range(64)

    loader = of_a_loader(Stream(), batch_size=4)
    facts = seen_of(lambda: None, loader, costs=costs(sample_ms=25.0))
    facts = dataclasses.replace(facts, step=None)
    told = {f.name: f for f in rank(facts, 0.05, lambda *_: 1.0)}
    assert "get_worker_info" in told["slow-loading"].remedy
    assert "dataset[i]" not in told["slow-loading"].remedy
    assert "0 workers" not in told["slow-loading"].what
