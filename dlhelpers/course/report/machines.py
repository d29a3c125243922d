"""Where does a condition turn round between machines?

It turns round where it holds on one machine and fails on another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dlhelpers.course.claims.cards import word_of
from dlhelpers.course.claims.catalog import all_claims
from dlhelpers.course.claims.claim import Claim
from dlhelpers.course.claims.sentences import effect_text
from dlhelpers.course.report.page import badge, conditions_of, document, machine_line, tally_of

__all__ = ["compare"]

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
    count = sum(map(len, turned.values()))
    every = len(
        {(id, c["name"]) for t in tables for id, row in t.items() for c in row["conditions"]}
    )
    turn = "turns" if count == 1 else "turn"
    sections = [
        f"<p>{count} of {every} conditions {turn} round between these {len(ledgers)} machines.</p>",
        "<p><label><input type='checkbox' id='turned'> only those that turn round</label></p>",
        f"<div class='wide'><table id='machines'><thead><tr><th>Claim</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div><script>{_SCRIPT}</script>",
    ]
    return document("Deep learning, measured: machines side by side", sections)


def _turn(rows: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Name the conditions that hold on one machine and fail on another."""
    seen: dict[str, set[str]] = {}
    for row in rows:
        for condition in row["conditions"] if row else ():
            seen.setdefault(condition["name"], set()).add(condition["verdict"])
    return [name for name, verdicts in seen.items() if {"holds", "fails"} <= verdicts]


def _row(
    id: str, claim: Claim | None, rows: Sequence[Mapping[str, Any] | None], turned: Sequence[str]
) -> str:
    mark = f"<div><b>turns round at {escape('; '.join(turned))}</b></div>" if turned else ""
    says = escape(claim.says) if claim else "not declared by this version"
    cells = "".join(f"<td>{_cell(claim, row)}</td>" for row in rows)
    return (
        f"<tr data-turned='{'yes' if turned else 'no'}'><td>{says}"
        f"<div class='quiet'><code>{escape(id)}</code></div>{mark}</td>{cells}</tr>"
    )


def _cell(claim: Claim | None, row: Mapping[str, Any] | None) -> str:
    lines = []
    for c in conditions_of(row):
        said = word_of(claim, c.verdict) if claim else c.verdict
        found = ", ".join(filter(None, (claim and effect_text(claim, c), said)))
        text = ": ".join(filter(None, (c.name, found, c.reason)))
        lines.append(f"<div class='quiet'>{escape(text)}</div>")
    return badge(tally_of(row)) + "".join(lines)
