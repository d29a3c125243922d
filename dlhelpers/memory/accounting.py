"""Which storages are alive at each operator, and what are they?

A tensor's bytes belong to a storage, which views share. Each storage is followed from the operator
that gave birth to it to its death; what it is shows in how it is used. Bytes alive at operator i:

    sum of nbytes over the storages with born <= i < died

Source: PyTorch documentation, torch.utils._python_dispatch and autograd.graph.saved_tensors_hooks.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from dlhelpers.fakes import dense_parts
from dlhelpers.memory.sparse import is_coo, like_coo
from dlhelpers.trees import tensors_in
from dlhelpers.without_data import user_code

__all__ = ["BEFORE", "Accounting", "Op", "Storage"]

BEFORE = -1


@dataclass(eq=False)
class Storage:
    """One storage, from birth to death.

    Attributes:
        nbytes: its size.
        born: number of the operator that made it; -1 if it was there before.
        died: number of the first operator that it does not see; None while it lives.
        kind: parameters, gradients, optimizer state or inputs; None if only its use can tell.
        saved: autograd keeps it for the backward pass.
        in_forward: made while autograd recorded.
        address: of its memory; 0 for a fake one.
    """

    nbytes: int
    born: int
    kind: str | None
    in_forward: bool = False
    saved: bool = False
    died: int | None = None
    address: int = 0
    alive: Any = field(default=None, repr=False)  # a weak reference whose callback sets `died`

    @property
    def is_a(self) -> str:
        """The kind, by declaration or by use."""
        return self.kind or ("activations" if self.saved else "temporaries")


@dataclass(frozen=True, eq=False)
class Op:
    """One operator of a run.

    Attributes:
        name: as the dispatcher calls it.
        phase: forward, backward or step (of the optimizer).
        module: qualified name of the module at work; empty outside of one.
        code: file and line of the caller's code.
        call: what ``keep_call`` returned for it; an estimate's shapes.
    """

    name: str
    phase: str
    module: str
    code: tuple[str, int]
    call: Any = field(default=None, repr=False)


class Accounting(TorchDispatchMode):
    """Follow every storage that the operators inside the ``with`` block see.

    Args:
        mark: called with the number of each operator; gives the context to run it in.
        keep_call: called with each operator and its arguments; what it returns is kept.
        device: type of the device whose storages are followed; None for all.
        stand_in: gives the tensor whose storage is followed in place of another's.
    """

    def __init__(
        self,
        mark: Any = None,
        keep_call: Any = None,
        device: str | None = None,
        stand_in: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._device = device
        self.storages: list[Storage] = []
        self.ops: list[Op] = []
        self._mark = mark or (lambda number: nullcontext())
        self._keep_call = keep_call
        self._live: dict[int, Storage] = {}
        self._names: dict[int, str] = {}
        self._modules: list[str] = []
        self._watched: set[int] = set()
        self._hooks = ExitStack()
        self._in_step = 0
        self._is_looking = False
        self._stand_in = stand_in

    # what is known before the first operator

    def add(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Declare what these tensors are."""
        for tensor in tensors:
            self._see(tensor, kind)

    def add_model(self, model: nn.Module) -> None:
        """Declare a model's parameters, buffers and gradients, and name its modules."""
        for name, module in model.named_modules():
            self._names.setdefault(id(module), name)
        self.add("parameters", model.parameters())
        self.add("parameters", model.buffers())
        for parameter in model.parameters():
            self._watch(parameter)

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """Declare an optimizer's state, parameters and their gradients."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self.add("parameters", [parameter])
                self._watch(parameter)
        self.add("optimizer state", tensors_in(optimizer.state))

    def _watch(self, leaf: Tensor) -> None:
        if leaf.grad is not None:
            self.add("gradients", [leaf.grad])
        if not leaf.requires_grad or not leaf.is_leaf or id(leaf) in self._watched:
            return
        self._watched.add(id(leaf))

        def accumulated(tensor: Tensor) -> None:
            if tensor.grad is not None:
                self._see(tensor.grad, "gradients")

        hook = leaf.register_post_accumulate_grad_hook(accumulated)
        self._hooks.callback(hook.remove)

    # the run

    def __enter__(self) -> Accounting:
        from torch.nn.modules import module as hooks

        stack = self._hooks
        for hook in (
            hooks.register_module_forward_pre_hook(self._enter_module),
            hooks.register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._enter_step),
            register_optimizer_step_post_hook(self._leave_step),
        ):
            stack.callback(hook.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack))
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._hooks.close()
        for storage in self._live.values():
            storage.alive = None  # later deaths are not of this run
        self._live = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_looking:
            return func(*args, **kwargs)
        number = len(self.ops)
        seen = list(tensors_in((args, kwargs)))
        lifted = "lift" in func.__name__  # a tensor that was made without the dispatcher
        in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        for tensor in seen:
            for storage in self._see(tensor, None, born=number if lifted else BEFORE):
                storage.saved |= in_backward and storage.in_forward
        kept = self._keep_call(func, args, kwargs) if self._keep_call else None
        self.ops.append(
            Op(str(func), self._phase(), self._module(), user_code(sys._getframe(1)), kept)
        )
        with self._mark(number):
            if in_backward and _would_be_taken(func, args):
                result = like_coo(args[0], *dense_parts(args[0]), args[0].is_coalesced())
            else:
                result = func(*args, **kwargs)
        for tensor in (*tensors_in(result), *seen):
            self._see(tensor, None, born=number)
        return result

    def _phase(self) -> str:
        if self._in_step:
            return "step"
        return "backward" if torch._C._current_graph_task_id() != -1 else "forward"

    def _module(self) -> str:
        if self._modules:
            return self._modules[-1]
        node = torch._C._current_autograd_node()
        return node.metadata.get("dlhelpers.module", "") if node is not None else ""

    def _see(self, tensor: Tensor, kind: str | None, born: int = BEFORE) -> list[Storage]:
        """Return the tensor's storages: one, or those of a sparse tensor's parts."""
        if self._device is not None and tensor.device.type != self._device:
            return []
        if tensor.layout == torch.strided and self._stand_in is None:
            parts: tuple[Tensor, ...] = (tensor,)
        else:
            was, self._is_looking = self._is_looking, True
            try:
                parts = dense_parts(self._stand_in(tensor) if self._stand_in else tensor)
            finally:
                self._is_looking = was
        storages = [self._see_part(part, tensor, kind, born) for part in parts]
        return [storage for storage in storages if storage is not None]

    def _see_part(
        self, part: Tensor, tensor: Tensor, kind: str | None, born: int
    ) -> Storage | None:
        """Return a part's storage, new or known; note its kind and a change of its size."""
        try:
            whole = part.untyped_storage()
            nbytes = whole.nbytes()
        except (NotImplementedError, RuntimeError):
            return None  # of a layout without a storage of its own
        known = self._live.get(whole._cdata)
        if known is not None and known.nbytes != nbytes:  # resized: a new block of memory
            known.died = len(self.ops)
            kind, born, known = kind or known.kind, max(0, len(self.ops) - 1), None
        if known is None:
            if kind is None and born == BEFORE:
                kind = "parameters" if isinstance(tensor, nn.Parameter) else "inputs"
                if tensor.is_leaf and tensor.requires_grad:
                    self._watch(tensor)
            known = Storage(nbytes, born, kind, torch.is_grad_enabled(), address=_address(whole))
            key = whole._cdata
            known.alive = weakref.ref(whole, lambda _: self._dies(key))
            self._live[key] = known
            self.storages.append(known)
        elif kind is not None and known.kind in (None, "inputs"):
            known.kind = kind
        return known

    def _dies(self, key: int) -> None:
        storage = self._live.pop(key, None)
        if storage is not None:
            storage.died = len(self.ops)

    # what the hooks tell

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int]:
        kept = tensor.detach()  # the tensor itself would make a circle with its graph
        for storage in self._see(tensor, None, born=max(0, len(self.ops) - 1)):
            storage.saved = True
        return kept, tensor._version

    def _is_here(self) -> bool:
        """Whether this thread is the one that is followed: hooks are the whole process's."""
        return any(mode is self for mode in _get_current_dispatch_mode_stack())

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if not self._is_here():
            return
        if id(module) not in self._names:
            self.add_model(module)
        self._modules.append(self._names[id(module)] or type(module).__name__)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._is_here():
            return
        name = self._modules.pop()
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.metadata.setdefault("dlhelpers.module", name)

    def _enter_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_here():
            self.add_optimizer(optimizer)
            self._in_step += 1

    def _leave_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_here():
            return
        self._in_step -= 1
        for tensor in tensors_in(optimizer.state):
            self._see(tensor, "optimizer state", born=max(0, len(self.ops) - 1))


def _would_be_taken(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is the copy of a sparse gradient that is made only because it is looked at.

    A leaf takes the first gradient as it is where nobody else holds it. That a mode sees the
    gradient counts as holding it.
    """
    if func is not torch.ops.aten.clone.default or not is_coo(args[0]):
        return False
    node = torch._C._current_autograd_node()
    return node is not None and "AccumulateGrad" in node.name()


def _unpack(kept: tuple[Tensor, int]) -> Tensor:
    tensor, version = kept
    if tensor._version != version:  # hooks switch torch's own check off
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an "
            f"inplace operation: {tuple(tensor.shape)} is at version {tensor._version}, "
            f"expected version {version}"
        )
    return tensor


def _address(whole: torch.UntypedStorage) -> int:
    try:
        return 0 if whole.device.type == "meta" else whole.data_ptr()
    except RuntimeError:
        return 0  # a fake tensor has no memory
