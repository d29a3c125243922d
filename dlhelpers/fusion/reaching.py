"""What inside a module does a forward call that torch.fx cannot follow?

Its source is read instead, every branch of it. ``self.body(x)`` calls a child as a whole, whose own
trace then tells the rest; ``for layer in self.body`` calls what is inside of it, and whatever is
given to a function, kept or returned may be called anywhere. Names stand for all modules that are
ever put into them: the answer may hold too many modules, but none is missing.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dlhelpers.fusion.modules import NOTHING, Modules, changed_in, given_by, held_by, is_torchs
from dlhelpers.fusion.tracing import SHAPE_ATTRIBUTES, is_layer

__all__ = ["Reach", "reached_by"]

_CHILDREN = {"children", "named_children", "values", "items", "_modules"}
_INSIDE = {"modules", "named_modules", "get_submodule", "__dict__"}
_ITSELF = {"to", "train", "eval", "float", "double", "half", "cuda", "cpu", "requires_grad_"}
_ANYTHING = {"apply", "__getattr__", "__call__", "_call_impl", "_wrapped_call_impl"}
_ASKS = {"len", "isinstance", "hasattr", "type", "id", "print", "str", "repr", "bool", "callable"}
_GIVES_ALL = {"enumerate", "zip", "reversed", "list", "tuple", "iter", "sorted", "dict", "set"}
_GIVES_ALL |= {"filter", "next", "islice", "chain", "cycle", "zip_longest"}
_PAIRS = {"zip": "zipped", "zip_longest": "zipped"}
_PAIRS |= dict.fromkeys(("enumerate", "items", "named_children", "named_modules"), "keyed")


@dataclass
class Reach:
    """What a forward does with modules: it calls them, may do anything, or reads their tensors."""

    called: set[nn.Module] = field(default_factory=set)
    unknown: set[nn.Module] = field(default_factory=set)
    read: set[nn.Module] = field(default_factory=set)


def reached_by(module: nn.Module) -> Reach:
    """Read a module's forward, and all methods that it leads to."""
    reader = _Reader(Reach(), [], set())
    reader.queue(module, vars(module).get("forward", type(module).forward))
    while reader.todo:
        owner, function = reader.todo.pop()
        try:
            reader.read(owner, function)
        except (OSError, TypeError, ValueError, SyntaxError, StopIteration):  # there is no source
            reader.escapes(Modules(frozenset({owner})))
    reader.reach.unknown.discard(module)
    return reader.reach


@dataclass
class _Reader:
    reach: Reach
    todo: list[tuple[nn.Module, Callable[..., Any]]]
    seen: set[tuple[int, Any]]
    owner: nn.Module = field(default_factory=nn.Module)
    names: dict[str, Modules] = field(default_factory=dict)
    outer: dict[str, Any] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()  # attributes that a forward assigns
    known: dict[ast.AST, Modules] = field(default_factory=dict)  # in this pass

    def queue(self, owner: nn.Module, function: Any) -> None:
        """Have a method of a module's read, once."""
        function = getattr(function, "__func__", function)
        if isinstance(function, types.FunctionType):
            function = inspect.unwrap(function)
        if (id(owner), function) not in self.seen:
            self.seen.add((id(owner), function))
            self.todo.append((owner, function))

    def read(self, owner: nn.Module, function: Any) -> None:
        """Read one method until no name holds more modules than before."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        definition = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
        arguments = [*definition.args.posonlyargs, *definition.args.args]
        self.changed = changed_in(type(owner))
        self.owner, self.outer = owner, dict(inspect.getclosurevars(function).nonlocals)
        self.outer.update(
            (name, value)
            for name, value in function.__globals__.items()
            if isinstance(value, nn.Module)
        )
        self.names = {arguments[0].arg: Modules(frozenset({owner}))} if arguments else {}
        before: dict[str, Modules] = {}
        while before != self.names:
            before = dict(self.names)
            self.known.clear()
            for statement in definition.body:
                self.run(statement)

    def escapes(self, value: Modules) -> None:
        """Note modules that may be called anywhere from now on."""
        for module in value.direct | value.inside:
            self.reach.unknown.update(module.modules())

    def calls(self, value: Modules) -> None:
        """Note modules that are called as a whole."""
        self.reach.called |= value.direct | value.inside

    # ---- statements ----

    def run(self, node: ast.AST) -> None:
        """Follow a statement and all that are inside of it."""
        if isinstance(node, ast.Assign):
            value = self.of(node.value)
            for target in node.targets:
                self.bind(target, node.value, value)
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            value = self.of(node.value) if node.value is not None else NOTHING
            self.bind(node.target, node.value, value)
        elif isinstance(node, ast.For):
            self.bind_elements(node.target, self.of(node.iter))
            self.run_all((*node.body, *node.orelse))
        elif isinstance(node, ast.If) and (taken := self.truth(node.test)) is not None:
            self.run_all(node.body if taken else node.orelse)
        elif isinstance(node, ast.Return):
            self.escapes(self.of(node.value))
        elif isinstance(node, ast.withitem):
            value = self.of(node.context_expr)
            if node.optional_vars is not None:
                self.bind(node.optional_vars, node.context_expr, value)
        elif isinstance(node, ast.Match):
            self.escapes(self.of(node.subject))
            self.run_all(node.cases)
        elif isinstance(node, ast.expr):
            self.of(node)
        else:
            self.run_all(ast.iter_child_nodes(node))

    def run_all(self, nodes: Iterable[ast.AST]) -> None:
        """Follow statements."""
        for node in nodes:
            self.run(node)

    def bind(self, target: ast.expr, source: ast.expr | None, value: Modules) -> None:
        """Put a value into a name; what is put elsewhere escapes."""
        if isinstance(target, ast.Name):
            self.names[target.id] = self.names.get(target.id, NOTHING) | value
        elif isinstance(target, ast.Tuple | ast.List):
            if isinstance(source, ast.Tuple | ast.List) and len(source.elts) == len(target.elts):
                for one, its in zip(target.elts, source.elts, strict=True):
                    self.bind(one, its, self.of(its))
            else:
                for one in target.elts:
                    self.bind(one, None, value.each)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, None, value)
        else:
            self.escapes(value)

    def bind_elements(self, target: ast.expr, value: Modules) -> None:
        """Put what iterating over a value gives into the names of a loop."""
        if not isinstance(target, ast.Tuple | ast.List) or not value.pairs:
            self.bind(target, None, value.each)
            return
        is_keyed = value.pairs == "keyed" and len(target.elts) == 2
        for one in target.elts[is_keyed:]:
            self.bind(one, None, Modules(value.inside, value.inside))

    def truth(self, node: ast.expr) -> bool | None:
        """Say whether a test is true by what the model is set to; None where a call may differ."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.truth(node.operand)
            return None if inner is None else not inner
        if isinstance(node, ast.BoolOp):
            parts, decides = [self.truth(one) for one in node.values], isinstance(node.op, ast.Or)
            return decides if decides in parts else None if None in parts else not decides
        if isinstance(node, ast.Call) and _name(node.func) in ("is_scripting", "is_tracing"):
            return False
        is_none = isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot)
        if is_none and ast.unparse(node.comparators[0]) == "None":
            found, value = self.setting(node.left)
            wanted = isinstance(node.ops[0], ast.Is)
            return (value is None) == wanted if found else None
        found, value = self.setting(node)
        return value if found and isinstance(value, bool) else None

    def setting(self, node: ast.expr) -> tuple[bool, Any]:
        """Return whether a node is an attribute that no forward changes, and its value."""
        if not isinstance(node, ast.Attribute) or node.attr in self.changed:
            return False, None
        whose = self.of(node.value).direct
        if whose != {self.owner} or not isinstance(node.value, ast.Name):
            return False, None
        held = {**vars(self.owner), **self.owner._modules}
        return node.attr in held, held.get(node.attr)

    # ---- expressions ----

    def of(self, node: ast.AST | None) -> Modules:
        """Return the modules that an expression may stand for; note those that it calls."""
        if node is None:
            return NOTHING
        if node not in self.known:
            self.known[node] = self.found(node)
        return self.known[node]

    def found(self, node: ast.AST) -> Modules:
        """Return the same, of what was not met before."""
        if isinstance(node, ast.Name):
            outer = self.outer.get(node.id)
            held = held_by(outer) if node.id not in self.names else NOTHING
            return self.names.get(node.id, held)
        if isinstance(node, ast.Attribute):
            return self.attribute(node)
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.Subscript):
            return self.element(node)
        if isinstance(node, ast.IfExp) and (taken := self.truth(node.test)) is not None:
            return self.of(node.body if taken else node.orelse)
        if isinstance(node, ast.IfExp):
            self.of(node.test)
            return self.of(node.body) | self.of(node.orelse)
        if isinstance(node, ast.BoolOp):
            return functools.reduce(Modules.__or__, map(self.of, node.values))
        if isinstance(node, ast.BinOp):  # of lists
            return Modules(inside=self.of(node.left).inside | self.of(node.right).inside)
        if isinstance(node, ast.NamedExpr):
            value = self.of(node.value)
            self.bind(node.target, node.value, value)
            return value
        if isinstance(node, ast.Starred):
            return Modules(inside=self.of(node.value).elements)
        if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
            parts = node.values if isinstance(node, ast.Dict) else node.elts
            both = functools.reduce(Modules.__or__, map(self.of, parts), NOTHING)
            return Modules(inside=both.direct | both.inside)
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            for part in node.generators:
                self.bind_elements(part.target, self.of(part.iter))
                self.run_all(part.ifs)
            made = self.of(node.value if isinstance(node, ast.DictComp) else node.elt)
            return Modules(inside=made.direct | made.inside)
        if isinstance(node, ast.Lambda | ast.Yield | ast.YieldFrom | ast.Await):
            self.escapes(self.of(node.body if isinstance(node, ast.Lambda) else node.value))
            return NOTHING
        self.run_all(ast.iter_child_nodes(node))  # of comparisons, strings and the like
        return NOTHING

    def element(self, node: ast.Subscript) -> Modules:
        """Return what an index or a slice gives."""
        base, index = self.of(node.value), node.slice
        self.of(index)
        if isinstance(index, ast.Slice):
            return Modules(inside=base.elements)
        try:
            where = ast.literal_eval(index)
            if not base.inside:
                return Modules(frozenset({module[where] for module in base.direct}))
        except Exception:  # it is computed, or the module takes no such index
            pass
        return base.each

    def attribute(self, node: ast.Attribute) -> Modules:
        """Return what an attribute holds; methods are read."""
        is_super = isinstance(node.value, ast.Call) and _name(node.value.func) == "super"
        if is_super:
            for base in type(self.owner).__mro__[1:]:
                self.method(self.owner, vars(base).get(node.attr))
            return NOTHING
        if node.attr in SHAPE_ATTRIBUTES and isinstance(node.value, ast.Attribute):
            whose = self.of(node.value.value)
            if whose.direct and all(map(is_layer, whose.direct)):  # which keep their tensors
                return NOTHING
        base = self.of(node.value)
        if not base.direct:
            return base
        found = NOTHING
        for module in base.direct:
            found |= self.resolved(module, node.attr)
        return found | Modules(inside=base.inside)

    def resolved(self, module: nn.Module, name: str) -> Modules:
        """Return what a module's attribute holds."""
        if name in module._modules:
            return held_by(module._modules[name])
        if name in module._parameters or name in module._buffers:
            self.reach.read.add(module)
            return NOTHING
        if name in _CHILDREN:
            return Modules(inside=given_by(module, name), pairs=_PAIRS.get(name, ""))
        if name in _INSIDE:
            inside = frozenset(module.modules()) - {module}
            return Modules(inside=inside, pairs=_PAIRS.get(name, ""))
        if name in vars(module):
            value = vars(module)[name]
            if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
                self.method(value.__self__, value.__func__)
            elif isinstance(value, types.FunctionType):
                for held in inspect.getclosurevars(value).nonlocals.values():
                    self.escapes(held_by(held))
            elif isinstance(value, functools.partial):
                self.escapes(held_by((*value.args, *value.keywords.values(), value.func)))
            return held_by(value)
        method = inspect.getattr_static(type(module), name, None)
        if isinstance(method, property):
            self.method(module, method.fget)
            try:
                return held_by(getattr(module, name))
            except Exception:  # the forward would raise, too
                return NOTHING
        self.method(module, method)
        if name in _ANYTHING:
            self.escapes(Modules(frozenset({module})))
        if is_torchs(method, "container") and name not in ("forward", "__len__", "keys"):
            return Modules(given_by(module, name), given_by(module, name))
        return NOTHING

    def method(self, module: nn.Module, function: Any) -> None:
        """Have a method read; torch's own call no children by other ways."""
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType):
            return
        if not is_torchs(function):
            self.queue(module, function)
            if module is not self.owner:  # nothing else can stand in its place
                self.reach.unknown.add(module)

    def call(self, node: ast.Call) -> Modules:
        """Return what a call gives, and note which modules it calls."""
        name, function = _name(node.func), node.func
        given = [self.of(one) for one in node.args]
        given += [self.of(keyword.value) for keyword in node.keywords]
        if isinstance(function, ast.Attribute):
            base = self.of(function.value)
            if base.direct and name in _ITSELF:
                return base
            if base.direct and name == "forward":
                self.calls(base)
                return NOTHING
            if (base.direct and name in _CHILDREN | _INSIDE) or (base.inside and not base.direct):
                for value in given:
                    self.escapes(value)
                found = self.of(function)
                is_one = name in ("get_submodule", "get", "pop", "popleft", "__getitem__")
                return Modules(found.inside, found.inside) if is_one else found
        elif isinstance(function, ast.Name) and function.id not in self.names:
            if name == "super":
                return Modules(frozenset({self.owner}))
            if name == "getattr" and given:
                return self.looked_up(node, given[0])
            if name in _ASKS:
                return NOTHING
        if name in _GIVES_ALL:
            every = frozenset().union(*(value.elements for value in given))
            return Modules(every if name == "next" else frozenset(), every, _PAIRS.get(name, ""))
        called = self.of(function)
        if name in ("checkpoint_seq", "checkpoint_sequential") and given:
            called, given = Modules(given[0].elements), given[1:]
        if name == "checkpoint" and given:
            called, given = called | given[0], given[1:]
        self.calls(called)
        for value in given:
            self.escapes(value)
        return NOTHING

    def looked_up(self, node: ast.Call, base: Modules) -> Modules:
        """Return what getattr gives: of a name that is computed, any child."""
        name = node.args[1] if len(node.args) > 1 else None
        found = NOTHING
        for module in base.direct:
            if isinstance(name, ast.Constant):
                found |= self.resolved(module, str(name.value))
            else:
                found |= Modules(frozenset(module.children()))
                for value in vars(module).values():
                    found |= held_by(value) if not isinstance(value, dict) else NOTHING
        return found


def _name(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))
