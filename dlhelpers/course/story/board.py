"""How does a reader play? A menu, a slider, a profile, and the rounds so far."""

from __future__ import annotations

from typing import Any

from dlhelpers.course.story.game import Game
from dlhelpers.course.story.played import Played

__all__ = ["Board"]

_PARTS = {"training": "train", "validation": "valid", "scoring": "score"}


class Board:
    """One reader's game, with ipywidgets; nothing is measured before a tap.

    Args:
        game: with its script; what others have measured in it is used again.
        others: games of others, by name, for the score at the end.

    Raises:
        ImportError: ipywidgets is not installed.
    """

    def __init__(self, game: Game, **others: Played) -> None:
        import ipywidgets as widgets

        self.game, self.others = game, others
        self.part = widgets.Dropdown(options=list(_PARTS), description="profile of")
        self.look = widgets.Button(description="Look")
        self.next = widgets.Dropdown(description="change")
        self.expected = widgets.FloatSlider(
            1.0, min=0.5, max=4.0, step=0.05, description="gain", readout_format=".2f"
        )
        self.go = widgets.Button(description="Measure")
        self.again = widgets.Button(description="Start anew")
        self.profile, self.rounds, self.note = (widgets.HTML() for _ in range(3))
        self.look.on_click(lambda _: self._busy(self._look))
        self.go.on_click(lambda _: self._busy(self._move))
        self.again.on_click(lambda _: self._begin())
        self.view = widgets.VBox([
            widgets.HTML(
                "Look at a profile, pick the next change, say how many times as fast the "
                "<i>whole</i> script becomes, and measure."
            ),
            widgets.HBox([self.part, self.look]),
            self.profile,
            widgets.HBox([self.next, self.expected, self.go, self.again]),
            self.note,
            self.rounds,
        ])  # fmt: skip
        self._begin()

    @property
    def played(self) -> Played | None:
        """The rounds so far; None before the first."""
        return self._played

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.view)

    def _begin(self) -> None:
        self._position, self._played = self.game.start(), None
        self.profile.value = self.rounds.value = ""
        self._show()

    def _show(self) -> None:
        done = len(self._played.rounds) if self._played else 0
        left = self.game.rounds - done
        self.next.options = self._position.menu
        self.go.disabled = left < 1
        self.note.value = f"{left} of {self.game.rounds} changes left."
        if self._played is None:
            return
        self.rounds.value = self._played._repr_html_()
        if left < 1:
            self.note.value = "That was your last change. The score:"
            self.rounds.value += self.game.score(you=self._played, **self.others)._repr_html_()

    def _look(self) -> None:
        self.profile.value = self._position.look(_PARTS[self.part.value])._repr_html_()

    def _move(self) -> None:
        before = self._played or Played(self._position.run, ())
        self._position, done = self.game.move(self._position, self.next.value, self.expected.value)
        self._played = Played(before.found, (*before.rounds, done))
        self.profile.value = ""
        self._show()

    def _busy(self, work: Any) -> None:
        """Do the work, during which nothing else can be tapped."""
        buttons = (self.look, self.go, self.again)
        said, self.note.value = self.note.value, "Measuring, some seconds."
        for button in buttons:
            button.disabled = True
        try:
            work()
        finally:
            if self.note.value == "Measuring, some seconds.":
                self.note.value = said
            self.look.disabled = self.again.disabled = False
            self.go.disabled = len(self._played.rounds if self._played else ()) >= self.game.rounds
