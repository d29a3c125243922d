"""Are two pairs of activation and loss the same function?

They are where loss and gradient agree for the same outputs. Each difference is taken relative to
the larger of 1 and the value, in float64: |a - b| / max(1, |a|); equal infinities differ by 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["largest_difference"]

Pair = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def largest_difference(
    first: Pair, second: Pair, outputs: torch.Tensor, targets: torch.Tensor
) -> float:
    """Return the largest relative difference of loss and gradient of two pairs.

    Args:
        first, second: (outputs, targets) -> scalar loss, such as
            ``lambda z, y: F.nll_loss(F.log_softmax(z, 1), y)``.
        outputs: what the model's last linear layer gives, any floating dtype; untouched.
        targets: as both losses want them.

    Returns:
        0.0 where both agree to the last bit; nan where exactly one of the two is nan.

    >>> from torch.nn import functional as F
    >>> z, y = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    >>> largest_difference(F.cross_entropy, lambda z, y: F.nll_loss(z.log_softmax(1), y), z, y)
    0.0
    """
    found = []
    for pair in (first, second):
        leaf = outputs.detach().clone().requires_grad_()
        loss = pair(leaf, targets)
        (gradient,) = torch.autograd.grad(loss, leaf)
        found.append(torch.cat([loss.detach().reshape(1), gradient.reshape(-1)]).double())
    one, other = found
    difference = (one - other).abs() / one.abs().clamp(min=1)
    same = (one == other) | (one.isnan() & other.isnan())
    return difference.masked_fill(same, 0).max().item()
