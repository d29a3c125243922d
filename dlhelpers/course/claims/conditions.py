"""What became of each condition of a claim, and is it what the mechanism says?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from dlhelpers.course.claims.claim import Condition
from dlhelpers.course.verdicts import Agreement, Settled, Theory, Threshold, agreement_of

__all__ = ["STANDINGS", "Judged", "Tally"]

STANDINGS = {
    "against": "against the mechanism",
    "agrees": "as the mechanism says",
    "open": "the mechanism leaves it open",
    "unknown": "what the mechanism said was not recorded",
    "unsettled": "unsettled",
    "not-measured": "not measured",
    "not-run": "not run",
}  # of a claim, what stands out first


@dataclass(frozen=True)
class Judged:
    """One condition of a claim and what its evidence says.

    Attributes:
        name: of the condition.
        verdict: ``holds``, ``fails``, ``unsettled`` or ``not-measured``.
        effect: the number, mean or speedup; None where it was not measured or is not finite.
        low, high: its interval; both equal to ``effect`` where the number is exact.
        threshold: what it had to meet; None where an old ledger does not say.
        reason: why it is unsettled or was not measured, else empty.
        theory: what theory said when it was measured; None where an old ledger does not say.
        since: the day from which theory and threshold stood then; None as above.
    """

    name: str
    verdict: Settled
    effect: float | bool | None
    low: float | bool | None
    high: float | bool | None
    threshold: Threshold | None
    reason: str = ""
    theory: Theory | None = None
    since: date | None = None

    @property
    def agreement(self) -> Agreement | None:
        """Whether it came out as theory says; None where it is not settled or not known."""
        return agreement_of(self.verdict, self.theory)

    def as_row(self) -> dict[str, Any]:
        """Return the condition as the ledger holds it."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "agreement": self.agreement,
            "effect": self.effect,
            "low": self.low,
            "high": self.high,
            "threshold": None if self.threshold is None else str(self.threshold),
            "theory": self.theory,
            "since": None if self.since is None else self.since.isoformat(),
            "reason": self.reason,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Judged:
        """Read a condition of a ledger's row, which was checked before."""
        threshold, since = row["threshold"], row["since"]
        return cls(
            name=row["name"],
            verdict=row["verdict"],
            effect=row["effect"],
            low=row["low"],
            high=row["high"],
            threshold=None if threshold is None else Threshold.parse(threshold),
            reason=row["reason"],
            theory=row["theory"],
            since=None if since is None else date.fromisoformat(since),
        )

    def changes(self, now: Condition) -> tuple[str, ...]:
        """Say in what the condition was another one when this was measured.

        A later date with the same theory and threshold means that its sizes changed.
        """
        said = []
        if self.theory is not None and self.theory != now.theory:
            said.append(f"theory was {self.theory!r}, is {now.theory!r}")
        if self.threshold is not None and self.threshold != now.threshold:
            said.append(f"threshold was {self.threshold}, is {now.threshold}")
        if not said and self.since is not None and self.since < now.since:
            said.append("measured differently")
        return tuple(f"{change} since {now.since}" for change in said)


@dataclass(frozen=True)
class Tally:
    """How the conditions of a claim, or of many claims, came out.

    Attributes:
        holds, fails, unsettled, missing: numbers of conditions; ``missing`` were not measured.
        agrees, open: numbers of settled conditions that came out as theory says, and of which it
            says nothing.
        against: names of those that came out against it.
    """

    holds: int = 0
    fails: int = 0
    unsettled: int = 0
    missing: int = 0
    agrees: int = 0
    open: int = 0
    against: tuple[str, ...] = ()

    @classmethod
    def of(cls, conditions: Iterable[Judged]) -> Tally:
        """Count conditions."""
        conditions = tuple(conditions)
        verdicts = [c.verdict for c in conditions]
        agreements = [c.agreement for c in conditions]
        return cls(
            holds=verdicts.count("holds"),
            fails=verdicts.count("fails"),
            unsettled=verdicts.count("unsettled"),
            missing=verdicts.count("not-measured"),
            agrees=agreements.count("agrees"),
            open=agreements.count("open"),
            against=tuple(c.name for c in conditions if c.agreement == "against"),
        )

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, k) + getattr(other, k) for k in self.__dataclass_fields__))

    @property
    def settled(self) -> int:
        """Conditions that hold or fail."""
        return self.holds + self.fails

    @property
    def standing(self) -> str:
        """Return a key of STANDINGS."""
        if self.against:
            return "against"
        if self.agrees:
            return "agrees"
        if self.settled:
            return "open" if self.open == self.settled else "unknown"
        return "unsettled" if self.unsettled else "not-measured"
