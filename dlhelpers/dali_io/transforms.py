"""The same image pipeline in torchvision: the oracle, and what runs where DALI does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["MEAN", "STD", "check_shape", "shorter_side", "torchvision_transform"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights


def torchvision_transform(
    size: int,
    train: bool,
    *,
    resize: int | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
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
    from torchvision.transforms import v2

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


def check_shape(
    size: int,
    batch_size: int,
    resize: int | None,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
) -> None:
    """Raise a ValueError that names what is out of range."""
    for name, value in (("size", size), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}")
    if resize is not None and (not isinstance(resize, int) or resize < size):
        raise ValueError(
            f"resize must be a whole number of pixels, {size} (size) or more, got {resize!r}"
        )
    low, high = scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"scale must be shares of the area, 0 < low <= high <= 1, got {scale!r}")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio must be width / height, 0 < low <= high, got {ratio!r}")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip must be a probability from 0 to 1, got {flip!r}")
