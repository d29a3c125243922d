"""Whom does a weight weigh? Where its shape fits two axes, torch takes the last and says nothing.

``pos_weight`` and ``weight`` of the binary losses are broadcast from the last axis on: of shape
(C,) they weigh the columns of (N, C, H, W) as soon as W equals C. GaussianNLLLoss does the
reverse: it reads a variance of shape (N,) before (N, C) as one per sample.
Source: https://pytorch.org/docs/stable/generated/torch.nn.BCEWithLogitsLoss.html
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .calls import LossCall
from .catalog import Hit

__all__ = ["weight_hits"]

_BROADCAST = {
    "binary_cross_entropy": ("weight",),
    "binary_cross_entropy_with_logits": ("weight", "pos_weight"),
    "multilabel_soft_margin_loss": ("weight",),
}


def weight_hits(call: LossCall) -> Iterator[Hit]:
    """Yield the weights of one call that are broadcast along an axis they may not be meant for."""
    x = call.prediction
    if not isinstance(x, Tensor):
        return
    for name in _BROADCAST.get(call.name, ()):
        weight = call.options.get(name)
        if isinstance(weight, Tensor) and weight.numel() > 1:
            yield from _one_weight(call, name, weight, x)
    if call.name == "gaussian_nll_loss":
        yield from _variance(x, call.options.get("var"))


def _one_weight(call: LossCall, name: str, weight: Tensor, x: Tensor) -> Iterator[Hit]:
    shapes = f"{name} {tuple(weight.shape)}, prediction {tuple(x.shape)}"
    try:
        joint = torch.broadcast_shapes(weight.shape, x.shape)
    except RuntimeError:  # torch raises
        return
    if math.prod(joint) > x.numel():
        if call.name == "multilabel_soft_margin_loss":  # the others raise
            yield Hit(
                "weight-over-wrong-axis",
                "error",
                f"{shapes} are broadcast to {tuple(joint)}: every weight meets every sample",
                "rule",
                remedy=f"{name} = {name}.flatten()[:, None]",
            )
        return
    wide = [axis for axis in range(-weight.ndim, 0) if weight.shape[axis] > 1]
    if len(wide) != 1:
        return
    size, axis = weight.shape[wide[0]], x.ndim + wide[0]
    if x.ndim > 2 and axis > 1 and x.shape[1] == size:
        slots = ", ".join([":", *["None"] * (x.ndim - 2)])
        where = "columns" if axis == x.ndim - 1 and x.ndim == 4 else f"positions on axis {axis}"
        yield Hit(
            "weight-over-wrong-axis",
            "suspicion",
            f"{shapes}: it weighs {where}, and axis 1 has {size} entries as well",
            "rule",
            remedy=f"{name} = {name}.flatten()[{slots}]  # one per class, classes on axis 1",
        )
    elif name == "weight" and x.ndim == 2 and weight.ndim == 1 and x.shape[0] == size:
        yield Hit(
            "weight-over-wrong-axis",
            "suspicion",
            f"{shapes}: it weighs the {size} columns, and there are {size} samples as well",
            "rule",
            remedy="weight = weight[:, None]  # one per sample; weight[None] for one per class",
        )


def _variance(x: Tensor, var: object) -> Iterator[Hit]:
    """(N,) before (N, C) is one variance per sample; where N equals C it may be one per column."""
    if not isinstance(var, Tensor) or var.ndim == 0 or var.shape == x.shape:
        return
    if x.ndim == var.ndim + 1 and var.shape == x.shape[:-1] and var.shape[-1:] == x.shape[-1:]:
        size = x.shape[-1]
        if size > 1:
            yield Hit(
                "weight-over-wrong-axis",
                "suspicion",
                f"var {tuple(var.shape)}, prediction {tuple(x.shape)}: it is one variance per "
                f"row, and a row has {size} columns as well",
                "rule",
                why="GaussianNLLLoss reads a variance with one axis less as one per row.",
                remedy="var = var.unsqueeze(-1)  # one per row; var.expand_as(prediction) for one "
                "per column",
            )
