"""What do operators make of sparse tensors that have no data?

A sparse gradient of nnz rows out of V holds indices, int64 [1, nnz], and values, [nnz, D]. One that
is not coalesced lists a row as often as it was used: adding two puts one behind the other. Fake
tensors leave nnz at 0, so what comes out is made here, of the sizes that it would have.

Source: PyTorch documentation, torch.sparse, Sparse COO tensors.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["SparseOps", "is_coo", "like_coo"]


def is_coo(value: Any) -> bool:
    """Whether it is a tensor of layout ``torch.sparse_coo``."""
    return isinstance(value, Tensor) and value.layout == torch.sparse_coo


def like_coo(tensor: Tensor, indices: Tensor, values: Tensor, is_coalesced: bool) -> Tensor:
    """Return a sparse tensor of the same size that holds these indices and values themselves."""
    return torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors.default(
        tensor.sparse_dim(),
        tensor.dense_dim(),
        tensor.shape,
        indices,
        values,
        dtype=values.dtype,
        layout=torch.sparse_coo,
        device=tensor.device,
        is_coalesced=is_coalesced,
    )


class SparseOps(TorchDispatchMode):
    """Give sparse results their sizes; inside of a fake mode.

    Attributes:
        notes: what was taken for granted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        coo = [value for value in args if is_coo(value)]
        name = func.overloadpacket.__name__ if func.namespace == "aten" else ""
        if name == "_coalesce":
            return self._coalesced(coo[0])
        if name in ("add", "add_") and len(coo) == 2:
            indices = torch.cat([one._indices() for one in coo], 1)
            made = like_coo(coo[0], indices, torch.cat([one._values() for one in coo]), False)
            if name == "add":
                return made
            coo[0].data = made
            return coo[0]
        if name == "_embedding_bag_backward" and args[9]:  # sparse
            grad, indices, rows = args[0], args[1], args[6]
            values = grad.new_empty(indices.numel(), grad.shape[1])  # one row per index
            size = (rows, grad.shape[1])
            return torch.sparse_coo_tensor(
                indices.reshape(1, -1), values, size, check_invariants=False
            )
        result = func(*args, **(kwargs or {}))
        if coo and is_coo(result) and not result._nnz() and name != "zero_":
            return _filled(result, coo[0])
        return result

    def _coalesced(self, tensor: Tensor) -> Tensor:
        indices, values = tensor._indices(), tensor._values()
        rows = min(tensor._nnz(), prod(tensor.shape[: tensor.sparse_dim()]))
        note = (
            "which rows of a sparse gradient are used depends on data: they are taken to be all "
            "different, which takes the most"
        )
        if note not in self.notes:
            self.notes.append(note)
        places, kept = torch.empty_like(indices), torch.empty_like(values)  # narrowed at the end
        return like_coo(tensor, places[:, :rows], kept[:rows], True)


def _filled(empty: Tensor, source: Tensor) -> Tensor:
    """Return a new tensor of as many entries as the one that it was made of."""
    sizes = empty.shape[empty.sparse_dim() :]
    indices = source._indices().new_empty(empty.sparse_dim(), source._nnz())
    values = empty._values().new_empty(source._nnz(), *sizes)
    return like_coo(empty, indices, values, source.is_coalesced())
