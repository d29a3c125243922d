"""Which numbers do the classes of one source have among those of another?

Classes are matched by their names. Known classes keep their numbers, new ones follow them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dlhelpers.lmdb_io.schema import encode_target
from dlhelpers.lmdb_io.sources import Forwarded, Loaded, Source, SourceError
from dlhelpers.printable import one_line

__all__ = ["Renumbered", "match_classes", "note_of", "refuse_fields", "renumbered"]

_SHOWN = 5


def match_classes(
    known: Sequence[str] | None, new: Sequence[str] | None, names: tuple[str, str]
) -> tuple[list[str] | None, list[int] | None]:
    """Return (known classes and new ones behind them, numbers of ``new`` in it).

    The numbers are None where they do not change.

    Args:
        known, new: class names, None without.
        names: what a message calls the two sources.

    Raises:
        SourceError: only one has class names, or a name stands for two classes.

    >>> match_classes(["cat", "dog"], ["cow", "dog"], ("a", "b"))
    (['cat', 'dog', 'cow'], [2, 1])
    """
    if known is None or new is None:
        if known is None and new is None:
            return None, None
        without, with_names = names if known is None else names[::-1]
        raise SourceError(
            f"{without} has no class names and {with_names} has, so that their numbers cannot be "
            "matched: give (key, bytes, target) of both"
        )
    if list(new) == list(known[: len(new)]):
        return list(known), None
    for name, classes in zip(names, (known, new), strict=True):
        if double := [text for text, count in Counter(classes).items() if count > 1]:
            raise SourceError(
                f"{name} has several classes of the name {one_line(double[0])!r}, so that its "
                "classes cannot be matched by their names: rename one of them"
            )
    there = set(known)
    classes = [*known, *(name for name in new if name not in there)]
    numbers = {name: number for number, name in enumerate(classes)}
    mapping = [numbers[name] for name in new]
    return classes, None if mapping == list(range(len(new))) else mapping


def renumbered(target: Any, numbers: Sequence[int] | None) -> Any:
    """Return a target under the new numbers; what is no class number stays.

    Raises:
        ValueError: it is not the number of a class, or may hold numbers that cannot be told apart.
    """
    if numbers is None:
        return target
    if isinstance(target, (list, dict)) and list(numbers) != list(range(len(numbers))):
        raise ValueError(
            f"its target {str(target)[:40]} may hold class numbers, which are others in the new "
            "database: give it (key, bytes, target) with the new numbers"
        )
    if type(target) is not int or target < 0:  # -1 often says that there is no label
        return target
    if target >= len(numbers):
        raise ValueError(
            f"its target {target} is not the number of a class: {len(numbers)} are named, 0 to "
            f"{len(numbers) - 1}"
        )
    return numbers[target]


def note_of(name: str, classes: Sequence[str], numbers: Sequence[int]) -> str:
    """Return what a report says of new numbers."""
    moved = [(old, new) for old, new in enumerate(numbers) if old != new]
    shown = ", ".join(f"{one_line(classes[old])} {old} -> {new}" for old, new in moved[:_SHOWN])
    count = f"{len(moved)} class{'es have' if len(moved) > 1 else ' has'}"
    more = ", ..." * (len(moved) > _SHOWN)
    new = "new numbers" if len(moved) > 1 else "a new number"
    return f"{name}: {count} {new}, matched by name: {shown}{more}"


def refuse_fields(name: str, settings: Mapping[str, Any]) -> None:
    """Raise where records with fields would get other class numbers than their masks have.

    Raises:
        SourceError: there are fields.
    """
    if settings.get("fields") is not None:
        raise SourceError(
            f"{name}: its classes would get new numbers, and masks, boxes and json fields may hold "
            "the old ones: give samples with the new numbers"
        )


class Renumbered(Forwarded):
    """A source under the class numbers of a database that it is appended to."""

    def __init__(
        self,
        source: Source,
        kind: str,
        classes: list[str] | None,
        settings: Mapping[str, Any],
        version: int,
        name: str,
    ) -> None:
        """Match the classes; ``kind`` names the database's version, ``name`` the database."""
        super().__init__(source)
        self.kind, self.settings, self.version = kind, settings, version
        self._numbers: list[int] | None = None
        if classes is not None and source.classes is None and not source.copies:
            self.classes, self._numbers = classes, list(range(len(classes)))
            note = "targets are taken for the numbers of its classes, the source names none"
            self.notes = (*source.notes, note)
            return
        self.classes, self._numbers = match_classes(classes, source.classes, (name, "the source"))
        notes = list(source.notes)
        if added := (self.classes or [])[len(classes or []) :]:
            shown = ", ".join(map(one_line, added[:_SHOWN])) + ", ..." * (len(added) > _SHOWN)
            what = "class is" if len(added) == 1 else "classes are"
            notes.append(f"{len(added)} {what} new: {shown}")
        if self._numbers is not None:
            refuse_fields("the source", settings)
            notes.append(note_of("the source", source.classes or [], self._numbers))
        self.notes = tuple(notes)

    def load(self, task: Any) -> Loaded:
        """Read an item, and give its class the new number."""
        loaded = self._inner.load(task)
        return loaded._replace(target=renumbered(loaded.target, self._numbers))

    def copy(self, task: Any) -> tuple[bytes, bytes, bytes]:
        """Read a record, and give its class the new number."""
        key, target, image = self._inner.copy(task)
        if self._numbers is not None:
            target = encode_target(renumbered(json.loads(target), self._numbers))
        return key, target, image
