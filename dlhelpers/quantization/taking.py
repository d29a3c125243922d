"""Build the backends, keep the right ones, race them, and take the fastest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.files import write_whole
from dlhelpers.progress import bar
from dlhelpers.quantization.backends import Backend, BackendError, Task
from dlhelpers.quantization.batches import (
    Batch,
    Structure,
    described,
    first_line,
    is_same,
    named_leaves,
)
from dlhelpers.quantization.calling import by_place, signature_of
from dlhelpers.quantization.judging import Judge
from dlhelpers.quantization.quiet import quiet
from dlhelpers.quantization.racing import Pace, fastest, raced
from dlhelpers.quantization.report import BackendRow, QuantizationReport
from dlhelpers.trees import tensors_in

__all__ = ["Builder", "QuantizedModel", "built", "take", "tried"]

Builder = Callable[[Task], Backend]
# what rounding leaves where a backend of the model's own type computes in another order
_ROUNDING_DB = {"float64": 60.0, "float32": 60.0, "float16": 40.0, "bfloat16": 20.0}


class _Fixed:
    """What stood in the place of an input that is no tensor."""

    def __init__(self, value: Any) -> None:
        self.value = value


class QuantizedModel(nn.Module):
    """The model on the backend that was taken; called as the model was, for inference alone.

    Not differentiable: what it computes with lives in the engine. Its one parameter is empty, and
    tells the device and type of the model.
    """

    def __init__(
        self,
        backend: Backend,
        structure: Structure | None,
        report: QuantizationReport,
        backends: dict[str, Backend] | None = None,
        example: Batch = (),
        takes: inspect.Signature | None = None,
    ) -> None:
        super().__init__()
        own = "float32" if backend.precision == "int8" else backend.precision
        dtype = getattr(torch, own) if structure is None else structure.dtype
        self._float = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        self._takes = takes
        self._backend, self._structure, self._report = backend, structure, report
        self._backends = backends or {}
        self._leaves = [
            (name, None if isinstance(leaf, Tensor) else _Fixed(leaf))
            for name, leaf in named_leaves(example)
        ]
        self.eval()

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Return what the model returns, in its structure.

        Args:
            inputs: the model's positional inputs, on the CPU, nested as when it was quantized.
            options: inputs by name, of those that have a place in the model's forward.

        Raises:
            TypeError: an input by name has no place.
            ValueError: an input that is no tensor is another one than when it was quantized, or
                the backend was built for tensors of other sizes or types.
        """
        if options:
            inputs = by_place(self._takes, inputs, options)
        if self._leaves:
            self._check(inputs)
        try:
            found = self._backend.run(inputs)
        except Exception as error:
            if self._backend.precision != "int8" and self._backend.sizes is None:
                raise  # it computes with the model itself, which says what is wrong
            given = ", ".join(map(described, tensors_in(inputs)))
            raise ValueError(
                f"{self._backend.name} raises on inputs {given}: {first_line(error)}. Give what "
                "the model takes; for other sizes quantize again, with dynamic= or calibration "
                "batches of these sizes as well"
            ) from error
        if self._structure is None:
            return found
        structure = getattr(found, "structure", self._structure)
        return structure.restore(found, as_were=structure is self._structure)

    def _check(self, inputs: Batch) -> None:
        given = dict(named_leaves(inputs))
        for name, fixed in self._leaves:
            if fixed is not None and not (name in given and is_same(given[name], fixed.value)):
                now = described(given[name]) if name in given else "nothing"
                raise ValueError(
                    f"{name} was {fixed.value!r} when the model was quantized and is part of it "
                    f"now, got {now}: quantize again with the other value"
                )
            if fixed is None and not isinstance(given.get(name), Tensor):
                now = repr(given[name]) if name in given else "nothing"
                raise ValueError(
                    f"{name} was a tensor when the model was quantized, got {now}: give a tensor, "
                    "or quantize again with inputs of this kind"
                )
        if more := given.keys() - {name for name, _ in self._leaves}:
            raise ValueError(
                f"{', '.join(sorted(more))} was not there when the model was quantized: leave it "
                "out, or quantize again with it"
            )
        if self._backend.sizes is not None and (why := self._backend.sizes.why_not(inputs)):
            raise ValueError(
                f"{self._backend.name} was built for inputs of other sizes or types: {why}. "
                "Quantize again with calibration batches of several sizes, or dynamic= for the "
                "dimensions that change"
            )

    def report(self) -> QuantizationReport:
        """Return what became of every backend."""
        return self._report

    def on(self, name: str) -> QuantizedModel:
        """Return the model on another backend of the report, right or wrong.

        Raises:
            KeyError: that backend was not built, or ``keep_backends`` was not given.
        """
        if name not in self._backends:
            raise KeyError(
                f"{name!r} is not among the kept backends, {list(self._backends)}: quantize "
                "with keep_backends=True, and look at report() for those that were built"
            )
        other = QuantizedModel(
            self._backends[name], self._structure, self._report, self._backends, takes=self._takes
        )
        other._leaves = self._leaves
        return other

    def save(self, path: str | Path) -> Path:
        """Write the ONNX file of the backend that was taken; whole, or not at all.

        Raises:
            ValueError: it is one of torch's backends, which have no file of their own; or the path
                does not end in ``.onnx``.
            FileNotFoundError: there is no such folder.
        """
        if self._backend.onnx is None:
            raise ValueError(
                f'{self._backend.name} has no ONNX file: quantize with engine="onnxruntime" for one'
            )
        content = self._backend.onnx
        return write_whole(path, (".onnx",), lambda name: Path(name).write_bytes(content))

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self._backend.name} lives in an engine and cannot be pickled or copied: write it "
            "with save(path), or quantize again"
        )


def built(
    task: Task,
    plan: dict[str, tuple[str, Builder]],
    min_sqnr_db: float,
    progress: bool | None,
    kept: dict[str, Backend] | None = None,
) -> tuple[list[BackendRow], dict[str, Backend]]:
    """Return a row for every backend, and the right ones; ``kept`` takes the wrong ones, too."""
    rows, backends, pace = [], {}, Pace()
    with bar(plan.items(), progress=progress, leave=False, delay=1, unit="backend") as shown:
        for name, (precision, build) in shown:
            shown.set_postfix_str(name, refresh=True)
            row, backend = tried(name, precision, build, task, min_sqnr_db, kept, pace)
            rows.append(row)
            if backend is not None:
                backends[name] = backend
    return rows, backends


def tried(
    name: str,
    precision: str,
    build: Builder,
    task: Task,
    min_sqnr_db: float,
    kept: dict[str, Backend] | None = None,
    pace: Pace | None = None,
) -> tuple[BackendRow, Backend | None]:
    """Build one backend and look at its output.

    Returns:
        Its row; and the backend, if it is right and not so slow, next to those ``pace`` has seen,
        that a race would only take time.
    """
    row = BackendRow(name, precision)
    judge, pace = task.judge, pace or Pace()
    try:
        with quiet():
            backend = build(task)
            judge = judge.of_sizes(backend.sizes)
            found, too_slow = pace.outputs(backend, judge.batches, task.batches[0])
        ratios = judge.ratios(found) if found else None
    except BackendError as error:
        return replace(row, dropped=str(error)), None
    except Exception as error:  # an engine's own failure is a fact to report
        return replace(row, dropped=f"{type(error).__name__}: {first_line(error)}"), None
    if kept is not None:
        kept[name] = backend
    ratio, total = ratios or (None, None)
    row = replace(
        row,
        sqnr_db=ratio,
        total_sqnr_db=total,
        nbytes=backend.nbytes,
        int8_kernels=backend.int8_kernels,
        note=", ".join(filter(None, (backend.note, judge.share_of(task.judge)))),
    )
    if precision == "int8" and not backend.int8_kernels:
        return replace(row, dropped="its graph holds no int8 kernel"), None
    if too_slow:
        return replace(row, dropped=too_slow), None
    is_own = precision == task.precision
    if ratio is None:
        if judge.accuracy is None and not is_own:
            why = "the shapes of its outputs depend on the data: give test="
            return replace(row, dropped=why), None
    # the own type differs by rounding alone, and one such backend there has to be
    elif ratio < (min(min_sqnr_db, _ROUNDING_DB.get(precision, 0.0)) if is_own else min_sqnr_db):
        below = f"SQNR {ratio:.1f} dB lies below {min_sqnr_db:g} dB"
        return replace(row, dropped=judge.unlike(found) or below), None
    if not pace.is_hopeless:  # else the race decides whether the test is worth its time
        row = _tested(row, backend, task)
    return row, None if row.dropped else backend


def _tested(row: BackendRow, backend: Backend, task: Task) -> BackendRow:
    """Return the row with the backend's accuracy, dropped where it lost too much."""
    test = task.judge.accuracy
    if test is None or row.accuracy is not None:
        return row
    is_reference = row.name == f"eager {task.precision}"  # the model itself
    try:
        takes = signature_of(task.model)
        found = test.of(QuantizedModel(backend, task.outputs[0].structure, None, takes=takes))
    except Exception as error:
        if is_reference:
            return row
        why = f"it raises on the test data: {type(error).__name__}: {first_line(error)}"
        return replace(row, dropped=why)
    return replace(row, accuracy=found, dropped="" if is_reference else test.lost(found))


def take(
    task: Task,
    rows: list[BackendRow],
    backends: dict[str, Backend],
    *,
    min_sqnr_db: float,
    budget_s: float,
    notes: list[str],
    start: float,
    kept: dict[str, Backend] | None = None,
    progress: bool | None = None,
) -> QuantizedModel:
    """Race the backends and return the model on the fastest, with the report."""
    batch = task.batches[0]
    if not any(backend.precision == task.precision for backend in backends.values()):
        raise ValueError(
            "the model gives other outputs when it is run again with the same inputs (a random "
            "layer, or a state that it changes): there is nothing to compare int8 with"
        )
    said = f"racing {len(backends)} backends, about {budget_s * len(backends):.0f} s"
    with bar(total=1, desc=said, bar_format="{desc}", progress=progress, leave=False) as shown:
        speeds, baseline, slower = raced(backends, batch, budget_s, task.precision)
        for i, row in enumerate(rows):
            if row.name in slower:
                why = f"about {slower[row.name]:.0f} times slower than {baseline}"
                rows[i] = replace(row, dropped=why)
            elif not row.dropped:
                rows[i] = _tested(
                    replace(row, speed=speeds.get(row.name)), backends[row.name], task
                )
        right = {row.name for row in rows if not row.dropped}
        speeds = {name: speed for name, speed in speeds.items() if name in right}
        chosen = fastest(backends, speeds, baseline, batch, budget_s)
        shown.update()
    structure = task.outputs[0].structure
    shapes = [list(t.shape) for t in tensors_in(batch)]
    threads = f"{task.threads} thread{'s' * (task.threads > 1)}"
    took = f"{threads}, batches of {shapes}, {perf_counter() - start:.0f} s in all"
    notes = [*notes, *_fixed_sizes(backends), took]
    why = _why(backends[chosen], rows, right | slower.keys(), task.judge, min_sqnr_db)
    report = QuantizationReport(tuple(rows), chosen, baseline, min_sqnr_db, why, tuple(notes))
    takes = signature_of(task.model)
    return QuantizedModel(backends[chosen], structure, report, kept, batch, takes)


def _fixed_sizes(backends: dict[str, Backend]) -> list[str]:
    """Return a note for each kind of inputs that some backends are limited to."""
    names: dict[str, list[str]] = {}
    for name, backend in backends.items():
        if backend.sizes is not None and not backend.sizes.are_all_free:
            names.setdefault(str(backend.sizes), []).append(name)
    return [
        f"{', '.join(those)}: for inputs of sizes {sizes}; calibration batches of several sizes, "
        "or dynamic=, free more dimensions"
        for sizes, those in names.items()
    ]


def _why(
    chosen: Backend, rows: list[BackendRow], right: set[str], judge: Judge, min_sqnr_db: float
) -> str:
    bounds = [f"{min_sqnr_db:g} dB"] if judge.is_bounded else []
    if judge.accuracy is not None:
        bounds.append(f"an accuracy within {judge.accuracy.max_drop:g} of the model's")
    bound = " and ".join(bounds)
    if chosen.precision == "int8":
        return f"{chosen.name}: the fastest backend that reaches {bound}."
    tried = [row for row in rows if row.precision == "int8"]
    if not tried:
        return f"{chosen.name}: the fastest backend; no int8 engine was asked for."
    if any(row.name in right for row in tried):
        return f"{chosen.name}: no int8 backend is faster."
    if not bound:
        return f"{chosen.name}: no bound applies to int8 backends, so the model stays float."
    return (
        f"{chosen.name}: no int8 backend was built, or none reached {bound}: the model stays float."
    )
