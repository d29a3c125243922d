"""How is ShuffleNetV2 built? From units that keep its paper's four guidelines.

A unit with stride 1 splits the channels in two halves, leaves one alone, and passes the other
through 1x1, depthwise 3x3 and 1x1 convolutions of equal width; the halves are put side by side and
their channels shuffled, so that they meet in the next unit:

    y = shuffle(concat(x[:c/2], branch(x[c/2:])))

Source: Ma et al. 2018, arXiv:1807.11164, Figure 3 (c, d) and Table 5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["WIDTHS", "ShuffleNetV2", "Unit", "channel_shuffle"]

# Table 5: width -> output channels of stages 2 to 4 and of the last convolution
WIDTHS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
_REPEATS = (4, 8, 4)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Return the channels in the order that takes one from each group in turn.

    Args:
        x: [N, C, ...].
        groups: divides C.

    Raises:
        ValueError: it does not.

    Source: Zhang et al. 2017 (ShuffleNet), arXiv:1707.01083, section 3.1.

    >>> channel_shuffle(torch.arange(6).view(1, 6), groups=2).tolist()
    [[0, 3, 1, 4, 2, 5]]
    """
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels cannot be shuffled in {groups} groups of one size")
    parted = x.unflatten(1, (groups, channels // groups))
    return parted.transpose(1, 2).flatten(1, 2)


def _convolution(c1: int, c2: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c1, c2, kernel, stride, kernel // 2, groups=groups, bias=False)


def _branch(c1: int, c2: int, stride: int) -> nn.Sequential:
    """Return 1x1, depthwise 3x3, 1x1; the depthwise one has no activation after it."""
    return nn.Sequential(
        _convolution(c1, c2),
        nn.BatchNorm2d(c2),
        nn.ReLU(inplace=True),
        _convolution(c2, c2, 3, stride, groups=c2),
        nn.BatchNorm2d(c2),
        _convolution(c2, c2),
        nn.BatchNorm2d(c2),
        nn.ReLU(inplace=True),
    )


class Unit(nn.Module):
    """One unit of ShuffleNetV2: [N, c1, H, W] -> [N, c2, H / stride, W / stride].

    Args:
        c1, c2: channels in and out; with stride 1 both are equal.
        stride: 1, half of the channels pass unchanged; or 2, both branches see all channels.

    Raises:
        ValueError: c2 is odd, the stride is another one, or it is 1 and c1 is not c2.
    """

    def __init__(self, c1: int, c2: int, stride: int = 1) -> None:
        super().__init__()
        if c2 % 2 or stride not in (1, 2) or (stride == 1 and c1 != c2):
            raise ValueError(
                f"a unit has an even c2, stride 1 with c1 = c2 or stride 2; got c1={c1}, c2={c2}, "
                f"stride={stride}"
            )
        half = c2 // 2
        self.stride = stride
        self.branch1 = nn.Sequential()
        if stride == 2:
            self.branch1 = nn.Sequential(
                _convolution(c1, c1, 3, 2, groups=c1),
                nn.BatchNorm2d(c1),
                _convolution(c1, half),
                nn.BatchNorm2d(half),
                nn.ReLU(inplace=True),
            )
        self.branch2 = _branch(c1 if stride == 2 else half, half, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return both halves side by side, shuffled."""
        kept, worked_on = (x, x) if self.stride == 2 else x.chunk(2, dim=1)
        return channel_shuffle(torch.cat((self.branch1(kept), self.branch2(worked_on)), 1), 2)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2: images float32 [N, in_channels, H, W] -> logits [N, classes].

    Names and shapes of parameters and buffers are those of torchvision's ``shufflenet_v2_x*``, so
    that weights go from one to the other by ``load_state_dict``.

    Args:
        width: 0.5, 1.0, 1.5 or 2.0.
        classes: logits.
        in_channels: 3 for colour.

    Raises:
        ValueError: another width.

    >>> ShuffleNetV2(0.5, classes=10)(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    """

    def __init__(self, width: float = 1.0, classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        if width not in WIDTHS:
            raise ValueError(f"width must be one of {sorted(WIDTHS)}, got {width!r}")
        *stages, last = WIDTHS[width]
        self.conv1 = nn.Sequential(
            _convolution(in_channels, 24, 3, 2), nn.BatchNorm2d(24), nn.ReLU(inplace=True)
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 24
        for name, c2, repeats in zip(("stage2", "stage3", "stage4"), stages, _REPEATS, strict=True):
            units = [Unit(channels, c2, stride=2), *(Unit(c2, c2) for _ in range(repeats - 1))]
            self.add_module(name, nn.Sequential(*units))
            channels = c2
        self.conv5 = nn.Sequential(
            _convolution(channels, last), nn.BatchNorm2d(last), nn.ReLU(inplace=True)
        )
        self.fc = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.maxpool(self.conv1(x))
        x = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        return self.fc(x.mean((2, 3)))
