"""What is a road: one way to run a model, and what must be known to build it?"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.extras import need
from dlhelpers.quantization.batches import Batch, Outputs
from dlhelpers.quantization.judging import Judge, judge_of

__all__ = ["Road", "RoadError", "Task", "needed", "quiet", "with_free_batch"]


class RoadError(RuntimeError):
    """A road cannot be taken; the message says why, in a line."""


@dataclass(frozen=True)
class Road:
    """One way to run the model, built.

    Attributes:
        name: such as ``ONNX Runtime int8``.
        precision: ``float32``, ``bfloat16``, ``float16``, ``float64`` or ``int8``.
        run: a batch -> the output's tensors, in the model's own type.
        nbytes: on disk.
        int8_kernels: operators that compute with 8-bit integers.
        note: what a reader should know; empty for nothing.
        onnx: the model as an ONNX file, where it is one.
        takes_any_batch: whether a batch of another size costs no compilation.
    """

    name: str
    precision: str
    run: Callable[[Batch], list[Tensor]]
    nbytes: int
    int8_kernels: int = 0
    note: str = ""
    onnx: bytes | None = field(default=None, repr=False)
    takes_any_batch: bool = False


@dataclass
class Task:
    """What every road starts from.

    Attributes:
        model: in eval mode, BatchNorm folded.
        batches: to calibrate on.
        outputs: of the model as it was given.
        calibrator: a method of ``calibrate.CALIBRATORS`` or ``auto``.
        threads: of torch, for every engine.
        float_layers: names of layers that shall stay float.
        shared: what roads build once for all of them.
        judge: what a road's outputs are compared with; by default those of all batches alike.
        precision: the model's own type, such as ``float32``; None takes it from the model.
    """

    model: nn.Module
    batches: list[Batch]
    outputs: list[Outputs]
    calibrator: str
    threads: int
    float_layers: frozenset[str] = frozenset()
    shared: dict[str, Any] = field(default_factory=dict)
    judge: Judge | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        if self.judge is None:
            self.judge = judge_of(self.model, self.batches, self.outputs)
        if self.precision is None:
            self.precision = _own_type(self.model, self.outputs[0])

    @property
    def alike(self) -> list[Batch]:
        """The batches of the first one's sizes, which every road can run."""
        return [batch for batch in self.batches if _sizes(batch) == _sizes(self.batches[0])]


def _own_type(model: nn.Module, outputs: Outputs) -> str:
    """Return the type of most of a model's weights; of its output where there are none."""
    count: Counter[torch.dtype] = Counter()
    for weight in (*model.parameters(), *model.buffers()):
        if weight.is_floating_point():
            count[weight.dtype] += weight.numel()
    if not count:
        count.update(t.dtype for t in outputs.tensors if t.is_floating_point())
    return str(count.most_common(1)[0][0]).removeprefix("torch.")


def _sizes(batch: Batch) -> list[Any]:
    return [value.shape for value in batch if isinstance(value, Tensor)]


def with_free_batch(batch: Batch) -> tuple[Batch, tuple[Any, ...]]:
    """Return example inputs and ``dynamic_shapes`` that leave the first dimension open.

    A size of 1 would be taken for a constant; such a batch is doubled.
    """
    if all(len(t) == 1 for t in batch if isinstance(t, Tensor) and t.dim()):
        batch = tuple(torch.cat((t, t)) if isinstance(t, Tensor) and t.dim() else t for t in batch)
    free = tuple(
        {0: torch.export.Dim.DYNAMIC} if isinstance(t, Tensor) and t.dim() else None for t in batch
    )
    return batch, free


def needed(*modules: str) -> None:
    """Raise a RoadError that says what to install where a package is missing."""
    for module in modules:
        try:
            need(module, "it")
        except ImportError as error:
            raise RoadError(str(error)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what exporters, compilers and deprecated modules say while they work."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
