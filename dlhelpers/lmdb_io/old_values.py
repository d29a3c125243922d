"""In which form is one value of a tutorial's database, and what does it hold?"""

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
    "IMAGES",
    "form_of",
    "plain_target",
    "printable_text",
    "read_form",
    "read_plain",
    "shown_bytes",
    "with_text_keys",
]

FORMS = {
    "image": "encoded images",
    "pickle": "pickles",
    "msgpack": "msgpack",
    "npy": "NumPy's files (.npy)",
    "datum": "Datum records of Caffe",
    "pyarrow": "pyarrow.serialize",
}
IMAGES = re.compile(
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
    if IMAGES.match(value):
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
        read_form(value, "msgpack")
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
        return read_form(value, form)
    if form:
        raise ValueError(f"it is written in the form of {FORMS[form]}")
    text = value.decode()
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


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
        return {key: plain_target(inner) for key, inner in with_text_keys(value).items()}
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


def with_text_keys(value: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a dict with keys of bytes, as Python 2 wrote text, as the text that they are.

    Raises:
        ValueError: two of its keys are the same text, or one is no text.
    """
    found = {plain_target(k) if isinstance(k, bytes) else k: v for k, v in value.items()}
    if len(found) < len(value):
        raise ValueError(f"two of its {len(value)} keys are the same text, once as bytes")
    return found


def shown_bytes(value: bytes) -> str:
    """Return what a message says of bytes: how many, and the first of them."""
    return f"{len(value)} byte{'s' * (len(value) != 1)}" + (
        f", beginning {value[:16]!r}" if value else ""
    )


# ---- forms ----


def read_form(value: bytes, form: str) -> Any:
    """Return what a value holds, as :func:`form_of` has named its form.

    Raises:
        ValueError: it is not readable.
    """
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
    try:
        return _numpy_of_msgpack(found)
    except RecursionError:
        raise ValueError("its msgpack is nested too deeply to be read") from None
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(f"its NumPy array is damaged ({type(error).__name__}: {error})") from None


def _numpy_of_msgpack(item: Any) -> Any:
    """Put together the arrays of msgpack_numpy, which come as dicts."""
    if isinstance(item, list):
        return [_numpy_of_msgpack(inner) for inner in item]
    if not isinstance(item, dict):
        return item
    found = with_text_keys(item)
    if not {"nd", "type", "data"} <= set(found):
        return {key: _numpy_of_msgpack(inner) for key, inner in found.items()}
    kind = found["type"]
    kind = kind.decode() if isinstance(kind, bytes) else kind
    if not isinstance(kind, str) or not re.fullmatch(r"[<>|=][biufSU]\d{1,4}", kind):
        raise ValueError(f"it holds a NumPy array of type {str(kind)[:20]!r}, expected numbers")
    array = np.frombuffer(found["data"], kind)
    if not found["nd"]:
        return array[0].item()
    if not array.size and len(found["shape"]) > 1:  # its shape alone could fill the memory
        raise ValueError(f"its NumPy array of shape {str(found['shape'])[:60]} holds nothing")
    return array.reshape(found["shape"])
