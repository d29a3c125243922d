"""Which names may an untrusted pickle use, and what does each of them give?

A pickle names functions and classes. These are all that it gets: stand-ins, which note what an
array, a scalar or a picture is made of, compare the sizes with the bytes that are there, and do
nothing else.

Source: NEP 1 for what NumPy pickles.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from dlhelpers.extras import need
from dlhelpers.lmdb_io.safe_keys import safe_dict
from dlhelpers.printable import printable

__all__ = ["ADVICE", "KNOWN", "PICTURES", "Array", "DType", "PickleError", "Picture"]

_MOST_AXES = 32
_MOST_EMPTY = 1000  # rows of an array without elements
_DTYPE = re.compile(r"[?bBhHiIlLqQefd]|[biuf][1248]|[SU]\d{1,9}")
PICTURES = re.compile(r"PIL\.Image Image|PIL\.(\w+)ImagePlugin \1ImageFile", re.IGNORECASE)
_PIXEL_BYTES = {"L": 1, "P": 1, "LA": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "RGBA": 4, "CMYK": 4}
ADVICE = (
    "read the database with the code that wrote it, and give write_lmdb (key, image, target) "
    "triples"
)


class PickleError(ValueError):
    """A pickle that is not whole, or asks for more than plain values, arrays and pictures."""

    def __str__(self) -> str:
        return printable(super().__str__())


class _Named:
    """A class that is handed to a function of this module, and can do nothing by itself."""

    def __init__(self, name: str) -> None:
        self.name = name


class DType:
    """What ``numpy.dtype(code)`` and its state say."""

    def __init__(self, code: Any, *_flags: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code
        if not isinstance(self.code, str) or not _DTYPE.fullmatch(self.code):
            raise PickleError(
                f"it holds a NumPy array of type {_short(self.code)}, expected numbers or "
                f"texts: {ADVICE}"
            )
        self.order = "="

    def build(self, state: Any) -> None:
        """Take the order of bytes."""
        order, *structure = state[1:5]
        if any(part is not None for part in structure):
            raise PickleError(f"it holds a structured NumPy array: {ADVICE}")
        order = order.decode() if isinstance(order, bytes) else order
        if not isinstance(order, str) or order not in ("<", ">", "=", "|"):
            raise PickleError(f"its NumPy array has the byte order {_short(order)}")
        self.order = order

    def make(self) -> np.dtype[Any]:
        """Return the type of numbers."""
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


class Array:
    """What an array's state says."""

    array: np.ndarray | None = None

    def build(self, state: Any) -> None:
        """Make the array, of the size that it says."""
        shape, dtype, is_fortran, data = state[-4:]
        self.array = _array_of(data, dtype, shape, "F" if is_fortran else "C")


class Picture:
    """What the state of a PIL image says."""

    state: Any = None

    def build(self, state: Any) -> None:
        """Take the state, which :meth:`image` looks at."""
        self.state = state

    def image(self) -> Any:
        """Return the PIL image, of the size that it says."""
        info, mode, size, palette, data = self.state[:5]
        if not isinstance(mode, str) or mode not in _PIXEL_BYTES:
            raise PickleError(f"it holds a PIL image of mode {_short(mode)}: {ADVICE}")
        width, height = size
        if not isinstance(data, bytes):
            raise PickleError(f"its PIL image holds a {type(data).__name__} as pixels")
        if not (width > 0 and height > 0 and width * height * _PIXEL_BYTES[mode] == len(data)):
            raise PickleError(f"its PIL image says {width} x {height} {mode} in {len(data)} bytes")
        image = need("PIL.Image", "a pickled PIL image").frombytes(mode, (width, height), data)
        if mode in ("P", "PA") and palette:
            image.putpalette(palette)
        if isinstance(info, dict) and isinstance(info.get("exif"), bytes):
            image.info["exif"] = info["exif"]
        return image


_NDARRAY, _OBJECT = _Named("numpy.ndarray"), _Named("builtins.object")


def _reconstruct(kind: Any, *_: Any) -> Array:
    if kind is not _NDARRAY:
        raise PickleError(f"it holds an array of a class of its own: {ADVICE}")
    return Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> Array:
    found = Array()
    found.array = _array_of(data, dtype, shape, "F" if order in ("F", b"F") else "C")
    return found


def _scalar(dtype: Any, data: Any = b"") -> Any:
    found = _array_of(data, dtype, (), "C")
    return bytes(data) if found.dtype.kind == "S" else found.item()  # item() drops zeros at the end


def _array_of(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, DType) or not isinstance(data, (bytes, bytearray)):
        raise PickleError("its NumPy array is damaged")
    made = dtype.make()
    if len(shape) > _MOST_AXES or not all(type(s) is int and 0 <= s < 1 << 63 for s in shape):
        raise PickleError("its NumPy array has an impossible shape")
    if 0 in shape and math.prod(filter(None, shape)) > _MOST_EMPTY:  # each row becomes a list
        raise PickleError(f"its NumPy array of shape {[*shape]} holds nothing")
    if math.prod(shape) * made.itemsize != len(data) or not made.itemsize:
        raise PickleError(
            f"its NumPy array says {made} of shape {[*shape]}, and has {len(data)} bytes"
        )
    return np.frombuffer(bytes(data), made).reshape(shape, order=order)  # type: ignore[call-overload]


def _copyreg_new(kind: Any, base: Any, _state: Any) -> Picture:
    if kind is not Picture or base is not _OBJECT:
        raise PickleError(f"it holds an object of a class of its own: {ADVICE}")
    return Picture()


def _encode(text: str, how: str = "utf-8") -> bytes:  # how protocols 0 to 2 write bytes
    if how not in ("latin1", "latin-1") or not isinstance(text, str):
        raise PickleError(f"its pickle encodes bytes as {_short(how)}, which Python never does")
    return text.encode("latin-1")


def _bytes(data: Any = b"", *how: Any) -> bytes:
    if isinstance(data, str):
        return _encode(data, *how)
    if not isinstance(data, (bytes, list)):  # bytes(10**10) would be ten gigabytes
        raise PickleError("its pickle calls bytes with a number")
    return bytes(data)


def _ordered(items: Any = ()) -> dict[Any, Any]:
    return safe_dict(items)


def _short(value: Any) -> str:
    # what is not looked at yet may be endless when it is printed
    return repr(value[:20]) if isinstance(value, (str, bytes)) else f"<{type(value).__name__}>"


KNOWN: dict[str, Any] = {
    "_codecs encode": _encode,
    "collections OrderedDict": _ordered,
    "numpy dtype": DType,
    "numpy ndarray": _NDARRAY,
}
for _module in ("builtins", "__builtin__"):
    KNOWN |= {f"{_module} {name}": _bytes for name in ("bytes", "bytearray")}
    KNOWN[f"{_module} object"] = _OBJECT
for _module in ("copyreg", "copy_reg"):
    KNOWN[f"{_module} _reconstructor"] = _copyreg_new
for _core in ("core", "_core"):
    KNOWN[f"numpy.{_core}.multiarray _reconstruct"] = _reconstruct
    KNOWN[f"numpy.{_core}.multiarray scalar"] = _scalar
    KNOWN[f"numpy.{_core}.numeric _frombuffer"] = _from_buffer
