"""How is an untrusted pickle read without running any of it?

A pickle is a program: it names functions and calls them. Here it can name a dozen, and gets a
stand-in for each: these note what an array, a scalar or a picture is made of, and the values are
built, with their sizes checked, when the program has ended. Everything else is refused by its full
name, before anything is imported.

The reader is Python's own, the one written in Python: the one in C allocates what a length says
before it looks whether so many bytes are there. What a few bytes can expand to, by naming one value
many times, is bounded as well.

Source: Python's pickletools.py, which describes the opcodes; NEP 1 for what NumPy pickles.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from dlhelpers.extras import need
from dlhelpers.printable import printable

__all__ = ["PickleError", "unpickle"]

_LEAST_WEIGHT = 1_000_000
_MOST_AXES = 32
_EXPANSION = 4  # bytes and values that a byte of a pickle may stand for
_DTYPE = re.compile(r"[?bBhHiIlLqQefd]|[biuf][1248]|[SU]\d{1,9}")
_PICTURES = re.compile(r"PIL\.Image Image|PIL\.(\w+)ImagePlugin \1ImageFile", re.IGNORECASE)
_PIXEL_BYTES = {"L": 1, "P": 1, "LA": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "RGBA": 4, "CMYK": 4}
_ADVICE = (
    "read the database with the code that wrote it, and give write_lmdb (key, image, target) "
    "triples"
)


class PickleError(ValueError):
    """A pickle that is not whole, or asks for more than plain values, arrays and pictures."""

    def __str__(self) -> str:
        return printable(super().__str__())


def unpickle(data: bytes) -> Any:
    """Return the value of a pickle of protocol 0 to 5, of Python 2 or 3; no code of it runs.

    Args:
        data: the pickle, all of it.

    Returns:
        None, bool, int, float, str, bytes, list, tuple, dict, NumPy arrays (scalars as plain
        numbers) and PIL images. Text of Python 2 comes as bytes.

    Raises:
        PickleError: it names other code, is damaged, or expands to far more than its size.

    >>> unpickle(pickle.dumps((b"image", np.int64(3))))
    (b'image', 3)
    >>> unpickle(b"cos\\nsystem\\n(S'ls'\\ntR.")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    dlhelpers.lmdb_io.unpickling.PickleError: its pickle needs os.system, which is not run: ...
    """
    file = io.BytesIO(data)
    try:
        found = _Reader(file, len(data)).load()
        if rest := len(data) - file.tell():
            what = "1 byte follows" if rest == 1 else f"{rest} bytes follow"
            raise PickleError(f"{what} the end of its pickle")
        return _plain(found, _Budget(len(data)))
    except PickleError:
        raise
    except RecursionError:
        raise PickleError("its pickle is nested too deeply to be read") from None
    except Exception as error:  # whatever a wrong opcode makes of a wrong stack
        raise PickleError(
            f"its pickle is damaged ({type(error).__name__}: {str(error)[:80]})"
        ) from None


# ---- stand-ins for what a pickle names ----


class _Named:
    """A class that is handed to a function of this module, and can do nothing by itself."""

    def __init__(self, name: str) -> None:
        self.name = name


class _DType:
    """What ``numpy.dtype(code)`` and its state say."""

    def __init__(self, code: Any, *_flags: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code
        if not isinstance(self.code, str) or not _DTYPE.fullmatch(self.code):
            raise PickleError(
                f"it holds a NumPy array of type {_short(self.code)}, expected numbers or "
                f"texts: {_ADVICE}"
            )
        self.order = "="

    def build(self, state: Any) -> None:
        order, *structure = state[1:5]
        if any(part is not None for part in structure):
            raise PickleError(f"it holds a structured NumPy array: {_ADVICE}")
        order = order.decode() if isinstance(order, bytes) else order
        if not isinstance(order, str) or order not in ("<", ">", "=", "|"):
            raise PickleError(f"its NumPy array has the byte order {_short(order)}")
        self.order = order

    def make(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """What an array's state says."""

    array: np.ndarray | None = None

    def build(self, state: Any) -> None:
        shape, dtype, is_fortran, data = state[-4:]
        self.array = _array_of(data, dtype, shape, "F" if is_fortran else "C")


class _Picture:
    """What the state of a PIL image says."""

    state: Any = None

    def build(self, state: Any) -> None:
        self.state = state

    def image(self) -> Any:
        info, mode, size, palette, data = self.state[:5]
        if not isinstance(mode, str) or mode not in _PIXEL_BYTES:
            raise PickleError(f"it holds a PIL image of mode {_short(mode)}: {_ADVICE}")
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


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _NDARRAY:
        raise PickleError(f"it holds an array of a class of its own: {_ADVICE}")
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> _Array:
    found = _Array()
    found.array = _array_of(data, dtype, shape, "F" if order in ("F", b"F") else "C")
    return found


def _scalar(dtype: Any, data: Any = b"") -> Any:
    found = _array_of(data, dtype, (), "C")
    return bytes(data) if found.dtype.kind == "S" else found.item()  # item() drops zeros at the end


def _array_of(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, _DType) or not isinstance(data, (bytes, bytearray)):
        raise PickleError("its NumPy array is damaged")
    made = dtype.make()
    if len(shape) > _MOST_AXES or not all(type(s) is int and 0 <= s < 1 << 63 for s in shape):
        raise PickleError("its NumPy array has an impossible shape")
    if math.prod(shape) * made.itemsize != len(data) or not made.itemsize:
        raise PickleError(
            f"its NumPy array says {made} of shape {[*shape]}, and has {len(data)} bytes"
        )
    return np.frombuffer(bytes(data), made).reshape(shape, order=order)  # type: ignore[call-overload]


def _copyreg_new(kind: Any, base: Any, _state: Any) -> _Picture:
    if kind is not _Picture or base is not _OBJECT:
        raise PickleError(f"it holds an object of a class of its own: {_ADVICE}")
    return _Picture()


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
    _need_simple(key for key, _ in items)
    return dict(items)


def _need_simple(keys: Iterable[Any]) -> None:
    # the hash of nested tuples may take for ever
    for key in keys:
        if type(key) not in (str, bytes, int, float, bool, type(None)):
            raise PickleError(f"its pickle holds a dict with a {type(key).__name__} as key")


def _short(value: Any) -> str:
    # what is not looked at yet may be endless when it is printed
    return repr(value[:20]) if isinstance(value, (str, bytes)) else f"<{type(value).__name__}>"


_KNOWN: dict[str, Any] = {
    "_codecs encode": _encode,
    "collections OrderedDict": _ordered,
    "numpy dtype": _DType,
    "numpy ndarray": _NDARRAY,
}
for _module in ("builtins", "__builtin__"):
    _KNOWN |= {f"{_module} {name}": _bytes for name in ("bytes", "bytearray")}
    _KNOWN[f"{_module} object"] = _OBJECT
for _module in ("copyreg", "copy_reg"):
    _KNOWN[f"{_module} _reconstructor"] = _copyreg_new
for _core in ("core", "_core"):
    _KNOWN[f"numpy.{_core}.multiarray _reconstruct"] = _reconstruct
    _KNOWN[f"numpy.{_core}.multiarray scalar"] = _scalar
    _KNOWN[f"numpy.{_core}.numeric _frombuffer"] = _from_buffer


class _Reader(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Python's reader, with a closed list of names and without the opcodes that go round it."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, file: io.BytesIO, size: int) -> None:
        super().__init__(file, fix_imports=False, encoding="bytes")
        self._budget = _Budget(size)

    def find_class(self, module: str, name: str) -> Any:
        asked = f"{module} {name}"
        if asked in _KNOWN:
            return _KNOWN[asked]
        if _PICTURES.fullmatch(asked):
            return _Picture
        full = f"{module}.{name}"[:200].replace("\n", "\\n")
        why = "which is not run"
        if module.startswith("torch"):
            why = "since it holds tensors, which hold pickles of their own that are not run"
        raise PickleError(f"its pickle needs {full}, {why}: {_ADVICE}")

    def persistent_load(self, pid: Any) -> Any:
        raise PickleError(f"its pickle refers to an object outside it: {_ADVICE}")

    def load_extension(self) -> None:
        # copyreg may hold such a class already, and would give it without asking find_class
        raise PickleError(f"its pickle refers to a class by an extension code: {_ADVICE}")

    def load_build(self) -> None:
        state = self.stack.pop()
        inst = self.stack[-1]
        # Python's own sets any attribute of any object, functions included
        if not isinstance(inst, (_DType, _Array, _Picture)):
            raise PickleError(f"its pickle sets the state of a {type(inst).__name__}: {_ADVICE}")
        inst.build(state)

    def load_reduce(self) -> None:
        args = self.stack[-1]  # each call may copy what it is given
        kinds = (str, bytes, list, tuple, dict)
        self._budget.spend(1 + sum(len(one) for one in args if isinstance(one, kinds)))
        pickle._Unpickler.load_reduce(self)  # type: ignore[attr-defined]

    def _instantiate(self, kind: Any, _args: Any) -> None:
        raise PickleError(f"its pickle makes an object as Python 2 did: {_ADVICE}")

    def load_set(self) -> None:
        raise PickleError(f"its pickle holds a set, which cannot be stored: {_ADVICE}")

    def load_dict(self) -> None:
        _need_simple(self.stack[::2])
        pickle._Unpickler.load_dict(self)  # type: ignore[attr-defined]

    def load_setitems(self) -> None:
        _need_simple(self.stack[::2])
        pickle._Unpickler.load_setitems(self)  # type: ignore[attr-defined]

    def load_setitem(self) -> None:
        _need_simple(self.stack[-2:-1])
        pickle._Unpickler.load_setitem(self)  # type: ignore[attr-defined]

    def load_bytearray(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        data = self.read(size)  # Python's own makes room first
        if len(data) != size:
            raise PickleError(f"its pickle ends within {size} bytes")
        self.append(data)

    for _opcode in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[_opcode[0]] = load_extension
    for _opcode in (pickle.EMPTY_SET, pickle.FROZENSET, pickle.ADDITEMS):
        dispatch[_opcode[0]] = load_set
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray
    del _opcode


class _Budget:
    """How much a pickle of so many bytes may still expand to."""

    def __init__(self, size: int) -> None:
        self.left = max(_LEAST_WEIGHT, _EXPANSION * size)

    def spend(self, weight: int) -> None:
        self.left -= weight
        if self.left < 0:
            raise PickleError("its pickle expands to many times its size and is not read")


def _plain(value: Any, budget: _Budget) -> Any:
    """Return a value with the stand-ins put together."""
    kind = type(value)
    budget.spend(1 + (len(value) if kind in (str, bytes) else 0))
    if value is None or kind in (bool, int, float, str, bytes):
        return value
    if kind in (list, tuple):
        return kind([_plain(inner, budget) for inner in value])
    if kind is dict:
        return {_plain(key, budget): _plain(inner, budget) for key, inner in value.items()}
    if kind is _Array and value.array is not None:
        budget.spend(value.array.nbytes)
        return value.array
    if kind is _Picture and value.state is not None:
        budget.spend(len(value.state[4]))
        return value.image()
    name = kind.__name__ if kind in (complex, bytearray) else "part of an object"
    raise PickleError(f"its pickle holds a {name}, which cannot be stored: {_ADVICE}")
