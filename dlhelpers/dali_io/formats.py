"""Which encoded images does DALI decode as Pillow does, and what becomes of the others?

Their headers tell. Pixels are the same for JPEG with 8 bits in grey or YCbCr, PNG with up to 8
bits, WebP without metadata, 24-bit BMP, and uncompressed TIFF in grey or RGB that is not turned.
Elsewhere DALI may give another picture without an error: it turns a TIFF by its orientation, maps
16 bits and floats to 8 bits by another rule, takes CMYK for inverted CMYK, and ignores the maximum
of a PNM file. Pillow decodes all those, as in torchvision's ImageFolder, and their pixels go to
DALI as a BMP.

Source: the sweep over Pillow's formats and modes in tests/test_dali_formats.py.
"""

from __future__ import annotations

import io
import struct

from dlhelpers.extras import need
from dlhelpers.lmdb_io.decoding import open_pil
from dlhelpers.lmdb_io.encoding import JPEG_FRAMES, image_format, jpeg_segments

__all__ = ["by_pillow", "dali_size", "for_dali"]

Encoded = tuple[bytes, tuple[int, int]]
_HUFFMAN = (0xC0, 0xC1, 0xC2)  # frames: baseline, extended, progressive
_ADOBE = 0xEE
_TIFF_SIZE = (257, 256)  # tags of height and width
_TIFF_ALIKE = {  # tag -> values with which the decoders agree; other tags change no pixel, except:
    258: {8},  # bits
    259: {1},  # no compression: of damaged LZW, DALI returns what it has
    262: {1, 2},  # grey from black, RGB
    266: {1},  # order of bits
    274: {1},  # orientation
    277: {1, 3},  # channels
    284: {1},  # channels lie side by side
    339: {1},  # unsigned
}
_TIFF_OTHER = {322, 338}  # tiles, channels beyond colour


def for_dali(data: bytes) -> Encoded:
    """Return encoded bytes that DALI decodes to Pillow's pixels, and their (height, width).

    Raises:
        ValueError: neither of them can decode it.
    """
    size = dali_size(data)
    return by_pillow(data) if size is None else (data, size)


def by_pillow(data: bytes) -> Encoded:
    """Return the pixels that Pillow decodes as an uncompressed BMP, and their (height, width).

    Raises:
        ValueError: it is no image, or a damaged one.
    """
    pil = need("PIL.Image", "decoding an image that DALI would decode to another one")
    try:
        image = open_pil(data)
        buffer = io.BytesIO()
        image.save(buffer, "BMP")
    except pil.UnidentifiedImageError:
        what = f"{len(data)} bytes starting with {bytes(data[:8])!r}" if data else "no bytes at all"
        raise ValueError(f"not an image that is known ({what})") from None
    except Exception as error:  # Pillow raises a dozen kinds
        raise ValueError(f"Pillow: {error}" if str(error) else type(error).__name__) from None
    return buffer.getvalue(), (image.height, image.width)


def dali_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) from the header where DALI's pixels are Pillow's, None elsewhere.

    None also for images whose end is missing: Pillow says whether pixels are.
    """
    read = _SIZES.get(image_format(data))
    if read is None and data[:4] in (b"II*\0", b"MM\0*"):
        read = _tiff
    try:
        size = read(data) if read else None
    except (struct.error, IndexError):  # a header that is cut off
        return None
    return None if size is None or 0 in size else size


def _jpeg(data: bytes) -> tuple[int, int] | None:
    frame = scan = 0
    transform = 1
    for marker, at in jpeg_segments(data):
        if marker in JPEG_FRAMES:
            frame = at
        elif marker == _ADOBE and data[at + 4 : at + 9] == b"Adobe":
            transform = data[at + 15]
        elif marker == 0xDA:
            scan = at
    if not scan or not frame or data.rfind(b"\xff\xd9", scan) < 0:
        return None
    precision, height, width, components = struct.unpack_from(">BHHB", data, frame + 4)
    is_rgb = transform != 1 or data[frame + 10 : frame + 19 : 3] == b"RGB"
    is_known = components == 1 or (components == 3 and not is_rgb)
    alike = data[frame + 1] in _HUFFMAN and precision == 8 and is_known
    return (height, width) if alike else None


def _png(data: bytes) -> tuple[int, int] | None:
    width, height, depth = struct.unpack_from(">IIB", data, 16)
    is_whole = b"IEND\xaeB`\x82" in data[-64:]
    is_animated = b"acTL" in data[: max(data.find(b"IDAT"), 0)]
    return (height, width) if depth <= 8 and is_whole and not is_animated else None


def _bmp(data: bytes) -> tuple[int, int] | None:
    start, header, width, height, _, bits, packed = struct.unpack_from("<IIiiHHI", data, 10)
    is_plain = (header, bits, packed) == (40, 24, 0) and height > 0 and width > 0
    is_whole = len(data) >= start + height * ((3 * width + 3) // 4 * 4)
    return (height, width) if is_plain and is_whole else None


def _webp(data: bytes) -> tuple[int, int] | None:
    is_whole = int.from_bytes(data[4:8], "little") + 8 <= len(data)
    if not is_whole or data[12:15] != b"VP8":
        return None
    if data[15:16] == b" ":  # lossy
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    if data[15:16] == b"L":  # lossless
        (packed,) = struct.unpack_from("<I", data, 21)
        return (packed >> 14 & 0x3FFF) + 1, (packed & 0x3FFF) + 1
    return None  # with metadata, alpha or frames


def _tiff(data: bytes) -> tuple[int, int] | None:
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, at)
    seen: dict[int, int] = {}
    before = 0
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(order + "HHI", data, entry)
        if tag in _TIFF_OTHER or tag <= before:  # the order is the format's, some rely on it
            return None
        before = tag
        if tag not in _TIFF_ALIKE and tag not in _TIFF_SIZE:
            continue
        if kind not in (3, 4) or not 1 <= number <= 4:
            return None
        place, letter = entry + 8, "H" if kind == 3 else "I"
        if number * struct.calcsize(letter) > 4:
            (place,) = struct.unpack_from(order + "I", data, place)
        values = struct.unpack_from(f"{order}{number}{letter}", data, place)
        if tag in _TIFF_ALIKE and not _TIFF_ALIKE[tag].issuperset(values):
            return None
        seen[tag] = values[0]
    channels = {1: 1, 2: 3}.get(seen.get(262, 0))  # of that colour
    if 258 not in seen or seen.get(277, 1) != channels:
        return None
    return seen.get(257, 0), seen.get(256, 0)


_SIZES = {"jpeg": _jpeg, "png": _png, "bmp": _bmp, "webp": _webp}
