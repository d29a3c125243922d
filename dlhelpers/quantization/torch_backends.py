"""torch's own backends: eager and compiled float, half precision, the engines of torch.ao, PT2E."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers import machine
from dlhelpers.models import copied
from dlhelpers.quantization.backends import Backend, BackendError, Task, in_single, in_type, needed
from dlhelpers.quantization.batches import Batch, Outputs, Tensors
from dlhelpers.quantization.quiet import quiet
from dlhelpers.quantization.sizes import Flat, Place, exported_with
from dlhelpers.trees import map_leaves, tensors_in

__all__ = [
    "ENGINES",
    "bytes_of",
    "cast",
    "compiled",
    "eager",
    "engine_set",
    "pt2e",
    "quantized_layers",
    "runner",
    "torch_ao",
    "torch_ao_module",
    "with_engine",
]

ENGINES: tuple[str, ...] = ("x86", "onednn", "qnnpack")
_HALF = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "neon_bf16"},
    torch.float16: {"avx512_fp16", "neon"},
}


def runner(model: Callable[..., Any]) -> Callable[[Batch], Tensors]:
    """Return the model as a backend's function."""

    def run(batch: Batch) -> Tensors:
        with torch.no_grad():
            outputs = Outputs(model(*batch))
        return Tensors(outputs.tensors, outputs.structure)

    return run


def bytes_of(model: nn.Module) -> int:
    """Return how long the saved ``state_dict`` is."""
    buffer = io.BytesIO()
    with quiet():
        torch.save(model.state_dict(), buffer)
    return buffer.tell()


def eager(task: Task, *, channels_last: bool = False) -> Backend:
    """Return the model in eager mode, in its own type, BatchNorm folded."""
    own = task.precision
    if not channels_last:
        return Backend(f"eager {own}", own, runner(task.model), bytes_of(task.model))
    if not any(t.dim() == 4 for t in tensors_in(task.batches[0])):
        raise BackendError("no input has four dimensions")
    model = copied(task.model).to(memory_format=torch.channels_last)
    plainly = runner(model)

    def turned(leaf: Any) -> Any:
        is_image = isinstance(leaf, Tensor) and leaf.dim() == 4
        return leaf.contiguous(memory_format=torch.channels_last) if is_image else leaf

    def run(batch: Batch) -> list[Tensor]:
        return plainly(map_leaves(turned, batch))

    return Backend(f"eager {own}, channels_last", own, run, bytes_of(model))


def cast(task: Task, dtype: torch.dtype) -> Backend:
    """Return the model in eager mode with weights and inputs in another floating-point type."""
    name = str(dtype).removeprefix("torch.")
    types = [t.dtype for t in task.outputs[0].tensors]
    model = copied(task.model).to(dtype)
    plainly = runner(model)

    def run(batch: Batch) -> list[Tensor]:
        found = plainly(in_type(batch, dtype))
        back = [t.to(types[min(i, len(types) - 1)]) for i, t in enumerate(found)]
        return Tensors(back, found.structure)

    note = ""
    if dtype in _HALF:
        has = sorted(_HALF[dtype] & set(machine.describe().simd))
        note = f"the processor has {', '.join(has) or 'no instruction for it'}"
    return Backend(f"eager {name}", name, run, bytes_of(model), 0, note, takes_any_batch=True)


def _frozen(model: nn.Module) -> Callable[[Batch], list[Tensor]]:
    """Compile with constant weights; a new shape of inputs compiles again."""
    from torch._inductor import config

    function = torch.compile(model)
    plainly = runner(function)
    seen: set[tuple[Any, ...]] = set()

    def run(batch: Batch) -> list[Tensor]:
        shapes = tuple(tuple(t.shape) for t in tensors_in(batch))
        if shapes in seen:
            return plainly(batch)
        with quiet(), config.patch(freezing=True):
            found = plainly(batch)
        seen.add(shapes)
        return found

    return run


def compiled(task: Task) -> Backend:
    """Return the compiled model with frozen weights, in its own type."""
    if machine.describe().compiler is None:
        raise BackendError("no C++ compiler was found: torch.compile needs one")
    own, before = task.precision, _compiled_graphs()
    run = _frozen(copied(task.model))
    run(task.batches[0])
    graphs = None if before is None else _compiled_graphs() - before
    if graphs == 0:
        raise BackendError("torch.compile left all of it in eager mode: nothing was compiled")
    note = f"in {graphs} graphs, eager mode between them" if graphs and graphs > 1 else ""
    return Backend(f"torch.compile {own}", own, run, bytes_of(task.model), 0, note)


def _compiled_graphs() -> int | None:
    """Return how many graphs torch.compile has made; None where torch does not count them."""
    try:
        from torch._dynamo.utils import counters

        return counters["stats"].get("unique_graphs", 0)
    except (ImportError, KeyError, AttributeError):
        return None


def quantized_layers(model: nn.Module) -> int:
    """Return how many of torch.ao's integer layers with weights a model has."""
    return sum(
        "quantized" in type(module).__module__
        and (callable(getattr(module, "weight", None)) or hasattr(module, "get_weight"))
        for module in model.modules()
    )


@contextmanager
def engine_set(name: str) -> Iterator[None]:
    """Let torch.ao use an engine inside of a ``with`` block."""
    kept = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = kept


def with_engine(run: Callable[[Batch], Any], name: str) -> Callable[[Batch], Any]:
    """Return the function, run with an engine of torch.ao whatever is set."""

    def switched(batch: Batch) -> Any:
        if torch.backends.quantized.engine == name:
            return run(batch)
        with engine_set(name):
            return run(batch)

    return switched


def torch_ao_module(name: str, engine: str) -> ModuleType:
    """Return a module of torch.ao.

    Raises:
        BackendError: it is gone from this version of torch, or the engine is not in this build.
    """
    if engine not in torch.backends.quantized.supported_engines:
        raise BackendError(f"this build of torch has no engine {engine}")
    try:
        with quiet():
            return importlib.import_module(f"torch.ao.{name}")
    except ImportError as error:
        raise BackendError(f"this version of torch has no torch.ao.{name} any more") from error


def torch_ao(task: Task, engine: str) -> Backend:
    """Return the model quantized by torch.ao's FX workflow for one of its engines.

    Its own observers choose the ranges.
    """
    ao = torch_ao_module("quantization", engine)
    fx = torch_ao_module("quantization.quantize_fx", engine)
    with engine_set(engine), quiet(), torch.no_grad():
        mapping = ao.get_default_qconfig_mapping(engine)
        given = [in_single(batch) for batch in task.batches]
        observed = fx.prepare_fx(copied(task.single), mapping, given[0])
        for batch in given:
            observed(*batch)
        model = fx.convert_fx(observed)
    plainly = runner(model.forward)  # __call__ prints the graph where it raises
    run = with_engine(lambda batch: plainly(in_single(batch)), engine)
    kernels = quantized_layers(model)
    return Backend(
        f"torch.ao {engine} int8", "int8", run, bytes_of(model), kernels,
        "calibrated by torch's observers", takes_any_batch=True,
    )  # fmt: skip


def pt2e(task: Task) -> Backend:
    """Return the model quantized by torchao's PT2E for the x86 Inductor, compiled and frozen."""
    needed("torchao")
    if machine.describe().compiler is None:
        raise BackendError("no C++ compiler was found: torch.compile needs one")
    with quiet(), torch.no_grad():
        from torch._dynamo.utils import counters
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        batch = task.batches[0]

        def export(batch: Batch, shapes: tuple[Any, ...]) -> tuple[Any, Any]:
            tensors = tuple(tensors_in(in_single(batch)))
            flat = Flat(task.single, batch)
            program = torch.export.export(flat, tensors, dynamic_shapes=(shapes,))
            module = program.module()
            return program, lambda inputs: list(module(*tensors_in(in_single(inputs))))

        program, sizes = exported_with(batch, task.free, export, _is_free)
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        observed = prepare_pt2e(program.module(), quantizer)
        for given in task.batches:
            if not sizes.why_not(given):
                observed(*tensors_in(in_single(given)))
        model = convert_pt2e(observed)
        before = sum(v for k, v in counters["inductor"].items() if _is_lowered(k))
        plainly = _frozen(model)
        plainly(tuple(tensors_in(in_single(batch))))
        kernels = sum(v for k, v in counters["inductor"].items() if _is_lowered(k)) - before
    return Backend(
        "PT2E int8", "int8", lambda batch: list(plainly(tuple(tensors_in(in_single(batch))))),
        bytes_of(model), kernels, "calibrated by torchao's observers", sizes=sizes,
    )  # fmt: skip


def _is_free(program: Any, place: Place) -> bool:
    """Whether torch.export left a dimension of an input open."""
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes}
    return not isinstance(nodes[names[place[0]]].meta["val"].shape[place[1]], int)


def _is_lowered(counter: str) -> bool:
    return counter.startswith(("qconv", "qlinear")) and counter.endswith("lower_count")
