"""Which tensors does one operator read, and which does it write?

An output that lies in the memory of an input is a view, unless the operator says that it changes
that input. What is overwritten as a whole is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from dlhelpers.fakes import tensors_in

__all__ = ["is_gather", "is_scatter", "moved_by", "storage_of"]

_GATHERS = {"embedding", "gather", "index", "index_select"}
_SCATTERS = {"index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_"}
# memory that is not filled yet, and other shapes for what is there
_NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "lift_fresh", "resize_", "set_"}
_NOTHING |= {"as_strided_", "detach_", "squeeze_", "unsqueeze_", "transpose_", "t_"}
_OVERWRITES = {"bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_"}
_OVERWRITES |= {"log_normal_", "normal_", "random_", "uniform_", "zero_"}


def is_gather(func: Any) -> bool:
    """Whether the operator takes elements of its first input, and leaves the others alone."""
    return _name(func) in _GATHERS


def is_scatter(func: Any) -> bool:
    """Whether the operator changes elements of its first input, and leaves the others alone."""
    return _name(func) in _SCATTERS


def moved_by(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that a call reads, and those that it writes; none where it moves no byte.

    Args:
        func: of the dispatcher.
        args, kwargs, out: of its call; tensors may be fake.
    """
    if func.is_view or func.namespace == "prim" or _name(func) in _NOTHING:
        return [], []
    read, changed = [], []
    for argument, value in _given(func, args, kwargs):
        is_changed = argument.alias_info is not None and argument.alias_info.is_write
        if is_changed:
            changed.extend(tensors_in(value))
        if not (is_changed and (argument.is_out or _name(func) in _OVERWRITES)):
            read.extend(tensors_in(value))
    known = {storage_of(tensor) for tensor in (*read, *changed)}
    fresh = [tensor for tensor in tensors_in(out) if storage_of(tensor) not in known]
    written = [*changed, *fresh]
    return (read, written) if written else ([], [])


def storage_of(tensor: Tensor) -> int:
    """Return a number of the memory behind a tensor, its own as long as the tensor lives."""
    return tensor.untyped_storage()._cdata


def _given(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """Give each argument of the schema that the call names, with its value."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        yield argument, value
    by_name = {argument.name: argument for argument in func._schema.arguments}
    for name, value in kwargs.items():
        yield by_name[name], value


def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")
