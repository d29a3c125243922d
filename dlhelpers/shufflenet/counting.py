"""Which operators does a forward pass call, in which module? Seen while it runs without data."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dlhelpers.shufflenet.moving import moved_by
from dlhelpers.trees import tensors_in
from dlhelpers.without_data import Fakes, user_code

__all__ = ["Counter"]


class Counter(TorchDispatchMode):
    """Note each operator of a forward pass over fake tensors, and the module at work.

    Attributes:
        calls: of operators that write: module, operator, arguments, keyword arguments, output, and
            what they move.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._names = {id(module): name for name, module in model.named_modules()}
        self._at: list[str] = []
        self._refused = ""
        self.calls: list[tuple[Any, ...]] = []

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call the model's copy without data.

        Raises:
            TypeError: the inputs hold no tensor.
            ValueError: a size or a choice in the model depends on data, or it computes in threads
                of its own.
        """
        from torch._subclasses.fake_tensor import (
            DataDependentOutputException,
            DynamicOutputShapeException,
            UnsupportedFakeTensorException,
        )
        from torch.nn.modules.module import (
            register_module_forward_hook,
            register_module_forward_pre_hook,
        )

        if next(tensors_in((args, kwargs)), None) is None:
            kinds = [type(value).__name__ for value in (*args, *kwargs.values())]
            raise TypeError(f"inputs must hold a tensor, got {kinds}")
        fakes = Fakes()
        given = (self._model, args, kwargs)
        model, (args, kwargs) = fakes.model(self._model), fakes.value((args, kwargs))
        # a method that was put into the place of another may call the original
        self._names |= {id(module): name for name, module in model.named_modules()}

        me = threading.get_ident()

        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == me:
                self._at.append(self._names.get(id(module), type(module).__name__))

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            if threading.get_ident() == me:
                self._at.pop()

        hooks = (
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        )
        try:
            with torch.no_grad(), _NoFastPath(self), fakes.running(*given), self:
                model(*args, **kwargs)
        except (
            DataDependentOutputException,
            DynamicOutputShapeException,
            UnsupportedFakeTensorException,
        ) as error:
            raise ValueError(self._refused or _depends(str(error))) from error
        finally:
            for hook in hooks:
                hook.remove()

    def refusal(self, func: Any) -> str:
        """Say which module asks what it cannot be told, and where."""
        file, line = user_code(sys._getframe(1))
        at = f"module {self._at[-1]!r}" if self._at and self._at[-1] else "the model itself"
        return _depends(f"{at} calls {func} at {Path(file).name}:{line}")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and torch.is_inference_mode_enabled():
            with self:  # nothing has taken it apart yet
                out = _taken_apart(func, args, kwargs)
            if out is not NotImplemented:
                return out
        try:
            out = func(*args, **kwargs)
        except Exception:
            self._refused = self.refusal(func)
            raise
        moved = moved_by(func, args, kwargs, out)
        if moved.written:
            at = self._at[-1] if self._at else ""
            self.calls.append((at, func, args, kwargs, out, moved))
        return out


def _taken_apart(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run what a composite operator is made of; NotImplemented where it is none."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    run, has = getattr(func, "_op_dk", None), "_dispatch_has_kernel_for_dispatch_key"
    if run is None or not hasattr(torch._C, has):
        return func.decompose(*args, **kwargs)
    # by torch's own kernel: decompose() prefers one in Python, of other operators
    is_composite = getattr(torch._C, has)(func.name(), key)
    return run(key, *args, **kwargs) if is_composite else NotImplemented


def _depends(what: str) -> str:
    return (
        f"a size or choice in this model depends on data: {what}; compute it outside of forward "
        "and pass it as an argument, or count the modules before and after by themselves"
    )


class _NoFastPath(TorchFunctionMode):
    """Keep torch from computing a whole attention layer as one operator, in this thread alone.

    It does not where a function mode is on.
    """

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.numpy and isinstance(args[0], FakeTensor):  # calls no operator
            raise ValueError(self._counter.refusal("Tensor.numpy"))
        return func(*args, **(kwargs or {}))
