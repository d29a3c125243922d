"""Which bottleneck do the facts point to, and what would its remedy save? Rules for every machine.

Each rule reads :class:`~dlhelpers.profiling.seen.Seen`, tries its remedy where that can be done on
the spot, and says nothing where the gain would be below the share of a step that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dlhelpers.profiling.loaders import LoaderCosts
from dlhelpers.profiling.seen import Bottleneck, Seen, Speedup
from dlhelpers.profiling.trials import folding_gain, graph_bytes, trial
from dlhelpers.profiling.watching import ModelCalls

__all__ = ["RULES"]

_BETWEEN_CALLS_MS = 0.3  # what any step's own Python may take

Rule = Callable[[Seen, float, Speedup], Iterator[Bottleneck]]


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


def loops(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Find Python that goes through samples, and numbers that are taken out one by one."""
    for calls in seen.calls:
        each = calls.count / seen.steps
        if each >= 4 and calls.rows == 1:
            rows = min(16, round(each))  # a trial of hundreds would not be settled in its time
            one, many = trial(calls), trial(calls, rows)
            if one is None or many is None:
                continue
            factor = speedup(lambda one=one, rows=rows: [one() for _ in range(rows)], many)
            saves = seen.model_ms * (1 - 1 / factor)
            if saves >= least_ms:
                yield seen.finding(
                    "python-loop",
                    saves_ms=saves,
                    where=seen.lines.hottest,
                    what=f"{type(calls.module).__name__} is called {each:.0f} times a step, on "
                    "one sample each",
                    why=f"{rows} samples in one call take {factor:.2g} times less, tried here",
                    remedy="outputs = model(torch.stack(samples))",
                    notebook="08_profiling",
                )
                return
    outside, in_python = seen.outside, seen.python_ms
    name, count = outside.commonest
    in_loop = count >= max(8, seen.samples)  # as often as there are samples, not as micro-batches
    if outside.ms < least_ms:
        return
    share = outside.ms / seen.step_ms
    told = f"{share:.0%} of a step is outside torch's loaders, modules, backward and optimizers"
    if 3 * outside.items >= outside.operators and outside.items >= 8:
        yield seen.finding(
            "item-every-step",
            saves_ms=outside.ms * (1 - 1 / outside.items),
            at_most=True,
            where=seen.lines.outside,
            what=f"{told}; {outside.items:.0f} numbers a step are taken out of tensors",
            why="each .item() is a call of its own, and on a GPU each one waits for all kernels",
            remedy="keep tensors: total += loss.detach(), and one .item() or .tolist() at the end",
            notebook="08_profiling",
        )
        return
    # Python takes about as long to call a small operator as the operator itself
    called = min(1.0, 2 * outside.in_operators) * outside.ms * (1 - 1 / max(count, 1))
    saves = min(max(called, in_python), seen.at_most_outside_ms)
    if in_loop and saves >= least_ms:
        yield seen.finding(
            "python-loop",
            saves_ms=saves,
            at_most=True,
            where=seen.lines.outside,
            what=f"{told}; {name} is called {count:.0f} times a step",
            why="each call costs the same few microseconds, however little it computes",
            remedy="one operation over the whole batch: (images - mean) / std, not for image in "
            "images",
            notebook="08_profiling",
        )
    elif seen.calls and in_python >= max(least_ms, seen.step_ms / 5, _BETWEEN_CALLS_MS):
        yield seen.finding(
            "python-in-step",
            saves_ms=in_python,
            at_most=True,
            where=seen.lines.outside,
            what=f"{told}; {in_python:.3g} ms of it pass outside torch's operators",
            why="it is Python, or what Python calls at this line: numbers, texts, files, a lock, a "
            "model or a loader that is not torch's",
            remedy="profiling.sample(train_step) names the function: compute on whole tensors, let "
            "the loader's workers do it, or do it once in a hundred steps",
            notebook="08_profiling",
        )


def decoding(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Find pictures that are decoded in the step itself."""
    saves = seen.step_ms * seen.lines.decoding_share
    if saves >= least_ms:
        yield seen.finding(
            "slow-decoding",
            saves_ms=saves,
            at_most=True,
            where=seen.lines.hottest,
            what=f"{seen.lines.decoding_share:.0%} of a step is reading and decoding, in the step "
            "itself",
            why="nothing is computed meanwhile, and large pictures are decoded to be made small",
            remedy="a DataLoader with workers, or image.draft('RGB', (64, 64)) before decoding",
            notebook="02_lmdb_io",
        )


def batch_of_one(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Try a batch of sixteen where one sample goes through the model in a step."""
    for calls in seen.calls:
        if calls.rows != 1 or calls.count > seen.steps:
            continue
        one, many = trial(calls), trial(calls, 16)
        if one is None or many is None:
            continue
        factor = speedup(lambda one=one: [one() for _ in range(16)], many)
        saves = seen.model_ms * (1 - 1 / factor)
        saves += 15 / 16 * seen.ms("optimizer")
        if factor > 1 and saves >= least_ms:
            yield seen.finding(
                "batch-of-one",
                saves_ms=saves,
                what=f"{type(calls.module).__name__} sees one sample a step",
                why=f"16 samples at a time take {factor:.2g} times less each, tried here",
                remedy="DataLoader(..., batch_size=16), with the learning rate tuned anew",
                notebook="04_memory",
            )


def evaluation(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Find evaluation that builds graphs, and BatchNorms that could be folded."""
    for calls in seen.calls:
        if calls.training:
            continue
        if seen.has_backward:
            yield from _teacher(seen, calls)
            continue
        gain = 1.0
        if calls.makes_graph:
            plain, without = trial(calls, grad=True), trial(calls)
            gain = max(1.0, speedup(plain, without))
            yield seen.finding(
                "evaluation-without-no-grad",
                severity="error",
                saves_ms=seen.model_ms * (1 - 1 / gain),
                saves_bytes=graph_bytes(calls),
                besides="no graph that is built for nothing",
                what=f"{type(calls.module).__name__} is in eval mode, its outputs hang on a "
                "graph, and no backward follows",
                why="every input of every layer is kept for gradients that nobody asks for",
                remedy="with torch.inference_mode(): outputs = model(inputs)",
                notebook="04_memory",
            )
        if factor := folding_gain(calls, speedup):
            saves = seen.model_ms / gain * (1 - 1 / factor)
            if saves >= least_ms:
                yield seen.finding(
                    "batchnorm-unfused",
                    saves_ms=saves,
                    what=f"{type(calls.module).__name__} is in eval mode and has BatchNorms beside "
                    "convolutions",
                    why=f"folded away it is {factor:.2f} times as fast, tried here",
                    remedy="model, report = dlhelpers.fusion.fuse_conv_bn(model, inputs)",
                    notebook="06_fusion",
                )


def _teacher(seen: Seen, calls: ModelCalls) -> Iterator[Bottleneck]:
    """Find a model beside the one that is trained, whose graph nobody needs."""
    held = [parameter for parameter in calls.module.parameters() if parameter.requires_grad]
    if not (calls.makes_graph and held and seen.trained) or calls.needs_input_grad:
        return
    if any(id(parameter) in seen.trained for parameter in held):
        return
    yield seen.finding(
        "evaluation-without-no-grad",
        saves_bytes=graph_bytes(calls),
        besides="no graph that is built for nothing",
        what=f"{type(calls.module).__name__} is in eval mode, its outputs hang on a graph, and no "
        "optimizer that made a step holds any of its parameters",
        why="every input of every layer is kept, and backward may compute gradients that nobody "
        "takes",
        remedy="with torch.no_grad(): targets = teacher(inputs)",
        notebook="04_memory",
    )


def kept_graphs(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Find steps each of which leaves a graph behind."""
    if not seen.kept_nodes:
        return
    yield seen.finding(
        "loss-tensors-kept",
        severity="error",
        saves_bytes=seen.kept_bytes,
        besides="memory that does not grow",
        where=seen.lines.hottest if not seen.has_backward else "",
        what=f"each step leaves {seen.kept_nodes} nodes of autograd's graph in memory, and "
        f"{seen.kept_bytes:,} bytes of tensors",
        why="a tensor that is kept keeps its graph, and the memory grows with every step",
        remedy="losses.append(loss.detach()), or total += loss.item()",
        notebook="04_memory",
    )


RULES: tuple[Rule, ...] = (loading, loops, decoding, batch_of_one, evaluation, kept_graphs)
