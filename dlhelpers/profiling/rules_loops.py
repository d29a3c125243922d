"""What does the step do in Python, one sample or one number after the other?

A loop counts where its turns could be done at once: where no turn needs what an earlier one made,
but for sums and their kin. Decoding word by word, rollouts and sampling are no such loops.
"""

from __future__ import annotations

from collections.abc import Iterator

from dlhelpers.profiling.code_report import place_of
from dlhelpers.profiling.loop_code import list_remedy, loop_remedy
from dlhelpers.profiling.seen import Bottleneck, Seen, Speedup
from dlhelpers.profiling.trials import alone_ms, calls_gain, rows_to_try, trial
from dlhelpers.profiling.turns import kernels_ms
from dlhelpers.tables import duration

__all__ = ["decoding", "loops"]

_BETWEEN_CALLS_MS = 0.3  # what any step's own Python may take
_LEAST_CALLS = 4  # of a model, on one sample each
_LEAST_TURNS = 8  # of a loop over operators
_LEAST_GAIN = 3.0  # of one large operator over many; less where each of them is large already
_MOST_BACKWARD = 3.0  # times forward's kernels; more of it adds up gradients, turn by turn
_LEAST_OF_LOOP = 2.0  # times its kernels and one turn's calls that a loop takes


def loops(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Find Python that goes through samples, and numbers that are taken out one by one."""
    for calls in seen.calls:
        each, key = calls.count / seen.steps, (id(calls.module), calls.training)
        at_once = seen.flow.calls_at_once.get(key, 1.0) if seen.flow else each
        if calls.rows == 1 and min(each, at_once) >= _LEAST_CALLS:
            one = trial(calls)
            rows = min(round(at_once), rows_to_try(one))
            many = trial(calls, rows)
            if one is None or many is None:
                continue
            factor = speedup(lambda one=one, rows=rows: [one() for _ in range(rows)], many)
            saves = seen.calls_ms(calls) * (1 - 1 / factor)
            if factor == 1:
                seen.tried.append(f"{rows} samples in one call of {type(calls.module).__name__}")
            if saves >= least_ms:
                line = seen.flow.lines.get(key, ("", 0, "")) if seen.flow else ("", 0, "")
                yield seen.finding(
                    "python-loop",
                    saves_ms=saves,
                    is_of_part=True,
                    where=place_of(*line[:2]) or seen.lines.hottest,
                    what=f"{type(calls.module).__name__} is called {each:.0f} times a step, on "
                    "one sample each",
                    why=f"{rows} samples in one call take {factor:.2g} times less, tried here",
                    remedy="outputs = model(torch.cat(samples))",
                    notebook="08_profiling",
                )
                return
    outside, in_python = seen.outside, seen.python_ms
    name, count = outside.commonest
    if outside.ms + outside.loop_backward_ms < least_ms:
        return
    share = outside.ms / seen.step_ms
    told = f"{share:.0%} of a step is outside torch's loaders, modules, backward and optimizers"
    needed = seen.flow.longest_reads if seen.flow else 1  # as a rollout needs its actions
    many = outside.items >= _LEAST_TURNS * max(1, needed)
    if many and 3 * outside.items >= outside.operators:
        saves = seen.items_ms
        whole = seen.item_loop_ms
        is_loop = seen.flow is None or seen.flow.operators_at_once >= _LEAST_TURNS
        stays = 0.0
        if whole > saves and is_loop:
            stays = _kernels_of(seen, whole, outside.items, speedup)
            saves, stays = max((saves, 0.0), (whole - stays, stays))
        if saves >= least_ms:
            yield seen.finding(
                "item-every-step",
                saves_ms=_beside_models_alone(seen, saves, stays),
                is_estimated=True,
                where=seen.lines.outside,
                what=f"{told}; {outside.items:.0f} numbers a step are taken out of tensors",
                why="each .item() is a call of its own, and on a GPU each one waits for all "
                "kernels",
                remedy="keep tensors: total += loss.detach(), and one .item() or .tolist() at the "
                "end",
                notebook="08_profiling",
            )
            return
    # milliseconds beside no other program, which a median step has beside it
    allowed_ms = _own_python_ms(seen) * seen.step_ms / seen.shortest_ms
    saves, stays, remedy = 0.0, 0.0, ""
    if min(seen.loop_ms, _seen_outside(seen)) >= least_ms and _is_loop(seen):
        saves, stays, remedy = _loop_gain(seen, speedup)
    if saves >= least_ms:
        after = outside.loop_backward_ms / seen.step_ms
        more = f", and its backward {after:.0%}" if after >= 0.01 else ""
        yield seen.finding(
            "python-loop",
            saves_ms=_beside_models_alone(seen, saves, stays),
            is_estimated=True,
            where=place_of(*seen.loop_line[:2]) or seen.lines.outside,
            what=f"{told}{more}; {name} is called {count:.0f} times a step",
            why="each call costs the same few microseconds, however little it computes, and so "
            "does its node in backward",
            remedy=remedy,
            notebook="08_profiling",
        )
    elif seen.calls and in_python >= max(least_ms, seen.step_ms / 5, allowed_ms):
        yield seen.finding(
            "python-in-step",
            saves_ms=in_python,
            is_estimated=True,
            where=seen.lines.outside,
            what=f"{told}; {duration(in_python / 1e3)} of it pass outside torch's operators",
            why="it is Python, or what Python calls at this line: numbers, texts, files, a lock, a "
            "model or a loader that is not torch's",
            remedy="profiling.sample(train_step) names the function: compute on whole tensors, let "
            "the loader's workers do it, or do it once in a hundred steps",
            notebook="08_profiling",
        )


def _loop_gain(seen: Seen, speedup: Speedup) -> tuple[float, float, str]:
    """Return milliseconds of a step that go away with the loop, those that stay, code for it."""
    line, name = seen.loop_line, seen.outside.commonest[0]
    found = seen.flow.loops.get(line) if seen.flow else None
    if found and found.uneven:
        # one call on the list does the work of all the operators of a turn
        each = found.count / max(1, found.at_once)
        gain = each * calls_gain(seen.flow, speedup, in_list=True)
        return seen.loop_ms * (1 - 1 / gain), seen.loop_ms / gain, list_remedy(line)
    turns = min(seen.outside.turns, seen.loop_at_once)
    stays = _kernels_of(seen, seen.loop_ms, turns, speedup)
    return max(0.0, seen.loop_ms - stays), stays, loop_remedy(line, name, seen.step)


def _kernels_of(seen: Seen, loop_ms: float, turns: float, speedup: Speedup) -> float:
    """Return milliseconds of a step that a loop's kernels take, whatever calls them.

    All of the loop's where they are most of it: large tensors in few turns gain next to nothing.
    """
    flow = seen.flow
    if flow is None or not flow.turns or flow.device != "cpu":
        return 0.0 if calls_gain(flow, speedup) >= _LEAST_GAIN else loop_ms
    # the shortest trial beside the shortest step: other programs are no part of either
    kernels = kernels_ms(flow.turns) * seen.step_ms / seen.shortest_ms
    after = seen.outside.loop_backward_ms
    if after:
        ahead = seen.outside.loop_ms - after
        kernels *= 1 + min(_MOST_BACKWARD, max(1.0, after / max(ahead, 1e-9)))
    one = loop_ms / max(1.0, turns - 1)  # turn, that ``loop_ms`` leaves out
    return kernels if loop_ms + one >= _LEAST_OF_LOOP * (kernels + one) else loop_ms


def _beside_models_alone(seen: Seen, saves_ms: float, stays_ms: float) -> float:
    """Return what is saved of a step whose models take as long as without the loop.

    What they take beyond that in the step is the loop's by its share, and else no part of either.
    Of the loop some milliseconds stay.
    """
    if seen.trace.gpu or not seen.calls:
        return saves_ms
    alone = stays_ms * seen.shortest_ms / seen.step_ms
    for calls in seen.calls:
        each = alone_ms(calls)
        if each is None:
            return saves_ms
        alone += each * calls.count / seen.steps
    least = seen.least_ms or seen.step_ms
    in_thread = seen.shortest_ms  # other programs are no part of it
    waits = seen.ms("data loading") / seen.step_ms
    elsewhere = seen.outside.others_ms + seen.outside.updates_ms
    others = elsewhere * in_thread / least + waits * least
    share = saves_ms / seen.step_ms
    saved = min(share * least, in_thread)
    turn = saved / max(seen.outside.turns, seen.outside.items, 1.0)
    alone += turn * seen.outside.working  # the calls of one turn stay
    rest = (1 - share) * least
    left = min(rest, alone + others)
    saved = min(saved + share * (rest - left), in_thread)
    return seen.step_ms * saved / (left + saved)


def _is_loop(seen: Seen) -> bool:
    """Whether operators come as often as there are samples, and could be done at once.

    As often as there are samples, not as micro-batches.
    """
    return seen.outside.commonest[1] >= max(_LEAST_TURNS, seen.samples) and not _is_chain(seen)


def _is_chain(seen: Seen) -> bool:
    """Whether the turns of the loop need earlier ones, all but a few of them."""
    at_once = seen.flow.operators_at_once if seen.flow else _LEAST_TURNS
    return min(at_once, seen.loop_at_once) < _LEAST_TURNS


def _own_python_ms(seen: Seen) -> float:
    """Return what the step's own Python may take, for each turn that has to wait for the last."""
    if seen.flow is None:
        return _BETWEEN_CALLS_MS
    turns = [seen.outside.turns] if _is_chain(seen) else []
    for calls in seen.calls:
        at_once = seen.flow.calls_at_once.get((id(calls.module), calls.training), 1.0)
        turns.append(calls.count / seen.steps / at_once)
    return _BETWEEN_CALLS_MS * max(1.0, *turns, 1.0)


def _seen_outside(seen: Seen) -> float:
    """Milliseconds of a step in the loop's lines and its backward, as a second clock tells them."""
    return seen.at_most_outside_ms + seen.outside.loop_backward_ms


def decoding(seen: Seen, least_ms: float, speedup: Speedup) -> Iterator[Bottleneck]:
    """Find pictures that are decoded in the step itself."""
    saves = seen.step_ms * seen.lines.decoding_share
    if saves >= least_ms:
        yield seen.finding(
            "slow-decoding",
            saves_ms=saves,
            is_estimated=True,
            where=seen.lines.decoding or seen.lines.hottest,
            what=f"{seen.lines.decoding_share:.0%} of a step is reading and decoding, in the step "
            "itself",
            why="nothing is computed meanwhile, and large pictures are decoded to be made small",
            remedy="a DataLoader with workers, or image.draft('RGB', (64, 64)) before decoding",
            notebook="02_lmdb_io",
        )
