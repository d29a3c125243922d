"""What is one prediction, and how do predictions compare with what was found?

The score is over the conditions that were predicted and are settled. Beside the reader's stand
three others on the same conditions: folklore's (the tip holds everywhere), that of whoever always
says no, and the mechanism's, which leaves some open. A size is scored by its distance in factors:
said 2 where 3 was found is off by 1.5 times, as is 4.5.
"""

from __future__ import annotations

import html
import math
import statistics
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlhelpers.course.claims.conditions import Judged

if TYPE_CHECKING:
    from dlhelpers.course.claims.claim import Claim

__all__ = ["SURE", "Said", "Score", "label_of", "score", "score_of"]

SURE = {1: "guess", 2: "likely", 3: "sure"}
_THEORY = {"wins": "holds", "cannot": "fails"}
_BAR = "height:0.6em;background:currentColor;opacity:0.7"


@dataclass(frozen=True)
class Said:
    """One prediction.

    Attributes:
        condition: its name; empty for an answer of an earlier release, which was on all of them.
        says: ``holds``, ``fails``, or the size of the effect.
        sure: a key of SURE; None for a size.
        when: time of the prediction, ISO 8601; None where it is not known.
    """

    condition: str
    says: str | float
    sure: int | None
    when: str | None

    def as_row(self) -> dict[str, Any]:
        """Return it as the ledger holds it."""
        return {
            "condition": self.condition, "says": self.says, "sure": self.sure, "when": self.when,
        }  # fmt: skip

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Said:
        """Read what :meth:`as_row` gave, which was checked before."""
        return cls(row["condition"], row["says"], row["sure"], row["when"])

    @property
    def is_size(self) -> bool:
        """Whether a size was predicted."""
        return not isinstance(self.says, str)

    def text(self, claim: Claim) -> str:
        """Say it in the claim's words, such as ``pays (likely)``."""
        if self.is_size:
            return f"{self.says:.3g}" if self.says < 100 else f"{self.says:,.0f}"
        return f"{label_of(claim, str(self.says))} ({SURE.get(self.sure or 0, '?')})"

    def off_by(self, found: float | bool | None) -> float | None:
        """Return by how many times a size is off; None where it cannot be compared."""
        if isinstance(found, bool) or found is None or not self.is_size:
            return None
        if not 0 < found < math.inf:
            return None
        return math.exp(abs(math.log(float(self.says) / found)))


def label_of(claim: Claim, says: str) -> str:
    """Return what a claim calls a condition that holds or fails, such as ``pays``."""
    word = claim.words[says]
    return {"confirmed": "holds", "refuted": "does not hold"}.get(word, word)


@dataclass(frozen=True)
class Score:
    """How the predictions of a ledger came out; shows itself.

    Attributes:
        right: of ``given`` predictions.
        given: predictions of conditions that were settled.
        folklore: how many of these hold, which is how often "it always holds" is right.
        mechanism: how many came out as theory says; it commits itself in ``committed`` of them.
        committed: conditions of which theory says something.
        open: predictions of conditions that this machine could not settle.
        sure: level -> (right, given), of those that were settled.
        off_by: by how many times each predicted size was off.
        old: answers of an earlier release, which are kept and not scored.
    """

    right: int = 0
    given: int = 0
    folklore: int = 0
    mechanism: int = 0
    committed: int = 0
    open: int = 0
    sure: tuple[tuple[int, int, int], ...] = ()
    off_by: tuple[float, ...] = ()
    old: int = 0

    def _lines(self) -> list[str]:
        kept = f"{self.old} of an earlier release, kept and not scored" if self.old else ""
        if not self.given and not self.open and not self.off_by:
            return [f"no predictions yet; {kept}" if kept else "no predictions yet"]
        noun = "prediction" if self.given == 1 else "predictions"
        lines = [f"{self.right} of {self.given} {noun} right"] if self.given else []
        if self.given:
            no = self.given - self.folklore
            lines[0] += f"; 'it always holds' {self.folklore}, 'it never does' {no}"
            lines[0] += f", the mechanism {self.mechanism} of the {self.committed} it predicts"
        if self.open:
            lines.append(f"{self.open} not settled on this machine")
        if self.off_by:
            middle = statistics.median(self.off_by)
            sizes = "size" if len(self.off_by) == 1 else "sizes"
            lines.append(f"{len(self.off_by)} {sizes}, off by {middle:.2g} times in the middle")
        return [*lines, kept] if kept else lines

    def __str__(self) -> str:
        levels = [f"{SURE[level]}: {right} of {n} right" for level, right, n in self.sure]
        return "\n".join([*self._lines(), *levels])

    def _repr_html_(self) -> str:
        head = "<br>".join(map(html.escape, self._lines()))
        others = [
            ("you", self.right, self.given),
            ("it always holds", self.folklore, self.given),
            ("it never does", self.given - self.folklore, self.given),
            ("the mechanism", self.mechanism, self.committed),
        ]
        body = "".join(_bar(*row) for row in others if row[2])
        if self.sure:
            body += "<tr><td style='text-align:left' colspan='3'>when you said</td></tr>"
            body += "".join(_bar(SURE[level], right, n) for level, right, n in self.sure)
        return f"<div>{head}</div>" + (f"<table>{body}</table>" if body else "")


def score() -> Score:
    """Return how the predictions in this machine's ledger came out; shows itself."""
    from dlhelpers.course import ledger

    try:
        rows = ledger.read()["rows"]
    except FileNotFoundError:
        rows = []
    except (OSError, ledger.LedgerError) as error:
        warnings.warn(f"no score: {error}", stacklevel=2)
        rows = []
    return score_of(rows)


def score_of(rows: Iterable[Mapping[str, Any]]) -> Score:
    """Return the score of a ledger's rows."""
    settled: list[tuple[Said, Judged]] = []
    open_, old, off_by = 0, 0, []
    for row in rows:
        found = {c["name"]: Judged.from_row(c) for c in row["conditions"]}
        for said in map(Said.from_row, row["predictions"]):
            condition = found.get(said.condition)
            if condition is None:
                continue
            if said.is_size:
                off_by += [off for off in [said.off_by(condition.effect)] if off is not None]
            elif condition.verdict in ("holds", "fails"):
                settled.append((said, condition))
            else:
                open_ += 1
        old += sum(not earlier["condition"] for earlier in row["earlier"])
    committed = [c for _, c in settled if c.theory in _THEORY]
    levels = []
    for level in SURE:
        own = [said.says == c.verdict for said, c in settled if said.sure == level]
        levels += [(level, sum(own), len(own))] * bool(own)
    return Score(
        right=sum(said.says == c.verdict for said, c in settled),
        given=len(settled),
        folklore=sum(c.verdict == "holds" for _, c in settled),
        mechanism=sum(c.verdict == _THEORY[c.theory] for c in committed if c.theory),
        committed=len(committed),
        open=open_,
        sure=tuple(levels),
        off_by=tuple(off_by),
        old=old,
    )


def _bar(name: str, right: int, given: int) -> str:
    share = 100 * right / given
    return (
        f"<tr><td style='text-align:left'>{html.escape(name)}</td><td>{right} of {given}</td>"
        f"<td><div role='img' aria-label='{share:.0f} % right' style='width:12em;"
        "background:var(--jp-layout-color2,#8884)'>"
        f"<div style='width:{share:.0f}%;{_BAR}'></div></div></td></tr>"
    )
