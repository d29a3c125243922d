"""What became of each BatchNorm, and how far is the result from the model's?"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass

from dlhelpers.tables import html_table

__all__ = ["FusionReport", "FusionRow", "said"]


def said(error: float) -> str:
    """Say how far outputs differ.

    >>> said(2e-7), said(math.inf)
    ('by 2.0e-07 of the largest', 'in sizes, whole numbers or NaNs')
    """
    if math.isinf(error):
        return "in sizes, whole numbers or NaNs"
    return f"by {error:.1e} of the largest"


@dataclass(frozen=True)
class FusionRow:
    """One BatchNorm.

    Attributes:
        name: qualified.
        kind: its type's name.
        into: name of the layer that it was folded into; empty if it was not.
        why: why not; empty if it was.
        error: of this layer's output against float64, relative to the largest value; None without
            example inputs, or if it was not reached by them.
    """

    name: str
    kind: str
    into: str = ""
    why: str = ""
    error: float | None = None


@dataclass(frozen=True)
class FusionReport:
    """What became of a model's BatchNorms.

    Attributes:
        rows: one for each BatchNorm, in the model's order.
        max_rel_error: of the outputs, fused against the original in eval mode, relative to the
            largest value; infinite where sizes, whole numbers or the places of NaNs differ; None
            where nothing was compared.
        algebra_error: the same with both models in float64, where rounding is nothing; None where
            nothing was compared or the model does not run in float64.
        bytes_saved: of parameters and buffers.
        notes: what could not be looked at.
    """

    rows: tuple[FusionRow, ...]
    max_rel_error: float | None = None
    algebra_error: float | None = None
    bytes_saved: int = 0
    notes: tuple[str, ...] = ()

    @property
    def found(self) -> int:
        """BatchNorms in the model."""
        return len(self.rows)

    @property
    def folded(self) -> int:
        """BatchNorms that are gone."""
        return sum(bool(row.into) for row in self.rows)

    @property
    def left(self) -> Mapping[str, str]:
        """Name -> why, of those that stayed."""
        return {row.name: row.why for row in self.rows if not row.into}

    def _verified(self) -> str:
        if not self.folded:
            return "the model is as it was"
        if self.max_rel_error is None:
            return "not verified: give example_inputs that yield a number"
        text = f"outputs differ {said(self.max_rel_error)}"
        if self.algebra_error is not None:
            text += f", in float64 {said(self.algebra_error)}"
        return text

    def __str__(self) -> str:
        lines = [f"{self.folded} of {self.found} BatchNorms folded; {self._verified()}"]
        width = max((len(row.name) for row in self.rows), default=0)
        for row in self.rows:
            fate = f"folded into {row.into}" if row.into else f"left: {row.why}"
            error = "" if row.error is None else f" (error {row.error:.1e})"
            lines.append(f"  {row.name:{width}}  {fate}{error}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        rows = [
            [
                *(row.name, row.kind, row.into or row.why, "folded" if row.into else "left"),
                "" if row.error is None else f"{row.error:.1e}",
            ]
            for row in self.rows
        ]
        table = html_table(("BatchNorm", "type", "into, or why not", "", "error"), rows, names=4)
        title = f"{self.folded} of {self.found} folded; {self._verified()}"
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<p>{html.escape(title)}</p>{table}{notes}"
