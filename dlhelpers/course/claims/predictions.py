"""What did the learner expect before measuring, how sure were they, and how often were they right?

Under the card of a claim its reader predicts each condition with one tap, which says how sure they
are as well, and for some claims a size. Predictions belong to one kernel session: they are kept in
this module's registry until the claim is judged, which writes them with their time to the ledger
and closes the questions, since the evidence is on the screen from then on. A claim that is judged
before anybody predicted (*Run All*) is noted as not asked; it is asked anew in the next session.
"""

from __future__ import annotations

import html
import math
import random
from datetime import UTC, datetime
from typing import Any

from dlhelpers.course.claims.catalog import find
from dlhelpers.course.claims.claim import Claim
from dlhelpers.course.claims.said import SURE, Said, label_of
from dlhelpers.course.notebook import in_ipython, show
from dlhelpers.drawing.contrast import text_on

__all__ = ["answer", "ask", "close", "given", "guess"]

_VIEW = "application/vnd.jupyter.widget-view+json"
_said: dict[str, dict[tuple[str, bool], Said]] = {}  # claim id -> (condition, is a size) -> said
_closed: set[str] = set()  # claims judged in this session
_TOO_LATE = "the verdict is on the screen: restart the kernel to predict anew"
_SEED = 182  # with it no rule that looks at the order alone is often right
_CHOSEN = "#0072b2"  # ground of the button that was tapped
_LOG_RANGE = (-1.0, 3.0)  # of the slider for sizes: 0.1 to 1000 times


def answer(id: str, condition: str, says: str, sure: int = 2) -> None:
    """Predict one condition of a claim without a button.

    Args:
        id: the claim's.
        condition: one of those that it asks for.
        says: ``holds`` or ``fails``.
        sure: 1 (a guess), 2 (likely) or 3 (sure).

    Raises:
        ValueError: no such claim, condition or prediction; or another one after the verdict.
    """
    claim = find(id)
    _need_asked(claim, condition, claim.asks)
    if says not in ("holds", "fails"):
        raise ValueError(f"a condition of {id} holds or fails, got {says!r}")
    if type(sure) is not int or sure not in SURE:
        raise ValueError(f"sure must be 1 (a guess), 2 (likely) or 3 (sure), got {sure!r}")
    _note(claim, condition, says, sure)


def guess(id: str, condition: str, times: float) -> None:
    """Predict the size of an effect without a slider.

    Args:
        id: the claim's.
        condition: the one whose size it asks for.
        times: the metric's size, a positive number such as 1.4.

    Raises:
        ValueError: no such claim or condition, no positive number; or another one after the
            verdict.
    """
    claim = find(id)
    _need_asked(claim, condition, (claim.sized,) if claim.sized else ())
    if isinstance(times, bool) or not isinstance(times, (int, float)) or not 0 < times < math.inf:
        raise ValueError(f"the size of {id} must be a positive number, got {times!r}")
    _note(claim, condition, float(times), None)


def given(id: str) -> tuple[Said, ...]:
    """Return the predictions of this session for a claim."""
    return tuple(_said.get(id, {}).values())


def close(id: str) -> None:
    """Take no other predictions for a claim in this session: it was judged."""
    _closed.add(id)


def ask(claim: Claim) -> None:
    """Show the questions of a claim: a row of buttons a condition, and a slider for the size.

    The size is noted when the slider is moved, or by the button beside it where it is, at 1 too.

    Predictions can be changed until the claim is judged; running the cell again shows them.
    Without ipywidgets, and where no kernel runs, the questions are text.
    """
    if not claim.asks and not claim.sized:
        return
    bundle: dict[str, Any] = {"text/plain": _question(claim)}
    if in_ipython() and (box := _widget(claim)) is not None:
        bundle[_VIEW] = box._repr_mimebundle_()[_VIEW]
    show(bundle)


def shuffled(claim: Claim) -> list[str]:
    """Return the conditions that are asked, in the order of showing: the same in every run."""
    names = list(claim.asks)
    random.Random(f"{_SEED} {claim.id}").shuffle(names)
    return names


def _need_asked(claim: Claim, condition: str, asked: tuple[str, ...]) -> None:
    if condition not in asked:
        known = f"asked are {list(asked)}" if asked else "it asks for none"
        raise ValueError(f"{claim.id} does not ask for {condition!r}: {known}")


def _note(claim: Claim, condition: str, says: str | float, sure: int | None) -> None:
    own, key = _said.setdefault(claim.id, {}), (condition, sure is None)
    if claim.id in _closed:
        if key in own and (own[key].says, own[key].sure) == (says, sure):
            return  # the same cell again
        raise ValueError(
            f"the verdict of {claim.id} is on the screen already, so {says!r} is no prediction "
            "any more: restart the kernel to predict anew"
        )
    own[key] = Said(condition, says, sure, datetime.now(UTC).isoformat(timespec="seconds"))


def _question(claim: Claim) -> str:
    lines = []
    if claim.asks:
        labels = " or ".join(label_of(claim, says) for says in ("holds", "fails"))
        lines = [f"Predict before you run on: {labels}?", *(f"  - {n}" for n in shuffled(claim))]
    if claim.sized:
        lines.append(_size_question(claim))
    return "\n".join(lines)


def _size_question(claim: Claim) -> str:
    return f"How large will it be? {claim.sized}: {claim.metric}"


def _widget(claim: Claim) -> Any | None:
    """Return the questions as widgets; None without ipywidgets."""
    try:
        import ipywidgets
    except ImportError:
        return None
    rows: list[Any] = []
    if claim.asks:
        rows.append(ipywidgets.HTML("<b>Predict before you run on</b>: one tap a line."))
        rows += [_row(ipywidgets, claim, name) for name in shuffled(claim)]
    if claim.sized:
        rows.append(_slider(ipywidgets, claim))
    return ipywidgets.VBox(rows)


def _row(widgets: Any, claim: Claim, condition: str) -> Any:
    """Return one condition: surely fails ... a guess | a guess ... surely holds."""
    note = widgets.HTML()
    scale = [("fails", 3), ("fails", 2), ("fails", 1), ("holds", 1), ("holds", 2), ("holds", 3)]
    buttons = {}
    for says, sure in scale:
        buttons[says, sure] = widgets.Button(
            description=SURE[sure],
            tooltip=f"{condition}: {label_of(claim, says)} ({SURE[sure]})",
            layout={"width": "4.6em", "margin": "1px"},
        )

    def refresh(refused: str = "") -> None:
        said = _said.get(claim.id, {}).get((condition, False))
        for key, button in buttons.items():
            chosen = said is not None and key == (said.says, said.sure)
            button.style.button_color = _CHOSEN if chosen else None
            button.style.text_color = text_on(_CHOSEN) if chosen else None
        note.value = html.escape(refused or (f"noted: {said.text(claim)}" if said else ""))

    def tap(says: str, sure: int) -> None:
        if claim.id in _closed:
            refresh(_TOO_LATE)
        else:
            answer(claim.id, condition, says, sure)
            refresh()

    for (says, sure), button in buttons.items():
        button.on_click(lambda _, says=says, sure=sure: tap(says, sure))
    refresh()
    fails, holds = (html.escape(label_of(claim, says)) for says in ("fails", "holds"))
    scale_row = [
        widgets.HTML(f"<small>{fails}</small>"),
        *buttons.values(),
        widgets.HTML(f"<small>{holds}</small>"),
        note,
    ]
    name = widgets.HTML(html.escape(condition))
    return widgets.VBox([name, widgets.HBox(scale_row, layout={"flex_flow": "row wrap"})])


def _slider(widgets: Any, claim: Claim) -> Any:
    note = widgets.HTML()
    said = _said.get(claim.id, {}).get((claim.sized, True))
    low, high = _LOG_RANGE
    slider = widgets.FloatLogSlider(
        value=said.says if said else 1.0, base=10, min=low, max=high, step=0.02,
        continuous_update=False, readout_format=".3g",
    )  # fmt: skip
    button = widgets.Button(
        description="note it",
        tooltip=f"{claim.sized}: note the size where the slider is",
        layout={"width": "5em"},
    )
    note.value = html.escape(f"noted: {said.text(claim)}" if said else "")

    def take(_: Any) -> None:
        if claim.id in _closed:
            note.value = _TOO_LATE
        else:
            guess(claim.id, claim.sized, slider.value)
            note.value = html.escape(f"noted: {_said[claim.id][claim.sized, True].text(claim)}")

    slider.observe(take, names="value")
    button.on_click(take)  # the slider is at 1 already, so a size of 1 needs no move
    question = widgets.HTML(html.escape(_size_question(claim)))
    return widgets.VBox([question, widgets.HBox([slider, button, note])])
