"""Where do machines differ?

A condition is reversed where it holds on one machine and fails on another; two machines differ
beyond both intervals where these do not meet, whatever the threshold says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dlhelpers.course.claims.catalog import all_claims, all_tips
from dlhelpers.course.claims.claim import Claim, Tip
from dlhelpers.course.report import picture
from dlhelpers.course.report.cells import Cell
from dlhelpers.course.report.document import breakable, cell_link, document, machine_line
from dlhelpers.course.report.headlines import CHOSEN, timed_headline
from dlhelpers.course.report.page import orphans
from dlhelpers.course.report.squares import Line, gaps, lines_of

__all__ = ["compare", "differences"]


def compare(
    ledgers: Sequence[Mapping[str, Any]],
    *,
    notebooks: str = "notebooks",
    cells: Mapping[str, Cell] | None = None,
    claims: Sequence[Claim] | None = None,
    tips: Sequence[Tip] | None = None,
) -> str:
    """Return a page with one column for each ledger, and where two of them differ.

    Args:
        ledgers: two or more, as :func:`dlhelpers.course.ledger.read` returns them.
        notebooks, cells: as of :func:`dlhelpers.course.report.render`.
        claims, tips: those of the course where None.

    Raises:
        ValueError: fewer than two ledgers.
    """
    if len(ledgers) < 2:
        raise ValueError(f"a comparison needs two ledgers at least, got {len(ledgers)}")
    claims = all_claims() if claims is None else claims
    tips = all_tips() if tips is None else tips
    lines = lines_of(ledgers, claims)
    known = {claim.id for claim in claims}
    turned = sum(line.turned for line in lines)
    machines = "".join(
        f"<li>{breakable(machine_line(ledger))} <span class='quiet'>torch "
        f"{escape(str(ledger['versions'].get('torch')))} · {escape(str(ledger['created']))}</span>"
        f"<br>{escape(timed_headline(ledger['rows'], claims))}</li>"
        for ledger in ledgers
    )
    turn = "turns" if turned == 1 else "turn"
    sections = [
        f"<ol>{machines}</ol>",
        f"<p>{turned} of {len(lines)} conditions {turn} round between these {len(ledgers)} "
        f"machines: each holds on one and fails on another. {CHOSEN}</p>",
        picture.picture_table(
            lines,
            tips,
            [str(number) for number in range(1, len(ledgers) + 1)],
            lambda claim, text: cell_link(
                claim.notebook, notebooks, (cells or {}).get(claim.id), text
            ),
        ),
        "<h2>Beyond both intervals, largest first</h2>",
        _gaps_table(lines),
        *(orphans(row for row in ledger["rows"] if row["id"] not in known) for ledger in ledgers),
        f"<script>{picture.SCRIPT}</script>",
    ]
    return document("Deep learning, measured: machines side by side", sections)


def differences(
    ledgers: Sequence[Mapping[str, Any]], *, claims: Sequence[Claim] | None = None
) -> list[str]:
    """Say of each condition where two machines differ beyond both intervals; largest first.

    Machines are numbered from 1 in the order of the ledgers.
    """
    claims = all_claims() if claims is None else claims
    return [
        f"{times or 'a difference'}: {line.claim.id}, {line.name}: {low}, {high}"
        for line, times, low, high in map(_told, gaps(lines_of(ledgers, claims)))
    ]


def _told(line: Line) -> tuple[Line, str, str, str]:
    gap = line.gap
    times = "" if gap.factor is None else f"{gap.factor:.3g}x"
    low, high = (f"{line.squares[n].found} on {n + 1}" for n in (gap.low, gap.high))
    return line, times, low, high


def _gaps_table(lines: Sequence[Line]) -> str:
    body = "".join(
        f"<tr><td>{times or 'a difference'}</td><td>{escape(line.claim.says)}</td>"
        f"<td>{escape(line.name)}</td><td>{escape(low)}</td><td>{escape(high)}</td>"
        f"<td>{'reversed' if line.turned else ''}</td></tr>"
        for line, times, low, high in map(_told, gaps(lines))
    )
    if not body:
        return "<p>No two machines differ beyond both intervals.</p>"
    return (
        "<div class='wide'><table id='gaps'><thead><tr><th>Apart by at least</th><th>Claim</th>"
        "<th>Condition</th><th>Lowest</th><th>Highest</th><th></th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
