"""What can be said of a loss that the table does not know? What its own values prove.

Its one recorded call is played again for other outputs. Where that shows neither what it wants
nor that it compares embeddings, the answer is "not looked at", never "nothing found".
"""

from __future__ import annotations

from torch import Tensor

from dlhelpers.trees import tensors_in

from .calls import NAME_OF, Inside
from .catalog import Hit
from .embeddings import embedding_hits
from .formulas import wish_hits, wish_of
from .probe import first_tensor
from .tape import Tape
from .trace import Head
from .values import Values

__all__ = ["NO_RULE", "formula_hits"]

_SIZE = 2**20  # elements of outputs up to which a call is played again with all its samples
_LARGEST = 2**22  # where it cannot be played with fewer
NO_RULE = "not looked at: no rule for this loss"


def formula_hits(inside: Inside, head: Head) -> tuple[list[Hit], str]:
    """Return what the formula of a loss shows, and what is to be said where that is nothing.

    Args:
        inside: its call, which raised nothing.
        head: the activation of the outputs.
    """
    names = sorted({call.name for call in inside.calls})
    rest = f"nothing found in {', '.join(names)}; not looked at: the rest of this loss"
    of_torch = [result for func, _, _, result in inside.steps if func in NAME_OF]
    if any(inside.value is result for result in of_torch):
        rest = "nothing found"
    unknown = rest if names else NO_RULE
    output = first_tensor(inside.arguments[0]) if inside.arguments else None
    tape, whole = Tape(inside), output
    if output is None or not output.is_floating_point():
        return [], unknown
    if output.numel() > _SIZE:
        less = tape.narrowed(len(output), max(1, _SIZE * len(output) // output.numel()))
        if less is None and output.numel() > _LARGEST:
            return [], unknown
        inside = less or inside
        tape, output = Tape(inside), first_tensor(inside.arguments[0])
    if not tape.is_faithful:
        return [], unknown
    if set(names) <= {"cross_entropy"}:
        floating = [x for x in tensors_in(inside.arguments) if _is_floating(x)]
        found = embedding_hits(tape, floating) if floating else None
        if found is not None:
            hits, how = found
            return hits, f"nothing found: this loss compares embeddings {how}"
    muted = Tape(inside, mute=True) if names else tape
    if names and muted.is_constant(output):
        return [], "nothing found"
    target = next(tensors_in(inside.arguments[1:]), None)
    wish = None if target is None else wish_of(muted, output, target)
    if wish is None:
        return [], unknown
    return list(wish_hits(wish, head, whole)), f"nothing found: this loss wants {wish.kind}"


def _is_floating(tensor: Tensor) -> bool:
    """Whether a tensor may hold embeddings: floating numbers, and no flags."""
    return tensor.is_floating_point() and not Values(tensor).distinct <= {-1.0, 0.0, 1.0}
