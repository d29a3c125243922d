"""How are claims and verdicts shown, as one line of text and as a card?

Cards of exact claims show value and bound alone, so that they are the same on every machine: a
float is shown with four digits, a rounding error (below a bound under 0.01) only as within it or
beyond it. The other kinds show effect, interval, control and machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from dlhelpers.course.claims.catalog import find, tip_of
from dlhelpers.course.notebook import show

if TYPE_CHECKING:
    from dlhelpers.course.claims.claim import Claim, Threshold
    from dlhelpers.course.claims.judging import Control, Judged, Verdict

__all__ = [
    "THEORIES",
    "Scale",
    "card",
    "claim_html",
    "claim_text",
    "colour_of",
    "effect_text",
    "interval_svg",
    "verdict_html",
    "verdict_text",
]

THEORIES = {"wins": "theory: holds", "cannot": "theory: cannot hold", "open": "theory: open"}
_LEFT = "text-align:left;padding:0.15em 0.8em 0.15em 0"
_SMALL_BOUND = 1e-2
_WIDTH, _HEIGHT, _MARGIN = 220, 22, 6


def card(id: str) -> Claim:
    """Show a claim (tip, source, metric, threshold, conditions) and return it.

    Outside IPython nothing is shown; ``print(claim)`` gives the same as text.

    Raises:
        ValueError: there is no such claim; the message names the nearest ones.
    """
    claim = find(id)
    show({"text/plain": claim_text(claim), "text/html": claim_html(claim)})
    return claim


def claim_text(claim: Claim) -> str:
    """Return the card of a claim as text."""
    facts = _facts(claim)
    width = max(map(len, facts))
    lines = [f"CLAIM {claim.id}", *(f"  {name:<{width}}  {what}" for name, what in facts.items())]
    for condition in claim.conditions:
        lines.append(f"  - {_condition(claim, condition)}: {condition.why}")
    return "\n".join(lines)


def claim_html(claim: Claim) -> str:
    """Return the card of a claim as HTML."""
    facts = "".join(
        f"<tr><td style='{_LEFT};opacity:0.7;vertical-align:top'>{name}</td>"
        f"<td style='{_LEFT}'>{escape(what)}</td></tr>"
        for name, what in _facts(claim).items()
        if name != "claim"
    )
    conditions = "".join(
        f"<li><b>{escape(_condition(claim, c))}</b>: {escape(c.why)}</li>" for c in claim.conditions
    )
    return _frame(
        "var(--jp-border-color1, #888)",
        f"<div style='opacity:0.7'>Claim <code>{escape(claim.id)}</code></div>"
        f"<div style='font-size:1.15em;margin:0.2em 0'>{escape(claim.says)}</div>"
        f"<table style='border:none;margin:0'>{facts}</table>"
        f"<ul style='margin:0.3em 0 0 0'>{conditions}</ul>",
    )


def verdict_text(verdict: Verdict) -> str:
    """Return a verdict in one line."""
    parts = [_label(verdict.verdict)]
    if verdict.verdict == "not-measured":
        parts.append(verdict.reason)
    else:
        names = _short_names([c.name for c in verdict.conditions])
        for name, condition in zip(names, verdict.conditions, strict=True):
            parts.append(f"{name} {_judged_text(verdict.claim, condition)} {_settled(condition)}")
        if verdict.control:
            parts.append(f"control {_control_text(verdict.control)}")
    if verdict.answer:
        parts.append(f"you said: {verdict.claim.answers[verdict.answer]}")
    return " · ".join(" ".join(part.split()) for part in parts)


def verdict_html(verdict: Verdict) -> str:
    """Return a verdict as a card: conditions with their intervals, control, machine, answer."""
    claim, exact = verdict.claim, verdict.claim.kind == "exact"
    scale = Scale.over(verdict.conditions, log=claim.kind == "time")
    rows = ""
    for c in verdict.conditions:
        picture = interval_svg(c.effect, c.low, c.high, c.threshold, scale, c.verdict)
        shown = (escape(c.name), escape(_judged_text(claim, c)))
        rows += _row(*shown, *([] if exact else [picture]), f"<b>{escape(_settled(c))}</b>")
    if (control := verdict.control) is not None:
        picture = interval_svg(control.effect, control.low, control.high, None, scale)
        rows += _row("control", escape(_control_text(control)), picture, "")
    reason = f" {escape(verdict.reason)}" if verdict.reason else ""
    small = "" if exact else f"{claim.metric} {claim.threshold} · {verdict.machine}"
    return _frame(
        colour_of(verdict.verdict),
        f"<div><b>{_label(verdict.verdict)}</b>{reason}</div><div>{escape(claim.says)}</div>"
        f"<table style='border:none;margin:0.3em 0'>{rows}</table>"
        + (f"<div style='opacity:0.7'><small>{escape(small)}</small></div>" if small else "")
        + _answer_html(verdict),
    )


def effect_text(
    kind: str,
    threshold: Threshold,
    effect: float | bool | None,
    low: float | None,
    high: float | None,
    unit: str = "",
) -> str:
    """Return a number with its interval and unit, or, of an exact claim, value and bound."""
    if effect is None:
        return "not finite"
    if kind == "exact":
        if isinstance(effect, float) and _is_small(threshold) and not math.isnan(effect):
            return f"{'within' if threshold.met_by(effect) else 'beyond'} {threshold.bound:g}"
        value = f"{effect + 0.0:.4g}" if isinstance(effect, float) else str(effect)
        return f"{value}{' ' if unit else ''}{unit} ({threshold})"
    text = _number(kind, effect)
    if high is None or low is None or not math.isfinite(high):
        text += " [no interval]"
    elif low != high:
        text += f" [{_number(kind, low)}, {_number(kind, high)}]"
    return f"{text} {unit}" if unit else text


@dataclass(frozen=True)
class Scale:
    """The axis that the intervals of one card share, in the units of the metric."""

    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, conditions: Iterable[Judged], *, log: bool) -> Scale:
        """Return the axis that shows every finite end and every threshold with some room."""
        values: list[float] = [1.0] if log else []
        for c in conditions:
            values += [c.effect, c.low, c.high, c.threshold.bound]
        values = [float(v) for v in values if v is not None and math.isfinite(v)]
        if log:  # an end farther than that runs to the end of the axis
            values = [v for v in values if 1e-6 < v < 1e6]
        low, high = min(values, default=0.0), max(values, default=1.0)
        if log:
            room = max((high / low) ** 0.08, 1.02)
            return cls(low / room, high * room, log)
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - room, high + room, log)

    def x(self, value: float) -> float:
        """Return the place of a value in pixels; what lies beyond the axis is put at its end."""
        if self.log:
            low, high, value = math.log(self.low), math.log(self.high), math.log(max(value, 1e-300))
        else:
            low, high = self.low, self.high
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(_MARGIN + share * (_WIDTH - 2 * _MARGIN), 1)


def interval_svg(
    effect: float | None,
    low: float | None,
    high: float | None,
    threshold: Threshold | None,
    scale: Scale,
    verdict: str = "",
) -> str:
    """Return a point with its interval on a shared axis, the threshold as a dashed line.

    An end that is None or infinite runs to the end of the axis; without an effect only the
    threshold is drawn.
    """
    middle, parts, said = _HEIGHT / 2, [], []
    parts.append(_line(_MARGIN, middle, _WIDTH - _MARGIN, middle, "opacity='0.25'"))
    if scale.log:
        one = scale.x(1.0)
        parts.append(_line(one, 4, one, _HEIGHT - 4, "opacity='0.5'"))
    if threshold is not None:
        bar = scale.x(float(threshold.bound))
        parts.append(_line(bar, 0, bar, _HEIGHT, "stroke-width='1.5' stroke-dasharray='3 2'"))
        said.append(f"threshold {threshold}")
    if effect is not None and math.isfinite(effect):
        colour = colour_of(verdict)
        ends = [
            end if end is not None and math.isfinite(end) else limit
            for end, limit in ((low, scale.low), (high, scale.high))
        ]
        left, right = map(scale.x, ends)
        parts.append(
            f"<line x1='{left}' y1='{middle}' x2='{right}' y2='{middle}' stroke='{colour}' "
            f"stroke-width='5' stroke-opacity='0.6' stroke-linecap='round'/>"
            f"<circle cx='{scale.x(effect)}' cy='{middle}' r='4' fill='{colour}'/>"
        )
        said.insert(0, f"{effect:.3g}, interval {ends[0]:.3g} to {ends[1]:.3g}")
    return (
        f"<svg role='img' aria-label='{escape('; '.join(said))}' width='{_WIDTH}' "
        f"height='{_HEIGHT}' viewBox='0 0 {_WIDTH} {_HEIGHT}' "
        f"style='vertical-align:middle;color:var(--jp-ui-font-color1, currentColor)'>"
        f"{''.join(parts)}</svg>"
    )


def colour_of(verdict: str) -> str:
    """Return the colour of a verdict: as in every figure, grey where nothing was settled."""
    from dlhelpers.course import plots

    depends = "#CC79A7"  # Okabe & Ito's reddish purple: neither treatment nor failing
    return {"holds": plots.TREATMENT, "fails": plots.FAILING, "depends": depends}.get(
        verdict, plots.BASELINE
    )


def _facts(claim: Claim) -> dict[str, str]:
    tip = tip_of(claim)
    metric = f"{claim.metric} {claim.threshold}{' ' if claim.unit else ''}{claim.unit}"
    facts = {
        "claim": claim.says,
        "tip": f"{tip.says} ({tip.said_by})",
        "source": claim.source,
        "holds if": f"{metric} ({claim.kind})",
    }
    return facts | ({"needs": claim.needs} if claim.needs else {})


def _condition(claim: Claim, condition: object) -> str:
    own = f", {condition.threshold}" if condition.threshold != claim.threshold else ""
    return f"{condition.name} ({THEORIES[condition.theory]}{own})"


def _label(verdict: str) -> str:
    return verdict.replace("-", " ").upper()


def _settled(condition: Judged) -> str:
    said = condition.verdict.replace("-", " ")
    return f"{said} ({condition.reason})" if condition.reason else said


def _judged_text(claim: Claim, c: Judged) -> str:
    if c.verdict == "not-measured":
        return ""
    return effect_text(claim.kind, c.threshold, c.effect, c.low, c.high, claim.unit)


def _control_text(control: Control) -> str:
    if control.effect is None or control.low is None or control.high is None:
        return control.outcome
    ends = f"[{_number('time', control.low)}, {_number('time', control.high)}]"
    interval = ends if math.isfinite(control.high) else "[no interval]"
    off = f" {control.outcome}" if control.is_off else ""
    return f"{_number('time', control.effect)} {interval}{off}"


def _short_names(names: Sequence[str]) -> list[str]:
    """Return the names up to their first comma, where these stay distinct."""
    short = [name.partition(",")[0].strip() for name in names]
    return short if len({*short, ""}) == len(names) + 1 else list(names)


def _number(kind: str, value: float) -> str:
    return f"{value:.2f}" if kind == "time" and 0.1 <= value < 100 else f"{value:.3g}"


def _is_small(threshold: Threshold) -> bool:
    return threshold.op in ("<", "<=") and 0 <= threshold.bound < _SMALL_BOUND


def _answer_html(verdict: Verdict) -> str:
    if not verdict.answer:
        return ""
    said = f"You said: {verdict.claim.answers[verdict.answer]}."
    if verdict.verdict in ("unsettled", "not-measured"):
        told = "This machine has not settled it."
    elif verdict.answer == verdict.verdict:
        told = "That is what was found."
    else:
        told = f"What was found: {verdict.claim.answers.get(verdict.verdict, verdict.verdict)}."
    return f"<div>{escape(said)} {escape(told)}</div>"


def _frame(colour: str, inner: str) -> str:
    return (
        f"<div style='border-left:4px solid {colour};padding:0.3em 0.8em;margin:0.3em 0;"
        f"background:var(--jp-layout-color2, transparent);color:var(--jp-ui-font-color1, "
        f"currentColor)'>{inner}</div>"
    )


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td style='{_LEFT}'>{cell}</td>" for cell in cells) + "</tr>"


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='currentColor' {style}/>"
