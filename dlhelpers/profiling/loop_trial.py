"""Does code compute what a loop of the program computes? Both are run on the loop's own tensors.

The step runs once, and what the names of the loop stand for is noted where the loop begins. Only
what changes nothing is evaluated: torch's functions, methods of tensors without an underscore at
the end, torch's own losses, and numbers.
"""

from __future__ import annotations

import ast
import builtins
import copy
import itertools
import sys
import warnings
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dlhelpers.profiling.loop_source import Loop, Turn
from dlhelpers.profiling.seen import Trial

__all__ = ["Scope", "agrees", "rows_of", "scope_of"]

Scope = dict[str, Any]  # name -> what it stands for

_CLOSE = 1e-4  # of the largest value: sums in another order differ
_MOST_TURNS = 4096
_MOST_VALUES = 2**26  # of a tensor that holds what all turns take
_NUMBERS = {"range", "len", "zip", "enumerate", "slice", "min", "max", "int", "float", "abs"}
_PAIRS = (itertools.combinations, itertools.permutations, itertools.product)
_DRAWS = ("rand", "dropout", "bernoulli", "multinomial", "normal", "poisson", "gumbel", "rrelu")
_CHANGES = ("set_", "manual_", "seed", "save", "load", "backward")
_HOLDS = (Tensor, list, tuple, dict, range, str, int, float, slice, type(None))


def scope_of(step: Trial, file: str, loop: Loop) -> Scope | None:
    """Run a step and return what names stand for in a loop; None where it was not come to."""
    seen = _Look(file, loop.lineno, loop.end_lineno or loop.lineno)
    try:
        with seen:
            step()  # type: ignore[misc]
    except Exception:  # of a loader that ends, or tensors that cannot be looked at
        return None
    return seen.found


def rows_of(turn: Turn, scope: Scope) -> Tensor | None:
    """Return what the turns of a loop compute, stacked; None where that is not evaluated."""
    heads = [ast.comprehension(target, of, [], 0) for target, of in turn.heads]
    loop = ast.ListComp(copy.deepcopy(turn.value), heads)
    try:
        if not _is_harmless(loop, scope, _names_bound(loop)):
            return None
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = eval(compile(ast.unparse(loop), "<loop>", "eval"), _own(scope))
            if not 2 <= len(rows) <= _MOST_TURNS:
                return None
            used = {n.id for n in ast.walk(loop) if isinstance(n, ast.Name)}
            tensors = (v for name in used if isinstance(v := scope.get(name), Tensor) and v.dim())
            if any(len(rows) * (t.numel() // max(1, len(t))) > _MOST_VALUES for t in tensors):
                return None
            return torch.stack([torch.as_tensor(row) for row in rows])
    except Exception:  # names that are not known yet, tensors that differ in size
        return None


def agrees(wanted: Tensor, made: str, code: str, scope: Scope) -> bool:
    """Whether code, after what is made for it, gives the rows of all turns."""
    try:
        before = ast.parse(made)
        if not _is_harmless(ast.parse(code), scope, _names_bound(before, ast.parse(code))):
            return False
        own = _own(scope)
        with torch.no_grad(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            exec(compile(before, "<remedy>", "exec"), own)
            given = eval(compile(code, "<remedy>", "eval"), own)
        if any("performance drop" in str(each.message) for each in told):
            return False  # torch.vmap goes through them one by one as well
        return _are_close(given, wanted)
    except Exception:  # of shapes, or functions that torch.vmap has no rule for
        return False


def _own(scope: Scope) -> Scope:
    return {"torch": torch, **scope, "__builtins__": builtins}


def _are_close(given: Any, wanted: Tensor) -> bool:
    if not isinstance(given, Tensor) or (given.shape, given.dtype) != (wanted.shape, wanted.dtype):
        return False
    if not wanted.is_floating_point():
        return torch.equal(given, wanted)
    bound = _CLOSE * wanted.abs().max().clamp(min=1e-30)
    return bool(((given - wanted).abs() <= bound).all())  # not of nan


class _Look(TorchDispatchMode):
    """Notes the names of a loop at its first operator."""

    def __init__(self, file: str, first: int, last: int) -> None:
        super().__init__()
        self.found: Scope | None = None
        self._file, self._first, self._last = file, first, last

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.found is None:
            with suppress(Exception):
                self._look(sys._getframe(1))
        return func(*args, **(kwargs or {}))

    def _look(self, frame: FrameType | None) -> None:
        while frame is not None:
            if (
                frame.f_code.co_filename == self._file
                and self._first <= frame.f_lineno <= self._last
            ):
                self.found = {**frame.f_globals, **frame.f_locals}
                outer = frame.f_back
                if outer is not None and frame.f_code.co_name in ("<genexpr>", "<listcomp>"):
                    self.found = {**frame.f_globals, **outer.f_locals, **frame.f_locals}
                return
            frame = frame.f_back


def _names_bound(*nodes: ast.AST) -> set[str]:
    """Return names that the code itself binds: of comprehensions, lambdas and assignments."""
    found = set()
    for node in nodes:
        for n in ast.walk(node):
            if isinstance(n, ast.arg):
                found.add(n.arg)
            elif isinstance(n, ast.comprehension | ast.Assign):
                targets = n.targets if isinstance(n, ast.Assign) else [n.target]
                found |= {
                    m.id for each in targets for m in ast.walk(each) if isinstance(m, ast.Name)
                }
    return found


def _is_harmless(node: ast.AST, scope: Scope, bound: set[str]) -> bool:
    """Whether evaluating an expression changes nothing that the program has."""
    iterated = {id(n.iter) for n in ast.walk(node) if isinstance(n, ast.comprehension)}
    for n in ast.walk(node):
        if isinstance(n, ast.Call):
            if not _may_be_called(n.func, scope, bound):
                return False
            given = [*n.args, *(keyword.value for keyword in n.keywords)]
            in_place = any(isinstance(v, ast.Constant) and v.value is True for v in given)
            if in_place or any(keyword.arg in ("out", "inplace") for keyword in n.keywords):
                return False
            if getattr(n.func, "id", "") in ("zip", "enumerate"):
                iterated |= set(map(id, n.args))
    for n in ast.walk(node):  # a loader, a data set, or an iterator that is used up
        held = n.value if isinstance(n, ast.Subscript) else n if id(n) in iterated else None
        if held is not None and not _has_calls(held):
            value = _resolved(held, scope, bound)
            if value is not None and not isinstance(value, _HOLDS):
                return False
    return True


def _may_be_called(func: ast.expr, scope: Scope, bound: set[str]) -> bool:
    called = ast.unparse(func)
    if called.startswith("torch.vmap") and scope.get("torch", torch) is torch:
        return isinstance(func, ast.Call) or called == "torch.vmap"
    name = getattr(func, "attr", getattr(func, "id", ""))
    if name.endswith("_") or name.startswith(_CHANGES) or any(word in name for word in _DRAWS):
        return False
    if isinstance(func, ast.Name) and name in _NUMBERS and name not in scope:
        return True
    value = _resolved(func, scope, bound)
    if value is None:  # a method of what the turn computes, whose own calls are looked at
        root = func
        while isinstance(root, ast.Attribute | ast.Subscript):
            root = root.value
        if isinstance(root, ast.Name) and root.id not in bound:
            inner = scope.get(root.id)
            if not isinstance(inner, _HOLDS) and not isinstance(func.value, ast.Subscript):
                return False
        return isinstance(func, ast.Attribute) and hasattr(Tensor, name)
    if value in _PAIRS:
        return True
    if isinstance(value, nn.modules.loss._Loss):
        return type(value).__module__.startswith("torch.") and not value._forward_hooks
    if isinstance(getattr(value, "__self__", None), Tensor):
        return hasattr(Tensor, name)
    home = getattr(value, "__module__", None) or type(value).__module__
    return home.split(".")[0] == "torch" and not isinstance(value, nn.Module | type)


def _resolved(func: ast.expr, scope: Scope, bound: set[str]) -> Any:
    """Return what a dotted name stands for; None for the method of another expression."""
    if isinstance(func, ast.Name):
        return None if func.id in bound else scope.get(func.id)
    if isinstance(func, ast.Attribute) and not _has_calls(func.value):
        owner = _resolved(func.value, scope, bound)
        return None if owner is None else getattr(owner, func.attr, None)
    return None


def _has_calls(node: ast.expr) -> bool:
    return any(isinstance(n, ast.Call | ast.Subscript) for n in ast.walk(node))
