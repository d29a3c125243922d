"""How many bytes does a kernel take inside and give back? Run that one operator and see.

A convolution may unfold its input, reorder its weight or reduce in parts. What it takes depends on
operator, shapes, library and machine, so it is measured once for each and kept.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dlhelpers.fakes import dense_parts
from dlhelpers.files import cache_dir, write_whole
from dlhelpers.memory.allocator import record_of
from dlhelpers.memory.calls import Call, Shape
from dlhelpers.trees import tensors_in

__all__ = ["Scratch", "whole_of"]


_SMALL = 64 << 20  # bytes of arguments that a trial is always worth
_TRIALS_S = 5.0  # seconds for all trials of one estimate
_FEW_FLOPS = 1e8  # a trial that even a kernel without instructions for its type ends in a second
_OUT_OF_CACHE = 3.0  # times as long as a small product for each FLOP


def whole_of(call: Call) -> int:
    """Return the bytes of the storage that a loss returns its one number in; 0 if just the number.

    A mean is taken in place in some kernels, as ``mse_loss`` does: two numbers show it.
    """
    shapes = [shape for shape in call.shapes if shape.size]
    try:
        few = torch.zeros(2, dtype=shapes[0].dtype, device=shapes[0].device)
        made = call.func(few, few)
        whole = torch.broadcast_shapes(*(shape.size for shape in shapes[:2]))
    except Exception:  # of other arguments, or no such device here
        return 0
    is_whole = made.numel() == 1 and made.untyped_storage().nbytes() > made.nbytes
    return made.itemsize * prod(whole) if is_whole else 0


class Scratch:
    """Bytes inside kernels, measured once for each operator and shape on this machine.

    Attributes:
        untried: operator -> why its bytes count as nothing.
    """

    def __init__(self) -> None:
        from dlhelpers.machine import describe

        self._at_most = (describe().ram_bytes or 4 << 30) // 16  # for one operator's arguments
        self._until = time.monotonic() + _TRIALS_S
        build = (torch.__version__, torch.get_num_threads(), torch.backends.mkldnn.enabled)
        name = hashlib.sha256(repr((describe().key, build)).encode()).hexdigest()[:12]
        self._path = cache_dir() / f"scratch-{name}.json"
        try:
            known = json.loads(self._path.read_text())
        except (OSError, ValueError):
            known = None
        self._known: dict[str, int] = known if isinstance(known, dict) else {}
        self._new = 0
        self._flops_per_s: dict[torch.dtype, float] = {}
        self.untried: dict[str, str] = {}

    def bytes_of(self, call: Call) -> int:
        """Return how many bytes more than its outputs the operator takes while it runs."""
        size = sum(shape.nbytes for shape in call.shapes)
        is_large = size > _SMALL or self._predicted_s(call) > self._left_s
        if is_large and (found := self._from_smaller(call)) is not None:
            return found
        return self._tried(call.key, call, lambda: _measured(call))

    @property
    def _left_s(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def _predicted_s(self, call: Call) -> float:
        """Return what a trial may take in a type that may have no fast kernel here; else 0.

        One product of a few thousand rows in bfloat16 can take minutes where float32 takes none.
        """
        if _hashed(call.key) in self._known or not call.shapes or call.is_sparse:
            return 0.0
        dtype = max(call.shapes, key=lambda shape: shape.nbytes).dtype
        if dtype not in (torch.bfloat16, torch.float16) or (flops := _flops_of(call)) < _FEW_FLOPS:
            return 0.0
        if dtype not in self._flops_per_s:
            self._flops_per_s[dtype] = _flops_per_s(dtype)
        return _OUT_OF_CACHE * flops / self._flops_per_s[dtype]

    def _tried(self, name: str, call: Call, measure: Callable[[], int]) -> int:
        key = _hashed(name)
        if key not in self._known:
            if sum(shape.nbytes for shape in call.shapes) > self._at_most:
                self.untried[str(call.func)] = "its arguments are too large for a trial here"
                return 0
            if time.monotonic() > self._until:
                self.untried[str(call.func)] = f"trials took more than {_TRIALS_S:g} s already"
                return 0
            if (seconds := self._predicted_s(call)) > self._left_s:
                self.untried[str(call.func)] = (
                    f"a trial in its type may take {seconds:.0f} s on this machine"
                )
                return 0
            try:
                self._known[key] = measure()
            except (RuntimeError, ValueError, NotImplementedError, IndexError) as error:
                self.untried[str(call.func)] = str(error).partition("\n")[0]
                return 0
            self._new += 1
        return self._known[key]

    def workspace_of(self, call: Call) -> int:
        """Return the bytes that oneDNN's recurrent layer keeps for backward; a fake one none."""

        def measure() -> int:
            args = tree_map(lambda x: x.make(False) if isinstance(x, Shape) else x, call.args)
            return _workspace(args[:7], args[7:]).nbytes

        return self._tried(f"workspace {call.key}", call, measure)

    def _from_smaller(self, call: Call) -> int | None:
        """Follow the straight line through two small batches, which a kernel's buffers lie on."""
        few, more = call.with_batch(2), call.with_batch(4)
        if few is None or more is None or few.key == call.key:
            return None
        if sum(shape.nbytes for shape in more.shapes) > 4 * _SMALL:
            return None
        batch = call.shapes[0].size[0]
        at_2, at_4 = self.bytes_of(few), self.bytes_of(more)
        return max(0, at_2 + (at_4 - at_2) * (batch - 2) // 2)

    def keep(self) -> None:
        """Write what is new to the cache; a folder that cannot be written costs only time."""
        if not self._new:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            known = json.dumps(self._known)
            write_whole(self._path, (), lambda name: Path(name).write_text(known))
        except OSError:
            pass


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _workspace(tensors: tuple[Tensor, ...], flags: tuple[Any, ...]) -> Tensor:
    """Run oneDNN's recurrent layer forward; return what it keeps for backward."""
    with torch.enable_grad():  # without gradients it keeps nothing
        needing = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.ops.aten.mkldnn_rnn_layer.default(*needing, *flags)[-1].detach()


def _flops_of(call: Call) -> int:
    """Return an operator's FLOPs from its shapes; 0 where torch has no formula for it."""
    from torch.utils.flop_counter import FlopCounterMode

    def empty(value: Any) -> Any:
        if not isinstance(value, Shape):
            return value
        return torch.empty_strided(value.size, value.stride, dtype=value.dtype, device="meta")

    args, kwargs = tree_map(empty, (call.args, call.kwargs))
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call.func(*args, **kwargs)
    except Exception:  # no kernel without data, which a formula would not be for either
        return 0
    return counter.get_total_flops()


def _flops_per_s(dtype: torch.dtype) -> float:
    """Return the rate of a product that takes a tenth of a second in the slowest type."""
    n = 256
    x = torch.ones(n, n, dtype=dtype)
    best = float("inf")
    for _ in range(2):  # something may be made ready in the first call
        start = time.monotonic()
        torch.mm(x, x)
        best = min(best, time.monotonic() - start)
    return 2 * n**3 / max(best, 1e-6)


def _measured(call: Call) -> int:
    random = "linalg" in str(call.func)  # an algorithm that ends early on zeros
    with torch.random.fork_rng():
        torch.manual_seed(0)
        args, kwargs = tree_map(
            lambda x: x.make(random) if isinstance(x, Shape) else x, (call.args, call.kwargs)
        )
        if str(call.func) == "aten.mkldnn_rnn_layer_backward.default":
            reverse, *sizes, has_biases, train, bidirectional, batches, first = args[13:22]
            flags = (reverse, batches, *sizes, has_biases, bidirectional, first, train)
            args = (*args[:22], _workspace(args[:7], flags))  # crashes on one that is not filled
        given = {s.data_ptr() for t in tensors_in((args, kwargs)) for s in _storages(t)}
        device = next((tensor.device for tensor in tensors_in((args, kwargs))), torch.device("cpu"))
        record = record_of(device)
        with torch.no_grad(), record, record.mark(0):
            made = call.func(*args, **kwargs)
    outputs = {s._cdata: s for t in tensors_in(made) for s in _storages(t)}
    new = sum(whole.nbytes() for whole in outputs.values() if whole.data_ptr() not in given)
    return max(0, record.levels(1)[0] - new)


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    return [part.untyped_storage() for part in dense_parts(tensor)]
