"""Does a state of a sampler belong to the order that is to go on, and where does it stand?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from dlhelpers.arguments import whole_number

__all__ = ["read_state", "warn_of_left"]

_DIFFERS = {  # why an epoch cannot go on, and what to do
    "length": "the state is of a dataset of {theirs} items, this one has {mine}: give the same "
    "dataset, or start a new epoch",
    "items": "the state is of a Subset or ConcatDataset with the same number of items, but other "
    "ones: select the same ones, such as by "
    "random_split(..., generator=torch.Generator().manual_seed(0))",
    "seed": "the state has the seed {theirs}, this sampler {mine}: give seed={theirs}",
    "shuffle": "the state has shuffle={theirs}, this sampler {mine}: give shuffle={theirs}",
    "window": "the state has the window {theirs}, this sampler {mine}: give window={theirs}",
    "block": "the state has blocks of {theirs} records, this sampler of {mine}: give "
    "block={theirs}",
    "shards": "the state is of a dataset in other shards: its order is another one. Give the "
    "dataset as it was, or start a new epoch",
}


def read_state(state: Any, facts: Mapping[str, Any]) -> tuple[int, int]:
    """Return (epoch, consumed) of a state of this very order.

    Args:
        state: what ``WindowSampler.state_dict`` gave.
        facts: of the order, which must be those of the state.

    Raises:
        ValueError: it is no state, or of another order; says what differs, and what to do.
    """
    needed = ["epoch", "consumed", *facts]
    if not isinstance(state, Mapping) or (lost := [key for key in needed if key not in state]):
        what = f"no {', '.join(lost)}" if isinstance(state, Mapping) else f"{state!r:.60}"
        raise ValueError(
            f"expected what WindowSampler.state_dict() gives, with {', '.join(needed)}; got {what}"
        )
    for key, mine in facts.items():
        if state[key] != mine:
            raise ValueError(_DIFFERS[key].format(theirs=state[key], mine=mine))
    epoch = whole_number("epoch", state["epoch"], 0)
    return epoch, whole_number("consumed", state["consumed"], 0, facts["length"])


def warn_of_left(epoch: int, first: int, length: int, asked: int) -> None:
    """Warn where an epoch is left in its middle for another one than the next."""
    left = length - first
    if first and left and asked != epoch + 1:
        warnings.warn(
            f"set_epoch({asked}) leaves epoch {epoch}, which the state resumes, with {left} of "
            f"{length} samples to go: epoch {asked} starts at its beginning. To go on, loop over "
            "range(sampler.epoch, epochs)",
            stacklevel=3,
        )
