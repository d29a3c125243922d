"""What does one turn of a loop compute, from which parts of which tensors? Its source tells."""

from __future__ import annotations

import ast
import copy
import linecache
from collections.abc import Iterator
from dataclasses import dataclass, field

from dlhelpers.profiling.sampling import Line

__all__ = ["Loop", "Part", "Turn", "loops_around", "turn_of"]

Loop = ast.For | ast.ListComp | ast.GeneratorExp | ast.SetComp

# what lets a turn do something else than the last one, or nothing
_BRANCHES = (ast.If, ast.While, ast.Try, ast.With, ast.Break, ast.Continue, ast.Return, ast.Yield,
             ast.YieldFrom, ast.Await, ast.NamedExpr, ast.Lambda, ast.Starred)  # fmt: skip
_TAKES_OUT = {"item", "detach"}  # methods after which the value is the same


@dataclass(frozen=True)
class Part:
    """What a turn takes of one tensor.

    Attributes:
        base: the tensor.
        names: numbers of the loops that index it, in order; none where it is an item.
        axis: that they index.
        item: name of the item that a loop goes through, else "".
    """

    base: ast.expr
    names: tuple[str, ...] = ()
    axis: int = 0
    item: str = ""


@dataclass
class Turn:
    """One turn of one loop, or of several within each other.

    Attributes:
        value: what it computes, with the names that it assigns on the way replaced.
        heads: target and iterable of each loop, the outermost first.
        numbers: targets that are numbers.
        items: target -> the tensor that it is an item of.
        adds_up: whether the turns are added to a sum that begins before the loop.
        parts: what the turn takes of which tensors.
    """

    value: ast.expr
    heads: list[tuple[ast.expr, ast.expr]]
    numbers: tuple[str, ...]
    items: dict[str, ast.expr]
    adds_up: bool
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Names that are another thing in each turn."""
        return {*self.numbers, *self.items}

    def part_at(self, node: ast.AST) -> tuple[str, list[ast.expr], bool] | None:
        """Return the key of what a node takes of a tensor, further indices, and whether a slice.

        None for a node that takes none.
        """
        if isinstance(node, ast.Name) and node.id in self.items:
            self.parts.setdefault(node.id, Part(self.items[node.id], item=node.id))
            return node.id, [], False
        if not isinstance(node, ast.Subscript):
            return None
        base, index = _flat(node)
        if {n.id for n in ast.walk(base) if isinstance(n, ast.Name)} & self.names:
            return None
        names, axis, is_slice = [], 0, False
        if len(index) > 1 and isinstance(index[-1], ast.Name) and index[-1].id in self.numbers:
            before = [ast.unparse(each) for each in index[:-1]]
            if before == ["..."]:
                return self._part(base, [index[-1].id], -1), [], False
            if set(before) == {":"}:
                return self._part(base, [index[-1].id], len(before)), [], False
        while index and (name := self._number(index[0])):
            is_slice = isinstance(index[0], ast.Slice)
            names.append(name)
            index = index[1:]
            if is_slice:
                break
        if not names or (is_slice and len(names) > 1):
            return None
        return self._part(base, names, axis), index, is_slice

    def _part(self, base: ast.expr, names: list[str], axis: int) -> str:
        key = f"{ast.dump(base)} {names} {axis}"
        self.parts.setdefault(key, Part(base, tuple(names), axis))
        return key

    def _number(self, node: ast.expr) -> str:
        """Return i of ``i`` and of ``i:i + 1``, where it is a number of a loop."""
        if isinstance(node, ast.Slice) and isinstance(node.lower, ast.Name) and node.step is None:
            name = node.lower.id
            ends = ast.unparse(node.upper) if node.upper else ""
            return name if name in self.numbers and ends in (f"{name} + 1", f"1 + {name}") else ""
        return node.id if isinstance(node, ast.Name) and node.id in self.numbers else ""


def loops_around(line: Line) -> Iterator[Loop]:
    """Give the loops of a file that enclose a line, the outermost first; of one function."""
    file, number, _ = line
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return
    path, summed = [], set()
    scope: ast.AST = tree
    for node in ast.walk(tree):
        start, end = getattr(node, "lineno", 0), getattr(node, "end_lineno", 0) or 0
        if not start <= number <= end:
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            scope = node
        elif isinstance(node, Loop):
            path.append(node)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "sum":
            summed.update(map(id, node.args[:1]))
    inside = set(map(id, ast.walk(scope)))
    for node in path:
        node.is_summed = id(node) in summed  # type: ignore[attr-defined]
        if id(node) in inside:
            yield node


def turn_of(loops: list[Loop]) -> Turn | None:
    """Return what one turn of these loops computes; None where that is no single expression."""
    heads: list[tuple[ast.expr, ast.expr]] = []
    assigned: dict[str, ast.expr] = {}
    found: list[tuple[ast.expr, bool]] = []
    for loop, inner in zip(loops, [*loops[1:], None], strict=True):
        if isinstance(loop, ast.For):
            heads.append((loop.target, loop.iter))
            if not _read_body(loop, inner, assigned, found):
                return None
        else:
            if any(part.ifs or part.is_async for part in loop.generators):
                return None
            heads += [(part.target, part.iter) for part in loop.generators]
            if inner is not None and not (_is_sum_of(loop.elt, inner) and _is_summed(loop)):
                return None  # a factor, or a sum for each turn of the outer one
            if inner is None:
                found.append((loop.elt, _is_summed(loop)))
    if len(found) != 1:
        return None
    value, adds_up = found[0]
    for _ in range(len(assigned) + 1):
        value = _Inlined(assigned).visit(copy.deepcopy(value))
    if any(isinstance(n, _BRANCHES) for n in ast.walk(value)):
        return None
    numbers: list[str] = []
    items: dict[str, ast.expr] = {}
    for target, iterable in heads:
        if not _take_apart(target, iterable, numbers, items):
            return None
    turn = Turn(_bare(value), heads, tuple(numbers), items, adds_up)
    for node in ast.walk(turn.value):
        turn.part_at(node)
    # x[i] is part of x[i][k], so what is indexed further is looked at as a whole first
    outer: dict[str, Part] = {}
    _collect(turn, turn.value, outer)
    turn.parts = outer
    used = {n.id for n in ast.walk(turn.value) if isinstance(n, ast.Name)}
    return turn if outer and used & turn.names else None


def _collect(turn: Turn, node: ast.AST, into: dict[str, Part]) -> None:
    at = turn.part_at(node)
    if at is None:
        for child in ast.iter_child_nodes(node):
            _collect(turn, child, into)
        return
    into[at[0]] = turn.parts[at[0]]
    for index in at[1]:
        _collect(turn, index, into)


def _read_body(
    loop: ast.For,
    inner: Loop | None,
    assigned: dict[str, ast.expr],
    found: list[tuple[ast.expr, bool]],
) -> bool:
    """Read the statements of a loop; False where they are no single computation."""
    for statement in loop.body:
        if inner is not None and any(node is inner for node in ast.walk(statement)):
            if statement is inner or _is_sum_of(_added_by(statement), inner):
                continue
            return False
        if any(isinstance(n, (*_BRANCHES, ast.For)) for n in ast.walk(statement)):
            return False
        if isinstance(statement, ast.AugAssign):
            value, op = statement.value, statement.op
            value = ast.UnaryOp(ast.USub(), value) if isinstance(op, ast.Sub) else value
            found.append((value, isinstance(op, ast.Add | ast.Sub)))
        elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, value = statement.targets[0], statement.value
            if not isinstance(target, ast.Name):
                if isinstance(target, ast.Subscript):
                    found.append((value, False))
                    continue
                return False
            if added := _added(target.id, value):
                found.append((added, True))
            elif target.id in assigned or _uses(value, target.id):
                return False
            else:
                assigned[target.id] = value
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            call = statement.value
            if getattr(call.func, "attr", "") != "append" or len(call.args) != 1:
                return False
            found.append((call.args[0], False))
        elif not isinstance(statement, ast.Pass):
            return False
    return not loop.orelse


def _added_by(statement: ast.stmt) -> ast.expr | None:
    """Return x of ``name += x`` and ``name = name + x``."""
    if isinstance(statement, ast.AugAssign):
        return statement.value if isinstance(statement.op, ast.Add) else None
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return _added(statement.targets[0].id, statement.value)
    return None


def _is_sum_of(node: ast.expr | None, inner: Loop) -> bool:
    return _is_summed(inner) and isinstance(node, ast.Call) and node.args[:1] == [inner]


def _is_summed(loop: Loop) -> bool:
    return getattr(loop, "is_summed", False)


def _added(name: str, value: ast.expr) -> ast.expr | None:
    """Return x of ``name + x`` and ``x + name``, -x of ``name - x``."""
    is_less = isinstance(value, ast.BinOp) and isinstance(value.op, ast.Sub)
    if is_less and isinstance(value.left, ast.Name) and value.left.id == name:
        return None if _uses(value.right, name) else ast.UnaryOp(ast.USub(), value.right)
    if not isinstance(value, ast.BinOp) or not isinstance(value.op, ast.Add):
        return None
    for one, other in ((value.left, value.right), (value.right, value.left)):
        if isinstance(one, ast.Name) and one.id == name and not _uses(other, name):
            return other
    if _uses(value.right, name):
        return None
    inner = _added(name, value.left)  # name + x + y
    return ast.BinOp(inner, ast.Add(), value.right) if inner else None


def _take_apart(
    target: ast.expr, of: ast.expr, numbers: list[str], items: dict[str, ast.expr]
) -> bool:
    """Note what the targets of a loop are: numbers, or items of tensors; False if neither."""
    called = (
        getattr(of.func, "id", getattr(of.func, "attr", "")) if isinstance(of, ast.Call) else ""
    )
    if called == "range" or (called in ("combinations", "permutations", "product")):
        for name in target.elts if isinstance(target, ast.Tuple) else [target]:
            if not isinstance(name, ast.Name):
                return False
            numbers.append(name.id)
        return True
    if called == "enumerate" and isinstance(target, ast.Tuple) and len(of.args) == 1:
        if isinstance(target.elts[0], ast.Name) and len(target.elts) == 2:
            numbers.append(target.elts[0].id)
            return _take_apart(target.elts[1], of.args[0], numbers, items)
        return False
    if called == "zip" and isinstance(target, ast.Tuple) and len(of.args) == len(target.elts):
        pairs = zip(target.elts, of.args, strict=True)
        return all(_take_apart(each, whole, numbers, items) for each, whole in pairs)
    if not isinstance(target, ast.Name):
        return False
    items[target.id] = of
    return True


class _Inlined(ast.NodeTransformer):
    def __init__(self, assigned: dict[str, ast.expr]) -> None:
        self._assigned = assigned

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return copy.deepcopy(self._assigned.get(node.id, node))


def _bare(value: ast.expr) -> ast.expr:
    """Return a value without ``.item()`` or ``float()`` around it."""
    while isinstance(value, ast.Call):
        if isinstance(value.func, ast.Attribute) and value.func.attr in _TAKES_OUT:
            value = value.func.value
        elif getattr(value.func, "id", "") == "float" and len(value.args) == 1:
            value = value.args[0]
        else:
            break
    return value


def _flat(node: ast.expr) -> tuple[ast.expr, list[ast.expr]]:
    """Return ``x`` and ``[i, j, k]`` of ``x[i][j, k]``."""
    if not isinstance(node, ast.Subscript):
        return node, []
    base, before = _flat(node.value)
    if any(isinstance(each, ast.Slice | ast.Constant) for each in before):
        return node.value, _elements(node.slice)  # what follows a slice is no index of x
    return base, [*before, *_elements(node.slice)]


def _elements(node: ast.expr) -> list[ast.expr]:
    return list(node.elts) if isinstance(node, ast.Tuple) else [node]


def _uses(node: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))
