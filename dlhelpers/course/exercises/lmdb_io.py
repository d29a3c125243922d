"""Exercises of notebook 02: what a store can win, keys, packing, checksums, workers, shards."""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dlhelpers.course.exercises import Case, Exercise
from dlhelpers.course.exercises.watching import unchanged, unseen
from dlhelpers.lmdb_io.schema import position_key
from dlhelpers.lmdb_io.shards import part

__all__ = ["EXERCISES"]


def most(store_us: float, rest_us: float) -> float:
    """Return the speedup if the store took no time: all of it / what is left (Amdahl 1967)."""
    return (store_us + rest_us) / rest_us if rest_us else math.inf


def _most_is(store_us: float, rest_us: float, wanted: float) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        return math.isclose(f(store_us, rest_us), wanted, rel_tol=1e-9)

    return test


def _keys_are_bytes(f: Any) -> bool:
    return all(isinstance(f(n), bytes) and 1 <= len(f(n)) <= 511 for n in (0, 600, 10_000))


def _in_order(*positions: int) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        keys = [f(position) for position in positions]
        return sorted(keys) == keys and len(set(keys)) == len(keys)

    return test


def _same_key_again(f: Any) -> bool:
    keys = [f(position) for position in (7, 6, 5, 6, 7)]
    return keys[0] == keys[4] > keys[1] == keys[3] > keys[2]


def find(blob: bytes, ends: Sequence[int], i: int) -> bytes:
    """Return image i of images that lie end to end; ``ends[i]`` is where it ends."""
    return blob[ends[i - 1] if i else 0 : ends[i]]


_PACKED = (b"first", b"second image", b"", b"the last one")


def _finds(i: int, images: Sequence[bytes] = _PACKED) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        ends = list(itertools.accumulate(map(len, images)))
        return f(b"".join(images), ends, i) == images[i]

    return test


def is_intact(record: bytes) -> bool:
    """Whether a record, its CRC-32 (4 bytes, little-endian) and then its data, is as written."""
    return len(record) >= 4 and zlib.crc32(record[4:]) == int.from_bytes(record[:4], "little")


def _judges(
    change: Callable[[bytearray], bytes], wanted: bool, data: bytes = b"some encoded image"
) -> Callable[[Any], bool]:
    record = struct.pack("<I", zlib.crc32(data)) + data

    def test(f: Any) -> bool:
        answer = f(bytes(change(bytearray(record))))
        return isinstance(answer, (bool, np.bool_)) and bool(answer) is wanted

    return test


def _flipped(place: int) -> Callable[[bytearray], bytes]:
    def change(record: bytearray) -> bytes:
        record[place] ^= 1
        return bytes(record)

    return change


def _swapped(record: bytearray) -> bytes:
    record[6], record[7] = record[7], record[6]
    return bytes(record)


def state_to_send(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a data set's ``__dict__`` in which the open environment is None."""
    return state | {"env": None}


def _state() -> dict[str, Any]:
    return {"path": "photos.lmdb", "env": object(), "transform": None}


class _Environment:
    """Cannot be copied or pickled, as LMDB's cannot."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("cannot pickle 'Environment' object")


def _sends_another(f: Any) -> bool:
    transform = object()
    sent = f({"path": "/data/train.lmdb", "env": _Environment(), "transform": transform})
    return (
        sent.get("path") == "/data/train.lmdb"
        and sent.get("transform") is transform
        and sent.get("env") is None
    )


def _leaves_the_environment(f: Any) -> bool:
    return f(_state()).get("env") is None


def _sends_the_rest(f: Any) -> bool:
    sent = f(_state())
    return sent.get("path") == "photos.lmdb" and "transform" in sent


def _leaves_the_parent(f: Any) -> bool:
    state = _state()
    before = dict(state)
    return f(state) is not state and state == before


def _shares(count: int, world: int, test: Callable[[list[list[int]]], bool]) -> Any:
    def run(f: Any) -> bool:
        return test([list(f(count, rank, world)) for rank in range(world)])

    return run


def _is_everything(count: int) -> Callable[[list[list[int]]], bool]:
    return lambda parts: sorted(i for p in parts for i in p) == list(range(count))


def _is_contiguous(parts: list[list[int]]) -> bool:
    joined = [i for p in parts for i in p]
    return joined == sorted(joined)


def _is_even(parts: list[list[int]]) -> bool:
    return max(map(len, parts)) - min(map(len, parts)) <= 1


def _is_a_range(f: Any) -> bool:
    return all(isinstance(f(10, rank, 2), range) for rank in (0, 1))


def _shares_well(count: int, world: int) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        ranks = reversed(range(world))  # each process asks by itself, in any order
        parts = [list(f(count, rank, world)) for rank in ranks][::-1]
        return _is_everything(count)(parts) and _is_contiguous(parts) and _is_even(parts)

    return test


EXERCISES = (
    Exercise(
        id="02.1",
        title="What a free store can win (predict, then run)",
        task="Write most(store_us, rest_us): the speedup if the store took no time at all.",
        cases=(
            Case(
                "equal shares",
                "store and rest take 100 us each: without the store 100 of 200 us are left, so it "
                "is 2 times as fast (a speedup is time before / time after)",
                _most_is(100.0, 100.0, 2.0),
            ),
            Case(
                "decoding dominates",
                "10 us of store before 200 us of the rest: 210 us become 200, a speedup a little "
                "over 1, and not 20",
                _most_is(10.0, 200.0, 1.05),
            ),
            Case(
                "nothing but the store",
                "where the rest takes no time, a free store is infinitely faster: math.inf, not "
                "an error",
                _most_is(10.0, 0.0, math.inf),
            ),
            unseen(_most_is(30.0, 10.0, 4.0), _most_is(0.0, 70.0, 1.0), _most_is(35.0, 28.0, 2.25)),
        ),
        hints=(
            "Write down the time before and the time after; a speedup is their quotient.",
            "(store_us + rest_us) / rest_us, and mind the case rest_us == 0.",
        ),
        solution=most,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="02.2",
        title="Keys that sort",
        task="Write key(position): bytes, such that LMDB's order of keys is that of the numbers.",
        cases=(
            Case(
                "bytes",
                "LMDB's keys are 1 to 511 bytes: str(position).encode(), or b'%d' % position",
                _keys_are_bytes,
            ),
            Case(
                "nine before ten",
                "as bytes, b'10' comes before b'9': pad with zeros to one length",
                _in_order(2, 9, 10, 11),
            ),
            Case(
                "a million images",
                "further on the order breaks (with four digits from 10,000 on), or two "
                "neighbours get the same key (a float has too few digits): pad to 12 digits; the "
                "most significant digit has to come first",
                _in_order(
                    *(0, 99, 100, 9_999, 10_000, 99_999, 100_000, 1_281_166),
                    *(9_999_999, 10_000_000, 10_000_001),
                ),
            ),
            Case(
                "asked again",
                "position 7 got one key at first and another later: the key is made from the "
                "position alone, not from a counter of calls; otherwise no record is found again",
                _same_key_again,
            ),
        ),
        hints=(
            "Bytes are compared from the left, like words in a dictionary.",
            "b'%012d' % position pads with zeros to twelve digits.",
        ),
        solution=position_key,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="02.3",
        title="A packed file by hand",
        task="Write find(blob, ends, i): image i of images that lie end to end in blob.",
        cases=(
            Case(
                "the second image",
                "image 1 begins where image 0 ends: ends[0], and stops at ends[1]",
                _finds(1),
            ),
            Case(
                "the first image",
                "the first image begins at 0; ends[i - 1] is ends[-1] for i = 0, the end of all",
                _finds(0),
            ),
            Case(
                "the last image",
                "the last image ends at ends[-1]; there is no ends[i + 1] any more",
                _finds(3),
            ),
            Case(
                "an empty image",
                "image 2 has no bytes: it begins and ends at 17",
                _finds(2),
            ),
            unseen(*(_finds(i, (b"", b"\xff\xd8 one", b"\x89PNG two", b"3")) for i in range(4))),
            unchanged(lambda: (b"".join(_PACKED), [5, 17, 17, 29], 1)),
        ),
        hints=(
            "Where an image begins is where the one before it ends.",
            "blob[start:ends[i]], with start = 0 for i = 0 and ends[i - 1] otherwise.",
        ),
        solution=find,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="02.4",
        title="Find the damage",
        task="Write is_intact(record): does the CRC-32 in the first 4 bytes fit the data after it?",
        cases=(
            Case(
                "an intact record",
                "this record is as it was written: the checksum is zlib.crc32 of what "
                "follows it (record[4:]), stored little-endian; return True or False",
                _judges(bytes, True),
            ),
            Case(
                "one bit of the data flipped",
                "one bit of the data was flipped, and the record was called intact",
                _judges(_flipped(9), False),
            ),
            Case(
                "one bit of the checksum flipped",
                "the checksum itself was damaged: all four of its bytes have to fit",
                _judges(_flipped(3), False),
            ),
            Case(
                "two bytes swapped",
                "two bytes changed places, which a plain sum does not notice: use zlib.crc32",
                _judges(_swapped, False),
            ),
            unseen(
                _judges(bytes, True, b"another image, of another length"),
                _judges(_flipped(12), False, b"another image, of another length"),
                _judges(_swapped, False, bytes(range(256))),
            ),
        ),
        hints=(
            "Compute the checksum of the data anew and compare it with the stored one.",
            "int.from_bytes(record[:4], 'little') is the stored one.",
        ),
        solution=is_intact,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="02.5",
        title="What a worker is sent",
        task="Write state_to_send(state): what __getstate__ of a lazily opened data set returns.",
        cases=(
            Case(
                "the environment",
                "the open environment is still in it: a worker must open its own, so send None",
                _leaves_the_environment,
            ),
            Case(
                "all the rest",
                "path and transform have to arrive as well: only the environment is left out",
                _sends_the_rest,
            ),
            Case(
                "the parent",
                "the parent's own state was changed: its environment is gone. Change a copy",
                _leaves_the_parent,
            ),
            Case(
                "another data set",
                "another path and transform did not arrive, or the environment was copied before "
                "it was dropped, which LMDB refuses: copy the dict that was given, not what is in "
                "it, and replace the one entry",
                _sends_another,
            ),
        ),
        hints=(
            "state | {...} makes a new dict with some entries replaced.",
            "The entry is called 'env'.",
        ),
        solution=state_to_send,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="02.6",
        title="Shards",
        task="Write part(count, rank, world): the positions that this rank converts, as a range.",
        cases=(
            Case(
                "ten images, two ranks",
                "rank 0 and rank 1 together must convert each of the ten images once",
                _shares(10, 2, _is_everything(10)),
            ),
            Case(
                "seven images, three ranks",
                "7 is no multiple of 3: images are lost or come twice at the end",
                _shares(7, 3, _is_everything(7)),
            ),
            Case(
                "neighbours stay together",
                "every third image for each rank mixes the order: shards opened one after the "
                "other must give the order of the whole, so each rank takes one contiguous part",
                _shares(7, 3, _is_contiguous),
            ),
            Case(
                "equal work",
                "parts may differ by one image at most: the rest must not pile up at one rank",
                lambda f: _shares(9, 4, _is_even)(f) and _shares(11, 4, _is_even)(f),
            ),
            Case(
                "a range",
                "the positions are right, but they are no range: the task asks for one, which "
                "holds two numbers however many images there are. Return range(first, last)",
                _is_a_range,
            ),
            unseen(*itertools.starmap(_shares_well, ((8, 3), (23, 5), (3, 7), (100, 1), (64, 64)))),
        ),
        hints=(
            "Where rank r ends, rank r + 1 begins: one formula for both keeps them together.",
            "The boundary before rank r is count * r // world.",
        ),
        solution=part,
        by_hand=("dlhelpers.*",),
    ),
)
