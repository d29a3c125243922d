"""What does the step do in Python, one sample or one number after the other?"""

from __future__ import annotations

from collections.abc import Iterator

from dlhelpers.profiling.seen import Bottleneck, Seen, Speedup
from dlhelpers.profiling.trials import trial

__all__ = ["decoding", "loops"]

_BETWEEN_CALLS_MS = 0.3  # what any step's own Python may take


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
