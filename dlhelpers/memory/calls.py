"""What may an operator's kernel take, as far as its arguments' shapes tell?

A call is an operator with the shapes of its tensors, from which tensors like them can be made.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dlhelpers.memory.sparse import is_coo

__all__ = ["Call", "Shape", "call_of"]

_PRODUCTS = {f"aten.{name}.default" for name in ("mm", "addmm", "bmm", "baddbmm")}
_WITHOUT_BOUND = ("upsample", "dist", "linalg")  # theirs grows with the output, or by algorithm
_CONVOLUTIONS = ("aten.convolution.default", "aten.convolution_backward.default")
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_BLOCK = 256 << 10  # bytes that even the smallest convolution may take
_FILLED = 64  # rows or columns that a matrix unit works on at once
_A_FEW_NUMBERS = 64  # bytes: Python's numbers become tensors
_TILE = 60 * 60  # elements: a copy that transposes works in such squares


@dataclass(frozen=True)
class Shape:
    """What one needs to make a tensor like another."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.dtype.itemsize * prod(self.size)

    def make(self, random: bool) -> Tensor:
        """Return such a tensor, of zeros or random numbers."""
        made = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        if 0 in self.stride:
            return made
        return made.normal_() if random and made.is_floating_point() else made.zero_()

    @property
    def is_dense(self) -> bool:
        """Whether its elements fill a stretch of memory, in whatever order."""
        steps = sorted((step, n) for n, step in zip(self.size, self.stride, strict=True) if n != 1)
        expected = 1
        for step, n in steps:
            if step != expected:
                return False
            expected *= n
        return True


def _summed(
    x: Shape,
    weight: Shape,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    is_transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> int:
    """Bytes of a convolution's output; a transposed one's twice, and of what it sums up."""
    n, channels, kernel = x.size[0], weight.size[0], weight.size[2:]
    given = (stride, padding, dilation, output_padding)
    every = [tuple(each) * len(kernel) if len(each) == 1 else each for each in given]
    places = []
    for size, k, s, p, d, more in zip(x.size[2:], kernel, *every, strict=True):
        reach = d * (k - 1)
        if is_transposed:
            places.append((size - 1) * s - 2 * p + reach + more + 1)
        else:
            places.append((size + 2 * p - reach - 1) // s + 1)
    elements = prod(places)
    if is_transposed:  # in groups, put together at the end; or unfolded
        channels = weight.size[1] * groups
        elements = 2 * elements + prod(kernel) * prod(x.size[2:])
    return max(4, x.dtype.itemsize) * n * channels * elements


@dataclass(frozen=True)
class SparseShape(Shape):
    """Of a sparse tensor, whose rows are all different as far as there are enough."""

    nnz: int = 0
    sparse_dim: int = 1
    layout: torch.layout = torch.sparse_coo
    is_coalesced: bool = False

    @property
    def nbytes(self) -> int:
        rows = self.dtype.itemsize * prod(self.size[self.sparse_dim :])
        return self.nnz * (8 * self.sparse_dim + rows)

    @property
    def is_dense(self) -> bool:
        return False

    def make(self, random: bool) -> Tensor:
        places = self.size[: self.sparse_dim]
        numbers = torch.arange(self.nnz, device=self.device) % max(1, prod(places))
        indices = torch.stack(torch.unravel_index(numbers, places))
        values = torch.zeros(
            (self.nnz, *self.size[self.sparse_dim :]), dtype=self.dtype, device=self.device
        )
        made = torch.sparse_coo_tensor(
            indices, values, self.size, check_invariants=False, is_coalesced=self.is_coalesced
        )
        return made if self.layout == made.layout else made.to_sparse(layout=self.layout)


@dataclass(frozen=True)
class Call:
    """An operator and its arguments, tensors by their shapes only."""

    func: Any
    args: Any
    kwargs: Any

    @property
    def key(self) -> str:
        """All that the kernel's bytes can depend on, as text."""
        return f"{self.func}{self.args}{self.kwargs}"

    @property
    def shapes(self) -> list[Shape]:
        """The shapes of all tensors among the arguments."""
        found: list[Shape] = []
        tree_map(lambda x: found.append(x) if isinstance(x, Shape) else None, self._both())
        return found

    @property
    def is_sparse(self) -> bool:
        """Whether one of the tensors is sparse."""
        return any(isinstance(shape, SparseShape) for shape in self.shapes)

    @property
    def at_most(self) -> int:
        """Bytes inside the kernel that were never seen exceeded: what is worth a trial."""
        shapes, name = self.shapes, str(self.func)
        if self.func.is_view or self.func.namespace == "prim":
            return 0
        if self.is_sparse:
            return sys.maxsize  # sorted, merged, unfolded
        if self._is_plain:
            tile = _TILE * shapes[0].dtype.itemsize if "clone" in name else 0
            return tile + _A_FEW_NUMBERS
        if any(word in name for word in _WITHOUT_BOUND):
            return sys.maxsize
        # narrow types may be computed in float32
        sizes = [max(4, shape.dtype.itemsize) * prod(shape.size) for shape in shapes]
        bound = 3 * sum(sizes) + _A_FEW_NUMBERS
        if name in _PRODUCTS:  # the output too, and in blocks that thin matrices are filled up to
            left, right = shapes[-2:]
            bound += 8 * prod(left.size[:-1]) * right.size[-1] + _BLOCK
            bound += 4 * _FILLED * max(4, left.dtype.itemsize) * left.size[-1]
        if "convolution" in name:
            if name not in _CONVOLUTIONS:
                return sys.maxsize
            # may unfold its input, once for each weight of a kernel
            weight = self.args[2 if "backward" in name else 1]
            bound += 2 * prod(weight.size[2:]) * max(sizes) + _BLOCK
            if "backward" not in name:  # and sum its output in float32
                bound += _summed(*self.args[:9])
            if weight.size[1] == 1:  # a depthwise one's weights, in blocks of channels
                bound += 400 * max(4, weight.dtype.itemsize) * prod(weight.size)
        return bound

    @property
    def _is_plain(self) -> bool:
        """Whether the kernel takes its arguments as they are: no type or layout to change first."""
        shapes = self.shapes
        if len({s.dtype for s in shapes}) > 1 or not all(s.is_dense for s in shapes):
            return False
        if str(self.func) in _PRODUCTS:  # a matrix library wants rows or columns in one piece
            is_known = all(s.dtype in (torch.float32, torch.float64) for s in shapes)
            return is_known and all(1 in s.stride[-2:] for s in shapes)
        layouts: dict[tuple[int, ...], tuple[int, ...]] = {}
        return torch.Tag.pointwise in self.func.tags and all(
            s.dtype.is_floating_point and layouts.setdefault(s.size, s.stride) == s.stride
            for s in shapes
        )

    def with_batch(self, n: int) -> Call | None:
        """Return the call for a batch of n instead; None where it is not plain what that is."""
        shapes, name = self.shapes, str(self.func)
        batch = shapes[0].size[0] if shapes and shapes[0].size else 0
        if batch <= n or not all(s.is_dense or 0 in s.stride for s in shapes):
            return None
        weight = None
        if name in ("aten.mm.default", "aten.addmm.default"):  # as many rows of the left alone
            weight = self.args[-1]
        if "convolution" in name:  # may have as many rows as the batch
            weight = self.args[2 if "backward" in name else 1]

        def smaller(value: Any) -> Any:
            if not isinstance(value, Shape) or value is weight or value.size[:1] != (batch,):
                return value
            if len(value.size) < 2 and value.dtype.is_floating_point:
                return value  # of the channels; whole numbers are targets
            return dataclasses.replace(value, size=(n, *value.size[1:]))

        return Call(self.func, *tree_map(smaller, (self.args, self.kwargs)))

    def _both(self) -> Any:
        return (self.args, self.kwargs)


def call_of(func: Any, args: Any, kwargs: Any) -> Call:
    """Return the call with its tensors' shapes in place of the tensors."""

    def shape(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.layout in _COMPRESSED or is_coo(value):
            facts: tuple[Any, ...] = (value._nnz(), value.sparse_dim(), value.layout)
            facts += (is_coo(value) and value.is_coalesced(),)
            return SparseShape(tuple(value.shape), (), value.dtype, str(value.device), *facts)
        return Shape(tuple(value.shape), value.stride(), value.dtype, str(value.device))

    return Call(func, *tree_map(shape, (args, kwargs)))
