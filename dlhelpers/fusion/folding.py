"""How does BatchNorm become part of the layer beside it? Four lines of algebra.

In eval mode BatchNorm is y = s z + t for each channel, with

    s = gamma / sqrt(var + eps),    t = beta - s mean

and a convolution or linear layer before it is z = W x + b, so that y = (s W) x + (s b + t). One
behind it is W (s z + t) + b = (W s) z + (b + W t), if every z is a value, none a zero of padding.

Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2, equation 14.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = ["fold_after", "fold_before", "scale_and_shift", "why_not_before"]


def scale_and_shift(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Return s and t of a BatchNorm in eval mode, float64 [C].

    Args:
        bn: one of torch's, or torchvision's ``FrozenBatchNorm2d``; with running statistics.

    Raises:
        ValueError: it keeps no running statistics.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("BatchNorm without running statistics uses the batch's: nothing to fold")
    mean, var = bn.running_mean.double(), bn.running_var.double()
    scale = torch.rsqrt(var + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.detach().double()
    shift = -scale * mean
    if bn.bias is not None:
        shift = shift + bn.bias.detach().double()
    return scale, shift


def fold_after(layer: nn.Module, bn: nn.Module) -> nn.Module:
    """Return one layer equal to ``bn(layer(x))`` in eval mode.

    Args:
        layer: a convolution of any kind (transposed, grouped, dilated, any padding) or a linear
            layer whose output is [N, C].
        bn: over its C output channels.

    Returns:
        A copy of the layer with a bias, its type, dtype, device and ``requires_grad`` kept; folded
        in float64 and rounded once. Both arguments are untouched.

    Raises:
        ValueError: bn has not the layer's output channels, or keeps no running statistics.
        TypeError: another kind of layer.

    Cost: O(|W|) once; saves one read and one write of the output a call.

    >>> conv, bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8).eval()
    >>> x = torch.ones(1, 3, 5, 5)
    >>> torch.allclose(fold_after(conv, bn)(x), bn(conv(x)), atol=1e-6)
    True
    """
    scale, shift = scale_and_shift(bn)
    outputs = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    if outputs is None:
        raise TypeError(f"{type(layer).__name__} is neither a convolution nor a linear layer")
    if len(scale) != outputs:
        raise ValueError(f"BatchNorm over {len(scale)} channels after a layer of {outputs} outputs")
    weight = layer.weight.detach().double()
    if isinstance(layer, _ConvTransposeNd):  # [C_in, C_out / groups, ...]
        grouped = weight.unflatten(0, (layer.groups, -1))
        by_output = scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        folded = (grouped * by_output).flatten(0, 1)
    else:
        folded = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    bias = 0.0 if layer.bias is None else layer.bias.detach().double()
    return _with(layer, folded, bias * scale + shift)


def fold_before(bn: nn.Module, layer: nn.Module) -> nn.Module:
    """Return one layer equal to ``layer(bn(z))`` in eval mode.

    Args:
        bn: over the layer's input channels.
        layer: a convolution that pads with no zeros, or a linear layer with inputs [N, C].

    Raises:
        ValueError: the layer pads with zeros, is transposed, or has other input channels.

    >>> bn, conv = nn.BatchNorm2d(3).eval(), nn.Conv2d(3, 8, 3)
    >>> z = torch.ones(1, 3, 5, 5)
    >>> torch.allclose(fold_before(bn, conv)(z), conv(bn(z)), atol=1e-6)
    True
    """
    if why := why_not_before(layer):
        raise ValueError(why)
    scale, shift = scale_and_shift(bn)
    groups = getattr(layer, "groups", 1)
    inputs = layer.weight.shape[1] * groups
    if len(scale) != inputs:
        raise ValueError(f"BatchNorm over {len(scale)} channels before {inputs} inputs")
    weight = layer.weight.detach().double()
    grouped = weight.unflatten(0, (groups, -1))  # [groups, C_out / groups, C_in / groups, ...]
    rest = [1] * (weight.dim() - 2)
    folded = grouped * scale.view(groups, 1, -1, *rest)
    added = (grouped * shift.view(groups, 1, -1, *rest)).flatten(2).sum(2).flatten()
    bias = 0.0 if layer.bias is None else layer.bias.detach().double()
    return _with(layer, folded.flatten(0, 1), bias + added)


def why_not_before(layer: nn.Module) -> str:
    """Return why a BatchNorm before this layer cannot be folded into it; empty where it can."""
    if isinstance(layer, _ConvTransposeNd):
        return "a transposed convolution sums another number of inputs at its borders"
    if isinstance(layer, _ConvNd):
        sizes = layer.padding
        if sizes == "same":
            sizes = [layer.dilation[i] * (k - 1) for i, k in enumerate(layer.kernel_size)]
        if sizes != "valid" and any(sizes) and layer.padding_mode == "zeros":
            return "the convolution pads with zeros, which the BatchNorm would have shifted"
    return ""


def _with(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    folded = _copy(layer)
    own = layer.weight
    new = torch.empty_like(own, memory_format=torch.preserve_format).copy_(weight.to(own.dtype))
    folded.weight = nn.Parameter(new, requires_grad=own.requires_grad)
    needs = own.requires_grad if layer.bias is None else layer.bias.requires_grad
    folded.bias = nn.Parameter(bias.to(own.dtype).contiguous(), requires_grad=needs)
    return folded


def _copy(module: nn.Module) -> Any:
    """Copy a layer; its tensors are shared until they are replaced."""
    shell = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):
            shell.__dict__[name] = copy.copy(value)
    return shell
