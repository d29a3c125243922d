"""Which keys do several databases have? One of them is open at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

__all__ = ["doubles"]


def doubles(
    databases: Sequence[Callable[[], Iterable[bytes]]],
) -> Iterator[tuple[bytes, int, int]]:
    """Yield (key, number of the first database that has it, number of a later one).

    Args:
        databases: each returns its keys, and is called twice where keys may be equal.

    Cost: 8 bytes a key; where none is in two databases each is read once.

    >>> list(doubles([lambda: [b"a", b"b"], lambda: [b"b", b"c"]]))
    [(b'b', 0, 1)]
    """
    hashes = [np.fromiter(map(hash, keys()), np.int64) for keys in databases]
    together = np.sort(np.concatenate(hashes)) if hashes else np.empty(0, np.int64)
    suspects = set(together[1:][together[1:] == together[:-1]].tolist())
    owner: dict[bytes, int] = {}
    for number, keys in enumerate(databases if suspects else ()):
        for key in keys():
            if hash(key) in suspects and owner.setdefault(key, number) != number:
                yield key, owner[key], number
