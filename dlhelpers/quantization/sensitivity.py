"""Which layer costs most when it is rounded? Round one at a time, and look at the output."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter as _clock
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.arguments import whole_number
from dlhelpers.models import need_model, plain_copy, unwrapped
from dlhelpers.progress import bar
from dlhelpers.quantization.affine import Affine, choose_affine
from dlhelpers.quantization.attention import open_attention_, part_of_attention
from dlhelpers.quantization.batches import (
    Batch,
    Outputs,
    batch_size,
    first_samples,
    read_batches,
    run_float,
)
from dlhelpers.quantization.calibrate import Calibrator
from dlhelpers.quantization.fake import (
    input_ranges,
    layers_of,
    left_out,
    refuse_parametrized,
    rounded,
    weight_affine,
)
from dlhelpers.quantization.judging import judge_of
from dlhelpers.quantization.noise import sqnr_db
from dlhelpers.tables import html_table, text_table
from dlhelpers.untouched import shared_untouched

__all__ = ["LayerRow", "SensitivityReport", "ranked_layers", "sensitivity"]

_RANKING_S = 20.0


@dataclass(frozen=True)
class LayerRow:
    """One layer, rounded alone.

    Attributes:
        name: qualified.
        kind: its type's name.
        sqnr_db: of the model's output with this layer's weights and input rounded.
        weights_db, inputs_db: with the one or the other rounded alone.
        accuracy_lost: points of accuracy (0 to 1) against the float model; None without targets.
    """

    name: str
    kind: str
    sqnr_db: float
    weights_db: float
    inputs_db: float
    accuracy_lost: float | None = None


@dataclass(frozen=True)
class SensitivityReport:
    """The layers, the one that costs most first.

    Attributes:
        rows: ordered by ``accuracy_lost`` where targets were given, then by ``sqnr_db``.
        bits: of the grid.
        left_float: what has weights and was not rounded, by name, with its type.
    """

    rows: tuple[LayerRow, ...]
    bits: int
    left_float: tuple[str, ...] = ()

    _HEAD = ("layer", "type", "SQNR (dB)", "weights alone", "input alone", "accuracy lost")

    def _table(self) -> list[list[str]]:
        return [
            [
                *(row.name, row.kind),
                *(f"{value:.1f}" for value in (row.sqnr_db, row.weights_db, row.inputs_db)),
                "" if row.accuracy_lost is None else f"{100 * row.accuracy_lost:.1f} points",
            ]
            for row in self.rows
        ]

    def __str__(self) -> str:
        table = text_table(self._HEAD, self._table(), names=2)
        return "\n".join([f"{self.bits} bits, one layer at a time:", table, *self._notes()])

    def _repr_html_(self) -> str:
        title = f"<p>{self.bits} bits, one layer at a time:</p>"
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        return title + html_table(self._HEAD, self._table(), names=2) + notes

    def _notes(self) -> list[str]:
        return [f"not rounded: {', '.join(self.left_float)}"] if self.left_float else []


def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    *,
    bits: int = 8,
    calibrator: str = "min-max",
    targets: Tensor | None = None,
    progress: bool | None = None,
) -> SensitivityReport:
    """Return which layer costs most when its weights and its input are rounded to n bits.

    Weights are rounded symmetrically with a scale for each output channel, inputs asymmetrically
    with one scale; every other layer stays float. The projections of ``nn.MultiheadAttention`` are
    layers here, ``in_proj.q``, ``in_proj.k``, ``in_proj.v`` and ``out_proj``. What else has weights
    stays float, as an LSTM does, and is named.

    Args:
        model: float32; a copy is taken in eval mode.
        data: batches, as for ``quantize_static``.
        bits: 2 to 16.
        calibrator: that chooses the inputs' ranges.
        targets: class numbers [N] of all batches' samples together, for the accuracy lost.
        progress: a bar over the layers; None draws it in a terminal only.

    Raises:
        TypeError, ValueError: as ``quantize_static``; a model without convolutions and linear
            layers; bits that are no whole number from 2 to 16; targets of another length.

    Cost: three forward passes over all batches for each layer.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [row.kind for row in sensitivity(net, [torch.rand(16, 4)], bits=4).rows]
    ['Linear', 'Linear']
    """
    bits = whole_number("bits", bits, 2, 16)
    Calibrator(calibrator, bits=bits)  # an unknown one is named
    need_model(model, "round", but=("scripted", "exported", "meta"))
    with torch.inference_mode(False), shared_untouched(unwrapped(model)):
        return _report(
            open_attention_(plain_copy(model)), data, bits, calibrator, targets, progress
        )


def _report(
    model: nn.Module,
    data: Iterable[Any],
    bits: int,
    calibrator: str,
    targets: Tensor | None,
    progress: bool | None,
) -> SensitivityReport:
    batches = read_batches(data)
    refuse_parametrized(layers_of(model))
    wanted = [outputs.tensors for outputs in run_float(model, batches)]
    grids = _input_grids(model, batches, bits, calibrator)
    right = None if targets is None else _share_right(wanted, targets)
    rows = []
    called = {name: layer for name, layer in layers_of(model).items() if name in grids}
    for name, layer in bar(called.items(), progress=progress, desc="layers", leave=False):
        weight, inputs = weight_affine(layer, bits), grids[name]
        both = _outputs(model, batches, layer, weight, inputs)
        rows.append(
            LayerRow(
                name,
                type(layer).__name__,
                sqnr_db(wanted, both),
                sqnr_db(wanted, _outputs(model, batches, layer, weight, None)),
                sqnr_db(wanted, _outputs(model, batches, layer, None, inputs)),
                None if right is None else right - _share_right(both, targets),
            )
        )
    rows.sort(key=lambda row: (-(row.accuracy_lost or 0.0), row.sqnr_db))
    return SensitivityReport(tuple(rows), bits, left_out(model, called))


def ranked_layers(
    model: nn.Module, batches: list[Batch], progress: bool | None = None
) -> list[str]:
    """Return the layers' names, the one whose rounding to 8 bits costs most first.

    Of an ``nn.MultiheadAttention``, whose projections have no names of their own, it is the name.
    One forward pass for each layer, over as many samples as fit into ``_RANKING_S`` in all.
    """
    model = open_attention_(plain_copy(model))
    few = _affordable(model, batches[:2])
    judge = judge_of(model, few, run_float(model, few))
    grids = _input_grids(model, few, 8, "min-max")
    called = {name: layer for name, layer in layers_of(model).items() if name in grids}
    ratios = {}
    for name, layer in bar(called.items(), progress=progress, desc="layers", leave=False):
        weight, inputs = weight_affine(layer, 8), grids[name]
        found = judge.ratios(_outputs(model, judge.batches, layer, weight, inputs))
        ratios[name] = found or (0.0, 0.0)  # no output that could be compared
    order = sorted(ratios, key=ratios.__getitem__)
    return list(dict.fromkeys(part_of_attention(model, name) for name in order))


def _affordable(model: nn.Module, batches: list[Batch]) -> list[Batch]:
    """Return the batches, or the first samples of one, so that a pass for each layer is in time."""
    start = _clock()
    run_float(model, batches[:1])
    share = _RANKING_S / max((_clock() - start) * len(layers_of(model)), 1e-9)
    if share >= len(batches):
        return batches
    size = batch_size(batches[0])
    if share >= 1 or size is None:
        return batches[:1]
    one = first_samples(batches[0], max(1, int(share * size)))
    try:
        run_float(model, [one])
    except ValueError:  # a model of one batch size
        return batches[:1]
    return [one]


def _input_grids(
    model: nn.Module, batches: list[Batch], bits: int, calibrator: str
) -> dict[str, Affine]:
    """Return the grid of each layer's input, of those that are called."""
    return {
        name: choose_affine(ends, bits=bits, signed=False)
        for name, ends in input_ranges(model, batches, calibrator, bits).items()
    }


def _outputs(
    model: nn.Module,
    batches: list[Batch],
    layer: nn.Module,
    weight: Affine | None,
    inputs: Affine | None,
) -> list[list[Tensor]]:
    with torch.no_grad(), rounded(layer, weight=weight, inputs=inputs):
        return [Outputs(model(*batch)).tensors for batch in batches]


def _share_right(outputs: list[list[Tensor]], targets: Tensor) -> float:
    predicted = torch.cat([tensors[0] for tensors in outputs]).argmax(1)
    if predicted.shape != targets.shape:
        raise ValueError(
            f"targets must be {list(predicted.shape)}, one class number a sample of all batches, "
            f"got {list(targets.shape)}"
        )
    return (predicted == targets).double().mean().item()
