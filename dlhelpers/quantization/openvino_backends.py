"""OpenVINO: the graphs that were exported and quantized for ONNX Runtime, in another engine."""

from __future__ import annotations

import ctypes
import io
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dlhelpers.quantization.backends import Backend, BackendError, Task, in_single, needed
from dlhelpers.quantization.batches import Batch
from dlhelpers.quantization.onnx_backends import graph_of
from dlhelpers.trees import tensors_in

__all__ = ["openvino_float", "openvino_int8", "signal_stack_kept"]


class _Stack(ctypes.Structure):
    """The C library's stack_t on Linux."""

    _fields_ = (
        ("pointer", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_size_t),
    )


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Give this thread its alternate signal stack back.

    OpenVINO 2026.4 leaves one behind that it has freed, and on it Ctrl-C ends in a crash.
    """
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


class _OpenVino:
    """A model in OpenVINO, compiled anew for each shape of the inputs."""

    def __init__(self, data: bytes, precision: str, threads: int) -> None:
        needed("openvino")
        import openvino

        self._core = openvino.Core()
        self._data = data
        self._settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._lock = threading.Lock()
        self._requests: dict[tuple[tuple[int, ...], ...], Any] = {}

    def request(self, tensors: list[Tensor]) -> Any:
        shapes = tuple(tuple(t.shape) for t in tensors)
        if shapes not in self._requests:
            model = self._core.read_model(io.BytesIO(self._data))
            model.reshape({given: list(shapes[_number(given)]) for given in model.inputs})
            with signal_stack_kept():
                compiled = self._core.compile_model(model, "CPU", self._settings)
            if len(self._requests) >= 8:
                self._requests.pop(next(iter(self._requests)))
            self._requests[shapes] = compiled.create_infer_request()
        return self._requests[shapes]

    def __call__(self, batch: Batch) -> list[Tensor]:
        tensors = [t.detach().contiguous() for t in tensors_in(in_single(batch))]
        with self._lock:  # a request holds one call's outputs
            request = self.request(tensors)
            arrays = {i: tensors[_number(x)].numpy() for i, x in enumerate(request.model_inputs)}
            request.infer(arrays, share_inputs=True)
            return [
                torch.from_numpy(request.get_output_tensor(i).data.copy())
                for i in range(len(request.model_outputs))
            ]

    def int8_kernels(self, batch: Batch) -> int:
        """Return how many products run on 8-bit integers."""
        request = self.request(list(tensors_in(batch)))
        counted = 0
        for operator in request.get_compiled_model().get_runtime_model().get_ordered_ops():
            facts: Mapping[str, Any] = operator.get_rt_info()
            kind, precision = (facts[key].astype(str) for key in ("layerType", "runtimePrecision"))
            is_product = kind in ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
            counted += is_product and precision in ("i8", "u8")
        return counted


def _number(given: Any) -> int:
    """Return which tensor of the inputs an input of the graph is."""
    names = (name.rpartition("_")[2] for name in given.get_names() if name.startswith("input_"))
    return int(next(names))


def openvino_float(task: Task, *, precision: str = "float32") -> Backend:
    """Return the model in OpenVINO, float32 or bfloat16."""
    graph = graph_of(task)
    data = graph.proto.SerializeToString()
    run = _OpenVino(data, {"float32": "f32", "bfloat16": "bf16"}[precision], task.threads)
    run.request(list(tensors_in(task.batches[0])))  # compiles: no call's time
    if precision == "float32":
        task.shared["OpenVINO float32"] = run
    elif _is_equal(run, task.shared.get("OpenVINO float32"), task.batches[0]):
        raise BackendError(
            f"its output is bit for bit that of OpenVINO float32: OpenVINO has no {precision} on "
            "this processor"
        )
    name = f"OpenVINO {precision}"
    return Backend(name, precision, run, len(data), 0, "", data, sizes=graph.sizes)


def _is_equal(run: Any, other: Any, batch: Batch) -> bool:
    """Whether two backends give the same bits."""
    return other is not None and all(map(torch.equal, run(batch), other(batch)))


def openvino_int8(task: Task, backend: Backend) -> Backend:
    """Return ONNX Runtime's quantized graph in OpenVINO."""
    run = _OpenVino(backend.onnx, "f32", task.threads)
    kernels = run.int8_kernels(task.batches[0])
    name = backend.name.replace("ONNX Runtime", "OpenVINO")
    note = ", ".join(filter(None, ("ONNX Runtime's file", backend.note)))
    return Backend(
        name, "int8", run, backend.nbytes, kernels, note, backend.onnx, sizes=backend.sizes
    )
