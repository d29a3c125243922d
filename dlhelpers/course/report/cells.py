"""In which cell of its notebook is a claim judged?"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cell", "cells_of_claims"]

_CARD = re.compile(r"claims\.card\(\s*[\"']([^\"']+)[\"']")


@dataclass(frozen=True)
class Cell:
    """A cell of code.

    Attributes:
        id: by which JupyterLab finds it, in an address that ends in ``#cell-id=...``.
        number: the one in ``[ ]`` beside it once all cells have been run.
    """

    id: str
    number: int


def cells_of_claims(folder: str | Path) -> dict[str, Cell]:
    """Return claim's id -> the cell that shows its card; of notebooks that are there and whole."""
    found: dict[str, Cell] = {}
    for path in sorted(Path(folder).glob("*.ipynb")):
        try:
            cells = json.loads(path.read_text("utf-8"))["cells"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        code = (cell for cell in cells if cell["cell_type"] == "code")
        for number, cell in enumerate(code, 1):
            for id in _CARD.findall("".join(cell["source"])):
                found.setdefault(id, Cell(cell.get("id", ""), number))
    return found
