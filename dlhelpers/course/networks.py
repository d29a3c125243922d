"""Which networks does the lesson on quantization round, and how far apart are their channels?

Two small ones that learn the digits, one of ordinary convolutions and one of separable ones, and a
ResNet-18 for times, whose BatchNorms have seen photographs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlhelpers.course import data, training
from dlhelpers.quantization import Affine

__all__ = [
    "convolution",
    "inference",
    "on_digits",
    "resnet18_and_photos",
    "separable",
    "spread",
    "torch_quantized",
    "with_uneven_channels",
]


def convolution(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Return convolution, BatchNorm and ReLU: [N, inputs, H, W] -> [N, outputs, H', W']."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


def separable(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """Return a depthwise convolution and a pointwise one, each with BatchNorm and ReLU."""
    depthwise = convolution(inputs, inputs, stride=stride, groups=inputs)
    return [*depthwise, *convolution(inputs, outputs, kernel=1)]


def on_digits(make: Callable[..., list[nn.Module]] = convolution, seed: int = 0) -> nn.Sequential:
    """Train four layers of a kind on the digits for six epochs; images [N, 1, 8, 8] -> logits.

    Args:
        make: (inputs, outputs, stride) -> layers.
        seed: of weights and batches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [*convolution(1, 16), *make(16, 32, stride=2), *make(32, 32), *make(32, 32)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))
    digits = data.digits()
    training.fit(model, F.cross_entropy, digits, epochs=6, lr=0.003, optimizer="adam", seed=seed)
    return model.eval()


def resnet18_and_photos() -> tuple[nn.Module, Tensor]:
    """Return a ResNet-18 with random weights, and sixteen photographs [16, 3, 96, 96] in 0 to 1.

    Its BatchNorms have seen the photographs in train mode, so activations have sensible ranges.
    """
    from PIL import Image
    from torchvision.models import get_model
    from torchvision.transforms.v2 import functional as G

    with TemporaryDirectory(prefix="dlhelpers-", ignore_cleanup_errors=True) as scratch:
        folder = data.photos(Path(scratch) / "photos", count=16, size=96, progress=False)
        tensors = []
        for file in sorted(folder.rglob("*.jpg")):
            with Image.open(file) as image:
                tensors.append(G.to_dtype(G.pil_to_tensor(image), scale=True))
    photos = torch.stack(tensors)
    model = get_model("resnet18").train()
    with torch.no_grad():
        for batch in photos.split(8):
            model(batch)
    return model.eval(), photos


def inference(model: Callable[..., Any], inputs: Tensor) -> Callable[[], Any]:
    """Return a call of the model without gradients, to be timed."""

    def run() -> Any:
        with torch.inference_mode():
            return model(inputs)

    return run


def spread(model: nn.Sequential) -> float:
    """Return the largest channel's range over the smallest one's, in the convolution that is worst.

    >>> layer = nn.Conv2d(1, 2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([1.0, 4.0]).view(2, 1, 1, 1)
    >>> spread(nn.Sequential(layer))
    4.0
    """
    convolutions = (layer for layer in model if isinstance(layer, nn.Conv2d))
    largest = [layer.weight.detach().flatten(1).abs().amax(1) for layer in convolutions]
    return max((channels.max() / channels.min()).item() for channels in largest)


def with_uneven_channels(model: nn.Sequential) -> nn.Sequential:
    """Return a copy that computes the same, with depthwise weights a hundred times apart.

    Its fourth layer's weights are scaled by 0.01 to 1, channel by channel; the BatchNorm after it
    makes up for that.
    """
    other = copy.deepcopy(model)
    layer, bn = other[3], other[4]
    factors = torch.logspace(-2, 0, len(layer.weight))
    layer.weight.data *= factors.view(-1, 1, 1, 1)
    bn.running_mean *= factors
    bn.running_var.add_(bn.eps).mul_(factors**2)
    bn.eps = 0.0
    return other


def torch_quantized(q: Tensor, grid: Affine) -> Tensor:
    """Return integers and their grid (one scale) as a quantized tensor of torch's, for its kernels.

    Such tensors are deprecated; the warning about that is left out.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch._make_per_tensor_quantized_tensor(q, float(grid.scale), int(grid.zero_point))
