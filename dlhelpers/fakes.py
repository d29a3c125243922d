"""Stand-ins for tensors, with a shape and no memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["dense_parts", "fake_of"]


def dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors that hold a tensor's data: itself, or a sparse one's indices and values.

    >>> [tuple(part.shape) for part in dense_parts(torch.eye(3).to_sparse())]
    [(2, 3), (3,)]
    """
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def fake_of(mode: Any, real: Tensor) -> Tensor:
    """Return a fake tensor of a ``FakeTensorMode`` with the shape, strides, type and device.

    A tensor of device ``meta`` has no device of its own and becomes one of the CPU, so that the
    CPU's operators are called. One of ``torch.inference_mode()`` becomes an ordinary one.
    """
    if real.layout == torch.sparse_coo:  # one without data would have no entries
        indices, values = (fake_of(mode, part) for part in dense_parts(real.detach()))
        with mode:
            return torch.sparse_coo_tensor(
                indices,
                values,
                real.shape,
                check_invariants=False,
                is_coalesced=real.is_coalesced(),
            )
    if real.device.type != "meta" and not real.is_inference():
        return mode.from_tensor(real.detach(), static_shapes=True)
    device = "cpu" if real.is_meta else real.device
    with mode:
        return torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=device)
