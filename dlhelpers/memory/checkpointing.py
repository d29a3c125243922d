"""What if activations are computed twice instead of kept? The same training step in fewer bytes.

A chain of N blocks cut into k segments keeps the inputs of the segments and, while backward passes
through one of them, what that one would have kept anyway:

    peak(k) ~ k + N / k blocks,    smallest at k = sqrt(N)

Source: Chen et al. 2016, arXiv:1604.06174; torch.utils.checkpoint does the recomputation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.memory.recomputing import Pass
from dlhelpers.memory.replaying import KEPT_IN_MODULES
from dlhelpers.models import copied, need_module
from dlhelpers.reached import generators_in
from dlhelpers.trees import tensors_in

__all__ = ["checkpoint_blocks", "checkpoint_plan"]

Segments = tuple[tuple[str, ...], ...]

# in eval mode, or always, their output is their input or a view of it
_MAY_RETURN_INPUT = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)


def checkpoint_blocks(
    model: nn.Module,
    segments: int | str = "auto",
    *,
    inputs: Any = None,
    optimizer: Any = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> nn.Module:
    """Return a copy that keeps the inputs of its segments only and computes the rest once more.

    The copy shares parameters and buffers with the model and has its names; outputs, gradients,
    buffers and random state after a step equal the model's: Python's, NumPy's and torch's, and that
    of every generator that a block holds or reaches by closure or global. BatchNorm counts a batch
    once, and so does a Python counter in a module, whereas plain checkpointing updates them in the
    recomputation as well.

    Every outermost ``nn.Sequential`` is a part: a chain of blocks (nested chains count as one)
    that is cut into segments. In an outermost ``nn.ModuleList`` each element that has children
    is a segment of its own. An in-place block goes with the block before it.

    Args:
        model: on its device already, as ``to`` on one of the two would move half of the other.
        segments: number over all Sequential parts, shared out by their number of blocks; fewer
            than there are parts go to the longest ones; 0, where there is a ModuleList, to none.
            "auto": as many as make the estimated peak smallest; none at all if that is plain.
        inputs, optimizer, loss: for "auto", as for ``estimate``.

    Raises:
        ValueError: the model has neither part nor list, segments is out of range, or "auto" is
            without inputs.
        RuntimeError: in training, where the result would be silently wrong: a block overwrites
            its segment's input, a parameter changes before backward, a part lost or got blocks, or
            a block does not compute again what it computed in forward (a stream that cannot be
            replayed, a counter outside of the module); samples of its tensors are compared in the
            steps 1, 2, 4, 8 and so on, and in every 64th.

    Cost: one more forward of the checkpointed parts a step, and a copy of each buffer that a
    forward changes; hooks inside them may run twice, and what a forward changes outside of its
    modules (a list that is global) changes twice.
    Source: arXiv:1604.06174; BatchNorm: pytorch#62471, pytorch#96136, fairscale#1035.

    >>> model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(9)))
    >>> checkpointed = checkpoint_blocks(model, segments=3)
    >>> checkpoint_plan(checkpointed)
    (('', (('0', '1', '2'), ('3', '4', '5'), ('6', '7', '8'))),)
    """
    need_module(model, "checkpoint")
    parts, lists = _found(model)
    most, least = sum(len(part.starts) for part in parts), 0 if lists else 1
    if not parts and not lists:
        raise ValueError(
            f"{type(model).__name__} has nothing to cut into segments: it needs an nn.Sequential, "
            "or an nn.ModuleList with two blocks or more that have children"
        )
    if segments == "auto":
        if inputs is None:
            raise ValueError('segments="auto" estimates the peak and needs inputs for that')
        peak = partial(_estimated_peak, model, inputs, optimizer, loss)
        chosen = _smallest(peak, least, most)
    elif isinstance(segments, int) and least <= segments <= most:
        chosen = int(segments)
    else:
        parted = f"a whole number from {least} to {most}" if most else "0"
        lists_too = "; each element of an nn.ModuleList is a segment anyway" if lists else ""
        raise ValueError(f'segments must be "auto" or {parted}, got {segments!r}{lists_too}')
    copied = _sharing_copy(model)
    if chosen is None:
        return copied
    for part, count in zip(parts, _shares(parts, chosen), strict=True):
        if count:
            _inject(copied.get_submodule(part.name), part.name, part.cut(count))
    for full in (f"{name}.{e}".lstrip(".") for name, elements in lists for e in elements):
        _inject(copied.get_submodule(full), full, None)
    return copied


def checkpoint_plan(model: nn.Module) -> tuple[tuple[str, Segments], ...]:
    """Return (part, its segments as names of blocks inside it) for every checkpointed part.

    >>> checkpoint_plan(nn.Sequential(nn.Linear(8, 8)))
    ()
    """
    plan: dict[str, Segments] = {}
    for module in model.modules():
        name, segments = vars(module).get("_dlhelpers_checkpointed", (None, None))
        if segments is not None:
            plan[name] = segments
        elif name is not None:
            owner, _, element = name.rpartition(".")
            plan[owner] = (*plan.get(owner, ()), (element,))
    return tuple(plan.items())


@dataclass(frozen=True)
class _Part:
    name: str
    blocks: tuple[str, ...]
    starts: tuple[int, ...]  # blocks that may be the first of a segment

    def cut(self, count: int) -> Segments:
        cuts = [self.starts[i * len(self.starts) // count] for i in range(count)]
        ends = [*cuts[1:], len(self.blocks)]
        return tuple(self.blocks[a:b] for a, b in zip(cuts, ends, strict=True))


def _found(model: nn.Module) -> tuple[list[_Part], list[tuple[str, tuple[str, ...]]]]:
    """Walk from the root down to the parts and lists, not into them."""
    parts: list[_Part] = []
    lists: list[tuple[str, tuple[str, ...]]] = []
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> None:
        if module in seen:
            return
        seen.add(module)
        if _is_sequential(module):
            chain = list(_chain(module))
            names, blocks = [n for n, _ in chain], [block for _, block in chain]
            starts = tuple(i for i in range(len(blocks)) if _may_start(blocks[i:]))
            if starts:
                parts.append(_Part(name, tuple(names), starts))
            return
        if isinstance(module, nn.ModuleList):
            elements = {n: e for n, e in module.named_children() if _is_block(e)}
            if len(elements) >= 2:
                lists.append((name, tuple(elements)))
                return
        for inner, child in module.named_children():
            walk(child, f"{name}.{inner}".lstrip("."))

    walk(model, "")
    return parts, lists


def _forward_of(module: nn.Module) -> Any:
    if "forward" in vars(module):
        return vars(module)["forward"]
    classes = (vars(cls) for cls in type(module).__mro__ if cls is not _Checkpointed)
    return next(names["forward"] for names in classes if "forward" in names)


def _is_sequential(module: nn.Module) -> bool:
    return _forward_of(module) is nn.Sequential.forward


def _is_block(module: nn.Module) -> bool:
    return _forward_of(module) is not nn.Module.forward and any(True for _ in module.children())


def _chain(part: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in part._modules.items():
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if _is_sequential(child) and not any(getattr(child, kind) for kind in hooks):
            yield from _chain(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _may_start(blocks: Iterable[nn.Module]) -> bool:
    """Say whether a segment of these leaves its input alone, as far as can be seen from outside."""
    for block in blocks:
        if getattr(block, "inplace", False) or not isinstance(block, _MAY_RETURN_INPUT):
            return not getattr(block, "inplace", False)
    return True


def _shares(parts: list[_Part], segments: int) -> list[int]:
    most = [len(part.starts) for part in parts]
    if segments < len(parts):
        longest = sorted(range(len(parts)), key=lambda i: -len(parts[i].blocks))[:segments]
        return [int(i in longest) for i in range(len(parts))]
    total = sum(len(part.blocks) for part in parts)
    ideal = [segments * len(part.blocks) / total for part in parts]
    shares = [min(max(1, int(i)), m) for i, m in zip(ideal, most, strict=True)]
    while sum(shares) != segments:
        step = 1 if sum(shares) < segments else -1
        able = [i for i, n in enumerate(shares) if 1 <= n + step <= most[i]]
        shares[max(able, key=lambda i: step * (ideal[i] - shares[i]))] += step
    return shares


def _smallest(peak: Callable[[int | None], int], least: int, most: int) -> int | None:
    """Descend from sqrt(most) on a coarse grid, then in halving steps: a look takes a second.

    None where plain is no worse; of equals the smaller number.
    """
    known: dict[int, int] = {}

    def cost(k: int) -> tuple[int, int]:
        if k not in known:
            known[k] = peak(k)
        return known[k], k

    steps = (k for e in range(most.bit_length()) for k in (2**e, 3 * 2**e))
    grid = sorted({least, most, *(k for k in steps if k < most)})
    at = min(range(len(grid)), key=lambda i: abs(grid[i] - math.sqrt(most)))
    while True:
        near = range(max(0, at - 1), min(len(grid), at + 2))
        if (best := min(near, key=lambda i: cost(grid[i]))) == at:
            break
        at = best
    chosen, step = grid[at], (grid[near[-1]] - grid[near[0]]) // 2
    while step:
        legal = (k for k in (chosen - step, chosen, chosen + step) if least <= k <= most)
        if (better := min(legal, key=cost)) == chosen:
            step //= 2
        chosen = better
    return chosen if cost(chosen)[0] < peak(None) else None


def _estimated_peak(model: nn.Module, inputs: Any, optimizer: Any, loss: Any, k: int | None) -> int:
    from dlhelpers.memory.estimating import estimate

    return estimate(model, inputs, optimizer, loss=loss, checkpoint=k).peak_bytes


def _sharing_copy(model: nn.Module) -> nn.Module:
    """Copy the modules, not the tensors and generators, and take away an earlier plan."""
    held = tensors_in([vars(module) for module in model.modules()], once=True)
    shared = [*held, *generators_in([model])]
    made = copied(model, {id(value): value for value in shared})
    for module in made.modules():
        for name in KEPT_IN_MODULES:
            vars(module).pop(name, None)
        if "_dlhelpers_plain" in vars(type(module)):
            module.__class__ = type(module)._dlhelpers_plain
    return made


def _inject(module: nn.Module, name: str, segments: Segments | None) -> None:
    vars(module).update(zip(KEPT_IN_MODULES, ((name, segments), set(), 0), strict=True))
    if not isinstance(module, _Checkpointed):
        module.__class__ = _checkpointed_class(type(module))


def _checkpointed_class(plain: type[nn.Module]) -> type[nn.Module]:
    names = {
        "_dlhelpers_plain": plain,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
    }
    return type(plain.__name__, (_Checkpointed, plain), names)


def _unpickled(plain: type[nn.Module]) -> nn.Module:
    cls = _checkpointed_class(plain)
    return cls.__new__(cls)


class _Checkpointed(nn.Module):
    """Goes in front of a module's class, so that isinstance, names and hooks stay."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (self._dlhelpers_plain,), self.__getstate__()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name, segments = vars(self).get("_dlhelpers_checkpointed", (None, None))
        if name is None or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        self._dlhelpers_passes += 1
        if segments is None:
            whole = (name, self, super().forward)
            return Pass([whole], self._dlhelpers_steady, self._dlhelpers_passes).run(
                *args, **kwargs
            )
        chain = dict(_chain(self))
        cut = [block for segment in segments for block in segment]
        before = list(chain)[: len(chain) - len(cut)]
        if [*before, *cut] != list(chain):
            raise RuntimeError(
                f"blocks of {name or 'the model'!r} or hooks on its nested chains have changed: "
                "call checkpoint_blocks again"
            )
        (value,) = (*args, *kwargs.values())
        for block in before:  # work in place on the part's input
            value = chain[block](value)
        for segment in segments:
            blocks = [(f"{name}.{b}".lstrip("."), chain[b], chain[b]) for b in segment]
            value = Pass(blocks, self._dlhelpers_steady, self._dlhelpers_passes).run(value)
        return value
