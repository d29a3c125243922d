"""Is what a recomputation gives to backward what forward would have given?

torch.utils.checkpoint compares shapes, dtypes and devices. A block that draws from a stream that
nobody can replay (``os.urandom``, a clock, a counter in a closure) has equal ones and other values,
and its gradients are silently wrong. So in the first pass, the second, the fourth and so on, and in
every 64th, a sample of each tensor that forward saves is kept, on a CPU as bytes outside of torch,
and compared with that of the recomputation.

The tolerance, relative to the largest number of the sample, is eps ** 0.75 (float32: 6e-6) on CPUs
and eps ** 0.5 on devices whose kernels add up in a changing order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.memory.replaying import saves_unwritten

__all__ = ["Witness"]

_RUNS, _RUN_BYTES = 16, 64


class Witness:
    """Samples of the tensors that one forward saves for backward, in order.

    Attributes:
        block: name of the block that runs, for the error.
    """

    def __init__(self, called: Sequence[Any], is_due: bool) -> None:
        """Begin without samples; ``is_due``: whether to look at this pass, as it takes time."""
        self._called = called
        self.block = ""
        self._is_due = is_due
        self._samples: list[tuple[str, bytes | Tensor | None]] = []
        self._at = 0

    @contextmanager
    def watching(self, recomputes: bool) -> Iterator[None]:
        """Look at each tensor before checkpoint's own hook takes it.

        Raises:
            RuntimeError: in a recomputation, where a tensor is not that of forward.
        """
        self._at = 0
        top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
        skips = top is None or not self._is_due or torch.compiler.is_compiling()
        hooks = None if skips else top(False)
        if hooks is None:
            yield
            return
        look = self._compare if recomputes else self._record
        pack = _after(look, hooks[0])
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, hooks[1]):
                yield
        finally:
            vars(pack).clear()  # torch forbids these marks to outlive the hook's place on its stack

    def forget(self) -> None:
        """Compare nothing in this pass: the caller has said that it is inexact."""
        self._samples = []

    def _record(self, tensor: Tensor) -> None:
        self._samples.append((self.block, _sample(tensor)))

    def _compare(self, tensor: Tensor) -> None:
        self._at += 1
        if self._at > len(self._samples):
            return  # torch.utils.checkpoint says that there are more
        block, old = self._samples[self._at - 1]
        new = None if old is None else _sample(tensor)
        if new is None or type(new) is not type(old) or len(new) != len(old):
            return  # torch.utils.checkpoint compares shapes, dtypes and devices
        if not _is_near(old, new, tensor) and not saves_unwritten(self._called):
            raise RuntimeError(
                f"block {block!r} does not compute in backward what it computed in forward, so "
                "gradients would be wrong: it draws random numbers that cannot be replayed, or "
                "reads what its forward changes (a clock, a global, a tensor that is no buffer). "
                "Keep the generator as an attribute of the module and the state as a buffer, or "
                "leave this block out of checkpoint_blocks"
            )


def _after(look: Callable[[Tensor], None], hook: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def pack(tensor: Tensor) -> Any:
        look(tensor)
        return hook(tensor)

    vars(pack).update(vars(hook))  # marks by which torch knows its own hooks
    return pack


def _sample(tensor: Tensor) -> bytes | Tensor | None:
    """Return some of a tensor's numbers; None where its memory cannot be read as plain numbers.

    On a CPU no operator runs and nothing is allocated from torch: nobody who counts sees it.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return None
    steps = [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1 and s]
    filled, span = 1, 1
    for size, stride in steps:
        filled, span = filled * size, span + (size - 1) * stride
    # what lies between the elements is another tensor's; workspaces of kernels are uint8
    if not tensor.numel() or filled != span or tensor.dtype is torch.uint8:
        return None
    if tensor.device.type == "cpu":
        try:
            address = tensor.data_ptr()
        except RuntimeError:  # a wrapper without memory
            return None
        return _read(address, span, tensor.element_size()) if address else None
    if not tensor.is_floating_point() or tensor.device.type == "meta":
        return None
    flat = tensor.detach().as_strided((span,), (1,))
    return flat[:: -(-span // (_RUNS * _RUN_BYTES // 4))].clone()


def _read(address: int, count: int, size: int) -> bytes:
    if count * size <= _RUNS * _RUN_BYTES:
        return ctypes.string_at(address, count * size)
    gap = (count - _RUN_BYTES // size) / (_RUNS - 1)
    starts = (address + int(i * gap) * size for i in range(_RUNS))
    return b"".join(ctypes.string_at(start, _RUN_BYTES) for start in starts)


def _is_near(old: bytes | Tensor, new: bytes | Tensor, tensor: Tensor) -> bool:
    if isinstance(old, bytes):
        if old == new:
            return True
        old, new = (torch.frombuffer(bytearray(b), dtype=tensor.dtype) for b in (old, new))
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    one, other = old.to(wide), new.to(wide)
    power = 0.75 if tensor.device.type == "cpu" else 0.5
    largest = one.abs().nan_to_num(0, 0, 0).max().item()
    tolerance = torch.finfo(tensor.dtype).eps ** power * largest
    return torch.allclose(one, other, rtol=0, atol=tolerance, equal_nan=True)
