"""Do 8-bit weights pay without calibration? Activations get their range anew at each call."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from dlhelpers.arguments import need_decibels, need_seconds
from dlhelpers.models import copied, need_model, unwrapped
from dlhelpers.quantization import onnx_backends, torch_backends
from dlhelpers.quantization.attention import PADDING, run_reference, take_slow_paths_
from dlhelpers.quantization.aware import finished_copy
from dlhelpers.quantization.backends import Backend, Task, own_type, saturates
from dlhelpers.quantization.batches import first_line, read_batches
from dlhelpers.quantization.calling import by_place, signature_of
from dlhelpers.quantization.dynamic_layers import converted, has_layers, kinds
from dlhelpers.quantization.quiet import quiet
from dlhelpers.quantization.report import BackendRow, QuantizationReport
from dlhelpers.quantization.sizes import free_groups
from dlhelpers.quantization.taking import Builder, QuantizedModel, built, take
from dlhelpers.untouched import shared_untouched

__all__ = ["quantize_dynamic"]

_INT8_OPERATORS = (
    *("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"),
    *("DynamicQuantizeLSTM", "ConvInteger"),
)
_NAMED = 4  # layers
_NOT_MEASURED = "not measured: give example_inputs"


@torch.random.fork_rng(devices=[])  # modules that are made draw weights
def quantize_dynamic(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    min_sqnr_db: float = 20.0,
    budget_s: float = 1.0,
    dynamic: Mapping[int, int | Sequence[int]] | None = None,
    progress: bool | None = None,
) -> QuantizedModel:
    """Return the model with 8-bit weights in linear and recurrent layers, no calibration needed.

    Args:
        model: float32, on the CPU; it is copied, and taken in eval mode.
        example_inputs: a tensor or a tuple of positional inputs: torch.ao's engines and ONNX
            Runtime are raced on them, and the fastest right backend is taken, which may be float.
            Without them torch.ao's default engine is taken, unmeasured; layers that are known to
            raise in it stay float, and the report's notes name them.
        min_sqnr_db, budget_s, dynamic, progress: as for ``quantize_static``.

    Raises:
        TypeError: not a module, TorchScript or a graph of torch.export, or it cannot be copied.
        ValueError: the model has no linear or recurrent layer, or raises on the inputs; or
            budget_s is not positive, or min_sqnr_db no number.

    >>> fast = quantize_dynamic(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)))
    >>> fast(torch.rand(2, 64)).shape
    torch.Size([2, 4])
    """
    need_seconds("budget_s", budget_s)
    need_decibels("min_sqnr_db", min_sqnr_db)
    need_model(model, "quantize", but=("meta",))
    if not has_layers(model):
        need_model(model, "quantize", but=("scripted", "exported"))
        raise ValueError(
            f"the model has no layer to quantize dynamically ({kinds()}): convolutions need "
            "quantize_static and a calibration set"
        )
    with torch.inference_mode(False), shared_untouched(unwrapped(model)):
        original = finished_copy(model)
        if example_inputs is None:
            return _unmeasured(original)
        return _measured(original, example_inputs, min_sqnr_db, budget_s, dynamic, progress)


def _measured(
    original: nn.Module,
    example_inputs: Any,
    min_sqnr_db: float,
    budget_s: float,
    dynamic: Mapping[int, int | Sequence[int]] | None,
    progress: bool | None,
) -> QuantizedModel:
    batches = read_batches([example_inputs])
    outputs, notes = run_reference(original, batches)
    task = Task(original, batches, outputs, "min-max", torch.get_num_threads())
    samples = task.judge.layout.inputs
    task.free = free_groups(copied(original), batches, outputs, dynamic, samples)
    own = task.precision
    plan: dict[str, tuple[str, Builder]] = {
        f"eager {own}": (own, torch_backends.eager),
        "ONNX Runtime float32": ("float32", onnx_backends.onnxruntime_float),
        "ONNX Runtime dynamic int8": ("int8", _onnxruntime),
    }
    if saturates():
        build = partial(_onnxruntime, reduce_range=True)
        plan["ONNX Runtime dynamic int8, reduced range"] = ("int8", build)
    for engine in torch_backends.ENGINES:
        plan[f"torch.ao {engine} dynamic int8"] = ("int8", partial(_torch_ao, engine=engine))
    start = perf_counter()
    rows, backends = built(task, plan, min_sqnr_db, progress)
    return take(
        task,
        rows,
        backends,
        min_sqnr_db=min_sqnr_db,
        budget_s=budget_s,
        notes=notes,
        start=start,
        progress=progress,
    )


def _torch_ao(task: Task, engine: str) -> Backend:
    model, left = converted(task.model, engine, reduce_range=_is_reduced(engine))
    run = torch_backends.with_engine(torch_backends.runner(model), engine)
    run(task.batches[0])  # what raises here is dropped
    kernels = torch_backends.quantized_layers(model)
    name = f"torch.ao {engine} dynamic int8"
    size = torch_backends.bytes_of(model)
    return Backend(name, "int8", run, size, kernels, _said(left), takes_any_batch=True)


def _is_reduced(engine: str) -> bool:
    """Whether activations get 7 bits, as x86 expects, and onednn where sums overflow."""
    return engine == "x86" or (engine == "onednn" and saturates())


def _said(left: list[str]) -> str:
    more = [f"and {len(left) - _NAMED} more"] if len(left) > _NAMED else []
    return f"float: {'; '.join([*left[:_NAMED], *more])}" if left else ""


def _onnxruntime(task: Task, *, reduce_range: bool = False) -> Backend:
    graph = onnx_backends.graph_of(task)
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(graph.proto.SerializeToString())
        options = {"per_channel": True, "reduce_range": reduce_range}
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, **options)
        data = target.read_bytes()
    session, counts = graph.session(data)
    kernels = sum(counts[name] for name in _INT8_OPERATORS)
    run = onnx_backends.runner(session)
    name = "ONNX Runtime dynamic int8" + ", reduced range" * reduce_range
    return Backend(
        name, "int8", run, len(data), kernels, "7-bit weights" * reduce_range, data,
        sizes=graph.sizes,
    )  # fmt: skip


class _Unmeasured(QuantizedModel):
    """On torch.ao's engine, unless the first call shows that the model cannot run there."""

    def __init__(self, backend: Backend, report: QuantizationReport, model: nn.Module) -> None:
        super().__init__(backend, None, report, takes=signature_of(model))
        self._spare = [model]  # until the engine ran once; no submodule

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Return what the model returns."""
        if options and self._takes is not None:
            inputs = by_place(self._takes, inputs, options)
        try:
            found = super().forward(*inputs)
        except Exception as error:
            if not self._spare:
                raise
            spare = self._spare[0]
            try:
                found = _call(spare, inputs)
            except Exception:  # the model itself does not take that
                raise error  # noqa: B904
            self._stay_float(spare, error)
        self._spare.clear()
        return found

    def _stay_float(self, model: nn.Module, error: Exception) -> None:
        why = first_line(error.__cause__ or error)
        note = f"{self._backend.name} raised in the first call ({why}): the model stays float"
        warnings.warn(f"{note}. Give example_inputs to see that at once", stacklevel=5)
        self._backend, row = _float_backend(model)
        notes = (*self._report.notes, note)
        self._report = QuantizationReport(
            (row,), row.name, row.name, 0.0, f"{row.name}: {note}.", notes
        )


def _float_backend(model: nn.Module) -> tuple[Backend, BackendRow]:
    precision = own_type(model)
    name, size = f"eager {precision}", torch_backends.bytes_of(model)
    backend = Backend(name, precision, partial(_call, model), size)
    return backend, BackendRow(name, precision, nbytes=size, note=_NOT_MEASURED)


def _unmeasured(model: nn.Module) -> QuantizedModel:
    engine = torch.backends.quantized.engine
    encoders = take_slow_paths_(model)
    made, left = converted(model, engine, reduce_range=_is_reduced(engine))
    name = f"torch.ao {engine} dynamic int8"
    kernels, size = torch_backends.quantized_layers(made), torch_backends.bytes_of(made)
    if kernels:
        call = torch_backends.with_engine(partial(_call, made), engine)
        backend = Backend(name, "int8", call, size, kernels)
        row = BackendRow(name, "int8", nbytes=size, int8_kernels=kernels, note=_NOT_MEASURED)
    else:
        backend, row = _float_backend(model)
    why = f"{backend.name}: taken without measuring."
    notes = tuple(filter(None, [_said(left), PADDING * bool(encoders)]))
    report = QuantizationReport((row,), backend.name, backend.name, 0.0, why, notes)
    if kernels:
        return _Unmeasured(backend, report, model)
    return QuantizedModel(backend, None, report, takes=signature_of(model))


def _call(model: nn.Module, batch: tuple[Any, ...]) -> Any:
    with torch.no_grad():
        return model(*batch)
