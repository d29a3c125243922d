"""Write docs/where-tips-hold.md and its picture: what the committed ledgers say of every tip."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlhelpers.course import claims, ledger
from dlhelpers.course.claims.advice import advice, gain_of, main_claim
from dlhelpers.course.claims.break_even import read
from dlhelpers.course.claims.conditions import Judged
from dlhelpers.course.claims.sentences import effect_text, sentence
from dlhelpers.course.report.headlines import CHOSEN, timed_headline
from dlhelpers.course.report.picture import picture_svg
from dlhelpers.course.report.squares import lines_of

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "where-tips-hold.md"
PICTURE = PAGE.with_suffix(".svg")
HEAD = f"""# Where each tip holds

Made from `data/ledgers/` by `tools/ledger_page.py`; a test keeps it true. Each number is a machine
on which the whole course was run; your own is written by `make report`, and compared with these by
`python -m dlhelpers report --compare ledger.json data/ledgers/*.json`.

{CHOSEN}
"""
OPEN = f"""Open [the picture]({PICTURE.name}) by itself to see numbers and intervals where you
point. Machines on which all came out alike share a line, with numbers from the least to the
largest."""
ALT = "A square for each condition and machine; the tables below say the same in words"


def main() -> None:
    for path, text in ((PAGE, render()), (PICTURE, drawn())):
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote {path}")


def drawn() -> str:
    """Return the picture as SVG."""
    ledgers = list(_ledgers().values())
    machines = [str(number) for number in range(1, len(ledgers) + 1)]
    lines = lines_of(ledgers, claims.all_claims())
    return picture_svg(lines, claims.all_tips(), machines, "../notebooks")


def render() -> str:
    """Return the page as Markdown."""
    ledgers = _ledgers()
    every = claims.all_claims()
    parts = [HEAD]
    for number, (name, one) in enumerate(ledgers.items(), 1):
        against = "; ".join(
            f"`{row['id']}`: {c['name']}"
            for row in one["rows"]
            for c in row["conditions"]
            if c["agreement"] == "against"
        )
        told = f" **Against the mechanism**: {_plain(against)}." if against else ""
        line = one["machine"]["line"]
        parts.append(f"{number}. **{name}**: {line}. {timed_headline(one['rows'], every)}{told}")
    parts += ["", f"![{ALT}]({PICTURE.name})", ""]
    parts += [
        "Open [the picture](where-tips-hold.svg) by itself to see numbers and intervals where"
    ]
    parts += ["you point. Numbers that differ between machines are given from the least to the"]
    parts += ["largest.", "", "## What to do", "", "| tip | machines | advice |", "|---|---|---|"]
    rows = [{row["id"]: row for row in one["rows"]} for one in ledgers.values()]
    for tip in claims.all_tips():
        if claim := main_claim(tip, every):
            parts += _lines(
                tip.says, claim, rows, lambda cs, found, tip=tip, claim=claim: advice(
                    tip, claim, cs, found
                )
            )  # fmt: skip
    notebook = ""
    for claim in sorted(every, key=lambda claim: claim.notebook):
        if claim.notebook != notebook:
            notebook = claim.notebook
            parts += ["", f"## [{notebook}](../notebooks/{notebook}.ipynb)", ""]
            parts += ["| claim | machines | what came out |", "|---|---|---|"]
        parts += _lines(
            claim.says, claim, rows, lambda cs, found, claim=claim: sentence(claim, cs, found)
        )
    return "\n".join([*parts, *_break_evens(rows), ""])


def _break_evens(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of what was measured along the axes of claims."""
    lines = [
        f"| {_plain(claim.says)} | {number} | {_plain(str(read(axis, claim.words)))} |"
        for claim in claims.all_claims()
        for number, found in enumerate(rows, 1)
        if (axis := found.get(claim.id, {}).get("axis"))
    ]
    head = [
        "",
        "## Break-evens",
        "",
        "| claim | machine | where it begins or ends |",
        "|---|---|---|",
    ]
    return [*head, *lines] if lines else []


def _ledgers() -> dict[str, dict[str, Any]]:
    files = sorted((ROOT / "data" / "ledgers").glob("*.json"))
    return {file.stem: ledger.read(file) for file in files}


def _lines(
    says: str,
    claim: claims.Claim,
    rows: Sequence[Mapping[str, Any]],
    told: Callable[[Sequence[Judged], Callable[[Judged], str]], str],
) -> Iterator[str]:
    """Give a line for all machines on which the conditions of a claim came out alike."""
    alike: dict[tuple[tuple[str, str, str], ...], list[tuple[int, list[Judged]]]] = {}
    for number, found in enumerate(rows, 1):
        row = found.get(claim.id)
        conditions = [Judged.from_row(c) for c in row["conditions"]] if row else []
        key = tuple((c.name, gain_of(claim, c), c.reason) for c in conditions)
        alike.setdefault(key, []).append((number, conditions))
    for group in alike.values():
        together: dict[str, list[Judged]] = {}
        for _, conditions in group:
            for c in conditions:
                together.setdefault(c.name, []).append(c)
        first = group[0][1]
        text = told(first, lambda c, t=together: _range(claim, t[c.name])) if first else "Not run"
        who = "all" if len(group) == len(rows) else ", ".join(str(number) for number, _ in group)
        yield f"| {_plain(says)} | {who} | {_plain(text)} |"
        says = ""


def _range(claim: claims.Claim, found: Sequence[Judged]) -> str:
    """Return the number of a condition on several machines, or the least and the largest."""
    ordered = sorted(found, key=lambda c: (c.effect is None, c.effect or 0))
    texts = [effect_text(claim, c, interval=False) for c in (ordered[0], ordered[-1])]
    (least, *unit), (most, *other) = (text.split(" ", 1) for text in texts)
    if texts[0] == texts[1] or unit != other:
        return " to ".join(dict.fromkeys(texts))
    return " ".join([f"{least} to {most}", *unit])  # 17 to 20 % of the file


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("\n", " ")


if __name__ == "__main__":
    main()
