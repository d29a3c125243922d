"""ONNX Runtime: export once, choose ranges by our calibrators, write Q and DQ nodes.

The exported graph is run batch by batch with its inner tensors as outputs; a calibrator for each
sees them and keeps a histogram. ONNX Runtime's quantizer then writes QuantizeLinear and
DequantizeLinear around the operators, and both engines make integer kernels of them.
"""

from __future__ import annotations

import ast
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlhelpers.quantization.backends import Backend, BackendError, Task, in_single, needed
from dlhelpers.quantization.batches import Batch, first_line
from dlhelpers.quantization.calibrate import Calibrator
from dlhelpers.quantization.quiet import quiet
from dlhelpers.quantization.sizes import Flat, Place, Sizes, exported_with
from dlhelpers.trees import tensors_in

__all__ = [
    "graph_of",
    "onnxruntime_float",
    "onnxruntime_int8",
    "runner",
]

_AUTO = ("min-max", "percentile", "mse")
_INT8_OPERATORS = ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "ConvInteger")
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class _Graph:
    """An ONNX graph of the float model, the ranges of its tensors, and its quantized copies."""

    def __init__(self, task: Task) -> None:
        needed("onnx", "onnxruntime", "onnxscript")
        self.threads = task.threads
        self.proto, self.sizes = self._exported(task)
        self._task = task
        self._boundless: set[str] = set()
        self._found: dict[str, dict[str, tuple[float, float]]] = {}

    def _exported(self, task: Task) -> tuple[Any, Sizes]:
        """Return the model as ONNX, and the sizes that it takes."""

        def export(
            batch: Batch, shapes: tuple[Any, ...]
        ) -> tuple[Any, Callable[[Batch], list[Tensor]]]:
            tensors = tuple(tensors_in(in_single(batch)))
            with quiet(), torch.no_grad():
                program = torch.onnx.export(
                    Flat(task.single, batch),
                    tensors,
                    dynamo=True,
                    verbose=False,
                    dynamic_shapes=(shapes,),
                    input_names=[f"input_{i}" for i in range(len(tensors))],
                    external_data=False,
                )
            proto = program.model_proto
            return proto, runner(_session(proto.SerializeToString(), self._options()))

        def is_free(proto: Any, place: Place) -> bool:
            for given in proto.graph.input:
                if given.name == f"input_{place[0]}":
                    return bool(given.type.tensor_type.shape.dim[place[1]].dim_param)
            return True  # it is not used

        try:
            return exported_with(task.batches[0], task.free, export, is_free)
        except Exception as error:
            raise BackendError(f"torch.onnx.export raises: {_reason(error)}") from error

    def takes(self, batch: Batch) -> bool:
        """Whether the graph was exported for inputs of these sizes, too."""
        return not self.sizes.why_not(batch)

    @cached_property
    def calibrators(self) -> dict[str, dict[str, Calibrator]]:
        """Method -> tensor's name -> what it has seen; made at the first int8 backend."""
        return self._observe(self._task)

    def _observe(self, task: Task) -> dict[str, dict[str, Calibrator]]:
        import onnx
        import onnxruntime
        from onnxruntime.quantization.calibrate import CalibraterBase

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(self.proto.SerializeToString())
            base = CalibraterBase(path, op_types_to_calibrate=_operators())
            names, _ = base.select_tensors_to_calibrate(self.proto)
        watched = onnx.ModelProto()
        watched.CopyFrom(self.proto)
        for name in sorted(names - {output.name for output in watched.graph.output}):
            watched.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        options = self._options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = _session(watched.SerializeToString(), options)
        outputs = [output.name for output in session.get_outputs()]
        methods = _AUTO if task.calibrator == "auto" else (task.calibrator,)
        found = {method: {name: Calibrator(method) for name in sorted(names)} for method in methods}
        for batch in filter(self.takes, task.batches):
            arrays = session.run(None, _fed(_names(session), batch))
            for name, array in zip(outputs, arrays, strict=True):
                if name not in names:
                    continue
                if not np.isfinite(array).all():  # a mask of -inf, say: it has no range
                    self._boundless.add(name)
                    continue
                for calibrators in found.values():
                    calibrators[name].observe(torch.from_numpy(np.atleast_1d(array)))
        return found

    def quantized(
        self,
        method: str,
        *,
        operators: tuple[str, ...] = (),
        float_layers: frozenset[str] = frozenset(),
        reduce_range: bool = False,
    ) -> bytes:
        """Return the graph with Q and DQ nodes: u8 activations, s8 weights for each channel."""
        import onnx
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.calibrate import (
            CalibrationMethod,
            TensorData,
            TensorsData,
        )
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        ranges = {
            name: TensorData(lowest=np.float32(low), highest=np.float32(high))
            for name, (low, high) in self._ranges(method).items()
        }
        without = self.calibrators[method].keys() - ranges.keys()
        copied = onnx.ModelProto()
        copied.CopyFrom(self.proto)
        left_out = [
            node.name
            for node in copied.graph.node
            if _scopes(node) & float_layers
            or {*node.input, *node.output} & without
            or _is_grouped_transposed(node)
        ]
        quantizer = QDQQuantizer(
            copied,
            True,  # a scale for each output channel of the weights
            reduce_range,
            QuantType.QInt8,
            QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, ranges),
            [],
            left_out,
            list(operators) or _operators(),
            {},
        )
        with quiet():
            quantizer.quantize_model()
        quantizer.model.topological_sort()  # ONNX asks for it; its readers differ
        return quantizer.model.model.SerializeToString()

    def _ranges(self, method: str) -> dict[str, tuple[float, float]]:
        """Return the tensors' ranges, searched for once: every mix of layers asks for them."""
        seen = self.calibrators[method]
        if method not in self._found:
            self._found[method] = {
                name: calibrator.range()
                for name, calibrator in seen.items()
                if name not in self._boundless and calibrator.has_seen
            }
        return self._found[method]

    def _options(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 4  # what fails raises as well
        return options

    def session(self, data: bytes) -> tuple[Any, Counter[str]]:
        """Return a session and how often each operator stands in its optimised graph."""
        import onnx

        options = self._options()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimised.onnx"
            options.optimized_model_filepath = str(path)
            session = _session(data, options)
            graph = onnx.load(path, load_external_data=False).graph
        return session, Counter(node.op_type for node in graph.node)


def _operators() -> list[str]:
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QDQRegistry, *QLinearOpsRegistry})


def _scopes(node: Any) -> set[str]:
    """Return the names of the modules that a node stems from."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            names = (name.removeprefix("model.") for name in ast.literal_eval(entry.value))
            return set(names) - {"", "model"}
    return set()


def _is_grouped_transposed(node: Any) -> bool:
    """Whether ONNX Runtime's quantizer raises on it: its scales are not one for each output."""
    groups = [attribute.i for attribute in node.attribute if attribute.name == "group"]
    return node.op_type == "ConvTranspose" and any(group > 1 for group in groups)


def _session(data: bytes, options: Any) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _reason(error: BaseException) -> str:
    """Return the cause's first line: the exporter's own begins with advice and colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _names(session: Any) -> list[str]:
    return [given.name for given in session.get_inputs()]


def _fed(names: list[str], batch: Batch) -> dict[str, np.ndarray]:
    tensors = list(tensors_in(in_single(batch)))
    numbers = (int(name.rpartition("_")[2]) for name in names)
    return {
        name: tensors[i].detach().contiguous().numpy()
        for name, i in zip(names, numbers, strict=True)
    }


def graph_of(task: Task) -> _Graph:
    """Return the exported graph, made once for a task."""
    if "graph" not in task.shared:
        try:
            task.shared["graph"] = _Graph(task)
        except Exception as error:  # for every backend that would export again
            task.shared["graph"] = error
    if isinstance(task.shared["graph"], Exception):
        raise task.shared["graph"]
    return task.shared["graph"]


def runner(session: Any) -> Callable[[Batch], list[Tensor]]:
    """Return a session as a backend's function."""
    names = _names(session)

    def run(batch: Batch) -> list[Tensor]:
        arrays = session.run(None, _fed(names, batch))
        return [torch.from_numpy(np.asarray(array)) for array in arrays]

    return run


def onnxruntime_float(task: Task) -> Backend:
    """Return the model in ONNX Runtime, float32."""
    graph = graph_of(task)
    data = graph.proto.SerializeToString()
    session, _ = graph.session(data)
    return Backend(
        "ONNX Runtime float32", "float32", runner(session), len(data), 0,
        "", data, sizes=graph.sizes,
    )  # fmt: skip


def onnxruntime_int8(
    task: Task, *, reduce_range: bool = False, products_alone: bool = False
) -> Backend:
    """Return the model in ONNX Runtime, int8, by the calibrator of the best SQNR.

    It is the one that decides, on samples that were not calibrated on.

    Args:
        task: with ``float_layers`` those stay float.
        reduce_range: weights of 7 bits, whose sums of two products cannot overflow 16 bits.
        products_alone: quantize convolutions and matrix products, nothing else.
    """
    graph = graph_of(task)
    judge = task.judge.of_sizes(graph.sizes)
    operators = _PRODUCTS if products_alone else ()
    best: tuple[tuple[float, ...], str, bytes, Any, int] | None = None
    for method in graph.calibrators:
        data = graph.quantized(
            method,
            operators=operators,
            float_layers=task.float_layers,
            reduce_range=reduce_range,
        )
        session, counts = graph.session(data)
        run = runner(session)
        found = judge.ratios([run(batch) for batch in judge.batches])
        ratio = found or (-math.inf,)  # where nothing can be compared the first method stays
        if best is None or ratio > best[0]:
            kernels = sum(counts[name] for name in _INT8_OPERATORS)
            best = ratio, method, data, session, kernels
    _, method, data, session, kernels = best
    notes = [f"calibrated by {method}", "7-bit weights" * reduce_range]
    notes += ["only convolutions and products" * products_alone]
    if kept := len(task.float_layers):
        notes.append(f"{kept} layer{'s' * (kept > 1)} float")
    name = "ONNX Runtime int8" + ", reduced range" * reduce_range
    return Backend(
        name, "int8", runner(session), len(data), kernels,
        ", ".join(filter(None, notes)), data, sizes=graph.sizes,
    )  # fmt: skip
