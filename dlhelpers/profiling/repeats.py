"""Which calls of a model seem to repeat another one of the same step, with no use for a gradient?

A second forward for the accuracy is the usual one. Two calls are alike if they get the same
tensors. Of the calls that are alike exactly one may have a gradient flow back through it; the
others are those that repeat it. Whether they compute the same as well is looked at in
:mod:`~dlhelpers.profiling.step_trials`.
"""

from __future__ import annotations

from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.trees import entries, tensors_in

__all__ = ["Repeat", "Repeats", "detached", "is_in_backward"]

_LOOK_BACK = 4  # calls whose inputs are kept to be compared with
_COMPARED = 2**22  # values of two tensors, at most


@dataclass(frozen=True)
class Repeat:
    """Calls of one model that repeat another one, in each of the recorded steps.

    Attributes:
        module: the model.
        pairs: number of a call that repeats, from 0 in each step -> of the one that is trained on.
        training: the mode of the calls that repeat.
        makes_graph: whether their outputs hang on a graph.
        after_update: whether an optimizer made a step in between.
        args, kwargs: of the calls, detached.
    """

    module: nn.Module
    pairs: dict[int, int]
    training: bool
    makes_graph: bool
    after_update: bool
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Call:
    module: nn.Module
    number: int
    training: bool
    inputs: tuple[tuple, dict[str, Any]] | None
    versions: tuple[int, ...]
    updates: int
    hooks: list[Any] = field(default_factory=list)
    has_gradient: bool = False
    first: _Call | None = None  # the call that it is like


class Repeats:
    """The calls of the step that runs, and what was found in the steps before."""

    def __init__(self) -> None:
        self._found: list[dict[int, Repeat]] = []  # of each step, by id of the module
        self._begin()

    def _begin(self) -> None:
        self._calls: list[_Call] = []
        self._latest: deque[_Call] = deque(maxlen=_LOOK_BACK)
        self._counts: Counter[int] = Counter()
        self._updates = 0

    def begin_anew(self) -> None:
        """Forget the steps that warmed up."""
        self._end_step()
        self._found.clear()

    def begin_step(self) -> None:
        """Tell that a step begins, and so that the one before has ended."""
        self._end_step()

    def note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Note a call from outside any other module; one in backward recomputes what was freed."""
        if not is_in_backward():
            with suppress(Exception):  # of tensors that are no common ones, into the program
                self._note(module, args, kwargs, output)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        inputs, number = (args, kwargs), self._counts[id(module)]
        call = _Call(module, number, module.training, inputs, _versions(inputs), self._updates)
        self._counts[id(module)] += 1
        for tensor in tensors_in(output):
            if tensor.requires_grad and tensor.grad_fn is not None:
                call.hooks.append(tensor.register_hook(_Flag(call)))
        for other in self._latest:
            if other.module is module and _alike(other, call):
                call.first = other.first or other
                break
        if len(self._latest) == _LOOK_BACK:
            self._latest[0].inputs = None
        self._latest.append(call)
        self._calls.append(call)

    def note_update(self) -> None:
        """Note that an optimizer has changed parameters."""
        self._updates += 1

    def _end_step(self) -> None:
        found: dict[int, Repeat] = {}
        groups: dict[int, list[_Call]] = {}
        for call in self._calls:
            groups.setdefault(id(call.first or call), []).append(call)
        for group in groups.values():
            used = [call for call in group if call.has_gradient]
            others = [call for call in group if not call.has_gradient]
            if len(used) != 1 or not others:
                continue
            last, key = others[-1], id(others[-1].module)
            known = found[key].pairs if key in found else {}
            args, kwargs = detached(last.inputs or ((), {}))
            found[key] = Repeat(
                last.module,
                known | {call.number: used[0].number for call in others},
                last.training,
                bool(last.hooks),
                any(call.updates != used[0].updates for call in others),
                args,
                kwargs,
            )
        if self._calls:
            self._found.append(found)
        for call in self._calls:  # an output that the program keeps holds nothing of it
            call.inputs = None
            for hook in call.hooks:
                hook.remove()
        self._begin()

    def found(self) -> tuple[Repeat, ...]:
        """Return what was there in every step since the last ``begin_anew``."""
        self._end_step()
        if not self._found:
            return ()
        last = self._found[-1]
        return tuple(
            repeat
            for key, repeat in last.items()
            if all(key in step and step[key].pairs == repeat.pairs for step in self._found)
        )


class _Flag:
    """A hook of a tensor that notes that a gradient came by."""

    def __init__(self, call: _Call) -> None:
        self.call = call

    def __call__(self, gradient: Tensor) -> None:
        self.call.has_gradient = True


def is_in_backward() -> bool:
    """Whether autograd's engine runs the calling code; False where torch cannot tell."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def detached(value: Any) -> Any:
    """Return tuples, lists and dicts with their tensors detached; anything else as it is."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict) and type(value) is dict:
        return {key: detached(inner) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(detached, value))
    return value


def _alike(one: _Call, other: _Call) -> bool:
    if one.inputs is None or _versions(one.inputs) != one.versions:  # written to since
        return False
    return bool(other.versions) and _same(one.inputs, other.inputs)


def _same(one: Any, other: Any) -> bool:
    """Whether two inputs are the same tensors, share their memory, or hold the same values.

    An object of another kind, as a cache, may have changed unseen, and counts as another one.
    """
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one is other:
            return True
        if (one.dtype, one.shape, one.device) != (other.dtype, other.shape, other.device):
            return False
        if type(one) is not Tensor or one.layout is not torch.strided or one.is_meta:
            return False
        if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
            return True
        return one.numel() <= _COMPARED and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if (inside := entries(one)) is not None:
        inner, others = dict(inside), dict(entries(other))
        return inner.keys() == others.keys() and all(_same(inner[k], others[k]) for k in inner)
    return isinstance(one, bool | int | float | str | type(None)) and one == other


def _versions(inputs: Any) -> tuple[int, ...]:
    """Return how often each tensor was written to; one made in inference mode cannot tell."""
    return tuple(-1 if t.is_inference() else t._version for t in tensors_in(list(inputs)))
