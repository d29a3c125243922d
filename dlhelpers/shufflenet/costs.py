"""What does each layer of a model cost? Multiply-adds, FLOPs, bytes, and the time they imply.

An operator that moves b bytes and does f FLOPs takes max(b / bandwidth, f / peak) seconds
if its bytes come from memory; from a cache they may come faster.

Source: Williams et al. 2009 (roofline), doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import nn

from dlhelpers.arguments import model_inputs
from dlhelpers.models import need_model, unwrapped
from dlhelpers.roofline import Roofline
from dlhelpers.shufflenet.counting import Counter
from dlhelpers.shufflenet.formulas import conv_linear_flops, flops_of
from dlhelpers.shufflenet.moving import Moved
from dlhelpers.tables import html_table, text_table
from dlhelpers.trees import tensors_in

__all__ = ["LayerCost", "LayerCosts", "layer_costs"]

Policy = Literal["conv+linear", "all"]


@dataclass(frozen=True)
class LayerCost:
    """One operator of a forward pass.

    Attributes:
        module: qualified name of the module that called it.
        operator: the dispatcher's name.
        multiply_adds: pairs of a product and a sum, as the paper's FLOPs and thop's MACs.
        flops: products and sums, each for itself: two to a multiply-add.
        elements, nbytes: read and written, each tensor once.
        predicted_s: max(nbytes / bandwidth, flops of policy "all" / peak of the type that it
            computes in); None without peaks, or where they lack that type's.
        bound: what decides that: ``memory`` or ``arithmetic``; or ``no peak for`` a type; empty
            without peaks.
        formula: whether the policy has one for this operator; without one its multiply_adds and
            flops are 0 and mean nothing.
        shapes: of the tensors read, then of those written.
    """

    module: str
    operator: str
    multiply_adds: int
    flops: int
    elements: int
    nbytes: int
    predicted_s: float | None
    bound: str
    formula: bool
    shapes: tuple[tuple[int, ...], ...] = field(repr=False, default=())
    call: Any = field(repr=False, compare=False, default=None)

    @property
    def intensity(self) -> float:
        """FLOPs per byte: below the roofline's ridge memory decides."""
        return self.flops / self.nbytes if self.nbytes else 0.0


@dataclass(frozen=True)
class LayerCosts:
    """The operators of a forward pass, in order, and their sums.

    Attributes:
        layers: one entry for each operator that moves bytes.
        policy: what is counted.
        parameters: of the model.
        activations: elements that convolutions and matrix products write.
        without_formula: operator -> bytes it moved, for those that the policy cannot count.
        left_out: operator -> bytes it moved, for those that the policy leaves out by its rule.
        roofline: the peaks that were given, or None.
    """

    layers: tuple[LayerCost, ...]
    policy: Policy
    parameters: int
    activations: int
    without_formula: Mapping[str, int]
    left_out: Mapping[str, int]
    roofline: Roofline | None = field(repr=False, default=None)

    @property
    def multiply_adds(self) -> int:
        """Sum over the layers."""
        return sum(layer.multiply_adds for layer in self.layers)

    @property
    def flops(self) -> int:
        """Sum over the layers."""
        return sum(layer.flops for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Sum over the layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def predicted_s(self) -> float | None:
        """Sum over the layers: one after the other, without overheads.

        None without peaks, or where a layer has no predicted time.
        """
        times = [layer.predicted_s for layer in self.layers]
        return None if self.roofline is None or None in times else sum(times)

    def by_operator(self) -> dict[str, int]:
        """Return operator -> FLOPs."""
        found: dict[str, int] = {}
        for layer in self.layers:
            found[layer.operator] = found.get(layer.operator, 0) + layer.flops
        return found

    def _rows(self, most: int) -> list[list[str]]:
        has_times = self.roofline is not None
        key = attrgetter("nbytes" if self.predicted_s is None else "predicted_s")
        first = sorted(self.layers, key=key, reverse=True)[:most]
        return [
            [
                layer.module,
                layer.operator,
                f"{layer.multiply_adds / 1e6:,.2f}" if layer.formula else "?",
                f"{layer.flops / 1e6:,.2f}" if layer.formula else "?",
                f"{layer.nbytes / 2**20:,.2f}",
                f"{layer.intensity:,.1f}",
                *([_us(layer.predicted_s), layer.bound] if has_times else []),
            ]
            for layer in first
        ]

    def _notes(self) -> list[str]:
        total = (
            f"in all {self.multiply_adds / 1e6:,.1f} M multiply-adds, {self.flops / 1e6:,.1f} M "
            f"FLOPs (policy {self.policy}), {self.nbytes / 2**20:,.1f} MiB moved"
        )
        if self.predicted_s is not None:
            total += f"; from memory {1e3 * self.predicted_s:,.2f} ms"
            total += " by the peaks of a loaded machine" * self.roofline.loaded
        notes = [total]
        lacking = sorted({one.bound for one in self.layers if one.bound.startswith("no peak")})
        if lacking:
            notes.append(f"NO TIME IS PREDICTED: {', '.join(lacking)} among roofline.gflops")
        for names, what in (
            (self.left_out, "left out by the policy"),
            (self.without_formula, "WITHOUT A FORMULA"),
        ):
            if names:
                moved = ", ".join(f"{name} ({n / 2**20:,.1f} MiB)" for name, n in names.items())
                notes.append(f"{what}: {moved}")
        return notes

    def __str__(self) -> str:
        rest = max(0, len(self.layers) - 20)
        more = [f"... and {rest} more"] if rest else []
        table = text_table(self._columns(), self._rows(20), names=2)
        return "\n".join([table, *more, *self._notes()])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        most = "that move most" if self.predicted_s is None else "that take longest"
        more = f"<p>The 20 {most}, of {len(self.layers)}.</p>" if len(self.layers) > 20 else ""
        return f"{html_table(self._columns(), self._rows(20), names=2)}{more}{notes}"

    def _columns(self) -> tuple[str, ...]:
        return _COLUMNS[:-2] if self.roofline is None else _COLUMNS


def _us(seconds: float | None) -> str:
    return "?" if seconds is None else f"{1e6 * seconds:,.1f}"


_COLUMNS = (
    "module",
    "operator",
    "M multiply-adds",
    "M FLOPs",
    "MiB",
    "FLOP/byte",
    "predicted µs",
    "bound by",
)


def layer_costs(
    model: nn.Module,
    inputs: Any,
    *,
    policy: Policy = "conv+linear",
    peaks: Roofline | None = None,
) -> LayerCosts:
    """Count what each operator of a forward pass does, moves, and takes from memory.

    The pass runs on tensors without data: no memory, and the model is left as it is, with all that
    its forward keeps.

    Args:
        model: in the mode (train or eval) that is to be counted.
        inputs: a tensor; a tuple of positional arguments, or a mapping of keyword ones; a mapping
            that is itself the only argument goes into a tuple of one.
        policy: ``conv+linear``: convolutions, matrix products and attention alone, as
            ``torch.utils.flop_counter``; also attention on the CPU, which that leaves out, and in
            eval mode, where it cannot see into ``nn.MultiheadAttention``. ``all``: everything with
            arithmetic, by these rules, in FLOPs: 1 for each element that an element-wise operator
            writes (an exponential counts as one); BatchNorm 2 for each element in eval mode, 7 in
            train mode; other norms 7; softmax 5; losses 3; pooling and reductions 1 for each
            element read; an FFT of n numbers 5 n log2 n.
        peaks: of the machine to predict times for, such as ``roofline.roofline()`` of this one;
            without them no time is predicted, and nothing is measured. An operator that computes in
            a type whose peak they lack has no predicted time; whole numbers that are no matrix
            product need none.

    Raises:
        TypeError: the inputs hold no tensor.
        ValueError: another policy; a size or a choice in the model depends on data, or it computes
            in threads of its own.

    >>> costs = layer_costs(nn.Conv2d(16, 32, 1, bias=False), torch.zeros(1, 16, 8, 8))
    >>> costs.multiply_adds, costs.flops, costs.layers[0].elements
    (32768, 65536, 3584)
    """
    if policy not in ("conv+linear", "all"):
        raise ValueError(f'policy must be "conv+linear" or "all", got {policy!r}')
    need_model(model, "count")
    model = unwrapped(model)
    counter = Counter(model)
    counter.run(*model_inputs(inputs))
    layers, unknown, left_out, activations = [], {}, {}, 0
    for module, func, args, kwargs, out, moved in counter.calls:
        name = func._schema.name.removeprefix("aten::")
        own = conv_linear_flops(func, args, kwargs, out)
        everything = flops_of(func, args, kwargs, out)
        if own:
            activations += next(tensors_in(out)).numel()
        counted = own if policy == "conv+linear" else everything
        if everything is None:
            unknown[name] = unknown.get(name, 0) + moved.nbytes
        elif policy == "conv+linear" and own is None:
            left_out[name] = left_out.get(name, 0) + moved.nbytes
        predicted_s, bound = _predicted(moved, everything or 0, bool(own), peaks)
        layers.append(
            LayerCost(
                module=module,
                operator=name,
                multiply_adds=(own or 0) // 2,
                flops=counted or 0,
                elements=moved.elements,
                nbytes=moved.nbytes,
                predicted_s=predicted_s,
                bound=bound,
                formula=counted is not None,
                shapes=tuple(tuple(t.shape) for t in (*moved.read, *moved.written)),
                call=(func, args, kwargs),
            )
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return LayerCosts(tuple(layers), policy, parameters, activations, unknown, left_out, peaks)


def _predicted(
    moved: Moved, flops: int, is_product: bool, peaks: Roofline | None
) -> tuple[float | None, str]:
    """Return the roofline's seconds, and what decides them, or which peak it lacks."""
    if peaks is None:
        return None, ""
    by_memory, by_arithmetic = moved.nbytes / (1e9 * peaks.bandwidth_gb_s), 0.0
    dtype = _computed_in(moved, is_product)
    if flops and dtype is not None:
        peak = peaks.peak_gflops(dtype)
        if not peak:
            return None, f"no peak for {str(dtype).removeprefix('torch.')}"
        by_arithmetic = flops / (1e9 * peak)
    return max(by_memory, by_arithmetic), "memory" if by_memory >= by_arithmetic else "arithmetic"


def _computed_in(moved: Moved, is_product: bool) -> torch.dtype | None:
    """Return the type of an operator's numbers; None where it computes with indices alone."""
    for tensor in (*moved.written, *moved.read):
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.dtype.to_real()
    return moved.read[0].dtype if is_product else None
