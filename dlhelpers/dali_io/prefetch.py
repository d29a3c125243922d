"""Copy the next batch to the GPU while the present one is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

__all__ = ["CudaPrefetcher"]


class CudaPrefetcher:
    """Iterates like ``loader``, its tensors on ``device``, each batch copied ahead.

    On a CUDA device the next batch is copied on a stream of its own while the caller works on the
    present one. The copy overlaps only from pinned memory: ``DataLoader(..., pin_memory=True)``.
    A DALILoader needs none of this: with ``device="cuda"`` its batches are made on the GPU. On the
    CPU batches pass through untouched.

    Args:
        loader: any iterable of batches: tensors, or tuples, lists and dicts of them.
        device: None for CUDA where torch has it, else the CPU.

    Raises:
        ValueError: device is neither a CPU nor a CUDA device that is there.

    Source: PyTorch documentation, CUDA semantics; PyTorch tutorial, pinmem_nonblock.

    >>> list(CudaPrefetcher([torch.zeros(2), torch.ones(2)], device="cpu"))
    [tensor([0., 0.]), tensor([1., 1.])]
    """

    def __init__(self, loader: Iterable[Any], device: str | torch.device | None = None) -> None:
        self.loader = loader
        here = torch.cuda.is_available()
        self.device = torch.device(device or ("cuda" if here else "cpu"))
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be the CPU or a CUDA device, got {self.device}")
        if self.device.type == "cuda" and not here:
            raise ValueError(f"device={device!r}, but torch finds no CUDA device")

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader) if self.device.type == "cpu" else self._copied()

    def set_epoch(self, epoch: int) -> None:
        """Tell the loader, or its sampler, which epoch comes next, where it wants to know."""
        for wants in (self.loader, getattr(self.loader, "sampler", None)):
            if hasattr(wants, "set_epoch"):
                return wants.set_epoch(epoch)
        return None

    def _copied(self) -> Iterator[Any]:
        stream, present, error = torch.cuda.Stream(self.device), None, None
        batches = iter(self.loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except Exception as raised:  # the loader's own, after the batch that is there
                error = raised
                break
            with torch.cuda.stream(stream):
                following = _map(lambda t: t.to(self.device, non_blocking=True), batch)
            if present is not None:
                yield present
            main = torch.cuda.current_stream(self.device)
            main.wait_stream(stream)
            # else the allocator could give the memory away while main still reads it
            present = _map(lambda t, main=main: _used_by(t, main), following)
        if present is not None:
            yield present
        if error is not None:
            raise error


def _used_by(tensor: torch.Tensor, stream: Any) -> torch.Tensor:
    tensor.record_stream(stream)
    return tensor


def _map(function: Callable[[torch.Tensor], torch.Tensor], batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: _map(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(function, value) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(_map(function, value) for value in batch)
    return batch
