"""What should one do about a tip on this machine, in a sentence?

The advice follows from one claim of the tip, its first that is not counted (its first one where all
are), and names what was measured, the clearest first::

    Use LMDB with 8 px PNG, bytes alone (3.10x); it does nothing with the same decoder (1.01x).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dlhelpers.course.claims.sentences import effect_text, listed

if TYPE_CHECKING:
    from dlhelpers.course.claims.claim import Claim, Tip
    from dlhelpers.course.claims.conditions import Judged

__all__ = ["advice", "gain_of", "main_claim"]

_NAMED = 3  # conditions that a part of the sentence names
_NOTHING = 1.1  # an interval within this factor of 1, either way, is nothing that one would notice
_SAID = {
    "fails": "not",
    "short": "too little",
    "nothing": "it does nothing",
    "worse": "it costs more than it saves",
    "undecided": "undecided whether it saves or costs",
}
_NEGATIONS = ("fails", "nothing", "not-measured")


def main_claim(tip: Tip, claims: Sequence[Claim]) -> Claim | None:
    """Return the claim that advice follows from; None where none is of this tip."""
    own = [claim for claim in claims if claim.tip == tip.id]
    return next((c for c in own if c.kind != "exact"), own[0] if own else None)


def gain_of(claim: Claim, c: Judged) -> str:
    """Return the verdict of a condition, where it fails by what it brings instead.

    A ratio that had to be large and is not is ``nothing`` (its whole interval near 1), ``worse``
    (surely below 1), ``short`` (of the threshold, surely not below 1) or ``undecided``.
    """
    has_gain = c.threshold is not None and c.threshold.op in (">=", ">") and c.threshold.bound > 1
    is_ratio = claim.kind == "time" or (claim.kind == "memory" and claim.unit == "x")
    if c.verdict != "fails" or not (has_gain and is_ratio) or not c.effect or c.effect <= 0:
        return c.verdict
    low, high = (c.effect if end is None else end for end in (c.low, c.high))
    if low >= 1 / _NOTHING and high <= _NOTHING:
        return "nothing"
    if high < 1:
        return "worse"
    return "short" if low >= 1 else "undecided"


def advice(
    tip: Tip,
    claim: Claim,
    conditions: Sequence[Judged],
    found: Callable[[Judged], str] | None = None,
) -> str:
    """Say in a sentence where to follow a tip, where it does nothing and where nobody can tell.

    Args:
        tip: its ``do`` begins the sentence; a tip that only states a fact is relied on.
        claim: of :func:`main_claim`.
        conditions: of that claim, as they came out on one machine; none where it was not run.
            Those that the claim no longer declares give no advice.
        found: a condition -> its number in words; effects without intervals where None.

    >>> from dlhelpers.course.claims import all_claims, all_tips
    >>> tip = all_tips()[0]
    >>> advice(tip, main_claim(tip, all_claims()), [])
    'Not run.'
    """
    declared = {condition.name for condition in claim.conditions}
    conditions = [c for c in conditions if c.name in declared]
    if not conditions:
        return "Not run."

    def number(c: Judged) -> str:
        return effect_text(claim, c, interval=False)

    groups: dict[str, list[Judged]] = {}
    for c in conditions:
        groups.setdefault(gain_of(claim, c), []).append(c)
    said = {
        name: _clearest(claim, group, found or number, "or" if name in _NEGATIONS else "and")
        for name, group in groups.items()
    }
    against = "; ".join(f"{words} {said[name]}" for name, words in _SAID.items() if name in said)
    parts = []
    if "holds" in said:
        parts += [f"{tip.do or 'Rely on it'} {said['holds']}", against]
    elif against:
        if tip.do:
            parts.append(against if "unsettled" in said else f"Of no use here: {against}")
        else:
            parts.append(f"Do not rely on it {against.removeprefix('not ')}")
    if "unsettled" in said:
        parts.append(f"unsettled {said['unsettled']}")
    if "not-measured" in said:
        reasons = dict.fromkeys(c.reason for c in groups["not-measured"])
        parts.append(f"not measured {said['not-measured']}: {', '.join(reasons)}")
    text = "; ".join(filter(None, parts))
    return f"{text[:1].upper()}{text[1:]}."


def _clearest(
    claim: Claim, group: Sequence[Judged], found: Callable[[Judged], str], last: str
) -> str:
    """Name a few conditions, those that are furthest from where nothing happens."""

    def size(c: Judged) -> float:
        value = float(c.effect or 0)
        if not math.isfinite(value):
            return math.inf
        return abs(math.log(value)) if value > 0 and claim.kind == "time" else abs(value)

    named = sorted(group, key=size, reverse=True)[:_NAMED]
    more = len(group) - len(named)
    return listed(claim, [c for c in group if c in named], found, last, more)
