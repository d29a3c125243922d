"""Which code takes the place of a loop? Its source tells, where there is one."""

from __future__ import annotations

import ast
import linecache
import re
from collections.abc import Iterator

from dlhelpers.profiling.sampling import Line

__all__ = ["list_remedy", "loop_remedy"]

_LOSSES = {"cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss",
           "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div",
           "poisson_nll_loss", "gaussian_nll_loss"}  # fmt: skip
_VIEWS = {"slice", "select", "unbind", "index", "view", "reshape", "item"}
_PAIRS = {"combinations", "product", "permutations"}
_LONGEST = 160  # characters of code that is shown

Loop = ast.For | ast.ListComp | ast.GeneratorExp | ast.SetComp


def loop_remedy(line: Line, operator: str) -> str:
    """Return code for what a loop around a line does, without the loop.

    Args:
        line: file, line and function; a file without source gives the general form.
        operator: that is called again and again, such as ``aten::sub``.
    """
    loops = list(_loops_around(line))
    if loops:
        for form in (_pairs, _loss, _whole):
            if found := form(loops):
                return found
    called = operator.partition("::")[2] or operator
    called = "" if called in _VIEWS else called
    return (
        f"one torch.{called} on a tensor that holds all of them, made by torch.stack outside the "
        "loop; or torch.vmap(turn)(all), with one turn of the loop as a function"
        if called
        else "torch.vmap(turn)(all), with one turn of the loop as a function"
    )


def list_remedy(line: Line) -> str:
    """Return code for a loop over tensors that differ in size, which no one tensor holds."""
    goes_through = " ".join(
        ast.unparse(part.iter)
        for loop in _loops_around(line)
        for part in ([loop] if isinstance(loop, ast.For) else loop.generators)
    )
    if "parameters" in goes_through or "param_groups" in goes_through:
        return (
            "torch._foreach_mul_, torch._foreach_add_, torch._foreach_lerp_ or torch._foreach_norm "
            "on the list of parameters; for their average swa_utils.AveragedModel"
        )
    return (
        "torch._foreach_add, torch._foreach_mul and so on, on lists of the tensors; or pad them to "
        "one tensor, with a mask"
    )


def _pairs(loops: list[Loop]) -> str:
    """Two numbers that index the same tensor: all pairs at once."""
    names = [name for loop in loops for name in _targets(loop)]
    for node in _expressions(loops):
        if not isinstance(node, ast.BinOp | ast.Call) or not _computes(node):
            continue
        rows = [n for n in ast.walk(node) if isinstance(n, ast.Subscript)]
        by_name = {n.slice.id: n for n in rows if isinstance(n.slice, ast.Name)}
        pair = [name for name in names if name in by_name]
        if len(pair) < 2 or ast.dump(by_name[pair[0]].value) != ast.dump(by_name[pair[1]].value):
            continue
        i, j = pair[:2]
        if not any(_is_numbers(loop) for loop in loops):
            continue
        held = ast.unparse(by_name[i].value)
        offset = ", -1" if _is_triangle(loops, i, j) else ""
        made = (
            f"torch.tril_indices(len({held}), len({held}){offset})"
            if offset
            else f"torch.cartesian_prod(*[torch.arange(len({held}))] * 2).T"
        )
        if any(_called(loop) in ("combinations", "permutations") for loop in loops):
            made = f"torch.triu_indices(len({held}), len({held}), 1)"
        code = _short(ast.unparse(node))
        return f"{i}, {j} = {made}; {code} is then one tensor with a row for each pair"
    return ""


def _loss(loops: list[Loop]) -> str:
    """A loss for each sample: one call over the batch."""
    names = {name for loop in loops for name in _targets(loop)}
    for node in _expressions(loops):
        if not isinstance(node, ast.Call) or not _is_loss(_name(node.func)):
            continue
        whole = _without_index(node, names, loops)
        if whole is None:
            continue
        has_reduction = any(keyword.arg == "reduction" for keyword in whole.keywords)
        if _name(node.func) in _LOSSES and not has_reduction:
            whole.keywords.append(ast.keyword("reduction", ast.Constant("sum")))
        return f"{_short(ast.unparse(whole))}  # one call over the batch"
    return ""


def _whole(loops: list[Loop]) -> str:
    """A tensor that is gone through: the same on all of it."""
    loop = loops[-1]
    iterable = loop.iter if isinstance(loop, ast.For) else loop.generators[0].iter
    names = set(_targets(loop))
    for node in _expressions(loops[-1:]):
        if isinstance(node, ast.BinOp | ast.Call) and _uses(node, names) and _computes(node):
            of = _gone_through(iterable)
            code = _short(ast.unparse(node))
            if _called(loop) == "range":
                return (
                    f"{code} on whole tensors, without {' and '.join(_targets(loop))}; or "
                    "torch.vmap over what it indexes"
                )
            return (
                f"{code} once, on all of {_short(of)} as one tensor (dim= and keepdim=True keep "
                "its rows apart), or torch.vmap"
            )
    return ""


# reading the source


def _loops_around(line: Line) -> Iterator[Loop]:
    """Give the loops of a file that enclose a line, the outermost first; of one function."""
    file, number, _ = line
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return
    path = []
    scope: ast.AST = tree
    for node in ast.walk(tree):
        start, end = getattr(node, "lineno", 0), getattr(node, "end_lineno", 0) or 0
        if not start <= number <= end:
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            scope = node
        elif isinstance(node, Loop):
            path.append(node)
    inside = set(map(id, ast.walk(scope)))
    yield from (node for node in path if id(node) in inside)


def _targets(loop: Loop) -> list[str]:
    parts = [loop] if isinstance(loop, ast.For) else loop.generators
    return [n.id for part in parts for n in ast.walk(part.target) if isinstance(n, ast.Name)]


def _expressions(loops: list[Loop]) -> Iterator[ast.expr]:
    """Give what the innermost loop computes, whole expressions before their parts."""
    loop = loops[-1]
    body = loop.body if isinstance(loop, ast.For) else [loop.elt]
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.expr):
                yield node


def _called(loop: Loop) -> str:
    iterable = loop.iter if isinstance(loop, ast.For) else loop.generators[0].iter
    return _name(iterable.func) if isinstance(iterable, ast.Call) else ""


def _is_numbers(loop: Loop) -> bool:
    return _called(loop) in ({"range"} | _PAIRS)


def _is_triangle(loops: list[Loop], i: str, j: str) -> bool:
    """Whether the inner loop goes up to, or on from, the number of the outer one."""
    parts = [
        part
        for loop in loops
        for part in ([loop] if isinstance(loop, ast.For) else loop.generators)
    ]
    return any(
        isinstance(part.iter, ast.Call)
        and any(
            isinstance(n, ast.Name) and n.id in (i, j)
            for argument in part.iter.args
            for n in ast.walk(argument)
        )
        for part in parts
    )


def _without_index(node: ast.Call, names: set[str], loops: list[Loop]) -> ast.Call | None:
    """Return a call with ``x[i]`` and ``x[i:i + 1]`` made ``x``, and items of zip their tensors."""
    zipped = _zipped(loops)
    indexed = False

    class Whole(ast.NodeTransformer):
        def visit_Subscript(self, part: ast.Subscript) -> ast.AST:
            nonlocal indexed
            first = part.slice.elts[0] if isinstance(part.slice, ast.Tuple) else part.slice
            if isinstance(first, ast.Name | ast.Slice) and _uses(first, names):
                indexed = True
                return part.value
            return self.generic_visit(part)

        def visit_Call(self, part: ast.Call) -> ast.AST:
            of = getattr(part.func, "value", None)
            if _name(part.func) in ("unsqueeze", "view") and _name(of) in zipped:
                return self.visit(of)
            return self.generic_visit(part)

        def visit_Name(self, part: ast.Name) -> ast.AST:
            nonlocal indexed
            if part.id in zipped:
                indexed = True
                return zipped[part.id]
            return part

    copied = ast.parse(ast.unparse(node), mode="eval").body
    for part in ast.walk(copied):  # z[None] of one sample is z of all
        if isinstance(part, ast.Call):
            part.args = [_without_none(argument, names) for argument in part.args]
    found = Whole().visit(copied)
    if not isinstance(found, ast.Call) or not indexed:
        return None
    left = names - {n.id for value in zipped.values() for n in ast.walk(value) if
                    isinstance(n, ast.Name)}  # fmt: skip
    return None if _uses(found, left) else found


def _without_none(node: ast.expr, names: set[str]) -> ast.expr:
    is_row = isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
    if is_row and node.slice.value is None and _uses(node.value, names):
        return node.value
    return node


def _is_loss(name: str) -> bool:
    return name in _LOSSES or bool(re.search("loss|criterion|crit$|entropy", name, re.I))


def _gone_through(iterable: ast.expr) -> str:
    """Return what a loop goes through: without enumerate, and each part of a zip."""
    if isinstance(iterable, ast.Call) and _name(iterable.func) in ("enumerate", "zip", "list"):
        return " and ".join(_gone_through(argument) for argument in iterable.args[:3])
    return ast.unparse(iterable)


def _zipped(loops: list[Loop]) -> dict[str, ast.expr]:
    """Return name -> what it is an item of, for ``for a, b in zip(x, y)`` and ``for a in x``."""
    found: dict[str, ast.expr] = {}
    for loop in loops:
        for part in [loop] if isinstance(loop, ast.For) else loop.generators:
            of, target = part.iter, part.target
            is_counted = isinstance(of, ast.Call) and _name(of.func) == "enumerate"
            if is_counted and isinstance(target, ast.Tuple):
                of, target = of.args[0], target.elts[1]
            if isinstance(of, ast.Call) and _name(of.func) == "zip":
                if isinstance(target, ast.Tuple):
                    for name, value in zip(target.elts, of.args, strict=False):
                        if isinstance(name, ast.Name):
                            found[name.id] = value
            elif isinstance(target, ast.Name) and not isinstance(of, ast.Call):
                found[target.id] = of
    return found


def _uses(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node))


def _computes(node: ast.AST) -> bool:
    """Whether it does more than append, count or take apart."""
    if isinstance(node, ast.Call):
        return _name(node.func) not in ("append", "extend", "range", "len", "int", "zip", "print")
    return True


def _name(node: ast.AST | None) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def _short(code: str) -> str:
    code = " ".join(code.split())
    return code if len(code) <= _LONGEST else code[: _LONGEST - 3] + "..."
