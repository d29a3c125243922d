"""How is an untrusted pickle read without running any of it?

A pickle is a program: it names functions and calls them. Here it can name a dozen, and gets a
stand-in for each (:mod:`dlhelpers.lmdb_io.stand_ins`), of which the values are built when the
program has ended. Everything else is refused by its full name, before anything is imported.

The reader is Python's own, the one written in Python: the one in C allocates what a length says
before it looks whether so many bytes are there. What a few bytes can expand to, by naming one value
many times, is bounded as well.

Source: Python's pickletools.py, which describes the opcodes.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any, ClassVar

from dlhelpers.lmdb_io.safe_keys import KeysError, need_safe
from dlhelpers.lmdb_io.stand_ins import (
    ADVICE,
    KNOWN,
    PICTURES,
    Array,
    DType,
    PickleError,
    Picture,
)

__all__ = ["PickleError", "unpickle"]

_LEAST_WEIGHT = 1_000_000
_EXPANSION = 4  # bytes and values that a byte of a pickle may stand for


def unpickle(data: bytes) -> Any:
    """Return the value of a pickle of protocol 0 to 5, of Python 2 or 3; no code of it runs.

    Args:
        data: the pickle, all of it.

    Returns:
        None, bool, int, float, str, bytes, list, tuple, dict, NumPy arrays (scalars as plain
        numbers) and PIL images. Text of Python 2 comes as bytes.

    Raises:
        PickleError: it names other code, is damaged, or expands to far more than its size.

    >>> import numpy as np
    >>> unpickle(pickle.dumps((b"image", np.int64(3))))
    (b'image', 3)
    >>> unpickle(b"cos\\nsystem\\n(S'ls'\\ntR.")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    dlhelpers.lmdb_io.stand_ins.PickleError: its pickle needs os.system, which is not run: ...
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
    except KeysError as error:
        raise PickleError(f"its pickle holds {error}: {ADVICE}") from None
    except RecursionError:
        raise PickleError("its pickle is nested too deeply to be read") from None
    except Exception as error:  # whatever a wrong opcode makes of a wrong stack
        raise PickleError(
            f"its pickle is damaged ({type(error).__name__}: {str(error)[:80]})"
        ) from None


class _Reader(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Python's reader, with a closed list of names and without the opcodes that go round it."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, file: io.BytesIO, size: int) -> None:
        super().__init__(file, fix_imports=False, encoding="bytes")
        self._budget = _Budget(size)
        self.memo = _Memo()
        self._numbers = 0  # that are keys of dicts

    def find_class(self, module: str, name: str) -> Any:
        asked = f"{module} {name}"
        if asked in KNOWN:
            return KNOWN[asked]
        if PICTURES.fullmatch(asked):
            return Picture
        full = f"{module}.{name}"[:200].replace("\n", "\\n")
        why = "which is not run"
        if module.startswith("torch"):
            why = "since it holds tensors, which hold pickles of their own that are not run"
        raise PickleError(f"its pickle needs {full}, {why}: {ADVICE}")

    def persistent_load(self, pid: Any) -> Any:
        raise PickleError(f"its pickle refers to an object outside it: {ADVICE}")

    def load_extension(self) -> None:
        # copyreg may hold such a class already, and would give it without asking find_class
        raise PickleError(f"its pickle refers to a class by an extension code: {ADVICE}")

    def load_build(self) -> None:
        state = self.stack.pop()
        inst = self.stack[-1]
        # Python's own sets any attribute of any object, functions included
        if not isinstance(inst, (DType, Array, Picture)):
            raise PickleError(f"its pickle sets the state of a {type(inst).__name__}: {ADVICE}")
        inst.build(state)

    def load_reduce(self) -> None:
        args = self.stack[-1]  # each call may copy what it is given
        kinds = (str, bytes, list, tuple, dict)
        self._budget.spend(1 + sum(len(one) for one in args if isinstance(one, kinds)))
        pickle._Unpickler.load_reduce(self)  # type: ignore[attr-defined]

    def _instantiate(self, kind: Any, _args: Any) -> None:
        raise PickleError(f"its pickle makes an object as Python 2 did: {ADVICE}")

    def load_set(self) -> None:
        raise PickleError(f"its pickle holds a set, which cannot be stored: {ADVICE}")

    def _need_safe(self, keys: Sequence[Any]) -> None:
        self._numbers = need_safe(keys, self._numbers)

    def load_dict(self) -> None:
        self._need_safe(self.stack[::2])
        pickle._Unpickler.load_dict(self)  # type: ignore[attr-defined]

    def load_setitems(self) -> None:
        self._need_safe(self.stack[::2])
        pickle._Unpickler.load_setitems(self)  # type: ignore[attr-defined]

    def load_setitem(self) -> None:
        self._need_safe(self.stack[-2:-1])
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


class _Memo(dict[str, Any]):
    """What a pickle numbers, by any numbers: as texts, since those of a hostile pickle may have
    equal hashes."""

    def __setitem__(self, number: Any, value: Any) -> None:
        super().__setitem__(str(number), value)

    def __getitem__(self, number: Any) -> Any:
        return super().__getitem__(str(number))


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
    if kind is Array and value.array is not None:
        budget.spend(value.array.nbytes)
        return value.array
    if kind is Picture and value.state is not None:
        budget.spend(len(value.state[4]))
        return value.image()
    name = kind.__name__ if kind in (complex, bytearray) else "part of an object"
    raise PickleError(f"its pickle holds a {name}, which cannot be stored: {ADVICE}")
