"""How did a game go, and how good was it?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from dlhelpers import measure
from dlhelpers.course.story.runs import ScriptRun
from dlhelpers.course.story.settings import MENU, Settings, Step
from dlhelpers.tables import duration, figures, html_table, text_table

__all__ = ["Played", "Round", "Score"]


@dataclass(frozen=True)
class Round:
    """One change in a game.

    Attributes:
        name: of the change, as in ``MENU``.
        expected: gain of the whole script that the player said.
        advice: what ``diagnose`` named first in that part, and the gain that it expected; None
            where nobody looked, or it found nothing.
        pair: its part before and after.
        run: the whole script afterwards.
    """

    name: str
    expected: float
    advice: tuple[str, float] | None
    pair: measure.Comparison
    run: ScriptRun

    @property
    def step(self) -> Step:
        """The field that was set."""
        return MENU[self.name]


@dataclass(frozen=True, repr=False)
class Played:
    """A game from its first round to its last; shows itself as a table.

    Attributes:
        found: the run of the script as found.
        rounds: in order.
    """

    found: ScriptRun
    rounds: tuple[Round, ...]

    @property
    def settings(self) -> Settings:
        """The settings after the last round."""
        settings = Settings()
        for done in self.rounds:
            settings = done.step.done(settings)
        return settings

    @property
    def final(self) -> ScriptRun:
        """The last run."""
        return self.rounds[-1].run if self.rounds else self.found

    @property
    def speedup(self) -> float:
        """Time of the whole script as found / at the end."""
        return self.found.total_s / self.final.total_s

    _HEAD = (
        "round", "change", "diagnose said first", "its part, in pairs", "expected", "script",
        "time",
    )  # fmt: skip

    def gains(self) -> list[float]:
        """Return by how many times the whole script became faster in each round."""
        totals = [self.found.total_s, *(done.run.total_s for done in self.rounds)]
        return [before / after for before, after in pairwise(totals)]

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("", "as found", "", "", "", "", duration(self.found.total_s))]
        for number, (done, gain) in enumerate(zip(self.rounds, self.gains(), strict=True), start=1):
            said = f"{done.advice[0]}, {done.advice[1]:.2f}x" if done.advice else ""
            pair = done.pair
            got = "undecided: no interval"
            if math.isfinite(pair.high):
                got = f"{figures(pair.speedup)}x [{figures(pair.low)}, {figures(pair.high)}]"
            after = duration(done.run.total_s)
            expected = f"{done.expected:.2f}x"
            rows.append((str(number), done.name, said, got, expected, f"{gain:.2f}x", after))
        return rows

    def __repr__(self) -> str:
        return f"{self._end()}\n{text_table(self._HEAD, self._rows(), names=3)}"

    def _repr_html_(self) -> str:
        return f"<p>{self._end()}</p>{html_table(self._HEAD, self._rows(), names=3)}"

    def _end(self) -> str:
        count = len(self.rounds)
        return (
            f"{figures(self.speedup)} times as fast after {count} change{'s' * (count != 1)}, "
            f"accuracy {self.final.accuracy:.0%}"
        )


@dataclass(frozen=True, repr=False)
class Score:
    """How fast the script is at the end of several games; shows itself.

    Attributes:
        games: player -> what was played.
        final_s: player -> seconds of the whole script at the end, the fastest of a few runs, which
            all players' scripts made in turn.
        found_s: the same of the script as found, which ran in the same turns.
    """

    games: Mapping[str, Played]
    final_s: Mapping[str, float]
    found_s: float

    @property
    def speedups(self) -> dict[str, float]:
        """Player -> time of the script as found / at the end, the fastest first."""
        order = sorted(self.games, key=self.final_s.__getitem__)
        return {name: self.found_s / self.final_s[name] for name in order}

    _HEAD = ("player", "its changes, in order", "the script at the end", "times as fast")

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                name,
                ", ".join(done.name for done in self.games[name].rounds) or "none",
                duration(self.final_s[name]),
                figures(speedup),
            )
            for name, speedup in self.speedups.items()
        ]

    def __repr__(self) -> str:
        return text_table(self._HEAD, self._rows(), names=2)

    def _repr_html_(self) -> str:
        return html_table(self._HEAD, self._rows(), names=2)
