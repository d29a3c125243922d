"""What did the learner expect before measuring, and how often were they right?

A question asks in how many conditions the claim holds: ``all``, ``none`` or ``some``.

Answers belong to one kernel session: they are kept in this module's registry until the claim is
judged, which writes them to the ledger beside the verdict and closes the question.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dlhelpers.course.claims.catalog import find
from dlhelpers.course.claims.claim import Claim
from dlhelpers.course.claims.conditions import Judged, Tally
from dlhelpers.course.notebook import in_ipython, show

__all__ = ["Score", "answer", "close", "given", "predict", "score", "score_of"]

_VIEW = "application/vnd.jupyter.widget-view+json"
_answers: dict[str, str] = {}  # claim id -> all, none or some, predicted in this session
_closed: set[str] = set()  # claims judged in this session


@dataclass(frozen=True)
class Score:
    """How many predictions the ledger holds, and how many were right.

    Attributes:
        right: the claim holds in all conditions, in none or in some of them, as predicted.
        given: answers to claims whose conditions were settled here.
        open: answers to claims that this machine could not settle.
        undated: older answers, of which the day is not known: kept and not scored.
    """

    right: int
    given: int
    open: int = 0
    undated: int = 0

    def __str__(self) -> str:
        one = self.undated == 1
        older = f"{self.undated} older one{'s' * (not one)} without a day {'is' if one else 'are'} "
        older = f"; {older}kept and not scored" if self.undated else ""
        if not self.given and not self.open:
            return f"no predictions yet{older}"
        noun = "prediction" if self.given == 1 else "predictions"
        text = f"{self.right} of {self.given} {noun} right"
        text += f", {self.open} more not settled on this machine" if self.open else ""
        return text + older

    def _repr_html_(self) -> str:
        share = 100 * self.right / self.given if self.given else 0
        return (
            f"<div>{html.escape(str(self))}<div role='img' aria-label='{share:.0f} % right' "
            "style='width:16em;height:0.5em;background:var(--jp-layout-color2,#8884)'>"
            f"<div style='width:{share:.0f}%;height:100%;background:currentColor'></div>"
            "</div></div>"
        )


def predict(*ids: str) -> None:
    """Show the question of each claim with buttons for the answer.

    The answer can be changed until the claim is judged; running the cell again shows the earlier
    choice. Outside IPython nothing happens; without ipywidgets the question is shown as text.

    Raises:
        ValueError: there is no such claim.
    """
    for claim in [find(id) for id in ids]:
        bundle: dict[str, Any] = {"text/plain": _question(claim)}
        if in_ipython() and (box := _widget(claim)) is not None:
            bundle[_VIEW] = box._repr_mimebundle_()[_VIEW]
        show(bundle)


def answer(id: str, choice: str) -> None:
    """Note a prediction without a button.

    Args:
        id: the claim's.
        choice: it holds in ``all`` conditions, in ``none`` or in ``some`` of them, as far as the
            claim offers it.

    Raises:
        ValueError: no such claim or choice; or another choice after the claim was judged.
    """
    claim = find(id)
    if choice not in claim.answers:
        raise ValueError(f"{id} can be answered by {', '.join(claim.answers)}, got {choice!r}")
    if id in _closed and _answers.get(id) != choice:
        raise ValueError(
            f"{id} is judged already in this session, so {choice!r} is no prediction any more: "
            "restart the kernel to answer anew"
        )
    _answers[id] = choice


def given(id: str) -> str | None:
    """Return the answer of this session, None without one."""
    return _answers.get(id)


def close(id: str) -> None:
    """Take no other answer to this claim in this session: it was judged."""
    _closed.add(id)


def score() -> Score:
    """Return how many of the ledger's predictions were right; shows itself."""
    from dlhelpers.course import ledger

    try:
        rows = ledger.read()["rows"]
    except FileNotFoundError:
        rows = []
    except (OSError, ledger.LedgerError) as error:
        warnings.warn(f"no score: {error}", stacklevel=2)
        rows = []
    return score_of(rows)


def score_of(rows: Iterable[Mapping[str, Any]]) -> Score:
    """Return the score of a ledger's rows; an answer without its time is an old one, left out."""
    rows = [row for row in rows if row["answer"] is not None]
    pairs = [
        (row["answer"], Tally.of(map(Judged.from_row, row["conditions"])).answer)
        for row in rows
        if row["answered"] is not None
    ]
    settled = [(said, found) for said, found in pairs if found is not None]
    right = sum(said == found for said, found in settled)
    return Score(right, len(settled), len(pairs) - len(settled), len(rows) - len(pairs))


def _question(claim: Claim) -> str:
    labels = " / ".join(claim.answers.values())
    return f"Predict: {claim.question} ({labels})"


def _widget(claim: Claim) -> Any | None:
    """Return question, buttons and a line that says what was noted; None without ipywidgets."""
    try:
        import ipywidgets
    except ImportError:
        return None
    note = ipywidgets.HTML()
    buttons = {
        choice: ipywidgets.Button(description=label, layout={"width": "auto"})
        for choice, label in claim.answers.items()
    }

    def refresh() -> None:
        chosen = _answers.get(claim.id)
        for choice, button in buttons.items():
            button.button_style = "info" if choice == chosen else ""
        note.value = html.escape(_note(claim, chosen))

    def take(choice: str) -> None:
        if claim.id not in _closed:
            answer(claim.id, choice)
        refresh()

    for choice, button in buttons.items():
        button.on_click(lambda _, choice=choice: take(choice))
    refresh()
    question = ipywidgets.HTML(f"<b>{html.escape(claim.question)}</b>")
    return ipywidgets.VBox([question, ipywidgets.HBox(list(buttons.values())), note])


def _note(claim: Claim, chosen: str | None) -> str:
    if claim.id in _closed:
        kept = f"noted: {claim.answers[chosen]}; " if chosen else ""
        return f"{kept}the claim is judged, restart the kernel to answer anew"
    return f"noted: {claim.answers[chosen]}" if chosen else ""
