"""What is said of a tip once it was measured, in words and numbers?

The short form counts the conditions and says whether they came out as the mechanism says; the
sentence names each of them with its number::

    holds in 1 of 2, as the mechanism says
    Pays where preparing is slower (1.42x [1.35, 1.50]); not where training is slower (1.01x)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dlhelpers.course.claims.claim import CONFIRMED
from dlhelpers.course.verdicts import Threshold

if TYPE_CHECKING:
    from dlhelpers.course.claims.break_even import BreakEven
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
    ('holds in 2 of 3', 'fails in the one that is settled; 1 not measured')
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
    claim: Claim,
    conditions: Sequence[Judged],
    found: Callable[[Judged], str] | None = None,
    break_even: BreakEven | None = None,
) -> str:
    """Name every condition once: where the tip holds, where not, and where nobody can tell.

    The break-even along the claim's axis comes last.

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
        last = "or" if "not" in said.split() else "and"
        parts.append(f"{said} {listed(claim, groups['fails'], found, last)}")
    for reason in dict.fromkeys(c.reason for c in groups["unsettled"]):
        these = [c for c in groups["unsettled"] if c.reason == reason]
        why = f": {reason}" if reason else ""
        parts.append(f"unsettled {listed(claim, these, found)}{why}")
    parts += _missing(conditions)
    if break_even is not None:
        parts.append(f"break-even: {break_even}")
    text = "; ".join(" ".join(part.split()) for part in parts)
    return text[:1].upper() + text[1:]


def listed(
    claim: Claim,
    conditions: Sequence[Judged],
    found: Callable[[Judged], str] | None = None,
    last: str = "and",
    more: int = 0,
) -> str:
    """Join conditions with their numbers; the preposition before equal ones is said once.

    ``last`` joins the last two (``or`` after a negation); ``more`` others are only counted.
    """
    before = {c.name: c.where for c in claim.conditions}
    items, previous = [], None
    for c in conditions:
        where = before.get(c.name, "for")
        number = effect_text(claim, c) if found is None else found(c)
        name = f"{c.name} ({number})" if number else c.name
        said = where.partition(" ")[2] if where == previous else where  # "the" of "with the"
        items.append(f"{said} {name}".strip())
        previous = where
    items += [f"{more} more"] * bool(more)
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} {last} {items[-1]}"


def effect_text(claim: Claim, condition: Judged, *, interval: bool = True) -> str:
    """Return what was found in a condition, with its interval and unit; empty without any.

    An exact number stands alone: a truth value in words, a float with four digits, and a
    rounding error only as within or beyond its bound, so that it reads the same everywhere. An
    interval of no width, as from seeds that all gave the same, is none.
    """
    effect, threshold = condition.effect, condition.threshold
    if condition.verdict == "not-measured":
        return ""
    if effect is None:
        return "not finite"
    if isinstance(effect, bool):
        return claim.found[str(effect).lower()]
    if claim.kind == "exact":
        if not math.isfinite(effect):
            return _counted_text(effect)
        if isinstance(effect, float) and _is_small(threshold):
            within = "within" if threshold.met_by(effect) else "beyond"
            return f"{within} {_shortened(f'{threshold.bound:g}')}"
        return _with_unit(_counted_text(_scaled(effect, claim.unit)), effect, claim.unit)
    if not math.isfinite(effect):
        return _counted_text(effect)
    unit, low, high = _unit(claim), condition.low, condition.high

    def told(value: float) -> str:
        return number_text(claim.kind, _scaled(value, unit))

    text, attached = told(effect), unit == "x"
    text += "x" * attached
    is_point = low == high and low is not None
    if not interval or is_point:
        pass
    elif low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        text += " [no interval]"
    else:
        text += f" [{told(low)}, {told(high)}]"
    text = text if attached else _with_unit(text, effect if is_point else None, unit)
    return f"{text} each time" if is_point and claim.kind == "accuracy" else text


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
    if unit.startswith("%"):
        return f"{threshold.op} {100 * threshold.bound:g} %"
    text = _shortened(str(threshold))
    if (claim.kind == "exact" and unit != "x") or "{}" in unit:  # the metric says what is counted
        return text
    return _with_unit(text, threshold.bound, unit)


def _counted_text(value: float) -> str:
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{'minus ' * (value < 0)}infinite"
    text = f"{value + 0.0:.4g}"
    return f"{float(text):.0f}" if 1e4 <= abs(value) < 1e9 else text


def _unit(claim: Claim) -> str:
    return "x" if claim.kind == "time" else claim.unit


def _scaled(value: float, unit: str) -> float:
    """Return a share in percent, where that is the unit."""
    return 100 * value if unit.startswith("%") else value


def _shortened(text: str) -> str:
    return re.sub(r"e([+-])0+(?=\d)", r"e\1", text)  # 1e-06, as Python writes it


def _with_unit(text: str, value: float | None, unit: str) -> str:
    if "{}" in unit:
        return unit.format(text)
    if unit == "x" or not unit:
        return text + unit
    one = value is not None and abs(value) == 1 and not unit.startswith("%")
    return f"{text} {re.sub(r's(?= |$)', '', unit, count=1) if one else unit}"


def _holds(tally: Tally) -> str:
    settled = tally.settled
    if not settled:
        return ""
    some = bool(tally.unsettled or tally.missing)
    if tally.holds and tally.fails:
        return f"holds in {tally.holds} of {f'the {settled} that are settled' if some else settled}"
    word = "holds" if tally.holds else "fails"
    if settled == 1:
        return f"{word} in the one that is settled" if some else word
    every = "both" if settled == 2 else f"all {settled}"
    return f"{word} in {every}{' that are settled' * some}"


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
