"""How much of a loop's time do its kernels take? That much stays where all turns are one call.

The operators that were seen are called again, on tensors as large and on such with one element:

    kernels = time on tensors as large - time on one element each

What is left of the difference is the cost of calling them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from dlhelpers.trees import map_leaves, tensors_in

__all__ = ["Form", "OperatorCall", "form_of", "kernels_ms"]

_FORMS = 64  # operators on tensors of some form, that are tried at most
_TRIALS = 50  # of each, of which the shortest counts
_NOISE = 1.2  # times the shortest call on one element: no more than that is no work
_EACH_S = 0.02  # for the trials of one, three of them at least


@dataclass(frozen=True)
class Form:
    """What a tensor looks like, without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self, *, tiny: bool) -> Tensor:
        """Return such a tensor of zeros; with ``tiny`` of one element."""
        shape = tuple(min(size, 1) for size in self.shape)
        if tiny:
            return torch.zeros(shape, dtype=self.dtype)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).zero_()


@dataclass(frozen=True)
class OperatorCall:
    """An operator of a loop: ``count`` calls a step on tensors of these forms."""

    operator: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    count: int

    def ready(self, *, tiny: bool) -> Run:
        """Return how to call it on tensors of its own."""
        return Run(self.operator, _filled(self.args, tiny=tiny), _filled(self.kwargs, tiny=tiny))


@dataclass(frozen=True)
class Run:
    """An operator with all that it is given."""

    operator: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def seconds(self) -> float:
        """Call it once on new numbers, as a sort of the old ones is learned by the processor."""
        for tensor in tensors_in((self.args, self.kwargs)):
            if tensor.is_floating_point():
                tensor.uniform_()
        begin = perf_counter()
        self.operator(*self.args, **self.kwargs)
        return perf_counter() - begin


def form_of(value: Any) -> Any:
    """Return a value with a form in place of each tensor, however nested."""
    return map_leaves(_form_of_leaf, value)


def _form_of_leaf(leaf: Any) -> Any:
    is_tensor = isinstance(leaf, Tensor)
    return Form(tuple(leaf.shape), leaf.stride(), leaf.dtype) if is_tensor else leaf


def kernels_ms(calls: Sequence[OperatorCall]) -> float:
    """Return milliseconds a step of the kernels of these calls, timed on tensors of their forms.

    The shortest of some trials counts, so other programs are no part of it. An operator that
    cannot be called on such tensors counts as no work.
    """
    found = 0.0
    for call in sorted(calls, key=lambda call: call.count, reverse=True)[:_FORMS]:
        with torch.no_grad():
            found += 1e3 * call.count * _longer_s(call)
    return found


def _longer_s(call: OperatorCall) -> float:
    """Return by how many seconds its shortest call exceeds the shortest one on one element each."""
    try:
        large = call.ready(tiny=False)
        large.seconds()
    except Exception:  # values matter to it, or a kind of tensor
        return 0.0
    try:
        small = call.ready(tiny=True)
        small.seconds()
    except Exception:  # its other arguments fit no other sizes
        small = Run(torch.ops.aten.add.Tensor, (torch.zeros(1), torch.zeros(1)), {})
    took: tuple[list[float], list[float]] = [], []
    begin = perf_counter()
    while len(took[0]) < 3 or (len(took[0]) < _TRIALS and perf_counter() - begin < _EACH_S):
        took[0].append(large.seconds())
        took[1].append(small.seconds())
    large_s, small_s = min(took[0]), min(took[1])
    return large_s - small_s if large_s > _NOISE * small_s else 0.0


def _filled(value: Any, *, tiny: bool) -> Any:
    def filled(leaf: Any) -> Any:
        return leaf.tensor(tiny=tiny) if isinstance(leaf, Form) else leaf

    return map_leaves(filled, value, leaves=Form)
