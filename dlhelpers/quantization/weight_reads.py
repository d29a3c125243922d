"""Whose weights does a forward read without calling the layer? Its source is followed from self.

``layer.weight`` counts where ``layer`` leads to a layer of the model: by attributes and keys, local
names, loops, ``getattr``, and the arguments of functions and methods that are called. A plain
object's ``weight`` is none. What has no source is not followed.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["WeightReads", "weight_reads"]

_LISTS = ("all_weights", "_flat_weights")
_WHOLE = ("parameters", "named_parameters", "state_dict", "get_parameter")
_INSIDE = ("children", "modules", "named_children", "named_modules", "values", "items")
_PASSED = ("enumerate", "filter", "iter", "list", "next", "reversed", "sorted", "tuple", "zip")
_FACTS = ("device", "dtype", "is_cuda", "requires_grad", "type")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_MOST, _DEEPEST = 2000, 40  # followed calls
_LONGEST = 1000  # a list of more is data
_ROUNDS = 3  # of assignments that follow one another


@dataclass
class WeightReads:
    """What the forwards of a model do with the parameters of layers.

    Attributes:
        read: id of a layer -> type of the module whose forward reads its weight.
        asked: ids of modules whose parameters only tell a device or a type.
    """

    read: dict[int, str] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)


def weight_reads(model: nn.Module) -> WeightReads:
    """Return which layers' weights the forwards and hooks of a model read."""
    found = WeightReads()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        follower = _Follower(found, type(module).__name__)
        for bound in follower.attribute(module, "forward"):
            follower.call(bound, [], {})
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            follower.call(hook, [[module]], {})
    return found


@dataclass(frozen=True)
class _Super:
    """What ``super()`` stands for in a method of a class."""

    owner: Any
    kind: type


@dataclass(eq=False)
class _Inner:
    """A function or lambda inside of another."""

    node: Any


class _Follower:
    """Follows one module's forward into what it calls."""

    def __init__(self, found: WeightReads, name: str) -> None:
        self.found, self.name = found, name
        self._returned: dict[Any, list[Any]] = {}
        self._depth = 0

    def attribute(self, value: Any, name: str) -> list[Any]:
        """Return what ``value.name`` may be; no code of the model is run."""
        if isinstance(value, _Super):
            kinds = type(value.owner).__mro__
            later = kinds[kinds.index(value.kind) + 1 :] if value.kind in kinds else ()
            held = next((vars(kind)[name] for kind in later if name in vars(kind)), None)
            return self._bound(value.owner, held)
        if isinstance(value, torch.jit.ScriptModule):
            return []
        if isinstance(value, ModuleType):
            return [vars(value)[name]] if name in vars(value) else []
        if isinstance(value, nn.Module) and value._modules.get(name) is not None:
            return [value._modules[name]]
        if isinstance(value, nn.Module) and name in value._parameters:
            return []
        own = getattr(value, "__dict__", {}) if not isinstance(value, type) else {}
        if name in own:
            return [own[name]]
        return self._bound(value, inspect.getattr_static(type(value), name, None))

    def _bound(self, owner: Any, held: Any) -> list[Any]:
        if isinstance(held, property):
            return self.call(MethodType(held.fget, owner), [], {}) if held.fget else []
        if isinstance(held, functools.cached_property):
            return self.call(MethodType(held.func, owner), [], {})
        if isinstance(held, staticmethod):
            return [held.__func__]
        if isinstance(held, FunctionType):
            return [MethodType(held, owner)]
        return [] if held is None else [held]

    def call(self, function: Any, given: list[list[Any]], named: dict[str, list[Any]]) -> list[Any]:
        """Follow a function with what its arguments may be; return what it may return."""
        if isinstance(function, nn.Module):  # its own forward is followed with what it is given
            if not any(given) and not any(named.values()):
                return []
            bound = self.attribute(function, "forward")
            return [one for each in bound for one in self.call(each, given, named)]
        if isinstance(function, functools.partial):
            given = [[one] for one in function.args] + given
            named = {**{k: [v] for k, v in function.keywords.items()}, **named}
            return self.call(function.func, given, named)
        if isinstance(function, MethodType):
            given, function = [[function.__self__], *given], function.__func__
        function = inspect.unwrap(function) if callable(function) else function
        if not isinstance(function, FunctionType) or _is_torch(function):
            return []
        node = _node_of(function)
        if node is None:
            return []
        env = _arguments(node.args, given, named)
        held = tuple((name, frozenset(map(_identity, values))) for name, values in env.items())
        key = function.__code__, held
        if key not in self._returned and len(self._returned) < _MOST and self._depth < _DEEPEST:
            self._returned[key] = []
            self._depth += 1
            self._returned[key] = _Body(self, function, node, env).followed()
            self._depth -= 1
        return self._returned.get(key, [])


class _Body:
    """One function's body, with what its names may stand for; the order of lines is not looked at.

    A name may stand for more than it ever does: a layer too many stays float.
    """

    def __init__(
        self, follower: _Follower, function: FunctionType, node: Any, env: dict[str, list[Any]]
    ) -> None:
        self._follower, self._function, self._node, self._env = follower, function, node, env
        self._found = follower.found
        self._first = next(iter(env), None)
        self._parents = {
            child: one for one in ast.walk(node) for child in ast.iter_child_nodes(one)
        }

    def followed(self) -> list[Any]:
        nodes = list(ast.walk(self._node))
        for _ in range(_ROUNDS):
            before = sum(map(len, self._env.values()))
            for node in nodes:
                self._assign(node)
            if sum(map(len, self._env.values())) == before:
                break
        for node in nodes:
            if isinstance(node, ast.Attribute):
                for owner in self._of(node.value):
                    self._read(owner, node.attr)
                for one in self._of(node):
                    if isinstance(one, MethodType):  # handed to another function, it may be
                        self._follower.call(one, [], {})
            elif isinstance(node, ast.Call):
                self._of(node)
        return self._returned_by(self._node)

    def _returned_by(self, node: Any) -> list[Any]:
        if isinstance(node, ast.Lambda):
            return self._of(node.body)
        ends = (ast.Return, ast.Yield, ast.YieldFrom)
        given = [n.value for n in ast.walk(node) if isinstance(n, ends) and n.value is not None]
        return _all(self._of(value) for value in given)

    def _assign(self, node: Any) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._put(target, self._of(node.value))
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            self._put(node.target, self._of(node.value))
        elif isinstance(node, (ast.For, ast.comprehension)):
            self._put(node.target, _all(map(_inside, self._of(node.iter))))
        elif isinstance(node, ast.FunctionDef) and node is not self._node:
            if node.name not in self._env:
                self._env[node.name] = [_Inner(node)]
        elif isinstance(node, ast.Call):
            self._of(node)

    def _put(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for one in target.elts:
                self._put(one, _all(map(_inside, values)))
        elif isinstance(target, ast.Starred):
            self._put(target.value, values)
        elif isinstance(target, ast.Name):
            known = self._env.setdefault(target.id, [])
            seen = set(map(_identity, known))
            known += {i: v for v in values if (i := _identity(v)) not in seen}.values()

    def _read(self, owner: Any, name: str) -> None:
        if isinstance(owner, nn.Module) and (name in owner._parameters or name in _LISTS):
            self._found.read.setdefault(id(owner), self._follower.name)

    def _of(self, node: Any) -> list[Any]:
        """Return the objects that an expression may be, of those that lead to layers."""
        if isinstance(node, ast.Name):
            return self._env[node.id] if node.id in self._env else self._outside(node.id)
        if isinstance(node, ast.Attribute):
            return _all(self._follower.attribute(v, node.attr) for v in self._of(node.value))
        if isinstance(node, ast.Subscript):
            return _all(_item(value, node.slice) for value in self._of(node.value))
        if isinstance(node, ast.Call):
            return self._called(node)
        if isinstance(node, ast.Lambda):
            return [_Inner(node)]
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return _all(map(self._of, node.elts))
        if isinstance(node, ast.Dict):
            return _all(map(self._of, node.values))
        if isinstance(node, ast.BoolOp):
            return _all(map(self._of, node.values))
        if isinstance(node, ast.IfExp):
            return [*self._of(node.body), *self._of(node.orelse)]
        if isinstance(node, (ast.NamedExpr, ast.Starred, ast.Await)):
            return self._of(node.value)
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp)):
            return self._of(node.elt)
        if isinstance(node, ast.DictComp):
            return self._of(node.value)
        return []

    def _outside(self, name: str) -> list[Any]:
        """Return what a name is in the closure or among the globals."""
        function = self._function
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for free, cell in cells:
            if free == name:
                try:
                    return [cell.cell_contents]
                except ValueError:  # still empty
                    return []
        return [function.__globals__[name]] if name in function.__globals__ else []

    def _called(self, node: ast.Call) -> list[Any]:
        given = [self._of(argument) for argument in node.args]
        named = {word.arg: self._of(word.value) for word in node.keywords if word.arg}
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        self._hand_over(given)
        if name in vars(builtins) and not self._of(node.func):
            return self._built_in(name, node, given)
        if isinstance(node.func, ast.Attribute):
            owners, name = self._of(node.func.value), node.func.attr
            if name in _WHOLE:
                self._whole(node, owners)
                return []
            if name in _INSIDE:
                return _all(map(_inside, owners))
            if name == "get_submodule":
                return _all(_submodules(owner, node.args) for owner in owners)
        return _all(self._run(function, given, named) for function in self._of(node.func))

    def _run(self, function: Any, given: list[list[Any]], named: dict[str, list[Any]]) -> list[Any]:
        if not isinstance(function, _Inner):
            return self._follower.call(function, given, named)
        for key, values in _arguments(function.node.args, given, named).items():
            self._put(ast.Name(key), values)
        return self._returned_by(function.node)

    def _hand_over(self, given: list[list[Any]]) -> None:
        """Follow functions among arguments, as of map or reduce, with what the others contain."""
        for place, values in enumerate(given):
            for function in values:
                if isinstance(function, (_Inner, FunctionType, MethodType)):
                    others = _all(map(_inside, _all(given[:place] + given[place + 1 :])))
                    self._run(function, [others] * 4 if others else [], {})

    def _built_in(self, name: str, node: ast.Call, given: list[list[Any]]) -> list[Any]:
        if name == "super":
            kind = next((v for v in self._outside("__class__") if isinstance(v, type)), None)
            owners = self._env.get(self._first or "", [])
            return [] if kind is None else [_Super(owner, kind) for owner in owners]
        if name == "getattr" and len(node.args) > 1:
            key = node.args[1]
            if not isinstance(key, ast.Constant):
                return _all(map(_inside, given[0]))
            for owner in given[0]:
                self._read(owner, key.value)
            return _all(self._follower.attribute(owner, key.value) for owner in given[0])
        return _all(map(_inside, _all(given))) if name in _PASSED else []

    def _whole(self, node: ast.Call, owners: list[Any]) -> None:
        """Note that the parameters of modules are read, all of them or what they tell."""
        only_facts = self._asks_facts(node)
        for owner in owners:
            if isinstance(owner, nn.Module):
                if only_facts:
                    self._found.asked.add(id(owner))
                    continue
                for module in owner.modules():
                    self._found.read.setdefault(id(module), self._follower.name)

    def _asks_facts(self, node: Any, seen: frozenset[str] = frozenset()) -> bool:
        """Whether nothing but the device or type of parameters is looked at."""
        parent = self._parents.get(node)
        if isinstance(parent, ast.Call) and getattr(parent.func, "id", "") in ("next", "iter"):
            return self._asks_facts(parent, seen)
        if isinstance(parent, ast.Attribute):
            return parent.attr in _FACTS
        if isinstance(parent, ast.Assign):
            targets = parent.targets
        elif isinstance(parent, (ast.For, ast.comprehension)):
            targets = [parent.target]
        else:
            return False
        names = [t.elts[-1] if isinstance(t, ast.Tuple) else t for t in targets]
        return all(isinstance(n, ast.Name) and self._tells_facts(n.id, seen) for n in names)

    def _tells_facts(self, name: str, seen: frozenset[str]) -> bool:
        uses = [n for n in self._parents if isinstance(n, ast.Name) and n.id == name]
        loads = [n for n in uses if isinstance(n.ctx, ast.Load)]
        return name in seen or all(self._asks_facts(n, seen | {name}) for n in loads)


def _all(lists: Iterable[list[Any]]) -> list[Any]:
    return [one for each in lists for one in each]


def _identity(value: Any) -> Any:
    """Return what is equal for the same object; bound methods and the like are made anew."""
    if isinstance(value, MethodType):
        return id(value.__func__), id(value.__self__)
    if isinstance(value, _Super):
        return id(value.owner), id(value.kind)
    return id(value.node if isinstance(value, _Inner) else value)


def _is_torch(function: FunctionType) -> bool:
    if function.__code__.co_filename.startswith("<eval_with_key>"):  # torch.fx writes it
        return False
    return (getattr(function, "__module__", None) or "").partition(".")[0] == "torch"


@functools.lru_cache(maxsize=512)
def _node_of(function: FunctionType) -> Any:
    """Return a function's definition; None where it has no source: typed in, or made."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    node = body[0] if body and isinstance(body[0], ast.FunctionDef) else None
    # a file that was edited since has another function there
    return node if node is not None and node.name == function.__code__.co_name else None


def _arguments(
    args: ast.arguments, given: list[list[Any]], named: dict[str, list[Any]]
) -> dict[str, list[Any]]:
    places = [one.arg for one in (*args.posonlyargs, *args.args)]
    env: dict[str, list[Any]] = {name: [] for name in places}
    for name, values in zip(places, given, strict=False):
        env[name] = list(values)
    if args.vararg:
        env[args.vararg.arg] = _all(given[len(places) :])
    known = {*places, *(one.arg for one in args.kwonlyargs)}
    env.update({name: list(values) for name, values in named.items() if name in known})
    return env


def _inside(value: Any) -> list[Any]:
    """Return an object and what it contains."""
    if isinstance(value, nn.Module):
        return [*value.modules()]
    if isinstance(value, (Mapping, list, tuple)) and len(value) <= _LONGEST:
        return [value, *(value.values() if isinstance(value, Mapping) else value)]
    return [value]


def _item(value: Any, key: Any) -> list[Any]:
    """Return what an index or a key may give."""
    index = key.value if isinstance(key, ast.Constant) else None
    if index is not None and isinstance(value, (*_CONTAINERS, list, tuple, dict)):
        try:
            return [value[index]]
        except (KeyError, IndexError, TypeError):
            return []
    if isinstance(value, _CONTAINERS):
        return [*value.children()]
    return _inside(value)


def _submodules(owner: Any, path: list[Any]) -> list[Any]:
    if not isinstance(owner, nn.Module):
        return []
    if path and isinstance(path[0], ast.Constant):
        return [m for name, m in owner.named_modules() if name == path[0].value]
    return [*owner.modules()]
