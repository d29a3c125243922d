"""The same image pipeline in torchvision: the oracle, and what runs where DALI does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dlhelpers.extras import need

__all__ = [
    "FLIP",
    "MEAN",
    "RATIO",
    "SCALE",
    "STD",
    "numbers",
    "shorter_side",
    "torchvision_transform",
]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights
SCALE, RATIO, FLIP = (0.08, 1.0), (3 / 4, 4 / 3), 0.5  # torchvision's own defaults


def torchvision_transform(
    size: int,
    train: bool,
    *,
    resize: int | None = None,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
    flip: float = FLIP,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Any:
    """Return torchvision's v2 transform for what ``image_pipeline`` does with the same arguments.

    From a PIL image or uint8 tensor [3, H, W] to float32 [3, size, size].

    >>> import torch
    >>> torchvision_transform(224, train=False)(torch.zeros(3, 300, 400, dtype=torch.uint8)).shape
    torch.Size([3, 224, 224])
    """
    import torch

    v2 = need("torchvision.transforms.v2", "torchvision_transform")
    if train:
        first: list[Any] = [
            v2.RandomResizedCrop(size, scale=scale, ratio=ratio, antialias=True),
            v2.RandomHorizontalFlip(flip),
        ]
    else:
        first = [v2.Resize(shorter_side(size, resize), antialias=True), v2.CenterCrop(size)]
    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    return v2.Compose(first + last)


def shorter_side(size: int, resize: int | None) -> int:
    """Return to how many pixels the shorter side is resized before the centre crop.

    >>> shorter_side(224, None)
    256
    """
    return round(size * 256 / 224) if resize is None else resize


def numbers(name: str, values: Any, count: int) -> tuple[float, ...]:
    """Return ``count`` numbers as a tuple of floats.

    Raises:
        ValueError: it is something else.
    """
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        found = ()
    if len(found) != count:
        raise ValueError(f"{name} must be {count} numbers, got {values!r}")
    return found
