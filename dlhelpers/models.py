"""Which models are taken, and how is one copied?

A function that looks into a model sees its modules: not those of TorchScript or of a graph of
``torch.export``, and of a compiled model those of the module inside, as what is compiled heeds
neither hooks nor other weights. One that computes needs values, which the meta device has not.
:func:`need_model` says in one sentence what cannot be taken, and what to give instead.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm

from dlhelpers.classes import own_classes
from dlhelpers.trees import entries, tensors_in

__all__ = [
    "copied",
    "in_eval_",
    "need_model",
    "need_module",
    "plain_copy",
    "uncompiled_",
    "unwrapped",
]

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_OWN = ("_parameters", "_buffers", "_modules")
_DEEPEST = 30  # objects between a model and what cannot be copied


def need_model(model: Any, verb: str, *, but: Collection[str] = ()) -> None:
    """Raise one sentence where a model is of a kind that a function cannot take.

    Args:
        model: what was given.
        verb: what the function does with it, such as ``fuse``, for the message.
        but: kinds that it cannot take, in any part of the model: ``wrapped`` (by torch.compile or
            DataParallel), ``scripted``, ``exported`` (a graph of ``torch.export``), ``meta``.

    Raises:
        TypeError: it is no module, or one of the first three kinds.
        ValueError: a module is on the meta device, or lazy and without shapes.
    """
    need_module(model, verb)
    for name, module in model.named_modules():
        which = f"{name or 'the model'} ({type(module).__name__})"
        inner = f"model.{name}".removesuffix(".")
        if "wrapped" in but and hasattr(module, "_orig_mod"):
            raise TypeError(
                f"a compiled model cannot be looked into: {verb} it first, then compile (the "
                f"module is {inner}._orig_mod)"
            )
        if "wrapped" in but and isinstance(module, _PARALLEL):
            raise TypeError(f"{which} runs copies of a module: {verb} {inner}.module, then wrap it")
        if (kind := _opaque(module)) in but:
            what = "TorchScript" if kind == "scripted" else "a graph of torch.export"
            raise TypeError(f"{which} is {what}: {verb} the module that it was made from")
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if isinstance(tensor, UninitializedTensorMixin):
                raise ValueError(f"{which} is lazy and has no shapes yet: run a batch, then {verb}")
            if "meta" in but and tensor is not None and tensor.is_meta:
                raise ValueError(
                    f"the {key} of {which} is on the meta device, which holds no values: "
                    f'model.to_empty(device="cpu") and load_state_dict, then {verb}'
                )


def need_module(model: Any, verb: str) -> None:
    """Raise TypeError where a model is no module; the message says what to give instead."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {_named(model, verb)}")


def _named(given: Any, verb: str) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__}: give an instance, {given.__name__}(...)"
    kind, owner = type(given).__name__, getattr(given, "__self__", None)
    if isinstance(given, torch.export.ExportedProgram):
        return f"{kind}: {verb} the module that was exported, or what its module() returns"
    if isinstance(owner, nn.Module):
        return f"a method of {type(owner).__name__}: give the module itself"
    if hasattr(given, "keys"):
        return f"{kind}: load a state_dict into a module first"
    return f"{kind}: give a function as the forward of a module" if callable(given) else kind


def _opaque(module: nn.Module) -> str:
    """Return what a module is whose layers are functions of a graph; empty for an ordinary one."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted"
    graph = getattr(module, "graph", None) if isinstance(module, torch.fx.GraphModule) else None
    if graph is not None and any(
        node.op == "call_function" and hasattr(node.target, "_schema") for node in graph.nodes
    ):
        return "exported"
    return ""


def unwrapped(model: Any) -> Any:
    """Return the module inside of the wrappers of torch.compile and (Distributed)DataParallel."""
    for _ in range(4):
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, _PARALLEL):
            inner = model.module
        if inner is None:
            return model
        model = inner
    return model


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode, for inference: of the module inside of wrappers.

    What is compiled in it is the module that was compiled; weights that a pruning mask, the old
    ``weight_norm``, the old ``spectral_norm`` or a parametrization computes at each call are
    computed for good.
    """
    made = in_eval_(uncompiled_(copied(unwrapped(model))))
    for module in list(made.modules()):
        if parametrize.is_parametrized(module) and not isinstance(module, nn.RNNBase):
            _unparametrize(module)
        for hook in list(module._forward_pre_hooks.values()):
            _compute_for_good(module, hook)
    return made


def uncompiled_(model: nn.Module) -> nn.Module:
    """Put the module that was compiled in the place of each compiled one, and return the model."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            module._modules[name] = getattr(child, "_orig_mod", child)
    return model


def _compute_for_good(module: nn.Module, hook: Any) -> None:
    kind, name = type(hook).__name__, getattr(hook, "name", "")
    if isinstance(hook, prune.BasePruningMethod):
        prune.remove(module, hook._tensor_name)
    elif kind == "WeightNorm":
        remove_weight_norm(module, name)
    elif kind == "SpectralNorm" and not module.training:  # else each call changes it
        remove_spectral_norm(module, name)


def _unparametrize(module: nn.Module) -> None:
    """Put what the parametrizations compute in the places of the parametrized tensors."""
    for name, parts in list(module.parametrizations.items()):
        with torch.no_grad():
            value = getattr(module, name).detach().clone()
        if parts.is_tensor:  # torch writes into it, and another module may share it
            parts.original = nn.Parameter(value, parts.original.requires_grad)
        is_frozen = not any(tensor.requires_grad for tensor in parts.parameters(recurse=False))
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(value, not is_frozen))


def in_eval_(model: nn.Module) -> nn.Module:
    """Set eval mode and return the model; a graph of torch.export stays as it was exported."""
    try:
        return model.eval()
    except NotImplementedError:
        return model


def copied(model: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return a deep copy, made of ordinary tensors also inside of ``torch.inference_mode()``.

    A tensor that was computed, such as the weight of a pruned layer or an output that a module
    keeps, is copied without its graph.

    Args:
        model: a module, or what else holds modules.
        memo: of ``copy.deepcopy``: id of an object -> what stands for it in the copy.

    Raises:
        TypeError: it holds what cannot be copied, such as a lock, a generator or an open file.

    >>> layer = nn.utils.prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)
    >>> torch.equal(copied(layer)(torch.ones(4)), layer(torch.ones(4)))
    True
    """
    memo = {} if memo is None else memo
    holders = model.modules() if isinstance(model, nn.Module) else ()
    tensors = tensors_in([model, *map(vars, holders)], once=True)
    computed = [t for t in tensors if not t.is_leaf and id(t) not in memo]
    with torch.inference_mode(False):
        while True:
            memo.update((id(tensor), tensor.detach().clone()) for tensor in computed)
            known = set(memo)
            try:
                made = copy.deepcopy(model, memo)
                return own_classes(made) if isinstance(made, nn.Module) else made
            except Exception as error:
                for key in memo.keys() - known:  # halves of what was being copied
                    del memo[key]
                trace = _culprit(model, memo)
                value = trace[-1][1]
                computed = [value] if isinstance(value, Tensor) and not value.is_leaf else []
                if not computed or id(value) in memo:
                    raise _refusal(trace, error) from error


def _culprit(model: Any, memo: dict[int, Any]) -> list[tuple[str, Any]]:
    """Return (place in the one before, object), from the model to what cannot be copied."""
    trace = [("", model)]
    while len(trace) < _DEEPEST:
        parts = _parts(trace[-1][1])
        found = next((part for part in parts if not _can_be_copied(part[1], memo)), None)
        if found is None:
            break
        trace.append(found)
    return trace


def _parts(value: Any) -> list[tuple[str, Any]]:
    """Return what an object holds, by how one writes it in Python."""
    if isinstance(value, nn.Module):
        held = {k: v for k, v in vars(value).items() if k not in _OWN}
        held = {**held, **value._parameters, **value._buffers, **value._modules}
        return [(f".{key}", part) for key, part in held.items()]
    if isinstance(value, MethodType):
        return [(".__self__", value.__self__)]
    if (inner := entries(value)) is not None:
        return [(f"[{key!r}]", part) for key, part in inner]
    if isinstance(value, Tensor) or hasattr(type(value), "__deepcopy__"):
        return []
    return [(f".{key}", part) for key, part in getattr(value, "__dict__", {}).items()]


def _can_be_copied(value: Any, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return False
    return True


def _refusal(trace: list[tuple[str, Any]], error: Exception) -> TypeError:
    kind = type(trace[-1][1])
    what = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    why = str(error).splitlines()[0] if str(error) else repr(error)
    owners = [n for n, (_, one) in enumerate(trace[:-1]) if isinstance(one, nn.Module)]
    if not owners:
        return TypeError(f"a {what} cannot be copied: {why}")
    place = "".join(key for key, _ in trace)[1:]
    owner, name = trace[owners[-1]][1], trace[owners[-1] + 1][0][1:]
    return TypeError(
        f"the model cannot be copied: its {place} is a {what} ({why}). Keep it outside the "
        f"model, remove it during this call, or let {type(owner).__name__}.__getstate__ leave "
        f"{name} out"
    )
