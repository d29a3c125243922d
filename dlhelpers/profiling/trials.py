"""What would a remedy bring a model? It is tried on a copy, with the inputs that were seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.models import copied
from dlhelpers.profiling.dataflow import Dataflow
from dlhelpers.profiling.seen import Speedup, Trial
from dlhelpers.profiling.watching import ModelCalls
from dlhelpers.trees import tensors_in

__all__ = [
    "alone_ms",
    "calls_gain",
    "folding_gain",
    "graph_bytes",
    "is_double",
    "rows_to_try",
    "trial",
    "without_hooks",
]

_FAST_S = 0.005  # a call of which dozens are settled in a trial's time
_PARTS = 32  # additions that are tried as one
_ALONE_S = 0.3  # for a model alone, three calls at least
_TRIAL_S = 10.0  # what a call on several samples may take


def trial(
    calls: ModelCalls,
    rows: int | None = None,
    *,
    grad: bool | None = None,
    dtype: torch.dtype | None = None,
) -> Callable[[], Any] | None:
    """Return a function that calls a copy of the model as it was called, on ``rows`` samples.

    With ``dtype`` what is float64 in the copy and its inputs becomes that.

    By default forward and backward, if the call made a graph in train mode, else forward alone;
    with ``grad`` forward alone, with or without a graph. None where the copy cannot be called so,
    or where one sample takes so long that ``rows`` of them would pass ``_TRIAL_S``.
    """

    def grown(value: Any) -> Any:
        if rows is None or not isinstance(value, Tensor) or not value.dim() or len(value) != 1:
            return value
        return value.expand(rows, *value.shape[1:]).contiguous()

    try:
        model = without_hooks(copied(calls.module)).train(calls.training)
        args = tuple(map(grown, calls.args))
        kwargs = {name: grown(value) for name, value in calls.kwargs.items()}
        if dtype is not None:
            for held in (*model.parameters(), *model.buffers()):
                held.data = _cast(held.data, dtype)
            args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
            calls = replace(calls, args=args, kwargs=kwargs)
        training = calls.training and calls.makes_graph

        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if grad is not None:
                with torch.set_grad_enabled(grad):
                    return model(*args, **kwargs)
            with torch.set_grad_enabled(training):
                output = model(*args, **kwargs)
            if training:
                sum(t.float().sum() for t in _with_graph(output)).backward()
            return None

        begin = perf_counter()
        call(calls.args, calls.kwargs)
        if rows is not None:
            if rows * (perf_counter() - begin) > _TRIAL_S:
                return None
            call(args, kwargs)
    except Exception:  # no copy, or a shape that it does not take
        return None
    return lambda: call(args, kwargs)


def alone_ms(calls: ModelCalls) -> float | None:
    """Return milliseconds of a call of the model alone, the shortest of some; None without a copy.

    Between long stretches of Python its threads fall asleep, and in a step it takes longer.
    """
    once = trial(calls)
    if once is None:
        return None
    took: list[float] = []
    while len(took) < 3 or sum(took) < _ALONE_S:
        begin = perf_counter()
        once()
        took.append(perf_counter() - begin)
    return 1000 * min(took)


def rows_to_try(one: Trial) -> int:
    """Return how many samples in one call are raced against as many calls: 64, of slow ones 16."""
    if one is None:
        return 16
    begin = perf_counter()
    one()
    return 64 if perf_counter() - begin < _FAST_S else 16


def is_double(calls: ModelCalls) -> bool:
    """Whether a parameter, a buffer or an input of the model is float64."""
    module = calls.module
    held = (*module.parameters(), *module.buffers(), *tensors_in((calls.args, calls.kwargs)))
    return any(tensor.dtype is torch.float64 for tensor in held)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype is torch.float64 else value
    if type(value) is dict:
        return {key: _cast(inner, dtype) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cast(inner, dtype) for inner in value)
    return value


def without_hooks(model: nn.Module) -> nn.Module:
    """Take the program's own hooks off a copy: what is tried is not theirs to see."""
    for module in model.modules():
        for kind in ("forward", "forward_pre", "backward", "backward_pre"):
            hooks = getattr(module, f"_{kind}_hooks")
            for key, hook in list(hooks.items()):
                home = getattr(hook, "__module__", None) or type(hook).__module__
                if not home.startswith("torch."):
                    del hooks[key]
    return model


def _with_graph(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.requires_grad]


def folding_gain(calls: ModelCalls, speedup: Speedup) -> float | None:
    """Return how many times as fast the model is with its BatchNorms folded; None if it is not."""
    from dlhelpers.fusion import fuse_conv_bn

    kinds = (nn.modules.batchnorm._BatchNorm,)
    if calls.kwargs or not any(isinstance(m, kinds) for m in calls.module.modules()):
        return None
    try:
        model = without_hooks(copied(calls.module))
        fused, report = fuse_conv_bn(model, calls.args)
    except Exception:
        return None
    if not report.folded:
        return None

    def run(network: nn.Module) -> Callable[[], Any]:
        def once() -> Any:
            with torch.inference_mode():
                return network(*calls.args)

        return once

    return speedup(run(model), run(fused))


def calls_gain(flow: Dataflow | None, speedup: Speedup, *, in_list: bool = False) -> float:
    """Return how many times as fast one operator is as many on parts of the same tensor.

    It is tried by additions of tensors as large as those that a step makes one by one; infinite
    where no flow was looked at. With ``in_list`` by one call on a list of tensors, as
    ``torch._foreach_add`` is.
    """
    foreach = getattr(torch, "_foreach_add", None)
    if flow is None:
        return float("inf")
    if in_list and foreach is None:
        return 1.0
    whole = torch.zeros(_PARTS, flow.elements, device=flow.device)
    parts = list(whole)

    def wait() -> None:
        if whole.is_cuda:
            torch.cuda.synchronize()

    def at_once() -> None:
        _ = foreach(parts, 1) if in_list else whole + 1
        wait()

    return speedup(lambda: ([part + 1 for part in parts], wait()), at_once)


def graph_bytes(calls: ModelCalls) -> int:
    """Return by how many bytes the peak falls without a graph; 0 where it cannot be measured."""
    from dlhelpers.memory import measure_peak

    plain, without = trial(calls, grad=True), trial(calls, grad=False)
    try:
        kept = measure_peak(plain).peak_bytes - measure_peak(without).peak_bytes
    except Exception:
        return 0
    return max(0, kept)
