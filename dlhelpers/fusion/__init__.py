"""Can BatchNorm go? Fold it into the layer beside it wherever that is exact; say where it is not.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
>>> x = torch.ones(1, 3, 8, 8)
>>> fused, report = fuse_conv_bn(model, x)
>>> report.folded, report.found, torch.allclose(fused(x), model(x), atol=1e-6)
(1, 1, True)
"""

from dlhelpers.fusion.folding import fold_after, fold_before
from dlhelpers.fusion.fusing import FusionError, fuse_conv_bn
from dlhelpers.fusion.report import FusionReport, FusionRow
from dlhelpers.fusion.repvgg import RepVGGBlock, reparameterize

__all__ = [
    "FusionError",
    "FusionReport",
    "FusionRow",
    "RepVGGBlock",
    "fold_after",
    "fold_before",
    "fuse_conv_bn",
    "reparameterize",
]
