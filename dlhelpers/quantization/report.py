"""What became of each backend, and which one was taken?"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

from dlhelpers.measure import Comparison
from dlhelpers.tables import figures, html_table, text_table

__all__ = ["BackendRow", "QuantizationReport"]


@dataclass(frozen=True)
class BackendRow:
    """One backend.

    Attributes:
        name: such as ``ONNX Runtime int8``.
        precision: ``float32``, ``bfloat16``, ``float16``, ``float64`` or ``int8``.
        speed: time of the fastest backend of the model's own type / of this one, with its interval;
            None for that backend itself and for one that dropped out.
        sqnr_db: signal over the error of the worst output, against the model as given, taken for
            each sample (``sample_sqnr_db``); what is compared with the bound. Infinite where they
            are equal, None where it never ran or no output can be compared.
        total_sqnr_db: the same over all samples together (``sqnr_db``), in which one sample of
            large values hides the others.
        nbytes: on disk; None where it was not built.
        int8_kernels: operators that compute with 8-bit integers.
        accuracy: on the test data given; None without them.
        dropped: why it was not raced; empty if it was.
        note: on how it was built.
    """

    name: str
    precision: str
    speed: Comparison | None = None
    sqnr_db: float | None = None
    total_sqnr_db: float | None = None
    nbytes: int | None = None
    int8_kernels: int = 0
    accuracy: float | None = None
    dropped: str = ""
    note: str = ""

    def _cells(self, taken: bool, baseline: bool) -> list[str]:
        speed = "1 (baseline)" if baseline else "" if self.speed is None else _interval(self.speed)
        return [
            f"{'-> ' if taken else ''}{self.name}",
            f"dropped: {self.dropped}" if self.dropped else self.note,
            speed,
            _ratio(self.sqnr_db),
            _ratio(self.total_sqnr_db),
            "" if self.nbytes is None else f"{self.nbytes / 2**20:.2f}",
            str(self.int8_kernels or ""),
            "" if self.accuracy is None else f"{self.accuracy:.1%}",
        ]


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    return "equal" if value > 200 else f"{value:.1f}"


def _interval(speed: Comparison) -> str:
    if not math.isfinite(speed.high):
        return figures(speed.speedup)
    return f"{figures(speed.speedup)} [{figures(speed.low)}, {figures(speed.high)}]"


@dataclass(frozen=True)
class QuantizationReport:
    """The backends that were tried.

    Attributes:
        rows: in the order in which they were tried.
        chosen: name of the backend that was taken.
        baseline: name of the fastest backend of the model's own type: the others are compared with
            it.
        min_sqnr_db: what a backend had to reach.
        why: why this backend, in a sentence.
        notes: what else a reader should know.
    """

    rows: tuple[BackendRow, ...]
    chosen: str
    baseline: str
    min_sqnr_db: float
    why: str
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> BackendRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no backend {name!r}, there are {', '.join(row.name for row in self.rows)}")

    _HEAD = (
        *("backend", "how, or why not"),
        *("speed", "SQNR (dB)", "SQNR, all samples together (dB)"),
        *("MiB", "int8 kernels", "accuracy"),
    )

    def _table(self) -> list[list[str]]:
        return [row._cells(row.name == self.chosen, row.name == self.baseline) for row in self.rows]

    def __str__(self) -> str:
        table = text_table(self._HEAD, self._table(), names=2)
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([self.why, f"speed against {self.baseline}:", table, *notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = html_table(self._HEAD, self._table(), names=2)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        why = html.escape(f"{self.why} Speed against {self.baseline}:")
        return f"<p>{why}</p>{table}{notes}"
