"""What of a step could be done at once?

Each operator is a node, which needs those that made its inputs. What can be done
at once follows from the longest chain:

    at once = nodes / nodes on the longest chain

Sums and their kin are chains that need not be: where ``total = total + x`` only hands its result
to the next such operator, that link does not count. ``total + 1 - x`` is such a sum as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from torch import Tensor, nn

from dlhelpers.profiling.sampling import Line
from dlhelpers.profiling.turns import OperatorCall

__all__ = [
    "CellCall",
    "Dataflow",
    "LoopLine",
    "Node",
    "levels",
    "longest",
    "loop_calls",
    "loop_lines",
    "operators_at_once",
]

_LEAST_TURNS = 8  # of a line that is a loop's

_LINKS = {"add", "sub", "sum", "mul", "div", "maximum", "minimum", "logaddexp", "cat",
          "logical_or", "logical_and", "bitwise_or", "bitwise_and"}  # fmt: skip
_KIN = {"sub": "add", "rsub": "add", "div": "mul"}  # what one sum, or one product, is made of


@dataclass(frozen=True)
class CellCall:
    """A call of ``nn.LSTMCell``, ``nn.GRUCell`` or ``nn.RNNCell``.

    Attributes:
        cell: which.
        input: of the step, detached, [N, features] or [features].
        state: that was given; a tensor, a pair of them, or None.
        needs_cell: whether the input needs what an earlier call of the same cell made.
        follows: whether the state is what the call before it returned, untouched.
        line: of the program, that calls it.
    """

    cell: nn.RNNCellBase
    input: Tensor
    state: Any
    needs_cell: bool
    follows: bool
    line: Line


@dataclass(frozen=True)
class LoopLine:
    """A line of the program that calls an operator again and again outside models.

    Attributes:
        count: operators that it calls.
        at_once: turns that need none of the others.
        uneven: whether the tensors of its turns differ in size, so that no one tensor holds them.
    """

    count: int
    at_once: int
    uneven: bool


@dataclass(frozen=True)
class Dataflow:
    """What of a step could be done at once.

    Attributes:
        operators_at_once: operators outside models and backward, per operator on the longest chain.
        elements: of the tensor that such an operator makes; the median.
        device: on which most of them are.
        longest_reads: numbers taken out of tensors each of which needs the one before; the most.
        loops: line -> what it calls again and again.
        calls_at_once: (id of a module, its mode) -> how many of its calls need none of each other.
        lines: of the program, that call them, by the same key.
        cells: calls of recurrent cells, in order.
        turns: operators of loops outside models, with the forms of what they are given.
        is_lost: whether the step could not be followed.
    """

    operators_at_once: float
    calls_at_once: dict[tuple[int, bool], float] = field(default_factory=dict)
    lines: dict[tuple[int, bool], Line] = field(default_factory=dict)
    cells: tuple[CellCall, ...] = ()
    elements: int = 0
    device: str = "cpu"
    longest_reads: int = 0
    loops: dict[Line, LoopLine] = field(default_factory=dict)
    is_lost: bool = False
    turns: tuple[OperatorCall, ...] = ()


@dataclass
class Node:
    """One operator, or a number that was read, or a tensor that came in.

    Attributes:
        name: of the operator, without its namespace.
        needs: numbers of the nodes that made what it reads.
        counts: whether it is outside models, backward, optimizers and loaders.
        calls: numbers of the calls of modules that it is part of.
        backward: whether it runs in backward.
        made: elements of what it made or wrote to, and the device.
        line: of the program, that calls it; of those that count.
        given: number of the operator and the forms that it is given, among those of the step.
    """

    name: str
    needs: set[int]
    counts: bool
    calls: tuple[int, ...]
    backward: bool = False
    made: tuple[int, str] = (0, "cpu")
    line: Line = ("", 0, "")
    given: int | None = None


def levels(nodes: Sequence[Node], mine: Iterable[int]) -> tuple[dict[int, int], list[int]]:
    """Return call -> its place in the longest chain of these calls, from 1; each node's as well."""
    calls = dict.fromkeys(mine, 1)
    found: list[int] = []
    for node in nodes:
        call = next((n for n in node.calls if n in calls), None)
        before = max(
            (
                _level(found[n], nodes[n], calls)
                for n in node.needs
                if call is None or call not in nodes[n].calls
            ),
            default=0,
        )
        if call is not None:
            calls[call] = max(calls[call], before + 1)
            before = calls[call]
        found.append(before)
    return calls, [_level(level, node, calls) for level, node in zip(found, nodes, strict=True)]


def operators_at_once(nodes: Sequence[Node]) -> float:
    """Return how many nodes that count there are per node on the longest chain of them."""
    depths: list[int] = []
    for node, before in zip(nodes, _needed(nodes), strict=True):
        depths.append(max((depths[n] for n in before), default=0) + node.counts)
    whole = sum(node.counts for node in nodes)
    return whole / max(1, max(depths, default=1))


def loop_lines(nodes: Sequence[Node]) -> dict[Line, LoopLine]:
    """Return the lines that call an operator again and again, and how many turns need no other.

    A turn needs another one where its operator needs one of the same name at the same line.
    """
    by_line: dict[Line, dict[str, list[int]]] = {}
    for number, node in enumerate(nodes):
        if node.counts and node.line[0]:
            by_line.setdefault(node.line, {}).setdefault(node.name, []).append(number)
    needed, found = _needed(nodes), {}
    for line, by_name in by_line.items():
        most = max(map(len, by_name.values()))
        if most < _LEAST_TURNS:
            continue
        often = [mine for mine in by_name.values() if 2 * len(mine) >= most]
        counts = [len(mine) for mine in by_name.values() if len(mine) >= _LEAST_TURNS]
        turns = max(gcd(*counts), min(counts) if gcd(*counts) < _LEAST_TURNS else 0)
        sizes = [[nodes[number].made[0] for number in mine] for mine in often]
        found[line] = LoopLine(
            sum(map(len, by_name.values())),
            min(_free_of_each_other(nodes, needed, mine) for mine in often),
            any(not _comes_again(each, len(each) // turns) for each in sizes),
        )
    return found


def _comes_again(sizes: Sequence[int], most: int) -> bool:
    """Whether what is made comes again after ``most`` operators, or after fewer."""
    return any(
        all(a == b for a, b in zip(sizes, sizes[period:], strict=False))
        for period in range(1, most + 1)
    )


def loop_calls(nodes: Sequence[Node]) -> Counter[int]:
    """Return how often a loop's operators are called on what: ``given`` of nodes -> calls."""
    often = Counter((node.line, node.name) for node in nodes if node.counts)
    return Counter(
        node.given
        for node in nodes
        if node.given is not None and often[node.line, node.name] >= _LEAST_TURNS
    )


def _free_of_each_other(
    nodes: Sequence[Node], needed: Sequence[list[int]], mine: Sequence[int]
) -> int:
    """Return how many of some nodes need none of the others; a link hands on what came before."""
    which, after = set(mine), [False] * len(nodes)
    for number, node in enumerate(nodes):
        counted = any(n in which for n in needed[number])
        after[number] = counted or any(after[n] for n in node.needs)
    return sum(not after[number] for number in mine)


def longest(nodes: Sequence[Node], of: Callable[[Node], bool]) -> int:
    """Return how many nodes of a kind are on the longest chain of them."""
    depths: list[int] = []
    for node in nodes:
        depths.append(max((depths[n] for n in node.needs), default=0) + of(node))
    return max(depths, default=0)


def _needed(nodes: Sequence[Node]) -> list[list[int]]:
    """Return what each node needs, but for links of sums and their kin."""
    readers: dict[int, list[int]] = {}
    for number, node in enumerate(nodes):
        for needed in () if node.backward else node.needs:
            readers.setdefault(needed, []).append(number)
    return [[n for n in node.needs if not _is_link(nodes, n, node, readers)] for node in nodes]


def _is_link(nodes: Sequence[Node], needed: int, node: Node, readers: dict[int, list[int]]) -> bool:
    """Whether a result is only handed on by a sum, a product, a maximum or the like."""
    kind = _kin(node)
    if _kin(nodes[needed]) != kind or kind not in _LINKS:
        return False
    kinds = {_kin(nodes[reader]) for reader in readers.get(needed, ())}
    return kinds <= {kind, "stack", "cat"}


def _kin(node: Node) -> str:
    name = node.name.rstrip("_")
    return _KIN.get(name, name)


def _level(level: int, node: Node, calls: dict[int, int]) -> int:
    return max([level, *(calls[n] for n in node.calls if n in calls)])
