"""Do two files, or two runs, belong to one conversion: the same source, stored in the same way?

The identity of a conversion is that of its whole source, whichever part a shard holds: names,
targets and sizes of all images, beside the settings. Modification times are no part of it, since
local copies differ in them. They say where to look: where they differ on one machine, or in one
folder that several machines mount, contents are compared. A source without a listing is known by
its contents.
"""

from __future__ import annotations

import hashlib
import operator
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dlhelpers.lmdb_io.checksums import crc32

__all__ = [
    "Stamp",
    "Trace",
    "Whole",
    "equal_versions",
    "is_same_version",
    "odd_shards",
    "place_of",
    "spread",
]

_ASPECTS = {  # what a shard's identity says, and what a message calls it
    "names": "the names or targets of the source's images",
    "sizes": "the sizes of the source's images",
    "contents": "the contents of the source's images",
}
_CONTENTS = _ASPECTS["contents"]


class Stamp(NamedTuple):
    """What is known of an item.

    Attributes:
        name: key and target, or the number of an item that has neither before it is loaded.
        size: bytes of a file; of an item that was handed over, the CRC-32 of its content.
        time: when a file was modified, ns; 0 for what is no file.
    """

    name: bytes
    size: int
    time: int = 0


@dataclass
class Trace:
    """Running digests of the items of one part, in order.

    Attributes:
        items: of names and sizes.
        times: of modification times.
        contents: of what was stored, or of what it was made from.
    """

    items: bytes = b""
    times: int = 0
    contents: bytes = b""

    def add(self, stamp: Stamp, content: int = 0) -> None:
        """Take up one more item; ``content`` is a CRC-32, 0 where nothing was stored."""
        self.items = _chain(self.items, b"%s|%d" % (stamp.name, stamp.size))
        self.times = crc32(b"%d|" % stamp.time, self.times)
        self.contents = _chain(self.contents, content.to_bytes(4, "little"))

    def as_dict(self) -> dict[str, Any]:
        """Return the digests as JSON writes them."""
        return {"digest": self.items.hex(), "times": self.times, "contents": self.contents.hex()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Trace:
        """Return what :meth:`as_dict` gave.

        Raises:
            KeyError: the state is of an earlier version of this package.
        """
        items, contents = (bytes.fromhex(state[name]) for name in ("digest", "contents"))
        return cls(items, state["times"], contents)


class Whole:
    """Digests of all items of a source, for the identity that every shard carries."""

    def __init__(self) -> None:
        self._names, self._sizes, self._times = (hashlib.blake2b(digest_size=16) for _ in range(3))

    def add(self, stamp: Stamp) -> None:
        """Take up one more item."""
        self._names.update(b"%d:%s" % (len(stamp.name), stamp.name))
        self._sizes.update(b"%d|" % stamp.size)
        self._times.update(b"%d|" % stamp.time)

    def identity(self, contents: list[int | None], place: Sequence[str]) -> dict[str, Any]:
        """Return the identity; ``contents`` as the source gives them, ``place`` of its times."""
        return {
            "names": self._names.hexdigest(),
            "sizes": self._sizes.hexdigest(),
            "contents": contents,
            "version": self._times.hexdigest() if place else "",
            "place": list(place),
        }


def _chain(digest: bytes, value: bytes) -> bytes:
    return hashlib.blake2b(digest + value, digest_size=16).digest()


def place_of(inode: int) -> tuple[str, str]:
    """Return where modification times can be compared: on this machine, or in one folder."""
    machine = hashlib.blake2b(platform.node().encode(), digest_size=8).hexdigest()
    return f"machine {machine}", f"folder {inode}"


def spread(count: int, most: int) -> list[int]:
    """Return up to ``most`` positions of ``count``, evenly spread, the first and last among them.

    >>> spread(9, 3), spread(2, 3)
    ([0, 4, 8], [0, 1])
    """
    if count <= most:
        return list(range(count))
    return [number * (count - 1) // (most - 1) for number in range(most)]


def equal_versions(
    mine: Mapping[str, Any],
    others: Iterable[Mapping[str, Any]],
    is_unchanged: Callable[[Mapping[str, Any]], bool],
) -> list[str]:
    """Return the versions of the source that a finished shard's own is found to be equal to.

    A version is the digest of the source's modification times; equal are those whose shards' parts
    hold now what was converted of them.

    Args:
        mine: meta entry of this shard.
        others: of the other shards.
        is_unchanged: compares the part of such a shard with the source as it is now.
    """
    fitting = [
        meta
        for meta in others
        if not _difference(mine, meta) and _shares_place(mine["identity"], meta["identity"])
    ]
    found: set[str] = set()
    while fitting:
        # what was found equal before stands or falls together
        equal = _equal_to(fitting[0], fitting)
        together = [meta for meta in fitting if _version(meta) in equal]
        fitting = [meta for meta in fitting if _version(meta) not in equal]
        if _version(mine) not in equal and all(map(is_unchanged, together)):
            found |= equal
    return sorted(found)


def is_same_version(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two meta entries are of one conversion, as far as they say without a look."""
    if _difference(first, second):
        return False
    one, two = first["identity"], second["identity"]
    return one["version"] == two["version"] or not _shares_place(one, two)


def odd_shards(metas: Sequence[Mapping[str, Any]], newest: int) -> tuple[str, list[int]]:
    """Return (what differs, numbers of the shards that differ in it from the newest).

    The answer for shards that belong together is an empty text and no shard.
    """
    found = [_difference(metas[newest], meta) for meta in metas]
    if what := next(filter(None, found), ""):
        return what, [number for number, differs in enumerate(found) if differs == what]
    if metas[newest].get("identity") is None:  # written by an earlier version
        return "", []
    for place in {place for meta in metas for place in meta["identity"]["place"]}:
        here = [n for n, meta in enumerate(metas) if place in meta["identity"]["place"]]
        equal = _equal_to(metas[newest if newest in here else here[-1]], [metas[n] for n in here])
        odd = [n for n in here if _version(metas[n]) not in equal]
        if odd:
            return _CONTENTS, odd
    return "", []


def _equal_to(first: Mapping[str, Any], metas: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the versions that are equal to a shard's, whichever shard found that out."""
    equal, before = {_version(first)}, 0
    while len(equal) > before:
        before = len(equal)
        for meta in metas:
            linked = {_version(meta), *meta["identity"].get("equal", ())}
            if equal & linked:
                equal |= linked
    return equal


def _version(meta: Mapping[str, Any]) -> str:
    return meta["identity"]["version"]


def _difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Return the first thing in which two meta entries differ, modification times apart."""
    for name in ("classes", "settings", "total"):
        # of many classes repr takes long; of settings 1 and True are not the same
        differs = first[name] is not second[name] and first[name] != second[name]
        if differs or (name != "classes" and repr(first[name]) != repr(second[name])):
            return f"their {name}"
    known, other = first.get("identity"), second.get("identity")
    if known is None or other is None:
        return "" if known is other else "the version of dlhelpers that wrote them"
    if first["source"] != second["source"]:
        return f"the kind of source ({first['source']} and {second['source']})"
    for name, called in _ASPECTS.items():
        differ = _contradict if name == "contents" else operator.ne
        if differ(known[name], other[name]):
            # the CRC-32 of what was handed over stands where a file's size does
            return called if first["source"] == "folder" or name != "sizes" else _CONTENTS
    return ""


def _contradict(first: Sequence[int | None], second: Sequence[int | None]) -> bool:
    """Whether two lists of probes say different things of one item; None says nothing."""
    return len(first) != len(second) or any(
        one != two for one, two in zip(first, second, strict=True) if None not in (one, two)
    )


def _shares_place(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return bool(set(first["place"]) & set(second["place"]))
