"""What does a call of a module change that later calls read?

Attributes, what containers and objects in them hold, and buffers. What no forward reads, such as
a count of calls, decides nothing.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dlhelpers.reached import is_foreign

__all__ = ["Asks", "State", "as_it_was", "is_same_state", "names_read", "set_state"]

State = dict[tuple[nn.Module, str], Any]
"""(Module, attribute or buffer) -> value that a call has left there."""

_DEEPEST = 5
_OF_EVERY_MODULE = {*vars(nn.Module())} - {"training"}
_WRITES = {
    *("append", "appendleft", "extend", "insert", "add", "update", "clear", "pop", "popleft"),
    *("add_", "sub_", "mul_", "copy_", "fill_", "zero_", "lerp_"),
}


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[State]:
    """Take off hooks and checks, which want no proxies; undo what a forward did to the model.

    What is given holds afterwards what the forward changed.
    """
    left: State = {}
    memo: dict[int, Any] = {}
    spaces = [
        (m, {k: (v, _kept(v, memo)) for k, v in vars(m).items()}, dict(m._buffers))
        for m in model.modules()
    ]
    buffers = [(b, b.clone(), b._version) for b in model.buffers()]
    changed = {id(b): (value, version) for b, value, version in buffers}
    for module, _, _ in spaces:
        for key in ("_forward_hooks", "_forward_pre_hooks"):
            vars(module)[key].clear()
        if hasattr(module, "_check_input_dim"):
            for key in ("_check_input_dim", "_check_non_zero_input_channels"):
                vars(module)[key] = lambda x: None
    try:
        yield left
    finally:
        for module, space, owned in spaces:
            for key, new in module._buffers.items():
                old = owned.get(key)
                if new is not old:
                    left[module, key] = new
                elif old is not None and id(old) in changed:
                    value, version = changed[id(old)]
                    if old._version != version and not _is_same(value, old):
                        left[module, key] = old.clone()
            state = {k: kept if k in _OF_EVERY_MODULE else v for k, (v, kept) in space.items()}
            for key, value in vars(module).items():
                if key.startswith("_tensor_constant"):  # the graph's
                    state.setdefault(key, value)
                elif key in _OF_EVERY_MODULE or key.startswith("_check_"):
                    continue
                elif key not in space:
                    left[module, key] = value
                elif not _is_same(space[key][1], value):
                    left[module, key] = value
                    state[key] = space[key][1]
            vars(module).clear()
            vars(module).update(state)
        for buffer, value, version in buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)


class Asks(TorchDispatchMode):
    """Whether Python asked for a number of a tensor that has data, as ``if`` and ``int()`` do."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what gives a number, and call it."""
        aten = torch.ops.aten
        self.asked |= func in (aten._local_scalar_dense.default, aten.equal.default)
        return func(*args, **(kwargs or {}))


def set_state(state: State) -> None:
    """Put a module in the state that a call has left; a proxy's stand-in is a zero."""
    for (owner, name), value in state.items():
        made = _kept(value, {}, stand_in=True)
        if name in owner._buffers:
            owner._buffers[name] = made.clone() if isinstance(made, Tensor) else made
        else:
            vars(owner)[name] = made


def is_same_state(one: State, other: State) -> bool:
    """Whether two states hold the same; of tensors that are traced none is told from another."""
    return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)


def _kept(value: Any, memo: dict[int, Any], depth: int = 0, stand_in: bool = False) -> Any:
    """Return a copy of what a forward may change; what has no copy is itself."""
    if isinstance(value, fx.Proxy):
        return torch.zeros(()) if stand_in else value
    if id(value) in memo:
        return memo[id(value)][1]
    if depth > _DEEPEST or callable(value) or isinstance(value, (nn.Module, Tensor)):
        return value
    inner = functools.partial(_kept, memo=memo, depth=depth + 1, stand_in=stand_in)
    made = value
    try:
        if isinstance(value, dict):
            made = copy.copy(value)
            for key, one in value.items():
                made[key] = inner(one)
        elif isinstance(value, (list, deque)):
            made = copy.copy(value)
            for place, one in enumerate(value):
                made[place] = inner(one)
        elif type(value) is tuple:
            made = tuple(map(inner, value))
        elif isinstance(value, set):
            made = copy.copy(value)
        elif _has_attributes(value):
            made = copy.copy(value)
            for key, one in vars(value).items():
                vars(made)[key] = inner(one)
        elif _is_iterator(value) or hasattr(value, "tobytes"):
            made = copy.copy(value)
    except Exception:  # whatever an object's own copying does
        made = value
    memo[id(value)] = value, made
    return made


def _has_attributes(value: Any) -> bool:
    return hasattr(value, "__dict__") and not is_foreign(type(value))


def _is_iterator(value: Any) -> bool:
    return isinstance(value, Iterator) and type(value).__module__ in ("itertools", "builtins")


def _is_same(one: Any, other: Any, depth: int = 0) -> bool:
    if one is other or depth > _DEEPEST:
        return True
    if type(one) is not type(other):
        return isinstance(one, fx.Proxy) and isinstance(other, fx.Proxy)
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (fx.Proxy, nn.Module)):
        return isinstance(one, fx.Proxy)
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(
            _is_same(a, b, depth + 1) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            key in other and _is_same(value, other[key], depth + 1) for key, value in one.items()
        )
    if _has_attributes(one):
        return _is_same(vars(one), vars(other), depth + 1)
    try:
        if _is_iterator(one):
            return [*islice(copy.copy(one), 4)] == [*islice(copy.copy(other), 4)]
        if hasattr(one, "tobytes"):  # an array
            return one.tobytes() == other.tobytes()
        return bool(one == other) or bool(one != one and other != other)
    except Exception:  # what compares nothing
        return False


def names_read(model: nn.Module) -> set[str] | None:
    """Return names of attributes that a forward may read; None where there is no source."""
    classes = {cls for m in model.modules() for cls in type(m).__mro__}
    functions: dict[str, set[str]] = {}  # name of a method -> names that it reads
    for cls in classes:
        if (cls.__module__ or "").partition(".")[0] in ("torch", "builtins", "typing", "abc"):
            continue
        found = _methods_of(cls)
        if found is None:
            return None
        for name, read in found:
            functions.setdefault(name, set()).update(read)
    names: set[str] = set()
    waiting = ["forward", "__call__"]
    while waiting:
        new = functions.pop(waiting.pop(), set()) - names
        names |= new
        waiting += new
    return names


@functools.lru_cache(maxsize=1024)
def _methods_of(cls: type) -> tuple[tuple[str, frozenset[str]], ...] | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return None
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return tuple(
        (node.name, frozenset(_read_in(node))) for node in ast.walk(tree) if isinstance(node, kinds)
    )


def _read_in(function: ast.AST) -> Iterable[str]:
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(function):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value  # of getattr()
        elif isinstance(node, ast.Attribute) and not _is_written(node, parents):
            yield node.attr


def _is_written(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether an attribute is only set, or changed by what it was."""
    parent = parents.get(node)
    if isinstance(node.ctx, (ast.Store, ast.Del)):
        return True
    if isinstance(parent, (ast.Attribute, ast.Subscript)) and parent.value is node:
        if isinstance(parent.ctx, (ast.Store, ast.Del)):
            return True
        call = parents.get(parent)
        if isinstance(call, ast.Call) and call.func is parent and parent.attr in _WRITES:
            return isinstance(parents.get(call), ast.Expr)
    while parent is not None and not isinstance(parent, ast.stmt):
        if isinstance(parent, (ast.IfExp, ast.Call)):
            return False
        parent = parents.get(parent)
    targets = parent.targets if isinstance(parent, ast.Assign) else []
    return bool(targets) and all(
        ast.dump(t).replace("Store()", "Load()") == ast.dump(node) for t in targets
    )
