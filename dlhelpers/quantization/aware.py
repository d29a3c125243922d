"""Can a network learn to live with rounding? Round weights and inputs in the forward pass.

Weights are symmetric with one scale s for each output channel. A BatchNorm behind the layer then
needs no simulation of its own: folding it scales a channel's weights and, with them, their grid,

    round(g w / (g s)) g s = g (round(w / s) s),        g > 0

so what was trained is what is folded and quantized later, to the last step.

Source: Jacob et al. 2018, arXiv:1712.05877, section 3 (training with simulated quantization);
Krishnamoorthi 2018, arXiv:1806.08342, section 3.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dlhelpers.arguments import whole_number
from dlhelpers.models import copied, need_model, plain_copy, uncompiled_, unwrapped
from dlhelpers.quantization.affine import choose_affine
from dlhelpers.quantization.attention import close_attention_, open_attention_
from dlhelpers.quantization.batches import read_batches
from dlhelpers.quantization.calibrate import Calibrator
from dlhelpers.quantization.fake import (
    fake_quantize,
    input_of,
    input_ranges,
    layers_of,
    left_out,
    refuse_parametrized,
    weight_affine,
    with_input,
)

__all__ = ["AwareModel", "finished_copy", "quantize_aware", "simulate"]


class _RoundedWeight(nn.Module):
    """Parametrization of a weight: rounded to a grid that follows it."""

    def __init__(self, layer: nn.Module, bits: int, per_channel: bool) -> None:
        super().__init__()
        self._axis = weight_affine(layer, bits, per_channel=per_channel).axis
        self._bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        grid = choose_affine(weight.detach(), bits=self._bits, symmetric=True, axis=self._axis)
        return fake_quantize(weight, grid)


class _RoundedInput(nn.Module):
    """Round what goes into a layer; the range is a moving average of the batches' ends."""

    def __init__(self, bits: int, momentum: float) -> None:
        super().__init__()
        self._bits, self._momentum = bits, momentum
        self.register_buffer("is_frozen", torch.tensor(False))
        self.register_buffer("ends", torch.full((2,), torch.nan))

    def before(self, _: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Hook in front of the layer; a bound method, so that a copy's hook is the copy's."""
        return with_input(given, options, self(input_of(given, options)))

    def forward(self, x: Tensor) -> Tensor:
        if (self.training and not self.is_frozen) or torch.isnan(self.ends).any():
            ends = torch.stack((x.detach().min(), x.detach().max())).to(self.ends)
            if torch.isfinite(ends).all():
                is_first = torch.isnan(self.ends).any()
                self.ends.copy_(ends if is_first else self.ends.lerp(ends, self._momentum))
        low, high = self.ends.tolist()
        grid = choose_affine((low, high), bits=self._bits, signed=False)
        return fake_quantize(x, grid)


class AwareModel(nn.Module):
    """A copy of a model whose convolutions and linear layers round weights and inputs.

    It trains as the model does; ``finish`` gives the plain float model back.

    Attributes:
        model: the copy.
        bits: of both grids.
        left_float: what has weights that are not rounded, by name, with its type.
    """

    def __init__(
        self,
        model: nn.Module,
        bits: int,
        per_channel: bool,
        momentum: float,
        names: Container[str] | None = None,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.model = open_attention_(uncompiled_(copied(unwrapped(model))))
        layers = {n: one for n, one in layers_of(self.model).items() if names is None or n in names}
        refuse_parametrized(layers)
        self.left_float = left_out(self.model, layers)
        self._inputs = nn.ModuleDict()
        self._hooks: dict[str, int] = {}
        for name, layer in layers.items():
            rounding = self._inputs[_key(name)] = _RoundedInput(bits, momentum)
            hook = layer.register_forward_pre_hook(rounding.before, with_kwargs=True)
            self._hooks[name] = hook.id
            rounded = _RoundedWeight(layer, bits, per_channel)
            parametrize.register_parametrization(layer, "weight", rounded, unsafe=True)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Return what the model returns, computed with rounded weights and inputs."""
        return self.model(*inputs, **options)

    def freeze(self) -> AwareModel:
        """Let the inputs' ranges and BatchNorm's statistics stay as they are from now on.

        For the last epochs, as the statistics of a deployed network no longer move.
        """
        for rounding in self._inputs.values():
            rounding.is_frozen.fill_(True)
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
                module.train = MethodType(_stays, module)  # type: ignore[method-assign]
        return self

    def finish(self) -> nn.Module:
        """Return a float model in eval mode with the trained weights, to be quantized.

        It is a copy: this one trains on as if it had not been called, as after each epoch.
        """
        model = copied(self.model)
        layers = layers_of(model)
        for name in self._hooks:
            layer = layers[name]
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            for hooks in (layer._forward_pre_hooks, layer._forward_pre_hooks_with_kwargs):
                hooks.pop(self._hooks[name], None)
        for module in model.modules():
            if getattr(vars(module).get("train"), "__func__", None) is _stays:
                del module.train
        return close_attention_(model).eval()


def finished_copy(model: nn.Module) -> nn.Module:
    """Return a float copy in eval mode, every :class:`AwareModel` in it finished.

    Also one inside of torch.compile, DataParallel or ``swa_utils.AveragedModel``.
    """
    if not any(isinstance(module, AwareModel) for module in model.modules()):
        return plain_copy(model)
    made: dict[nn.Module, nn.Module] = {}
    holder = nn.ModuleList([uncompiled_(copied(unwrapped(model)))])
    for module in list(holder.modules()):
        for name, child in module._modules.items():
            if isinstance(child, AwareModel):
                module._modules[name] = made.setdefault(child, child.finish())
    return plain_copy(holder[0])


def _stays(module: nn.Module, mode: bool = True) -> nn.Module:
    """Be a frozen module's ``train``; a bound method, so that a copy's returns the copy."""
    return module


def _key(name: str) -> str:
    """Return a layer's name as one of a ModuleDict, which the model itself has, too."""
    return f"layer:{name.replace('.', '/')}"


def quantize_aware(
    model: nn.Module, *, bits: int = 8, per_channel: bool = True, momentum: float = 0.01
) -> AwareModel:
    """Return a copy of a model that trains with rounded weights and inputs.

    Train it for some epochs at a low learning rate, then hand it to ``quantize_static``.

    Args:
        model: float32, trained as a rule; it is left untouched.
        bits: of weights and inputs.
        per_channel: a scale for each output channel of the weights, else one for all.
        momentum: of the inputs' moving average.

    Raises:
        ValueError: no convolution or linear layer, or one with a parametrization already.

    >>> aware = quantize_aware(nn.Sequential(nn.Linear(4, 3)), bits=4)
    >>> aware(torch.rand(8, 4)).sum().backward()
    >>> type(aware.finish()[0]).__name__
    'Linear'
    """
    bits = whole_number("bits", bits, 2, 16)
    need_model(model, "round", but=("scripted", "exported", "meta"))
    with torch.inference_mode(False):
        return AwareModel(model, bits, per_channel, momentum)


def simulate(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    bits: int = 8,
    calibrator: str = "min-max",
    per_channel: bool = True,
) -> AwareModel:
    """Return a copy that computes with rounded weights and inputs, calibrated and not trained.

    For any number of bits; it is as fast as float at best, and shows what an engine would lose.
    The projections of ``nn.MultiheadAttention`` are rounded as linear layers, ``in_proj.q``,
    ``in_proj.k``, ``in_proj.v`` and ``out_proj``. What is not called as a layer on the batches
    stays float, as an ``nn.LSTM`` does: ``left_float`` names it.

    Args:
        model: float32; taken in eval mode, left untouched.
        calibration: batches, as for ``quantize_static``.
        bits, per_channel: as for :func:`quantize_aware`.
        calibrator: one of ``calibrate.CALIBRATORS``, for the inputs' ranges.

    >>> net = nn.Sequential(nn.Linear(4, 3))
    >>> simulate(net, [torch.rand(8, 4)], bits=8)(torch.rand(2, 4)).shape
    torch.Size([2, 3])
    """
    bits = whole_number("bits", bits, 2, 16)
    Calibrator(calibrator, bits=bits)  # an unknown one is named
    need_model(model, "round", but=("scripted", "exported", "meta"))
    with torch.inference_mode(False):
        batches = read_batches(calibration)
        plain = open_attention_(plain_copy(model))
        refuse_parametrized(layers_of(plain))
        ranges = input_ranges(plain, batches, calibrator, bits)
        aware = AwareModel(plain, bits, per_channel, 0.01, ranges).eval()
        for rounding in aware._inputs.values():
            rounding.is_frozen.fill_(True)
        for name, ends in ranges.items():
            aware._inputs[_key(name)].ends.copy_(torch.tensor(ends))
        return aware
