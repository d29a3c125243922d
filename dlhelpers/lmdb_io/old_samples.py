"""Which part of a value of a tutorial's database is the image, and what is its target?

Encoded images are kept byte by byte. Pixels are uint8 arrays, [H, W], [H, W, 3] or [3, H, W]; what
a transform has made of them (floats) cannot be undone. A sample of several parts holds one image,
and the others become the target: alone, or as a list or dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dlhelpers.lmdb_io.datum import read_datum
from dlhelpers.lmdb_io.old_values import (
    IMAGES,
    plain_target,
    read_form,
    shown_bytes,
    with_text_keys,
)

__all__ = ["sample_of"]


def sample_of(value: bytes, form: str, bgr: bool | None = None) -> tuple[Any, Any]:
    """Return (image, target) of a value: encoded bytes, a PIL image or pixels [H, W(, 3)], RGB.

    Args:
        value: of the database.
        form: that of the whole database, one of :data:`FORMS`.
        bgr: whether stored pixels are blue first; None: those of Caffe are, arrays are not.

    Raises:
        ValueError: it holds no image, or several, or is of another form.
    """
    if form == "image":
        if not IMAGES.match(value):
            raise ValueError(f"not an encoded image: {shown_bytes(value)}")
        return value, None
    if form == "datum":
        return _of_datum(value, bgr is not False)
    item = read_form(value, form)
    image, target = _split(item)
    if isinstance(image, np.ndarray):
        image = _turned(image, bool(bgr))
    return image, plain_target(target)


def _of_datum(value: bytes, bgr: bool) -> tuple[Any, int]:
    datum = read_datum(value)
    shape = datum.channels, datum.height, datum.width
    size = datum.channels * datum.height * datum.width
    if datum.encoded or (IMAGES.match(datum.data) and len(datum.data) != size):
        if not IMAGES.match(datum.data):
            raise ValueError(f"its Datum holds no encoded image: {shown_bytes(datum.data)}")
        return datum.data, datum.label
    if datum.floats and not datum.data:
        raise ValueError(
            f"its Datum holds float_data of shape {shape}, features and no picture: read them with "
            "caffe_pb2, they cannot be stored as an image"
        )
    if size != len(datum.data) or datum.channels not in (1, 3):
        raise ValueError(
            f"its Datum says {shape} (channels, height, width) and holds {len(datum.data)} bytes, "
            "expected 1 or 3 channels of one byte a pixel"
        )
    pixels = np.frombuffer(datum.data, np.uint8).reshape(shape).transpose(1, 2, 0)
    return np.ascontiguousarray(pixels[..., ::-1] if bgr else pixels), datum.label


def _split(item: Any) -> tuple[Any, Any]:
    """Return (image, everything else) of a sample."""
    if (image := _image_of(item)) is not None:
        return image, None
    if isinstance(item, Mapping):
        parts = with_text_keys(item)
    else:
        parts = dict(enumerate(item if isinstance(item, (list, tuple)) else [item]))
    images = {key: found for key, v in parts.items() if (found := _image_of(v)) is not None}
    if len(images) != 1:
        raise ValueError(
            f"a sample must hold one image (encoded bytes, a PIL image, uint8 [H, W], [H, W, 3] or "
            f"[3, H, W]), and this one holds {len(images) or 'none'}: {_shown(item, parts)}"
        )
    (key, image), *_ = images.items()
    del parts[key]
    if isinstance(image, np.ndarray) and any(map(_may_be_image, parts.values())):
        raise ValueError(f"which of its arrays is the image cannot be told: {_shown(item, parts)}")
    if len(parts) <= 1:
        return image, next(iter(parts.values()), None)
    return image, parts if isinstance(item, Mapping) else [*parts.values()]


def _may_be_image(value: Any) -> bool:
    """Whether it is an array with the axes of pixels, of any type; boxes [N, 4] are none."""
    if not isinstance(value, np.ndarray):
        return False
    sides = [side for side in value.shape if side > 5]
    return value.ndim in (2, 3, 4) and len(sides) >= 2


def _image_of(value: Any) -> Any:
    """Return an image as Encoding takes it, but for the order of its axes; None of all else."""
    if isinstance(value, bytes):
        return value if IMAGES.match(value) else None
    if not isinstance(value, np.ndarray):
        return value if hasattr(value, "getexif") else None  # of PIL
    if value.dtype != np.uint8 or not value.size:
        return None
    if max(value.shape, default=0) == value.size:  # as cv2.imencode gives it, [N] or [N, 1]
        data = value.tobytes()
        if IMAGES.match(data):
            return data
    if value.ndim == 4 and value.shape[0] == 1:  # a batch of one
        value = value[0]
    is_pixels = value.ndim == 2 or (
        value.ndim == 3 and not {1, 3}.isdisjoint((value.shape[0], value.shape[2]))
    )
    return value if is_pixels else None


def _turned(pixels: np.ndarray, bgr: bool) -> np.ndarray:
    """Return pixels as [H, W] or [H, W, 3], red first."""
    if pixels.ndim == 2:
        return pixels
    first, last = pixels.shape[0] in (1, 3), pixels.shape[2] in (1, 3)
    if first and last and pixels.size > 1:
        raise ValueError(f"an array of shape {pixels.shape} may be [H, W, C] or [C, H, W]")
    if not last:
        pixels = pixels.transpose(1, 2, 0)
    return np.ascontiguousarray(pixels[..., ::-1] if bgr else pixels)


def _shown(item: Any, parts: Mapping[Any, Any]) -> str:
    named = isinstance(item, Mapping)
    shown = [f"{str(key)[:40]!r}: " * named + _kind(value) for key, value in [*parts.items()][:6]]
    text = ", ".join(shown) + ", ..." * (len(parts) > 6)
    return f"{type(item).__name__}({text})" if isinstance(item, (list, tuple, Mapping)) else text


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array {[*value.shape]}"
    if isinstance(value, bytes):
        return shown_bytes(value)
    return type(value).__name__
