"""Which bytes are stored for an image?

Encoded bytes are kept as they are. Only where a resize or another encoding is asked for, or where
the source gives pixels instead of bytes, is an image decoded and encoded. Of its metadata the EXIF
orientation is kept then, and the pixels are not turned: whoever turns them after reading, as
``PIL.ImageOps.exif_transpose`` does, gets the same from every encoding. Images of more than 8 bits
a channel that would be cut are refused.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dlhelpers.arguments import whole_number
from dlhelpers.extras import need
from dlhelpers.lmdb_io.schema import VERSION

__all__ = [
    "ENCODINGS",
    "JPEG_FRAMES",
    "RAW",
    "Encoding",
    "bits_of",
    "decoded",
    "exif_with",
    "image_format",
    "is_turned",
    "jpeg_segments",
    "orientation_of",
]

ENCODINGS = ("jpeg", "png", "webp", "raw")
RAW = struct.Struct("<3sBII")  # b"RAW", EXIF orientation or 0, height, width
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that tell the size
_SEGMENT = struct.Struct(">BBH")  # 0xFF, the marker, bytes behind the marker
_FRAME_SIZE = 9  # bytes of a frame's segment up to the end of height and width
_known_header = (b"", b"", 0, 0)  # of a JPEG up to height, after width, and where; where it scans
_ORIENTATION = 274  # the tag in EXIF
_TIFF_BITS = 258  # the tag
_PNM = re.compile(rb"P[2356](?:\s+(?:#[^\n]*\n\s*)*\d+){2}\s+(?:#[^\n]*\n\s*)*(\d+)\s")
_J2K_SIZE = b"\xff\x4f\xff\x51"  # begins the codestream
_QUALITY = {"jpeg": 90, "webp": 90}


@dataclass(frozen=True)
class Encoding:
    """What is done to each image before it is stored.

    Attributes:
        encode: ``jpeg``, ``png``, ``webp``, ``raw``, or None to keep the source's own.
        resize: pixels of the shorter side, or (height, width); None keeps the size.
        quality: of JPEG (1 to 95) and WebP (1 to 100); None is 90.
    """

    encode: str | None = None
    resize: int | tuple[int, int] | None = None
    quality: int | None = None
    version = VERSION  # of the schema, that a file begins with

    def __post_init__(self) -> None:
        if self.encode is not None and self.encode not in ENCODINGS:
            raise ValueError(
                f"encode must be one of {', '.join(ENCODINGS)}, or None to keep the bytes, "
                f"got {self.encode!r}"
            )
        sides = self.resize if isinstance(self.resize, (tuple, list)) else (self.resize,)
        if self.resize is not None and not (
            len(sides) in (1, 2)
            and all(isinstance(side, int) and 1 <= side <= 65_500 for side in sides)
        ):
            raise ValueError(
                "resize must be the pixels of the shorter side, such as 256, or (height, width), "
                f"got {self.resize!r}"
            )
        if self.quality is not None:
            most = 100 if self.encode == "webp" else 95
            object.__setattr__(self, "quality", whole_number("quality", self.quality, 1, most))
            if self.encode in ("png", "raw"):
                raise ValueError(f"quality={self.quality} means nothing for {self.encode}")
            if not self.changes:
                raise ValueError(
                    f"quality={self.quality} would change nothing, since the bytes are kept: "
                    'give encode="jpeg" or resize= as well'
                )

    @property
    def changes(self) -> bool:
        """Whether encoded images are decoded and encoded anew."""
        return self.encode is not None or self.resize is not None

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON writes them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def apply(self, image: Any) -> bytes:
        """Return the bytes to store.

        Args:
            image: encoded bytes, a PIL image, or uint8 pixels: a tensor [3, H, W], [1, H, W] or
                [H, W], or an array [H, W, 3] or [H, W].

        Raises:
            ValueError: it is no image, or not whole.
        """
        if isinstance(image, (bytes, bytearray, memoryview)):
            data = bytes(image)
            found = image_format(data)
            if not self.changes:
                if found == "unknown" or not _looks_whole(data, found):
                    decoded(data)  # raises where it really is none
                return data
            return self._encode(decoded(data), found, data)
        return self._encode(_from_pixels(image), "unknown", None)

    def _encode(self, image: Any, found: str, data: bytes | None) -> bytes:
        size = self._size(image.width, image.height)
        target = self.encode or (found if found in ENCODINGS else "png")
        if data is not None and size == image.size and found == target and self.encode is None:
            return data  # has that size already: a second encoding would only lose
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            raise ValueError(
                f"an image of mode {image.mode!r} has more than 8 bits a channel, of which most "
                "would be lost: scale it to 8 bits first, or give the bytes of its file without "
                "resize= and encode="
            )
        if (bits := bits_of(image, data)) > 8:
            raise ValueError(
                f"an image of {bits} bits a channel would lose most of them: scale it to 8 bits "
                "first, or give the bytes of its file without resize= and encode="
            )
        orientation = orientation_of(image)
        if image.mode not in ("L", "RGB"):  # before the resize, as after ImageFolder's loader
            image = image.convert("RGB")
        if size != image.size:
            image = image.resize(size, _pil().Resampling.BILINEAR)
        if target == "raw":
            image = image.convert("RGB")
            return RAW.pack(b"RAW", orientation, image.height, image.width) + image.tobytes()
        options: dict[str, Any] = exif_with(orientation)
        if target in _QUALITY:
            options["quality"] = self.quality or _QUALITY[target]
        buffer = io.BytesIO()
        image.save(buffer, target, **options)
        return buffer.getvalue()

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) after the resize, rounded as torchvision's Resize rounds."""
        if self.resize is None:
            return width, height
        if not isinstance(self.resize, int):
            return self.resize[1], self.resize[0]
        short, long = sorted((width, height))
        other = int(self.resize * long / short)
        return (self.resize, other) if width <= height else (other, self.resize)


def image_format(data: bytes | memoryview) -> str:
    """Return ``jpeg``, ``png``, ``webp``, ``bmp``, ``raw`` or ``unknown``, by the first bytes."""
    head = bytes(data[:12])
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"RIFF") and head.endswith(b"WEBP"):
        return "webp"
    if head.startswith(b"BM"):
        return "bmp"
    return "raw" if head.startswith(b"RAW") and head[3:4] <= b"\x08" else "unknown"


def is_turned(image: bytes) -> bool:
    """Whether it is a raw image with an orientation, which readers of version 1 do not know."""
    return image[:3] == b"RAW" and image[3:4] not in (b"", b"\0")


def _looks_whole(data: bytes, found: str) -> bool:
    """Whether the end is where the format says; where not, decoding has the last word."""
    if found == "jpeg":
        scan = _first_scan(data)
        return scan > 0 and data.rfind(b"\xff\xd9", scan) > 0
    if found == "png":
        return b"IEND\xaeB`\x82" in data[-64:]
    if found == "webp":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    if found == "raw":
        _, _, height, width = RAW.unpack_from(data.ljust(RAW.size, b"\0"))
        return len(data) == RAW.size + 3 * height * width
    return False


def jpeg_segments(data: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """Yield (marker, where it stands) of a JPEG's segments, the last of them its first scan.

    Goes from segment to segment, so that a thumbnail within one is not taken for the image.
    """
    at, last = 2, len(data) - _SEGMENT.size
    while at <= last:
        mark, marker, size = _SEGMENT.unpack_from(data, at)
        if mark != 0xFF:
            return
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        yield marker, at
        if marker == 0xDA:
            return
        at += 2 + size


def _first_scan(data: bytes) -> int:
    """Return where a JPEG's first scan begins, 0 where there is no frame or no scan.

    Files of one encoder have the same header but for height and width: it is walked once.
    """
    global _known_header
    first, second, resumes, scan = _known_header
    if scan and data.startswith(first) and data.startswith(second, resumes):
        return scan
    frame = 0
    for marker, at in jpeg_segments(data):
        if marker == 0xDA:
            if frame and (sized := frame + _FRAME_SIZE) <= at:
                _known_header = (data[: sized - 4], data[sized : at + _SEGMENT.size], sized, at)
            return at if frame else 0
        if marker in JPEG_FRAMES and not frame:
            frame = at
    return 0


def _pil() -> Any:
    return need("PIL.Image", "decoding and encoding images")


def orientation_of(image: Any) -> int:
    """Return the EXIF orientation of a PIL image that is to be turned, 0 of all others."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata, of which nobody can make an orientation
        return 0
    return found if isinstance(found, int) and 2 <= found <= 8 else 0


def bits_of(image: Any, data: bytes | None) -> int:
    """Return bits a channel as a file's header says, which PIL cuts to 8 where it knows no more."""
    kind, data = image.format, data or b""
    if kind == "PNG":
        return data[24] if len(data) > 24 else 8
    if kind == "TIFF":
        return max(image.tag_v2.get(_TIFF_BITS, (8,)))
    if kind == "PPM" and (header := _PNM.match(data)):
        return int(header[1]).bit_length()
    if kind == "JPEG2000" and (at := data.find(_J2K_SIZE)) >= 0:
        channels = int.from_bytes(data[at + 40 : at + 42], "big")
        return max((bits & 0x7F) + 1 for bits in data[at + 42 : at + 42 + 3 * channels : 3])
    return 8


def exif_with(orientation: int) -> dict[str, Any]:
    """Return EXIF metadata with an orientation, as PIL stores and saves it; nothing for 0."""
    if not orientation:
        return {}
    exif = _pil().Exif()
    exif[_ORIENTATION] = orientation
    return {"exif": exif.tobytes()}


def decoded(data: bytes) -> Any:
    """Return the PIL image of encoded or raw bytes, decoded.

    Raises:
        ValueError: they are no image, or not whole.
    """
    pil = _pil()
    if image_format(data) == "raw":
        if not _looks_whole(data, "raw"):
            raise ValueError(f"a raw image of {len(data)} bytes is not whole")
        _, orientation, height, width = RAW.unpack_from(data)
        image = pil.frombytes("RGB", (width, height), data[RAW.size :])
        image.info |= exif_with(orientation)
        return image
    try:
        image = pil.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # PIL raises a dozen kinds for broken files
        what = f"{len(data)} bytes starting with {data[:8]!r}" if data else "no bytes at all"
        raise ValueError(f"not an image that can be decoded ({what}): {error}") from None
    return image


def _from_pixels(pixels: Any) -> Any:
    """Return a PIL image of a PIL image, a tensor [C, H, W] or an array [H, W, C]."""
    pil = _pil()
    if isinstance(pixels, pil.Image):
        return pixels
    is_tensor = hasattr(pixels, "detach")
    array = pixels.detach().cpu().numpy() if is_tensor else pixels
    shape = getattr(array, "shape", ())
    if is_tensor and len(shape) == 3:
        array = array.transpose(1, 2, 0)
    if len(shape) == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if getattr(array, "dtype", None) != "uint8" or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    ):
        raise ValueError(
            "an image must be encoded bytes, a PIL image, a uint8 tensor [3, H, W] or a uint8 "
            f"array [H, W, 3], got {type(pixels).__name__} of shape {tuple(shape)}, dtype "
            f"{getattr(pixels, 'dtype', 'none')}: leave ToTensor and Normalize to the reader"
        )
    return pil.fromarray(array)
