"""Which item of a dataset stands at which place of an epoch?

Shuffling on two levels: blocks of neighboring records come in random order, and what lies within a
window of that order is shuffled. A disk then reads runs instead of single records, memory has to
keep one window, and any place of an epoch is found without going through those before it.

The random numbers are integer arithmetic of this module: a checkpoint goes on in the same order
with another version of NumPy or torch, and on another machine.

Source: Xu et al. 2022, In-Database Machine Learning with CorgiPile: Stochastic Gradient Descent
without Full Data Shuffle, SIGMOD (two levels); Steele et al. 2014, Fast Splittable Pseudorandom
Number Generators, OOPSLA (SplitMix64); Black and Rogaway 2002, Ciphers with Arbitrary Finite
Domains, CT-RSA (a permutation without a table).
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from dlhelpers.lmdb_io.checksums import crc32
from dlhelpers.lmdb_io.dataset import LMDBDataset

__all__ = ["Order"]

_LARGEST_TABLE = 2**20  # items; what is larger is permuted without a table
_ROUNDS = 4  # of two halves each


class Order:
    """The order of a dataset's items in each epoch.

    Args:
        dataset: with a length; where its shards end is known of an LMDBDataset, also of one inside
            Subset and ConcatDataset.
        shuffle: False for the dataset's own order.
        window: records that are shuffled among each other; None shuffles all of them.
        block: neighboring records that stay together until the window; None takes each shard as a
            whole, and of a single file the square root of the window.
        seed: of all epochs.
    """

    def __init__(
        self, dataset: Any, *, shuffle: bool, window: int | None, block: int | None, seed: int
    ) -> None:
        places, ends = _layout(dataset)
        self.length = len(dataset)
        if self.length != (ends[-1] if places is None else len(places)):  # of a class of its own
            places, ends = None, np.array([self.length], np.int64)
        self.facts: dict[str, Any] = {  # an epoch goes on only where these are the same
            "length": self.length,
            "items": 0 if places is None else crc32(places.tobytes()),
            "seed": seed if shuffle else 0,
            "shuffle": shuffle,
            "window": window if shuffle else None,
            "block": None,
            "shards": 0,
        }
        self._by_place: np.ndarray | None = None  # items in the order in which they are stored
        if not shuffle or window is None:
            return
        if places is not None:
            self._by_place = np.argsort(places, kind="stable")
            ends = np.searchsorted(places[self._by_place], ends)
        sizes = np.diff(ends, prepend=0)
        if block is None:
            block = self.length if np.count_nonzero(sizes) > 1 else math.isqrt(window)
        self._ends = _cut(sizes, max(block, 1))
        self.facts |= {"block": block, "shards": crc32(self._ends.tobytes())}

    def epoch(self, number: int) -> Callable[[np.ndarray], np.ndarray]:
        """Return the function from places of an epoch, int64 [n], to items of the dataset."""
        window, seed, length = self.facts["window"], self.facts["seed"], self.length
        if not self.facts["shuffle"]:
            return lambda places: places
        if window is None:
            return _permutation(length, f"{seed}|{number}|all")
        sizes = np.diff(self._ends, prepend=0)
        turns = _permutation(len(sizes), f"{seed}|{number}|blocks")(np.arange(len(sizes)))
        ends = np.cumsum(sizes[turns])
        shifts = self._ends[turns] - ends  # from a place in the order of blocks to a record
        kept: tuple[int, Callable[[np.ndarray], np.ndarray]] = (-1, lambda places: places)

        def within(which: int, places: np.ndarray) -> np.ndarray:
            nonlocal kept
            first = which * window
            if kept[0] != which:
                count = min(window, length - first)
                kept = which, _permutation(count, f"{seed}|{number}|window {which}")
            return first + kept[1](places - first)

        def items(places: np.ndarray) -> np.ndarray:
            windows = places // window
            found = np.empty_like(places)
            for which in np.unique(windows).tolist():
                inside = windows == which
                found[inside] = within(which, places[inside])
            found += shifts[np.searchsorted(ends, found, side="right")]
            return found if self._by_place is None else self._by_place[found]

        return items


def _layout(dataset: Any) -> tuple[np.ndarray | None, np.ndarray]:
    """Return where each item is stored, None for one behind the other, and where shards end."""
    if isinstance(dataset, LMDBDataset):
        ends = np.array(dataset._ends, np.int64)
        return None, ends if ends[-1] == len(dataset) else np.array([len(dataset)], np.int64)
    if isinstance(dataset, Subset):
        places, ends = _layout(dataset.dataset)
        indices = np.fromiter(map(operator.index, dataset.indices), np.int64)
        count = int(ends[-1]) if places is None else len(places)
        if len(indices) and not -count <= indices.min() <= indices.max() < count:
            raise ValueError(
                f"a Subset has the indices {indices.min()} to {indices.max()}, its dataset has "
                f"{count} items: select from range({count})"
            )
        indices %= max(count, 1)
        return indices if places is None else places[indices], ends
    if isinstance(dataset, ConcatDataset):
        parts, offset = [_layout(part) for part in dataset.datasets], 0
        whole = all(places is None for places, _ in parts)
        all_places, all_ends = [], []
        for places, ends in parts:
            if not whole:
                all_places.append(offset + (np.arange(ends[-1]) if places is None else places))
            all_ends.append(offset + ends)
            offset += int(ends[-1])
        return None if whole else np.concatenate(all_places), np.concatenate(all_ends)
    try:
        return None, np.array([len(dataset)], np.int64)
    except TypeError:
        raise TypeError(
            f"dataset must have a length, got {type(dataset).__name__}: a sampler gives indices "
            "to a map-style dataset, an iterable one takes none"
        ) from None


def _cut(sizes: np.ndarray, block: int) -> np.ndarray:
    """Return the ends of blocks that lie each in one shard.

    >>> _cut(np.array([5, 0, 2]), 2).tolist()
    [2, 4, 5, 7]
    """
    counts = -(-sizes // block)
    ends = np.cumsum(sizes)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.minimum(
        np.repeat(ends - sizes, counts) + block * (number + 1), np.repeat(ends, counts)
    )


def _permutation(count: int, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a random permutation of ``count`` numbers as a function of an array, drawn by name."""
    key = hashlib.blake2b(name.encode(), digest_size=8).digest()
    if count <= _LARGEST_TABLE:
        # SplitMix64 gives no number twice, so that sorting leaves no tie
        return np.argsort(_splitmix(int.from_bytes(key, "little"), count)).__getitem__
    keys = _splitmix(int.from_bytes(key, "little"), 2 * _ROUNDS)
    return lambda places: _scatter(places, count, keys)


def _scatter(places: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """Permute by a Feistel network; what falls out of range goes through it again."""
    bits = (count - 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = (np.uint64(2**n - 1) for n in (bits // 2, bits - bits // 2))
    found = places.astype(np.uint64)
    out = np.arange(len(found))  # of range
    while len(out):
        high, low = found[out] >> low_bits, found[out] & low_mask
        for first, second in keys.reshape(-1, 2):
            high ^= _mix(low + first) & high_mask
            low ^= _mix(high + second) & low_mask
        found[out] = high << low_bits | low
        out = out[found[out] >= count]
    return found.astype(np.int64)


def _splitmix(seed: int, count: int) -> np.ndarray:
    """Return the first numbers of SplitMix64, uint64 [count]."""
    return _mix(np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN))


_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)
