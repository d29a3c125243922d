"""What is a tip, and what does a claim need so that an experiment can settle it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any, Literal

from dlhelpers.course.verdicts import Theory, Threshold

if TYPE_CHECKING:
    from dlhelpers.course.claims.break_even import Axis, BreakEven
    from dlhelpers.course.claims.judging import NotMeasured, Verdict
    from dlhelpers.measure import Comparison

__all__ = ["Claim", "Condition", "Kind", "Lesson", "Tip"]

Kind = Literal["exact", "time", "memory", "accuracy"]
CONFIRMED = {"holds": "confirmed", "fails": "refuted"}
YES = {"true": "yes", "false": "no"}


@dataclass(frozen=True)
class Tip:
    """A sentence that people repeat.

    Attributes:
        id: stable name, such as ``pair-failure``.
        says: the sentence.
        said_by: who repeats it, and when.
        note: what became of it where that is on record, else empty.
        notebooks: stems of the notebooks with claims of it; empty where none treats it yet.
        do: what to do where it pays, such as ``Use LMDB``; empty where it only states a fact.
    """

    id: str
    says: str
    said_by: str
    note: str = ""
    notebooks: tuple[str, ...] = ()
    do: str = ""


@dataclass(frozen=True)
class Lesson:
    """A notebook of the course, as the list of lessons names it.

    Attributes:
        stem: of its file, such as ``01_pairing``; ``01b_more`` continues it.
        title: a word or two, such as ``Pairing``.
        learn: what its reader learns.
        minutes: that a reader needs, as its notebook says.
    """

    stem: str
    title: str
    learn: str
    minutes: int

    @property
    def number(self) -> str:
        """What its name begins with, such as ``01`` or ``01b``."""
        return self.stem.partition("_")[0]

    @property
    def continues(self) -> str:
        """The number of the lesson whose smaller tips it holds; empty where it is a main one."""
        return self.number[:2] if len(self.number) > 2 else ""

    def is_part_of(self, main: Lesson) -> bool:
        """Whether it is this main lesson, or continues it."""
        return main.number in (self.number, self.continues)


@dataclass(frozen=True)
class Condition:
    """One circumstance in which a claim is tried.

    Attributes:
        name: key of the evidence, such as ``batch 1, launch-bound``.
        theory: whether the tip must win here (``wins``), ``cannot``, or theory leaves it open.
        why: what theory says, in a sentence.
        threshold: the claim's own, or this condition's.
        since: the day from which theory, threshold and sizes are as they are.
        where: what a sentence puts before the name, such as ``for`` or ``with``; may be empty.
    """

    name: str
    theory: Theory
    why: str
    threshold: Threshold
    since: date
    where: str = "for"


@dataclass(frozen=True)
class Claim:
    """A tip with a metric, a threshold and the conditions it is tried in.

    Attributes:
        id: ``topic.what-it-says``; the part before the point is the topic.
        tip: id of the tip that it belongs to.
        says: the tip as people repeat it, made measurable; the verdict says what is true.
        source: paper with equation or table, or documentation.
        kind: ``exact`` (counted, the same everywhere), ``time``, ``memory`` or ``accuracy``.
        metric: what is measured, in words.
        threshold: what the metric must meet for the claim to hold.
        unit: of the metric, in the plural; ``x`` for times as much; ``% of the file`` shows a share
            in percent, ``a loss of {}`` has a place for the number; empty where none is needed.
        notebook: stem of the one notebook that settles it.
        conditions: where it is tried.
        control: whether the evidence must hold the baseline against itself (kind ``time``).
        negligible: speedups within 1 ± this count as no difference (kind ``time``).
        needs: what a machine must have, such as ``cuda``; empty for nothing special.
        words: ``holds``, ``fails`` -> what a sentence says of the tip there, such as ``pays``.
        found: ``true``, ``false`` -> what a truth value means, such as ``an error is raised``.
        asks: names of the conditions that its reader predicts.
        sized: name of the condition whose size is predicted, too; empty for none.
        axis: the number that its conditions hang on, None without one (kind ``time``).
    """

    id: str
    tip: str
    says: str
    source: str
    kind: Kind
    metric: str
    threshold: Threshold
    unit: str
    notebook: str
    conditions: tuple[Condition, ...]
    control: bool
    negligible: float
    needs: str
    words: Mapping[str, str] = field(default_factory=CONFIRMED.copy, hash=False)
    found: Mapping[str, str] = field(default_factory=YES.copy, hash=False)
    asks: tuple[str, ...] = ()
    sized: str = ""
    axis: Axis | None = None

    @property
    def topic(self) -> str:
        """The part of the id before its point."""
        return self.id.partition(".")[0]

    def compare(
        self,
        baseline: Callable[[], Any],
        candidate: Callable[[], Any],
        *,
        condition: str | None = None,
        **options: Any,
    ) -> Comparison:
        """Measure two callables with this claim's threshold and negligible band.

        Where the budget allows too few pairs for an interval, as on a slow machine, measuring
        goes on for the missing ones, up to three times ``budget_s`` in all.

        Args:
            baseline, candidate: callables without arguments.
            condition: name of a condition that has a threshold of its own.
            options: of :func:`dlhelpers.measure.compare`, such as ``budget_s`` or ``setup``.

        Raises:
            TypeError: the claim is not about time.
            ValueError: the condition is not declared.
        """
        if self.kind != "time":
            raise TypeError(
                f"{self.id} is a claim of kind {self.kind}: compare() measures times, "
                "give judge() the counts or estimates themselves"
            )
        threshold = self.threshold if condition is None else self._condition(condition).threshold
        from dlhelpers import measure

        edges = threshold.edges
        usual = {"threshold": edges if len(edges) > 1 else edges[0], "overtime": 2.0}
        usual |= {"negligible": self.negligible}
        return measure.compare(baseline, candidate, **(usual | options))

    def along_axis(
        self,
        sides: Callable[[float], tuple[Callable[[], Any], Callable[[], Any]]],
        *,
        budget_s: float = 10.0,
        known: Mapping[float, Comparison] | None = None,
        **options: Any,
    ) -> BreakEven:
        """Measure each point of the claim's axis; the break-even lies where verdicts change.

        Args:
            sides: point -> (baseline, candidate), callables without arguments; of the same sizes
                as the conditions.
            budget_s: for all points together that are measured.
            known: point -> Comparison, of the points that are conditions: those were measured
                already and are taken as they are.
            options: of :func:`dlhelpers.measure.compare`.

        Returns:
            A BreakEven, to be given to :meth:`judge`, whose verdict holds what is left of it
            (``verdict.break_even``, which ``plots.break_even`` draws).

        Raises:
            ValueError: the claim declares no axis, or ``known`` has a point that is not on it.
        """
        from dlhelpers import progress
        from dlhelpers.course.claims import break_even

        points, found = break_even.axis_of(self).points, dict(known or {})
        if foreign := [point for point in found if point not in points]:
            raise ValueError(f"the axis of {self.id} declares {points}, known has {foreign}")
        rest = [point for point in points if point not in found]
        with progress.bar(progress=None, total=len(rest), desc=self.id, unit="point") as shown:
            for point in rest:
                pair = sides(point)
                found[point] = self.compare(*pair, budget_s=budget_s / len(rest), **options)
                shown.update(1)
        return break_even.from_points(self, {point: found[point] for point in points})

    def judge(
        self, evidence: Mapping[str, Any] | NotMeasured, break_even: BreakEven | None = None
    ) -> Verdict:
        """Settle the claim and write its row to the ledger of this machine.

        Per condition: an interval that wholly meets the threshold holds, one that wholly misses
        it fails, one that straddles it is unsettled; a number is compared as it is, and NaN
        meets no threshold. Where the control is off, every condition is unsettled. A folder that
        cannot be written gives one warning, never an error.

        Args:
            evidence: condition's name -> what was found there, plus ``"control"`` where the
                claim asks for one. Kind ``time`` takes a Comparison, ``accuracy`` an Estimate
                over seeds, ``exact`` a number or a truth value, ``memory`` a number or an
                Estimate; every kind takes ``not_measured(reason)``, also for all at once.
            break_even: of its axis, which the verdict then tells as well.

        Returns:
            A Verdict; as the last expression of a cell it shows itself as a card.

        Raises:
            ValueError: a declared condition is missing or an undeclared one is given, an
                interval is no interval, or its unit is not the claim's.
            TypeError: evidence of another type than the kind takes.
        """
        from dlhelpers.course import ledger
        from dlhelpers.course.claims import judging, predictions

        verdict = judging.settle(self, evidence, predictions.given(self.id), break_even)
        predictions.close(self.id)
        return judging.recalled(verdict, ledger.record(verdict.as_row()))

    def _condition(self, name: str) -> Condition:
        for condition in self.conditions:
            if condition.name == name:
                return condition
        raise ValueError(
            f"{self.id} declares the conditions {[c.name for c in self.conditions]}, got {name!r}"
        )

    def __repr__(self) -> str:
        return f"<claim {self.id}: {self.says}>"

    def __str__(self) -> str:
        from dlhelpers.course.claims.cards import claim_text

        return claim_text(self)
