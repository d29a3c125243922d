"""What does a layer compute when its weights and its input are rounded to a grid?

    x' = S (clip(round(x / S) + Z) - Z),    dx'/dx = 1 where nothing is clipped, else 0

in float32, so that rounding can be watched, layer by layer, and trained against: the gradient
passes the rounding as if it were not there (straight-through estimator).

Sources: Jacob et al. 2018, arXiv:1712.05877, section 3; Bengio et al. 2013, arXiv:1308.3432.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from dlhelpers.quantization.affine import Affine, choose_affine, dequantize, quantize
from dlhelpers.quantization.batches import run_float
from dlhelpers.quantization.calibrate import Calibrator

__all__ = [
    "fake_quantize",
    "input_of",
    "input_ranges",
    "layers_of",
    "left_out",
    "refuse_parametrized",
    "rounded",
    "weight_affine",
    "with_input",
]


def fake_quantize(x: Tensor, affine: Affine) -> Tensor:
    """Return x rounded to the grid, in x's type, with the straight-through gradient.

    >>> import torch
    >>> x = torch.tensor([0.26, 3.0], requires_grad=True)
    >>> y = fake_quantize(x, choose_affine((-1.0, 1.0), bits=2, symmetric=True))
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.0, 1.0], [1.0, 0.0])
    """
    scale, zero_point = affine.spread(x)
    # what rounds to the first or the last integer is inside: the largest weight learns, too
    low, high = affine.qmin - zero_point - 0.5, affine.qmax - zero_point + 0.5
    steps = x.detach() / scale
    passed = x * ((steps >= low) & (steps <= high)).to(x.dtype)
    on_grid = dequantize(quantize(x, affine), affine).to(x.dtype)
    return passed + (on_grid - passed).detach()


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers, by qualified name, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd | nn.Linear)
    }


def left_out(model: nn.Module, names: Container[str]) -> tuple[str, ...]:
    """Return the modules with matrices of their own that are not among the names, with types.

    An LSTM is one, an embedding, a module whose forward calls ``F.linear`` on its own parameters,
    and a layer whose weight another module uses without calling it.
    """
    return tuple(
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if name not in names and any(map(_is_matrix, _own(module)))
    )


def _is_matrix(parameter: Tensor | None) -> bool:
    return parameter is not None and sum(size > 1 for size in parameter.shape) > 1


def _own(module: nn.Module) -> Iterable[Tensor | None]:
    if isinstance(module, torch.jit.ScriptModule):
        return module.parameters(recurse=False)
    return module._parameters.values()


def refuse_parametrized(layers: dict[str, nn.Module]) -> None:
    """Raise where a layer's weight is computed from other tensors.

    Raises:
        ValueError: a layer has a parametrization, or there is no layer.
    """
    if not layers:
        raise ValueError("the model has neither convolutions nor linear layers to round")
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer):
            raise ValueError(
                f"the weight of {name or 'the model'} has a parametrization already (weight_norm, "
                "spectral_norm): take it off with "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
        if not isinstance(layer.weight, nn.Parameter):
            raise ValueError(
                f"the weight of {name or 'the model'} is computed from other tensors at each call "
                "(pruning, the old weight_norm or spectral_norm): make it a parameter first with "
                "torch.nn.utils.prune.remove, remove_weight_norm or remove_spectral_norm"
            )


def weight_affine(layer: nn.Module, bits: int = 8, *, per_channel: bool = True) -> Affine:
    """Return the symmetric grid of a layer's weights, by default one scale for each output.

    The outputs of a transposed convolution with groups share the scales of their place in the
    group, as the weight's dimension 1 has it.
    """
    axis = int(isinstance(layer, _ConvTransposeNd))
    return choose_affine(
        layer.weight.detach(), bits=bits, symmetric=True, axis=axis if per_channel else None
    )


def input_of(arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """Return a layer's input, given by position or by name."""
    return arguments[0] if arguments else options["input"]


def with_input(
    arguments: tuple[Any, ...], options: dict[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a layer's arguments with another input."""
    if arguments:
        return (value, *arguments[1:]), options
    return arguments, {**options, "input": value}


def input_ranges(
    model: nn.Module, batches: Iterable[tuple[Any, ...]], calibrator: str, bits: int
) -> dict[str, tuple[float, float]]:
    """Return the range of each layer's input over batches, of those layers that are called."""
    seen: dict[str, Calibrator] = {}
    hooks = []
    for name, layer in layers_of(model).items():

        def watch(_: nn.Module, given: tuple[Any, ...], options: Any, name: str = name) -> None:
            found = seen.setdefault(name, Calibrator(calibrator, bits=bits))
            found.observe(input_of(given, options))

        hooks.append(layer.register_forward_pre_hook(watch, with_kwargs=True))
    try:
        run_float(model, list(batches))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found.range() for name, found in seen.items() if found.has_seen}


@contextmanager
def rounded(
    layer: nn.Module, *, weight: Affine | None = None, inputs: Affine | None = None
) -> Iterator[None]:
    """Let a layer compute with rounded weights or rounded inputs inside of a ``with`` block.

    The weight is another parameter meanwhile: layers that share it keep theirs.
    """
    kept = layer.weight
    hook = None
    if inputs is not None:

        def round_input(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            value = fake_quantize(input_of(arguments, options), inputs)
            return with_input(arguments, options, value)

        hook = layer.register_forward_pre_hook(round_input, with_kwargs=True)
    try:
        if weight is not None:
            layer.weight = nn.Parameter(fake_quantize(kept.detach(), weight), kept.requires_grad)
        yield
    finally:
        layer.weight = kept
        if hook is not None:
            hook.remove()
