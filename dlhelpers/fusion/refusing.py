"""Which layer can a BatchNorm be folded into, and why not?"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from dlhelpers.fusion.calls import Calls
from dlhelpers.fusion.folding import why_not_before
from dlhelpers.fusion.norms import Norm
from dlhelpers.fusion.tracing import has_hooks, is_batch_norm, is_layer

__all__ = ["partner", "why_not_axis", "why_not_layer"]


def partner(
    bn: nn.Module, norm: Norm, calls: Calls, dims: dict[int, set[int]], names: dict[int, str]
) -> tuple[nn.Module | None, bool, str]:
    """Return the layer to fold into, whether it comes after the BatchNorm, and why not."""
    if why := _why_not_batch_norm(bn, norm, calls):
        return None, False, why
    makers = calls.makers(bn)
    first = makers[0]
    if first is not None and is_layer(first):
        return first, False, _why_not_behind(first, bn, norm, calls, dims, names)
    users = calls.users(bn)
    layer = users[0][0] if users[0] else None
    stands = f"its input comes from {calls.between(bn)}"
    if not norm.is_alone:
        return None, False, f"{stands}, and {type(bn).__name__} does more before the next layer"
    if layer is None or not is_layer(layer):
        return None, False, f"{stands}, and its output goes to {calls.behind(bn)}"
    return layer, True, _why_not_in_front(bn, norm, layer, calls, dims, stands)


def _why_not_batch_norm(bn: nn.Module, norm: Norm, calls: Calls) -> str:
    if any(getattr(bn, name, "") is None for name in ("running_mean", "running_var")):
        return "it keeps no running statistics, so it uses the batch's"
    frozen = type(bn).forward.__module__ == "torchvision.ops.misc"
    if bn.training and is_batch_norm(bn) and not frozen and norm.values is bn:
        return "it stays in train mode, where it uses the batch's statistics"
    if id(bn) in calls.looks:
        return f"tensors of {type(bn).__name__} are read elsewhere"
    return norm.why or _why_not_any(bn, calls)


def _why_not_any(module: nn.Module, calls: Calls) -> str:
    if has_hooks(module):
        return f"{type(module).__name__} has hooks (weight_norm and spectral_norm are some)"
    if parametrize.is_parametrized(module):
        return f"{type(module).__name__} is parametrized"
    if id(module) in calls.reads:
        return f"tensors of {type(module).__name__} are read elsewhere"
    if id(module) in calls.opaque:
        return calls.opaque[id(module)]
    if not calls.sites[id(module)]:
        return "it is never called"
    return ""


def why_not_layer(layer: nn.Module, calls: Calls) -> str:
    """Return why a layer's weights cannot be changed; empty where they can."""
    plain = [base for base in type(layer).__mro__ if base.__module__.startswith("torch.nn.modules")]
    own = type(layer).forward, getattr(type(layer), "_conv_forward", None)
    torchs = plain[0].forward, getattr(plain[0], "_conv_forward", None)
    if own != torchs or not {"forward", "_conv_forward"}.isdisjoint(vars(layer)):
        return f"{type(layer).__name__} has a forward of its own"
    if not layer.weight.is_floating_point():
        return f"weights of {layer.weight.dtype}"
    return _why_not_any(layer, calls)


def _why_not_behind(
    layer: nn.Module,
    bn: nn.Module,
    norm: Norm,
    calls: Calls,
    dims: dict[int, set[int]],
    names: dict[int, str],
) -> str:
    if why := why_not_layer(layer, calls):
        return why
    name = names.get(id(layer), "the layer")
    if any(maker is not layer for maker in calls.makers(bn)):
        return f"it is called after {name} and elsewhere"
    for users in calls.users(layer):
        if len(users) > 1:
            return f"the output of {name} is used elsewhere, too"
        if users != [bn]:
            return f"{name} is called again without it"
    if hooked := calls.hooked_between(layer, bn):
        return f"hooks of {hooked} would see other values"
    return why_not_axis(layer, norm, dims, f"behind {name}")


def _why_not_in_front(
    bn: nn.Module, norm: Norm, layer: nn.Module, calls: Calls, dims: Any, stands: str
) -> str:
    if why := why_not_layer(layer, calls) or why_not_before(layer):
        return f"{stands}; after it {why}"
    if any(users != [layer] for users in calls.users(bn)):
        return f"{stands}; its output is used elsewhere, too"
    if any(maker is not bn for maker in calls.makers(layer)):
        return f"{stands}; the layer after it is called without it"
    if hooked := calls.hooked_between(bn, layer):
        return f"{stands}; hooks of {hooked} would see other values"
    return why_not_axis(layer, norm, dims, "in front of a layer")


def why_not_axis(layer: nn.Module, norm: Norm, dims: dict[int, set[int]], where: str) -> str:
    """Return why the BatchNorm's channels are not the layer's; empty where they are."""
    spatial = len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0
    seen = dims.get(id(layer))
    if seen is None and not spatial:
        return f"{where} one needs example_inputs, to know that outputs are [N, C]"
    if seen is not None and seen != {spatial + 2}:
        return f"its channels are dimension 1 of tensors of {sorted(seen)} dimensions"
    if norm.spatial not in (None, spatial):
        return f"it is for tensors of {norm.spatial + 2} dimensions, the layer's have {spatial + 2}"
    channels = len(norm.values.running_mean)
    ours = {getattr(layer, "out_channels", getattr(layer, "out_features", 0))}
    ours.add(getattr(layer, "in_channels", getattr(layer, "in_features", 0)))
    return "" if channels in ours else f"it has {channels} channels, the layer others"
