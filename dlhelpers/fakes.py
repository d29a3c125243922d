"""Tensors inside of anything, and stand-ins for them that have shapes and no memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["fake_of", "tensors_in"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Give every tensor in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from tensors_in(inner)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name, None))


def fake_of(mode: Any, real: Tensor) -> Tensor:
    """Return a fake tensor of a ``FakeTensorMode`` with the shape, strides, type and device.

    A tensor of device ``meta`` has no device of its own and becomes one of the CPU, so that the
    CPU's operators are called.
    """
    if real.device.type != "meta":
        return mode.from_tensor(real.detach(), static_shapes=True)
    with mode:
        return torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="cpu")
