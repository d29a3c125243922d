"""What became of each claim on one machine, as one page without outside requests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from dlhelpers.course.claims.cards import Scale, colour_of, effect_text, interval_svg
from dlhelpers.course.claims.catalog import all_claims, all_tips
from dlhelpers.course.claims.claim import Claim, Tip
from dlhelpers.course.claims.judging import Judged
from dlhelpers.course.report.cells import Cell
from dlhelpers.course.report.running import NotebookRun

__all__ = ["badge", "document", "machine_line", "render"]

_NOT_RUN = "not-run"
_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --jp-ui-font-color1: #1f2328;
  --jp-layout-color2: #f3f4f6; --jp-border-color1: #c3c8cf; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --jp-ui-font-color1: #e4e7eb;
  --jp-layout-color2: #22262c; --jp-border-color1: #4a515b; --link: #7fb7f0; } }
body { background: var(--page); color: var(--jp-ui-font-color1); max-width: 82rem;
  font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; padding: 0 1rem; }
a { color: var(--link); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.5rem 0.8rem 0.5rem 0; }
thead th { border-bottom: 2px solid var(--jp-border-color1); }
tbody > tr { border-top: 1px solid var(--jp-border-color1); }
td table { width: auto; } td table td { padding: 0 0.8rem 0.2rem 0; }
td table tr { border: none; }
.badge { border-left: 5px solid; padding-left: 0.4rem; font-weight: 600; white-space: nowrap; }
.badge span { color: var(--jp-ui-font-color1); }
.quiet { opacity: 0.75; font-size: 0.9em; }
.filters label { margin-right: 1.2rem; }
.alert { border: 2px solid; padding: 0.5rem 1rem; }
.bound { white-space: nowrap; }
.wide { overflow-x: auto; }
[hidden] { display: none; }
"""
_SCRIPT = """
const selects = [...document.querySelectorAll('select[data-filter]')];
const rows = [...document.querySelectorAll('#claims > tbody > tr')];
function filter() {
  for (const row of rows)
    row.hidden = selects.some(s => s.value && row.dataset[s.dataset.filter] !== s.value);
  const shown = rows.filter(row => !row.hidden).length;
  document.getElementById('shown').textContent = `${shown} of ${rows.length} claims shown`;
}
for (const select of selects) select.addEventListener('change', filter);
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
    verdicts = {claim.id: rows.get(claim.id, {"verdict": _NOT_RUN})["verdict"] for claim in claims}
    said = {tip.id: tip for tip in tips}
    body = "".join(
        _claim_row(
            claim,
            said.get(claim.tip),
            rows.get(claim.id),
            _link(claim.notebook, notebooks, (cells or {}).get(claim.id)),
        )
        for claim in claims
    )
    sections = [
        f"<p>{escape(machine_line(ledger))}<br><span class='quiet'>"
        f"{escape(_versions(ledger))} · begun {escape(str(ledger['created']))}</span></p>",
        _failures(failed),
        f"<p>{_counts(verdicts.values())}{_predictions(rows.values())}</p>",
        "<h2>Claims</h2>",
        f"<p class='filters'>{_filters(claims, verdicts)}<span id='shown' aria-live='polite'>"
        "</span></p>",
        "<div class='wide'><table id='claims'><thead><tr><th>Verdict</th><th>Claim</th>"
        "<th>Evidence</th><th>Holds if</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>",
        _orphans(row for id, row in rows.items() if id not in verdicts),
        "<h2>Tips</h2>",
        _tips(tips, claims, verdicts, notebooks),
        "<h2>Machine</h2>",
        _machine(ledger),
        f"<script>{_SCRIPT}</script>",
    ]
    return document("Deep learning, measured: the verdicts of this machine", sections)


def document(title: str, sections: Iterable[str]) -> str:
    """Return a whole HTML page with the report's style."""
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{''.join(sections)}</body></html>\n"
    )


def badge(verdict: str) -> str:
    """Return a verdict in capitals with its colour beside it."""
    label = escape(verdict.replace("-", " ").upper())
    return f"<span class='badge' style='color:{colour_of(verdict)}'><span>{label}</span></span>"


def machine_line(ledger: Mapping[str, Any]) -> str:
    """Return the machine of a ledger in a line."""
    return str(ledger["machine"].get("line") or "a machine that is not described")


def _claim_row(claim: Claim, tip: Tip | None, row: Mapping[str, Any] | None, link: str) -> str:
    verdict = row["verdict"] if row else _NOT_RUN
    told = f"“{escape(tip.says)}” ({escape(tip.said_by)})" if tip else escape(claim.tip)
    needs = f"<br>needs {escape(claim.needs)}" if claim.needs else ""
    unit = f" {claim.unit}" if claim.unit else ""
    return (
        f"<tr id='{escape(claim.id)}' data-topic='{escape(claim.topic)}' "
        f"data-verdict='{escape(verdict)}' data-kind='{escape(claim.kind)}'>"
        f"<td>{badge(verdict)}{_answer(claim, row)}</td>"
        f"<td>{escape(claim.says)}<div class='quiet'>{told}<br>Source: {escape(claim.source)}"
        f"<br><code>{escape(claim.id)}</code> · {link}</div></td>"
        f"<td>{_evidence(claim, row) if row else ''}</td>"
        f"<td>{escape(claim.metric)} <span class='bound'>{escape(str(claim.threshold))}</span>"
        f"{escape(unit)}"
        f"<div class='quiet'>{escape(claim.kind)}{needs}</div></td></tr>"
    )


def _evidence(claim: Claim, row: Mapping[str, Any]) -> str:
    thresholds = {c.name: c.threshold for c in claim.conditions}
    found = [
        Judged(**condition, threshold=thresholds.get(condition["name"], claim.threshold))
        for condition in row["conditions"]
    ]
    scale = Scale.over(found, log=claim.kind == "time")
    lines = []
    for c in found:
        missing = c.verdict == "not-measured"
        text = effect_text(claim.kind, c.threshold, c.effect, c.low, c.high, claim.unit)
        drawn = claim.kind != "exact" and not missing
        picture = interval_svg(c.effect, c.low, c.high, c.threshold, scale, c.verdict)
        verdict = c.verdict.replace("-", " ") + (f": {c.reason}" if c.reason else "")
        lines.append((c.name, "" if missing else text, picture if drawn else "", verdict))
    if control := row["control"]:
        numbers = (control["effect"], control["low"], control["high"])
        text = effect_text("time", claim.threshold, *numbers) if numbers[0] is not None else ""
        picture = interval_svg(*numbers, None, scale) if text else ""
        lines.append(("control", text, picture, control["outcome"]))
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td>{picture}</td><td>{escape(text)}</td>"
        f"<td><b>{escape(verdict)}</b></td></tr>"
        for name, text, picture, verdict in lines
    )
    return f"<table><tbody>{cells}</tbody></table>"


def _answer(claim: Claim, row: Mapping[str, Any] | None) -> str:
    if not row or row["answer"] is None:
        return ""
    label = claim.answers.get(row["answer"], row["answer"])
    return f"<div class='quiet'>predicted: {escape(label)}</div>"


def _link(notebook: str, folder: str, cell: Cell | None = None) -> str:
    address = quote(f"{folder}/{notebook}.ipynb" if folder else f"{notebook}.ipynb")
    address += f"#cell-id={quote(cell.id)}" if cell and cell.id else ""
    name = f"{notebook}, cell [{cell.number}]" if cell else notebook
    return f"<a href='{escape(address)}'>{escape(name)}</a>"


def _failures(failed: Sequence[NotebookRun]) -> str:
    if not failed:
        return ""
    lines = "".join(f"<li>{escape(run.name)}: {escape(run.error)}</li>" for run in failed)
    return (
        "<div class='alert' role='alert'>Not run to the end, so verdicts may be missing:"
        f"<ul>{lines}</ul></div>"
    )


def _counts(verdicts: Iterable[str]) -> str:
    counts = Counter(verdicts)
    order = ("holds", "fails", "depends", "unsettled", "not-measured", _NOT_RUN)
    return " · ".join(f"{counts[v]} {v.replace('-', ' ')}" for v in order if counts[v])


def _predictions(rows: Iterable[Mapping[str, Any]]) -> str:
    settled = [
        row["answer"] == row["verdict"]
        for row in rows
        if row["answer"] is not None and row["verdict"] in ("holds", "fails", "depends")
    ]
    return f" · {sum(settled)} of {len(settled)} predictions right" if settled else ""


def _filters(claims: Sequence[Claim], verdicts: Mapping[str, str]) -> str:
    choices = {
        "topic": [claim.topic for claim in claims],
        "verdict": list(verdicts.values()),
        "kind": [claim.kind for claim in claims],
    }
    return "".join(
        f"<label>{name} <select data-filter='{name}'><option value=''>all</option>"
        + "".join(
            f"<option value='{escape(value)}'>{escape(value.replace('-', ' '))}</option>"
            for value in dict.fromkeys(values)
        )
        + "</select></label>"
        for name, values in choices.items()
    )


def _orphans(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = "".join(
        f"<li><code>{escape(row['id'])}</code>: {badge(row['verdict'])}</li>" for row in rows
    )
    told = "Rows of claims that this version does not declare:"
    return f"<p>{told}</p><ul>{lines}</ul>" if lines else ""


def _tips(
    tips: Sequence[Tip], claims: Sequence[Claim], verdicts: Mapping[str, str], folder: str
) -> str:
    lines = []
    for tip in tips:
        own = [claim for claim in claims if claim.tip == tip.id]
        became = "<br>".join(
            f"{badge(verdicts[c.id])} <a href='#{escape(quote(c.id))}'>{escape(c.says)}</a>"
            for c in own
        )
        if not own:
            where = ", ".join(_link(n, folder) for n in tip.notebooks) or "a later notebook"
            became = f"not treated yet: {where}"
        note = f"<div class='quiet'>{escape(tip.note)}</div>" if tip.note else ""
        lines.append(
            f"<tr><td>{escape(tip.says)}{note}</td><td>{escape(tip.said_by)}</td>"
            f"<td>{became}</td></tr>"
        )
    head = "<tr><th>Tip</th><th>Said by</th><th>What became of it here</th></tr>"
    return (
        f"<div class='wide'><table id='tips'><thead>{head}</thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _machine(ledger: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(_plain(value))}</td></tr>"
        for name, value in ledger["machine"].items()
    )
    return f"<table><tbody>{lines}</tbody></table>"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _versions(ledger: Mapping[str, Any]) -> str:
    return " · ".join(f"{name} {found or 'absent'}" for name, found in ledger["versions"].items())
