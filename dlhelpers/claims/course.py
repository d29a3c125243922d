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
            f"{stem or 'later':16} {f'{count} claims' if count else 'to come':10} {says}"
            for stem, says, count in self.rows
        )

    def _repr_html_(self) -> str:
        written = {claim.notebook for claim in all_claims()}
        body = "".join(
            "<tr>"
            f"<td style='text-align:left'>{_link(stem, stem in written)}</td>"
            f"<td style='text-align:left'>{html.escape(says)}</td>"
            f"<td style='text-align:left'>{count or 'to come'}</td></tr>"
            for stem, says, count in self.rows
        )
        head = "<tr><th>notebook</th><th>tip</th><th>claims</th></tr>"
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


def _link(stem: str, is_written: bool) -> str:
    if not stem:
        return "later"
    return f"<a href='{stem}.ipynb'>{stem}</a>" if is_written else stem
