"""What does a record of Caffe hold?

Caffe writes each record as a message ``Datum`` of protocol buffers, of seven fields:

    1 channels   2 height   3 width   4 data, bytes   5 label   6 float_data   7 encoded

``data`` is the file of an image where ``encoded`` is set, else its pixels, [channels, height,
width], blue first, as OpenCV reads them. A message is a row of fields, each a number that says
which one and of which kind, and its value.

Source: Caffe's src/caffe/proto/caffe.proto; https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Datum", "read_datum"]

_CHANNELS, _HEIGHT, _WIDTH, _DATA, _LABEL, _FLOATS, _ENCODED = range(1, 8)
_VARINT, _BYTES, _FOUR = 0, 2, 5  # kinds of value
_KINDS = dict.fromkeys((_CHANNELS, _HEIGHT, _WIDTH, _LABEL, _ENCODED), (_VARINT,)) | {
    _DATA: (_BYTES,),
    _FLOATS: (_FOUR, _BYTES),  # one by one, or packed
}


class Datum(NamedTuple):
    """One record; ``floats`` is the number of bytes that float_data takes."""

    channels: int
    height: int
    width: int
    data: bytes
    label: int
    floats: int
    encoded: bool


def read_datum(message: bytes) -> Datum:
    """Return the fields of a message; those that it leaves out are 0, as for Caffe.

    Raises:
        ValueError: it is no Datum, or not whole.

    >>> read_datum(bytes([8, 1, 16, 1, 24, 2, 34, 2, 7, 9, 40, 3]))
    Datum(channels=1, height=1, width=2, data=b'\\x07\\t', label=3, floats=0, encoded=False)
    """
    values = dict.fromkeys((_CHANNELS, _HEIGHT, _WIDTH, _LABEL, _ENCODED), 0)
    data, floats, at = b"", 0, 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind not in _KINDS.get(number, ()):
            raise ValueError(f"not a Datum of Caffe: it has a field {number} of kind {kind}")
        if kind == _VARINT:
            values[number], at = _varint(message, at)
            continue
        size = 4
        if kind == _BYTES:
            size, at = _varint(message, at)
        if at + size > len(message):
            raise ValueError(f"a Datum of Caffe that ends within field {number}")
        if number == _DATA:
            data = message[at : at + size]
        else:
            floats += size
        at += size
    label = (values[_LABEL] & 0xFFFFFFFF ^ 1 << 31) - (1 << 31)  # an int32; negative as 64 bits
    sides = values[_CHANNELS], values[_HEIGHT], values[_WIDTH]
    return Datum(*sides, data, label, floats, bool(values[_ENCODED]))


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return (number, where it ends): seven bits a byte, the lowest first."""
    number = 0
    for count, byte in enumerate(message[at : at + 10]):
        number |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return number, at + count + 1
    raise ValueError("not a Datum of Caffe: it ends within a number")
