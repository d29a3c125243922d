"""Which DataLoader and which models does a step use? Seen while it runs, nothing is asked for."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from dlhelpers.patching import patched
from dlhelpers.profiling.repeats import Repeats
from dlhelpers.profiling.trace import MODEL

__all__ = [
    "Loader",
    "ModelCalls",
    "Watch",
    "count_nodes",
    "graph_counter",
    "living",
    "living_tensors",
    "watch",
]

_ALONE = threading.Lock()


@dataclass(frozen=True)
class Loader:
    """A DataLoader that gave a batch.

    Attributes:
        dataset, collate: its own.
        workers: how many processes it has.
        sampler: gives lists of indices, or single ones where batching is off.
        batched: whether it makes batches itself (``batch_size`` is not None).
        pinned: ``pin_memory``.
        persistent: whether its workers stay from epoch to epoch.
        prefetch: batches that each worker makes ahead; None without workers.
        worker_init: ``worker_init_fn``, as far as an iterator knows it.
    """

    dataset: Any
    collate: Any
    workers: int
    sampler: Any
    batched: bool
    pinned: bool
    persistent: bool = False
    prefetch: int | None = None
    worker_init: Any = None

    @property
    def by_index(self) -> bool:
        """Whether its samples can be asked for one by one."""
        return not isinstance(self.dataset, IterableDataset)


@dataclass
class ModelCalls:
    """Calls of one module from outside any other module, in one mode.

    Attributes:
        module: which.
        training: its mode.
        count: calls so far.
        seconds: that they took, forward alone.
        rows: size of dimension 0 of the first tensor, in the last call; 0 without a tensor.
        makes_graph: whether the last output hangs on a graph.
        autocast: whether the last call ran under autocast on the tensor's device.
        args, kwargs: of the last call, detached.
        needs_input_grad: whether gradients flowed through it to an input, in any call.
    """

    module: nn.Module
    training: bool
    count: int = 0
    rows: int = 0
    makes_graph: bool = False
    autocast: bool = False
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    needs_input_grad: bool = False
    seconds: float = 0.0


@dataclass
class Watch:
    """What was seen inside ``with watch() as seen``.

    Attributes:
        loaders: those that gave a batch, by ``id`` of their data set.
        waited_s: seconds in each of them, by the same key.
        calls: of modules with parameters, by ``id`` and mode.
        trained: ids of the parameters of optimizers that made a step.
        starts, fetches, ends: iterators that were made, batches that were given and epochs that
            ended, by the same key.
        optimizers: those that made a step, by ``id``, each with the ids of its parameters that
            had a dense gradient, or None where it had another kind as well.
        anomaly: whether autograd's anomaly detection was on.
        repeats: calls of models that repeat another one.
    """

    loaders: dict[int, Loader] = field(default_factory=dict)
    waited_s: dict[int, float] = field(default_factory=dict)
    calls: dict[tuple[int, bool], ModelCalls] = field(default_factory=dict)
    trained: set[int] = field(default_factory=set)
    starts: Counter[int] = field(default_factory=Counter)
    fetches: Counter[int] = field(default_factory=Counter)
    ends: Counter[int] = field(default_factory=Counter)
    optimizers: dict[int, tuple[torch.optim.Optimizer, frozenset[int] | None]] = field(
        default_factory=dict
    )
    anomaly: bool = False
    repeats: Repeats = field(default_factory=Repeats)

    def begin_anew(self) -> None:
        """Forget calls and waiting, of steps that warm up; loaders are known already."""
        self.calls.clear()
        self.waited_s.clear()
        self.starts.clear()
        self.fetches.clear()
        self.ends.clear()
        self.repeats.begin_anew()

    def step(self, train_step: Callable[[], Any]) -> Callable[[], Any]:
        """Return the step that says where it begins."""

        def begun() -> Any:
            self.repeats.begin_step()
            return train_step()

        return begun

    @property
    def slowest(self) -> Loader | None:
        """The loader that was waited for longest; None where none gave a batch."""
        key = max(self.waited_s, key=self.waited_s.__getitem__, default=None)
        return None if key is None else self.loaders[key]


@contextmanager
def watch() -> Iterator[Watch]:
    """Note the DataLoaders and the models that this thread uses; mark their calls in the record.

    Raises:
        RuntimeError: another thread watches: what one puts back would be the other's.
    """
    if not _ALONE.acquire(blocking=False):
        raise RuntimeError("another thread diagnoses already: wait for it, one runs at a time")
    seen = Watch()
    try:
        with ExitStack() as stack:
            stack.enter_context(_loaders_noted(seen))
            stack.enter_context(_models_noted(seen))
            stack.enter_context(_optimizers_noted(seen))
            stack.enter_context(_anomaly_noted(seen))
            yield seen
    finally:
        _ALONE.release()


@contextmanager
def _loaders_noted(seen: Watch) -> Iterator[None]:
    def waited(loader: Any, since: float) -> int:
        key = id(loader._dataset)
        seen.loaders[key] = Loader(
            loader._dataset,
            loader._collate_fn,
            loader._num_workers,
            loader._index_sampler,
            loader._auto_collation,
            loader._pin_memory,
            loader._persistent_workers,
            getattr(loader, "_prefetch_factor", None),
            getattr(loader, "_worker_init_fn", None),
        )
        seen.waited_s[key] = seen.waited_s.get(key, 0.0) + perf_counter() - since
        return key

    def noted(give: Any, loader: Any) -> Any:
        begin = perf_counter()
        try:
            batch = give(loader)
        except StopIteration:
            seen.ends[waited(loader, begin)] += 1
            raise
        seen.fetches[waited(loader, begin)] += 1
        return batch

    def noted_start(begin_epoch: Any, loader: Any) -> Any:
        begin = perf_counter()
        made = begin_epoch(loader)
        if isinstance(made, _BaseDataLoaderIter):
            seen.starts[waited(made, begin)] += 1
        return made

    with (
        patched(_BaseDataLoaderIter, "__next__", noted),
        patched(DataLoader, "__iter__", noted_start),
    ):
        yield


@contextmanager
def _anomaly_noted(seen: Watch) -> Iterator[None]:
    def noted(switch: Any, enabled: bool, *args: Any, **kwargs: Any) -> Any:
        seen.anomaly |= bool(enabled)
        return switch(enabled, *args, **kwargs)

    seen.anomaly |= torch.is_anomaly_enabled()
    with patched(torch, "set_anomaly_enabled", noted):  # both of torch's context managers call it
        yield


@contextmanager
def _models_noted(seen: Watch) -> Iterator[None]:
    """Stand in front of ``Module.__call__``: global hooks would make torch.compile start anew."""
    inside = False

    def noted(call: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside or not _has_parameters(module):  # a loss, an activation: no model
            return call(module, *args, **kwargs)
        inside = True
        try:
            with torch.autograd.profiler.record_function(MODEL):
                begin = perf_counter()
                output = call(module, *args, **kwargs)
                took = perf_counter() - begin
                with suppress(Exception):  # of tensors of an unusual kind, into the program
                    _note(seen, module, args, kwargs, output).seconds += took
        finally:
            inside = False
        return output

    with patched(nn.Module, "__call__", noted):
        yield


@contextmanager
def _optimizers_noted(seen: Watch) -> Iterator[None]:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    me = threading.get_ident()

    def noted(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != me:
            return
        seen.repeats.note_update()
        with suppress(Exception):  # of an optimizer of the program's own
            held = (p for group in optimizer.param_groups for p in group["params"])
            parameters = list(held)
            seen.trained.update(map(id, parameters))
            graded = [p for p in parameters if p.grad is not None]
            dense = all(p.grad.layout is torch.strided for p in graded)
            ids = frozenset(map(id, graded)) if dense else None
            seen.optimizers[id(optimizer)] = optimizer, ids

    hook = register_optimizer_step_post_hook(noted)
    try:
        yield
    finally:
        hook.remove()


def _has_parameters(module: nn.Module) -> bool:
    try:
        return next(module.parameters(), None) is not None
    except Exception:  # of a module that makes them otherwise
        return False


def _note(
    seen: Watch, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
) -> ModelCalls:
    calls = seen.calls.setdefault(
        (id(module), module.training), ModelCalls(module, module.training)
    )
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    seen.repeats.note(module, args, kwargs, output)
    calls.count += 1
    calls.rows = len(tensors[0]) if tensors and tensors[0].dim() else 0
    calls.makes_graph = any(t.grad_fn is not None for t in _tensors_of(output))
    calls.needs_input_grad |= any(t.requires_grad for t in _tensors_of((args, kwargs)))
    calls.autocast = bool(tensors) and torch.is_autocast_enabled(tensors[0].device.type)
    calls.args = tuple(t.detach() if isinstance(t, Tensor) else t for t in args)
    calls.kwargs = {k: t.detach() if isinstance(t, Tensor) else t for k, t in kwargs.items()}
    return calls


def _tensors_of(output: Any) -> list[Tensor]:
    from dlhelpers.trees import tensors_in

    return list(tensors_in(output))


@contextmanager
def graph_counter(limit: int = 200_000) -> Iterator[Callable[[], int]]:
    """Give a function that counts the nodes of autograd's graphs that living tensors hold."""
    with living_tensors() as tensors:
        yield lambda: count_nodes(tensors(), limit)


@contextmanager
def living_tensors() -> Iterator[Callable[[], list[Tensor]]]:
    """Give a function that returns all living tensors.

    The garbage collector knows a million objects, and to go through them takes a good part of a
    second. So the tensors that are there already are noted once, and each call looks at them and
    at objects that are new. Tensors that the program itself has set aside (``gc.freeze``), the
    collector shows to nobody.
    """
    import gc

    known = [weakref.ref(tensor) for tensor in living(Tensor)]

    def tensors() -> list[Tensor]:
        old = (tensor for note in known if (tensor := note()) is not None)
        return list({id(t): t for t in (*old, *living(Tensor))}.values())

    if gc.get_freeze_count():
        yield tensors
        return
    gc.freeze()
    try:
        yield tensors
    finally:
        gc.unfreeze()


def count_nodes(tensors: Iterable[Tensor], limit: int = 200_000) -> int:
    """Count the nodes of autograd's graphs that these tensors hold, up to a limit."""
    todo = [tensor.grad_fn for tensor in tensors if _has_graph(tensor)]
    seen: set[Any] = set()
    while todo and len(seen) < limit:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo.extend(parent for parent, _ in node.next_functions)
    return len(seen)


def living(kind: type) -> list[Any]:
    """Return all objects of a type and of those below it; asks no object anything."""
    import gc

    kinds: dict[type, bool] = {}
    found = []
    for thing in gc.get_objects():
        own = type(thing)
        is_kind = kinds.get(own)
        if is_kind is None:
            is_kind = kinds[own] = issubclass(own, kind)
        if is_kind:
            found.append(thing)
    return found


def _has_graph(tensor: Tensor) -> bool:
    try:
        return tensor.grad_fn is not None
    except (RuntimeError, ReferenceError):  # a dead proxy, or a tensor without storage
        return False
