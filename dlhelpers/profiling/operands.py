"""Which bytes does an operator read and write? By its schema, and by its tensors' strides."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dlhelpers.trees import tensors_in

__all__ = ["extent", "written_by"]


def written_by(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operator writes to, by its schema.

    >>> import torch
    >>> x = torch.zeros(2)
    >>> written_by(torch.ops.aten.add_.Tensor, (x, torch.ones(3)), {})[0] is x
    True
    """
    found = []
    for place, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[place] if place < len(args) else None)
            found += list(tensors_in(value))
    return found


def extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of the storage that a tensor shows, and the one after the last.

    >>> import torch
    >>> extent(torch.zeros(4, 2)[1:3, 0])
    (8, 20)
    """
    if not tensor.numel():
        return 0, 0
    last = sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size, first = tensor.element_size(), tensor.storage_offset()
    return first * size, (first + last + 1) * size
