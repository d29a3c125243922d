"""Which tensors does one operator read, which does it write, and how much of each?

An output that lies in the memory of an input is a view, unless the operator says that it changes
that input. What is overwritten as a whole is not read. Of a table no more is read than what is
taken from it, or written than what is put into it. Memory that several tensors share counts once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlhelpers.trees import tensors_in

__all__ = ["Moved", "moved_by", "storage_of"]

# memory that is not filled yet, and other shapes for what is there
_NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "lift_fresh", "resize_", "set_"}
_NOTHING |= {"as_strided_", "detach_", "squeeze_", "unsqueeze_", "transpose_", "t_"}
_OVERWRITES = {"bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_"}
_OVERWRITES |= {"log_normal_", "normal_", "random_", "uniform_", "zero_"}
_OVERWRITES |= {"index_copy_", "index_fill_", "index_put_", "put_", "scatter_"}
_TAKES = {"embedding", "gather", "index", "index_select", "take"}
_BY_INDEX = {"index_add_", "index_copy_", "index_fill_", "index_reduce_"}  # slices of a dimension
_BY_ELEMENT = {"put_", "scatter_", "scatter_add_", "scatter_reduce_"}
_ADDS = {"addbmm", "addmm", "addmv", "addr", "baddbmm"}


class Moved(NamedTuple):
    """What one call moves.

    Attributes:
        read, written: tensors.
        elements: read and written, together.
        nbytes: of these.
    """

    read: Sequence[Tensor] = ()
    written: Sequence[Tensor] = ()
    elements: int = 0
    nbytes: int = 0


def moved_by(func: Any, args: Any, kwargs: Any, out: Any) -> Moved:
    """Return what a call reads and writes; nothing where it moves no byte.

    Args:
        func: of the dispatcher.
        args, kwargs, out: of its call; tensors may be fake.
    """
    name = _name(func)
    if func.is_view or func.namespace == "prim" or name in _NOTHING:
        return Moved()
    read, changed = [], []
    pairs = list(_given(func, args, kwargs))
    given = {argument.name: value for argument, value in pairs}
    for i, (argument, value) in enumerate(pairs):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed.extend(tensors_in(value))
        if not argument.is_out and (i > 0 or not _ignores_first(func, given)):
            read.extend(tensors_in(value))
    known = {storage_of(tensor) for tensor in (*changed, *tensors_in((args, kwargs)))}
    fresh = [tensor for tensor in tensors_in(out) if storage_of(tensor) not in known]
    written = [*changed, *fresh]
    if not written:
        return Moved()
    most = _at_most(name, given, out)
    regions = [*_regions(read, most), *_regions(written, most)]
    return Moved(
        read,
        written,
        sum(elements for elements, _ in regions),
        sum(elements * itemsize for elements, itemsize in regions),
    )


def storage_of(tensor: Tensor) -> int:
    """Return a number of the memory behind a tensor, its own as long as the tensor lives."""
    return tensor.untyped_storage()._cdata


def _ignores_first(func: Any, given: Mapping[str, Any]) -> bool:
    """Whether the values of the first argument do not matter."""
    name = _name(func)
    if name.rstrip("_") in _ADDS:
        return given.get("beta", 1) == 0
    if name == "scatter_":
        return "reduce" not in func._overloadname
    if name in ("index_put_", "put_"):
        return not given.get("accumulate", False)
    return name in _OVERWRITES


def _at_most(name: str, given: Mapping[str, Any], out: Any) -> dict[int, int]:
    """Return id of a tensor -> how many of its elements the call reads or writes at most."""
    first = next(iter(given.values()), None)
    if name in _TAKES:
        return {id(first): next(tensors_in(out)).numel()}
    if name in ("nll_loss_forward", "nll_loss2d_forward"):  # of each row, its target's element
        return dict.fromkeys((id(first), id(given.get("weight"))), given["target"].numel())
    if name.startswith("_embedding_bag"):
        return {id(first): given["indices"].numel() * first.shape[1]}
    if name in _BY_INDEX and first.dim():
        return {id(first): first.numel() // first.shape[given["dim"]] * given["index"].numel()}
    if name in _BY_ELEMENT:
        return dict.fromkeys((id(first), id(given.get("src"))), given["index"].numel())
    if name == "index_put_":
        return {id(first): _indexed(first, given["indices"])}
    return {}


def _indexed(tensor: Tensor, indices: Sequence[Tensor | None]) -> int:
    """Return how many elements the indices select: of a mask all, its upper bound."""
    given = [index for index in indices if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for index in given):
        return tensor.numel()
    whole = [n for n, i in zip_longest(tensor.shape, indices) if i is None]
    return math.prod(torch.broadcast_shapes(*(i.shape for i in given))) * math.prod(whole)


def _regions(tensors: Sequence[Tensor], most: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """Give (elements, bytes of each) of every storage that the tensors lie in.

    Where they overlap it is no more than lies between the first element and the last one.
    """
    storages: dict[Any, dict[Any, Tensor]] = defaultdict(dict)
    for t in tensors:
        place = t.storage_offset(), tuple(t.shape), t.stride()
        storages[storage_of(t), t.itemsize][place] = t
    for (_, itemsize), views in storages.items():
        ends = [t.storage_offset() + _span(t) for t in views.values() if t.numel()]
        begins = [t.storage_offset() for t in views.values() if t.numel()]
        touched = sum(min(_touched(t), most.get(id(t), t.numel())) for t in views.values())
        yield min(touched, max(ends, default=0) - min(begins, default=0)), itemsize


def _span(tensor: Tensor) -> int:
    """Return the elements of its storage from its first to its last one."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _touched(tensor: Tensor) -> int:
    """Return the elements in memory behind a tensor: an expanded dimension is read once."""
    return math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)


def _given(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """Give each argument of the schema that the call names, with its value."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        yield argument, value
    by_name = {argument.name: argument for argument in func._schema.arguments}
    for name, value in kwargs.items():
        yield by_name[name], value


def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")
