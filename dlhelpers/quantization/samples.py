"""Which axes of a model's inputs and outputs count its samples? Run with another number, and look.

Sizes that merely coincide tell nothing: ten classes beside ten images, a square mask, time first.
An axis of the inputs counts samples if the model takes another size there, and what it gives for
the last of them does not depend on how many stood before them. An output may also hold a list with
an entry for each sample, as detectors give one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dlhelpers.quantization.batches import Batch, Outputs
from dlhelpers.trees import flatten, map_leaves, tensors_in

__all__ = ["Layout", "Outlier", "layout_of", "outliers"]

_TRIALS = 12
_SAME = 1e-3  # noise over signal, 30 dB: another batch size rounds otherwise, half types most
_APART, _DEVIATIONS = 4.0, 6.0  # times the median; robust standard deviations of the logarithm
_FEW = 0.2  # of the samples, else they are no outliers
_ENOUGH = 4  # samples, for a median that an outlier does not move


@dataclass(frozen=True)
class Place:
    """Where an output's samples stand.

    Attributes:
        axis: None where there are none: the batch is one sample. Of size N k for N samples, as
            where [N, T, C] is given as [N * T, C].
        is_open: whether another shape follows from other data, as after non-maximum suppression.
    """

    axis: int | None = None
    is_open: bool = False


@dataclass(frozen=True)
class Layout:
    """The samples of batches, which may have different sizes.

    Attributes:
        size: samples in the first batch; None where no axis counts them.
        inputs: for each tensor of the inputs its axis of samples, None for one without.
        outputs: for each tensor of the output, or for each kind where ``lists`` says so.
        lists: how the output's tensors stand where each belongs to one sample alone: "samples" for
            all kinds of the first one, then of the second ([{boxes, scores}, {boxes, scores}]);
            "kinds" for one kind of all samples, then the next ({boxes: [...], scores: [...]}).
    """

    size: int | None
    inputs: tuple[int | None, ...]
    outputs: tuple[Place, ...]
    lists: str = ""

    def size_of(self, batch: Batch) -> int | None:
        """Return the number of samples in a batch; None where no axis counts them."""
        pairs = zip(tensors_in(batch), self.inputs, strict=True)
        return next((t.shape[axis] for t, axis in pairs if axis is not None), None)

    def fits(self, batch: Batch, tensors: list[Tensor]) -> bool:
        """Whether an output has the number of tensors that the batch lets expect."""
        return len(tensors) == len(self.outputs) * (self.size_of(batch) if self.lists else 1)

    def places(self, batch: Batch) -> list[Place]:
        """Return the place of each tensor of the output for a batch."""
        if not self.lists:
            return list(self.outputs)
        size = self.size_of(batch)
        if self.lists == "samples":
            return list(self.outputs) * size
        return [place for place in self.outputs for _ in range(size)]

    def picked(self, batch: Batch, samples: Sequence[int]) -> Batch:
        """Return the batch of these samples of a batch."""
        index = torch.tensor(samples)
        return _mapped(batch, self.inputs, lambda t, axis: t.index_select(axis, index))

    def samples_first(self, batch: Batch, tensors: list[Tensor]) -> list[Tensor]:
        """Return the tensors of the output for a batch with the samples along the first axis.

        One whose shape depends on the data is left out: an empty whole number stands for it. Of
        lists each kind is one tensor, filled up with zeros where samples have different shapes.
        """
        size = self.size_of(batch)
        found: list[Tensor | list[Tensor]] = list(tensors)
        if self.lists:
            found = _kinds(tensors, size, self.lists)
        return [
            torch.empty(0, dtype=torch.int64)
            if place.is_open
            else _first(given, place, size)
            if isinstance(given, Tensor)
            else pad_sequence([tensor.flatten() for tensor in given], batch_first=True)
            for given, place in zip(found, self.outputs, strict=True)
        ]


def _kinds(tensors: list[Any], size: int, lists: str) -> list[list[Any]]:
    """Return for each kind what belongs to the samples, one after the other."""
    count = len(tensors) // size
    if lists == "samples":
        return [tensors[kind::count] for kind in range(count)]
    return [tensors[kind * size : (kind + 1) * size] for kind in range(count)]


def _first(tensor: Tensor, place: Place, size: int | None) -> Tensor:
    axis = place.axis
    if axis is None or tensor.dim() <= axis or not size or tensor.shape[axis] % size:
        return tensor[None]
    return tensor.unflatten(axis, (size, -1)).movedim(axis, 0)


def _mapped(
    batch: Batch, axes: Sequence[int | None], function: Callable[[Tensor, int], Tensor]
) -> Batch:
    """Return the batch with ``function(tensor, axis)`` for each tensor that has an axis."""
    leaves, rebuild = flatten(batch)
    left = iter(axes)
    changed = []
    for leaf in leaves:
        axis = next(left) if isinstance(leaf, Tensor) else None
        changed.append(leaf if axis is None else function(leaf, axis))
    return rebuild(changed)


def layout_of(
    model: Callable[..., Any], batches: list[Batch], wanted: list[list[Tensor]]
) -> Layout:
    """Return where the samples of batches and of the model's outputs stand.

    Args:
        model: in eval mode; it is run a few times with half of a batch, or with it twice.
        batches: inputs, all of the same sizes.
        wanted: its output's tensors, for each batch.
    """
    batch, ys = batches[0], wanted[0]
    inputs = list(tensors_in(batch))
    layout = Layout(None, (None,) * len(inputs), (Place(),) * len(ys))
    is_suspect = any(_shapes(zs) != _shapes(ys) for zs in wanted)
    is_found, is_right, listed = False, False, None
    for size, axes in itertools.islice(_candidates(inputs), _TRIALS):
        count = size // 2 if size >= 4 else 2 * size
        last = (torch.arange(count) - count) % size  # the last half, or all of them twice
        zs = _run(model, _mapped(batch, axes, lambda t, axis, i=last: t.index_select(axis, i)))
        if zs is None:  # the model does not take another size there
            continue
        if len(zs) != len(ys):
            is_suspect = True
            listed = listed or _listed(ys, zs, size, count, axes)
            continue
        places = [_place(y, z, size, count) for y, z in zip(ys, zs, strict=True)]
        is_suspect |= None in places
        if not any(place and place.axis is not None for place in places):
            continue
        found = Layout(size, axes, tuple(place or Place() for place in places))
        if all(
            place is not None and _is_same(y, z, place, size, count)
            for y, z, place in zip(ys, zs, places, strict=True)
        ):
            is_in_front = any(place.axis == 0 for place in found.outputs)
            if is_in_front or not is_right:
                layout, is_found, is_right = found, True, True
            if is_in_front or len(inputs) == 1:
                break  # else it may be prototypes that are compared with samples
        elif not is_found and len(set(axes)) == 1:
            layout, is_found = found, True
    if not is_found and listed is not None:
        layout = listed
    if is_suspect:
        open_ = _open_places(model, batch, wanted)
        marked = layout.outputs
        if layout.lists:
            kinds = _kinds(list(range(len(ys))), layout.size, layout.lists)
            is_open = [
                not open_.isdisjoint(kind) or len({ys[i].shape for i in kind}) > 1 for kind in kinds
            ]
        else:
            is_open = [i in open_ for i in range(len(ys))]
        marked = (Place(is_open=True) if o else p for o, p in zip(is_open, marked, strict=True))
        layout = replace(layout, outputs=tuple(marked))
    return layout


def _listed(
    ys: list[Tensor], zs: list[Tensor], size: int, count: int, axes: tuple[int | None, ...]
) -> Layout | None:
    """Return the layout of an output that holds a list of samples; None where it does not."""
    if len(ys) % size or len(ys) * count != len(zs) * size:
        return None
    last = min(size, count)
    for lists in ("samples", "kinds"):
        kinds = _kinds(ys, size, lists)
        pairs = [
            pair
            for ours, theirs in zip(kinds, _kinds(zs, count, lists), strict=True)
            for pair in zip(ours[-last:], theirs[-last:], strict=True)
        ]
        is_of_one_kind = all(len({(t.dim(), t.dtype) for t in kind}) == 1 for kind in kinds)
        if is_of_one_kind and all(_is_same(y[None], z[None], Place(0), 1, 1) for y, z in pairs):
            return Layout(size, axes, (Place(0),) * len(kinds), lists)
    return None


def _run(model: Callable[..., Any], batch: Batch) -> list[Tensor] | None:
    try:
        with torch.no_grad():
            return Outputs(model(*batch)).tensors
    except Exception:
        return None


def _shapes(tensors: list[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _open_places(
    model: Callable[..., Any], batch: Batch, wanted: list[list[Tensor]]
) -> frozenset[int]:
    """Return the outputs whose shapes change with the values of inputs of the same sizes."""
    runs = list(wanted)
    for factor in (-1, 0):
        changed = map_leaves(
            lambda leaf, f=factor: (
                leaf * f if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
            ),
            batch,
        )
        runs += [found] if (found := _run(model, changed)) is not None else []
    return frozenset(
        i
        for i, y in enumerate(wanted[0])
        if any(i >= len(found) or found[i].shape != y.shape for found in runs)
    )


def _candidates(tensors: list[Tensor]) -> Iterator[tuple[int, tuple[int | None, ...]]]:
    """Give (size, axis of each input), the likely ones first: one axis for all, the first.

    Each tensor leads in turn, as the first one may hold no samples, such as a graph beside nodes.
    """
    shaped = [t for t in tensors if t.dim()]
    seen: set[tuple[int | None, ...]] = set()
    leads = [_led(shaped, lead, axis) for axis in range(2) for lead in range(len(shaped))]
    for places in filter(None, itertools.chain(*itertools.zip_longest(*leads))):
        chosen = iter(places)
        axes = tuple(next(chosen) if t.dim() else None for t in tensors)
        if axes not in seen:
            seen.add(axes)
            pairs = zip(tensors, axes, strict=True)
            yield next(t.shape[axis] for t, axis in pairs if axis is not None), axes


def _led(tensors: list[Tensor], lead: int, axis: int) -> Iterator[tuple[int | None, ...]]:
    """Give the axes of each tensor whose size is that of one axis of one of them."""
    if tensors[lead].dim() <= axis:
        return
    size = tensors[lead].shape[axis]
    choices = [
        [axis] if i == lead else [a for a in range(min(t.dim(), 2)) if t.shape[a] == size] + [None]
        for i, t in enumerate(tensors)
    ]
    yield from sorted(
        itertools.islice(itertools.product(*choices), 4096),
        key=lambda places: (places.count(None), [a != axis for a in places]),
    )


def _place(y: Tensor, z: Tensor, size: int, count: int) -> Place | None:
    """Return where samples stand in an output; None where its size follows them in no proportion.

    Args:
        y, z: of ``size`` and of ``count`` samples.
        size, count: samples.
    """
    if y.dim() != z.dim():
        return None
    follows = [axis for axis in range(y.dim()) if y.shape[axis] != z.shape[axis]]
    if any(y.shape[a] * count != z.shape[a] * size or y.shape[a] % size for a in follows):
        return None
    return Place(follows[0]) if follows else Place()


def _is_same(y: Tensor, z: Tensor, place: Place, size: int, count: int) -> bool:
    """Whether the last samples of both come out the same; not asked where each sees all others."""
    if place.axis is None or not y.is_floating_point():
        return True
    last = min(size, count)
    ours, theirs = (_first(t, place, n)[-last:].double() for t, n in ((y, size), (z, count)))
    if ours.shape != theirs.shape:
        return True
    ours, theirs = ours.flatten(1), theirs.flatten(1)
    return not ((ours - theirs).square().mean(1) > _SAME * ours.square().mean()).any()


@dataclass(frozen=True)
class Outlier:
    """A sample of the calibration set whose values are far beyond the others'.

    Attributes:
        batch, sample, place: which one, and of which input; sample None for a whole batch.
        times: its largest absolute value over the median sample's.
    """

    batch: int
    sample: int | None
    place: int
    times: float


def outliers(batches: list[Batch], layout: Layout) -> list[Outlier]:
    """Return the samples whose largest absolute value is far from the others', largest first.

    One is an outlier if it is 4 times the median at least, and 6 robust standard deviations of the
    logarithms (1.4826 times the median absolute deviation) beyond their median. Where more than a
    fifth of the samples are, they are a kind of their own and no outliers.
    """
    found: list[Outlier] = []
    for place, axis in enumerate(layout.inputs):
        largest: list[tuple[int, int | None, float]] = []
        for index, batch in enumerate(batches):
            tensor = list(tensors_in(batch))[place]
            if not tensor.dtype.is_floating_point or not tensor.numel():
                continue
            size = tensor.abs().nan_to_num(0, posinf=0)  # a mask's -inf is no size
            rows = size[None] if axis is None else size.movedim(axis, 0)
            values = rows.reshape(len(rows), -1).amax(1).tolist()
            largest += [(index, None if axis is None else i, v) for i, v in enumerate(values)]
        logs = torch.tensor([math.log(v) for *_, v in largest if v > 0], dtype=torch.float64)
        if len(logs) < _ENOUGH:
            continue
        middle = logs.median()
        deviation = 1.4826 * float((logs - middle).abs().median())
        limit = float(middle) + max(math.log(_APART), _DEVIATIONS * deviation)
        strange = [
            Outlier(index, sample, place, value / math.exp(float(middle)))
            for index, sample, value in largest
            if value > 0 and math.log(value) > limit
        ]
        found += strange if len(strange) <= max(1, _FEW * len(logs)) else []
    return sorted(found, key=lambda one: -one.times)
