"""Is a backend right? On samples that its ranges were not chosen on, and one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dlhelpers.models import copied
from dlhelpers.quantization.accuracy import Accuracy
from dlhelpers.quantization.batches import Batch, Outputs
from dlhelpers.quantization.noise import FEW, sample_sqnr_db, sqnr_db
from dlhelpers.quantization.samples import Layout, Outlier, layout_of, outliers
from dlhelpers.quantization.sizes import Sizes
from dlhelpers.trees import tensors_in

__all__ = ["Judge", "held_out", "judge_of", "most_common_first"]

_SHARE = 4  # one sample of four is held out
_MANY = 60  # samples, of which those held out are enough for a quantile
_NAMED = 3  # outliers


@dataclass
class Judge:
    """What a backend's outputs are compared with.

    Attributes:
        batches: to run it on, of any sizes.
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
        first = self.layout.samples_first(self.batches[0], self.wanted[0])
        return any(y.is_floating_point() for y in first)

    @property
    def deciding(self) -> list[int]:
        """The batches that hold a sample that decides."""
        count = len(self.batches)
        return [i for i in range(count) if not self.samples or self.samples[i] != []]

    def of_sizes(self, sizes: Sizes | None) -> Judge:
        """Return the judge on the batches that a backend takes.

        Where it takes none that was held out, it is judged on those that it was calibrated on.
        """
        if sizes is None:
            return self
        taken = [i for i, batch in enumerate(self.batches) if not sizes.why_not(batch)]
        if len(taken) == len(self.batches) or not taken:
            return self
        can_decide = not set(taken).isdisjoint(self.deciding)
        return replace(
            self,
            batches=[self.batches[i] for i in taken],
            wanted=[self.wanted[i] for i in taken],
            samples=[self.samples[i] for i in taken] if self.samples and can_decide else [],
        )

    def share_of(self, whole: Judge) -> str:
        """Return what a row should say of the batches that were left out; empty for nothing."""
        if self is whole:
            return ""
        if whole.samples and not self.samples:
            return "judged on batches that it was calibrated on, it takes no others"
        count, all_ = len(self.deciding), len(whole.deciding)
        return f"judged on {count} of {all_} batches, those of its sizes" if count < all_ else ""

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
                whole.append(self.layout.samples_first(self.batches[i], tensors))
                part.append(self._looked_at(whole[-1], i))
        return sample_sqnr_db(few, fewer), sqnr_db(ys, zs)

    def unlike(self, found: list[list[Tensor]]) -> str:
        """Return which output has another shape than the model's; empty where none has."""
        for batch, wanted, given in zip(self.batches, self.wanted, found, strict=False):
            if len(wanted) != len(given):
                return f"it gives {len(given)} tensors, the model {len(wanted)}"
            for y, z, place in zip(wanted, given, self.layout.places(batch), strict=True):
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
    """Return the judge on all samples of the batches.

    One whose output holds more or fewer tensors than the first one's lets expect is left out.
    """
    tried = copied(model)  # it may keep something of its last input
    alike = _alike(batches)
    layout = layout_of(tried, [batches[i] for i in alike], [outputs[i].tensors for i in alike])
    fitting = _fitting(batches, outputs, layout)
    wanted = [outputs[i].tensors for i in fitting]
    return Judge([batches[i] for i in fitting], wanted, layout)


def most_common_first(
    batches: list[Batch], outputs: list[Outputs]
) -> tuple[list[Batch], list[Outputs], list[int]]:
    """Return the batches with those of the most common size in front, and each one's old number.

    Where an engine fixes the sizes it takes the first one's.
    """
    sizes = [_sizes(batch) for batch in batches]
    most = max(sizes, key=sizes.count)
    order = sorted(range(len(batches)), key=lambda i: sizes[i] != most)
    return [batches[i] for i in order], [outputs[i] for i in order], order


def _sizes(batch: Batch) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in tensors_in(batch))


def _alike(batches: list[Batch]) -> list[int]:
    return [i for i, batch in enumerate(batches) if _sizes(batch) == _sizes(batches[0])]


def _fitting(batches: list[Batch], outputs: list[Outputs], layout: Layout) -> list[int]:
    pairs = enumerate(zip(batches, outputs, strict=True))
    return [i for i, (batch, output) in pairs if layout.fits(batch, output.tensors)]


def held_out(
    model: Callable[..., Any],
    batches: list[Batch],
    outputs: list[Outputs],
    numbers: Sequence[int] | None = None,
) -> tuple[list[Batch], Judge, list[str]]:
    """Hold a fourth of the samples out: ranges are chosen on the others, and judged on these.

    Of four batches and more whole ones are held out. In fewer, a sample that is held out gives its
    place to another, so that every batch keeps its size. Outliers stay among those that ranges are
    chosen on, where the others suffer from them; and so does the first batch, whose sizes engines
    are built for.

    Args:
        model, batches, outputs: the calibration set, and what the model gives for it.
        numbers: what the notes call the batches; by default their places.

    Returns:
        The batches to calibrate on, the judge, and notes for the report.
    """
    judge = judge_of(model, batches, outputs)
    layout, chosen = judge.layout, _fitting(batches, outputs, judge.layout)
    strange = outliers(batches, layout)
    numbers = range(len(batches)) if numbers is None else numbers
    notes = [_named(strange, numbers, len(layout.inputs) > 1)] if strange else []
    if not judge.is_bounded:
        notes.append(
            "the shapes of all outputs depend on the data, so that no SQNR bounds them: only "
            "test= can tell whether a backend is right"
        )
        return batches, judge, notes
    if any(place.is_open for place in layout.outputs):
        notes.append("outputs whose shapes depend on the data are not part of the SQNR")
    counts = {i: layout.size_of(batches[i]) for i in chosen}
    by_batch = len(chosen) >= _SHARE or (layout.size is None and len(chosen) > 1)
    units = [(i, s) for i in chosen for s in ([None] if by_batch else range(counts[i] or 0))]
    if len(units) < _SHARE and not by_batch:
        why = (
            "no axis of the inputs was found that counts samples"
            if layout.size is None
            else "there are fewer than four"
        )
        notes.append(f"same data: ranges were chosen and judged on the same samples ({why})")
        return batches, judge, notes
    alike = set(_alike(batches))
    samples = sum(counts[i] or 1 for i in chosen)
    kept = _kept_out(units, strange, samples, alike, counts[0] in (None, 1))
    held = {i: [s for b, s in kept if b == i] for i in chosen}
    # one too slow for all of them is judged on some, and timed on those of the first one's sizes
    run = [i for i in chosen if held[i] or i in alike or not by_batch]
    run.sort(key=lambda i: (not held[i], i not in alike))
    judge.batches = [batches[i] for i in run]
    judge.wanted = [outputs[i].tensors for i in run]
    if by_batch:
        judge.samples = [None if held[i] else [] for i in run]
        rest = [batch for i, batch in enumerate(batches) if not held.get(i)]
        what = f"{len(kept)} of {len(batches)} batches"
    else:
        judge.samples = [held[i] for i in run]
        rest = [
            layout.picked(batch, _others(held[i], counts[i])) if held.get(i) else batch
            for i, batch in enumerate(batches)
            if i not in held or len(held[i]) < counts[i]
        ]
        what = f"{len(kept)} of {len(units)} samples"
    be = "was" if len(kept) == 1 else "were"
    notes.append(f"{what} {be} held out of the calibration, to judge on")
    return rest, judge, notes


def _kept_out(
    units: list[tuple[int, int | None]],
    strange: list[Outlier],
    samples: int,
    alike: set[int],
    is_first_whole: bool,
) -> list[tuple[int, int | None]]:
    """Return a fourth of the units, evenly, of those without an outlier where there are any.

    Of many samples at least as many as a quantile needs: the minimum of a few is a harder judge.

    Args:
        units: (batch, sample), or (batch, None) for whole batches.
        strange: the outliers.
        samples: in all units.
        alike: batches of the first one's sizes, of which one is held out for engines that take no
            others.
        is_first_whole: whether a unit of the first batch would be all of it.
    """
    bad = {(one.batch, one.sample) for one in strange} | {(one.batch, None) for one in strange}
    may = [unit for unit in units if unit[0] != 0 or not (unit[1] is None or is_first_whole)]
    clean = [unit for unit in may if unit not in bad] or may
    count = max(1, len(units) // _SHARE)
    if samples >= _MANY:
        count = max(count, math.ceil(FEW * len(units) / samples))
    step = max(len(clean) // count, 1)
    kept = clean[step - 1 :: step][:count]
    like_first = [unit for unit in clean if unit[0] in alike]
    if like_first and not any(unit[0] in alike for unit in kept):
        kept[0] = like_first[-1]
    return kept


def _others(held: list[int], size: int) -> list[int]:
    """Return the samples of a batch, with others in the places of those that are held out."""
    rest = [i for i in range(size) if i not in held]
    return [rest[i % len(rest)] if i in held else i for i in range(size)]


def _named(strange: list[Outlier], numbers: Sequence[int], several: bool) -> str:
    named = [
        f"batch {numbers[one.batch]}"
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
