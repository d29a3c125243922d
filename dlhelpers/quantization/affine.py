"""How are real numbers written as small integers?

    q = clip(round(x / S) + Z, qmin, qmax)        x' = S (q - Z)

S is the scale (one step), Z the zero point: an integer, so that 0 is represented exactly and
padding with zeros costs nothing. Symmetric means Z = 0. Inside the range |x - x'| <= S / 2.

Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1; Krishnamoorthi 2018, arXiv:1806.08342,
section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Affine", "choose_affine", "dequantize", "quantize"]


@dataclass(frozen=True)
class Affine:
    """A grid of integers: what one step is worth, and which integer is zero.

    Attributes:
        scale: float32; [] for a whole tensor, [C] along ``axis``, or [..., I / group_size] for
            groups along the last dimension.
        zero_point: int32, of the same shape; within [qmin, qmax].
        qmin, qmax: the least and the greatest integer.
        axis: dimension whose channels have a scale each; None for a whole tensor or groups.
        group_size: neighbours along the last dimension that share a scale; None without groups.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    axis: int | None = None
    group_size: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The smallest integer type that holds the grid."""
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
            info = torch.iinfo(dtype)
            if info.min <= self.qmin and self.qmax <= info.max:
                return dtype
        return torch.int64

    @property
    def low(self) -> Tensor:
        """The least number on the grid, float32 of the scale's shape."""
        return self.scale * (self.qmin - self.zero_point)

    @property
    def high(self) -> Tensor:
        """The greatest number on the grid, float32 of the scale's shape."""
        return self.scale * (self.qmax - self.zero_point)

    def spread(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point in a shape that broadcasts with x.

        Raises:
            ValueError: x has not this grid's channels or groups.
        """
        scale, zero_point = self.scale, self.zero_point
        if self.group_size is not None:
            wanted = (*x.shape[:-1], x.shape[-1] // self.group_size)
            if scale.shape != wanted or x.shape[-1] % self.group_size:
                raise ValueError(
                    f"groups of {self.group_size} with scales {list(scale.shape)} do not fit a "
                    f"tensor {list(x.shape)}: the last dimension is divided into groups"
                )
            return tuple(t.repeat_interleave(self.group_size, -1) for t in (scale, zero_point))
        if self.axis is None:
            return scale, zero_point
        axis = self.axis % x.dim() if -x.dim() <= self.axis < x.dim() else None
        if axis is None or x.shape[axis] != scale.numel():
            raise ValueError(
                f"{scale.numel()} scales along dimension {self.axis} do not fit a tensor "
                f"{list(x.shape)}"
            )
        shape = [-1 if d == axis else 1 for d in range(x.dim())]
        return scale.view(shape), zero_point.view(shape)


def choose_affine(
    x: Tensor | tuple[float, float],
    *,
    bits: int = 8,
    signed: bool = True,
    symmetric: bool = False,
    narrow: bool = True,
    axis: int | None = None,
    group_size: int | None = None,
) -> Affine:
    """Return the grid that covers a tensor's values, or a range, from end to end.

    Asymmetric: S = (max - min) / (qmax - qmin), Z = qmin - round(min / S), over a range that is
    widened to hold 0. Symmetric: S = max|x| / qmax and Z = 0, or the middle of an unsigned grid.

    Args:
        x: of floating type; or (low, high).
        bits: 2 to 16.
        signed: from -2^(bits-1), else from 0.
        symmetric: the same range on both sides of 0.
        narrow: of a symmetric signed grid leave -2^(bits-1) out, as for weights; else it is used
            and S = max|x| / (qmax + 0.5).
        axis: a scale for each index of this dimension (0 for weights of convolutions and linear
            layers, 1 for transposed ones).
        group_size: a scale for that many neighbours along the last dimension.

    Raises:
        ValueError: bits out of range, nothing in x, values that are not finite, low > high, both
            axis and group_size, or a last dimension that groups do not divide.

    >>> grid = choose_affine((-1.0, 3.0), signed=False)
    >>> quantize(torch.tensor([-1.0, 0.0, 3.0]), grid).tolist()
    [0, 64, 255]
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must lie between 2 and 16, got {bits}")
    low, high = _ends(x, axis, group_size)
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if symmetric:
        largest = torch.maximum(-low, high)
        if signed:
            qmin, steps = (-qmax, float(qmax)) if narrow else (qmin, qmax + 0.5)
            middle = 0
        else:
            middle = 2 ** (bits - 1)
            steps = float(qmax - middle) if narrow else qmax / 2
        scale = _scale(largest / steps)
        zero_point = torch.full_like(scale, middle, dtype=torch.int32)
    else:
        scale = _scale((high - low) / (qmax - qmin))
        zero_point = torch.round(qmin - low / scale.double()).clamp(qmin, qmax).int()
    return Affine(scale, zero_point, qmin, qmax, axis, group_size)


def _ends(x: Any, axis: int | None, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest values as float64, 0 among them."""
    if not isinstance(x, Tensor):
        low, high = (torch.tensor(float(end), dtype=torch.float64) for end in x)
        if axis is not None or group_size is not None:
            raise ValueError("a range has neither axis nor groups: give the tensor")
    else:
        if not x.dtype.is_floating_point:
            raise ValueError(f"a grid is chosen for floating-point values, got {x.dtype}")
        if not x.numel():
            raise ValueError(f"a tensor {list(x.shape)} has no values to choose a grid for")
        values = x.detach().double()
        if group_size is not None:
            if axis is not None:
                raise ValueError(f"give axis={axis} or group_size={group_size}, not both")
            if group_size < 1 or x.shape[-1] % group_size:
                raise ValueError(
                    f"group_size={group_size} does not divide the last dimension of "
                    f"{list(x.shape)}: pad it, or choose a divisor"
                )
            values = values.unflatten(-1, (-1, group_size))
            low, high = values.amin(-1), values.amax(-1)
        elif axis is not None:
            if not -x.dim() <= axis < x.dim():
                raise ValueError(f"axis={axis} is no dimension of a tensor {list(x.shape)}")
            low, high = (f.flatten(1) for f in [values.movedim(axis, 0).unsqueeze(-1)] * 2)
            low, high = low.amin(1), high.amax(1)
        else:
            low, high = values.min(), values.max()
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError(
            f"the values must be finite, got {low.min().item()} to {high.max().item()}: "
            "look for the first layer whose output is not"
        )
    if bool((low > high).any()):
        raise ValueError(f"low={low.item()} lies above high={high.item()}")
    return low.clamp(max=0), high.clamp(min=0)


def _scale(exact: Tensor) -> Tensor:
    """Round to float32; a range of nothing but zero gets steps of 1."""
    scale = exact.float()
    tiny = torch.finfo(torch.float32).tiny  # below, 1 / S is infinite
    return torch.where(exact == 0, torch.ones_like(scale), scale.clamp(min=tiny))


def quantize(x: Tensor, affine: Affine, *, kernel: Literal["onnx", "torch"] = "onnx") -> Tensor:
    """Return the integers clip(round(x / S) + Z, qmin, qmax), ties to even.

    Args:
        x: of floating type, taken as float32.
        affine: its grid.
        kernel: ``onnx`` divides by S; ``torch`` multiplies by float32 1 / S, as
            ``torch.quantize_per_tensor`` does, which rounds some ties to the other side.

    Returns:
        Integers of ``affine.dtype``, of x's shape.

    Raises:
        ValueError: NaN in x, or x does not fit the grid's channels.

    >>> quantize(torch.tensor([0.5, 1.5, 2.5, 300.0]), choose_affine((0, 255), signed=False))
    tensor([  0,   2,   2, 255], dtype=torch.uint8)
    """
    scale, zero_point = affine.spread(x)
    x = x.detach().float()
    if torch.isnan(x).any():
        raise ValueError("NaN has no integer: look for the first layer whose output is NaN")
    steps = x * (1 / scale) if kernel == "torch" else x / scale
    # float64 holds every float32 and every sum with Z exactly
    q = torch.round(steps).double() + zero_point
    return q.clamp(affine.qmin, affine.qmax).to(affine.dtype)


def dequantize(q: Tensor, affine: Affine) -> Tensor:
    """Return S (q - Z) in float32.

    >>> grid = choose_affine((-1.0, 1.0), symmetric=True)
    >>> dequantize(quantize(torch.tensor([0.0, 1.0]), grid), grid)
    tensor([0., 1.])
    """
    scale, zero_point = affine.spread(q)
    return (q.to(torch.int64) - zero_point).float() * scale
