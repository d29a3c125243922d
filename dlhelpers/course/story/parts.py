"""What does the script compute? Its network, and its three parts: train, validate, score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlhelpers.course.story.photographs import Photos

__all__ = ["forever", "network", "score", "train_batch", "validate", "views"]


def network(classes: int, softmax: bool, depthwise: bool = False, seed: int = 0) -> nn.Sequential:
    """Return a small convolutional network with BatchNorm; the same weights for the same seed."""

    def block(c1: int, c2: int, stride: int, split: bool = depthwise) -> list[nn.Module]:
        if split:
            convs = [
                nn.Conv2d(c1, c1, 3, stride, 1, groups=c1, bias=False),
                nn.Conv2d(c1, c2, 1, bias=False),
            ]
        else:
            convs = [nn.Conv2d(c1, c2, 3, stride, 1, bias=False)]
        return [*convs, nn.BatchNorm2d(c2), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [*block(3, 16, 2, split=False), *block(16, 32, 2)]
        layers += [*block(32, 64, 1), *block(64, 64, 2)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
        return nn.Sequential(*layers, *[nn.Softmax(dim=1)] * softmax)


def train_batch(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """Take one step on a batch."""
    images, labels = batch
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def validate(model: nn.Module, batches: Any, no_grad: bool) -> float:
    """Return the accuracy; the losses are kept for a curve that nobody draws."""
    model.eval()
    losses, right, seen = [], 0, 0
    with torch.set_grad_enabled(not no_grad):
        for images, labels in batches:
            outputs = model(images)
            loss = F.cross_entropy(outputs, labels)
            losses.append(loss.detach() if no_grad else loss)
            right += int((outputs.argmax(1) == labels).sum())
            seen += len(labels)
    return right / seen


def score(model: Callable[[Tensor], Tensor], photos: Photos, batch: int) -> list[int]:
    """Return the class of each photograph of a folder, in the order of its files."""
    found: list[int] = []
    with torch.inference_mode():
        for first in range(0, len(photos), batch):
            some = range(first, min(first + batch, len(photos)))
            images = torch.stack([photos[index][0] for index in some])
            outputs = torch.stack([model(view) for view in views(images)])
            found += outputs.mean(0).argmax(1).tolist()
    return found


def views(images: Tensor) -> list[Tensor]:
    """Return eight versions of a batch, moved and mirrored, over which scoring averages."""
    moved = [images.roll((y, x), (2, 3)) for y in (0, 4) for x in (0, 4)]
    return [*moved, *(view.flip(3) for view in moved)]


def forever(loader: Any) -> Iterator[Any]:
    """Give the loader's batches without end, each epoch drawn anew."""
    while True:
        yield from loader
