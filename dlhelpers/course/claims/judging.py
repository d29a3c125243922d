"""Does the evidence bear the claim out, condition by condition?

An interval that wholly meets the threshold holds, one that wholly misses it fails, one that
straddles it is unsettled. A control that is itself *faster* or *slower*, or that was not measured,
leaves every condition unsettled that was measured beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dlhelpers.course.claims.break_even import BreakEven
from dlhelpers.course.claims.conditions import Judged, Tally
from dlhelpers.course.claims.said import Said
from dlhelpers.course.verdicts import STRADDLES, Settled, control_off

if TYPE_CHECKING:
    from dlhelpers.course.claims.claim import Claim, Condition
    from dlhelpers.course.verdicts import Threshold

__all__ = ["Control", "NotMeasured", "Verdict", "not_measured", "settle"]

TOO_FEW = "too few repetitions for an interval"
CHANGING = "the ratio was still changing"
_VERDICTS: dict[bool | None, Settled] = {True: "holds", False: "fails", None: "unsettled"}


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
class Control:
    """The baseline against itself: its speedup, interval and outcome (``not measured`` too)."""

    effect: float | None
    low: float | None
    high: float | None
    outcome: str

    @property
    def off(self) -> str:
        """Why nothing measured beside it can be trusted; empty where it can."""
        return control_off(self.outcome)

    def told(self, thresholds: Iterable[Threshold | None]) -> tuple[str, str]:
        """Return its number in words, and what keeps it from telling much; may be empty.

        Args:
            thresholds: of the conditions beside it. Where its interval reaches one of them, a
                difference of that size may be the experiment's and not the tip's.
        """
        from dlhelpers.course.claims.sentences import number_text

        if self.effect is None:
            return "", self.outcome
        text = f"{number_text('time', self.effect)}x"
        if self.low is None or self.high is None or not math.isfinite(self.high):
            return f"{text} [no interval]", "too few repetitions to tell anything"
        text += f" [{number_text('time', self.low)}, {number_text('time', self.high)}]"
        if self.off:
            return text, self.outcome
        factors = [max(edge, 1 / edge) for t in thresholds if t for edge in t.edges]
        least = min(factors, default=math.inf)
        is_narrow = self.high < least and self.low > 1 / least
        return text, "" if is_narrow else f"too wide to rule out {least:.3g}x"


@dataclass(frozen=True, repr=False)
class Verdict:
    """What became of a claim on this machine; shows itself as a card.

    Attributes:
        claim: the claim that was judged.
        conditions: each condition with its own verdict, in the claim's order.
        control: the baseline against itself, None where the claim has none.
        said: what the learner predicted in this session; empty where nobody did.
        earlier: what they predicted before, as the ledger keeps it.
        break_even: along the claim's axis, None where it was not measured.
        machine: this machine in a line; empty for ``exact`` claims, which are the same anywhere.
    """

    claim: Claim
    conditions: tuple[Judged, ...]
    control: Control | None
    said: tuple[Said, ...]
    machine: str
    earlier: tuple[Said, ...] = ()
    break_even: BreakEven | None = None

    @property
    def id(self) -> str:
        """The claim's id."""
        return self.claim.id

    @property
    def tally(self) -> Tally:
        """How many conditions hold, fail, agree with the mechanism, and which go against it."""
        return Tally.of(self.conditions)

    @property
    def verdict(self) -> str:
        """In how many conditions it holds, as in ``holds in 2 of 3``."""
        from dlhelpers.course.claims.sentences import counted

        return counted(self.tally)

    @property
    def short(self) -> str:
        """The same, and whether that is as the mechanism says."""
        from dlhelpers.course.claims.sentences import short

        return short(self.tally)

    @property
    def sentence(self) -> str:
        """Where it holds and where not, with numbers, and the break-even."""
        from dlhelpers.course.claims.sentences import sentence

        return sentence(self.claim, self.conditions, break_even=self.break_even)

    def as_row(self) -> dict[str, Any]:
        """Return the ledger's row; the ledger adds the time and the versions."""
        control = self.control
        return {
            "id": self.id,
            "control": control
            and {
                "effect": control.effect,
                "low": control.low,
                "high": control.high,
                "outcome": control.outcome,
            },
            "predictions": [said.as_row() for said in self.said],
            "axis": None if self.break_even is None else self.break_even.as_row(),
            "conditions": [c.as_row() for c in self.conditions],
        }

    def __str__(self) -> str:
        from dlhelpers.course.claims.cards import verdict_text

        return verdict_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from dlhelpers.course.claims.cards import verdict_html

        return verdict_html(self)


def settle(
    claim: Claim,
    evidence: Mapping[str, Any] | NotMeasured,
    said: tuple[Said, ...] = (),
    break_even: BreakEven | None = None,
) -> Verdict:
    """Return the verdict that the evidence supports; :meth:`Claim.judge` says what it takes."""
    evidence = _complete(claim, evidence)
    conditions = tuple(_judge(claim, c, evidence[c.name]) for c in claim.conditions)
    control = _control(claim, evidence["control"]) if "control" in evidence else None
    if control is not None and control.off:
        conditions = tuple(
            replace(c, verdict="unsettled", reason=control.off)
            if c.verdict in ("holds", "fails")
            else c
            for c in conditions
        )
    return Verdict(
        claim=claim,
        conditions=conditions,
        control=control,
        said=said,
        break_even=_trusted(break_even, control),
        machine="" if claim.kind == "exact" else _machine_line(),
    )


def _trusted(break_even: BreakEven | None, control: Control | None) -> BreakEven | None:
    """Return a break-even whose points are unsettled where the control is off."""
    if break_even is None or control is None or not control.off:
        return break_even
    points = tuple(replace(point, verdict="unsettled") for point in break_even.points)
    return replace(break_even, points=points)


def recalled(verdict: Verdict, row: Mapping[str, Any] | None) -> Verdict:
    """Return a verdict with the earlier predictions of the row that the ledger holds now."""
    if row is None:
        return verdict
    before = [*row["earlier"], *([] if verdict.said else row["predictions"])]
    return replace(verdict, earlier=tuple(map(Said.from_row, before)))


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
    verdict, effect, low, high, reason = _settle(claim, condition, found)
    return Judged(
        name=condition.name,
        verdict=verdict,
        effect=effect,
        low=low,
        high=high,
        threshold=condition.threshold,
        reason=reason,
        theory=condition.theory,
        since=condition.since,
    )


def _settle(claim: Claim, condition: Condition, found: Any) -> tuple[Settled, Any, Any, Any, str]:
    """Return the condition's verdict, effect, low and high end, and the reason of none."""
    threshold = condition.threshold
    if isinstance(found, NotMeasured):
        return "not-measured", None, None, None, found.reason
    where = f"{claim.id}, condition {condition.name!r}"
    if claim.kind == "time":
        _need_comparison(found, where)
        value, low, high = found.speedup, found.low, found.high
    elif all(hasattr(found, name) for name in ("value", "low", "high")):
        value, low, high = _estimate(claim, found, where)
    elif claim.kind == "accuracy":
        raise TypeError(
            f"{where}: accuracy needs an Estimate over several seeds, as from "
            f"measure.estimate_difference(baseline, candidate), got {_shown(found)}"
        )
    else:
        value = _number(found, threshold, where)
        return _VERDICTS[threshold.met_by(value)], value, value, value, ""
    if math.isnan(low) or math.isnan(high) or not low <= high:
        raise ValueError(f"{where}: [{low}, {high}] is no interval, low must not exceed high")
    verdict, reason = _VERDICTS[threshold.settle(low, high)], ""
    if verdict == "unsettled":
        changing = CHANGING if getattr(found, "still_changing", False) else TOO_FEW
        reason = STRADDLES if math.isfinite(high) else changing
    return verdict, float(value), float(low), float(high), reason


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


def _machine_line() -> str:
    from dlhelpers.course import ledger

    return ledger.describe_machine()["line"]
