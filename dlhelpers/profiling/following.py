"""Which operators of a step need what others made? A step is run once more and watched for it.

An operator needs those that last wrote the bytes that it reads. Python carries values as well: a
tensor that comes from outside after a number was taken out of another one, as an environment's
answer to an action, or an operator that is given that number, is taken to need it; only what a
DataLoader gives is not. So a chain may be seen where there is none, and its loop not reported.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from statistics import median, mode
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data.dataloader import _BaseDataLoaderIter

from dlhelpers.fakes import dense_parts
from dlhelpers.patching import patched
from dlhelpers.profiling.dataflow import (
    CellCall,
    Dataflow,
    Node,
    levels,
    longest,
    loop_calls,
    loop_lines,
    operators_at_once,
)
from dlhelpers.profiling.operands import extent, written_by
from dlhelpers.profiling.program_lines import is_own
from dlhelpers.profiling.sampling import Line
from dlhelpers.profiling.turns import OperatorCall, form_of
from dlhelpers.profiling.watching import living
from dlhelpers.trees import tensors_in

__all__ = ["cells_that_need", "follow"]

_OPERANDS = {"index", "start", "end", "value", "fill_value", "other", "s", "exponent", "min", "max"}
_MOST_WRITES = 1024  # of one tensor's bytes that are told apart
_MOST_NODES = 200_000


def follow(step: Callable[[], Any]) -> Dataflow:
    """Run a step once and return its dataflow.

    Of a step that cannot be followed, because it has more than 200,000 operators or tensors of an
    unusual kind, as sparse and nested ones, nothing is taken to be possible at once. Nothing is
    raised but what the step raises.
    """
    graph = _Graph()
    with graph.watching():
        step()
    return graph.result()


def cells_that_need(
    step: Callable[[], Any], known: set[int], steps: int, seconds: float
) -> set[int]:
    """Run up to some more steps and return the ids of cells whose inputs need their outputs.

    It ends where all of those that are known do, or where the seconds are over; one step is run.
    Only forward passes are looked at, so it costs a fraction of :func:`follow`.
    """
    graph, found = _Graph(cells_only=True), set()
    ends = perf_counter() + seconds
    with graph.watching():
        for _ in range(steps):
            graph.begin_anew()
            step()
            if graph.lost:
                return known
            found |= graph.cells_that_need()
            if known <= found or perf_counter() > ends:
                break
    return found


class _Graph(TorchDispatchMode):
    def __init__(self, *, cells_only: bool = False) -> None:
        super().__init__()
        self._cells_only = cells_only
        self.begin_anew()
        self.lost = False
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._open: list[int] = []  # calls that are under way
        self._aside = 0  # optimizers and loaders
        self._loading = 0
        self._norms: set[int] = set()  # storages of running statistics

    def begin_anew(self) -> None:
        """Forget the step before; what it made is known, and nothing made it."""
        self.nodes: list[Node] = []
        self.calls: list[tuple[tuple[int, bool], Line]] = []
        self.cells: list[tuple[int, nn.RNNCellBase, Tensor, Any, set[int], bool, Line]] = []
        self._writes: dict[int, list[tuple[int, int, frozenset[int]]]] = {}
        self._read: int | None = None  # the node that last took numbers out
        self._numbers: tuple[float, ...] = ()
        self._by_number: list[tuple[int, int]] = []  # (given a number, where that was read)
        self._last_state: dict[int, tuple[int, ...]] = {}
        self._kept: list[Any] = []
        self._given: dict[Any, tuple[int, tuple[Any, Any, Any]]] = {}  # what operators are given

    # what stands in the way of the step

    @contextmanager
    def watching(self) -> Iterator[None]:
        for tensor in living(Tensor):
            with suppress(Exception):  # some have no storage, or ask other objects
                tensor.untyped_storage()
                self._know(tensor)
        me, thread = self, threading.get_ident()

        def called(call: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return me._called(call, module, args, kwargs)

        def given(give: Any, loader: Any) -> Any:
            me._aside, me._loading = me._aside + 1, me._loading + 1
            try:
                batch = give(loader)
                with me._noting():
                    for tensor in tensors_in(batch):
                        me._know(tensor)
                return batch
            finally:
                me._aside, me._loading = me._aside - 1, me._loading - 1

        def enter(*_: Any) -> None:
            me._aside += threading.get_ident() == thread

        def leave(*_: Any) -> None:
            me._aside -= threading.get_ident() == thread

        with ExitStack() as stack:
            stack.callback(register_optimizer_step_pre_hook(enter).remove)
            stack.callback(register_optimizer_step_post_hook(leave).remove)
            for owner, name, new in (
                (nn.Module, "__call__", called),
                (_BaseDataLoaderIter, "__next__", given),
                (Tensor, "tolist", me._read_out),
                (Tensor, "numpy", me._read_out),
            ):
                stack.enter_context(patched(owner, name, new))
            stack.enter_context(self)
            yield

    def _read_out(self, read: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        with self._noting():
            self._note_read(tensor, ())
        return read(tensor, *args, **kwargs)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Keep what cannot be noted, as of tensors of an unusual kind, away from the step."""
        try:
            yield
        except Exception:
            self.lost = True

    def _called(self, call: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        number = None
        with self._noting():
            number = self._begin_call(module, args, kwargs)
        if number is None:
            return call(module, *args, **kwargs)
        self._open.append(number)
        try:
            output = call(module, *args, **kwargs)
        finally:
            self._open.pop()
        if isinstance(module, nn.RNNCellBase):
            with self._noting():
                self._last_state[id(module)] = tuple(id(t) for t in tensors_in(output))
                self._kept.append(output)  # no other object gets its id
        return output

    def _begin_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> int | None:
        """Note a call and return its number; None for a part of another one."""
        is_cell = isinstance(module, nn.RNNCellBase)
        is_model = is_cell or next(module.parameters(), None) is not None
        if self.lost or not is_model or (self._open and not is_cell):
            return None
        if isinstance(module, nn.modules.batchnorm._NormBase) or not self._open:
            for part in module.modules():
                if isinstance(part, nn.modules.batchnorm._NormBase):
                    self._norms |= {k for b in part.buffers() if (k := self._know(b)) is not None}
        line = ("", 0, "") if self._cells_only else _own_line()
        number = len(self.calls)
        self.calls.append(((id(module), module.training), line))
        if is_cell:
            self._note_cell(number, module, args, kwargs, line)
        return number

    def _note_cell(
        self, number: int, cell: nn.RNNCellBase, args: tuple, kwargs: dict[str, Any], line: Line
    ) -> None:
        x = kwargs.get("input", args[0] if args else None)
        state = kwargs.get("hx", args[1] if len(args) > 1 else None)
        if not isinstance(x, Tensor):
            return
        same = tuple(id(t) for t in tensors_in(state))
        follows = bool(same) and same == self._last_state.get(id(cell))
        needs = self._makers(x)
        detached = tuple(t.detach() for t in tensors_in(state))
        kept = None if not detached else detached if len(detached) > 1 else detached[0]
        self.cells.append((number, cell, x.detach(), kept, needs, follows, line))

    # operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, note = kwargs or {}, None
        if self._cells_only and (self._aside or torch._C._current_graph_task_id() != -1):
            return func(*args, **kwargs)
        with self._noting():
            if not self.lost:
                note = self._note_inputs(func, args, kwargs)
        result = func(*args, **kwargs)
        with self._noting():
            if note is not None:
                self._note_result(result, *note, (func, args, kwargs))
        return result

    def _note_inputs(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple:
        """Note what an operator is given; return what its result is noted with."""
        name = func._schema.name.rpartition("::")[2]
        inputs = _parts_in((args, kwargs))
        written = [] if _is_plain(name) else _parts_in(written_by(func, args, kwargs))
        overwrites = name in ("copy_", "fill_", "zero_") and bool(args)
        read = [t for t in inputs if t is not args[0]] if overwrites else inputs
        for tensor in inputs:
            if name.startswith("lift") or self._is_new(tensor):
                self._enter_from_python(tensor)
        needs: set[int] = set()
        for tensor in read:
            if self._know(tensor) not in self._norms:
                needs |= self._makers(tensor)
        by_number = self._read is not None and self._is_given_number(func, args, kwargs)
        keys = {self._know(tensor) for tensor in inputs}
        return name, inputs, written, needs, by_number, keys

    def _note_result(
        self,
        result: Any,
        name: str,
        inputs: list[Tensor],
        written: list[Tensor],
        needs: set[int],
        by_number: bool,
        keys: set[int | None],
        call: tuple[Any, tuple[Any, ...], dict[str, Any]],
    ) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        made = [t for t in _parts_in(result) if self._key(t) not in keys]
        number = len(self.nodes)
        works = bool(made or written) and not _is_plain(name)
        counts = works and not (self._open or self._aside or in_backward)
        if by_number:
            self._by_number.append((number, self._read or 0))
        counts = counts and not self._cells_only
        given = self._number_of(*call) if counts else None
        size = max(((t.numel(), t.device.type) for t in [*made, *written]), default=(0, "cpu"))
        line = _own_line() if counts else ("", 0, "")
        node = Node(name, needs, counts, tuple(self._open), in_backward, size, line, given)
        self.nodes.append(node)
        self.lost |= number > _MOST_NODES
        for tensor in written:
            self._write(tensor, number)
        for tensor in made:
            self._write(tensor, number, anew=True)
        if by_number and not made:  # a view that the number chose
            for tensor in _parts_in(result):
                self._write(tensor, number)
        if isinstance(result, bool | int | float):  # inference mode has item() as it is
            for tensor in inputs:
                self._note_read(tensor, (result,))

    def _number_of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """Return the number of an operator on tensors of some form; None for unusual tensors."""
        tensors = list(tensors_in((args, kwargs)))
        if any(tensor.layout is not torch.strided for tensor in tensors):
            return None
        key = func, *((tensor.shape, tensor.dtype) for tensor in tensors)
        if key not in self._given:
            self._given[key] = len(self._given), (func, form_of(args), form_of(kwargs))
        return self._given[key][0]

    def _note_read(self, tensor: Tensor, numbers: tuple[Any, ...]) -> None:
        needs = set() if self.lost else self._makers(tensor)
        if not needs or self._loading or torch._C._current_graph_task_id() != -1:
            return  # a label of the data set: no operator made it
        self.nodes.append(Node("read", needs, False, tuple(self._open)))
        self._read = len(self.nodes) - 1
        self._numbers = tuple(n for n in numbers if not isinstance(n, bool))

    def _is_new(self, tensor: Tensor) -> bool:
        key = self._key(tensor)
        return key is not None and key not in self._alive

    def _enter_from_python(self, tensor: Tensor) -> None:
        """Let a tensor that no operator made need what was read last."""
        if self._read is None or self._loading:
            return
        self.nodes.append(Node("enter", {self._read}, False, tuple(self._open)))
        self._write(tensor, len(self.nodes) - 1, anew=True)

    def _is_given_number(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether one of its operands or indices is the number that was read last."""
        if not self._numbers:
            return False
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        return any(
            given[name] in self._numbers
            for name in _OPERANDS & given.keys()
            if isinstance(given[name], int | float) and not isinstance(given[name], bool)
        )

    # bytes

    def _key(self, tensor: Tensor) -> int | None:
        try:
            return tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):
            self.lost = True  # no memory of its own
            return None

    def _know(self, tensor: Tensor) -> int | None:
        key = self._key(tensor)
        if key is not None and key not in self._alive:
            self._writes.pop(key, None)
            self._alive[key] = weakref.ref(tensor.untyped_storage(), lambda _: self._forget(key))
        return key

    def _forget(self, key: int) -> None:
        self._alive.pop(key, None)
        self._writes.pop(key, None)
        self._norms.discard(key)

    def _makers(self, tensor: Tensor) -> set[int]:
        """Return the nodes that wrote the bytes that a tensor shows."""
        low, high = extent(tensor)
        written = self._writes.get(self._key(tensor) or 0, ())
        return {n for first, last, who in written if first < high and low < last for n in who}

    def _write(self, tensor: Tensor, number: int, anew: bool = False) -> None:
        if anew:
            self._forget(self._key(tensor) or 0)
        key = self._know(tensor)
        if key is None:
            return
        low, high = extent(tensor)
        left = list(self._writes.get(key, ()))
        if tensor.is_contiguous():  # nothing of what it covers is left
            left = [w for w in left if not (low <= w[0] and w[1] <= high)]
        left.append((low, high, frozenset([number])))
        if len(left) > _MOST_WRITES:
            who = frozenset().union(*(w[2] for w in left))
            left = [(min(w[0] for w in left), max(w[1] for w in left), who)]
        self._writes[key] = left

    # what follows from it

    def result(self) -> Dataflow:
        if self.lost:
            return Dataflow(1.0, is_lost=True)
        self._need_what_was_read()
        at_once, lines = {}, dict(self.calls[::-1])
        of_cells: dict[int, list[int]] = {}
        for key, mine in self._calls_by_key().items():
            if len(mine) < 4 and not self.cells:
                continue
            of_calls, of_nodes = levels(self.nodes, mine)
            at_once[key] = len(mine) / max(of_calls.values())
            of_cells |= self._levels_of_inputs(key, of_nodes)
        cells = tuple(
            CellCall(cell, x, state, any(of_cells.get(number, [1])), follows, line)
            for number, cell, x, state, _, follows, line in self.cells
        )
        given, turns = dict(self._given.values()), loop_calls(self.nodes)
        made = [node.made for node in self.nodes if node.counts]
        return Dataflow(
            operators_at_once(self.nodes),
            at_once,
            lines,
            cells,
            elements=int(median(count for count, _ in made)) if made else 0,
            device=mode(device for _, device in made) if made else "cpu",
            longest_reads=longest(self.nodes, lambda node: node.name == "read"),
            loops=loop_lines(self.nodes),
            turns=tuple(OperatorCall(*given[n], calls) for n, calls in turns.items()),
        )

    def cells_that_need(self) -> set[int]:
        """Return the ids of the cells one of whose inputs needs an output of the same cell."""
        self._need_what_was_read()
        found: set[int] = set()
        for key, mine in self._calls_by_key().items():
            if any(id(cell) == key[0] for _, cell, *_ in self.cells):
                _, of_nodes = levels(self.nodes, mine)
                if any(map(any, self._levels_of_inputs(key, of_nodes).values())):
                    found.add(key[0])
        return found

    def _need_what_was_read(self) -> None:
        reads = sum(node.name == "read" for node in self.nodes)
        if 2 * len(self._by_number) >= reads:  # else it is chance: two numbers that are alike
            for number, read in self._by_number:
                self.nodes[number].needs.add(read)

    def _calls_by_key(self) -> dict[tuple[int, bool], list[int]]:
        found: dict[tuple[int, bool], list[int]] = {}
        for number, (key, _) in enumerate(self.calls):
            found.setdefault(key, []).append(number)
        return found

    def _levels_of_inputs(self, key: tuple[int, bool], of_nodes: list[int]) -> dict[int, list[int]]:
        """Return call of a cell -> levels of the nodes that made its input."""
        return {
            number: [of_nodes[n] for n in needs]
            for number, cell, _, _, needs, _, _ in self.cells
            if (id(cell), cell.training) == key
        }


def _is_plain(name: str) -> bool:
    return name in ("detach", "detach_", "alias", "empty", "empty_like", "empty_strided") or (
        name.startswith("lift")
    )


def _own_line() -> Line:
    frame = sys._getframe(1)
    while frame is not None:
        if is_own(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back
    return "", 0, ""


def _parts_in(value: Any) -> list[Tensor]:
    """Return the tensors with memory in nested containers: of a sparse one its parts."""
    return [part for tensor in tensors_in(value) for part in dense_parts(tensor)]
