"""How far is a quantized output from the float one: in all, and for the worst samples?

    SQNR = 10 log10(sum y^2 / sum (y - y')^2)  dB

The literature's figure is one sum over all samples, in which one sample of large values hides the
others: a pixel of 1,000 in one image is most of the signal. What decides here is therefore taken
for each sample.

Source: Krishnamoorthi 2018, arXiv:1806.08342, for quantization; the quantile over samples and the
floor under their signal are this package's own rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["sample_sqnr_db", "sqnr_db"]

QUANTILE, FEW = 0.1, 20  # of the samples; with fewer than that, the minimum
FLOOR = 0.01  # of the median sample's power: a quiet sample does not condemn

Tensors = Sequence[Sequence[Tensor]]


def sqnr_db(wanted: Tensors, found: Tensors) -> float:
    """Return the signal-to-quantization-noise ratio in dB of the worst output, over all samples.

        10 log10(sum y^2 / sum (y - y')^2)

    Args:
        wanted, found: for each batch the output's tensors; whole numbers are not looked at.

    Returns:
        Infinite where nothing differs; minus infinite where a value is not finite or shapes differ.

    Source: Krishnamoorthi 2018, arXiv:1806.08342. ``sample_sqnr_db`` is what decides on a backend.

    >>> round(sqnr_db([[torch.tensor([3.0, 4.0])]], [[torch.tensor([3.0, 4.5])]]), 1)
    20.0
    """
    powers = _powers(wanted, found, per_sample=False)
    if powers is None:
        return -math.inf
    sums = ((sum(map(float, signal)), sum(map(float, noise))) for signal, noise in powers)
    return min((_db(signal, noise) for signal, noise in sums), default=math.inf)


def sample_sqnr_db(wanted: Tensors, found: Tensors) -> float:
    """Return the SQNR in dB that nine of ten samples reach, of the worst output.

        SQNR_i = 10 log10(max(P_i, 0.01 median P) / N_i)

    with P_i and N_i the means of y^2 and of (y - y')^2 over sample i; the median is taken over the
    samples that are not zero throughout. The 10 % quantile of SQNR_i is returned from 20 samples
    up, else the minimum.

    Args:
        wanted, found: for each batch the output's tensors [N, ...], the samples along the first
            axis; a tensor without dimensions is one sample. Whole numbers are not looked at.

    Returns:
        Infinite where nothing differs; minus infinite where a value is not finite or shapes differ.

    Source: the formula is ``sqnr_db``'s for one sample; floor and quantile are this package's own.

    >>> y = torch.tensor([[1000.0], [1.0], [1.0]])  # an outlier and two ordinary samples
    >>> z = y + torch.tensor([[0.0], [0.5], [0.1]])
    >>> round(sqnr_db([[y]], [[z]])), round(sample_sqnr_db([[y]], [[z]]))
    (66, 6)
    """
    powers = _powers(wanted, found, per_sample=True)
    if powers is None:
        return -math.inf
    worst = math.inf
    for signal, noise in powers:
        signal, noise = torch.cat(signal), torch.cat(noise)
        if not signal.numel():
            continue
        heard = signal[signal > 0]  # after a ReLU most samples may be zero
        floored = signal.clamp(min=FLOOR * float(heard.quantile(0.5))) if len(heard) else signal
        pairs = zip(floored.tolist(), noise.tolist(), strict=True)
        worst = min(worst, _low(sorted(_db(s, n) for s, n in pairs)))
    return worst


def _low(ordered: list[float]) -> float:
    """Return the 10 % quantile, or of few values the least."""
    if len(ordered) < FEW:
        return ordered[0]
    place = QUANTILE * (len(ordered) - 1)
    low, high = ordered[int(place)], ordered[math.ceil(place)]
    if low == high or not math.isfinite(high - low):
        return low
    return low + (place - int(place)) * (high - low)


def _powers(
    wanted: Tensors, found: Tensors, *, per_sample: bool
) -> list[tuple[list[Tensor], list[Tensor]]] | None:
    """Return (signal, noise) for each output, a tensor for each batch; None for nonsense.

    The sums over a batch, or the means over each of its samples.
    """
    powers: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    for ys, zs in zip(wanted, found, strict=True):
        if len(ys) != len(zs):
            return None
        for place, (y, z) in enumerate(zip(ys, zs, strict=True)):
            if not y.dtype.is_floating_point:
                continue
            if y.shape != z.shape or not torch.isfinite(z).all():
                return None
            if not y.numel():
                continue
            y, z = y.detach().double(), z.detach().double()
            signal, noise = powers.setdefault(place, ([], []))
            for into, values in ((signal, y), (noise, y - z)):
                squares = values.square()
                rows = squares.reshape(len(y) if y.dim() else 1, -1)
                into.append(rows.mean(1) if per_sample else squares.sum())
    return list(powers.values())


def _db(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
