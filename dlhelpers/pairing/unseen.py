"""What can be said of a loss that the table does not know? What its own values prove.

Its one recorded call is played again for other outputs. Where that shows neither what it wants
nor that it compares embeddings, the answer is "not looked at", never "nothing found".
"""

from __future__ import annotations

from dlhelpers.fakes import tensors_in

from .calls import Inside
from .catalog import Hit
from .embeddings import embedding_hits
from .formulas import wish_hits, wish_of
from .probe import first_tensor
from .tape import Tape
from .trace import Head

__all__ = ["NO_RULE", "formula_hits"]

_SIZE = 2**24  # elements of outputs for which a call is still played again
NO_RULE = "not looked at: no rule for this loss"


def formula_hits(inside: Inside, head: Head) -> tuple[list[Hit], str]:
    """Return what the formula of a loss shows, and what is to be said where that is nothing.

    Args:
        inside: its call, which raised nothing.
        head: the activation of the outputs.
    """
    names = sorted({call.name for call in inside.calls})
    rest = f"nothing found in {', '.join(names)}; not looked at: the rest of this loss"
    unknown = rest if names else NO_RULE
    output = first_tensor(inside.arguments[0]) if inside.arguments else None
    tape = Tape(inside)
    if output is None or output.numel() > _SIZE or not output.is_floating_point():
        return [], unknown
    if not tape.is_faithful:
        return [], unknown
    if set(names) <= {"cross_entropy"}:
        floating = [x for x in tensors_in(inside.arguments) if x.is_floating_point()]
        found = embedding_hits(tape, floating)
        if found is not None:
            return found, "nothing found: this loss compares embeddings, which are normalised"
    muted = Tape(inside, mute=True) if names else tape
    if names and muted.is_constant(output):
        return [], "nothing found"
    target = next(tensors_in(inside.arguments[1:]), None)
    wish = None if target is None else wish_of(muted, output, target)
    if wish is None:
        return [], unknown
    return list(wish_hits(wish, head, output)), f"nothing found: this loss wants {wish.kind}"
