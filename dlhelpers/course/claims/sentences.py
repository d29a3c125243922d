"""What is said of a tip once it was measured, in words and numbers?

The short form counts the conditions and says whether they came out as the mechanism says; the
sentence names each of them with its number::

    holds in 1 of 2, as the mechanism says
    Pays where preparing is slower (1.42x [1.35, 1.50]); not where training is slower (1.01x)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dlhelpers.course.claims.claim import CONFIRMED
from dlhelpers.course.verdicts import Threshold

if TYPE_CHECKING:
    from dlhelpers.course.claims.claim import Claim
    from dlhelpers.course.claims.conditions import Judged, Tally

__all__ = [
    "asked",
    "bound_text",
    "counted",
    "effect_text",
    "headline",
    "listed",
    "number_text",
    "sentence",
    "short",
]

_SMALL_BOUND = 1e-2
_AGAINST = "against the mechanism"


def counted(tally: Tally) -> str:
    """Say in how many of the settled conditions it holds, and how many were not settled.

    >>> from dlhelpers.course.claims.conditions import Tally
    >>> counted(Tally(holds=2, fails=1)), counted(Tally(fails=1, missing=1))
    ('holds in 2 of 3', 'holds in none of 1 settled; 1 not measured')
    """
    return "; ".join(filter(None, (_holds(tally), _rest(tally))))


def short(tally: Tally) -> str:
    """Say the same, and whether it is as the mechanism says.

    >>> from dlhelpers.course.claims.conditions import Tally
    >>> short(Tally(holds=2, fails=1, agrees=3))
    'holds in 2 of 3, as the mechanism says'
    >>> short(Tally(holds=2, fails=1, agrees=2, against=("batch 64",)))
    'holds in 2 of 3, against the mechanism in 1: batch 64'
    """
    said = ""
    if tally.against:
        said = f", {_AGAINST} in {len(tally.against)}: {'; '.join(tally.against)}"
    elif tally.agrees:
        said = ", as the mechanism says"
        said += f" (it leaves {tally.open} open)" if tally.open else ""
    elif tally.open:
        said = ", which the mechanism leaves open"
    return "; ".join(filter(None, (_holds(tally) + said, _rest(tally))))


def headline(tally: Tally) -> str:
    """Return the short form as a line of its own, where what stands out is in capitals.

    >>> from dlhelpers.course.claims.conditions import Tally
    >>> headline(Tally(holds=2, agrees=1, against=("batch 64",)))
    'Holds in both, AGAINST THE MECHANISM in 1: batch 64'
    """
    said = short(tally)
    if tally.against:
        said = said.replace(_AGAINST, _AGAINST.upper(), 1)
    return said[:1].upper() + said[1:]


def sentence(
    claim: Claim, conditions: Sequence[Judged], found: Callable[[Judged], str] | None = None
) -> str:
    """Name every condition once: where the tip holds, where not, and where nobody can tell.

    ``found`` gives the number of a condition in words, :func:`effect_text` where it is None.
    """
    groups = {"holds": [], "fails": [], "unsettled": []}
    for c in conditions:
        if c.verdict in groups:
            groups[c.verdict].append(c)
    words, parts = claim.words, []
    if groups["holds"]:
        parts.append(f"{words['holds']} {listed(claim, groups['holds'], found)}")
    if groups["fails"]:
        said = words["fails"] if words == CONFIRMED or not parts else "not"
        parts.append(f"{said} {listed(claim, groups['fails'], found)}")
    for reason in dict.fromkeys(c.reason for c in groups["unsettled"]):
        these = [c for c in groups["unsettled"] if c.reason == reason]
        why = f": {reason}" if reason else ""
        parts.append(f"unsettled {listed(claim, these, found)}{why}")
    parts += _missing(conditions)
    text = "; ".join(" ".join(part.split()) for part in parts)
    return text[:1].upper() + text[1:]


def listed(
    claim: Claim, conditions: Sequence[Judged], found: Callable[[Judged], str] | None = None
) -> str:
    """Join conditions with their numbers; what stands before a name is said once for a row."""
    before = {c.name: c.where for c in claim.conditions}
    items, last = [], None
    for c in conditions:
        where = before.get(c.name, "for")
        number = effect_text(claim, c) if found is None else found(c)
        name = f"{c.name} ({number})" if number else c.name
        items.append(name if where == last else f"{where} {name}".strip())
        last = where
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} and {items[-1]}"


def effect_text(claim: Claim, condition: Judged, *, interval: bool = True) -> str:
    """Return what was found in a condition, with its interval and unit; empty without any.

    An exact number stands alone: a truth value in words, a float with four digits, and a
    rounding error only as within or beyond its bound, so that it reads the same everywhere.
    """
    effect, threshold = condition.effect, condition.threshold
    if condition.verdict == "not-measured":
        return ""
    if effect is None:
        return "not finite"
    if isinstance(effect, bool):
        return claim.found[str(effect).lower()]
    if claim.kind == "exact":
        if isinstance(effect, float) and _is_small(threshold) and not math.isnan(effect):
            return f"{'within' if threshold.met_by(effect) else 'beyond'} {threshold.bound:g}"
        return _with_unit(_counted_text(effect), effect, claim.unit)
    unit = _unit(claim)
    text, low, high = number_text(claim.kind, effect), condition.low, condition.high
    attached = unit == "x"
    text += "x" * attached
    if not interval or (low == high and low is not None):
        pass
    elif high is None or low is None or not math.isfinite(high):
        text += " [no interval]"
    else:
        text += f" [{number_text(claim.kind, low)}, {number_text(claim.kind, high)}]"
    return text if attached else _with_unit(text, effect if low == high else None, unit)


def number_text(kind: str, value: float) -> str:
    """Return a number as cards show it: a ratio of times with two decimals, three digits else."""
    return f"{value:.2f}" if kind == "time" and 0.1 <= value < 100 else f"{value:.3g}"


def asked(claim: Claim, threshold: Threshold | None = None) -> str:
    """Return metric and bound: what has to be found for the claim to hold."""
    threshold = claim.threshold if threshold is None else threshold
    if isinstance(threshold.bound, bool):
        mark = "" if claim.metric.endswith("?") else ":"
        return f"{claim.metric}{mark} {'yes' if threshold.bound else 'no'}"
    said = bound_text(claim, threshold)
    if threshold.op == "==":
        return f"{claim.metric}: {said[3:]}"
    return f"{claim.metric}{':' if len(threshold.edges) > 1 else ''} {said}"


def bound_text(claim: Claim, threshold: Threshold) -> str:
    """Return a bound with its unit, such as ``>= 5 points``, or ``between 0.833x and 1.2x``."""
    unit = _unit(claim)
    if len(threshold.edges) > 1:
        return "between " + " and ".join(f"{edge:.3g}{unit}" for edge in threshold.edges)
    if claim.kind == "exact" and unit != "x":  # the metric says what is counted
        return str(threshold)
    return _with_unit(str(threshold), threshold.bound, unit)


def _counted_text(value: float) -> str:
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{'minus ' * (value < 0)}infinite"
    text = f"{value + 0.0:.4g}"
    return f"{float(text):.0f}" if 1e4 <= abs(value) < 1e9 else text


def _unit(claim: Claim) -> str:
    return "x" if claim.kind == "time" else claim.unit


def _with_unit(text: str, value: float | None, unit: str) -> str:
    if unit == "x" or not unit:
        return text + unit
    one = value is not None and abs(value) == 1 and len(unit) > 2
    return f"{text} {unit.removesuffix('s') if one else unit}"


def _holds(tally: Tally) -> str:
    settled = tally.settled
    if not settled:
        return ""
    if tally.unsettled or tally.missing:
        return f"holds in {tally.holds or 'none'} of {settled} settled"
    if settled == 1:
        return "holds" if tally.holds else "does not hold"
    if not tally.fails:
        return "holds in both" if settled == 2 else f"holds in all {settled}"
    if not tally.holds:
        return "holds in neither of 2" if settled == 2 else f"holds in none of {settled}"
    return f"holds in {tally.holds} of {settled}"


def _rest(tally: Tally) -> str:
    if not tally.settled and not (tally.unsettled and tally.missing):
        several = f"{tally.unsettled} unsettled" if tally.unsettled > 1 else "unsettled"
        return several if tally.unsettled else "not measured"
    parts = []
    if tally.unsettled:
        parts.append(f"{tally.unsettled} unsettled")
    if tally.missing:
        parts.append(f"{tally.missing} not measured")
    return ", ".join(parts)


def _missing(conditions: Sequence[Judged]) -> list[str]:
    """Say what was not measured and why, each reason once."""
    reasons: dict[str, list[str]] = {}
    for c in conditions:
        if c.verdict == "not-measured":
            reasons.setdefault(c.reason, []).append(c.name)
    if len(reasons) == 1 and sum(map(len, reasons.values())) == len(conditions):
        return [f"not measured: {next(iter(reasons))}"]
    return [f"not measured: {', '.join(names)} ({reason})" for reason, names in reasons.items()]


def _is_small(threshold: Threshold | None) -> bool:
    return (
        threshold is not None
        and threshold.op in ("<", "<=")
        and 0 <= threshold.bound < _SMALL_BOUND
    )
