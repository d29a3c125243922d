"""Where is each tip treated, and what became of it on this machine?"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dlhelpers.course.claims.catalog import all_claims, all_tips, lessons
from dlhelpers.course.claims.conditions import Judged, Tally

__all__ = ["Standing", "agreement_text", "standing"]

_ORDER = ("holds", "fails", "unsettled", "not measured", "not run")


@dataclass(frozen=True, repr=False)
class Standing:
    """What the ledger of this machine says of every tip; shows itself.

    Attributes:
        rows: (notebook's stem, tip as people say it, tally of its claims' conditions there, number
            of its conditions that were not run).
        against: (claim's id, condition) of what came out against the mechanism.
        unsettled: (claim's id, condition, why) of what this machine could not settle.
        machine: the machine in a line; empty where there is no ledger yet.
    """

    rows: tuple[tuple[str, str, Tally, int], ...]
    against: tuple[tuple[str, str], ...]
    unsettled: tuple[tuple[str, str, str], ...]
    machine: str

    @property
    def counts(self) -> dict[str, int]:
        """Verdict -> number of conditions, all notebooks together."""
        return _counts(self._sum, sum(left for *_, left in self.rows))

    @property
    def _sum(self) -> Tally:
        return sum((tally for _, _, tally, _ in self.rows), Tally())

    def _head(self) -> list[str]:
        where = self.machine or "no notebook has been run on this machine yet"
        head = [f"{_said(self.counts)} · {where}"]
        return [*head, agreement_text(self._sum)] if self._sum.settled else head

    def __repr__(self) -> str:
        lines = self._head()
        lines += [f"AGAINST THE MECHANISM: {id}: {name}" for id, name in self.against]
        lines += [
            f"{stem:16} {_said(_counts(tally, left)):28} {says}"
            for stem, says, tally, left in self.rows
        ]
        return "\n".join(
            [*lines, *(f"unsettled: {id}: {name}: {why}" for id, name, why in self.unsettled)]
        )

    def _repr_html_(self) -> str:
        left = " style='text-align:left'"
        body = "".join(
            f"<tr><td{left}><a href='{stem}.ipynb'>{stem}</a></td>"
            f"<td{left}>{html.escape(says)}</td>"
            f"<td{left}>{_said(_counts(tally, missing))}{_against_html(tally)}</td></tr>"
            for stem, says, tally, missing in self.rows
        )
        head = "<br>".join(map(html.escape, self._head()))
        return (
            f"<p>{head}</p>{_listed('Against the mechanism:', self.against)}<table><thead><tr>"
            "<th>notebook</th><th>tip</th><th>conditions here</th></tr></thead>"
            f"<tbody>{body}</tbody></table>{_listed('Unsettled, and why:', self.unsettled)}"
        )


def standing() -> Standing:
    """Return the verdicts of this machine's ledger, tip by tip, in the notebooks' order.

    Raises:
        LedgerError: the ledger's file is no ledger.
    """
    from dlhelpers.course import ledger

    try:
        found = ledger.read()
    except FileNotFoundError:
        found = {"rows": [], "machine": {}}
    judged = {row["id"]: tuple(map(Judged.from_row, row["conditions"])) for row in found["rows"]}
    rows, against, unsettled = [], [], []
    for stem in (lesson.stem for lesson in lessons()):
        for tip in all_tips():
            claims = [c for c in all_claims() if (c.tip, c.notebook) == (tip.id, stem)]
            tally = Tally()
            for claim in claims:
                own = judged.get(claim.id, ())
                tally += Tally.of(own)
                against += [(claim.id, c.name) for c in own if c.agreement == "against"]
                unsettled += [
                    (claim.id, c.name, c.reason or "the reason is unknown")
                    for c in own
                    if c.verdict == "unsettled"
                ]
            left = sum(len(claim.conditions) for claim in claims if claim.id not in judged)
            if claims:
                rows.append((stem, tip.says, tally, left))
    line = found["machine"].get("line", "") if judged else ""
    return Standing(tuple(rows), tuple(against), tuple(unsettled), line)


def agreement_text(tally: Tally) -> str:
    """Say how many settled conditions came out as the mechanism says, and where it said nothing.

    >>> agreement_text(Tally(holds=3, agrees=2, open=1)), agreement_text(Tally(fails=1, open=1))
    ('2 of 2 as the mechanism says, 1 more that the mechanism leaves open', \
'1 that the mechanism leaves open')
    """
    committed = tally.agrees + len(tally.against)
    unknown = tally.settled - committed - tally.open
    parts = []
    if committed:
        parts.append(f"{tally.agrees} of {committed} as the mechanism says")
    if tally.open:
        parts.append(f"{tally.open} {'more ' * bool(committed)}that the mechanism leaves open")
    if unknown:
        parts.append(f"{unknown} of which no prediction by the mechanism was recorded")
    return ", ".join(parts)


def _counts(tally: Tally, left: int) -> dict[str, int]:
    numbers = (tally.holds, tally.fails, tally.unsettled, tally.missing, left)
    return {name: number for name, number in zip(_ORDER, numbers, strict=True) if number}


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {_plural(name, number)}" for name, number in counts.items())


def _plural(name: str, number: int) -> str:
    verbs = {"holds": "hold", "fails": "fail"}
    return verbs.get(name, name) if number != 1 else name


def _against_html(tally: Tally) -> str:
    return f"<br><b>{len(tally.against)} against the mechanism</b>" if tally.against else ""


def _listed(title: str, entries: Iterable[tuple[str, ...]]) -> str:
    lines = "".join(
        f"<li><code>{html.escape(id)}</code>: {html.escape(': '.join(rest))}</li>"
        for id, *rest in entries
    )
    return f"<p>{title}</p><ul>{lines}</ul>" if lines else ""
