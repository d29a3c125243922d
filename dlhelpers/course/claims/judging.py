"""Does the evidence bear the claim out?

Each condition is settled by itself, then all together:

1. a control that is itself ``faster`` or ``slower``, or that was not measured: unsettled
2. some conditions hold and some fail: depends, on what is named
3. an interval straddles the threshold: unsettled
4. all hold: holds; all fail: fails

Conditions that were not measured are named and left out; where none was: not-measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from dlhelpers.course.claims.claim import Claim, Condition, Threshold

__all__ = ["Control", "Judged", "NotMeasured", "Settled", "Verdict", "not_measured", "settle"]

Settled = Literal["holds", "fails", "depends", "unsettled", "not-measured"]
_VERDICTS = {True: "holds", False: "fails", None: "unsettled"}


@dataclass(frozen=True)
class NotMeasured:
    """Evidence that could not be had, and why."""

    reason: str


def not_measured(reason: str) -> NotMeasured:
    """Return evidence that says what was missing, such as ``not_measured("no CUDA device")``.

    Raises:
        ValueError: the reason is empty.
    """
    if not isinstance(reason, str) or not reason.strip():
        raise ValueError(
            f'say what is missing, as in not_measured("no CUDA device"), got {reason!r}'
        )
    return NotMeasured(reason.strip())


@dataclass(frozen=True)
class Judged:
    """One condition of a claim and what its evidence says.

    Attributes:
        name: of the condition.
        verdict: ``holds``, ``fails``, ``unsettled`` or ``not-measured``.
        effect: the number, mean or speedup; None where it was not measured.
        low, high: its interval; both equal to ``effect`` where the number is exact.
        threshold: what it had to meet.
        reason: why it was not measured or has no interval although there were enough pairs, else
            empty.
    """

    name: str
    verdict: Settled
    effect: float | bool | None
    low: float | bool | None
    high: float | bool | None
    threshold: Threshold
    reason: str = ""


@dataclass(frozen=True)
class Control:
    """The baseline against itself: its speedup, interval and outcome (``not measured`` too)."""

    effect: float | None
    low: float | None
    high: float | None
    outcome: str

    @property
    def is_off(self) -> bool:
        """Whether nothing measured beside it can be trusted."""
        return self.outcome in ("faster", "slower", "not measured")


@dataclass(frozen=True, repr=False)
class Verdict:
    """What became of a claim on this machine; shows itself as a card.

    Attributes:
        claim: the claim that was settled.
        verdict: ``holds``, ``fails``, ``depends``, ``unsettled`` or ``not-measured``.
        conditions: each condition with its own verdict, in the claim's order.
        control: the baseline against itself, None where the claim has none.
        answer: what the learner predicted in this session, None without an answer.
        reason: on what it depends, or what is missing; empty where it holds or fails throughout.
        machine: this machine in a line; empty for ``exact`` claims, which are the same anywhere.
    """

    claim: Claim
    verdict: Settled
    conditions: tuple[Judged, ...]
    control: Control | None
    answer: str | None
    reason: str
    machine: str

    @property
    def id(self) -> str:
        """The claim's id."""
        return self.claim.id

    def as_row(self) -> dict[str, Any]:
        """Return the ledger's row.

        ``effect``, ``low`` and ``high`` are those of the first condition whose own verdict is
        the claim's, else of the first one that was measured.
        """
        measured = [c for c in self.conditions if c.verdict != "not-measured"]
        agreeing = [c for c in measured if c.verdict == self.verdict]
        chosen = (agreeing or measured or [None])[0]
        control = self.control
        return {
            "id": self.id,
            "verdict": self.verdict,
            "effect": chosen and chosen.effect,
            "low": chosen and chosen.low,
            "high": chosen and chosen.high,
            "control": control
            and {
                "effect": control.effect,
                "low": control.low,
                "high": control.high,
                "outcome": control.outcome,
            },
            "answer": self.answer,
            "conditions": [
                {
                    "name": c.name,
                    "verdict": c.verdict,
                    "effect": c.effect,
                    "low": c.low,
                    "high": c.high,
                    "reason": c.reason,
                }
                for c in self.conditions
            ],
        }

    def __str__(self) -> str:
        from dlhelpers.course.claims.cards import verdict_text

        return verdict_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from dlhelpers.course.claims.cards import verdict_html

        return verdict_html(self)


def settle(
    claim: Claim, evidence: Mapping[str, Any] | NotMeasured, answer: str | None = None
) -> Verdict:
    """Return the verdict that the evidence supports; :meth:`Claim.judge` says what it takes."""
    evidence = _complete(claim, evidence)
    conditions = tuple(_judge(claim, c, evidence[c.name]) for c in claim.conditions)
    control = _control(claim, evidence["control"]) if "control" in evidence else None
    verdict, reason = _combine(conditions, control)
    return Verdict(
        claim=claim,
        verdict=verdict,
        conditions=conditions,
        control=control,
        answer=answer,
        reason=reason,
        machine="" if claim.kind == "exact" else _machine_line(),
    )


def _complete(claim: Claim, evidence: Mapping[str, Any] | NotMeasured) -> Mapping[str, Any]:
    names = [condition.name for condition in claim.conditions]
    wanted = [*names, "control"] if claim.control else names
    if isinstance(evidence, NotMeasured):
        return dict.fromkeys(wanted, evidence)
    if not isinstance(evidence, Mapping):
        raise TypeError(
            f"evidence of {claim.id} must map each of {wanted} to what was found there, "
            f"got {type(evidence).__name__}"
        )
    allowed = [*names, "control"] if claim.kind == "time" else names
    missing = [name for name in wanted if name not in evidence]
    foreign = [name for name in evidence if name not in allowed]
    if missing or foreign:
        said = [f"lacks {missing}"] * bool(missing) + [f"has undeclared {foreign}"] * bool(foreign)
        raise ValueError(
            f"evidence of {claim.id} {' and '.join(said)}; {claim.notebook}.toml declares {names}"
            + (", and 'control' is the baseline against itself" if "control" in missing else "")
        )
    return evidence


def _judge(claim: Claim, condition: Condition, found: Any) -> Judged:
    threshold = condition.threshold
    if isinstance(found, NotMeasured):
        return Judged(
            condition.name, "not-measured", None, None, None, threshold, reason=found.reason
        )
    where = f"{claim.id}, condition {condition.name!r}"
    reason = ""
    if claim.kind == "time":
        _need_comparison(found, where)
        value, low, high = found.speedup, found.low, found.high
        reason = "still warming up" * getattr(found, "still_changing", False)
    elif all(hasattr(found, name) for name in ("value", "low", "high")):
        value, low, high = _estimate(claim, found, where)
    elif claim.kind == "accuracy":
        raise TypeError(
            f"{where}: accuracy needs an Estimate over several seeds, as from "
            f"measure.estimate_difference(baseline, candidate), got {_shown(found)}"
        )
    else:
        value = _number(found, threshold, where)
        met = threshold.met_by(value)
        return Judged(condition.name, _VERDICTS[met], value, value, value, threshold)
    if math.isnan(low) or math.isnan(high) or not low <= high:
        raise ValueError(f"{where}: [{low}, {high}] is no interval, low must not exceed high")
    settled = _VERDICTS[threshold.settle(low, high)]
    return Judged(condition.name, settled, float(value), float(low), float(high), threshold, reason)


def _need_comparison(found: Any, where: str) -> None:
    if not all(hasattr(found, name) for name in ("speedup", "low", "high", "outcome")):
        raise TypeError(
            f"{where}: time needs a Comparison, as from claim.compare(baseline, candidate), "
            f"got {_shown(found)}"
        )


def _estimate(claim: Claim, found: Any, where: str) -> tuple[float, float, float]:
    if claim.kind == "exact":
        raise TypeError(
            f"{where}: an exact claim needs a number or a truth value, got {_shown(found)}"
        )
    unit = getattr(found, "unit", "")
    if unit and claim.unit and unit != claim.unit:
        raise ValueError(f"{where}: the estimate is in {unit!r}, the claim in {claim.unit!r}")
    return found.value, found.low, found.high


def _number(found: Any, threshold: Threshold, where: str) -> float | bool:
    value = found
    if not isinstance(value, (bool, int, float)) and hasattr(value, "item"):
        try:
            value = value.item()  # a NumPy scalar or a tensor of one element
        except (TypeError, ValueError, RuntimeError):
            value = None
    if not isinstance(value, (bool, int, float)):
        raise TypeError(f"{where}: expected a number or a truth value, got {_shown(found)}")
    truth_asked = isinstance(threshold.bound, bool)
    if truth_asked and not isinstance(value, bool):
        raise TypeError(f"{where}: {threshold} asks for True or False, got {_shown(found)}")
    if isinstance(value, bool) and not truth_asked and str(threshold) not in ("== 0", "== 1"):
        raise TypeError(
            f"{where}: {threshold} asks for a number, got {value}: give the number itself, "
            "or declare the threshold as '== true'"
        )
    return value


def _shown(found: Any) -> str:
    return f"{type(found).__name__} {found!r}"[:80]


def _control(claim: Claim, found: Any) -> Control:
    if isinstance(found, NotMeasured):
        return Control(None, None, None, "not measured")
    _need_comparison(found, f"{claim.id}, 'control'")
    return Control(found.speedup, found.low, found.high, found.outcome)


def _combine(conditions: Sequence[Judged], control: Control | None) -> tuple[Settled, str]:
    def names(verdict: str) -> str:
        return "; ".join(c.name for c in conditions if c.verdict == verdict)

    holds, fails, unsettled = names("holds"), names("fails"), names("unsettled")
    missing = _missing(conditions)
    verdict: Settled
    if not (holds or fails or unsettled):
        return "not-measured", missing
    if control is not None and control.is_off:
        verdict, reason = "unsettled", "the control was not measured"
        if control.outcome != "not measured":
            reason = f"the control came back {control.outcome}: the baseline differs from itself"
    elif holds and fails:
        verdict, reason = "depends", f"holds: {holds} · fails: {fails}"
        reason += f" · unsettled: {unsettled}" if unsettled else ""
    elif unsettled:
        verdict, reason = "unsettled", _unsettled(conditions)
    else:
        verdict, reason = ("holds" if holds else "fails"), ""
    return verdict, " · ".join(filter(None, (reason, missing)))


def _unsettled(conditions: Sequence[Judged]) -> str:
    """Say why conditions are unsettled: an interval that straddles the threshold, or none."""
    straddles, changes = "the interval straddles the threshold", "the ratio was still changing"
    too_few = "too few repetitions for an interval"
    names: dict[str, list[str]] = {straddles: [], too_few: [], changes: []}
    for c in conditions:
        if c.verdict == "unsettled":
            has_interval = c.high is not None and math.isfinite(c.high)
            why = straddles if has_interval else changes if c.reason else too_few
            names[why].append(c.name)
    remedy = " (give a larger budget_s, or stop other programs, and run it again)"
    return " · ".join(
        f"{why}: {'; '.join(found)}{remedy * (why != straddles)}"
        for why, found in names.items()
        if found
    )


def _missing(conditions: Sequence[Judged]) -> str:
    """Say what was not measured and why, each reason once."""
    reasons: dict[str, list[str]] = {}
    for c in conditions:
        if c.verdict == "not-measured":
            reasons.setdefault(c.reason, []).append(c.name)
    if sum(map(len, reasons.values())) == len(conditions):
        return "; ".join(reasons)
    return "; ".join(
        f"not measured: {', '.join(names)} ({reason})" for reason, names in reasons.items()
    )


def _machine_line() -> str:
    from dlhelpers.course import ledger

    return ledger.describe_machine()["line"]
