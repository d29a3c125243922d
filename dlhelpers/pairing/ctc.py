"""Do the lengths and the symbols of CTCLoss fit its log_probs (T, N, C)?

A transcript of S symbols needs S frames, and one more for each pair of equal neighbours.
Source: Graves et al. 2006; https://pytorch.org/docs/stable/generated/torch.nn.CTCLoss.html
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor

from .calls import LossCall
from .catalog import Hit
from .values import Values

__all__ = ["ctc_hits"]


def ctc_hits(call: LossCall) -> Iterator[Hit]:
    """Yield the lengths and symbols of one call of CTCLoss that do not fit its log_probs."""
    x, y = call.prediction, call.target
    batch = x.shape[1] if x.ndim == 3 else 1
    ins, outs = _ints(call.options.get("input_lengths")), _ints(call.options.get("target_lengths"))
    if x.ndim not in (2, 3):
        yield _error("ctc-lengths", f"log_probs {tuple(x.shape)}; wanted (T, N, C) or (T, C)")
        return
    for role, lengths in (("input", ins), ("target", outs)):
        if lengths is not None and len(lengths) != batch:
            what = f"{len(lengths)} {role} lengths, batch {batch} in log_probs {tuple(x.shape)}"
            yield _error("ctc-lengths", what)
            return
        if lengths and min(lengths) < 0:
            yield _error("ctc-lengths", f"a {role} length is {min(lengths)}")
            return
    if ins is not None and max(ins, default=0) > x.shape[0]:
        yield _error("ctc-lengths", f"input length {max(ins)} of {x.shape[0]} frames")
    rows = _transcripts(y, outs, batch)
    if rows is None:
        return
    blank, classes = int(call.options.get("blank", 0)), x.shape[-1]
    symbols = {int(symbol) for row in rows for symbol in row}
    if blank in symbols:
        yield _error("blank-in-targets", f"the targets hold blank={blank}")
    if symbols and (min(symbols) < 0 or max(symbols) >= classes):
        what = f"symbols from {min(symbols)} to {max(symbols)}, {classes} classes"
        yield _error("class-index-out-of-range", what)
    frames = ins or [x.shape[0]] * batch
    needed = [len(row) + sum(a == b for a, b in itertools.pairwise(row)) for row in rows]
    short = [i for i, (have, want) in enumerate(zip(frames, needed, strict=False)) if have < want]
    if short:
        what = f"sample {short[0]}: {frames[short[0]]} frames, at least {needed[short[0]]} needed"
        zero = call.options.get("zero_infinity", False)
        yield Hit("ctc-input-too-short", "suspicion" if zero else "error", what, "rule")


def _error(name: str, what: str) -> Hit:
    return Hit(name, "error", what, "rule")


def _ints(lengths: object) -> list[int] | None:
    if isinstance(lengths, Tensor):
        known = Values(lengths).readable and not lengths.is_floating_point()
        return [int(value) for value in lengths.reshape(-1).tolist()] if known else None
    return [int(value) for value in lengths] if isinstance(lengths, (list, tuple)) else None


def _transcripts(y: Tensor, lengths: list[int] | None, batch: int) -> list[list[int]] | None:
    """Return each sample's symbols, without padding; None where lengths are not known."""
    if lengths is None or not Values(y).readable or y.is_floating_point() or y.ndim not in (1, 2):
        return None
    values = y.tolist()
    if y.ndim == 2:
        return [row[:size] for row, size in zip(values, lengths, strict=False)]
    rows, start = [], 0
    for size in lengths:
        rows.append(values[start : start + size])
        start += size
    return rows
