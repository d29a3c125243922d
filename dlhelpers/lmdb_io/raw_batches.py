"""How do raw images come into a batch? In one copy, from the map to where they are needed.

Raw pixels need no decoder, so that what is done beside the copy counts: nothing is looked at twice,
and no image is made in between. Records that are no raw image of the batch's size are left to
whoever can decode them, or say what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from dlhelpers.lmdb_io import decoding, schema
from dlhelpers.lmdb_io.checksums import crc32
from dlhelpers.lmdb_io.encoding import RAW

__all__ = ["RawBatch", "transactions"]

_SHARED_BYTES = 1 << 16  # what is smaller is checked sooner than another thread takes its turn


@contextmanager
def transactions() -> Iterator[Callable[[Any], Any]]:
    """Give a function from a file to its read transaction, begun at its first use."""
    begun: dict[Any, Any] = {}

    def of(file: Any) -> Any:
        if file not in begun:
            begun[file] = file.open().begin()
        return begun[file]

    try:
        yield of
    finally:
        for txn in begun.values():
            txn.abort()


class RawBatch:
    """Raw images of one size, to be copied into a batch.

    Attributes:
        shape: of the batch, without its first axis: (H, W, 3) or (3, H, W).
        is_large: whether threads can share the checksums, which let go of Python's lock. A copy
            alone is bound by memory.
    """

    def __init__(self, head: bytes, planar: bool) -> None:
        """``head`` is that of one of the images; ``planar`` asks for [3, H, W]."""
        _, _, height, width = RAW.unpack(head)
        self._head, self._planar = head, planar
        self.shape = (3, height, width) if planar else (height, width, 3)
        self._bytes = 3 * height * width
        self.is_large = self._bytes >= _SHARED_BYTES

    @classmethod
    def like(cls, place: tuple[Any, int], planar: bool) -> RawBatch | None:
        """Return what fits one record; None if it is no raw image."""
        file, position = place
        with transactions() as of:
            try:
                view = of(file).get(schema.position_key(position))
                image = schema.unpack_record(view, position, False).image
                head = bytes(image[: RAW.size])
                raw, orientation, height, width = RAW.unpack(head)
            except Exception:  # whoever reads it will say what is wrong
                return None
            is_whole = len(image) == RAW.size + 3 * height * width > RAW.size
            is_raw = raw == b"RAW" and orientation <= 8 and is_whole
            return cls(head, planar) if is_raw else None

    def copy(
        self,
        places: Sequence[tuple[Any, int]],
        numbers: Sequence[int],
        out: np.ndarray,
        targets: list[Any],
        check: bool,
    ) -> list[int]:
        """Copy images into a batch, and read their targets.

        Args:
            places: (file, position) of all images of the batch.
            numbers: of those that are copied.
            out: the batch, contiguous.
            targets: of the batch, to be filled in.
            check: compares checksums.

        Returns:
            The numbers that were left out, since there is more to them than copying.
        """
        paste, left, found = self._paste(out), [], []
        head, head_bytes, image_bytes = self._head, RAW.size, RAW.size + self._bytes
        key, unpack, key_at = schema.position_key, schema.HEADER.unpack_from, schema.HEADER.size
        file = get = None
        with transactions() as of:
            for number in numbers:
                try:
                    place, position = places[number]
                    if place is not file:
                        get, file = of(place).get, place
                    view = get(key(position))
                    # what unpack_record does, without what is not needed here
                    checksum, stored, key_bytes, target_bytes = unpack(view)
                    target = key_at + key_bytes
                    image = target + target_bytes
                    pixels = image + head_bytes
                    if (
                        stored != position
                        or len(view) - image != image_bytes
                        or view[image:pixels] != head
                        or (check and crc32(view[4:]) != checksum)
                    ):
                        left.append(number)
                        continue
                    targets[number] = schema.read_target(bytes(view[target:image]))
                except Exception:
                    left.append(number)
                    continue
                if check:  # it is in the cache by now
                    paste(number, view[pixels:])
                else:
                    found.append((number, view[pixels:]))
            for number, pixels in found:  # what looks for records would drive the pixels out
                paste(number, pixels)
        return left

    def _paste(self, out: np.ndarray) -> Callable[[int, memoryview], None]:
        size = self._bytes

        def split(number: int, pixels: memoryview) -> None:
            decoding.planar(np.frombuffer(pixels, np.uint8).reshape(interleaved), out[number])

        def assign(number: int, pixels: memoryview) -> None:
            flat[size * number : size * (number + 1)] = pixels

        if self._planar:
            interleaved = (*self.shape[1:], 3)
            return split
        flat = memoryview(out).cast("B")
        return assign
