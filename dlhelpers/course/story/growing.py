"""What does one change bring, alone, against the script as found? And all that were measured?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

from dlhelpers import measure
from dlhelpers.course import ledger
from dlhelpers.course.story.script import TARGET, Script, fair_steps
from dlhelpers.course.story.settings import MENU, Settings, Step
from dlhelpers.memory.report import mib
from dlhelpers.tables import figures, html_table, text_table

__all__ = ["Change", "Changes", "change", "changes"]

_NEGLIGIBLE = 0.03
_PARTS = {"train": "training", "valid": "validation", "score": "scoring"}
_IN_THE_GAME = ("stack", "score_batch", "draft")  # no lesson asks for these


@dataclass(frozen=True, repr=False)
class Change:
    """One change alone, against the script as found.

    Attributes:
        name: as in ``MENU``.
        speedup, low, high: time of a step of its part before / after, with the interval.
        outcome: faster, slower, no difference or undecided.
        epochs: to the target with one seed, before and after; None where they cannot change.
        peak_bytes: of validation, before and after; None where they cannot change.
    """

    name: str
    speedup: float
    low: float
    high: float
    outcome: str
    epochs: tuple[int, int] | None = None
    peak_bytes: tuple[int, int] | None = None

    @property
    def step(self) -> Step:
        """The field that it sets."""
        return MENU[self.name]

    @property
    def sentence(self) -> str:
        """What it brings, in words."""
        part = _PARTS[self.step.part]
        by = f"{figures(self.speedup)} times as fast {_interval(self.low, self.high)}"
        said = {
            "faster": f"{part} becomes faster",
            "slower": f"{part} becomes slower",
            "no difference": f"brings nothing to the time of {part}",
        }.get(self.outcome, f"undecided for {part}")
        said = f"{said}: {by}"
        return "; ".join([said, *self._besides()])

    def _besides(self) -> list[str]:
        told = []
        if self.epochs:
            epochs = "{} epochs to the target instead of {}".format(*self.epochs[::-1])
            told.append(f"with one seed, {epochs}; another seed may reverse that")
        if self.peak_bytes:
            told.append("peak {} instead of {}".format(*map(mib, self.peak_bytes[::-1])))
        return told

    def __repr__(self) -> str:
        return f"{self.name} ({self.step.code}): {self.sentence}"

    def as_row(self) -> dict[str, Any]:
        """Return it as a ledger keeps it."""
        numbers = {key: getattr(self, key) for key in ("speedup", "low", "high", "outcome")}
        pairs = {key: getattr(self, key) for key in ("epochs", "peak_bytes")}
        return {"id": self.step.field, "value": self.step.value, **numbers, **pairs}


def change(*, script: Script | None = None, budget_s: float = 4.0, **field: Any) -> Change:
    """Measure one change alone against the script as found, and keep the result in the ledger.

    What is repeated is a step of the part that changes: a training step with its batch, a
    validation, eight photographs scored. Where the network changes, training to the target is
    done once in each state as well, on images in memory, to count its epochs; by how many these
    differ depends on the seed, so that they are no part of the speedup.

    Args:
        script: over photographs; None makes one, which later calls use again.
        budget_s: for the paired comparison.
        field: one field of ``Settings`` and its value, such as ``database=True``.

    Raises:
        ValueError: not exactly one field, no such field, or a value that the script has already,
            or that no lesson treats.
    """
    name = _named(field)
    step, found = MENU[name], Settings()
    script = script or _own_script()
    states = (found, step.done(found))
    steps, setup = fair_steps(script, step.part, *states)
    pair = measure.compare(*steps, budget_s=budget_s, negligible=_NEGLIGIBLE, setup=setup)
    epochs = peaks = None
    if step.field in ("softmax", "depthwise"):
        before, after = map(script.train_in_memory, states)
        if min(before.accuracy, after.accuracy) >= TARGET:
            epochs = before.epochs, after.epochs
    if step.part == "valid":
        before, after = map(script.validation_bytes, states)
        peaks = (before, after)
    result = Change(name, pair.speedup, pair.low, pair.high, str(pair.outcome), epochs, peaks)
    ledger.record(result.as_row(), part="script")
    return result


@dataclass(frozen=True, repr=False)
class Changes:
    """The changes that this machine has measured, lesson by lesson; shows itself.

    Attributes:
        rows: (lesson's stem, change as code, what it brings or ``not yet``).
    """

    rows: tuple[tuple[str, str, str], ...]

    _HEAD = ("lesson", "change, alone", "what it brings on this machine")

    def __repr__(self) -> str:
        return text_table(self._HEAD, self.rows, names=3)

    def _repr_html_(self) -> str:
        return html_table(self._HEAD, self.rows, names=3)


def changes() -> Changes:
    """Return what each lesson's change brought on this machine, or ``not yet``.

    Raises:
        LedgerError: the ledger's file is no ledger.
    """
    try:
        kept = {row["id"]: row for row in ledger.read().get("script", [])}
    except FileNotFoundError:
        kept = {}
    rows = []
    for name, step in sorted(MENU.items(), key=lambda item: item[1].lesson):
        row = kept.get(step.field)
        if row is not None and row["value"] == step.value:
            rows.append((step.lesson, f"{name}: {step.code}", _from_row(name, row).sentence))
        elif step.field not in _IN_THE_GAME:
            rows.append((step.lesson, f"{name}: {step.code}", "not yet"))
    return Changes(tuple(rows))


@cache
def _own_folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="dlhelpers-script-", ignore_cleanup_errors=True)


@cache
def _own_script() -> Script:
    return Script(_own_folder().name)


def _named(field: Mapping[str, Any]) -> str:
    known = {step.field: name for name, step in MENU.items()}
    ways = ", ".join(step.code for step in MENU.values())
    if len(field) != 1:
        raise ValueError(
            f"change one field at a time, got {len(field)}: only the game of notebook 08 combines "
            f"changes. There are {ways}"
        )
    ((key, value),) = field.items()
    if key not in known:
        raise ValueError(f"the script has no field {key!r} to change; there are {ways}")
    if value == getattr(Settings(), key):
        raise ValueError(
            f"{key}={value!r} is the script as found; the change is {MENU[known[key]].code}"
        )
    if value != MENU[known[key]].value:
        raise ValueError(f"{key} can become {MENU[known[key]].value!r}, got {value!r}")
    return known[key]


def _from_row(name: str, row: Mapping[str, Any]) -> Change:
    low = 0.0 if row["low"] is None else row["low"]
    high = math.inf if row["high"] is None else row["high"]
    pairs = (tuple(row[key]) if row[key] else None for key in ("epochs", "peak_bytes"))
    return Change(name, row["speedup"], low, high, row["outcome"], *pairs)


def _interval(low: float, high: float) -> str:
    return f"[{figures(low)}, {figures(high)}]" if math.isfinite(high) else "[no interval]"
