"""Which part of each image is cut out? Torchvision's rules, for a batch at a time.

Computed outside the DALI graph, so that seed and epoch alone decide; DALI then decodes no more than
that part.

Source: torchvision, RandomResizedCrop.make_params and CenterCrop; Szegedy et al. 2015, Going Deeper
with Convolutions, section 6, arXiv:1409.4842.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["centre_windows", "decoded_parts", "random_windows"]

_ATTEMPTS = 10  # as torchvision


def random_windows(
    sizes: np.ndarray,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Return (anchors, shapes) of RandomResizedCrop's windows, in whole pixels.

    An area uniform in ``scale`` and a ratio (width / height) log-uniform in ``ratio``: the first of
    ten attempts that fits into the image; where none fits, the largest central window whose ratio
    lies in the range.

    Args:
        sizes: int [N, 2], (height, width) of each image.
        rng: draws the same count of numbers for each image, whatever its size.
        scale, ratio: as RandomResizedCrop's.

    Returns:
        int64 [N, 2] each, rows before columns.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    count = len(sizes)
    areas = rng.uniform(*scale, (count, _ATTEMPTS)) * sizes.prod(axis=1, keepdims=True)
    ratios = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), (count, _ATTEMPTS)))
    places = rng.random((count, 2))
    tried = np.rint(np.sqrt(np.stack([areas / ratios, areas * ratios], axis=-1)))  # [N, 10, 2]
    fits = ((tried > 0) & (tried <= sizes[:, None])).all(axis=-1)
    shapes = tried[np.arange(count), fits.argmax(axis=1)]
    height, width = sizes.T
    # Python's round and np.rint take the even neighbour of a half
    central = np.stack(
        [
            np.minimum(height, np.rint(width / ratio[0])),
            np.minimum(width, np.rint(height * ratio[1])),
        ],
        axis=1,
    )
    found = fits.any(axis=1, keepdims=True)
    shapes = np.where(found, shapes, central).astype(np.int64)
    room = sizes - shapes
    anchors = np.where(found, (places * (room + 1)).astype(np.int64), room // 2)
    return anchors, shapes


def centre_windows(sizes: np.ndarray, size: int, resize: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (starts, ends) of the windows that Resize and CenterCrop leave of each image.

    In pixels of the original, and not whole ones: resizing this window to ``size`` gives what
    resizing the whole image and then cropping would give.

    Args:
        sizes: int [N, 2], (height, width) of each image.
        size: of the crop, in pixels.
        resize: of the shorter side before it, in pixels.

    Returns:
        float64 [N, 2] each, rows before columns.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    resized = sizes * resize // sizes.min(axis=1, keepdims=True)  # rounds down, as torchvision
    corner = np.rint((resized - size) / 2)
    step = sizes / resized
    return corner * step, (corner + size) * step


def decoded_parts(
    start: np.ndarray, end: np.ndarray, sizes: np.ndarray, size: int, *, framed: bool
) -> dict[str, np.ndarray]:
    """Return which part of each image a resize of its window to ``size`` needs.

    The resize's filter reaches one step beyond the window, or one pixel where it enlarges; two
    pixels more are for decoders that smooth colours across the edge of what they decode.

    Args:
        start, end: float [N, 2], of the windows in the images.
        sizes: int [N, 2], of the images.
        size: of the result, in pixels.
        framed: let the part reach beyond the image where that is scaled down, see edges.py.

    Returns:
        [N, 2] each: ``anchor`` and ``shape`` of the part; ``start`` and ``end`` of the window in
        it. With ``framed`` also ``frame_anchor`` and ``frame_shape``, what is to be cut out of the
        part, and ``start`` and ``end`` within that.
    """
    step = (end - start) / size
    margin = np.maximum(step, 1) + 2
    first, last = np.floor(start - margin), np.ceil(end + margin)
    anchor, limit = np.maximum(first, 0), np.minimum(last, sizes)
    part = {"anchor": anchor, "shape": limit - anchor}
    if not framed:
        return part | {"start": start - anchor, "end": end - anchor}
    first, last = np.where(step > 1, first, anchor), np.where(step > 1, last, limit)
    frame = {"frame_anchor": first - anchor, "frame_shape": last - first}
    return part | {"start": start - first, "end": end - first} | frame
