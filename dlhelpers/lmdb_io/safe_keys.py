"""Which keys may the dicts of an untrusted file have, so that they take no endless time to build?

Python finds a key by its hash. That of a number is the number itself, so that a file can hold
numbers that all meet in one place of the table: n of them take n^2 steps. Texts and bytes have
hashes that nobody can foresee. So numbers are few, as classes are, and small enough for each to
have a hash of its own; and nothing else is a key.

Source: Crosby and Wallach 2003, Denial of Service via Algorithmic Complexity Attacks, USENIX
Security 2003; CPython's Objects/dictobject.c.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["KeysError", "need_safe", "safe_dict"]

_MOST_NUMBERS = 30_000
_LARGEST = 1 << 60  # less than the modulus of Python's hashes


class KeysError(ValueError):
    """A dict has keys that are not safe to look up; the message begins with what it is."""


def need_safe(keys: Iterable[Any], numbers: int = 0) -> int:
    """Return how many numbers there are among the keys, those before them included.

    Args:
        keys: of a dict that is not built yet.
        numbers: that were keys before.

    Raises:
        KeysError: there are too many, or something is neither text, bytes, nor a small number.

    >>> need_safe(["image", b"label", 1])
    1
    """
    for key in keys:
        kind = type(key)
        if kind is str or kind is bytes:
            continue
        if kind not in (int, bool, type(None)):
            raise KeysError(f"a dict with a {kind.__name__} as key")
        if key is not None and not -_LARGEST < key < _LARGEST:
            raise KeysError("a dict with a number of more than 60 bits as key")
        numbers += 1
    if numbers > _MOST_NUMBERS:
        raise KeysError(f"dicts with more than {_MOST_NUMBERS} numbers as keys, which texts can be")
    return numbers


def safe_dict(items: Iterable[Any]) -> dict[Any, Any]:
    """Return a dict of pairs.

    Raises:
        KeysError: as :func:`need_safe`.
    """
    items = list(items)
    need_safe(key for key, _ in items)
    return dict(items)
