"""Which modules can fold themselves? Those with a known re-parametrisation among their methods.

RepVGG's branches become one convolution by arithmetic that only their author wrote down. A method
counts if its class has it under one of the usual names, it needs no arguments, and on a copy it
leaves fewer BatchNorms: in the module itself, or in one that it returns, as timm's do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dlhelpers.fusion.norms import norms_of
from dlhelpers.fusion.tracing import has_hooks, replace_module
from dlhelpers.models import copied

__all__ = ["fold_by_own_methods"]

_NAMES = ("fuse", "reparameterize", "switch_to_deploy", "fuse_convs", "merge_bn")


def fold_by_own_methods(model: nn.Module) -> tuple[nn.Module, dict[str, str], list[str]]:
    """Call the modules' own methods, from the outside in.

    Args:
        model: changed in place, but where its own method returns another one.

    Returns:
        The model; name of a BatchNorm -> the call that folded it; notes on methods that were not
        called.
    """
    folded: dict[str, str] = {}
    notes = []
    for name in [name for name, _ in model.named_modules()]:
        try:
            module = model.get_submodule(name)
        except AttributeError:  # gone with its parent's
            continue
        for method, function in _methods(module):
            before = _norms(module)
            if not before:
                break
            called = f"{name}.{method}()".lstrip(".")
            new, why = _tried(module, function)
            if why is None:
                continue
            if why:
                notes.append(f"{called} of {type(module).__name__} was not used: {why}")
                continue
            if new is not module:
                if module is model:
                    model = new
                replace_module(model, module, new)
            left = {id(one) for one in model.modules()}
            prefix = f"{name}." if name else ""
            for inner, one in before.items():
                if id(one) not in left:
                    folded[f"{prefix}{inner}".rstrip(".")] = called
            module = new
    return model, folded, notes


def _methods(module: nn.Module) -> list[tuple[str, Callable[..., Any]]]:
    """Return (name, function) of the class's methods that need no arguments."""
    found = []
    if type(module).__module__.startswith("torch."):
        return []
    for name in _NAMES:
        function = inspect.getattr_static(type(module), name, None)
        if not inspect.isfunction(function) or name in vars(module):
            continue
        first, *others = inspect.signature(function).parameters.values() or (None,)
        needs = (p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in others)
        if first is not None and not any(needs):
            found.append((name, function))
    return found


def _norms(module: nn.Module) -> dict[str, nn.Module]:
    ids = norms_of(module)
    return {name: one for name, one in module.named_modules() if id(one) in ids}


def _tried(module: nn.Module, function: Callable[..., Any]) -> tuple[nn.Module, str | None]:
    """Return what the method makes of a module, and why it was not used: a copy goes first.

    Empty where it was, None where it is no re-parametrisation.
    """
    if any(has_hooks(one) for one in module.modules()):
        return module, "there are hooks inside"
    before, dtype = len(_norms(module)), _dtype(module)
    trial = copied(module)
    try:
        with torch.no_grad():
            given = function(trial)
            made = given if isinstance(given, nn.Module) else trial
            if len(_norms(made)) >= before:
                return module, None
            made = function(module)
    except Exception as problem:
        return module, f"it raised {problem!r}"
    new = made if isinstance(made, nn.Module) else module
    return new.to(dtype).train(module.training), ""


def _dtype(module: nn.Module) -> torch.dtype | None:
    """Return the type of all of a module's weights; new ones are often of the default one."""
    types = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return types.pop() if len(types) == 1 else None
