"""What did a tutorial put into one value of its database?

Encoded images are kept byte by byte. Pixels are uint8 arrays, [H, W], [H, W, 3] or [3, H, W]; what
a transform has made of them (floats) cannot be undone. A sample of several parts holds one image,
and the others become the target: alone, or as a list or dict.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dlhelpers.extras import need
from dlhelpers.lmdb_io.datum import read_datum
from dlhelpers.lmdb_io.safe_keys import KeysError, safe_dict
from dlhelpers.lmdb_io.unpickling import PickleError, unpickle

__all__ = [
    "FORMS",
    "form_of",
    "plain_target",
    "printable_text",
    "read_plain",
    "sample_of",
    "shown_bytes",
]

FORMS = {
    "image": "encoded images",
    "pickle": "pickles",
    "msgpack": "msgpack",
    "npy": "NumPy's files (.npy)",
    "datum": "Datum records of Caffe",
    "pyarrow": "pyarrow.serialize",
}
_IMAGES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|BM....\0\0\0\0|GIF8[79]a|II\*\0|MM\0\*"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51|P[1-6]\s+[\d#]|....ftypavi[fs]",
    re.DOTALL,
)
_ARROW = re.compile(
    rb"(?:.\0\0\0){2,5}(?:\xff{4})?..\0\0\x10\0\0\0\0\0\n\0\x0c\0", re.DOTALL
)  # a few counts, then the schema of a stream
_MSGPACK = frozenset({*range(0x81, 0x90), *range(0x91, 0xA0), 0xC4, 0xC5, 0xC6, 0xDC, 0xDD, 0xDE})


def form_of(value: bytes) -> str:
    """Return the form of a value, one of :data:`FORMS`; empty where it is none of them."""
    if _IMAGES.match(value):
        return "image"
    if value.startswith(b"\x93NUMPY"):
        return "npy"
    if _ARROW.match(value):
        return "pyarrow"
    if value[:1] == b"\x80" and value[1:2] in b"\2\3\4\5" and value.endswith(b"."):
        return "pickle"
    try:
        if (found := read_datum(value)).data or found.floats:
            return "datum"
    except ValueError:
        pass
    if value.endswith(b".") and _is_early_pickle(value):
        return "pickle"
    return "msgpack" if len(value) > 1 and value[0] in _MSGPACK and _is_msgpack(value) else ""


def _is_early_pickle(value: bytes) -> bool:
    try:
        unpickle(value)
    except PickleError as error:  # one that is refused by name is a pickle
        return "damaged" not in str(error)
    return True


def _is_msgpack(value: bytes) -> bool:
    try:
        _read(value, "msgpack")
    except ValueError:
        return False
    except ImportError:  # by its first byte, so that the message names the package
        return True
    return True


def read_plain(value: bytes) -> Any:
    """Return a number or list that stands beside the samples: pickled, msgpack, JSON or text.

    Raises:
        ValueError: it is none of these.
    """
    form = form_of(value)
    if form in ("pickle", "msgpack"):
        return _read(value, form)
    if form:
        raise ValueError(f"it is written in the form of {FORMS[form]}")
    text = value.decode()
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


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
        if not _IMAGES.match(value):
            raise ValueError(f"not an encoded image: {shown_bytes(value)}")
        return value, None
    if form == "datum":
        return _of_datum(value, bgr is not False)
    item = _read(value, form)
    image, target = _split(item)
    if isinstance(image, np.ndarray):
        image = _turned(image, bool(bgr))
    return image, plain_target(target)


def plain_target(value: Any) -> Any:
    """Return a target as JSON can hold it: arrays as lists, bytes as the text that they are.

    Raises:
        ValueError: bytes are no text, or an image.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, bytes):
        if (text := printable_text(value)) is not None:
            return text
        raise ValueError(f"its label is neither text nor a number: {shown_bytes(value)}")
    if isinstance(value, Mapping):
        return {_text_of(key): plain_target(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_target(inner) for inner in value]
    return value


def printable_text(value: bytes) -> str | None:
    """Return the text that bytes are; None where they hold control characters or no UTF-8."""
    if any(byte < 32 and byte not in b"\t\n\r" for byte in value):
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _text_of(key: Any) -> Any:
    return plain_target(key) if isinstance(key, bytes) else key  # as Python 2 wrote text


def shown_bytes(value: bytes) -> str:
    """Return what a message says of bytes: how many, and the first of them."""
    return f"{len(value)} byte{'s' * (len(value) != 1)}" + (
        f", beginning {value[:16]!r}" if value else ""
    )


# ---- forms ----


def _read(value: bytes, form: str) -> Any:
    if form == "pickle":
        return unpickle(value)
    if form == "npy":
        try:
            return np.load(io.BytesIO(value), allow_pickle=False)
        except Exception as error:  # also MemoryError, for a size that is not there
            raise ValueError(f"not a readable .npy file: {error}") from None
    msgpack = need("msgpack", "a database of msgpack values")
    try:
        found = msgpack.unpackb(value, strict_map_key=False, object_pairs_hook=safe_dict)
    except KeysError as error:
        raise ValueError(f"its msgpack holds {error}") from None
    except Exception as error:
        raise ValueError(f"not readable msgpack ({type(error).__name__}: {error})") from None
    return _numpy_of_msgpack(found)


def _numpy_of_msgpack(item: Any) -> Any:
    """Put together the arrays of msgpack_numpy, which come as dicts."""
    if isinstance(item, list):
        return [_numpy_of_msgpack(inner) for inner in item]
    if not isinstance(item, dict):
        return item
    found = {_text_of(key): inner for key, inner in item.items()}
    if not {"nd", "type", "data"} <= set(found):
        return {key: _numpy_of_msgpack(inner) for key, inner in found.items()}
    kind = found["type"]
    kind = kind.decode() if isinstance(kind, bytes) else kind
    if not isinstance(kind, str) or not re.fullmatch(r"[<>|=][biufSU]\d{1,4}", kind):
        raise ValueError(f"it holds a NumPy array of type {str(kind)[:20]!r}, expected numbers")
    array = np.frombuffer(found["data"], kind)
    return array.reshape(found["shape"]) if found["nd"] else array[0].item()


def _of_datum(value: bytes, bgr: bool) -> tuple[Any, int]:
    datum = read_datum(value)
    shape = datum.channels, datum.height, datum.width
    size = datum.channels * datum.height * datum.width
    if datum.encoded or (_IMAGES.match(datum.data) and len(datum.data) != size):
        if not _IMAGES.match(datum.data):
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


# ---- parts ----


def _split(item: Any) -> tuple[Any, Any]:
    """Return (image, everything else) of a sample."""
    if (image := _image_of(item)) is not None:
        return image, None
    if isinstance(item, Mapping):
        parts = {_text_of(key): inner for key, inner in item.items()}
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
        return value if _IMAGES.match(value) else None
    if not isinstance(value, np.ndarray):
        return value if hasattr(value, "getexif") else None  # of PIL
    if value.dtype != np.uint8 or not value.size:
        return None
    if max(value.shape, default=0) == value.size:  # as cv2.imencode gives it, [N] or [N, 1]
        data = value.tobytes()
        if _IMAGES.match(data):
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
