"""At an image's edge torchvision's resize uses the pixels that there are; DALI's repeats the last.

With w_i the weights of the filter at the outermost pixel of a smaller image, torchvision gives

    sum of w_i p_i over the pixels inside / sum of w_i over the pixels inside.

DALI is given black beyond the edge, so that its result lacks the second sum as a factor, and the
outermost row or column is multiplied by what is missing.

Source: torch, aten/src/ATen/native/cpu/UpSampleKernel.cpp (weights of a pixel add up to one).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

__all__ = ["brighten_edges_", "edge_gains"]


def edge_gains(starts: np.ndarray, ends: np.ndarray, sizes: np.ndarray, size: int) -> np.ndarray:
    """Return by what the outermost rows and columns are to be multiplied, float64 [N, 2, 2].

    1 where the window's edge is not the image's, or where the image is not scaled down.

    Args:
        starts, ends: float [N, 2], of the windows, rows before columns.
        sizes: int [N, 2], of the images.
        size: of the result, in pixels.

    Returns:
        [image, rows or columns, first or last].
    """
    gains = np.ones((len(sizes), 2, 2))
    steps = (ends - starts) / size
    at_edge = np.stack([starts <= 0, ends >= sizes - 1e-6], axis=2) & (steps > 1)[..., None]
    for image, axis, side in np.argwhere(at_edge):
        if size > 1 or side == 0:  # a single pixel is first and last at once
            gains[image, axis, side] = _gain(float(steps[image, axis]), size)
    return gains


@cache
def _gain(step: float, size: int) -> float:
    """Return all weights / those inside, of the first pixel when ``step`` pixels become one."""
    centre, reach, length = step / 2 - 0.5, math.ceil(1.5 * step) + 1, size * step
    weights = {i: max(0.0, 1 - abs(i - centre) / step) for i in range(-reach, reach + 1)}
    inside = sum(weight for i, weight in weights.items() if 0 <= i < length - 0.5)
    return sum(weights.values()) / inside


def brighten_edges_(
    images: torch.Tensor, gains: np.ndarray, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Multiply the outermost rows and columns of normalised images, in place; return them.

    Args:
        images: float [N, 3, H, W], normalised with ``mean`` and ``std``.
        gains: as :func:`edge_gains` returns them.
    """
    if (gains == 1).all():
        return images
    black = -torch.tensor(mean) / torch.tensor(std)  # what a pixel of 0 is normalised to
    black = black.to(images).view(1, 3, 1)
    by = torch.from_numpy(gains).to(images)[..., None, None]
    for axis, edges in ((0, images.unbind(2)), (1, images.unbind(3))):
        for side, edge in ((0, edges[0]), (1, edges[-1])):
            edge.sub_(black).mul_(by[:, axis, side]).add_(black)
    return images
