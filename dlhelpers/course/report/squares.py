"""What is seen of a condition at a glance, on each of several machines?

A square's colour is the distance of what was found from the threshold, in factors: blue beyond it,
orange short of it. What is counted, and what is a difference, has no such distance and two fixed
tones. A letter says the same without colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from dlhelpers.course.claims.cards import word_of
from dlhelpers.course.claims.claim import Claim
from dlhelpers.course.claims.conditions import STANDINGS, Judged
from dlhelpers.course.claims.sentences import effect_text
from dlhelpers.course.verdicts import STRADDLES

__all__ = ["LETTERS", "STEPS", "Gap", "Line", "Square", "gaps", "lines_of", "square_of"]

LETTERS = {"holds": "H", "fails": "F", "unsettled": "?", "not-measured": "–", "not-run": ""}
STEPS = (1.1, 1.5, 3.0)  # factors from the threshold at which a colour deepens
_AGREEMENTS = {key: STANDINGS[key] for key in ("agrees", "against", "open")}


@dataclass(frozen=True)
class Square:
    """One condition on one machine.

    Attributes:
        letter: of LETTERS.
        tone: ``h`` or ``f`` with the number of steps passed, or with ``c`` where it is counted;
            ``u`` unsettled, ``n`` not measured, ``x`` not run.
        distance: log2 of effect / threshold, positive where the threshold is met; None without.
        against: whether it came out against the mechanism.
        found: the number in words.
        said: all that is known of it: verdict, interval, threshold, agreement.
    """

    letter: str
    tone: str
    distance: float | None
    against: bool
    found: str
    said: str


@dataclass(frozen=True)
class Gap:
    """Two machines whose intervals of one condition do not meet.

    Attributes:
        low, high: numbers of the machines, counted from 0.
        factor: the upper one's low end / the lower one's high end; None for a difference.
    """

    low: int
    high: int
    factor: float | None


@dataclass(frozen=True)
class Line:
    """One condition on all machines.

    Attributes:
        claim, name: of the condition.
        squares: one for each machine.
        turned: whether it holds on one machine and fails on another.
        gap: the largest between two machines; None where all intervals meet.
    """

    claim: Claim
    name: str
    squares: tuple[Square, ...]
    turned: bool
    gap: Gap | None


def lines_of(ledgers: Sequence[Mapping[str, Any]], claims: Sequence[Claim]) -> list[Line]:
    """Return a line for each condition of these claims, also of those measured under old names."""
    tables = [{row["id"]: row["conditions"] for row in ledger["rows"]} for ledger in ledgers]
    lines = []
    for claim in claims:
        found = [{c["name"]: Judged.from_row(c) for c in t.get(claim.id, ())} for t in tables]
        names = [c.name for c in claim.conditions] + [name for f in found for name in f]
        for name in dict.fromkeys(names):
            judged = [f.get(name) for f in found]
            verdicts = {c.verdict for c in judged if c}
            squares = tuple(square_of(claim, c) for c in judged)
            turned = {"holds", "fails"} <= verdicts
            lines.append(Line(claim, name, squares, turned, _gap(claim, judged)))
    return lines


def gaps(lines: Sequence[Line]) -> list[Line]:
    """Return the lines on which two machines differ beyond both intervals, largest first.

    Differences, which have no factor, come after all ratios.
    """
    found = [line for line in lines if line.gap]
    return sorted(found, key=lambda line: line.gap.factor or 0.0, reverse=True)


def square_of(claim: Claim, c: Judged | None) -> Square:
    """Return what is seen of a condition; None was not run."""
    if c is None:
        return Square("", "x", None, False, "", "not run")
    distance = _distance(claim, c)
    tone = {"unsettled": "u", "not-measured": "n"}.get(c.verdict)
    if tone is None:
        passed = sum(abs(distance) >= math.log2(s) for s in STEPS) if distance is not None else "c"
        tone = f"{c.verdict[0]}{passed}"
    said = [
        word_of(claim, c.verdict) + (f": {c.reason}" if c.reason else ""),
        effect_text(claim, c),
        f"threshold {c.threshold}" if c.threshold else "",
        _AGREEMENTS.get(c.agreement or "", ""),
    ]
    return Square(
        letter=LETTERS[c.verdict],
        tone=tone,
        distance=distance,
        against=c.agreement == "against",
        found=effect_text(claim, c, interval=False),
        said=", ".join(filter(None, said)),
    )


def _is_ratio(claim: Claim) -> bool:
    return claim.kind in ("time", "memory")


def _distance(claim: Claim, c: Judged) -> float | None:
    """Return log2 of how far a ratio is beyond its threshold; negative where it misses it."""
    if not _is_ratio(claim) or c.effect is None or c.threshold is None or c.threshold.op == "==":
        return None
    effect, bound = float(c.effect), float(c.threshold.bound)
    if not (0 < effect < math.inf and bound > 0):
        return None
    if c.threshold.op == "within":
        return math.log2(bound) - abs(math.log2(effect))
    distance = math.log2(effect / bound)
    return distance if c.threshold.op in (">", ">=") else -distance


def _gap(claim: Claim, judged: Sequence[Judged | None]) -> Gap | None:
    """Return the pair of machines whose intervals are furthest apart.

    What is unsettled for another reason than its threshold, such as its control, is no evidence.
    """
    trusted = [(n, c) for n, c in enumerate(judged) if c and c.reason in ("", STRADDLES)]
    best: tuple[float, Gap] | None = None
    for (i, a), (j, b) in permutations(trusted, 2):
        if None in (a.high, b.low) or not a.high < b.low:
            continue
        if effect_text(claim, a) == effect_text(claim, b):  # rounding errors within one bound
            continue
        is_ratio = _is_ratio(claim) and a.high > 0
        size = b.low / a.high if is_ratio else b.low - a.high
        if best is None or size > best[0]:
            best = size, Gap(i, j, size if is_ratio else None)
    return best[1] if best else None
