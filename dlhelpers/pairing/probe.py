"""Run a model once and leave no trace: buffers, parameters, modes, gradients, random states.

The forward pass runs with gradients enabled, in the model's own mode, on copies of the inputs,
so that the graph shows the last activation; nothing is ever propagated backward and the graph is
dropped. Attributes and generators that ``forward`` changes are put back; files are not.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.arguments import model_inputs
from dlhelpers.models import copied
from dlhelpers.reached import objects_in
from dlhelpers.trees import entries
from dlhelpers.untouched import same_numbers, untouched

__all__ = ["as_tensor", "first_tensor", "restored", "run_model"]


def run_model(model: Callable[..., Any], inputs: object) -> Any:
    """Return ``model(inputs)``, with a graph where the model allows one.

    Args:
        model: module or function, left as it was found.
        inputs: one argument, a tuple or list of them, or a mapping of keyword arguments.

    Raises:
        Exception: whatever the model raised the second time, without gradients.
    """
    if isinstance(model, nn.Module) and any(map(_is_lazy, model.parameters())):
        model = copied(model)  # its first call makes the parameters
    with restored(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args, kwargs = _arguments(inputs, track=True)
        try:
            with torch.enable_grad():
                return model(*args, **kwargs)
        except Exception:  # inputs that refuse gradients, in-place edits, integer weights
            args, kwargs = _arguments(inputs, track=False)
    with restored(model), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return model(*args, **kwargs)


def _is_lazy(tensor: Tensor | None) -> bool:
    return isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))


def _arguments(inputs: object, *, track: bool) -> tuple[tuple, dict[str, Any]]:
    def detached(value: object) -> object:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return value
        value = value.detach().clone()
        if track and value.is_floating_point():  # not a leaf: in-place edits stay allowed
            value = value.requires_grad_().clone()
        return value

    with torch.enable_grad():
        # a loader's batch is a list
        args, kwargs = model_inputs(tuple(inputs) if isinstance(inputs, list) else inputs)
        return tuple(map(detached, args)), {key: detached(value) for key, value in kwargs.items()}


@contextlib.contextmanager
def restored(*owners: object) -> Iterator[None]:
    """Put back parameters, buffers, gradients and modes of modules, and what else is reached."""
    found = [owner for owner in objects_in(owners) if isinstance(owner, nn.Module)]
    modules = dict.fromkeys(module for root in found for module in root.modules())
    entries, copies = _snapshot(modules)
    apart = {id(tensor) for tensor, _ in copies}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)), untouched(*owners, apart=apart):
            yield
    finally:
        _restore(entries, copies)


def _snapshot(
    modules: Iterable[nn.Module],
) -> tuple[list[tuple], list[tuple[Tensor, Tensor]]]:
    """Keep each module's own tables and mode, and a copy of every tensor in them."""
    entries, copies = [], {}
    for module in modules:
        parameters, buffers = dict(module._parameters), dict(module._buffers)
        tensors = [t for t in (*parameters.values(), *buffers.values()) if t is not None]
        for tensor in tensors:
            if id(tensor) not in copies and not _is_lazy(tensor):
                copies[id(tensor)] = (tensor, tensor.detach().clone())
        gradients = {name: p.grad for name, p in parameters.items() if p is not None}
        entries.append((module, parameters, buffers, gradients, module.training))
    return entries, list(copies.values())


def _restore(entries: list[tuple], copies: list[tuple[Tensor, Tensor]]) -> None:
    for module, parameters, buffers, gradients, training in entries:
        for table, kept in ((module._parameters, parameters), (module._buffers, buffers)):
            table.clear()
            table.update(kept)
        for name, gradient in gradients.items():
            if parameters[name].grad is not gradient:
                parameters[name].grad = gradient
        module.training = training
    with torch.no_grad():
        for tensor, kept in copies:
            if not same_numbers(tensor.data, kept):  # read-only memory is never written to
                tensor.data.copy_(kept)


def as_tensor(value: object) -> object:
    """Return arrays and lists of numbers as tensors (floats in the default dtype)."""
    if isinstance(value, Tensor) or not (isinstance(value, list) or hasattr(value, "__array__")):
        return value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # arrays that are read-only are only read
            tensor = torch.as_tensor(value)
    except Exception:  # lists of anything, ragged ones, arrays of strings
        return value
    if isinstance(value, list) and tensor.numel() == 0:
        return value
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def first_tensor(outputs: object) -> Tensor | None:
    """Return the tensor that goes into the loss: the outputs, their first, or their logits."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        for name in ("logits", "out"):
            if isinstance(outputs.get(name), Tensor):
                return outputs[name]
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    parts = (part for _, part in entries(outputs) or ())
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)
