"""Write the last two columns of README's table of notebooks: claims settled, and minutes."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from dlhelpers import claims

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "README.md"
ROW = re.compile(r"^(\| \[.*?\]\(notebooks/(.+)\.ipynb\) \|.*\|) \d* \| \d* \|$", re.M)


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8", newline="\n")
    print(f"wrote {PAGE}")


def render() -> str:
    """Return README with the numbers of the claims' cards and of the notebooks' own first cells.

    Raises:
        ValueError: a notebook has no row, or says nowhere how many minutes it takes.
    """
    readme = PAGE.read_text(encoding="utf-8")
    settled = Counter(claim.notebook for claim in claims.all_claims())
    stems = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    rows = [stem for _, stem in ROW.findall(readme)]
    if rows != stems:
        raise ValueError(f"README must have one row for each of {stems}, in order, got {rows}")
    return ROW.sub(lambda row: f"{row[1]} {settled[row[2]]} | {_minutes(row[2])} |", readme)


def _minutes(stem: str) -> str:
    path = ROOT / "notebooks" / f"{stem}.ipynb"
    opening = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    found = re.search(r"Minutes: (\d+)", opening)
    if not found:
        raise ValueError(f"{path.name}: its first cell must say 'Minutes: ' and a number")
    return found[1]


if __name__ == "__main__":
    main()
