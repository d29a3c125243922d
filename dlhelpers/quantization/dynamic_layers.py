"""Which layers does torch.ao quantize dynamically, and which would raise at their first call?

Without inputs nothing is run before a model is returned, so what is known to fail stays float:
layers of options that torch.ao's have not, and those whose weight is read by a forward, since
``weight`` of a quantized layer is a method.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from dlhelpers.models import copied
from dlhelpers.quantization.attention import take_slow_paths_
from dlhelpers.quantization.quiet import quiet
from dlhelpers.quantization.torch_backends import engine_set, torch_ao_module
from dlhelpers.quantization.weight_reads import weight_reads

__all__ = ["converted", "has_layers", "kinds"]

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_LAYERS = (nn.Linear, *_RECURRENT, nn.MultiheadAttention)
_KINDS = (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


def kinds() -> str:
    """Return the names of what can be quantized."""
    return ", ".join(sorted(kind.__name__ for kind in _KINDS))


def has_layers(model: nn.Module) -> bool:
    """Whether a model has a linear or recurrent layer, or attention, of any class."""
    return any(isinstance(module, _LAYERS) for module in model.modules())


def converted(model: nn.Module, engine: str, *, reduce_range: bool) -> tuple[nn.Module, list[str]]:
    """Return a copy with torch.ao's layers, and the names of those that stay float, with reasons.

    Args:
        model: in eval mode; left untouched.
        engine: one of torch.ao's.
        reduce_range: quantize activations to 7 bits, so that sums of two products fit 16 bits.
    """
    ao = torch_ao_module("quantization", engine)
    observer = ao.PlaceholderObserver.with_args(
        dtype=torch.quint8, quant_min=0, quant_max=255, is_dynamic=True, reduce_range=reduce_range
    )
    config = ao.QConfig(activation=observer, weight=ao.default_weight_observer)
    reads = weight_reads(model)
    reasons = _reasons(model, reads.read)
    names = [n for n, m in model.named_modules() if type(m) in _KINDS and n not in reasons]
    made = copied(model)
    take_slow_paths_(made)
    holder = nn.ModuleList([made])  # torch.ao replaces children alone
    with engine_set(engine), quiet():
        wanted = {f"0.{name}".removesuffix("."): config for name in names}
        made = (ao.quantize_dynamic(holder, wanted, inplace=True) if wanted else holder)[0]
    if not reduce_range:
        _use_eight_bits(made)
    for name in names:
        layer = made.get_submodule(name)
        if hasattr(model.get_submodule(name), "flatten_parameters"):
            layer.flatten_parameters = _nothing  # forwards call it
    for name, module in model.named_modules():
        asked = made.get_submodule(name) if id(module) in reads.asked else None
        if asked is not None and next(asked.parameters(), None) is None:
            asked.register_parameter("_float", empty_parameter())
    left = [
        f"{n or 'the model'} ({type(model.get_submodule(n)).__name__}): {why}"
        for n, why in reasons.items()
    ]
    return made, left


def _use_eight_bits(model: nn.Module) -> None:
    """Let torch.ao's layers round activations to 8 bits, whatever their forwards ask for.

    They ask for 7; qnnpack, which has no such mode, says so on standard error.
    """
    for module in model.modules():
        if "quantized.dynamic" not in type(module).__module__:
            continue
        if getattr(module, "version", None) == 4:
            module.version = 3  # in which the operator was called without the option
        for packed in getattr(module, "_all_weight_values", ()):
            name, biases, _, flags, weights = packed.param.__getstate__()[0]
            if name == "quantized_dynamic" and flags == [1]:
                make = torch.ops.quantized.make_quantized_cell_params_dynamic
                packed.param = make(*weights, *biases, False)


def _nothing() -> None:
    """Be ``flatten_parameters`` of a layer that has none to flatten."""


def empty_parameter(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Return a parameter that tells device and type, and holds nothing."""
    return nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)


def _reasons(model: nn.Module, read: dict[int, str]) -> dict[str, str]:
    """Return name of a layer -> why it stays float, the readers of weights given."""
    parts = {name: _reason(module) for name, module in model.named_modules()}
    found = {name: why for name, why in parts.items() if why}
    for name, module in model.named_modules():
        if type(module) in _KINDS and id(module) in read:
            found.setdefault(name, f"{read[id(module)]} reads its weight")
    return found


def _reason(module: nn.Module) -> str:
    if isinstance(module, nn.MultiheadAttention):
        return "it calls none of its layers"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript" if module._parameters else ""
    if not isinstance(module, (nn.Linear, *_RECURRENT)):
        return ""
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if type(module) not in _KINDS:
        is_output = type(module).__name__ == "NonDynamicallyQuantizableLinear"
        return "" if is_output else "torch.ao has no such layer"
    if getattr(module, "proj_size", 0):
        return "proj_size"
    if isinstance(module, _RECURRENT) and not module.bias:
        return "bias=False"
    types = {p.dtype for p in module.parameters()} - {torch.float32}
    return f"it is {str(types.pop()).removeprefix('torch.')}" if types else ""
