"""Where does a verdict turn round between machines?

A claim turns round where two machines settled it (holds, fails or depends) and differ, or where
one of its conditions holds on one machine and fails on another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dlhelpers.course.claims.cards import effect_text
from dlhelpers.course.claims.catalog import all_claims
from dlhelpers.course.claims.claim import Claim
from dlhelpers.course.report.page import badge, document, machine_line

__all__ = ["compare"]

_SETTLED = {"holds", "fails", "depends"}
_SCRIPT = """
const box = document.getElementById('turned');
box.addEventListener('change', () => {
  for (const row of document.querySelectorAll('#machines > tbody > tr'))
    row.hidden = box.checked && row.dataset.turned !== 'yes';
});
"""


def compare(ledgers: Sequence[Mapping[str, Any]], *, claims: Sequence[Claim] | None = None) -> str:
    """Return a page with one column for each ledger, marking where a verdict turns round.

    Args:
        ledgers: two or more, as :func:`dlhelpers.course.ledger.read` returns them.
        claims: those of the course where None; rows of other claims come last.

    Raises:
        ValueError: fewer than two ledgers.
    """
    if len(ledgers) < 2:
        raise ValueError(f"a comparison needs two ledgers at least, got {len(ledgers)}")
    declared = {claim.id: claim for claim in (all_claims() if claims is None else claims)}
    tables = [{row["id"]: row for row in ledger["rows"]} for ledger in ledgers]
    measured = dict.fromkeys(id for table in tables for id in table)
    ids = [id for id in declared if id in measured]
    ids += [id for id in measured if id not in declared]
    turned = {id: _turn([table.get(id) for table in tables]) for id in ids}
    body = "".join(
        _row(id, declared.get(id), [table.get(id) for table in tables], turned[id]) for id in ids
    )
    head = "".join(
        f"<th>{escape(machine_line(ledger))}<div class='quiet'>torch "
        f"{escape(str(ledger['versions'].get('torch')))} · {escape(str(ledger['created']))}</div>"
        "</th>"
        for ledger in ledgers
    )
    count = sum(map(bool, turned.values()))
    sections = [
        f"<p>{count} of {len(ids)} claims turn round between these {len(ledgers)} machines.</p>",
        "<p><label><input type='checkbox' id='turned'> only those that turn round</label></p>",
        f"<div class='wide'><table id='machines'><thead><tr><th>Claim</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div><script>{_SCRIPT}</script>",
    ]
    return document("Deep learning, measured: machines side by side", sections)


def _turn(rows: Sequence[Mapping[str, Any] | None]) -> str:
    """Say where the verdict turns round, empty where it does not."""
    found = [row for row in rows if row is not None]
    conditions: dict[str, set[str]] = {}
    for row in found:
        for condition in row["conditions"]:
            conditions.setdefault(condition["name"], set()).add(condition["verdict"])
    names = [name for name, seen in conditions.items() if {"holds", "fails"} <= seen]
    if names:
        return f"turns round at {'; '.join(names)}"
    return "turns round" if len({row["verdict"] for row in found} & _SETTLED) > 1 else ""


def _row(
    id: str, claim: Claim | None, rows: Sequence[Mapping[str, Any] | None], turned: str
) -> str:
    mark = f"<div><b>{escape(turned)}</b></div>" if turned else ""
    says = escape(claim.says) if claim else "not declared by this version"
    cells = "".join(f"<td>{_cell(claim, row)}</td>" for row in rows)
    return (
        f"<tr data-turned='{'yes' if turned else 'no'}'><td>{says}"
        f"<div class='quiet'><code>{escape(id)}</code></div>{mark}</td>{cells}</tr>"
    )


def _cell(claim: Claim | None, row: Mapping[str, Any] | None) -> str:
    if row is None:
        return badge("not-run")
    lines = []
    thresholds = {c.name: c.threshold for c in claim.conditions} if claim else {}
    for c in row["conditions"]:
        text = c["reason"]
        if claim and c["verdict"] != "not-measured":
            bar = thresholds.get(c["name"], claim.threshold)
            text = effect_text(claim.kind, bar, c["effect"], c["low"], c["high"], claim.unit)
        verdict = c["verdict"].replace("-", " ")
        lines.append(f"<div class='quiet'>{escape(c['name'])}: {escape(text)} {verdict}</div>")
    return badge(row["verdict"]) + "".join(lines)
