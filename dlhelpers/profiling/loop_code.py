"""Which code takes the place of a loop? Its source tells, and it is run beside the loop.

Three forms are tried: what one turn computes, written on whole tensors; the same with a loss or a
last reduction taken turn by turn; and ``torch.vmap`` of the turn, which holds by definition. Code
is shown only where it gives what the turns give, on the operands that the program has.
"""

from __future__ import annotations

import ast
import copy
import string
from collections.abc import Iterator
from typing import Any

from dlhelpers.profiling.loop_source import Loop, Turn, loops_around, turn_of
from dlhelpers.profiling.loop_trial import agrees, rows_of, scope_of
from dlhelpers.profiling.sampling import Line
from dlhelpers.profiling.seen import Trial

__all__ = ["list_remedy", "loop_remedy"]

_LOSSES = {"cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss",
           "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "soft_margin_loss",
           "poisson_nll_loss", "gaussian_nll_loss", "hinge_embedding_loss"}  # fmt: skip
_IGNORE = {"cross_entropy", "nll_loss"}
# what a loss may be given where a call over the batch has the same meaning
_OPTIONS = {"beta", "delta", "label_smoothing", "log_target", "full", "eps", "margin", "log_input"}
_VIEWS = {"slice", "select", "unbind", "index", "view", "reshape", "item"}
_REDUCTIONS = {"mean", "sum", "prod", "amax", "amin", "logsumexp"}
_LONGEST = 240  # characters of code that is shown: half of a formula is none
_ADDED = "what the loop adds up, run here on its tensors"
_ROWS = "a row for each turn of the loop, run here on its tensors"


def loop_remedy(line: Line, operator: str, step: Trial = None) -> str:
    """Return code for what a loop around a line does, without the loop.

    Args:
        line: file, line and function; a file without source gives the general form.
        operator: that is called again and again, such as ``aten::sub``.
        step: of the program; it runs once, and code is shown only where one of its loops, run on
            the tensors that it had, gives the same. Without it the general form is returned.
    """
    loops = list(loops_around(line))
    turns = list(_turns(loops))
    scope = scope_of(step, line[0], loops[-1]) if turns and step is not None else None
    for turn in turns if scope is not None else ():
        wanted = rows_of(turn, scope)
        if wanted is None:
            continue
        for made, code in _forms(turn):
            shown = f"{made}; {code}" if made else code
            if len(shown) <= _LONGEST and agrees(wanted, made, code, scope):
                if turn.adds_up:
                    return f"{shown.removesuffix(code)}{_object(_parsed(code))}.sum()  # {_ADDED}"
                return f"{shown}  # {_ROWS}"
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
        for loop in loops_around(line)
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


def _turns(loops: list[Loop]) -> Iterator[Turn]:
    """Give the turn of all loops together first, then of the inner ones alone."""
    for first in range(len(loops)):
        if turn := turn_of(loops[first:]):
            yield turn


def _forms(turn: Turn) -> Iterator[tuple[str, str]]:
    """Give code for all turns, the simplest first: (what is made before it, the code)."""
    for made, whole in _operands(turn):
        node = _Whole(turn, whole).visit(copy.deepcopy(turn.value))
        if _names(node) & turn.names - _names(_parsed(made, "exec")):
            continue  # a number of the turn is left
        yield from ((made, code) for code in _on_whole_tensors(node))
        yield made, _vmapped(turn, whole)


def _operands(turn: Turn) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """Give ways to hold what all turns index: (what is made before, operand -> the whole of it)."""
    parts, count = turn.parts, len(turn.numbers)
    if all(part.names == turn.numbers or not part.names for part in parts.values()):
        whole = {}
        for key, part in parts.items():
            base = ast.unparse(part.base)
            base = base if isinstance(part.base, ast.Name | ast.Attribute) else f"({base})"
            if part.axis:
                base = f"{base}.movedim({part.axis}, 0)"
            if part.names and count > 1:
                base = f"{base}.flatten(0, {count - 1})"
            whole[key] = _parsed(base)
        yield "", whole
    if not turn.numbers or any(part.axis or not part.names for part in parts.values()):
        return
    names = ", ".join(turn.numbers)
    whole = {
        key: _parsed(f"{ast.unparse(part.base)}[{', '.join(part.names)}]")
        for key, part in parts.items()
    }
    if count == 2:
        held = ast.unparse(next(iter(parts.values())).base)
        for made in ("tril_indices({0}, {0}, -1)", "triu_indices({0}, {0}, 1)",
                     "tril_indices({0}, {0})"):  # fmt: skip
            yield f"{names} = torch.{made.format(f'len({held})')}", whole
    heads = " ".join(f"for {ast.unparse(t)} in {ast.unparse(i)}" for t, i in turn.heads)
    of_numbers = f"torch.tensor([({names}) {heads}]).T"
    if count == 1:
        of_range = ast.unparse(turn.heads[0][1])
        of_numbers = of_range.replace("range", "torch.arange", 1)
        if not of_range.startswith("range("):
            return
    yield f"{names} = {of_numbers}", whole


def _on_whole_tensors(node: ast.expr) -> Iterator[str]:
    """Give the turn's expression on whole tensors, its losses and its last reduction by turns."""
    losses = [n for n in ast.walk(node) if isinstance(n, ast.Call) and _name(n.func) in _LOSSES]
    if not losses:
        yield ast.unparse(node)
        if _is_method(node, _REDUCTIONS) and not node.args and not node.keywords:
            yield f"{_object(node.func.value)}.flatten(1).{node.func.attr}(1)"
        yield ast.unparse(_EachTurn().visit(copy.deepcopy(node)))
        return
    for call in losses:
        options = {keyword.arg for keyword in call.keywords} - {"reduction"}
        if len(call.args) != 2 or options - _OPTIONS:
            return  # a class weight, or something that reads it by its place
    forms = ["", ".flatten(1).mean(1)", ".flatten(1).sum(1)"]
    if any(_name(call.func) in _IGNORE for call in losses):
        del forms[1]  # a mean over the labels that count, of which there may be fewer next time
    for form in forms:
        yield ast.unparse(_ByTurn(form).visit(copy.deepcopy(node)))


def _vmapped(turn: Turn, whole: dict[str, ast.expr]) -> str:
    taken = _names(turn.value) | _names(*whole.values())
    free = iter([*string.ascii_lowercase, *(f"part_{n}" for n in range(99))])
    chosen: dict[str, str] = {}
    for key in whole:
        own = turn.parts[key].item
        chosen[key] = own or next(name for name in free if name not in taken)
    one = {key: ast.Name(name) for key, name in chosen.items()}
    body = _Whole(turn, one, of_one=True).visit(copy.deepcopy(turn.value))
    arguments = ", ".join(chosen.values())
    is_call = isinstance(body, ast.Call) and not body.keywords
    if is_call and [ast.unparse(argument) for argument in body.args] == [*chosen.values()]:
        function = ast.unparse(body.func)
    else:
        function = f"lambda {arguments}: {ast.unparse(body)}"
    return f"torch.vmap({function})({', '.join(map(ast.unparse, whole.values()))})"


class _Whole(ast.NodeTransformer):
    """Put the operands of all turns, or with ``of_one`` of one, where a turn takes its own."""

    def __init__(self, turn: Turn, operands: dict[str, ast.expr], *, of_one: bool = False) -> None:
        self._turn, self._operands, self._of_one = turn, operands, of_one

    def visit(self, node: ast.AST) -> ast.AST:
        found = self._turn.part_at(node)
        if found is None:
            # a sample with a batch dimension of one, of all of them, is the batch
            inner = None if self._of_one else _without_batch(node)
            if inner is not None and self._turn.part_at(inner) is not None:
                return self.visit(inner)
            return super().generic_visit(node)
        key, rest, is_slice = found
        operand = copy.deepcopy(self._operands[key])
        if self._of_one:
            index = [*([ast.Constant(None)] if is_slice else []), *map(self.visit, rest)]
        else:
            index = [*([ast.Slice()] if rest else []), *map(self.visit, rest)]
        if not index:
            return operand
        return ast.Subscript(operand, index[0] if len(index) == 1 else ast.Tuple(index))


class _ByTurn(ast.NodeTransformer):
    """Take losses without a reduction, and what is left of it turn by turn."""

    def __init__(self, form: str) -> None:
        self._form = form

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if _name(node.func) not in _LOSSES:
            return node
        kept = [keyword for keyword in node.keywords if keyword.arg != "reduction"]
        none = ast.keyword("reduction", ast.Constant("none"))
        whole = ast.Call(node.func, node.args, [*kept, none])
        return _parsed(ast.unparse(whole) + self._form)


class _EachTurn(ast.NodeTransformer):
    """Reduce turn by turn wherever a turn reduces, and choose turn by turn."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not _is_method(node, _REDUCTIONS) or node.args or node.keywords:
            return node
        of = node.func.value  # type: ignore[attr-defined]
        return _parsed(f"{_object(of)}.flatten(1).{_name(node.func)}(1)")

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        parts = (node.test, node.body, node.orelse)
        return _parsed(f"torch.where({', '.join(map(ast.unparse, parts))})")


def _without_batch(node: ast.AST) -> ast.AST | None:
    """Return ``x`` of ``x[None]`` and ``x.unsqueeze(0)``, else None."""
    if isinstance(node, ast.Subscript) and ast.unparse(node.slice) == "None":
        return node.value
    if _is_method(node, {"unsqueeze"}) and [ast.unparse(a) for a in node.args] == ["0"]:
        return node.func.value  # type: ignore[attr-defined]
    return None


def _is_method(node: ast.AST, names: set[str]) -> bool:
    called = getattr(node, "func", None)
    return isinstance(node, ast.Call) and isinstance(called, ast.Attribute) and called.attr in names


def _object(node: ast.expr) -> str:
    """Return code of which a method can be called."""
    code = ast.unparse(node)
    is_one = isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript)
    return code if is_one else f"({code})"


def _names(*nodes: ast.AST) -> set[str]:
    return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)}


def _name(node: ast.AST | None) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def _parsed(code: str, mode: str = "eval") -> Any:
    parsed = ast.parse(code, mode=mode)
    return parsed.body if mode == "eval" else parsed
