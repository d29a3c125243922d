"""What does a step do that it need not do at all? Each remedy is tried, and its gain measured."""

from __future__ import annotations

from collections.abc import Iterator

from dlhelpers.profiling.optimizer_trials import optimizers_raced
from dlhelpers.profiling.seen import Bottleneck, Seen, Speedup, Trial
from dlhelpers.profiling.step_trials import answered, computes_the_same, without_anomaly
from dlhelpers.profiling.trials import is_double, trial
from dlhelpers.tables import duration

__all__ = ["anomaly_detection", "double_precision", "kept_tensors", "optimizers", "repeated_calls"]

_KEPT_BYTES = 2**14  # that a step leaves behind; less is what a metric keeps until its epoch ends


def anomaly_detection(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Find autograd's anomaly detection left on."""
    if not seen.anomaly:
        return
    factor = _gain(speedup, seen.step, without_anomaly(seen.step))
    saves, remedy = seen.step_ms * (1 - 1 / factor), "torch.autograd.set_detect_anomaly(False)"
    if saves < least_ms:
        seen.tried.append(remedy)
        return
    yield seen.finding(
        "anomaly-detection",
        saves_ms=saves,
        what=f"autograd's anomaly detection is on; without it a step takes "
        f"{duration(seen.step_ms / factor / 1e3)}, tried here",
        why="each operator notes the stack that called it, and each gradient is searched for nan",
        remedy=f"{remedy}; on again only to look for a nan",
        notebook="08_profiling",
    )


def double_precision(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Try float32 where models have parameters or inputs of float64."""
    import torch

    pairs = [
        (before, after)
        for calls in seen.calls
        if is_double(calls)
        and (before := trial(calls)) is not None
        and (after := trial(calls, dtype=torch.float32)) is not None
    ]
    if not pairs:
        return
    factor = _gain(
        speedup,
        lambda: [before() for before, _ in pairs],
        lambda: [after() for _, after in pairs],
    )
    saves = seen.model_ms * (1 - 1 / factor)
    if saves < least_ms:
        seen.tried.append("model.float()")
        return
    named = sorted({type(calls.module).__name__ for calls in seen.calls if is_double(calls)})
    yield seen.finding(
        "double-precision",
        saves_ms=saves,
        what=f"{', '.join(named)}: parameters or inputs are float64; in float32 the model is "
        f"{factor:.2f} times as fast, tried here",
        why="float64 takes twice the memory traffic and at least twice the arithmetic; NumPy's "
        "arrays are float64 unless they are told otherwise",
        remedy="if the precision of float32 is enough: model.float(), and "
        "torch.from_numpy(array).float()",
        notebook="07_quantization",
    )


def optimizers(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Try fused updates, or such over lists of tensors, where an optimizer goes one by one."""
    if seen.ms("optimizer") < least_ms:
        return
    for option, before, after, told in optimizers_raced(seen):
        factor = _gain(speedup, before, after)
        saves, remedy = seen.step_ms * (1 - 1 / factor), f"{told.name}(..., {option}=True)"
        if saves < least_ms:
            seen.tried.append(remedy)
            continue
        yield seen.finding(
            "optimizer-by-tensor",
            saves_ms=saves,
            what=f"{told.name} updates {told.tensors} tensors one by one, and takes "
            f"{seen.shares['optimizer']:.0%} of a step; with {option}=True a step takes "
            f"{duration(seen.step_ms / factor / 1e3)}, tried here on copies",
            why="several short operators for each tensor: calling them takes longer than they do",
            remedy=remedy,
            notebook="04_memory",
        )
        return


def repeated_calls(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Find a second forward on the same input, as for the accuracy."""
    for repeat in seen.repeats:
        if not computes_the_same(repeat):
            continue
        factor = _gain(speedup, seen.step, answered(seen.step, repeat))
        saves = seen.step_ms * (1 - 1 / factor)
        if saves < least_ms:
            seen.tried.append("one forward for the loss and for what is reported")
            continue
        times = len(repeat.numbers)
        updated = " after an update of the weights" * repeat.after_update
        yield seen.finding(
            "repeated-forward",
            saves_ms=saves,
            what=f"{type(repeat.module).__name__} is called on an input that it was given before "
            f"in the same step{updated}, {times} time{'s' * (times != 1)} a step, and no gradient "
            f"flows back; without it a step takes {duration(seen.step_ms / factor / 1e3)}, "
            "tried here",
            why="the outputs of the call that is trained on are there already"
            + ("; they are those before the update" if repeat.after_update else ""),
            remedy="outputs = model(x); the loss from outputs, the accuracy from outputs.detach()",
            notebook="08_profiling",
        )


def kept_tensors(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Find steps each of which leaves tensors behind, without a graph."""
    if seen.kept_nodes or seen.kept_tensor_bytes < _KEPT_BYTES:
        return
    what = f", as {seen.kept_where}" if seen.kept_where else ""
    yield seen.finding(
        "tensors-kept",
        saves_bytes=seen.kept_tensor_bytes,
        besides="memory that does not grow",
        what=f"each step leaves {seen.kept_tensor_bytes:,} bytes of tensors in memory{what}",
        why="detached tensors hold their memory as well, which grows with every step unless the "
        "program drops them, as a buffer with a limit does",
        remedy="keep a number in place of the tensor, as in values.append(output.mean().item()); "
        "or collections.deque(maxlen=...), or remove the hook",
        notebook="04_memory",
    )


def _gain(speedup: Speedup, before: Trial, after: Trial) -> float:
    """Return how many times as fast a remedy is; 1 where the program does not run with it."""
    try:
        return max(1.0, speedup(before, after))
    except Exception:  # of the program's, or its loader ended
        return 1.0
