"""What does code get that asks a tensor without data for a value? Some answer, or a plain no.

A fake tensor answers for its size, type and device. Its values, and sizes that depend on values,
nobody knows: a number is made up and noted, a size is an error in plain words.

Source: PyTorch documentation, torch.compiler: Fake tensor.
"""

from __future__ import annotations

import linecache
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dlhelpers.without_data import user_code

__all__ = ["Numbers", "explained"]

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
