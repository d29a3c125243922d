"""How does an image of one field lie in a record, in its own mode?

Encoded bytes of the field's format are kept. JPEG, WebP and raw hold pictures, which are read as
RGB. PNG holds masks as well, exactly as they are: 1 bit, grey, palette indices, 16 bits, alpha;
of 32 bits (modes I and F) it holds the four bytes of each pixel in its four channels, marked by the
text ``dlhelpers-mode``.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from dlhelpers.extras import need
from dlhelpers.lmdb_io.encoding import (
    Encoding,
    bits_of,
    decoded,
    exif_with,
    image_format,
    orientation_of,
)

__all__ = ["PICTURES", "encode_picture", "is_packed", "open_picture", "picture_pixels"]

PICTURES = ("image", "jpeg", "png", "webp", "raw")
_COLOURS = ("RGB", "L", "CMYK", "YCbCr")  # what is read as RGB in any case
_IN_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_WIDE = {"I": np.dtype("<i4"), "F": np.dtype("<f4")}  # modes of 32 bits
_MARK = "dlhelpers-mode"
_PLANES = ("bool", "uint8", "uint16", "int32", "float32")  # dtypes of [H, W]


def encode_picture(value: Any, kind: str, quality: int | None = None) -> bytes:
    """Return the bytes to store for an image.

    Args:
        value: encoded bytes; a PIL image; pixels uint8 [H, W, 2 to 4], as a tensor [2 to 4, H, W];
            or [H, W] of bool, uint8, uint16, int32 or float32.
        kind: ``image`` keeps encoded bytes and stores pixels as PNG; ``jpeg``, ``png``, ``webp``
            and ``raw`` keep bytes of that format and encode all others.
        quality: of JPEG and WebP.

    Raises:
        ValueError: it is no image, or one that this kind would change; names the kind to use.
    """
    data = bytes(value) if isinstance(value, (bytes, bytearray, memoryview)) else None
    if data is not None and kind in ("image", image_format(data)):
        return Encoding().apply(data)  # once it was looked at
    is_exact = kind in ("image", "png")
    image = _as_image(value, is_exact) if data is None else decoded(data)
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # photographs with a preview
        raise ValueError(
            f"an image of {image.n_frames} frames would lose all but one: use the kind image or "
            "bytes for the bytes of its file, numpy for the pixels of all, or give image.copy()"
        )
    is_wide = image.mode in _WIDE or image.mode.startswith("I;16")
    if not is_wide and (bits := bits_of(image, data)) > 8:
        raise ValueError(
            f"an image of {bits} bits a channel would lose most of them: use the kind image, which "
            "keeps the bytes of its file, or numpy for its pixels"
        )
    if not is_exact:
        if image.mode not in _COLOURS:
            raise ValueError(
                f"an image of mode {image.mode!r} cannot be stored as {kind} without loss: use the "
                "kind png, or image.convert('RGB') if it is a picture"
            )
        return Encoding(kind, None, quality if kind != "raw" else None).apply(image)
    if image.mode.startswith("I;16"):
        image = _pil().fromarray(np.asarray(image).astype("<u2"))
    return _png(image)


def open_picture(data: bytes | memoryview) -> Any:
    """Return the PIL image of stored bytes in its own mode, decoded.

    Raises:
        ValueError: they are no image.
    """
    image = decoded(bytes(data))
    mode = image.info.get(_MARK) if image.format == "PNG" else None
    if mode in _WIDE and image.mode == "RGBA":
        pixels = np.asarray(image).view(_WIDE[mode])[..., 0]
        return _pil().fromarray(np.ascontiguousarray(pixels))
    if image.format == "PNG" and image.mode == "I":  # what Pillow before 11 makes of 16 bits
        return _pil().fromarray(np.asarray(image).astype("<u2"))
    return image


def picture_pixels(data: bytes | memoryview) -> np.ndarray:
    """Return pixels [H, W] or [H, W, C] in the image's own mode; palette indices of mode P."""
    image = open_picture(data)
    if image.mode not in (*_IN_PNG, *_WIDE):
        is_wide = image.mode.startswith("I;16")
        pixels = np.array(image if is_wide else image.convert("RGB"))
        return pixels.astype(np.uint16) if is_wide else pixels
    return np.array(image)


def is_packed(data: bytes | memoryview) -> bool:
    """Whether other readers of PNG would take pixels of 32 bits for colours."""
    return image_format(data) == "png" and _MARK.encode() in bytes(data[:256])


def _as_image(value: Any, is_exact: bool) -> Any:
    pil = _pil()
    if isinstance(value, pil.Image):
        return value
    is_tensor = hasattr(value, "detach")
    array = value.detach().cpu().numpy() if is_tensor else value
    if not isinstance(array, np.ndarray):
        raise ValueError(f"expected encoded bytes, an image or its pixels, got {_described(value)}")
    shape = tuple(array.shape)
    if is_tensor and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        if is_exact:
            raise ValueError(
                f"pixels of the shape {shape} would come back as {array.shape[:2]}: give "
                f"{'value[0]' if is_tensor else 'value[..., 0]'}, or use the kind numpy"
            )
        array = array[..., 0]
    is_plane = array.ndim == 2 and array.dtype.name in _PLANES
    is_coloured = array.ndim == 3 and array.dtype == "uint8" and 2 <= array.shape[2] <= 4
    if not is_plane and not is_coloured:
        raise ValueError(
            "pixels must be uint8 [H, W, 3] (a tensor [3, H, W]), or a mask [H, W] of "
            f"{', '.join(_PLANES)}, got {_described(value)}: use the kind numpy, and leave "
            "ToTensor and Normalize to the reader"
        )
    if not array.size:
        raise ValueError(f"pixels of the shape {shape} are none: use the kind numpy")
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return pil.fromarray(np.ascontiguousarray(array))


def _png(image: Any) -> bytes:
    options: dict[str, Any] = exif_with(orientation_of(image))
    if image.mode in _WIDE:
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text(_MARK, image.mode)
        pixels = np.asarray(image).astype(_WIDE[image.mode])
        image = _pil().fromarray(pixels[..., None].view(np.uint8))
    if image.mode not in _IN_PNG:
        raise ValueError(
            f"an image of mode {image.mode!r} cannot be stored as PNG without loss: give "
            "image.convert('RGB') or image.convert('RGBA'), or numpy.asarray(image) to the kind "
            "numpy"
        )
    buffer = io.BytesIO()
    (_whole_palette(image) if image.mode == "P" else image).save(buffer, "PNG", **options)
    return buffer.getvalue()


def _whole_palette(image: Any) -> Any:
    """Return an image with a colour for each index: Pillow stores as many bits as its palette
    needs, and cuts larger indices, such as the 255 of a mask."""
    mode = "RGBA" if image.palette is not None and image.palette.mode == "RGBA" else "RGB"
    colours = image.getpalette(mode) or []
    missing = (image.getextrema()[1] + 1) * len(mode) - len(colours)
    if missing > 0:
        image = image.copy()
        image.putpalette([*colours, *[0] * missing], mode)
    return image


def _pil() -> Any:
    return need("PIL.Image", "an image field")


def _described(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None:
        return f"{type(value).__name__} {str(value)[:40]!r}"
    return f"{type(value).__name__} of shape {tuple(shape)}, dtype {dtype}"
