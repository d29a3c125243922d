"""Which change is next, and what will it bring? A game with the whole script, in a few rounds.

In each round a player sees where the time goes and what ``diagnose`` says, picks a change and says
the gain to expect; the part that it changes is measured before and after, in pairs, and the whole
script runs once. What was measured is kept, so that players who take the same way do not measure
it twice, and are compared by the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dlhelpers import measure
from dlhelpers.course.story.played import Played, Round, Score
from dlhelpers.course.story.runs import ScriptRun
from dlhelpers.course.story.script import Script, fair_steps
from dlhelpers.course.story.settings import MENU, Part, Settings
from dlhelpers.findings import Findings

__all__ = ["Game", "Player", "Position"]

_FIELDS: dict[Part, tuple[str, ...]] = {
    "train": ("softmax", "database", "stack", "dali", "depthwise"),
    "valid": ("softmax", "no_grad", "depthwise"),
    "score": ("softmax", "depthwise", "score_batch", "fold", "int8", "draft"),
}  # on which the time of a part's step depends


@dataclass(frozen=True)
class Position:
    """What a player sees before a round.

    Attributes:
        game: asks its profiler.
        settings: of the script by now.
        taken: the changes so far, by name.
    """

    game: Game
    settings: Settings
    taken: tuple[str, ...] = ()

    @property
    def menu(self) -> list[str]:
        """The changes that are left."""
        return [name for name in MENU if name not in self.taken]

    @property
    def run(self) -> ScriptRun:
        """The whole script as it is by now, run once."""
        return self.game.run(self.settings)

    @property
    def parts(self) -> list[Part]:
        """The parts, the one that takes longest first."""
        took = self.seconds()
        return sorted(took, key=lambda part: -took[part])

    def seconds(self) -> dict[Part, float]:
        """Return how long each part takes."""
        run = self.run
        return {"train": run.train_s, "valid": run.validate_s, "score": run.score_s}

    def mistakes(self) -> Findings:
        """Return what ``pairing.check`` finds in outputs, loss and targets of a batch."""
        return self.game.script.mistakes(self.settings)

    def look(self, part: Part) -> Findings:
        """Return what ``diagnose`` says of a part."""
        return self.game.look(part, self.settings)

    def then(self, name: str) -> Position:
        """Return the position after a change.

        Raises:
            ValueError: the change is not on the menu, or was made already.
        """
        if name not in self.menu:
            left = ", ".join(self.menu)
            raise ValueError(f"{name!r} is not on the menu; left are {left}")
        return Position(self.game, MENU[name].done(self.settings), (*self.taken, name))


Player = Callable[[Position], tuple[str, float] | None]


def _compare(before: Callable[[], Any], after: Callable[[], Any], **options: Any) -> Any:
    return measure.compare(before, after, **{"overtime": 2.0} | options)


@dataclass
class Game:
    """The game with one script.

    Attributes:
        script: over photographs.
        rounds: changes that a player may make.
        compare: measures a part before and after.
    """

    script: Script
    rounds: int = 5
    compare: Callable[..., measure.Comparison] = _compare
    _runs: dict[Settings, ScriptRun] = field(default_factory=dict, repr=False)
    _looks: dict[Any, Findings] = field(default_factory=dict, repr=False)
    _pairs: dict[Any, measure.Comparison] = field(default_factory=dict, repr=False)

    def start(self) -> Position:
        """Return the position before the first round: the script as found."""
        return Position(self, Settings())

    def play(self, player: Player, rounds: int | None = None) -> Played:
        """Let a player play, until it has made its changes or passes.

        Args:
            player: position -> (name of the change, gain to expect of the whole script), or None
                to pass.
            rounds: other than the game's own.

        Raises:
            ValueError: a player returns something else, a change is not on the menu, or the
                expected gain is not above 0.
        """
        from dlhelpers import progress

        position, played = self.start(), Played(self.run(Settings()), ())
        count = min(self.rounds if rounds is None else rounds, len(MENU))
        with progress.bar(progress=None, total=count, desc="the game", unit="round") as shown:
            for _ in range(count):
                if (said := player(position)) is None:
                    break
                if not isinstance(said, tuple) or len(said) != 2:
                    raise ValueError(f"a player returns (name, gain) or None, got {said!r}")
                position, done = self.move(position, *said)
                played = Played(played.found, (*played.rounds, done))
                shown.update(1)
        return played

    def move(self, position: Position, name: str, expected: float) -> tuple[Position, Round]:
        """Make one change, and measure it.

        Raises:
            ValueError: it is not on the menu, or the expected gain is not above 0.
        """
        if not isinstance(expected, (int, float)) or not 0 < expected < math.inf:
            raise ValueError(f"the gain to expect must be above 0, such as 1.5, got {expected!r}")
        then, part = position.then(name), MENU[name].part
        key = _key(part, position.settings), _key(part, then.settings)
        if key not in self._pairs:
            steps, setup = fair_steps(self.script, part, position.settings, then.settings)
            budget_s = 1.5 if setup is None else 4.0
            self._pairs[key] = self.compare(*steps, budget_s=budget_s, setup=setup)
        finding = next(iter(self._looks.get(key[0], ())), None)
        advice = (finding.name, getattr(finding, "speedup", 1.0)) if finding else None
        return then, Round(name, expected, advice, self._pairs[key], self.run(then.settings))

    def score(self, turns: int = 3, **games: Played) -> Score:
        """Run the script as found and as each player left it, in turn; compare the fastest runs.

        Args:
            turns: runs of each.
            games: player -> what was played; an underscore in a name is shown as a blank.
        """
        if turns < 1:
            raise ValueError(f"turns must be 1 or more, got {turns}")
        named = {name.replace("_", " "): game for name, game in games.items()}
        took = {Settings(): math.inf} | {game.settings: math.inf for game in named.values()}
        for _ in range(turns):
            for settings in took:
                run = self.script.run(settings, anew=True)
                took[settings] = min(took[settings], run.total_s)
        final = {name: took[game.settings] for name, game in named.items()}
        return Score(named, final, took[Settings()])

    def run(self, settings: Settings) -> ScriptRun:
        """Return the whole script's run with these settings, the first time by running it."""
        if settings not in self._runs:
            self._runs[settings] = self.script.run(settings)
        return self._runs[settings]

    def look(self, part: Part, settings: Settings) -> Findings:
        """Return what ``diagnose`` says of a part with these settings."""
        from dlhelpers.profiling import diagnose

        key = _key(part, settings)
        if key not in self._looks:
            self._looks[key] = diagnose(self.script.step(part, settings), steps=3)
        return self._looks[key]


def _key(part: Part, settings: Settings) -> tuple[Any, ...]:
    return (part, *(getattr(settings, name) for name in _FIELDS[part]))
