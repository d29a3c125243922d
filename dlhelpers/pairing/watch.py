"""``guard``: look at every loss that unchanged training code calls, for the first steps.

While it looks, a ``torch.overrides.TorchFunctionMode`` stands on the thread's stack of modes: it
sees each call of a function of ``torch.nn.functional``, whichever name or module holds it. After
``steps`` optimizer steps it is taken off the stack again, so nothing remains to be paid for.
Source: https://pytorch.org/docs/stable/torch.overrides.html
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode

from dlhelpers.arguments import whole_number
from dlhelpers.findings import Findings

from .calls import NAME_OF, LossCall, bind, with_forgotten
from .catalog import Hit, finding
from .inspection import look
from .places import shown_path, user_frame
from .trial import explains, not_finite, refused

__all__ = ["PairingWarning", "guard"]

_SAMPLE = 65_536  # elements of a tensor that one look reads at most
_LOOKS_FOR_SUSPICION = 5
_NOTHING_SEEN = "no loss of pairing.LOSSES was seen: other threads and later phases are not watched"
_SILENT = ("check-failed", "values-not-readable")  # about the look, not about the program


class PairingWarning(UserWarning):
    """An error that ``guard`` found; ``warnings.simplefilter("error", ...)`` makes it raise."""


def guard(steps: int = 20) -> contextlib.AbstractContextManager[Findings]:
    """Watch every loss called inside the ``with`` block.

    Findings are appended to the list as they are made, once a call site and name, with
    ``where="file.py:12"``; the first error of a call site also issues a :class:`PairingWarning`.
    Values, gradients, modes and random states are as without it. What a loss raises is raised as
    before; it is a finding, with its remedy, as well.

    A mis-pairing that the graph, a shape, a dtype or a range shows is reported at once. One that
    the numbers alone show (rows that sum to 1, without a graph) counts only if every look at the
    call site shows it: from the second look on, a suspicion from the fifth; a block that ends
    earlier reports what every look so far has shown.

    An empty list says how much was looked at: ``nothing found in 40 looks at 2 losses``.
    ``@guard()`` watches each call of a function.

    Args:
        steps: look until an optimizer has made this many steps, and at no call site more often.
            Where none of ``torch.optim`` steps, twice as many calls of one site end the watch
            (an evaluation before the training does not: the first step takes it up again).

    Raises:
        ValueError: ``steps`` is not a positive whole number.

    What it does not see: losses of other threads (modes belong to a thread), losses inside
    ``torch.compile`` and TorchScript, losses first called after the last step, and losses that
    are not functions of ``torch.nn.functional`` or modules that call them. Each look reads a
    sample of at most 65,536 elements; on CUDA it waits for the device. A compiled model is
    compiled a second time when the mode leaves the stack.

    >>> import torch
    >>> from torch import nn
    >>> net, labels = nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=1)), torch.tensor([0, 2])
    >>> with warnings.catch_warnings(record=True), guard() as findings:
    ...     loss = nn.CrossEntropyLoss()(net(torch.rand(2, 4)), labels)
    >>> [(found.severity, found.name) for found in findings]
    [('error', 'softmax-into-cross-entropy')]
    """
    return _Guard(whole_number("steps", steps, 1))


class _Guard(contextlib.ContextDecorator):
    """Context manager that may be entered again, also inside itself, and a decorator."""

    def __init__(self, steps: int):
        self._steps = steps
        self._watchers: list[_Watcher] = []

    def __enter__(self) -> Findings:
        watcher = _Watcher(self._steps)
        try:
            watcher.start()
        except Exception as error:  # a private name of torch that moved
            watcher.give_up(error)
        self._watchers.append(watcher)
        return watcher.findings

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._watchers.pop().close(warn=kind is None)


@dataclass
class _Site:
    """What was seen at one call site."""

    where: str
    path: str
    line: int
    calls: int = 0
    looks: int = 0
    with_gradient: int = 0
    warned: bool = False
    counts: Counter = field(default_factory=Counter)
    pending: dict[str, Hit] = field(default_factory=dict)
    reported: set[str] = field(default_factory=set)


class _Watcher(TorchFunctionMode):
    def __init__(self, steps: int):
        super().__init__()
        self.findings = Findings()
        self.findings.scope = _NOTHING_SEEN
        self._steps = steps
        self._sites: dict[tuple[str, int, str], _Site] = {}
        self._steps_of: Counter[int] = Counter()
        self._thread = threading.get_ident()
        self._handles: list[Any] = []
        self._depth = 0
        self._looking = self._leaving = self._paused = False

    def start(self) -> None:
        """Begin to look, and count steps of optimizers."""
        _ = torch.overrides._push_mode, torch.overrides._pop_mode  # needed later: missed now
        self._handles.append(register_optimizer_step_post_hook(self._count_step))
        self._depth = len(torch.overrides._get_current_function_mode_stack())
        self._looking = True
        self.__enter__()

    def give_up(self, error: Exception) -> None:
        """Watch nothing and say so; the program runs on."""
        self._looking = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.findings.scope = f"nothing was watched: {type(error).__name__}: {error}"
        text = f"pairing.guard watches nothing with torch {torch.__version__}: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)

    def close(self, *, warn: bool) -> None:
        """Leave the stack, remove the hooks, and report what was still waiting."""
        self._stop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for site in self._sites.values():
            hits = [hit for name, hit in site.pending.items() if site.counts[name] == site.looks]
            self._report(site, hits, warn=warn)
        self._sites.clear()

    def _stop(self) -> None:
        if self._looking or self._paused:
            self._looking = self._paused = False
            _take_off(self)

    def _count_step(self, optimizer: object, args: object, kwargs: object) -> None:
        # The hook's own handle stays until close: torch iterates over the hooks right now.
        if threading.get_ident() != self._thread or not (self._looking or self._paused):
            return
        self._steps_of[id(optimizer)] += 1
        if self._paused:
            self._paused, self._looking = False, True
            _put_on(self, self._depth)
        if self._steps_of[id(optimizer)] >= self._steps:
            self._stop()

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or func not in NAME_OF:
            return func(*args, **kwargs)
        kwargs = with_forgotten(func, args, kwargs)
        if not self._looking:
            return func(*args, **kwargs)
        looked = self._see(NAME_OF[func], args, kwargs)
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            if looked is not None:
                self._see_result(*looked, error)
            raise
        if looked is not None:
            self._see_result(*looked, result)
        if self._leaving and isinstance(result, Tensor):
            weakref.finalize(result, self._leave).atexit = False
        return result

    def _see(
        self, name: str, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[_Site, LossCall, list[Hit]] | None:
        """Report what is certain before the call; return what was looked at, None for nothing."""
        looked, hits = None, []
        try:
            site = self._site(name)
            site.calls += 1
            if site.looks < self._steps:
                call = bind(name, args, kwargs)
                hits = self._look(site, call)
                looked = site, call, hits
            self._leave_early(site, args, kwargs)
        except Exception:  # the training loop is never stopped by its guard
            return None
        self._report(site, hits, warn=True)
        return looked

    def _see_result(self, site: _Site, call: LossCall, known: list[Hit], result: Any) -> None:
        """Report what the loss raised (it is raised all the same), or its nan."""
        hits: list[Hit] = []
        with contextlib.suppress(Exception), torch._C.DisableTorchFunction(), _no_dispatch_modes():
            if isinstance(result, Exception):
                hits = [] if explains(call, known) else [refused(call, result)]
            elif not _is_capturing(result):
                hits = list(not_finite(call, result, known))
        self._report(site, hits, warn=True)

    def _site(self, name: str) -> _Site:
        frame = user_frame()
        path, line = frame.f_code.co_filename, frame.f_lineno
        key = (path, line, name)
        if key not in self._sites:
            self._sites[key] = _Site(f"{shown_path(path)}:{line}", path, line)
        return self._sites[key]

    def _look(self, site: _Site, call: LossCall) -> list[Hit]:
        """Look once; return the hits that are certain by now."""
        if isinstance(call.prediction, Tensor) and _is_capturing(call.prediction):
            return []
        with torch._C.DisableTorchFunction(), _no_dispatch_modes():
            hits = [hit for hit in look(call, limit=_SAMPLE) if hit.name not in _SILENT]
        site.looks += 1
        looks = sum(other.looks for other in self._sites.values())
        seen = f"{_counted(looks, 'look')} at {_counted(len(self._sites), 'loss')}"
        self.findings.scope = f"nothing found in {seen}"
        certain = []
        for hit in hits:
            site.counts[hit.name] += 1
            if hit.evidence != "values":
                certain.append(hit)
                continue
            site.pending[hit.name] = hit
            needed = 2 if hit.severity == "error" else _LOOKS_FOR_SUSPICION
            always = site.counts[hit.name] == site.looks
            if always and site.looks >= min(needed, self._steps):
                certain.append(hit)
        return certain

    def _report(self, site: _Site, hits: list[Hit], *, warn: bool) -> None:
        fresh = [hit for hit in hits if hit.name not in site.reported]
        site.reported.update(hit.name for hit in fresh)
        found = [finding(hit, site.where) for hit in fresh]
        self.findings.extend(found)
        errors = [item for item in found if item.severity == "error"]
        if errors and warn and not site.warned:
            site.warned = True
            text = "\n".join(map(str, errors))
            warnings.warn_explicit(text, PairingWarning, site.path, site.line)

    def _leave_early(self, site: _Site, args: tuple, kwargs: dict) -> None:
        """Leave where enough was seen though no optimizer has made ``steps`` steps.

        Many calls a step: leave for good after two steps. No step at all (an evaluation, or an
        optimizer of the program's own): leave until an optimizer steps.
        """
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        site.with_gradient += torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        done = max(self._steps_of.values(), default=0)
        enough = site.with_gradient > self._steps if done >= 2 else site.calls > 2 * self._steps
        if not self._leaving and done != 1 and enough:
            # A mode cannot leave inside a function, torch puts it back. The next module call is
            # outside, and so is mostly the moment at which a loss is dropped for the next one.
            self._leaving = True
            register = nn.modules.module.register_module_forward_pre_hook
            self._handles.append(register(self._leave))

    def _leave(self, *_: object) -> None:
        mine = self._leaving and self._looking and threading.get_ident() == self._thread
        if mine and _take_off(self):
            self._looking = False
            self._paused = not self._steps_of
            self._leaving = False
            self._handles.pop().remove()


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def _put_on(mode: TorchFunctionMode, depth: int) -> None:
    """Put a mode on top of the ``depth`` lowest: modes above it are left by their own blocks."""
    above = []
    while len(torch.overrides._get_current_function_mode_stack()) > depth:
        above.append(torch.overrides._pop_mode())
    for other in (mode, *reversed(above)):
        torch.overrides._push_mode(other)


def _take_off(mode: TorchFunctionMode) -> bool:
    """Remove a mode from wherever it stands on this thread's stack; say whether it was there."""
    stack = torch.overrides._get_current_function_mode_stack()
    if not any(other is mode for other in stack):
        return False
    above = []
    while (top := torch.overrides._pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        torch.overrides._push_mode(other)
    return True


def _is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured: reading a value would spoil it."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def _no_dispatch_modes() -> Iterator[None]:
    """Hide the looks from counters, fake tensors and other dispatch modes of the program."""
    if torch._C._len_torch_dispatch_stack() == 0:
        yield
        return
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield
