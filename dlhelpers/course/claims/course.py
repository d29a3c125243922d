"""Where is each tip treated, and what became of it on this machine?"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlhelpers.course.claims.catalog import all_claims, all_tips, lessons

__all__ = ["CourseMap", "Standing", "course_map", "standing"]

_ORDER = ("holds", "fails", "depends", "unsettled", "not-measured", "not run")


@dataclass(frozen=True, repr=False)
class CourseMap:
    """Every tip with the notebooks that treat it and the number of its claims.

    Attributes:
        rows: (notebook's stem, tip as people say it, number of claims settled there); the stem is
            empty for tips that no notebook treats yet.
    """

    rows: tuple[tuple[str, str, int], ...]

    def __repr__(self) -> str:
        return "\n".join(
            f"{stem or 'later':16} {_counted(count):10} {says}" for stem, says, count in self.rows
        )

    def _repr_html_(self) -> str:
        written = {claim.notebook for claim in all_claims()}
        body = "".join(
            "<tr>"
            f"<td style='text-align:left'>{_link(stem, stem in written)}</td>"
            f"<td style='text-align:left'>{html.escape(says)}</td>"
            f"<td style='text-align:left'>{_counted(count)}</td></tr>"
            for stem, says, count in self.rows
        )
        head = "<tr><th>notebook</th><th>tip</th><th></th></tr>"
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def course_map() -> CourseMap:
    """Return the map of the course: every tip of tips.toml, in the notebooks' order."""
    rows = []
    for stem in (*(lesson.stem for lesson in lessons()), ""):
        for tip in all_tips():
            if stem in (tip.notebooks or ("",)):
                claims = [c for c in all_claims() if (c.tip, c.notebook) == (tip.id, stem)]
                rows.append((stem, tip.says, len(claims)))
    return CourseMap(tuple(rows))


@dataclass(frozen=True, repr=False)
class Standing:
    """What the ledger of this machine says of every tip; shows itself.

    Attributes:
        rows: (notebook's stem, tip as people say it, verdict -> number of its claims there).
        unsettled: (claim's id, why) of those that this machine could not settle.
        machine: the machine in a line; empty where there is no ledger yet.
    """

    rows: tuple[tuple[str, str, Mapping[str, int]], ...]
    unsettled: tuple[tuple[str, str], ...]
    machine: str

    @property
    def counts(self) -> dict[str, int]:
        """Verdict -> number of claims, all notebooks together."""
        sums = Counter()
        for _, _, verdicts in self.rows:
            sums.update(verdicts)
        return {name: sums[name] for name in _ORDER if sums[name]}

    def _head(self) -> str:
        where = self.machine or "no notebook has been run on this machine yet"
        return f"{_said(self.counts)} · {where}"

    def __repr__(self) -> str:
        lines = [self._head()]
        lines += [f"{stem:16} {_said(found):28} {says}" for stem, says, found in self.rows]
        return "\n".join([*lines, *(f"unsettled: {id}: {why}" for id, why in self.unsettled)])

    def _repr_html_(self) -> str:
        left = " style='text-align:left'"
        body = "".join(
            f"<tr><td{left}>{_link(stem, True)}</td><td{left}>{html.escape(says)}</td>"
            f"<td{left}>{_said(found)}</td></tr>"
            for stem, says, found in self.rows
        )
        why = "".join(
            f"<li><code>{html.escape(id)}</code>: {html.escape(why)}</li>"
            for id, why in self.unsettled
        )
        return (
            f"<p>{html.escape(self._head())}</p><table><thead><tr><th>notebook</th><th>tip</th>"
            f"<th>here</th></tr></thead><tbody>{body}</tbody></table>"
            + (f"<p>Unsettled, and why:</p><ul>{why}</ul>" if why else "")
        )


def standing() -> Standing:
    """Return the verdicts of this machine's ledger, tip by tip, in the notebooks' order.

    Raises:
        LedgerError: the ledger's file is no ledger.
    """
    from dlhelpers.course import ledger

    try:
        found = ledger.read()
    except FileNotFoundError:
        found = {"rows": [], "machine": {}}
    verdicts = {row["id"]: row for row in found["rows"]}
    rows, unsettled = [], []
    for stem in (lesson.stem for lesson in lessons()):
        for tip in all_tips():
            claims = [c for c in all_claims() if (c.tip, c.notebook) == (tip.id, stem)]
            names = [verdicts.get(c.id, {}).get("verdict", "not run") for c in claims]
            if claims:
                rows.append((stem, tip.says, dict(Counter(names))))
            unsettled += [
                (claim.id, _why(verdicts[claim.id]))
                for claim, name in zip(claims, names, strict=True)
                if name == "unsettled"
            ]
    line = found["machine"].get("line", "") if verdicts else ""
    return Standing(tuple(rows), tuple(unsettled), line)


def _why(row: Mapping[str, Any]) -> str:
    """Say from a ledger's row why it is unsettled: the control, or intervals."""
    outcome = (row.get("control") or {}).get("outcome", "")
    if outcome in ("faster", "slower", "not measured"):
        return f"the control came back {outcome}"
    parts = []
    for c in row["conditions"]:
        if c["verdict"] == "unsettled":
            known = c["low"] and c["high"]
            interval = f"[{c['low']:.3g}, {c['high']:.3g}]" if known else "without an interval"
            parts.append(f"{c['name']} {c['effect']:.3g} {interval}")
    return "too little time to tell: " + "; ".join(parts)


def _said(verdicts: Mapping[str, int]) -> str:
    return ", ".join(
        f"{verdicts[name]} {name.replace('-', ' ')}" for name in _ORDER if verdicts.get(name)
    )


def _counted(count: int) -> str:
    return f"{count} claim{'s' if count > 1 else ''}" if count else "to come"


def _link(stem: str, is_written: bool) -> str:
    if not stem:
        return "later"
    return f"<a href='{stem}.ipynb'>{stem}</a>" if is_written else stem
