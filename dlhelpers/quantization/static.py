"""Which way of running a model is fastest here, and still right? Build them all, and race them.

Every backend that is installed is built, its output compared with the model's (signal over error in
dB), its graph searched for integer kernels, and its time measured in pairs against the fastest
float32 backend. The fastest right one is returned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from time import perf_counter
from typing import Any

import torch
from torch import nn

from dlhelpers.arguments import need_decibels, need_seconds
from dlhelpers.fusion import fuse_conv_bn
from dlhelpers.models import copied, need_model, unwrapped
from dlhelpers.quantization import onnx_backends, openvino_backends, torch_backends
from dlhelpers.quantization.accuracy import Test, accuracy_of
from dlhelpers.quantization.attention import run_reference
from dlhelpers.quantization.aware import finished_copy
from dlhelpers.quantization.backends import Backend, Task, saturates
from dlhelpers.quantization.batches import first_line, read_batches
from dlhelpers.quantization.calibrate import CALIBRATORS
from dlhelpers.quantization.judging import held_out, most_common_first
from dlhelpers.quantization.report import BackendRow
from dlhelpers.quantization.sensitivity import ranked_layers
from dlhelpers.quantization.sizes import free_groups
from dlhelpers.quantization.taking import (
    Builder,
    QuantizedModel,
    built,
    take,
    tried,
)
from dlhelpers.untouched import shared_untouched

__all__ = ["ENGINES", "quantize_static"]

ENGINES: tuple[str, ...] = (
    "eager",
    "compile",
    "onnxruntime",
    "openvino",
    "pt2e",
    *torch_backends.ENGINES,
)


@torch.random.fork_rng(devices=[])  # modules that are made draw weights
def quantize_static(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    calibrator: str = "auto",
    engine: str | Sequence[str] = "auto",
    min_sqnr_db: float = 20.0,
    test: Test | None = None,
    max_drop: float = 0.01,
    budget_s: float = 1.0,
    keep_backends: bool = False,
    dynamic: Mapping[int, int | Sequence[int]] | None = None,
    progress: bool | None = None,
) -> QuantizedModel:
    """Return the model on the fastest backend of this machine whose error stays within the bound.

    Backends: eager float32 (BatchNorm folded, channels_last), compiled, ONNX Runtime, OpenVINO,
    bfloat16, and int8 by ONNX Runtime, OpenVINO, torchao's PT2E and torch.ao's engines. Where no
    whole-int8 backend reaches the bound, only convolutions and products are quantized; then the
    layers that cost most stay float; then the fastest float backend is taken, and the report
    says so.

    Args:
        model: float32, on the CPU; it is copied, and taken in eval mode. One that
            ``quantize_aware`` has trained is finished first.
        calibration: an iterable of tensors, or of tuples of positional inputs; real inputs, a
            hundred samples or so, all held in memory. Speed is measured on the first batch of
            the most common size.
        calibrator: one of ``calibrate.CALIBRATORS`` for ONNX Runtime's and OpenVINO's backends, or
            ``auto``: the best in SQNR of min-max, percentile and MSE. torch's backends have
            observers of their own.
        engine: ``auto`` for all of ``ENGINES``, or one or some of them; eager is always raced.
        min_sqnr_db: the least signal-to-quantization-noise ratio of the worst output, reached by
            nine of ten samples, or by all of fewer than 20 (``sample_sqnr_db``). A quarter of the
            calibration set is held out for it, of 60 samples and more 20 at least; of fewer than
            four nothing is.
        test: (inputs [N, ...], class numbers [N]), or a function that takes a model and returns
            its accuracy, such as a detector's mean average precision: each backend's row shows it.
            Outputs whose shapes depend on the data have no SQNR: there the test alone decides.
        max_drop: what a backend may lose of the model's accuracy in the test.
        budget_s: seconds of measuring per backend; where its calls are so slow that an interval
            needs more, up to 20. A backend whose first call takes more than two seconds and eight
            times as long as the fastest so far is not called again; the report says so.
        keep_backends: keep every backend that was built, for ``on(name)``, and its memory.
        dynamic: input's place -> dimensions that take any size in a call, such as ``{0: (2, 3)}``
            for images; of every tensor in a nested input. Free without it are dimensions that the
            calibration batches vary, and the first one where the model runs with another size. An
            exporter may fix a dimension all the same: then the report names it.
        progress: a bar over the backends, with the name of the one being built; None draws it in
            a terminal only. Compiling takes longest, minutes for a large model: leave it out by
            ``engine``, or stop with Ctrl-C.

    Raises:
        TypeError: not a module, or one that cannot be copied, as it holds a lock.
        TypeError, ValueError: the calibration set is empty, of the wrong shape or not finite; the
            model raises on it, or with other sizes of a dimension in ``dynamic``; an unknown
            calibrator or engine; a model that is not on the CPU; a budget_s that is not positive,
            a min_sqnr_db that is no number, or a max_drop that is none from 0 to 1.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> fast = quantize_static(net, [torch.rand(4, 3, 8, 8)], engine="qnnpack", budget_s=0.1)
    >>> fast(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """
    engines = _engines(engine)
    need_seconds("budget_s", budget_s)
    need_decibels("min_sqnr_db", min_sqnr_db)
    if not isinstance(max_drop, Real) or not 0 <= max_drop <= 1:
        raise ValueError(
            "max_drop must be a number from 0 to 1, the accuracy that may be lost, got "
            f"{max_drop!r}"
        )
    if calibrator != "auto" and calibrator not in CALIBRATORS:
        raise ValueError(
            f'calibrator={calibrator!r} is neither "auto" nor one of {", ".join(CALIBRATORS)}'
        )
    need_model(model, "quantize", but=("meta",))
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "cpu":
            raise ValueError(
                f"the model is on {tensor.device}, these backends run on the CPU: call model.cpu()"
            )
    options = test, max_drop, min_sqnr_db, budget_s, keep_backends, dynamic, progress
    with torch.inference_mode(False), shared_untouched(unwrapped(model)):
        return _quantized(model, calibration, engines, calibrator, *options)


def _quantized(
    model: nn.Module,
    calibration: Iterable[Any],
    engines: tuple[str, ...],
    calibrator: str,
    test: Test | None,
    max_drop: float,
    min_sqnr_db: float,
    budget_s: float,
    keep_backends: bool,
    dynamic: Mapping[int, int | Sequence[int]] | None,
    progress: bool | None,
) -> QuantizedModel:
    batches = read_batches(calibration)
    original = finished_copy(model)
    outputs, padding = run_reference(original, batches)
    batches, outputs, numbers = most_common_first(batches, outputs)
    calibrated, judge, told = held_out(original, batches, outputs, numbers)
    if test is not None:  # what is wrong with it is said at once
        judge.accuracy = accuracy_of(copied(original), test, batches[0], max_drop)
    folded, notes = _folded(original, batches[0])
    notes = [*notes, *padding, *told]
    try:
        need_model(original, "quantize", but=("scripted",))
    except TypeError as error:
        notes.append(f"{error}, for engines that cannot take TorchScript")
    threads = torch.get_num_threads()
    free = free_groups(copied(original), batches, outputs, dynamic, judge.layout.inputs)
    task = Task(folded, calibrated, outputs, calibrator, threads, free=free, judge=judge)
    if task.precision != "float32":
        notes.append(
            f"the model is {task.precision}, and speed is relative to backends of that type; "
            "those of other engines start from its weights in float32"
        )

    start = perf_counter()
    kept: dict[str, Backend] | None = {} if keep_backends else None
    rows, backends = built(task, _plan(engines, task.precision), min_sqnr_db, progress, kept)
    if not any(backend.precision == "int8" for backend in backends.values()):
        more_rows, more_backends = _mixed(task, engines, rows, min_sqnr_db, kept, progress)
        rows, backends = [*rows, *more_rows], backends | more_backends
    return take(
        task,
        rows,
        backends,
        min_sqnr_db=min_sqnr_db,
        budget_s=budget_s,
        notes=notes,
        start=start,
        kept=kept,
        progress=progress,
    )


def _engines(engine: str | Sequence[str]) -> tuple[str, ...]:
    asked = ENGINES if engine == "auto" else (engine,) if isinstance(engine, str) else tuple(engine)
    unknown = [name for name in asked if name not in ENGINES]
    if unknown or not asked:
        wrong = ", ".join(map(repr, unknown)) or "no engine"
        raise ValueError(f'{wrong}: engine must be "auto" or among {", ".join(ENGINES)}')
    return tuple(dict.fromkeys(("eager", *asked)))


def _folded(model: nn.Module, batch: tuple[Any, ...]) -> tuple[nn.Module, list[str]]:
    """Return the model with BatchNorm folded, and what to say of it."""
    try:
        folded, report = fuse_conv_bn(model, batch)
    except Exception as error:  # whatever stops the fold does not stop the backends
        return model, [f"BatchNorm was not folded: {first_line(error)}"]
    notes = [f"{len(report.left)} of {report.found} BatchNorms stay"] if report.left else []
    return folded, notes


def _plan(engines: tuple[str, ...], own: str = "float32") -> dict[str, tuple[str, Builder]]:
    """Return name -> (precision, builder) of the backends of the engines asked for.

    ``own`` is the type of the model's weights.
    """
    vnni = not saturates()
    plan: dict[str, tuple[str, Builder]] = {
        f"eager {own}": (own, torch_backends.eager),
        f"eager {own}, channels_last": (own, partial(torch_backends.eager, channels_last=True)),
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        if name != own:
            plan[f"eager {name}"] = (name, partial(torch_backends.cast, dtype=dtype))
    if "compile" in engines:
        plan[f"torch.compile {own}"] = (own, torch_backends.compiled)
    if "onnxruntime" in engines:
        plan["ONNX Runtime float32"] = ("float32", onnx_backends.onnxruntime_float)
    if "openvino" in engines:
        plan["OpenVINO float32"] = ("float32", openvino_backends.openvino_float)
        plan["OpenVINO bfloat16"] = (
            "bfloat16",
            partial(openvino_backends.openvino_float, precision="bfloat16"),
        )
    for reduced in (False,) if vnni else (False, True):
        tail = ", reduced range" * reduced
        if "onnxruntime" in engines:
            build = partial(_in_onnxruntime, reduce_range=reduced)
            plan[f"ONNX Runtime int8{tail}"] = ("int8", build)
        if "openvino" in engines:
            build = partial(_in_openvino, reduce_range=reduced)
            plan[f"OpenVINO int8{tail}"] = ("int8", build)
    if "pt2e" in engines:
        plan["PT2E int8"] = ("int8", torch_backends.pt2e)
    for name in torch_backends.ENGINES:
        if name in engines:
            build = partial(torch_backends.torch_ao, engine=name)
            plan[f"torch.ao {name} int8"] = ("int8", build)
    return plan


def _in_onnxruntime(task: Task, **options: bool) -> Backend:
    """Return the int8 backend, built once: OpenVINO takes its file."""
    key = tuple(sorted(options.items())), task.float_layers
    made = task.shared.setdefault("quantized", {})
    if key not in made:
        made[key] = onnx_backends.onnxruntime_int8(task, **options)
    return made[key]


def _in_openvino(task: Task, **options: bool) -> Backend:
    return openvino_backends.openvino_int8(task, _in_onnxruntime(task, **options))


def _mixed(
    task: Task,
    engines: tuple[str, ...],
    rows: list[BackendRow],
    min_sqnr_db: float,
    kept: dict[str, Backend] | None,
    progress: bool | None,
) -> tuple[list[BackendRow], dict[str, Backend]]:
    """Quantize less, until the bound is met: products alone, then without the worst layers."""
    can_pass = task.judge.is_bounded or task.judge.accuracy is not None
    if (
        not can_pass
        or not {"onnxruntime", "openvino"} & set(engines)
        or not any(
            row.precision == "int8" and row.nbytes is not None and "ONNX" in row.note + row.name
            for row in rows
        )
    ):
        return [], {}
    reduced = saturates()
    options = {"reduce_range": reduced, "products_alone": True}
    try:
        order = ranked_layers(task.model, task.batches, progress)
    except Exception as error:  # the report says why nothing was mixed
        why = f"the layers could not be ranked: {first_line(error)}"
        return [BackendRow("int8, mixed", "int8", dropped=why)], {}

    def builders(count: int) -> Iterator[tuple[str, Builder, Task]]:
        kept = frozenset(order[:count])
        mixed = replace(task, float_layers=kept, shared=task.shared)
        if "onnxruntime" in engines:
            yield "ONNX Runtime int8, mixed", partial(_in_onnxruntime, **options), mixed
        if "openvino" in engines:
            yield "OpenVINO int8, mixed", partial(_in_openvino, **options), mixed

    found: tuple[list[BackendRow], dict[str, Backend]] = [], {}
    for count in _counts(len(order)):
        found = [], {}
        for name, build, mixed in builders(count):
            row, backend = tried(name, "int8", build, mixed, min_sqnr_db, kept)
            found[0].append(row)
            if backend is not None:
                found[1][name] = backend
        if found[1]:
            break
    return found


def _counts(layers: int) -> Iterator[int]:
    yield 0
    count = 1
    while count < layers:
        yield count
        count *= 2
