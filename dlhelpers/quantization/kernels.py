"""What does an integer layer compute, to the last bit?

With u8 inputs, s8 weights and int32 accumulators

    y = Sx Sw [sum qx qw - Zw sum qx - Zx sum qw + N Zx Zw]

and one multiplication by M = Sx Sw / Sy brings the accumulator to the output's grid. Kernels agree
on the accumulators and differ in how they round the last step.

Source: Jacob et al. 2018, arXiv:1712.05877, sections 2.2 to 2.4.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dlhelpers.quantization.affine import Affine

__all__ = ["conv_accumulate", "fixed_point", "linear_accumulate", "requantize"]

Kernel = Literal["onnx", "fbgemm", "qnnpack", "onednn", "fixed point"]
_KERNELS = ("onnx", "fbgemm", "qnnpack", "onednn", "fixed point")


def linear_accumulate(
    qx: Tensor, qw: Tensor, *, x_zero: int = 0, w_zero: int | Tensor = 0
) -> Tensor:
    """Return sum over i of (qx - Zx)(qw - Zw), the int32 accumulators of a linear layer.

    Args:
        qx: integers [..., I] on the inputs' grid.
        qw: integers [O, I] on the weights' grid.
        x_zero: the inputs' zero point.
        w_zero: the weights' zero point, or one for each output [O].

    Raises:
        OverflowError: a sum does not fit into int32.

    >>> linear_accumulate(torch.tensor([[3, 4]]), torch.tensor([[1, -2]]), x_zero=2)
    tensor([[-3]], dtype=torch.int32)
    """
    weight = qw.double() - torch.as_tensor(w_zero).double().view(-1, 1)
    return _int32(F.linear(qx.double() - x_zero, weight))


def conv_accumulate(
    qx: Tensor,
    qw: Tensor,
    *,
    x_zero: int = 0,
    w_zero: int | Tensor = 0,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """Return the int32 accumulators of a convolution in one, two or three dimensions.

    The padding is real zero, so the integer Zx, which counts nothing.

    Args:
        qx: integers [N, C, ...] on the inputs' grid.
        qw: integers [O, C / groups, ...] on the weights' grid.
        x_zero, w_zero: as in :func:`linear_accumulate`.
        stride, padding, dilation, groups: as of ``torch.nn.functional.conv2d``.

    Raises:
        OverflowError: a sum does not fit into int32.
        ValueError: other than one to three dimensions of space.
    """
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}.get(qw.dim())
    if convolve is None:
        raise ValueError(f"a convolution's weights have 3 to 5 dimensions, got {list(qw.shape)}")
    zero = torch.as_tensor(w_zero).double().view(-1, *[1] * (qw.dim() - 1))
    # products and sums of 8-bit integers are exact in float64, in any order, up to 2^53
    summed = convolve(
        qx.double() - x_zero, qw.double() - zero, None, stride, padding, dilation, groups
    )
    return _int32(summed)


def _int32(exact: Tensor) -> Tensor:
    if exact.numel() and exact.abs().max() >= 2**31:
        raise OverflowError(
            f"an accumulator reaches {exact.abs().max().item():.3g}, beyond int32: "
            "fewer products a sum or fewer bits"
        )
    return exact.round().int()


def requantize(
    accumulators: Tensor,
    x_scale: float | Tensor,
    w_scale: float | Tensor,
    output: Affine,
    *,
    bias: Tensor | None = None,
    channel: int = 1,
    kernel: Kernel = "onnx",
) -> Tensor:
    """Return accumulators times M = Sx Sw / Sy on the output's grid, as a kernel rounds them.

    =============  ==============================================================================
    ``onnx``       bias as int32 in steps of Sx Sw; float32 M; ties to even, then Z is added
    ``qnnpack``    the same
    ``fbgemm``     the bias stays real: (a + b / (Sx Sw)) M; else the same
    ``onednn``     (a Sx Sw + b) / Sy + Z in float32; rounded once, Z included
    fixed point    M = 2^-n M0 in int32 alone: ties of the product up, of the shift away from 0
    =============  ==============================================================================

    Args:
        accumulators: int32.
        x_scale: of the inputs.
        w_scale: of the weights, or one for each output channel [O].
        output: the output's grid, one scale.
        bias: float32 [O], added before rounding; None for none.
        channel: dimension of the output channels; -1 for linear layers.
        kernel: whose rounding.

    Returns:
        Integers of ``output.dtype``, of the accumulators' shape.

    Raises:
        ValueError: an unknown kernel, or an output grid with a scale for each channel.
    """
    if kernel not in _KERNELS:
        raise ValueError(f"kernel={kernel!r} is not one of {', '.join(map(repr, _KERNELS))}")
    if output.scale.numel() != 1:
        raise ValueError("the output's grid must have one scale, got one for each channel")

    shape = [1] * accumulators.dim()
    shape[channel] = -1
    step = (torch.as_tensor(x_scale).float() * torch.as_tensor(w_scale).float()).view(shape)
    y_scale, zero_point = output.scale.float(), output.zero_point.double()
    real_bias = None if bias is None else bias.detach().float().view(shape)
    if kernel == "onednn":
        real = accumulators.float() * step
        real = real if real_bias is None else real + real_bias
        q = torch.round(real * (1 / y_scale) + zero_point.float()).double()
        return q.clamp(output.qmin, output.qmax).to(output.dtype)
    if kernel == "fbgemm":
        summed = accumulators.float()
        summed = summed if real_bias is None else summed + real_bias / step
        q = torch.round(summed * (step / y_scale)).double()
    else:
        summed = accumulators.long()
        if real_bias is not None:
            summed = _int32(torch.round(real_bias / step).double() + summed).long()
        multiplier = step / y_scale
        if kernel == "fixed point":
            q = _multiplied(summed, multiplier).double()
        else:
            q = torch.round(summed.float() * multiplier).double()
    return (q + zero_point).clamp(output.qmin, output.qmax).to(output.dtype)


def fixed_point(multiplier: float) -> tuple[int, int]:
    """Return (M0, n) with multiplier = 2^-n M0 / 2^31 and 2^30 <= M0 < 2^31.

    Raises:
        ValueError: the multiplier is not positive and finite.

    Source: Jacob et al. 2018, equation (6).

    >>> fixed_point(0.3)
    (1288490189, 1)
    """
    if not (math.isfinite(multiplier) and multiplier > 0):
        raise ValueError(f"the multiplier must be positive and finite, got {multiplier}")
    mantissa, exponent = math.frexp(multiplier)
    m0 = round(mantissa * 2**31)
    if m0 == 2**31:  # rounded up to the next power of two
        m0, exponent = 2**30, exponent + 1
    return m0, -exponent


def _multiplied(summed: Tensor, multiplier: Tensor) -> Tensor:
    """Multiply by integers: the rounded high half of a product, then a rounded shift."""
    pairs = [fixed_point(m) for m in multiplier.flatten().tolist()]
    m0, n = (torch.tensor(part).view(multiplier.shape) for part in zip(*pairs, strict=True))
    left, right = (-n).clamp(min=0), n.clamp(min=0, max=31)
    shifted = (summed << left).clamp(-(2**31), 2**31 - 1)
    # the nearest integer to product / 2^31; both factors fit 32 bits, so int64 holds the product
    high = (shifted * m0 + (1 << 30)) >> 31
    remainder = high & ((1 << right) - 1)
    threshold = ((1 << right) - 1 >> 1) + (high < 0).long()
    return (high >> right) + (remainder > threshold).long()
