"""Which keys of an old database belong to one sample: those of an image and of its label?

They differ in one word: ``image-1`` and ``label-1``, ``train/img/1.jpg`` and ``train/mask/1.png``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["guessed_pairs", "pairs_of", "twins_of"]

_PICTURES = (
    b"bmp exr gif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp".split()
)  # endings of names
_ENDINGS = frozenset((*_PICTURES, *b"json npy npz txt xml".split()))
_WORDS = {
    **dict.fromkeys(b"image images img imgs data x".split(), "image"),
    **dict.fromkeys(b"label labels lbl target targets class y".split(), "label"),
    # images, which are refused
    **dict.fromkeys(b"mask masks gt gts groundtruth seg depth alpha matte trimap".split(), "label"),
    **dict.fromkeys(b"hr hq annotation annotations".split(), "label"),
}
_TOKENS = re.compile(rb"[A-Za-z]+|[^A-Za-z]+")
_BETWEEN = b"_-./ "
_Parts = tuple[bytes, ...]


def pairs_of(keys: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Return (key of an image, key of its label), of keys that differ in this word, and maybe in
    the ending of a file; empty where there is no label.

    >>> pairs_of([b"image-1", b"label-1"])
    [(b'image-1', b'label-1')]
    """
    by_rest = _by_rest(keys)[0]
    if not any(len(found) == 2 for found in by_rest.values()):
        return []
    # of a pair of which one is missing, loading says which
    return [
        (found.get("image") or _other(found), found.get("label") or _other(found))
        for found in by_rest.values()
    ]


def guessed_pairs(keys: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Return the pairs of keys of which only the label's has a word that is known; empty where
    several keys may be the image's.

    >>> guessed_pairs([b"001", b"001_gt"]), guessed_pairs([b"lq-1.jpg", b"gt-1.png"])
    ([(b'001', b'001_gt')], [(b'lq-1.jpg', b'gt-1.png')])
    >>> guessed_pairs([b"cat-1", b"dog-1", b"mask-1"])  # classes
    []
    """
    by_rest, others = _by_rest(keys)
    labels = {_bare(*parts): found["label"] for parts, found in by_rest.items() if "label" in found}
    images: dict[bytes, bytes] = {}
    for key in others if labels else ():
        tokens = _TOKENS.findall(key)
        words = [number for number, token in enumerate(tokens) if token.isalpha()]
        for rest in {_bare(*_rest(tokens, at)) for at in (len(tokens), *words)} & labels.keys():
            if images.setdefault(rest, key) != key:
                return []
    if not images:
        return []
    return [(images.get(rest) or _other({"label": label}), label) for rest, label in labels.items()]


def twins_of(keys: Sequence[bytes]) -> list[bytes]:
    """Return two keys of pictures that differ in the ending alone, where most keys have such a
    twin.

    >>> twins_of([b"1.jpg", b"1.png", b"2.jpg", b"2.png", b"3.jpg"])
    [b'1.jpg', b'1.png']
    """
    stems = [stem for key in keys if (stem := _stem(key)) is not None]
    counts = Counter(stems)
    doubled = next((stem for stem, count in counts.items() if count > 1), None)
    if doubled is None or sum(n for n in counts.values() if n > 1) * 2 <= len(keys):
        return []
    return [key for key in keys if _stem(key) == doubled][:2]


def _by_rest(keys: Sequence[bytes]) -> tuple[dict[_Parts, dict[str, bytes]], list[bytes]]:
    """Return keys by what stands beside their word and by its meaning, and those without one."""
    by_rest: dict[_Parts, dict[str, bytes]] = {}
    others = []
    for key in keys:
        tokens = _TOKENS.findall(key)
        roles = [_WORDS.get(token.lower(), "") for token in tokens]
        if not any(roles):
            others.append(key)
            continue
        at = max(number for number, role in enumerate(roles) if role)
        found = by_rest.setdefault(_rest(tokens, at), {})
        if roles[at] in found:  # a.jpg and a.png
            found = by_rest.setdefault((*_rest(tokens, at), key), {})
        found[roles[at]] = key
    return by_rest, others


def _rest(tokens: Sequence[bytes], at: int) -> tuple[bytes, bytes]:
    """Return what stands before and after a word, the ending of a file apart."""
    last, ending = len(tokens), tokens[-1].lower()
    if last - 1 not in (0, at) and ending in _ENDINGS and tokens[-2].endswith(b"."):
        last -= 1
    return b"".join(tokens[:at][:last]), b"".join(tokens[at + 1 : last])


def _bare(before: bytes, after: bytes, *_key: bytes) -> bytes:
    """Return what stands beside a word without what parts it from the word."""
    parts = (before.rstrip(_BETWEEN), after.lstrip(_BETWEEN).rstrip(b"."))
    return b"/".join(part for part in parts if part)


def _stem(key: bytes) -> bytes | None:
    stem, _, ending = key.rpartition(b".")
    return stem if ending.lower() in _PICTURES else None


def _other(found: dict[str, bytes]) -> bytes:
    (key,) = found.values()
    return b"the other of " + key
