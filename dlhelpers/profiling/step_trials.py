"""What does the step do without autograd's checks, and do its calls of a model repeat each other?

The program's own step runs, and nothing that it computes is put in place of anything else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from dlhelpers.models import copied
from dlhelpers.pairing.probe import restored
from dlhelpers.patching import patched
from dlhelpers.profiling.repeats import Repeat, is_in_backward
from dlhelpers.profiling.seen import Trial
from dlhelpers.profiling.trials import without_hooks
from dlhelpers.trees import tensors_in

__all__ = ["confirmed", "without_anomaly"]

_CHECKED = 2  # steps
_ROUNDING = 1e-5  # of the largest value: kernels with and without a graph may differ


def without_anomaly(step: Trial) -> Trial:
    """Return the step with autograd's anomaly detection off, whatever switches it on."""
    if step is None:
        return None

    def run() -> Any:
        was, checked = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
        torch.set_anomaly_enabled(False, checked)
        try:
            with patched(torch, "set_anomaly_enabled", lambda *args, **kwargs: None):
                return step()
        finally:
            torch.set_anomaly_enabled(was, checked)

    return run


def confirmed(step: Trial, repeats: Sequence[Repeat]) -> tuple[Repeat, ...]:
    """Return those repeats that give what the call that is trained on gives.

    The step runs twice more, and both outputs of each pair are compared within it. Where an
    optimizer has changed the weights in between, a copy of the model as it was at the earlier call
    gets the weights of the later one. Whatever else changes a parameter or a buffer in between, as
    an average of weights or an adversarial move does, makes the call no repeat.
    """
    if step is None or not repeats:
        return ()
    checks = {id(repeat.module): _Check(repeat) for repeat in repeats}
    with _calls_shown(checks):
        for _ in range(_CHECKED):
            for check in checks.values():
                check.begin_step()
            step()
    return tuple(r for r in repeats if checks[id(r.module)].holds)


@contextmanager
def _calls_shown(checks: dict[int, _Check]) -> Iterator[None]:
    me, inside = threading.get_ident(), False

    def shown(call: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return call(module, *args, **kwargs)
        inside = True
        try:
            check = None if is_in_backward() else checks.get(id(module))
            if check is None or check.refuted:
                return call(module, *args, **kwargs)
            check.before(args, kwargs)
            output = call(module, *args, **kwargs)
            check.after(output)
            return output
        finally:
            inside = False

    def updates(*_: Any) -> None:
        for check in checks.values() if threading.get_ident() == me else ():
            check.see()

    def updated(*_: Any) -> None:
        for check in checks.values() if threading.get_ident() == me else ():
            check.note_state()

    hooks = (
        register_optimizer_step_pre_hook(updates),
        register_optimizer_step_post_hook(updated),
    )
    try:
        with patched(nn.Module, "__call__", shown):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Check:
    """Whether the pairs of a repeat give the same; what it cannot look at does not."""

    def __init__(self, repeat: Repeat) -> None:
        self._repeat = repeat
        self.refuted = False
        pairs = [sorted(pair) for pair in repeat.pairs.items()]
        self._partners = {later: [a for a, b in pairs if b == later] for _, later in pairs}
        self._needed = {a: max(b for first, b in pairs if first == a) for a, _ in pairs}
        self._left = 0  # pairs that a step has not come to

    def begin_step(self) -> None:
        self.refuted |= self._left > 0  # a pair that did not come
        self._left = len(self._repeat.pairs)
        self._number = -1
        self._state: Any = None  # of the model, as a call or an optimizer has left it
        self._copies: dict[int, nn.Module] = {}
        self._outputs: dict[int, list[Tensor]] = {}
        self._inputs: tuple[tuple, dict[str, Any]] = ((), {})

    @property
    def holds(self) -> bool:
        return not self.refuted and self._left == 0

    def see(self) -> None:
        """Look whether something has changed the model since a call or an optimizer did."""
        with self._guarded():
            if self._outputs and _state_of(self._repeat.module) != self._state:
                self.refuted = True

    def note_state(self) -> None:
        """Note the model as it is now, where a pair is open."""
        with self._guarded():
            self._state = _state_of(self._repeat.module) if self._outputs else None

    def before(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Look at the model before a call; a copy of it, as it was earlier, gets its weights."""
        self._number, self._inputs = self._number + 1, (args, kwargs)
        self.see()
        with self._guarded():
            if self._repeat.after_update:
                for number in self._partners.get(self._number, ()):
                    earlier, now = map(_tensors_of, (self._copies[number], self._repeat.module))
                    for own, value in zip(earlier, now, strict=True):
                        own.copy_(value)
                if self._number in self._needed:
                    self._copies[self._number] = without_hooks(copied(self._repeat.module))

    def after(self, output: Any) -> None:
        """Compare an output with those of its partners."""
        with self._guarded():
            found = [tensor.detach().clone() for tensor in tensors_in(output)]
            for number in self._partners.get(self._number, ()):
                self._left -= 1
                expected = self._outputs[number]
                if self._repeat.after_update:
                    # random states have gone on since the call, so that dropout gives another mask
                    with restored():
                        made = self._copies[number](*self._inputs[0], **self._inputs[1])
                    expected = list(tensors_in(made))
                self.refuted |= not _are_close(found, expected)
            if self._number in self._needed:
                self._outputs[self._number] = found
            for number, last in self._needed.items():
                if last <= self._number:
                    self._outputs.pop(number, None)
                    self._copies.pop(number, None)
        self._inputs = ((), {})
        self.note_state()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            with torch.no_grad():
                yield
        except Exception:  # no copy, or tensors that cannot be compared
            self.refuted = True
        if self.refuted:
            self._outputs, self._copies = {}, {}


def _tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _state_of(model: nn.Module) -> list[tuple[float, float]]:
    """Return the sum and the sum of squares of each parameter and buffer."""
    found = []
    for tensor in _tensors_of(model):
        own = tensor.detach()
        values = (torch.view_as_real(own) if own.is_complex() else own).double()
        found.append((values.sum().item(), values.square().sum().item()))
    return found


def _are_close(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether they are the same but for rounding, where there are any."""
    if not some or len(some) != len(others):
        return False
    for one, other in zip(some, others, strict=True):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        if not (one.is_floating_point() or one.is_complex()):
            if not torch.equal(one, other):
                return False
        elif one.numel():
            bound = max(_ROUNDING, 4 * torch.finfo(one.dtype).eps) * one.abs().max()
            if not (one - other).abs().max() <= bound:  # nan is not
                return False
    return True
