"""What would the step take if its optimizers updated all tensors at once?

After the program's own step, which is left as it is, optimizers of the same kind make a step more,
on copies of its parameters with gradients that stay: one that is as the program's, or one that is
fused, or goes over lists of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlhelpers.profiling.seen import Seen, Trial

__all__ = ["ByTensor", "optimizers_raced"]

_COPIED_BYTES = 2**30  # of parameters, at most


@dataclass(frozen=True)
class ByTensor:
    """Optimizers that update one tensor after another.

    Attributes:
        name: of their kind.
        tensors: how many they update in all.
    """

    name: str
    tensors: int


def optimizers_raced(seen: Seen) -> Iterator[tuple[str, Trial, Trial, ByTensor]]:
    """Give (option, the step and an update more, the same with that option, what it is about).

    Nothing where an optimizer has such updates already, is none of torch's, or where its
    parameters, gradients or options have no such updates.
    """
    if seen.step is None:
        return
    found = [(o, ids) for o, ids in seen.optimizers if ids and _goes_by_tensor(o, ids)]
    if not found:
        return
    held = [p for o, ids in found for p in _parameters(o) if id(p) in ids]
    if sum(p.nbytes for p in held) > _COPIED_BYTES:
        return
    names = sorted({type(optimizer).__name__ for optimizer, _ in found})
    told = ByTensor(" and ".join(names), len(held))
    for option in ("fused", "foreach"):
        if any(option not in optimizer.defaults for optimizer, _ in found):
            continue
        try:
            copies = {id(p): _copy_of(p) for p in held}
            plain = [_twin(o, ids, copies) for o, ids in found]
            other = [_twin(o, ids, copies, option) for o, ids in found]
            for twin in (*plain, *other):
                twin.step()  # makes its state, and refuses what it cannot do
        except Exception:
            continue
        yield option, _with(seen.step, plain), _with(seen.step, other), told


def _goes_by_tensor(optimizer: torch.optim.Optimizer, ids: frozenset[int]) -> bool:
    if not type(optimizer).__module__.startswith("torch.optim."):
        return False
    for group in optimizer.param_groups:
        if "foreach" not in group or group.get("fused") or group["foreach"]:
            return False
        if group.get("differentiable") or group.get("capturable"):
            return False
        on_cpu = all(p.device.type == "cpu" for p in group["params"])
        if group["foreach"] is None and not on_cpu:  # there it is the default
            return False
    graded = [p for p in _parameters(optimizer) if id(p) in ids]
    return len(graded) > 1 and not any(p.is_complex() for p in graded)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _copy_of(parameter: Tensor) -> Tensor:
    made = parameter.detach().clone().requires_grad_()
    made.grad = 1e-3 * torch.randn_like(made)
    return made


def _twin(
    optimizer: torch.optim.Optimizer, ids: frozenset[int], copies: dict[int, Tensor], *options: str
) -> torch.optim.Optimizer:
    groups = []
    for group in optimizer.param_groups:
        held = [copies[id(p)] for p in group["params"] if id(p) in ids]
        if held:
            own = {
                key: value.item() if isinstance(value, Tensor) else value
                for key, value in group.items()
            }
            groups.append(own | dict.fromkeys(options, True) | {"params": held})
    return type(optimizer)(groups, **dict.fromkeys(options, True))


def _with(step: Any, twins: list[torch.optim.Optimizer]) -> Trial:
    """Return the step with the twins' updates after it."""

    def run() -> None:
        step()
        for twin in twins:
            twin.step()

    return run
