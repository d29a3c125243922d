"""How is a segment computed again in backward as if that were the first time?

torch.utils.checkpoint restores torch's random state and autocast. What is left is the state of the
modules: their mode, their parameters (``torch.func.functional_call`` lends them others for a
forward), other random streams and attributes (``replaying``), and the buffers that a forward
changes. A recomputation runs on copies of those buffers as they were before forward, put in the
modules' place and taken away afterwards: nothing is counted twice, and no tensor that autograd has
saved is written to. What it gives to backward is compared with what forward had (``verifying``).

(track_running_stats=False for the time of the recomputation does not do for BatchNorm: it would
save two tensors fewer than forward did, a CheckpointError.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dlhelpers.memory.replaying import State, saves_unwritten
from dlhelpers.memory.verifying import Witness
from dlhelpers.trees import flatten

__all__ = ["Pass"]

Key = tuple[str, bool]  # full name of a buffer, is its module training?


class Pass:
    """One forward through one segment, recomputed in each backward through it.

    Args:
        blocks: (name, module, what to call), called one after the other; only the first can have
            several arguments.
        steady: buffers that forwards were seen to leave alone, of which no copies are needed;
            kept by the caller from pass to pass.
        number: of forwards through the segment, this one included, or 0.

    >>> block, steady = nn.BatchNorm1d(4), set()
    >>> output = Pass([("norm", block, block)], steady).run(torch.randn(8, 4))
    >>> output.sum().backward()
    >>> int(block.num_batches_tracked)
    1
    """

    def __init__(
        self, blocks: Sequence[tuple[str, nn.Module, Any]], steady: set[Key], number: int = 0
    ) -> None:
        self._blocks = blocks
        self._steady = steady
        self._modules = [
            (f"{name}.{inner}".rstrip("."), module)
            for name, block, _ in blocks
            for inner, module in block.named_modules()
        ]
        self._own = [dict(module._parameters) for _, module in self._modules]
        self._parameters = [p for own in self._own for p in own.values() if p is not None]
        self._called = [part for _, block, call in blocks for part in (block, call)]
        self._begun = False
        self._witness = Witness(
            self._called, number & (number - 1) == 0 or number % 64 == 0
        )  # 1, 2, 4, ...
        self._versions: list[int] = []  # of the parameters, after forward
        self._training: list[bool] = []  # of the modules, before forward
        self._before: dict[Key, tuple[Tensor, int, Tensor | None]] = {}  # object, version, copy

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Return the last block's output.

        Raises:
            RuntimeError: a block overwrites an argument; or, in backward, a parameter has changed
                since forward, or a block does not compute again what it computed in forward.
        """
        leaves, self._rebuilt = flatten((args, kwargs))
        # an early stop comes in the last saved tensor's hook: before its kernel has written it
        stops = not saves_unwritten(self._called)
        with nullcontext() if stops else set_checkpoint_early_stop(False):
            return checkpoint(self._call, *leaves, use_reentrant=False, preserve_rng_state=True)

    def _call(self, *leaves: Any) -> Any:
        args, kwargs = self._rebuilt(leaves)
        if self._begun:
            with self._as_before(), self._state.restored(), self._witness.watching(True):
                for _, _, call in self._blocks:
                    args, kwargs = (call(*args, **kwargs),), {}
                return args[0]
        self._begun = True
        self._remember()
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        versions = _versions(tensors)
        with self._witness.watching(False):
            for name, _, call in self._blocks:
                self._witness.block = name
                args, kwargs = (call(*args, **kwargs),), {}
                if _versions(tensors) != versions:
                    raise RuntimeError(
                        f"block {name!r} overwrites the input of its segment, which backward "
                        "needs once more: give it inplace=False, or let it work on a clone"
                    )
        self._state.keep_changed()
        self._learn_steady()
        self._versions = _versions(self._parameters)
        return args[0]

    def _remember(self) -> None:
        self._state = State(self._called, [module for _, module in self._modules])
        self._training = [module.training for _, module in self._modules]
        for name, module in self._modules:
            for inner, buffer in module._buffers.items():
                key = (f"{name}.{inner}", module.training)
                if buffer is not None:
                    copied = None if key in self._steady else buffer.detach().clone()
                    self._before[key] = (buffer, _versions([buffer])[0], copied)

    def _learn_steady(self) -> None:
        for name, module in self._modules:
            if getattr(module, "track_running_stats", False):
                continue  # BatchNorm's statistics change without a new version: never steady
            for inner, buffer in module._buffers.items():
                key = (f"{name}.{inner}", module.training)
                if buffer is None or key not in self._before:
                    continue
                old, version, copied = self._before[key]
                same = buffer is old and _versions([buffer])[0] == version
                if copied is not None and same and _equal(buffer, copied):
                    self._steady.add(key)
                    self._before[key] = (old, version, None)
                elif copied is None and not same:
                    self._steady.discard(key)
                    self._before[key] = (old, version, old.detach().clone())
                    if _versions([old])[0] != version:
                        self._witness.forget()
                        warnings.warn(
                            f"buffer {key[0]!r} changed in this forward but not in the first: only "
                            "from the next one on will the recomputation see its value of before",
                            stacklevel=2,
                        )

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        if self._versions and _versions(self._parameters) != self._versions:
            raise RuntimeError(
                f"a parameter in the segment that begins with {self._blocks[0][0]!r} has changed "
                "since forward: call backward before optimizer.step"
            )
        now = [(m, m.training, m._buffers, m._parameters) for _, m in self._modules]
        before = zip(self._modules, self._training, self._own, strict=True)
        for (name, module), training, parameters in before:
            buffers = {}
            for inner, buffer in module._buffers.items():
                copied = self._before.get((f"{name}.{inner}", training), (None, 0, None))[2]
                buffers[inner] = buffer if copied is None else copied.clone()
            module.training, module._buffers = training, buffers
            module._parameters = dict(parameters)
        try:
            yield
        finally:
            for module, training, buffers, parameters in now:
                module.training, module._buffers = training, buffers
                module._parameters = parameters


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _equal(one: Tensor, other: Tensor) -> bool:
    from torch._subclasses import FakeTensor

    return isinstance(one, FakeTensor) or torch.equal(one, other)
