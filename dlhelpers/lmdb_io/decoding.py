"""How do encoded bytes become pixels?

Every decoder gives the same RGB pixels within its own rounding: EXIF rotation is not applied (as
in torchvision's ImageFolder), grey images get three equal channels, transparency is dropped. What
a fast decoder does not know (CMYK, WebP, 16 bits), PIL decodes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np

from dlhelpers.extras import install_hint, need
from dlhelpers.lmdb_io.encoding import RAW, decoded, image_format

__all__ = ["DECODERS", "decoders", "load_decoder", "open_pil", "planar"]

Decoder = Callable[..., np.ndarray]

# in the order in which "auto" chooses: the fastest first, as benchmarks/io.py measures them
DECODERS = ("simplejpeg", "opencv", "torchvision", "torchcodec", "pil")
_HINTS = {  # where the module's name is not the decoder's, or it is more than a decoder
    "opencv": install_hint("cv2"),
    "pil": install_hint("PIL"),
    "torchvision": "pip install torchvision",
}


@cache
def decoders() -> tuple[str, ...]:
    """Return the decoders that are installed and load, the one that ``auto`` takes first.

    >>> "pil" in decoders()
    True
    """
    found = []
    for name in DECODERS:
        with suppress(ImportError):
            load_decoder(name)
            found.append(name)
    return tuple(found)


@cache
def load_decoder(name: str) -> Decoder:
    """Return a function from encoded bytes to uint8 RGB pixels [H, W, 3].

    With ``copy=False`` it gives of raw bytes a read-only view.

    Args:
        name: ``auto`` or one of :func:`decoders`.

    Raises:
        ValueError: there is no such decoder.
        ImportError: it is not installed; says what to install.
    """
    if name == "auto":  # loads no more than it needs
        for candidate in DECODERS[:-1]:
            with suppress(ImportError):
                return load_decoder(candidate)
        return load_decoder(DECODERS[-1])
    if name not in DECODERS:
        raise ValueError(f"decode must be auto, {', '.join(DECODERS)} or None, got {name!r}")
    try:
        jpeg = _JPEG[name]()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        hint = _HINTS.get(name) or install_hint(name)
        raise ImportError(
            f"decode={name!r} does not work here ({error}): {hint}, "
            'or decode="auto" for the fastest one that does'
        ) from None

    def decode(data: Any, copy: bool = True) -> np.ndarray:
        kind = image_format(data)
        if kind == "jpeg":
            try:
                pixels = jpeg(data)
            except Exception:  # CMYK, or damaged: PIL has the last word
                pixels = None
            if pixels is not None:
                return pixels
        elif kind == "raw":
            return _raw(data).copy() if copy else _raw(data)
        return _pil(data)

    return decode


def open_pil(data: Any) -> Any:
    """Return a PIL image in mode RGB, as ImageFolder's default loader gives it."""
    pil = need("PIL.Image", "decoding an image that is no JPEG")
    if image_format(data) == "raw":
        return decoded(bytes(data))  # with its orientation
    return pil.open(io.BytesIO(data)).convert("RGB")


def planar(pixels: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return pixels [H, W, 3] as a contiguous array [3, H, W], in ``out`` where given."""
    if out is None:
        out = np.empty((3, *pixels.shape[:2]), np.uint8)
    if (split := _splitter()) is not None:
        split(pixels, [out[0], out[1], out[2]])
    else:
        np.copyto(out, pixels.transpose(2, 0, 1))
    return out


@cache
def _splitter() -> Any:
    """OpenCV's split, which separates channels several times faster than NumPy and torch."""
    try:
        import cv2
    except ImportError:
        return None
    return cv2.split


def _raw(data: Any) -> np.ndarray:
    _, _, height, width = RAW.unpack_from(data)
    return np.frombuffer(data, np.uint8, offset=RAW.size).reshape(height, width, 3)


def _pil(data: Any) -> np.ndarray:
    return np.array(open_pil(data))


def _simplejpeg() -> Decoder:
    from simplejpeg import decode_jpeg

    return decode_jpeg


def _opencv() -> Decoder:
    import cv2

    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION

    def decode(data: Any) -> np.ndarray:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)

    return decode


def _torchvision() -> Decoder:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(data: Any) -> np.ndarray:
        # a copy of the encoded bytes: torch has no read-only tensors
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_jpeg(encoded, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()

    return decode


def _torchcodec() -> Decoder:
    from torchcodec.decoders import decode_image

    def decode(data: Any) -> np.ndarray:
        encoded = bytes(data)
        if b"Exif\0" in encoded[:65_536]:
            raise ValueError("it would turn the image as EXIF says")  # PIL does not
        return decode_image(encoded).permute(1, 2, 0).numpy()

    return decode


_JPEG: dict[str, Callable[[], Decoder]] = {
    "simplejpeg": _simplejpeg,
    "opencv": _opencv,
    "torchvision": _torchvision,
    "torchcodec": _torchcodec,
    "pil": lambda: _pil,
}
