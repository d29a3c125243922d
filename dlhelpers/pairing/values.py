"""What do the numbers of a tensor say? Ranges, and axes along which they sum to 1.

Rows sum to 1 "within rounding": about 2e-5 for float32, 4e-3 for bfloat16, 1e-3 for float16,
also where a float32 tensor holds values that were rounded to 16 bits before.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = ["Values", "all_finite"]

_ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-10}


class Values:
    """Lazy, read-only look at a tensor; a sample of it where ``limit`` is passed.

    Attributes:
        readable: False for meta, fake, sparse, quantised, complex tensors and non-tensors.
    """

    def __init__(self, tensor: object, limit: int | None = None):
        self._limit = limit
        self.readable = _is_readable(tensor)
        self._tensor = tensor.detach() if self.readable else None
        self.is_empty = not self.readable or tensor.numel() == 0

    @functools.cached_property
    def _range(self) -> tuple[float, float]:
        if self.is_empty:
            return (math.nan, math.nan)
        part = _sample(self._tensor, None, self._limit)
        part = part.to(torch.uint8) if part.dtype == torch.bool else part
        low, high = torch.aminmax(part)
        return (low.item(), high.item())

    @property
    def low(self) -> float:
        """Smallest value; nan where there is none or one is nan."""
        return self._range[0]

    @property
    def high(self) -> float:
        """Largest value; nan where there is none or one is nan."""
        return self._range[1]

    @property
    def has_nan(self) -> bool:
        """Whether a nan was seen."""
        return not self.is_empty and math.isnan(self.low)

    def within(self, low: float, high: float, slack: float = 1e-6) -> bool:
        """Whether there are values and all lie in [low, high]."""
        return not self.is_empty and self.low >= low - slack and self.high <= high + slack

    def share_outside(self, low: float, high: float) -> float:
        """How much of the values lies outside [low, high], from 0 to 1."""
        if self.is_empty:
            return 0.0
        part = _sample(self._tensor, None, self._limit)
        return ((part < low) | (part > high)).float().mean().item()

    @functools.cached_property
    def distinct(self) -> frozenset[float]:
        """The different values of a sample of at most 4,096 elements."""
        if self.is_empty:
            return frozenset()
        part = _sample(self._tensor, None, 4096).flatten()[:4096]
        return frozenset(torch.unique(part).tolist())

    def sums_to_one(self, axis: int, *, log: bool = False, within: float = 1.0) -> int:
        """Count the telling rows along ``axis`` if all (their exponentials) sum to 1, else 0.

        Raw scores may be 0 and -30, or 0 and 1: a row whose mass is all in one place tells
        nothing. Where no row is telling and all sum to 1 the count is 1.

        ``within`` widens the rounding: 1 to claim that rows are normalised, 4 before claiming
        that they are not.
        """
        if self.is_empty or not self._tensor.is_floating_point() or self.has_nan:
            return 0
        ndim = self._tensor.ndim
        if not -ndim <= axis < ndim or self._tensor.shape[axis] < 2:
            return 0
        key = (axis % ndim, log)
        if key not in self._sums:
            self._sums[key] = self._measure_rows(*key)
        telling, error = self._sums[key]
        return max(1, telling) if error <= within else 0

    @functools.cached_property
    def _sums(self) -> dict[tuple[int, bool], tuple[int, float]]:
        return {}

    def _measure_rows(self, axis: int, log: bool) -> tuple[int, float]:
        """Return the number of telling rows and the largest error in units of the rounding."""
        part = _sample(self._tensor, axis, self._limit or 2**24)
        rounding = _rounding(part)
        classes = part.shape[axis]
        part = part if part.dtype == torch.float64 else part.float()
        if (self.high > rounding) if log else (self.low < -rounding):
            return 0, math.inf
        error = part.logsumexp(dim=axis) if log else part.sum(dim=axis) - 1
        slack = rounding * max(1.0, math.log(classes)) if log else rounding
        telling = part.amax(dim=axis) < -1e-4 if log else part.count_nonzero(dim=axis) > 1
        return int(telling.sum()), (error.abs().max() / (slack + classes * 6e-8)).item()


def all_finite(value: object) -> bool:
    """Whether no nan or inf is seen; True for what has no values that can be read."""
    if not isinstance(value, Tensor):
        return True
    try:
        if value.numel() == 1:
            return math.isfinite(value.item())
        return bool(value.detach().isfinite().all())
    except Exception:  # meta, fake, sparse, complex and other tensors each have their own error
        return True


def _is_readable(tensor: object) -> bool:
    """Whether numbers can be read: tried on one element, since subclasses may refuse."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        return False
    if tensor.is_quantized or tensor.is_complex():
        return False
    try:
        tensor.detach()[(slice(0, 1),) * tensor.ndim].tolist()
    except Exception:  # meta, fake, functorch and other wrappers each have their own error
        return False
    return tensor.device.type != "meta"


def _sample(tensor: Tensor, keep: int | None, limit: int | None) -> Tensor:
    """Narrow every axis but ``keep``, the largest first, until at most ``limit`` remain."""
    while limit is not None and tensor.numel() > limit:
        others = [axis for axis in range(tensor.ndim) if axis != keep and tensor.shape[axis] > 2]
        if not others:
            break
        axis = max(others, key=lambda place: tensor.shape[place])
        wanted = max(2, tensor.shape[axis] * limit // tensor.numel())
        tensor = tensor.narrow(axis, 0, wanted)
    return tensor


def _rounding(tensor: Tensor) -> float:
    """How far from 1 a sum of rounded values may be."""
    if tensor.dtype in _ROUNDING:
        return _ROUNDING[tensor.dtype]
    for dtype, rounding in _ROUNDING.items():
        if tensor.to(dtype).to(tensor.dtype).equal(tensor):
            return rounding
    return 2e-5
