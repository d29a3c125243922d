"""How does code run on tensors that have shapes and no data? What it asks for gets some answer.

A fake tensor answers for its size, type and device. Its values, and sizes that depend on values,
nobody knows: a number is made up and noted, a size is an error in plain words.

Source: PyTorch documentation, torch.compiler: Fake tensor.
"""

from __future__ import annotations

import copy
import linecache
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from dlhelpers.fakes import fake_of, tensors_in
from dlhelpers.memory.accounting import user_code
from dlhelpers.memory.replaying import generators_in

__all__ = ["Fakes", "Numbers", "explained"]

_MOST_ANSWERS = 1000


@contextmanager
def explained() -> Iterator[None]:
    """Say in plain words what fake tensors cannot do."""
    from torch._subclasses.fake_tensor import (
        DynamicOutputShapeException,
        UnsupportedFakeTensorException,
    )

    log = logging.getLogger("torch._subclasses.fake_tensor")
    was = log.disabled
    log.disabled = True  # it writes thirty lines about what is said below
    try:
        yield
    except DynamicOutputShapeException as error:
        raise ValueError(
            f"the size of what {error.func} returns depends on data, which an estimate does not "
            "have: run the step under measure_peak"
        ) from error
    except UnsupportedFakeTensorException as error:
        raise ValueError(f"{error}: run the step under measure_peak") from error
    except Exception as error:
        error.add_note("raised while estimate played the step through on tensors without data")
        raise
    finally:
        log.disabled = was


class Numbers(TorchDispatchMode):
    """Let ``item()`` give some number where a fake tensor has none, and note who asked.

    An optimizer asks for its step's number, which changes no tensor's size; ASGD also whether it
    averages already, and is played as if it did, which takes more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_asked_by_optimizer = False
        self._asked: dict[tuple[str, int], list[Any]] = {}  # line -> answers

    @property
    def notes(self) -> list[str]:
        """One line for each line of code that asked."""
        return [
            f"{Path(file).name}:{line} or an operator that it calls reads a tensor's value; an "
            f"estimate has no values and took {answers[0]}: "
            f"{shorten(linecache.getline(file, line), 60, placeholder=' ...')}"
            for (file, line), answers in self._asked.items()
        ]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            answer = True if kind == torch.bool else 0.5 if kind.is_floating_point else 1
            if not self.is_asked_by_optimizer:
                place = user_code(sys._getframe(1))
                answers = self._asked.setdefault(place, [])
                answers.append(answer)
                if len(answers) > _MOST_ANSWERS:
                    raise ValueError(
                        f"{Path(place[0]).name}:{place[1]} read tensors' values "
                        f"{_MOST_ANSWERS} times, as a loop whose end depends on data would: run "
                        "the step under measure_peak"
                    )
            return answer
        return func(*args, **(kwargs or {}))


class Fakes:
    """Copies of model, inputs and optimizer whose tensors have no memory."""

    def __init__(self, mode: Any) -> None:
        self._mode = mode
        self._memo: dict[int, Any] = {}
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept: list[Any] = []  # an id in the memo is good while its owner lives

    def tensor(self, real: Tensor) -> Tensor:
        """Return the one stand-in of a tensor."""
        if id(real) in self._memo:
            return self._memo[id(real)]
        if real.layout not in (torch.strided, torch.sparse_coo):
            raise ValueError(
                f"a tensor of layout {real.layout} has no stand-in without data: use "
                "to_sparse_coo(), or run the step under measure_peak"
            )
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
            for tensor in tensors_in(list(vars(module).values())):
                self.tensor(tensor)
        self._generators(model)
        with self._mode:
            return copy.deepcopy(model, self._memo)

    def value(self, value: Any) -> Any:
        """Return a copy of inputs, tensors nested in anything."""
        for tensor in tensors_in(value):
            self.tensor(tensor)
        self._generators(value)
        return copy.deepcopy(value, self._memo)

    def optimizer(self, optimizer: Any, model: nn.Module) -> Optimizer | None:
        """Return a copy over the copied model's parameters, or one made of them."""
        if optimizer is None:
            return None
        if not isinstance(optimizer, Optimizer):
            made = optimizer([p for p in model.parameters() if p.requires_grad])
            if not isinstance(made, Optimizer):
                raise TypeError(f"optimizer must make a torch.optim.Optimizer, got {made!r}")
            return made
        for tensor in tensors_in(list(vars(optimizer).values())):  # a learning rate can be one
            self.tensor(tensor)
        self._generators(optimizer)
        with self._mode:
            return copy.deepcopy(optimizer, self._memo)

    def _generators(self, holder: Any) -> None:
        """Clone each torch.Generator outside of the mode: a state without data is none."""
        for generator in generators_in([holder]):
            if isinstance(generator, torch.Generator) and id(generator) not in self._memo:
                self._memo[id(generator)] = generator.clone_state()
                self._kept.append(generator)
