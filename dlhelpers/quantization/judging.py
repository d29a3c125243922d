"""Is a backend right? On samples that its ranges were not chosen on, and one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dlhelpers.models import copied
from dlhelpers.quantization.accuracy import Accuracy
from dlhelpers.quantization.batches import Batch, Outputs
from dlhelpers.quantization.noise import FEW, sample_sqnr_db, sqnr_db
from dlhelpers.quantization.samples import Layout, Outlier, layout_of, outliers
from dlhelpers.trees import tensors_in

__all__ = ["Judge", "held_out", "judge_of"]

_SHARE = 4  # one sample of four is held out
_MANY = 60  # samples, of which those held out are enough for a quantile
_NAMED = 3  # outliers


@dataclass
class Judge:
    """What a backend's outputs are compared with.

    Attributes:
        batches: to run it on, all of the same sizes.
        wanted: for each of them the output's tensors, of the model as it was given.
        layout: where the samples stand.
        samples: for each batch those that decide; None for all.
        accuracy: the test, where one was given.
    """

    batches: list[Batch]
    wanted: list[list[Tensor]]
    layout: Layout
    samples: list[list[int] | None] = field(default_factory=list)
    accuracy: Accuracy | None = None

    @property
    def is_bounded(self) -> bool:
        """Whether there is an output whose error can be measured."""
        places = zip(self.wanted[0], self.layout.outputs, strict=True)
        return any(y.is_floating_point() and not place.is_open for y, place in places)

    def ratios(self, found: list[list[Tensor]]) -> tuple[float, float] | None:
        """Return the SQNR that decides, of the samples held out, and that of all together.

        Args:
            found: the outputs' tensors of the first of the batches.

        Returns:
            None where every output's shape depends on the data.
        """
        if not self.is_bounded:
            return None
        if self.unlike(found):
            return -math.inf, -math.inf
        ys, zs, few, fewer = [], [], [], []
        for i, (wanted, given) in enumerate(zip(self.wanted, found, strict=False)):
            for tensors, whole, part in ((wanted, ys, few), (given, zs, fewer)):
                whole.append(self.layout.samples_first(tensors))
                part.append(self._looked_at(whole[-1], i))
        return sample_sqnr_db(few, fewer), sqnr_db(ys, zs)

    def unlike(self, found: list[list[Tensor]]) -> str:
        """Return which output has another shape than the model's; empty where none has."""
        for wanted, given in zip(self.wanted, found, strict=False):
            if len(wanted) != len(given):
                return f"it gives {len(given)} tensors, the model {len(wanted)}"
            for y, z, place in zip(wanted, given, self.layout.outputs, strict=True):
                if y.shape != z.shape and not place.is_open:
                    return f"an output has the shape {list(z.shape)}, the model's {list(y.shape)}"
        return ""

    def _looked_at(self, tensors: list[Tensor], batch: int) -> list[Tensor]:
        samples = self.samples[batch] if self.samples else None
        if samples is None:
            return tensors
        return [
            t[:0] if not samples else t if place.axis is None else t[samples]
            for t, place in zip(tensors, self.layout.outputs, strict=True)
        ]


def judge_of(model: Callable[..., Any], batches: list[Batch], outputs: list[Outputs]) -> Judge:
    """Return the judge on all samples of the batches that are alike."""
    chosen = _alike(batches)
    alike, wanted = [batches[i] for i in chosen], [outputs[i].tensors for i in chosen]
    tried = copied(model)  # it may keep something of its last input
    return Judge(alike, wanted, layout_of(tried, alike, wanted))


def _alike(batches: list[Batch]) -> list[int]:
    sizes = [[tensor.shape for tensor in tensors_in(batch)] for batch in batches]
    return [i for i, each in enumerate(sizes) if each == sizes[0]]


def held_out(
    model: Callable[..., Any], batches: list[Batch], outputs: list[Outputs]
) -> tuple[list[Batch], Judge, list[str]]:
    """Hold a fourth of the samples out: ranges are chosen on the others, and judged on these.

    Of four batches and more whole ones are held out. In fewer, a sample that is held out gives its
    place to another, so that every batch keeps its size. Outliers stay among those that ranges are
    chosen on, where the others suffer from them.

    Returns:
        The batches to calibrate on, the judge, and notes for the report.
    """
    judge = judge_of(model, batches, outputs)
    chosen, size = _alike(batches), judge.layout.size
    strange = outliers(batches, judge.layout)
    notes = [_named(strange, len(judge.layout.inputs) > 1)] if strange else []
    if not judge.is_bounded:
        notes.append(
            "the shapes of all outputs depend on the data, so that no SQNR bounds them: only "
            "test= can tell whether a backend is right"
        )
    elif any(place.is_open for place in judge.layout.outputs):
        notes.append("outputs whose shapes depend on the data are not part of the SQNR")
    by_batch = len(chosen) >= _SHARE or (size is None and len(chosen) > 1)
    if by_batch:
        units = [(i, None) for i in chosen]
    else:
        units = [(i, sample) for i in chosen for sample in range(size or 0)]
        if len(units) < _SHARE:
            why = (
                "no axis of the inputs counts samples"
                if size is None
                else "fewer than four of one size"
            )
            notes.append(f"same data: ranges were chosen and judged on the same samples ({why})")
            return batches, judge, notes
    kept = _kept_out(units, strange, (size or 1) if by_batch else 1)
    held = {i: [s for b, s in kept if b == i] for i in chosen}
    chosen.sort(key=lambda i: not held[i])  # one too slow for all of them is judged on some
    judge.batches = [batches[i] for i in chosen]
    judge.wanted = [outputs[i].tensors for i in chosen]
    if by_batch:
        judge.samples = [None if held[i] else [] for i in chosen]
        rest = [batch for i, batch in enumerate(batches) if not held.get(i)]
        what = f"{len(kept)} of {len(batches)} batches"
    else:
        judge.samples = [held[i] for i in chosen]
        rest = [
            judge.layout.picked(batch, _others(held[i], size)) if held.get(i) else batch
            for i, batch in enumerate(batches)
        ]
        what = f"{len(kept)} of {len(units)} samples"
    be = "was" if len(kept) == 1 else "were"
    notes.append(f"{what} {be} held out of the calibration, to judge on")
    return rest, judge, notes


def _kept_out(
    units: list[tuple[int, int | None]], strange: list[Outlier], per_unit: int
) -> list[tuple[int, int | None]]:
    """Return a fourth of the units, evenly, of those without an outlier where there are any.

    Of many samples at least as many as a quantile needs: the minimum of a few is a harder judge.
    """
    bad = {(one.batch, one.sample) for one in strange} | {(one.batch, None) for one in strange}
    clean = [unit for unit in units if unit not in bad] or units
    count = max(1, len(units) // _SHARE)
    if len(units) * per_unit >= _MANY:
        count = max(count, math.ceil(FEW / per_unit))
    step = max(len(clean) // count, 1)
    return clean[step - 1 :: step][:count]


def _others(held: list[int], size: int) -> list[int]:
    """Return the samples of a batch, with others in the places of those that are held out."""
    rest = [i for i in range(size) if i not in held]
    return [rest[i % len(rest)] if i in held else i for i in range(size)]


def _named(strange: list[Outlier], several: bool) -> str:
    named = [
        f"batch {one.batch}"
        + ("" if one.sample is None else f", sample {one.sample}")
        + f", input {one.place}" * several
        + f" ({one.times:,.0f} times)"
        for one in strange[:_NAMED]
    ]
    more = f" and {len(strange) - _NAMED} more" if len(strange) > _NAMED else ""
    outlier, it = ("an outlier", "it") if len(strange) == 1 else ("outliers", "them")
    return (
        f"{outlier} in the calibration set, by the largest absolute value over the median "
        f"sample's: {'; '.join(named)}{more}. Ranges that hold {it} are coarse for all others: "
        f"leave {it} out if no such input is to be expected"
    )
