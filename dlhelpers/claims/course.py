"""Where is each tip treated?"""

from __future__ import annotations

import html
from dataclasses import dataclass

from dlhelpers.claims.catalog import NOTEBOOKS, all_claims, all_tips

__all__ = ["CourseMap", "course_map"]


@dataclass(frozen=True, repr=False)
class CourseMap:
    """Every tip with the notebooks that treat it and the number of its claims.

    Attributes:
        rows: (notebook's stem, tip as people say it, number of claims settled there); the stem is
            empty for tips that no notebook treats yet.
    """

    rows: tuple[tuple[str, str, int], ...]

    def __repr__(self) -> str:
        return "\n".join(
            f"{stem or 'later':16} {_counted(count):10} {says}" for stem, says, count in self.rows
        )

    def _repr_html_(self) -> str:
        written = {claim.notebook for claim in all_claims()}
        body = "".join(
            "<tr>"
            f"<td style='text-align:left'>{_link(stem, stem in written)}</td>"
            f"<td style='text-align:left'>{html.escape(says)}</td>"
            f"<td style='text-align:left'>{_counted(count)}</td></tr>"
            for stem, says, count in self.rows
        )
        head = "<tr><th>notebook</th><th>tip</th><th></th></tr>"
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def course_map() -> CourseMap:
    """Return the map of the course: every tip of tips.toml, in the notebooks' order."""
    rows = []
    for stem in (*NOTEBOOKS, ""):
        for tip in all_tips():
            if stem in tip.notebooks or (not stem and tip.later):
                claims = [c for c in all_claims() if (c.tip, c.notebook) == (tip.id, stem)]
                rows.append((stem, tip.says, len(claims)))
    return CourseMap(tuple(rows))


def _counted(count: int) -> str:
    return f"{count} claim{'s' if count > 1 else ''}" if count else "to come"


def _link(stem: str, is_written: bool) -> str:
    if not stem:
        return "later"
    return f"<a href='{stem}.ipynb'>{stem}</a>" if is_written else stem
