"""How does a model run without memory, and leave no trace? A copy of it runs on fake tensors.

A fake tensor has a shape, strides, a type and a device, and no data. What a forward keeps of those
(a grid of anchors, a rotary table, features that a hook collects) would poison the model for good,
so that a copy runs, and what it reaches beside itself is put back.

Source: PyTorch documentation, torch.compiler: Fake tensor.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim import Optimizer

from dlhelpers.fakes import fake_of
from dlhelpers.models import copied
from dlhelpers.reached import generators_in, objects_in
from dlhelpers.trees import MAPPINGS, tensors_in
from dlhelpers.untouched import untouched

__all__ = ["Fakes", "user_code"]

_LIBRARIES = tuple(
    str(Path(sys.modules[name].__file__ or "").parent) for name in ("torch", "dlhelpers")
)


class _OneThread(FakeTensorMode):
    """Note where a thread computes that is neither the maker's nor autograd's."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._thread = threading.get_ident()
        self.elsewhere = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if threading.get_ident() != self._thread and not self.elsewhere:
            task = getattr(torch._C, "_current_graph_task_id", None)
            if task is None or task() == -1:
                frame: FrameType | None = sys._getframe(1)
                while frame and not isinstance(frame.f_locals.get("self"), nn.Module):
                    frame = frame.f_back
                owner = "" if frame is None else f" in a {type(frame.f_locals['self']).__name__}"
                self.elsewhere = f"{func}{owner}"
        return super().__torch_dispatch__(func, types, args, kwargs)


class Fakes:
    """Copies of model, inputs and optimizer whose tensors have no memory.

    >>> fakes, layer = Fakes(), nn.Linear(4, 3)
    >>> twin, x = fakes.model(layer), fakes.value(torch.rand(2, 4))
    >>> with fakes.running(layer):
    ...     tuple(twin(x).shape)
    (2, 3)
    """

    def __init__(self) -> None:
        self._mode = _OneThread()
        self._memo: dict[int, Any] = {}
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept: list[Any] = []  # an id in the memo is good while its owner lives

    @contextlib.contextmanager
    def running(self, *originals: Any) -> Iterator[None]:
        """Run operators on tensors without data in the block; leave alone what it reaches.

        Args:
            originals: the models, losses and inputs whose copies run.

        Raises:
            ValueError: another thread computed with them, where whoever counts does not see it.
        """
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=list(devices)):
            left_alone = untouched(*originals, without_data=True, copies=self._memo)
            with left_alone, self._one_thread(), self._mode:
                yield

    @contextlib.contextmanager
    def _one_thread(self) -> Iterator[None]:
        problem = None
        try:
            yield
        except Exception as error:  # of a call that waits for what the other thread gives
            if not self._mode.elsewhere:
                raise
            problem = error
        if self._mode.elsewhere:
            raise ValueError(
                f"the model computes {self._mode.elsewhere} in a thread of its own, whose "
                "operators are not seen: let its forward call all its layers in one thread"
            ) from problem

    def tensor(self, real: Tensor) -> Tensor:
        """Return the one stand-in of a tensor."""
        if id(real) in self._memo:
            return self._memo[id(real)]
        if real.layout not in (torch.strided, torch.sparse_coo):
            raise ValueError(
                f"a tensor of layout {real.layout} has no stand-in without data: use "
                "to_sparse_coo(), or run the step under measure_peak"
            )
        with torch.inference_mode(False):
            made = fake_of(self._mode, real)
            if isinstance(real, nn.Parameter):
                made = nn.Parameter(made, requires_grad=real.requires_grad)
            else:
                made = made.requires_grad_(real.requires_grad)
        self._memo[id(real)] = made
        self._kept.append(real)
        return made

    def seen(self, tensor: Tensor) -> Tensor:
        """Return what operators take for a tensor with data, as for targets in a loss."""
        from torch._subclasses import FakeTensor

        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._seen:
            made = self._mode.from_tensor(tensor, static_shapes=True)
            self._seen[id(tensor)] = (tensor, made)  # the mode gives it again while it lives
        return self._seen[id(tensor)][1]

    def model(self, model: nn.Module) -> nn.Module:
        """Return a copy with stand-ins for all its tensors."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.tensor(tensor)
        for module in model.modules():
            for tensor in tensors_in(list(vars(module).values()), once=True):
                self.tensor(tensor)
        return self._copy(model)

    def value(self, value: Any) -> Any:
        """Return a copy of inputs, tensors nested in anything."""
        for tensor in tensors_in(value):
            self.tensor(tensor)
        return self._copy(value)

    def optimizer(self, optimizer: Any, model: nn.Module) -> Optimizer | None:
        """Return a copy over the copied model's parameters, or one made of them."""
        if optimizer is None:
            return None
        if not isinstance(optimizer, Optimizer):
            made = optimizer([p for p in model.parameters() if p.requires_grad])
            if not isinstance(made, Optimizer):
                raise TypeError(f"optimizer must make a torch.optim.Optimizer, got {made!r}")
            return made
        for tensor in tensors_in(
            list(vars(optimizer).values()), once=True
        ):  # a learning rate can be one
            self.tensor(tensor)
        return self._copy(optimizer)

    def _copy(self, holder: Any) -> Any:
        """Return a copy with stand-ins; locks, files and the like are the same ones."""
        for value in objects_in([holder]):
            for tensor in _tensors_of(value):
                with contextlib.suppress(ValueError):  # of a layout that nothing may ask for
                    self.tensor(tensor)
            if id(value) not in self._memo and _is_never_copied(value):
                self._memo[id(value)] = value
                self._kept.append(value)
        for generator in generators_in([holder]):  # outside of the mode: a state has data
            if isinstance(generator, torch.Generator) and id(generator) not in self._memo:
                self._memo[id(generator)] = generator.clone_state()
                self._kept.append(generator)
        with self._mode:
            return copied(holder, self._memo)


def _tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in a container or in the attributes of an object, not of a class."""
    held: list[Any] = []
    if isinstance(value, MAPPINGS):
        held = [*value.values()]
    elif isinstance(value, (list, tuple, set, deque)):
        held = [*value]
    elif not isinstance(value, (type, ModuleType)):
        held = [*getattr(value, "__dict__", {}).values()]
    return [one for one in held if isinstance(one, Tensor)]


def _is_never_copied(value: Any) -> bool:
    """Whether Python refuses to copy it: a module, a lock, a file, a generator that runs.

    Packed weights of a quantized layer as well, which have data and nothing that changes them.
    """
    if isinstance(value, (ModuleType, torch.ScriptObject)):
        return True
    if type(value).__module__.partition(".")[0] not in sys.stdlib_module_names:
        return False
    try:
        value.__reduce_ex__(4)
    except TypeError:
        return True
    except Exception:  # whatever else a class of its own raises, copy.deepcopy says
        return False
    return False


def user_code(frame: FrameType | None) -> tuple[str, int]:
    """Return file and line of the innermost caller that is neither torch nor this package."""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_LIBRARIES):
            return file, frame.f_lineno
        frame = frame.f_back
    return "", 0
