"""What became of each claim on one machine, as one page without outside requests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from dlhelpers.course.claims import break_even
from dlhelpers.course.claims.advice import advice, main_claim
from dlhelpers.course.claims.break_even import BreakEven
from dlhelpers.course.claims.cards import THEORIES, word_of
from dlhelpers.course.claims.catalog import all_claims, all_tips
from dlhelpers.course.claims.claim import Claim, Tip
from dlhelpers.course.claims.conditions import STANDINGS, Judged, Tally
from dlhelpers.course.claims.intervals import Scale, bar_colour, interval
from dlhelpers.course.claims.judging import Control
from dlhelpers.course.claims.said import Said, score_of
from dlhelpers.course.claims.sentences import asked, effect_text, headline, sentence
from dlhelpers.course.report import picture
from dlhelpers.course.report.cells import Cell
from dlhelpers.course.report.document import breakable, cell_link, document, machine_line
from dlhelpers.course.report.headlines import CHOSEN, timed_headline
from dlhelpers.course.report.running import NotebookRun
from dlhelpers.course.report.squares import lines_of

__all__ = ["orphans", "render"]

_NOT_RUN = "not-run"
_FILTERS = {"topic": "topic", "condition": "with a condition", "kind": "kind"}
_SCRIPT = """
const selects = [...document.querySelectorAll('select[data-filter]')];
const rows = [...document.querySelectorAll('#claims > tbody > tr')];
function filter() {
  for (const row of rows)
    row.hidden = selects.some(
      s => s.value && !row.dataset[s.dataset.filter].split(' ').includes(s.value));
  const shown = rows.filter(row => !row.hidden).length;
  document.getElementById('shown').textContent = `${shown} of ${rows.length} claims shown`;
}
for (const select of selects) select.addEventListener('change', filter);
document.addEventListener('click', event => {  // a link to a row that the filter hides
  const link = event.target.closest("a[href^='#']");
  const row = link && document.getElementById(decodeURIComponent(link.hash.slice(1)));
  if (!row || !row.hidden) return;
  for (const select of selects) select.value = '';
  filter();
});
filter();
"""


def render(
    ledger: Mapping[str, Any],
    *,
    notebooks: str = "notebooks",
    failed: Sequence[NotebookRun] = (),
    cells: Mapping[str, Cell] | None = None,
    claims: Sequence[Claim] | None = None,
    tips: Sequence[Tip] | None = None,
) -> str:
    """Return the page of one ledger: verdicts with filters, effects, tips, machine, versions.

    Args:
        ledger: as :func:`dlhelpers.course.ledger.read` returns it.
        notebooks: the folder of the notebooks as seen from where the page will lie.
        failed: notebooks that did not run to their end, named at the top.
        cells: claim's id -> the cell of its notebook that a link goes to.
        claims, tips: those of the course where None.
    """
    claims = all_claims() if claims is None else claims
    tips = all_tips() if tips is None else tips
    rows = {row["id"]: row for row in ledger["rows"]}

    def link(claim: Claim, text: str) -> str:
        return cell_link(claim.notebook, notebooks, (cells or {}).get(claim.id), text)

    tallies = {claim.id: _tally_of(rows.get(claim.id)) for claim in claims}
    said = {tip.id: tip for tip in tips}
    body = "".join(
        _claim_row(
            claim,
            said.get(claim.tip),
            rows.get(claim.id),
            link(claim, ""),
        )
        for claim in claims
    )
    sections = [
        f"<p>{breakable(machine_line(ledger))}<br><span class='quiet'>"
        f"{escape(_versions(ledger))} · begun {escape(str(ledger['created']))}</span></p>",
        _failures(failed),
        _headline(tallies, {claim.id: claim for claim in claims}, rows.values()),
        picture.picture_table(lines_of([ledger], claims), tips, ["this machine"], link),
        f"{score_of(rows.values())._repr_html_()}<p>{_undated(rows.values())}</p>",
        "<h2>Tips and what to do here</h2>",
        _tips(tips, claims, rows, notebooks),
        "<h2>Claims</h2>",
        f"<p class='filters'>{_filters(claims, tallies)}<span id='shown' aria-live='polite'>"
        "</span></p>",
        "<div class='wide'><table id='claims'><thead><tr><th>Verdict</th><th>Claim</th>"
        "<th>Evidence</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>",
        orphans(row for id, row in rows.items() if id not in tallies),
        "<h2>Machine</h2>",
        _machine(ledger),
        f"<script>{_SCRIPT}{picture.SCRIPT}</script>",
    ]
    return document("Deep learning, measured: the verdicts of this machine", sections)


def _badge(tally: Tally | None) -> str:
    """Return the short form of a claim's verdict with its colour beside it; None was not run."""
    said = escape("Not run" if tally is None else headline(tally))
    colour = bar_colour(tally)
    return f"<span class='badge' style='color:{colour}'><span>{said}</span></span>"


def _conditions_of(row: Mapping[str, Any] | None) -> tuple[Judged, ...]:
    """Return the conditions of a ledger's row; none of a claim that was not run."""
    return () if row is None else tuple(map(Judged.from_row, row["conditions"]))


def _tally_of(row: Mapping[str, Any] | None) -> Tally | None:
    """Return how the conditions of a row came out; None for a claim that was not run."""
    return None if row is None else Tally.of(_conditions_of(row))


def _kinds_of(tally: Tally | None) -> list[str]:
    """Return the keys of STANDINGS that some condition of a claim has."""
    if tally is None:
        return [_NOT_RUN]
    unknown = tally.settled - tally.agrees - tally.open - len(tally.against)
    numbers = {
        "against": len(tally.against), "agrees": tally.agrees, "open": tally.open,
        "unknown": unknown, "unsettled": tally.unsettled, "not-measured": tally.missing,
    }  # fmt: skip
    return [kind for kind, number in numbers.items() if number]


def _claim_row(claim: Claim, tip: Tip | None, row: Mapping[str, Any] | None, link: str) -> str:
    tally = _tally_of(row)
    told = f"“{escape(tip.says)}” ({escape(tip.said_by)})" if tip else escape(claim.tip)
    needs = f"<br>needs {escape(claim.needs)}" if claim.needs else ""
    said = ""
    if row:
        found = _break_even_of(claim, row)
        said = f"<div>{escape(sentence(claim, _conditions_of(row), break_even=found))}</div>"
    return (
        f"<tr id='{escape(claim.id)}' data-topic='{escape(claim.topic)}' "
        f"data-condition='{' '.join(_kinds_of(tally))}' data-kind='{escape(claim.kind)}'>"
        f"<td>{_badge(tally)}{_predictions(claim, row)}</td>"
        f"<td>{escape(claim.says)}<div class='quiet'>{told}<br>Holds if: {escape(asked(claim))} "
        f"({escape(claim.kind)}){needs}<br>Source: {escape(claim.source)}"
        f"<br><code>{escape(claim.id)}</code> · {link}</div></td>"
        f"<td>{said}{_evidence(claim, row) if row else ''}</td></tr>"
    )


def _evidence(claim: Claim, row: Mapping[str, Any]) -> str:
    """Return mechanism, prediction and measurement of each condition, as they were that day."""
    found = _conditions_of(row)
    declared = {condition.name: condition for condition in claim.conditions}
    scale = Scale.over(found, log=claim.kind == "time")
    lines = []
    for c in found:
        drawn = claim.kind != "exact" and c.verdict != "not-measured"
        picture = interval(c.effect, c.low, c.high, c.threshold, scale, c.verdict)
        theory = f"mechanism: {THEORIES[c.theory]}" if c.theory else "mechanism unknown"
        said = word_of(claim, c.verdict) + (f": {c.reason}" if c.reason else "")
        against = " AGAINST THE MECHANISM" if c.agreement == "against" else ""
        changes = c.changes(declared[c.name]) if c.name in declared else ()
        notes = "".join(f"<div class='quiet'>{escape(change)}</div>" for change in changes)
        lines.append(
            (
                escape(c.name) + notes,
                f"<span class='quiet'>{escape(theory)}</span>",
                picture._repr_html_() if drawn else "",
                _number(effect_text(claim, c), claim.kind),
                f"<b>{escape(said)}{against}</b>",
            )
        )
    if row["control"]:
        control = Control(**row["control"])
        number, note = control.told(c.threshold for c in found)
        numbers = (control.effect, control.low, control.high)
        picture = "" if None in numbers else interval(*numbers, None, scale)._repr_html_()
        said = ", ".join(filter(None, dict.fromkeys((control.outcome, note))))
        lines.append(("control", "", picture, _number(number, claim.kind), escape(said)))
    cells = "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines
    )
    return f"<table><tbody>{cells}</tbody></table>{_judged_when(row)}"


def _number(text: str, kind: str) -> str:
    """Return a number with its interval in one line; words of exact claims may break."""
    return escape(text) if kind == "exact" else f"<span class='number'>{escape(text)}</span>"


def _judged_when(row: Mapping[str, Any]) -> str:
    """Say when a row was judged, and with which versions; nothing where that is unknown."""
    if row["judged"] is None:
        return ""
    with_ = " · ".join(f"{name} {found}" for name, found in (row["versions"] or {}).items())
    summary = f"<summary>judged {escape(row['judged'])}</summary>"
    return f"<details class='quiet'>{summary}{escape(with_)}</details>"


def _undated(rows: Iterable[Mapping[str, Any]]) -> str:
    """Say how many rows an earlier version wrote, which kept neither day nor versions."""
    number = sum(row["judged"] is None for row in rows)
    verdicts = "1 verdict" if number == 1 else f"{number} verdicts"
    return f"<br>day and versions unknown: {verdicts}" if number else ""


def _break_even_of(claim: Claim, row: Mapping[str, Any]) -> BreakEven | None:
    return break_even.read(row["axis"], claim.words) if row["axis"] else None


def _predictions(claim: Claim, row: Mapping[str, Any] | None) -> str:
    """List what the reader predicted, now and before; an old answer names no condition."""
    if not row:
        return ""
    lines = []
    for said in map(Said.from_row, (*row["predictions"], *row["earlier"])):
        day = (said.when or "on a day unknown")[:16].partition("T")[0]
        what = f"{said.condition}: {said.text(claim)}" if said.condition else f"{said.says} of them"
        lines.append(f"<br>predicted ({escape(day)}): {escape(what)}")
    return f"<div class='quiet'>{''.join(lines)[4:]}</div>" if lines else ""


def _failures(failed: Sequence[NotebookRun]) -> str:
    if not failed:
        return ""
    lines = "".join(f"<li>{escape(run.name)}: {escape(run.error)}</li>" for run in failed)
    return (
        "<div class='alert' role='alert'>Not run to the end, so verdicts may be missing:"
        f"<ul>{lines}</ul></div>"
    )


def _headline(
    tallies: Mapping[str, Tally | None],
    claims: Mapping[str, Claim],
    rows: Iterable[Mapping[str, Any]],
) -> str:
    """Say how timed conditions agree with the mechanism; count all; name those against it."""
    run = {id: tally for id, tally in tallies.items() if tally is not None}
    total = sum(run.values(), Tally())
    left = sum(len(claims[id].conditions) for id in tallies if id not in run)
    counts = (
        ("hold", total.holds), ("fail", total.fails), ("unsettled", total.unsettled),
        ("not measured", total.missing), ("not run", left),
    )  # fmt: skip
    said = " · ".join(f"{number} {name}" for name, number in counts if number)
    every = left + total.settled + total.unsettled + total.missing
    against = "".join(
        f"<li><a href='#{escape(quote(id))}'>{escape(claims[id].says)}</a> {escape(name)}</li>"
        for id, tally in run.items()
        for name in tally.against
    )
    alert = f"<div class='alert'>Against the mechanism:<ul>{against}</ul></div>" if against else ""
    rows = list(rows)
    timed = escape(timed_headline(rows, tuple(claims.values())))
    text = f"<p><b>{timed}</b></p><p>All {every} conditions: {said}. {CHOSEN}</p>{alert}"
    return text + _weak_controls(row for row in rows if row["id"] in claims)


def _weak_controls(rows: Iterable[Mapping[str, Any]]) -> str:
    """Name the claims whose control was measured, and is too wide to vouch for the others."""
    weak = []
    for row in rows:
        control = Control(**row["control"]) if row["control"] else None
        if control and control.effect is not None and not control.off:
            _, note = control.told(c.threshold for c in _conditions_of(row))
            if note:
                weak.append(f"<a href='#{escape(quote(row['id']))}'>{escape(row['id'])}</a>")
    told = "Controls that rule out little, for their interval reaches a threshold of their claim"
    return f"<p class='quiet'>{told}: {', '.join(weak)}</p>" if weak else ""


def _filters(claims: Sequence[Claim], tallies: Mapping[str, Tally | None]) -> str:
    kinds = {kind for tally in tallies.values() for kind in _kinds_of(tally)}
    choices = {
        "topic": [claim.topic for claim in claims],
        "condition": [kind for kind in STANDINGS if kind in kinds],
        "kind": [claim.kind for claim in claims],
    }
    return "".join(
        f"<label>{_FILTERS[name]} <select data-filter='{name}'><option value=''>all</option>"
        + "".join(
            f"<option value='{escape(value)}'>{escape(STANDINGS.get(value, value))}</option>"
            for value in dict.fromkeys(values)
        )
        + "</select></label>"
        for name, values in choices.items()
    )


def orphans(rows: Iterable[Mapping[str, Any]]) -> str:
    """Name the rows of claims that this version does not declare."""
    lines = "".join(
        f"<li><code>{escape(row['id'])}</code>: {_badge(_tally_of(row))}</li>" for row in rows
    )
    told = "Rows of claims that this version does not declare:"
    return f"<p>{told}</p><ul>{lines}</ul>" if lines else ""


def _tips(
    tips: Sequence[Tip],
    claims: Sequence[Claim],
    rows: Mapping[str, Mapping[str, Any]],
    folder: str,
) -> str:
    """Return every tip with the advice that follows from this machine's rows."""
    lines = []
    for tip in tips:
        main = main_claim(tip, claims)
        if main is None:
            where = ", ".join(cell_link(n, folder) for n in tip.notebooks) or "a later notebook"
            told = f"not treated yet: {where}"
        else:
            links = ", ".join(
                f"<a href='#{escape(quote(claim.id))}'>{escape(claim.id)}</a>"
                for claim in claims
                if claim.tip == tip.id
            )
            row = rows.get(main.id)
            said = advice(tip, main, _conditions_of(row))
            if row and (found := _break_even_of(main, row)):
                said += f" Break-even: {found}."
            told = f"{escape(said)}<div class='quiet'>{links}</div>"
        note = f"<div class='quiet'>{escape(tip.note)}</div>" if tip.note else ""
        lines.append(
            f"<tr><td>{escape(tip.says)}{note}</td><td>{escape(tip.said_by)}</td>"
            f"<td>{told}</td></tr>"
        )
    head = "<tr><th>Tip</th><th>Said by</th><th>Advice for this machine</th></tr>"
    return (
        f"<div class='wide'><table id='tips'><thead>{head}</thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _machine(ledger: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{breakable(_plain(value))}</td></tr>"
        for name, value in ledger["machine"].items()
    )
    return f"<table><tbody>{lines}</tbody></table>"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _versions(ledger: Mapping[str, Any]) -> str:
    return " · ".join(f"{name} {found or 'absent'}" for name, found in ledger["versions"].items())
