"""Which part of the DataLoader does the step wait for?"""

from __future__ import annotations

from collections.abc import Iterator

from dlhelpers.profiling.loaders import LoaderCosts
from dlhelpers.profiling.seen import Bottleneck, Seen, Speedup

__all__ = ["loading"]


def loading(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Name the part of the DataLoader that the step waits for."""
    waits = seen.ms("data loading")
    if waits < least_ms:
        return
    costs = seen.costs
    if costs is None:
        yield seen.finding(
            "slow-loading",
            saves_ms=waits,
            at_most=True,
            what=f"{waits / seen.step_ms:.0%} of a step is data loading",
            why="the step waits until its batch is there",
            remedy="prepare batches while the step computes: DataLoader(..., num_workers=2)"
            + ", each worker giving its own part of the stream, by get_worker_info()"
            * bool(seen.loader and not seen.loader.by_index),
            notebook="03_dali_io",
        )
        return
    found = list(_parts_of_loading(seen, costs, waits, least_ms))
    explained = min(waits, costs.batch_ms)  # the rest is the transport from workers
    # workers that were tried and do not help leave nothing to say
    if not found and costs.workers_ms is None and explained >= least_ms:
        failed = f"; {costs.tried} workers were tried and failed" if costs.tried else ""
        found = [
            seen.finding(
                "slow-loading",
                saves_ms=explained,
                at_most=True,
                where=costs.sample_at,
                what=f"{waits / seen.step_ms:.0%} of a step waits for the loader, with "
                f"{costs.workers} workers; a batch takes {costs.batch_ms:.3g} ms in one process"
                + failed,
                why="no part of it stands out, so all of it would have to become faster",
                remedy="profile_python(lambda: [dataset[i] for i in range(100)])",
                notebook="03_dali_io",
            )
        ]
    yield from found


def _parts_of_loading(
    seen: Seen, costs: LoaderCosts, waits: float, least_ms: float
) -> Iterator[Bottleneck]:
    side = max(1, costs.workers)  # batches that are made at the same time
    told = (
        f"{waits / seen.step_ms:.0%} of a step waits for the loader; one batch of {costs.batch} "
        f"takes it {costs.batch_ms:.3g} ms in one process"
    )
    own = costs.plain_collate_ms or 0.0
    bound = costs.plain_collate_ms is None
    saves = min(waits, (costs.collate_ms - own) / side)
    if saves >= least_ms and (not bound or costs.collate_ms > costs.batch_ms / 4):
        yield seen.finding(
            "slow-collate",
            saves_ms=saves,
            at_most=bound,
            where=costs.collate_at,
            what=f"{told}, {costs.collate_ms:.3g} ms of it in collate_fn"
            + ("" if bound else f"; torch's own gives the same in {own:.3g} ms"),
            why="it goes through the samples in Python, where one call would copy them",
            remedy="drop collate_fn, or torch.stack(images) once a batch",
            notebook="03_dali_io",
        )
    rest = costs.batch * costs.sample_ms / side
    saves = min(waits, rest * (1 - costs.decoding))
    # what is stored is not decoded either, but it has to be read
    stored = min(waits, rest - costs.batch * costs.copy_ms / side)
    if saves >= least_ms and costs.decoding < 0.5:
        if costs.repeats and stored >= least_ms:
            yield seen.finding(
                "repeated-transforms",
                saves_ms=stored,
                where=costs.sample_at,
                what=f"{told}; a sample comes out the same each time, and {1 - costs.decoding:.0%} "
                "of its time is not decoding",
                why="what does not change is computed anew in every epoch",
                remedy="transform once and store the result: "
                "dlhelpers.lmdb_io.write_lmdb(folder, 'small.lmdb', resize=...), or a tensor",
                notebook="02_lmdb_io",
            )
        elif not costs.repeats and (costs.workers or seen.cores == 1):
            yield seen.finding(
                "slow-transforms",
                saves_ms=saves,
                at_most=True,
                where=costs.sample_at,
                what=f"{told}; {1 - costs.decoding:.0%} of a sample's time is in transforms, which "
                "differ each time",
                why="more workers would share them out; faster code would end them",
                remedy="transforms.v2 on uint8 tensors, or a pipeline of DALI's",
                notebook="03_dali_io",
            )
    batch_ms = costs.workers_ms
    if costs.workers == 0 and batch_ms is not None:
        computes = seen.step_ms - waits
        after = max(computes + costs.ready_ms, batch_ms, (costs.batch_ms + computes) / seen.cores)
        saves = seen.step_ms - after
        if saves >= least_ms:
            yield seen.finding(
                "no-workers",
                saves_ms=saves,
                what=f"{told}, and num_workers is 0; with {costs.tried} workers a batch comes "
                f"every {batch_ms:.3g} ms",
                why="the step and the loader take turns, and a core idles",
                remedy=f"DataLoader(..., num_workers={costs.tried}, persistent_workers=True)",
                notebook="03_dali_io",
            )
    saves = min(waits, rest * costs.decoding)
    if saves >= least_ms and costs.decoding >= 0.3:
        yield seen.finding(
            "slow-decoding",
            saves_ms=saves,
            at_most=True,
            where=costs.sample_at,
            what=f"{told}, {costs.decoding:.0%} of it in reading and decoding",
            why="large pictures are decoded anew in every epoch, to be made small afterwards",
            remedy="store them small: dlhelpers.lmdb_io.write_lmdb(folder, 'small.lmdb', "
            "resize=256), or decode by DALI's threads",
            notebook="02_lmdb_io",
        )
