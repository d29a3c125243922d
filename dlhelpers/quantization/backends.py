"""What is a backend: one way to run a model, and what must be known to build it?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers import machine
from dlhelpers.extras import need
from dlhelpers.models import copied
from dlhelpers.quantization.batches import Batch, Outputs
from dlhelpers.quantization.judging import Judge, judge_of
from dlhelpers.quantization.quiet import quiet
from dlhelpers.quantization.sizes import Group, Sizes
from dlhelpers.trees import map_leaves

__all__ = [
    *("Backend", "BackendError", "Task", "in_single", "in_type", "needed"),
    *("own_type", "saturates"),
]


class BackendError(RuntimeError):
    """A backend cannot be taken; the message says why, in a line."""


@dataclass(frozen=True)
class Backend:
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
        sizes: of the inputs that it takes; None where it takes what the model takes.
    """

    name: str
    precision: str
    run: Callable[[Batch], list[Tensor]]
    nbytes: int
    int8_kernels: int = 0
    note: str = ""
    onnx: bytes | None = field(default=None, repr=False)
    takes_any_batch: bool = False
    sizes: Sizes | None = None


@dataclass
class Task:
    """What every backend starts from.

    Attributes:
        model: in eval mode, BatchNorm folded.
        batches: to calibrate on.
        outputs: of the model as it was given.
        calibrator: a method of ``calibrate.CALIBRATORS`` or ``auto``.
        threads: of torch, for every engine.
        float_layers: names of layers that shall stay float.
        free: dimensions of the inputs that shall take any size.
        shared: what backends build once for all of them.
        judge: what a backend's outputs are compared with; by default those of all batches.
        precision: the model's own type, such as ``float32``; None takes it from the model.
    """

    model: nn.Module
    batches: list[Batch]
    outputs: list[Outputs]
    calibrator: str
    threads: int
    float_layers: frozenset[str] = frozenset()
    free: list[Group] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)
    judge: Judge | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        if self.judge is None:
            self.judge = judge_of(self.model, self.batches, self.outputs)
        if self.precision is None:
            self.precision = own_type(self.model, self.outputs[0])

    @cached_property
    def single(self) -> nn.Module:
        """The model in float32, which the integer engines start from."""
        is_other = any(
            tensor.is_floating_point() and tensor.dtype != torch.float32
            for tensor in (*self.model.parameters(), *self.model.buffers())
        )
        return copied(self.model).float() if is_other else self.model


def own_type(model: nn.Module, outputs: Outputs | None = None) -> str:
    """Return the type of most of a model's weights; of its output where there are none."""
    count: Counter[torch.dtype] = Counter()
    for weight in (*model.parameters(), *model.buffers()):
        if weight.is_floating_point():
            count[weight.dtype] += weight.numel()
    if not count and outputs is not None:
        count.update(t.dtype for t in outputs.tensors if t.is_floating_point())
    dtype = count.most_common(1)[0][0] if count else torch.float32
    return str(dtype).removeprefix("torch.")


def in_single(batch: Batch) -> Batch:
    """Return inputs whose floating-point tensors are float32."""
    return in_type(batch, torch.float32)


def in_type(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return inputs whose floating-point tensors are of this type; others are left as they are."""

    def turned(leaf: Any) -> Any:
        is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if is_float else leaf

    return map_leaves(turned, batch)


def needed(*modules: str) -> None:
    """Raise a BackendError that says what to install where a package is missing."""
    for module in modules:
        try:
            with quiet():  # some warn of others as they are imported
                need(module, "it")
        except ImportError as error:
            raise BackendError(str(error)) from error


def saturates() -> bool:
    """Whether u8 by s8 products are added in pairs into 16 bits, which overflow: AVX2 alone."""
    simd = set(machine.describe().simd)
    return "avx2" in simd and not simd & {"avx512_vnni", "avx_vnni"}
