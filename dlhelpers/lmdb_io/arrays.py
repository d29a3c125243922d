"""How does an array lie in a record, so that dtype, shape and values come back exactly?

An array is a uint32 with the bytes of its header, the header, and its elements in C order. The
header is the ``repr`` of (what it was, dtype, shape): ``array`` and ``scalar`` of NumPy with a
dtype as a ``.npy`` file describes it, or ``tensor`` with the name of torch's dtype. Numbers and
texts alone stand in it, nothing is pickled, so that arrays of Python objects are refused.

Source: NumPy Enhancement Proposal 1, A Simple File Format for NumPy Arrays.
"""

from __future__ import annotations

import ast
import math
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["pack_array", "unpack_array"]

_PLAIN = (np.ndarray, np.memmap, np.recarray)  # whose values are all that there is
_LONGEST_HEADER = 1 << 20


def pack_array(value: Any) -> bytes:
    """Return the bytes of an array, a tensor or a number; :func:`unpack_array` gives it back.

    A tensor is stored without its device and gradient, a number of Python as NumPy's.

    Raises:
        ValueError: it is none of them, holds Python objects, or is more than its values.

    >>> unpack_array(pack_array(np.float32([[1, 2]])))
    array([[1., 2.]], dtype=float32)
    """
    if hasattr(value, "detach"):
        return _packed_tensor(value)
    if isinstance(value, (bool, int, float, complex, np.generic)):
        kind, array = "scalar", np.asarray(value)
        if array.dtype.kind in "SU" and array[()] != value:
            raise ValueError(
                "a text of NumPy loses the zeros at its end: use the kind bytes or text"
            )
    elif type(value) in _PLAIN:
        kind, array = "array", np.asarray(value)
    elif isinstance(value, np.ndarray):
        raise ValueError(
            f"a {type(value).__name__} is more than its values, which alone can be stored: give "
            "numpy.array(value), and the rest as a field of its own"
        )
    else:
        raise ValueError(
            f"expected a NumPy array, a torch tensor or a number, got {_shown(value)}: give "
            "numpy.asarray(value, dtype), or the kind json for lists and dicts, text for texts, "
            "bytes for bytes"
        )
    return _packed(kind, _description(array.dtype), array.shape, array.tobytes())


def unpack_array(data: bytes | memoryview) -> Any:
    """Return what :func:`pack_array` was given; writable, in memory of its own.

    Raises:
        ValueError: the bytes are no such array.
    """
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or not 0 < size <= min(len(data) - 4, _LONGEST_HEADER):
        raise ValueError(f"{len(data)} bytes are no array")
    kind, dtype, shape, nbytes = _layout(bytes(data[4 : 4 + size]))
    elements = data[4 + size :]
    if len(elements) != nbytes:
        raise ValueError(f"an array of {nbytes} bytes has {len(elements)}")
    if kind == "tensor":
        import torch

        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(elements), dtype=dtype).reshape(shape)
    array = np.ndarray(shape, dtype, elements).copy()
    return array if kind == "array" else array[()]


def _packed(kind: str, dtype: Any, shape: tuple[int, ...], elements: bytes) -> bytes:
    header = repr((kind, dtype, tuple(shape))).encode()
    if len(header) > _LONGEST_HEADER:
        raise ValueError(f"a dtype whose description takes {len(header)} bytes is too large")
    return b"".join((len(header).to_bytes(4, "little"), header, elements))


def _packed_tensor(value: Any) -> bytes:
    import torch

    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        what = "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
        what = "meta" if value.device.type == "meta" else what
        raise ValueError(
            f"a {what} tensor cannot be stored: give a dense one (to_dense(), dequantize()), or "
            "its parts as fields of their own"
        )
    if type(value) not in (torch.Tensor, torch.nn.Parameter) and vars(value):
        raise ValueError(
            f"a {type(value).__name__} holds more than its values ({', '.join(vars(value))}): give "
            "value.as_subclass(torch.Tensor), and the rest as a field of its own, such as json"
        )
    tensor = value.detach().as_subclass(torch.Tensor).cpu().resolve_conj().resolve_neg()
    flat = tensor.reshape(-1).clone(memory_format=torch.contiguous_format)  # one keeps any stride
    elements = flat.view(torch.uint8).numpy().tobytes()
    name = str(tensor.dtype).removeprefix("torch.")
    return _packed("tensor", name, tensor.shape, elements)


@lru_cache(256)
def _description(dtype: np.dtype[Any]) -> Any:
    if dtype.hasobject:
        raise ValueError(
            f"an array of dtype {dtype} holds Python objects, which only pickle could store: give "
            "one of numbers or fixed-width texts (astype), or the kind json (array.tolist())"
        )
    try:
        found = np.lib.format.dtype_to_descr(dtype)
        is_kept = np.lib.format.descr_to_dtype(found) == dtype
    except (TypeError, ValueError):
        is_kept = False
    if not is_kept:
        raise ValueError(
            f"the dtype {dtype} is none that a .npy file describes: give array.view() of a plain "
            "dtype of that width, or astype()"
        )
    return found


@lru_cache(4096)
def _layout(header: bytes) -> tuple[str, Any, tuple[int, ...], int]:
    """Return (kind, dtype, shape, bytes of the elements) that a header tells."""
    try:
        kind, described, shape = ast.literal_eval(header.decode())
        if not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"the shape {shape} is none")
        count = math.prod(shape)
        if kind == "tensor":
            import torch

            dtype = getattr(torch, described)
            return kind, dtype, shape, count * dtype.itemsize
        if kind not in ("array", "scalar"):
            raise ValueError(f"the kind {kind!r} is unknown")
        dtype = np.lib.format.descr_to_dtype(described)
        return kind, dtype, shape, count * dtype.itemsize
    except Exception as error:  # Python's parser and NumPy's raise half a dozen kinds
        raise ValueError(f"the header of an array is damaged: {error}") from None


def _shown(value: Any) -> str:
    text = str(value)
    return f"{type(value).__name__} {text[:40]}{'...' * (len(text) > 40)}"
