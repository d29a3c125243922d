"""How are claims and verdicts shown, as one line of text and as a card?

The card of a claim keeps to itself what theory says, so that the reader can predict; the card of
its verdict shows mechanism, prediction and measurement side by side, a row for each condition.
Cards of exact claims are the same on every machine; the others show intervals, control and machine.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from dlhelpers.course.claims import predictions
from dlhelpers.course.claims.catalog import find, tip_of
from dlhelpers.course.claims.intervals import Scale, bar_colour, interval, marks
from dlhelpers.course.claims.sentences import asked, bound_text, effect_text, headline
from dlhelpers.course.notebook import show
from dlhelpers.drawing.panel import Panel

if TYPE_CHECKING:
    from dlhelpers.course.claims.claim import Claim, Condition
    from dlhelpers.course.claims.conditions import Judged
    from dlhelpers.course.claims.judging import Verdict

__all__ = [
    "THEORIES",
    "card",
    "claim_html",
    "claim_text",
    "verdict_html",
    "verdict_text",
    "word_of",
]

THEORIES = {"wins": "must hold", "cannot": "cannot hold", "open": "leaves it open"}
_AGREEMENTS = {"agrees": "as it says", "against": "<b>AGAINST IT</b>", "open": "", None: ""}
_REMEDY = "Give a larger budget_s, or stop other programs, and run it again."
_LEFT = "text-align:left;padding:0.15em 0.8em 0.15em 0"


def card(id: str) -> Claim:
    """Show a claim (tip, source, metric, threshold, conditions) and return it.

    Outside IPython nothing is shown; ``print(claim)`` gives the same as text.

    Raises:
        ValueError: there is no such claim; the message names the nearest ones.
    """
    claim = find(id)
    show({"text/plain": claim_text(claim), "text/html": claim_html(claim)})
    predictions.ask(claim)
    return claim


def claim_text(claim: Claim) -> str:
    """Return the card of a claim as text, without what theory says."""
    facts = _facts(claim)
    width = max(map(len, facts))
    lines = [f"CLAIM {claim.id}", *(f"  {name:<{width}}  {what}" for name, what in facts.items())]
    for condition in _listed(claim):
        lines.append(f"  - {_condition(claim, condition)}")
    return "\n".join(lines)


def claim_html(claim: Claim) -> str:
    """Return the card of a claim as HTML, without what theory says."""
    facts = "".join(
        f"<tr><td style='{_LEFT};opacity:0.7;vertical-align:top'>{name}</td>"
        f"<td style='{_LEFT}'>{escape(what)}</td></tr>"
        for name, what in _facts(claim).items()
        if name != "claim"
    )
    conditions = "".join(
        f"<li>{escape(_condition(claim, condition))}</li>" for condition in _listed(claim)
    )
    return _frame(
        "var(--jp-border-color1, #888)",
        f"<div style='opacity:0.7'>Claim <code>{escape(claim.id)}</code></div>"
        f"<div style='font-size:1.15em;margin:0.2em 0'>{escape(claim.says)}</div>"
        f"<table style='border:none;margin:0'>{facts}</table>"
        f"<ul style='margin:0.3em 0 0 0'>{conditions}</ul>",
    )


def verdict_text(verdict: Verdict) -> str:
    """Return a verdict in one line: what stands out, the sentence, the control, the answer."""
    parts = [headline(verdict.tally), verdict.sentence]
    if verdict.tally.standing == "not-measured":
        parts = parts[1:]
    elif verdict.control:
        parts.append(f"control {_control_text(verdict)}")
    if _wants_time(verdict):
        parts.append(_REMEDY)
    parts += [f"you said of {said.condition}: {said.text(verdict.claim)}" for said in verdict.said]
    return " · ".join(" ".join(part.split()) for part in parts)


def verdict_html(verdict: Verdict) -> str:
    """Return a verdict as a card: for each condition mechanism, prediction and measurement."""
    claim, exact = verdict.claim, verdict.claim.kind == "exact"
    scale = Scale.over(verdict.conditions, log=claim.kind == "time")
    declared = {condition.name: condition for condition in claim.conditions}
    predicted = bool(verdict.said or verdict.earlier)
    heads = ["", "mechanism", *["you said"] * predicted, "measured"]
    axis = [] if exact else [marks((c.threshold for c in verdict.conditions), scale)]
    rows = _row(*(f"<small>{head}</small>" for head in heads), *axis, "")
    for c in verdict.conditions:
        cells: list[str | Panel] = [
            f"<b>{escape(c.name)}</b>",
            escape(_mechanism(declared[c.name])),
        ]
        if predicted:
            cells.append(_said_html(verdict, c.name))
        cells.append(_unbroken(effect_text(claim, c), exact))
        if not exact:
            cells.append(interval(c.effect, c.low, c.high, c.threshold, scale, c.verdict))
        rows += _row(*cells, _settled_html(claim, c))
    if (control := verdict.control) is not None:
        picture = interval(control.effect, control.low, control.high, None, scale)
        empty = [""] * (1 + predicted)
        rows += _row("control", *empty, _unbroken(_control_text(verdict), exact), picture, "")
    small = f"{_needed(claim)}{f' · {verdict.machine}' if verdict.machine else ''}"
    remedy = f"<div>{_REMEDY}</div>" if _wants_time(verdict) else ""
    head = f"<div><b>{escape(headline(verdict.tally))}</b></div>"
    if verdict.tally.standing == "not-measured":  # which the sentence says
        head = ""
    return _frame(
        bar_colour(verdict.tally),
        f"<div>{escape(claim.says)}</div>{head}<div>{escape(verdict.sentence)}</div>"
        f"<table style='border:none;margin:0.3em 0'>{rows}</table>{remedy}"
        f"<div style='opacity:0.7'><small>{escape(small)}</small></div>" + _answer_html(verdict),
    )


def word_of(claim: Claim, verdict: str) -> str:
    """Return what is said of the tip in a condition, such as ``refuted``."""
    return claim.words.get(verdict, verdict.replace("-", " "))


def _facts(claim: Claim) -> dict[str, str]:
    tip = tip_of(claim)
    facts = {
        "claim": claim.says,
        "tip": f"{tip.says} ({tip.said_by})",
        "source": claim.source,
        "holds if": f"{asked(claim)} ({claim.kind})",
    }
    if (axis := claim.axis) is not None:
        ends = f"{axis.points[0]:,g} to {axis.points[-1]:,g} {axis.unit} {axis.where}".strip()
        facts["and also"] = f"{len(axis.points)} points from {ends}: where does it begin or end?"
    return facts | ({"needs": claim.needs} if claim.needs else {})


def _listed(claim: Claim) -> list[Condition]:
    """Return conditions as they are asked, then the others: the declared order tells too much."""
    asked = {name: place for place, name in enumerate(predictions.shuffled(claim))}
    return sorted(claim.conditions, key=lambda condition: asked.get(condition.name, len(asked)))


def _condition(claim: Claim, condition: Condition) -> str:
    own = condition.threshold != claim.threshold
    return condition.name + (f" ({bound_text(claim, condition.threshold)})" if own else "")


def _needed(claim: Claim) -> str:
    since = max(condition.since for condition in claim.conditions)
    return f"{asked(claim)}, theory and threshold as of {since}"


def _mechanism(condition: Condition) -> str:
    return f"{THEORIES[condition.theory]}: {condition.why}"


def _settled_html(claim: Claim, c: Judged) -> str:
    told = escape(f"{word_of(claim, c.verdict)}{f': {c.reason}' if c.reason else ''}")
    mark = _AGREEMENTS[c.agreement]
    return f"<b>{told}</b>" + (f"<br><small>{mark}</small>" if mark else "")


def _unbroken(text: str, exact: bool) -> str:
    """Return a number with its interval in one line; words of exact claims may break."""
    return escape(text) if exact else f"<span style='white-space:nowrap'>{escape(text)}</span>"


def _wants_time(verdict: Verdict) -> bool:
    from dlhelpers.course.claims.judging import CHANGING, TOO_FEW

    return any(c.reason in (CHANGING, TOO_FEW) for c in verdict.conditions)


def _control_text(verdict: Verdict) -> str:
    told = verdict.control.told(c.threshold for c in verdict.conditions)
    return ", ".join(filter(None, told))


def _said_html(verdict: Verdict, condition: str) -> str:
    """Return what was predicted of one condition, now and before."""
    now = [said.text(verdict.claim) for said in verdict.said if said.condition == condition]
    before = [
        f"{(said.when or '')[:10]}: {said.text(verdict.claim)}"
        for said in verdict.earlier
        if said.condition == condition
    ]
    lines = [*map(escape, now), *(f"<small>{escape(line)}</small>" for line in before)]
    return "<br>".join(lines)


def _answer_html(verdict: Verdict) -> str:
    """Say how right the predictions were; that there were none, where the claim asks for some."""
    if not verdict.said:
        asks = verdict.claim.asks or verdict.claim.sized
        now = "Not asked this time." if verdict.earlier else "Not asked: nobody predicted before."
        return f"<div><small>{now}</small></div>" if asks else ""
    found = {c.name: c for c in verdict.conditions}
    taps = [said for said in verdict.said if not said.is_size]
    settled = [s for s in taps if found[s.condition].verdict in ("holds", "fails")]
    right = sum(s.says == found[s.condition].verdict for s in settled)
    told = [f"Your predictions: {right} of {len(settled)} right."] * bool(settled)
    if len(settled) < len(taps):
        told.append(f"{len(taps) - len(settled)} not settled on this machine.")
    for said in verdict.said:
        if (off := said.off_by(found[said.condition].effect)) is not None:
            told.append(f"You said {said.text(verdict.claim)}: off by {off:.2g} times.")
    return f"<div>{escape(' '.join(told))}</div>"


def _frame(colour: str, inner: str) -> str:
    return (
        f"<div style='border-left:4px solid {colour};padding:0.3em 0.8em;margin:0.3em 0;"
        f"background:var(--jp-layout-color2, transparent);color:var(--jp-ui-font-color1, "
        f"currentColor)'>{inner}</div>"
    )


def _row(*cells: str | Panel) -> str:
    return f"<tr>{''.join(map(_cell, cells))}</tr>"


def _cell(cell: str | Panel) -> str:
    if isinstance(cell, str):
        return f"<td style='{_LEFT}'>{cell}</td>"
    # where styles are stripped, the width alone keeps a narrow table from shrinking the picture
    return f"<td style='{_LEFT}' width='{cell.width}'>{cell._repr_html_()}</td>"
