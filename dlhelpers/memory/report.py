"""What was alive at the peak, what was it, and where did it happen?"""

from __future__ import annotations

import linecache
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dlhelpers.memory.accounting import Op, Storage
from dlhelpers.tables import facts_table

__all__ = ["KINDS", "MemoryReport", "mib", "report_of"]

KINDS = (
    "parameters",
    "optimizer state",
    "inputs",
    "gradients",
    "activations",
    "temporaries",
    "kernel buffers",
)


def mib(nbytes: float) -> str:
    """Return bytes as MiB (2^20 bytes) with one digit.

    >>> mib(3 << 20)
    '3.0 MiB'
    """
    return f"{nbytes / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class MemoryReport:
    """Bytes alive during a run, at its peak and at its end.

    The kinds: ``parameters`` (with the model's buffers), ``optimizer state``, ``inputs`` (what else
    was there before), ``gradients`` (of parameters), ``activations`` (saved for the backward pass),
    ``temporaries`` (all other tensors) and ``kernel buffers`` (what operators take inside and give
    back).

    Attributes:
        peak_bytes: all that is alive at the peak, parameters included; the sum of ``at_peak``.
        at_peak: kind -> bytes.
        at_end: kind -> bytes still alive when the run had returned its result.
        op, phase, module: operator at the peak; forward, backward or step; the module at work.
        line: the line of user code at the peak; empty where its source is not to be had.
        code: its file and number.
        timeline: kind -> bytes while each operator ran, in order.
        phases: phase of each operator.
        measured: True for the allocator's record, False for an estimate.
        notes: what an estimate could not know.
        loop: what an estimate played; empty for a measured run.
    """

    peak_bytes: int
    at_peak: Mapping[str, int]
    at_end: Mapping[str, int]
    op: str
    phase: str
    module: str
    line: str
    code: tuple[str, int] = field(repr=False)
    timeline: Mapping[str, Sequence[int]] = field(repr=False)
    phases: Sequence[str] = field(repr=False)
    measured: bool
    notes: tuple[str, ...] = ()
    loop: str = ""

    @property
    def tensor_bytes(self) -> int:
        """The most bytes of tensors alive at once: without kernel buffers, equal on any machine."""
        tensors = (line for kind, line in self.timeline.items() if kind != "kernel buffers")
        return max(sum(bytes_at) for bytes_at in zip(*tensors, strict=True))

    def __str__(self) -> str:
        how = "measured by the allocator" if self.measured else "estimated"
        rows = [f"peak {mib(self.peak_bytes)} ({how})"]
        for kind in KINDS:
            if self.at_peak[kind]:
                share = self.at_peak[kind] / self.peak_bytes
                rows.append(f"  {kind:16} {mib(self.at_peak[kind]):>14} {share:6.1%}")
        rows.append(f"at     {self._where()}")
        if self.line:
            rows.append(f"line   {self.line}")
        if self.loop:
            rows.append(f"loop   {self.loop}")
        return "\n".join([*rows, *(f"note   {note}" for note in self.notes)])

    def _where(self) -> str:
        inside = f", module {self.module}" if self.module else ""
        return f"{self.op} in the {self.phase} pass{inside}".replace(
            "step pass", "optimizer's step"
        )

    def _repr_html_(self) -> str:
        rows = [("peak", f"{mib(self.peak_bytes)}, {'measured' if self.measured else 'estimated'}")]
        rows += [(kind, mib(self.at_peak[kind])) for kind in KINDS if self.at_peak[kind]]
        rows.append(("at", self._where()))
        if self.line:
            rows.append(("line", self.line))
        if self.loop:
            rows.append(("loop", self.loop))
        return facts_table(rows + [("note", note) for note in self.notes])


def report_of(
    ops: Sequence[Op],
    storages: Sequence[Storage],
    totals: Sequence[int],
    *,
    measured: bool,
    granularity: int = 1,
    notes: tuple[str, ...] = (),
    loop: str = "",
) -> MemoryReport:
    """Return the report of a run.

    Args:
        ops, storages: what the accounting saw.
        totals: bytes alive while each operator ran, kernels included; what is not a storage's is
            a kernel's.
        granularity: bytes to which the allocator rounds each storage up.
        notes, loop: the report's.
    """
    timeline = by_kind(ops, storages, granularity)
    known = [sum(bytes_at) for bytes_at in zip(*timeline.values(), strict=True)]
    timeline["kernel buffers"] = [max(0, t - k) for t, k in zip(totals, known, strict=True)]
    most = [k + b for k, b in zip(known, timeline["kernel buffers"], strict=True)]
    peak = max(range(len(ops)), key=most.__getitem__)
    last = dict.fromkeys(KINDS, 0)
    for storage in storages:
        if storage.died is None:
            last[storage.is_a] += _rounded(storage.nbytes, granularity)
    op = ops[peak]
    return MemoryReport(
        peak_bytes=most[peak],
        at_peak={kind: timeline[kind][peak] for kind in KINDS},
        at_end=last,
        op=op.name.removeprefix("aten.").split(".")[0],
        phase=op.phase,
        module=op.module,
        line=linecache.getline(*op.code).strip(),
        code=(Path(op.code[0]).name, op.code[1]),
        timeline=timeline,
        phases=[op.phase for op in ops],
        measured=measured,
        notes=notes,
        loop=loop,
    )


def by_kind(
    ops: Sequence[Op], storages: Sequence[Storage], granularity: int = 1
) -> dict[str, list[int]]:
    """Return kind -> bytes of the storages alive while each operator ran."""
    changes = {kind: [0] * (len(ops) + 1) for kind in KINDS}
    for storage in storages:
        born, died = max(0, storage.born), len(ops) if storage.died is None else storage.died
        if born < died:
            changes[storage.is_a][born] += _rounded(storage.nbytes, granularity)
            changes[storage.is_a][died] -= _rounded(storage.nbytes, granularity)
    levels: dict[str, list[int]] = {}
    for kind, steps in changes.items():
        level, levels[kind] = 0, []
        for step in steps[:-1]:
            level += step
            levels[kind].append(level)
    return levels


def _rounded(nbytes: int, granularity: int) -> int:
    return -(-nbytes // granularity) * granularity
