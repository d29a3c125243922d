"""What do all conditions together say of the mechanism, and what do they not say of folklore?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dlhelpers.course.claims.claim import Claim
from dlhelpers.course.claims.conditions import Judged, Tally

__all__ = ["CHOSEN", "timed_headline"]

CHOSEN = (
    "Conditions were chosen so that theory expects the tip to fail in some of them: how many hold "
    "says nothing of how often such tips are right."
)


def timed_headline(rows: Iterable[Mapping[str, Any]], claims: Sequence[Claim]) -> str:
    """Say how the timed conditions came out where the mechanism commits itself.

    Counted results come out the same everywhere and would only swell the share, so they are left
    out. The date is the last one on which a theory or a threshold of these was written down.
    """
    timed = {claim.id for claim in claims if claim.kind == "time"}
    judged = [Judged.from_row(c) for row in rows if row["id"] in timed for c in row["conditions"]]
    if not judged:
        return "No timed condition has been measured."
    committed = Tally.of(c for c in judged if c.theory in ("wins", "cannot"))
    opened = sum(c.theory == "open" for c in judged)
    unknown = sum(c.theory is None for c in judged)
    parts = [
        f"{committed.agrees} of {committed.settled} came out as it says"
        + (f", {len(committed.against)} against it" if committed.against else ""),
        f"{committed.unsettled} unsettled",
        f"{committed.missing} not measured",
    ]
    text = f"Timed conditions for which the mechanism commits itself: {'; '.join(parts)}. "
    text += f"It leaves {opened} more open."
    text += f" What it said of {unknown} is unknown." if unknown else ""
    days = [c.since for c in judged if c.since is not None]
    if days:
        text += f" It counts from {max(days)}, when a theory or a threshold last changed."
    return text
