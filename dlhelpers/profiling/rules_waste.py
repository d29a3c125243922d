"""What does a step do that it need not do at all? Each remedy is tried, and its gain measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dlhelpers.profiling.optimizer_trials import optimizers_raced
from dlhelpers.profiling.seen import Bottleneck, Seen, Speedup, Trial
from dlhelpers.profiling.step_trials import without_anomaly
from dlhelpers.profiling.trials import is_double, trial
from dlhelpers.profiling.watching import ModelCalls
from dlhelpers.tables import duration

__all__ = ["anomaly_detection", "double_precision", "kept_tensors", "optimizers", "repeated_calls"]

_KEPT_BYTES = 2**14  # that a step leaves behind; less is what a metric keeps until its epoch ends


def anomaly_detection(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Find autograd's anomaly detection left on."""
    if not seen.anomaly:
        return
    remedy = "torch.autograd.set_detect_anomaly(False)"
    factor = _gain(seen, remedy, speedup, seen.step, without_anomaly(seen.step))
    if factor is None:
        return
    saves = seen.step_ms * (1 - 1 / factor)
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
        seen,
        "model.float()",
        speedup,
        lambda: [before() for before, _ in pairs],
        lambda: [after() for _, after in pairs],
    )
    if factor is None:
        return
    saves = seen.model_ms * (1 - 1 / factor)
    if saves < least_ms:
        seen.tried.append("model.float()")
        return
    named = sorted({type(calls.module).__name__ for calls in seen.calls if is_double(calls)})
    yield seen.finding(
        "double-precision",
        saves_ms=saves,
        is_of_part=True,
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
        remedy = f"{told.name}(..., {option}=True)"
        factor = _gain(seen, remedy, speedup, before, after)
        if factor is None:
            continue
        saves = seen.step_ms * (factor - 1)  # at least: an update more is in both
        if saves < least_ms:
            seen.tried.append(remedy)
            continue
        yield seen.finding(
            "optimizer-by-tensor",
            saves_ms=min(saves, seen.ms("optimizer")),
            what=f"{told.name} updates {told.tensors} tensors one by one; such an update after "
            f"the step takes {duration(saves / 1e3)} less with {option}=True, tried here on copies",
            why="several short operators for each tensor: calling them takes longer than they do",
            remedy=remedy,
            notebook="04b_more",
        )
        return


def repeated_calls(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Find a second forward on the same input, as for the accuracy; a copy shows what it takes."""
    step, remedy = seen.step, "one forward for the loss and for what is reported"
    for repeat in seen.repeats:
        calls = ModelCalls(repeat.module, repeat.training, args=repeat.args, kwargs=repeat.kwargs)
        again, times = trial(calls, grad=repeat.makes_graph), len(repeat.pairs)
        if step is None or again is None:
            continue

        def with_more(again: Any = again, times: int = times) -> None:
            step()
            for _ in range(times):
                again()

        factor = _gain(seen, remedy, speedup, with_more, step)
        if factor is None:
            continue
        # the call that is trained on takes as long, and stays
        saves = seen.step_ms * min(factor - 1, times / (times + 1))
        if saves < least_ms:
            seen.tried.append(remedy)
            continue
        updated = " after an update of the weights" * repeat.after_update
        more = "one more such call on a copy makes"
        if times > 1:
            more = f"{times} more such calls on a copy make"
        yield seen.finding(
            "repeated-forward",
            saves_ms=saves,
            is_estimated=True,
            what=f"{type(repeat.module).__name__} is called on an input that it was given before "
            f"in the same step{updated}, {times} time{'s' * (times != 1)} a step, and no gradient "
            f"flows back; {more} a step {factor:.2f} times as long",
            why="the outputs of the call that is trained on are there already"
            + ("; they are those before the update" if repeat.after_update else ""),
            remedy="outputs = model(x); the loss from outputs, what else is needed from "
            "outputs.detach()",
            notebook="08_profiling",
        )


def kept_tensors(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Find steps each of which leaves tensors behind, without a graph."""
    if seen.kept_nodes or seen.kept_tensor_bytes < _KEPT_BYTES:
        return
    what = f", as {seen.kept_where}" if seen.kept_where else ""
    steps = len(seen.tensors) - 1
    yield seen.finding(
        "tensors-kept",
        saves_bytes=seen.kept_tensor_bytes,
        besides="memory that does not grow",
        what=f"each of {steps} step{'s' * (steps != 1)} left {seen.kept_tensor_bytes:,} bytes or "
        f"more of tensors in memory{what}",
        why="detached tensors hold their memory as well; that is as it should be where the growth "
        "ends with the epoch or at a limit, as that of an epoch's predictions, a cache or a replay "
        "memory does",
        remedy="where it does not end: keep a number in place of the tensor, as in "
        "values.append(output.mean().item()); or collections.deque(maxlen=...), or remove the hook",
        notebook="04b_more",
    )


def _gain(seen: Seen, remedy: str, speedup: Speedup, before: Trial, after: Trial) -> float | None:
    """Return how many times as fast ``after`` is; None, and a note, where it raises."""
    try:
        return max(1.0, speedup(before, after))
    except Exception as error:  # of the program's, or its loader ended
        seen.note_failure(remedy, error)
        return None
