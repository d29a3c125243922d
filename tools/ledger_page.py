"""Write docs/where-tips-hold.md: what the committed ledgers say of every claim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlhelpers.course import claims, ledger

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "where-tips-hold.md"
HEAD = """# Where each tip holds

Made from `data/ledgers/` by `tools/ledger_page.py`; a test keeps it true. Each column is a machine
on which the whole course was run; your own is written by `make report`, and compared with these by
`python -m dlhelpers report --compare ledger.json data/ledgers/*.json`.

A *depends* is followed by the conditions under which the claim holds, and after the stroke by those
under which it fails. Effects with their intervals are in the ledgers.
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
        counts = Counter(row["verdict"] for row in one["rows"])
        said = ", ".join(f"{n} {verdict.replace('-', ' ')}" for verdict, n in counts.most_common())
        parts.append(f"- **{name}**: {one['machine']['line']}. {said}.")
    rows = {name: {row["id"]: row for row in one["rows"]} for name, one in ledgers.items()}
    notebook = ""
    for claim in sorted(claims.all_claims(), key=lambda claim: claim.notebook):
        if claim.notebook != notebook:
            notebook = claim.notebook
            heads = " | ".join(rows)
            parts += ["", f"## [{notebook}](../notebooks/{notebook}.ipynb)", ""]
            parts += [f"| claim | {heads} |", "|---" * (1 + len(rows)) + "|"]
        cells = " | ".join(_cell(found.get(claim.id)) for found in rows.values())
        says = claim.says.replace("|", "\\|").replace("\n", " ")
        parts.append(f"| {says} | {cells} |")
    return "\n".join([*parts, ""])


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "not run"
    if row["verdict"] != "depends":
        return f"**{row['verdict'].replace('-', ' ')}**"
    sides = [
        "; ".join(c["name"] for c in row["conditions"] if c["verdict"] == verdict)
        for verdict in ("holds", "fails")
    ]
    return f"**depends**: {sides[0]} / {sides[1]}"


if __name__ == "__main__":
    main()
