"""Write docs/where-tips-hold.md: what the committed ledgers say of every claim."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlhelpers.course import claims, ledger
from dlhelpers.course.claims.conditions import Judged, Tally
from dlhelpers.course.claims.course import agreement_text
from dlhelpers.course.claims.sentences import headline, sentence
from dlhelpers.course.report.page import stands_since

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "where-tips-hold.md"
HEAD = """# Where each tip holds

Made from `data/ledgers/` by `tools/ledger_page.py`; a test keeps it true. Each column is a machine
on which the whole course was run; your own is written by `make report`, and compared with these by
`python -m dlhelpers report --compare ledger.json data/ledgers/*.json`.

The unit is the condition. Each cell says where the tip holds there and where not, with the effect;
intervals are in the ledgers. **AGAINST THE MECHANISM** marks a condition that came out otherwise
than theory said beforehand, in the lesson's file. Conditions were chosen so that theory expects the
tip to fail in some of them: how many hold says nothing of how often such tips are right.
"""


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8", newline="\n")
    print(f"wrote {PAGE}")


def render() -> str:
    """Return the page as Markdown."""
    files = sorted((ROOT / "data" / "ledgers").glob("*.json"))
    ledgers = {file.stem: ledger.read(file) for file in files}
    parts = [HEAD]
    for name, one in ledgers.items():
        judged = [(row["id"], Judged.from_row(c)) for row in one["rows"] for c in row["conditions"]]
        tally = Tally.of(c for _, c in judged)
        counts = (
            f"Conditions: {tally.holds} hold, {tally.fails} fail, {tally.unsettled} unsettled, "
            f"{tally.missing} not measured; {agreement_text(tally)}. Theory and thresholds have "
            f"stood since {stands_since(one['rows'])} or earlier."
        )
        against = "; ".join(f"`{id}`: {c.name}" for id, c in judged if c.agreement == "against")
        counts += f" **Against the mechanism**: {_plain(against)}." if against else ""
        parts.append(f"- **{name}**: {one['machine']['line']}. {counts}")
    rows = {name: {row["id"]: row for row in one["rows"]} for name, one in ledgers.items()}
    notebook = ""
    for claim in sorted(claims.all_claims(), key=lambda claim: claim.notebook):
        if claim.notebook != notebook:
            notebook = claim.notebook
            heads = " | ".join(rows)
            parts += ["", f"## [{notebook}](../notebooks/{notebook}.ipynb)", ""]
            parts += [f"| claim | {heads} |", "|---" * (1 + len(rows)) + "|"]
        cells = " | ".join(_cell(claim, found.get(claim.id)) for found in rows.values())
        says = claim.says.replace("|", "\\|").replace("\n", " ")
        parts.append(f"| {says} | {cells} |")
    return "\n".join([*parts, ""])


def _cell(claim: claims.Claim, row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "not run"
    conditions = [Judged.from_row(c) for c in row["conditions"]]
    tally = Tally.of(conditions)
    said = sentence(claim, conditions, intervals=False)
    if not tally.settled:
        return _plain(said)
    head = _plain(headline(tally))
    return f"**{head}**. {_plain(said)}." if tally.against else f"{head}. {_plain(said)}."


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("\n", " ")


if __name__ == "__main__":
    main()
