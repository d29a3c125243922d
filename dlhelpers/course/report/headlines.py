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
    parts = []
    if committed.settled:
        parts.append(f"{committed.agrees} of {committed.settled} came out as it says")
    if committed.against:
        parts.append(f"{len(committed.against)} against it")
    if committed.unsettled:
        parts.append(f"{committed.unsettled} unsettled")
    if committed.missing:
        parts.append(f"{committed.missing} not measured")
    said = []
    if parts:
        said.append(f"Timed conditions for which the mechanism commits itself: {', '.join(parts)}.")
    if opened:
        said.append(f"It leaves {opened} {'more ' if parts else 'timed conditions '}open.")
    if unknown:
        of = f"{unknown} {'more' if said else 'timed'} condition{'s' * (unknown > 1)}"
        said.append(f"Of {of} no prediction by the mechanism was recorded.")
    days = [c.since for c in judged if c.since is not None]
    if days:
        said.append(f"A theory or a threshold last changed on {max(days)}.")
    return " ".join(said)
