"""How do three branches become one convolution? Each is folded, and a sum of convolutions is one.

RepVGG trains a 3x3 and a 1x1 convolution and an identity side by side, each with its BatchNorm, and
infers with one 3x3 convolution: a 1x1 kernel is a 3x3 one with zeros around it, and the identity is
a 1x1 kernel of ones on the diagonal.

Source: Ding et al. 2021, arXiv:2101.03697, section 3.3 and Figure 4.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlhelpers.fusion.folding import fold_after, scale_and_shift

__all__ = ["RepVGGBlock", "reparameterize"]


class RepVGGBlock(nn.Module):
    """ReLU of the sum of a 3x3, a 1x1 and (where shapes allow) an identity branch.

    Args:
        c1, c2: channels in and out.
        stride: of the convolutions.
        groups: of the convolutions.
    """

    def __init__(self, c1: int, c2: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        options = {"stride": stride, "groups": groups, "bias": False}
        self.branches = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(c1, c2, 3, padding=1, **options), nn.BatchNorm2d(c2)),
                nn.Sequential(nn.Conv2d(c1, c2, 1, **options), nn.BatchNorm2d(c2)),
            ]
        )
        if c1 == c2 and stride == 1:
            self.branches.append(nn.BatchNorm2d(c2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activated sum."""
        return F.relu(sum(branch(x) for branch in self.branches))

    def reparameterize(self) -> None:
        """Put one convolution in the branches' place; ``fuse_conv_bn`` calls this."""
        self.branches = nn.ModuleList([reparameterize(self)])


def reparameterize(block: nn.Module | Iterable[nn.Module]) -> nn.Conv2d:
    """Return one convolution equal in eval mode to the sum of a block's branches.

    Args:
        block: a module with ``branches``, or the branches: ``nn.Sequential(conv, bn)``, a
            convolution, or a BatchNorm alone, which is the identity's. Square kernels of odd sizes,
            padded by half of them; one stride, one number of groups.

    Raises:
        ValueError: a branch is something else, or the branches do not fit together.

    >>> block = RepVGGBlock(8, 8).eval()
    >>> x = torch.ones(1, 8, 5, 5)
    >>> torch.allclose(F.relu(reparameterize(block)(x)), block(x), atol=1e-6)
    True
    """
    given = getattr(block, "branches", block)
    if not isinstance(given, Iterable):
        raise ValueError(f"expected branches, or a module that has some; got {given!r}")
    branches = list(given)
    folded = [_as_convolution(branch) for branch in branches]
    layers = [layer for layer in folded if isinstance(layer, nn.Conv2d)]
    if not layers:
        raise ValueError("no branch holds a convolution: there is nothing to put them into")
    largest = max(layers, key=lambda layer: layer.kernel_size)
    side = largest.kernel_size[0]
    result = nn.utils.skip_init(  # draws no random numbers
        nn.Conv2d,
        largest.in_channels,
        largest.out_channels,
        side,
        stride=largest.stride,
        padding=side // 2,
        groups=largest.groups,
        device=largest.weight.device,
        dtype=largest.weight.dtype,
    )
    weight = torch.zeros_like(result.weight, dtype=torch.float64)
    bias = torch.zeros_like(result.bias, dtype=torch.float64)
    for layer in folded:
        if isinstance(layer, nn.Conv2d):
            _check(layer, largest)
            rest = (side - layer.kernel_size[0]) // 2
            weight += F.pad(layer.weight.detach().double(), [rest] * 4)
            if layer.bias is not None:
                bias += layer.bias.detach().double()
        else:
            if largest.in_channels != largest.out_channels or largest.stride != (1, 1):
                raise ValueError("an identity branch needs equal channels and stride 1")
            scale, shift = scale_and_shift(layer)
            if len(scale) != largest.out_channels:
                raise ValueError(
                    f"the identity's BatchNorm has {len(scale)} channels, {largest} another number"
                )
            each = largest.in_channels // largest.groups
            rows = torch.arange(largest.out_channels, device=weight.device)
            weight[rows, rows % each, side // 2, side // 2] += scale
            bias += shift
    with torch.no_grad():
        result.weight.copy_(weight)
        result.bias.copy_(bias)
    return result.train(largest.training)


def _as_convolution(branch: nn.Module) -> nn.Module:
    if isinstance(branch, nn.Conv2d | nn.BatchNorm2d):
        return branch
    if isinstance(branch, nn.Sequential) and len(branch) == 2:
        layer, bn = branch
        if isinstance(layer, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
            return fold_after(layer, bn)
    raise ValueError(
        "a branch must be an nn.Conv2d, an nn.BatchNorm2d, or the two in an nn.Sequential; got "
        f"{branch!r}"
    )


def _check(layer: nn.Conv2d, largest: nn.Conv2d) -> None:
    side = layer.kernel_size[0]
    fits = (
        layer.kernel_size == (side, side)
        and side % 2 == 1
        and layer.padding == (side // 2, side // 2)
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and (layer.stride, layer.groups, layer.in_channels, layer.out_channels)
        == (largest.stride, largest.groups, largest.in_channels, largest.out_channels)
    )
    if not fits:
        raise ValueError(
            "branches must have square odd kernels, padded by half with zeros, and the channels, "
            f"stride and groups of {largest}; got {layer}"
        )
