"""Which part of the DataLoader does the step wait for, and what would the step be without it?

A remedy that can be tried is tried on the step, whose batches come from a twin of the loader. The
rest are bounds: a part of a batch counts in whole, shared among the workers that make batches at
the same time, and never for more than the step waits until a batch has been made.
"""

from __future__ import annotations

from collections.abc import Iterator

from dlhelpers.profiling.loader_trials import LoaderTrials
from dlhelpers.profiling.loaders import LoaderCosts
from dlhelpers.profiling.seen import Bottleneck, Seen, Speedup
from dlhelpers.tables import duration

__all__ = ["loading"]


def loading(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Name the part of the DataLoader that the step waits for."""
    waits = seen.ms("data loading")
    if waits < least_ms:
        return
    trials = LoaderTrials(seen, speedup)
    found = list(_iterators(seen, trials, waits, least_ms))
    if found:  # what it hides is seen once it is gone
        yield from found
        return
    costs, loader = seen.costs, seen.loader
    by_index = loader is None or loader.by_index
    ahead = "prepare batches while the step computes: DataLoader(..., num_workers=2)"
    if not by_index:
        ahead += ", each worker giving its own part of the stream, by get_worker_info()"
    if costs is None:
        yield seen.finding(
            "slow-loading",
            saves_ms=waits,
            is_estimated=True,
            what=f"{waits / seen.step_ms:.0%} of a step is data loading",
            why="the step waits until its batch is there",
            remedy="profile_python(lambda: next(iter(DataLoader(dataset, num_workers=0))))"
            if loader and loader.workers and loader.by_index
            else ahead,
            notebook="03_dali_io",
        )
        return
    found = list(_workers(seen, costs, trials, waits, least_ms))
    found += _parts(seen, costs, trials, waits, least_ms)
    explained = _hidden_by_nothing(seen, costs, waits, costs.batch_ms)
    # workers that were tried and do not help leave nothing to say
    if not found and not trials.settled and costs.workers_ms is None and explained >= least_ms:
        count = trials.failed or costs.tried
        workers = f"with {_several(costs.workers)}" if costs.workers else "which has no workers"
        failed = (
            f"; {_several(count)} {'was' if count == 1 else 'were'} tried and failed"
            if count
            else ""
        )
        found = [
            seen.finding(
                "slow-loading",
                saves_ms=explained,
                is_estimated=True,
                where=costs.sample_at,
                what=f"{waits / seen.step_ms:.0%} of a step waits for the loader, {workers}; a "
                f"batch takes {duration(costs.batch_ms / 1e3)} in one process" + failed,
                why="no part of it stands out, so all of it would have to become faster",
                remedy="profile_python(lambda: [dataset[i] for i in range(100)])"
                if by_index
                else "profile_python(lambda: list(itertools.islice(dataset, 100)))"
                if costs.workers
                else ahead,
                notebook="03_dali_io",
            )
        ]
    yield from found


def _iterators(
    seen: Seen, trials: LoaderTrials, waits: float, least_ms: float
) -> Iterator[Bottleneck]:
    """Find an iterator that each step makes for one batch."""
    loader = seen.loader
    if loader is None or seen.starts < 1 or seen.ends or seen.fetches > seen.starts:
        return
    factor = trials.one_iterator()
    saves = waits if factor is None else seen.step_ms * (1 - 1 / factor)
    if saves < least_ms:
        trials.note_no_gain("one iterator for all steps")
        return
    workers = f", and starts {_several(loader.workers)} for it" if loader.workers else ""
    again = loader.persistent and ", and sends its workers to the beginning"
    yield seen.finding(
        "iterator-every-step",
        saves_ms=saves,
        is_estimated=factor is None,
        what=f"a step makes an iterator of the DataLoader for one batch{again or workers}; "
        f"{waits / seen.step_ms:.0%} of it is data loading",
        why="all that is prepared ahead is thrown away, and without shuffle=True each step gets "
        "the first batch",
        remedy="batches = iter(loader) once per epoch, before the steps; then next(batches)",
        notebook="03_dali_io",
    )


def _workers(
    seen: Seen, costs: LoaderCosts, trials: LoaderTrials, waits: float, least_ms: float
) -> Iterator[Bottleneck]:
    """Try workers where there are none; and none, or such as stay, where there are."""
    loader = seen.loader
    if costs.workers:
        if loader is None:
            return
        share = f"{waits / seen.step_ms:.0%} of a step waits for the loader"
        # what takes one process longer than the whole step is not faster there
        factor = trials.workers(0) if costs.batch_ms < seen.step_ms else None
        if factor and (saves := seen.step_ms * (1 - 1 / factor)) >= least_ms:
            yield seen.finding(
                "needless-workers",
                saves_ms=saves,
                what=f"{share}, which has {_several(costs.workers)}; one batch of {costs.batch} "
                f"takes it {duration(costs.batch_ms / 1e3)} in one process",
                why="to start the workers, and to send a batch from one process to another, takes "
                "longer than to make it",
                remedy="DataLoader(..., num_workers=0)",
                notebook="03_dali_io",
            )
        elif factor:
            trials.note_no_gain("num_workers=0")
        if loader.persistent:
            return
        factor, tried = trials.persistent_workers()
        # where no epoch began in the steps that were looked at, its beginning has to be long
        enough = least_ms if seen.starts else 4 * least_ms
        if factor and (saves := seen.step_ms * (1 - 1 / factor)) >= enough:
            yield seen.finding(
                "workers-restarted",
                saves_ms=saves,
                is_estimated=not tried,
                what=f"{share}, which starts its {_several(costs.workers)} anew every "
                + ("step" if trials.steps_of_epoch == 1 else f"{trials.steps_of_epoch} steps"),
                why="at the end of an epoch the workers end; the next one waits for new ones, and "
                "for their first batch",
                remedy=f"DataLoader(..., num_workers={costs.workers}, persistent_workers=True)",
                notebook="03_dali_io",
            )
        elif factor:
            trials.note_no_gain("persistent_workers=True")
        return
    count, factor = trials.count, None
    if seen.cores > 1:
        factor = trials.workers(count)
    if factor is not None:
        saves, is_estimated = seen.step_ms * (1 - 1 / factor), False
        after = duration(seen.step_ms / factor / 1e3)
        told = f"with {count} workers a step takes {after}, tried here"
    elif costs.workers_ms is not None:  # tried on batches alone
        count, computes = costs.tried, seen.step_ms - waits
        least = max(computes + costs.ready_ms, (costs.batch_ms + computes) / seen.cores)
        saves, is_estimated = seen.step_ms - max(least, costs.workers_ms), True
        told = f"with {count} workers a batch comes every {duration(costs.workers_ms / 1e3)}"
    else:
        return
    remedy = f"num_workers={count}, persistent_workers=True"
    if saves < least_ms:
        trials.note_no_gain(remedy)
        return
    yield seen.finding(
        "no-workers",
        saves_ms=saves,
        is_estimated=is_estimated,
        what=f"{_told(seen, costs, waits)}, and num_workers is 0; {told}",
        why="the step and the loader take turns, and a core idles",
        remedy=f"DataLoader(..., {remedy})",
        notebook="03_dali_io",
    )


def _parts(
    seen: Seen, costs: LoaderCosts, trials: LoaderTrials, waits: float, least_ms: float
) -> Iterator[Bottleneck]:
    """Name the parts of a batch that stand out."""
    told = _told(seen, costs, waits)
    own = costs.plain_collate_ms or 0.0
    bound = costs.plain_collate_ms is None
    saves = _hidden_by_nothing(seen, costs, waits, costs.collate_ms - own)
    if saves >= least_ms and (not bound or costs.collate_ms > costs.batch_ms / 4):
        factor = None if bound else trials.plain_collate()
        if factor is not None:
            saves = seen.step_ms * (1 - 1 / factor)
        if saves >= least_ms:
            yield seen.finding(
                "slow-collate",
                saves_ms=saves,
                is_estimated=factor is None,
                where=costs.collate_at,
                what=f"{told}, {duration(costs.collate_ms / 1e3)} of it in collate_fn"
                + ("" if bound else f"; torch's own gives the same in {duration(own / 1e3)}"),
                why="it goes through the samples in Python, where one call would copy them",
                remedy="drop collate_fn, or torch.stack(images) once a batch",
                notebook="03_dali_io",
            )
        else:
            trials.note_no_gain("no collate_fn")
    samples_ms = costs.batch * costs.sample_ms
    saves = _hidden_by_nothing(seen, costs, waits, samples_ms * (1 - costs.decoding))
    # what is stored is not decoded either, but it has to be read
    unread = samples_ms - costs.batch * costs.copy_ms
    stored = _hidden_by_nothing(seen, costs, waits, unread)
    if saves >= least_ms and costs.decoding < 0.5:
        if costs.repeats and stored >= least_ms:
            factor = trials.stored_samples(costs.sample_ms)
            if factor is not None:
                stored = seen.step_ms * (1 - 1 / factor)
            if stored >= least_ms:
                yield seen.finding(
                    "repeated-transforms",
                    saves_ms=stored,
                    is_estimated=factor is None,
                    where=costs.sample_at,
                    what=f"{told}; a sample comes out the same each time, and "
                    f"{1 - costs.decoding:.0%} of its time is not decoding",
                    why="what does not change is computed anew in every epoch",
                    remedy="transform once and store the result: "
                    "dlhelpers.lmdb_io.write_lmdb(folder, 'small.lmdb', resize=...), or a tensor",
                    notebook="02_lmdb_io",
                )
            else:
                trials.note_no_gain("samples stored in memory")
        elif not costs.repeats and (costs.workers or seen.cores == 1):
            yield seen.finding(
                "slow-transforms",
                saves_ms=saves,
                is_estimated=True,
                where=costs.sample_at,
                what=f"{told}; {1 - costs.decoding:.0%} of a sample's time is in transforms, which "
                "differ each time",
                why="more workers would share them out; faster code would end them",
                remedy="transforms.v2 on uint8 tensors, or a pipeline of DALI's",
                notebook="03_dali_io",
            )
    saves = _hidden_by_nothing(seen, costs, waits, samples_ms * costs.decoding)
    if saves >= least_ms and costs.decoding >= 0.3:
        yield seen.finding(
            "slow-decoding",
            saves_ms=saves,
            is_estimated=True,
            where=costs.sample_at,
            what=f"{told}, {costs.decoding:.0%} of it in reading and decoding",
            why="large pictures are decoded anew in every epoch, to be made small afterwards",
            remedy="store them small: dlhelpers.lmdb_io.write_lmdb(folder, 'small.lmdb', "
            "resize=256), or decode by DALI's threads",
            notebook="02_lmdb_io",
        )


def _several(workers: int) -> str:
    return f"{workers} worker{'s' * (workers != 1)}"


def _told(seen: Seen, costs: LoaderCosts, waits: float) -> str:
    return (
        f"{waits / seen.step_ms:.0%} of a step waits for the loader; one batch of {costs.batch} "
        f"takes it {duration(costs.batch_ms / 1e3)} in one process"
    )


def _hidden_by_nothing(seen: Seen, costs: LoaderCosts, waits: float, part_ms: float) -> float:
    """Return what of a step goes away with a part of each batch, at most."""
    if not costs.workers:
        return min(waits, part_ms)
    side = min(costs.workers, max(1, seen.cores))  # batches that are made at the same time
    return min(max(0.0, waits - costs.ready_ms), part_ms / side)
