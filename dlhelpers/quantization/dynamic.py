"""Do 8-bit weights pay without calibration? Activations get their range anew at each call."""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from dlhelpers.arguments import need_seconds
from dlhelpers.quantization import onnx_roads, torch_roads
from dlhelpers.quantization.batches import read_batches, run_float
from dlhelpers.quantization.report import QuantizationReport, RoadRow
from dlhelpers.quantization.roads import Road, Task, quiet
from dlhelpers.quantization.taking import Builder, QuantizedModel, built, take

__all__ = ["quantize_dynamic"]

_INT8_OPERATORS = (
    *("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"),
    *("DynamicQuantizeLSTM", "ConvInteger"),
)
_KINDS = {nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell}


@torch.random.fork_rng(devices=[])  # modules that are made draw weights
def quantize_dynamic(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    min_sqnr_db: float = 20.0,
    budget_s: float = 1.0,
    progress: bool | None = None,
) -> QuantizedModel:
    """Return the model with 8-bit weights in linear and recurrent layers, no calibration needed.

    Args:
        model: float32, on the CPU; it is copied, and taken in eval mode.
        example_inputs: a tensor or a tuple of positional inputs: torch.ao's engines and ONNX
            Runtime are raced on them, and the fastest right road is taken, which may be float.
            Without them torch.ao's default engine is taken, unmeasured.
        min_sqnr_db, budget_s, progress: as for ``quantize_static``.

    Raises:
        ValueError: the model has no linear or recurrent layer, or raises on the inputs; or
            budget_s is not positive.

    >>> fast = quantize_dynamic(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)))
    >>> fast(torch.rand(2, 64)).shape
    torch.Size([2, 4])
    """
    need_seconds("budget_s", budget_s)
    if not any(type(module) in _KINDS for module in model.modules()):
        names = ", ".join(sorted(kind.__name__ for kind in _KINDS))
        raise ValueError(
            f"the model has no layer to quantize dynamically ({names}): convolutions need "
            "quantize_static and a calibration set"
        )
    original = copy.deepcopy(model).eval()
    if example_inputs is None:
        return _unmeasured(original)
    batches = read_batches([example_inputs])
    outputs = run_float(original, batches)
    task = Task(original, batches, outputs, "min-max", torch.get_num_threads())
    plan: dict[str, tuple[str, Builder]] = {
        "eager float32": ("float32", torch_roads.eager),
        "ONNX Runtime float32": ("float32", onnx_roads.onnxruntime_float),
        "ONNX Runtime dynamic int8": ("int8", _onnxruntime),
    }
    for engine in torch_roads.ENGINES:
        plan[f"torch.ao {engine} dynamic int8"] = ("int8", partial(_torch_ao, engine=engine))
    start = perf_counter()
    rows, roads = built(task, plan, min_sqnr_db, progress)
    return take(
        task,
        rows,
        roads,
        min_sqnr_db=min_sqnr_db,
        budget_s=budget_s,
        notes=[],
        start=start,
        progress=progress,
    )


def _converted(model: nn.Module, engine: str) -> nn.Module:
    ao = torch_roads.torch_ao_module("quantization", engine)
    # torch.ao replaces children alone; qnnpack and onednn use all 8 bits of the activations
    holder = nn.ModuleList([copy.deepcopy(model)])
    observer = ao.PlaceholderObserver.with_args(
        dtype=torch.quint8,
        quant_min=0,
        quant_max=255,
        is_dynamic=True,
        reduce_range=engine == "x86",
    )
    config = ao.QConfig(activation=observer, weight=ao.default_weight_observer)
    with torch_roads.engine_set(engine), quiet():
        return ao.quantize_dynamic(holder, dict.fromkeys(_KINDS, config), inplace=True)[0]


def _torch_ao(task: Task, engine: str) -> Road:
    model = _converted(task.model, engine)
    run = torch_roads.with_engine(torch_roads.runner(model), engine)
    run(task.batches[0])  # here qnnpack says once, from C++, that it ignores reduce_range
    kernels = torch_roads.quantized_layers(model)
    name = f"torch.ao {engine} dynamic int8"
    size = torch_roads.bytes_of(model)
    return Road(name, "int8", run, size, kernels, takes_any_batch=True)


def _onnxruntime(task: Task) -> Road:
    graph = onnx_roads.graph_of(task)
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(graph.proto.SerializeToString())
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)
        data = target.read_bytes()
    session, counts = graph.session(data)
    kernels = sum(counts[name] for name in _INT8_OPERATORS)
    run = onnx_roads.runner(session)
    name = "ONNX Runtime dynamic int8"
    return Road(name, "int8", run, len(data), kernels, "", data)


def _unmeasured(model: nn.Module) -> QuantizedModel:
    engine = torch.backends.quantized.engine
    converted = _converted(model, engine)
    call = torch_roads.with_engine(partial(_call, converted), engine)
    name = f"torch.ao {engine} dynamic int8"
    size = torch_roads.bytes_of(converted)
    road = Road(name, "int8", call, size)
    row = RoadRow(name, "int8", nbytes=size, note="not measured: give example_inputs")
    why = f"{name}: taken without measuring."
    return QuantizedModel(road, None, QuantizationReport((row,), name, name, 0.0, why))


def _call(model: nn.Module, batch: tuple[Any, ...]) -> Any:
    with torch.no_grad():
        return model(*batch)
