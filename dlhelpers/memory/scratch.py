"""How many bytes does a kernel take inside and give back? Run that one operator and see.

A convolution may unfold its input, reorder its weight or reduce in parts. What it takes depends on
operator, shapes, library and machine, so it is measured once for each and kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dlhelpers.memory.accounting import tensors_in
from dlhelpers.memory.allocator import record_of

__all__ = ["Call", "Scratch", "call_of"]


@dataclass(frozen=True)
class _Shape:
    """What one needs to make a tensor like another."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.size)

    def make(self) -> Tensor:
        made = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        return made.zero_() if 0 not in self.stride else made


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
    def shapes(self) -> list[_Shape]:
        """The shapes of all tensors among the arguments."""
        found: list[_Shape] = []
        tree_map(lambda x: found.append(x) if isinstance(x, _Shape) else None, self._both())
        return found

    @property
    def at_most(self) -> int:
        """Bytes inside the kernel that were never seen exceeded: what is worth a trial."""
        if self.func.is_view or self.func.namespace == "prim":
            return 0
        sizes = [shape.nbytes for shape in self.shapes]
        bound = 3 * sum(sizes)
        if "convolution" in str(
            self.func
        ):  # may unfold its input, once for each weight of a kernel
            weight = self.args[2 if "backward" in str(self.func) else 1]
            bound += 2 * prod(weight.size[2:]) * max(sizes)
        return bound

    def _both(self) -> Any:
        return (self.args, self.kwargs)


def call_of(func: Any, args: Any, kwargs: Any) -> Call:
    """Return the call with its tensors' shapes in place of the tensors."""

    def shape(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return _Shape(tuple(value.shape), value.stride(), value.dtype, str(value.device))

    return Call(func, *tree_map(shape, (args, kwargs)))


class Scratch:
    """Bytes inside kernels, measured once for each operator and shape on this machine.

    Attributes:
        untried: operator -> why its bytes count as nothing.
    """

    def __init__(self) -> None:
        from dlhelpers.data import cache_dir
        from dlhelpers.machine import describe

        self._at_most = (describe().ram_bytes or 4 << 30) // 8  # for one operator's arguments
        build = (torch.__version__, torch.get_num_threads(), torch.backends.mkldnn.enabled)
        name = hashlib.sha256(repr((describe().key, build)).encode()).hexdigest()[:12]
        self._path = cache_dir() / f"scratch-{name}.json"
        try:
            self._known: dict[str, int] = json.loads(self._path.read_text())
        except (OSError, ValueError):
            self._known = {}
        self._new = 0
        self.untried: dict[str, str] = {}

    def bytes_of(self, call: Call) -> int:
        """Return how many bytes more than its outputs the operator takes while it runs."""
        key = hashlib.sha256(call.key.encode()).hexdigest()[:20]
        if key not in self._known:
            if sum(shape.nbytes for shape in call.shapes) > self._at_most:
                self.untried[str(call.func)] = "its arguments are too large for a trial here"
                return 0
            try:
                self._known[key] = _measured(call)
            except (RuntimeError, ValueError, NotImplementedError, IndexError) as error:
                self.untried[str(call.func)] = str(error).partition("\n")[0]
                return 0
            self._new += 1
        return self._known[key]

    def keep(self) -> None:
        """Write what is new to the cache; a folder that cannot be written costs only time."""
        if not self._new:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(f".{os.getpid()}.part")
            partial.write_text(json.dumps(self._known))
            partial.replace(self._path)
        except OSError:
            pass


def _measured(call: Call) -> int:
    args, kwargs = tree_map(
        lambda x: x.make() if isinstance(x, _Shape) else x, (call.args, call.kwargs)
    )
    device = next((tensor.device for tensor in tensors_in((args, kwargs))), torch.device("cpu"))
    record = record_of(device)
    with torch.no_grad(), torch.random.fork_rng(), record, record.mark(0):
        made = call.func(*args, **kwargs)
    given = {tensor.data_ptr() for tensor in tensors_in((args, kwargs))}
    outputs = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors_in(made)}
    new = sum(whole.nbytes() for whole in outputs.values() if whole.data_ptr() not in given)
    return max(0, record.levels(1)[0] - new)
