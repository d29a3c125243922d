"""How is one batch cut into micro-batches? Every tensor in it along its first dimension, N.

A batch may be nested: tensors in tuples, lists, mappings and dataclasses. What has an entry for
each sample is cut as well (a list of N texts, an array of N rows); what has none goes to every
micro-batch as it is (a number, a name, a tensor without dimensions).

A list of N tensors [N, ...] can hold one for each sample or columns. Where another list of N is
sure to hold samples (mappings, tensors of differing sizes), it does so too; else it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

from dlhelpers.trees import entries, is_record, rebuilt, tensors_in

__all__ = ["is_one_batch", "part_sizes", "samples_in", "split"]


def is_one_batch(value: Any) -> bool:
    """Whether a value is a batch; a list or a loader is many of them."""
    return isinstance(value, (Tensor, tuple, Mapping)) or is_record(value)


def split(batch: Any, parts: int) -> Iterator[Any]:
    """Yield ``parts`` batches of nearly equal size, the larger ones first.

    Raises:
        ValueError: the tensors differ in N, there is none, N is less than ``parts``, or a list of N
            tensors [N, ...] may hold samples or columns.

    >>> import torch
    >>> list(split({"id": ["a", "b", "c"], "x": torch.arange(3)}, 2))
    [{'id': ['a', 'b'], 'x': tensor([0, 1])}, {'id': ['c'], 'x': tensor([2])}]
    """
    sizes, of_samples = _sizes(batch), _lengths(batch)[1]
    if len(set(sizes)) != 1:
        raise ValueError(
            f"one batch has one first dimension N, got {sizes}; a list is many batches"
        )
    count = sizes[0]
    if count < parts:
        raise ValueError(f"{count} samples cannot make {parts} micro-batches: lower steps")
    ends = [0, *accumulate(part_sizes(count, parts))]
    cuts = [slice(start, end) for start, end in pairwise(ends)]
    if parts > 1 and count not in of_samples:
        _refuse_ambiguous(batch, count)
    return (_part(batch, cut, count, count in of_samples, is_top=True) for cut in cuts)


def part_sizes(count: int, parts: int) -> Iterator[int]:
    """Yield how many of ``count`` samples each part has, the larger ones first."""
    return (count // parts + (i < count % parts) for i in range(parts))


def samples_in(batch: Any) -> int | None:
    """Return the number of samples of a batch: N of its tensors, or of its first one.

    Where a list holds one tensor for each sample, of differing sizes, that is the list's length.
    """
    return next(iter(_sizes(batch)), None)


def _sizes(batch: Any) -> list[int]:
    """What may be N, by the surest sign that there is: tensors outside of lists come first."""
    return next(filter(None, _lengths(batch)), [])


def _lengths(batch: Any) -> tuple[list[int], list[int], list[int]]:
    """First dimensions of tensors outside of lists, lengths of lists of samples, those in lists."""
    found: tuple[list[int], ...] = ([], [], [])

    def walk(value: Any, is_in_list: bool) -> None:
        if isinstance(value, Tensor):
            found[2 * is_in_list].extend([len(value)] if value.dim() > 0 else [])
        elif isinstance(value, list) and _is_list_of_samples(value):
            found[1].append(len(value))
        else:
            for inner in _entries(value):
                walk(inner, is_in_list or isinstance(value, list))

    walk(batch, False)
    return found


def _is_list_of_samples(value: list[Any]) -> bool:
    """Whether tensors in it differ in their first dimension, or it holds records with tensors."""
    firsts = {len(t) for t in tensors_in(value) if t.dim() > 0}
    return len(firsts) > 1 or any(isinstance(v, Mapping) and [*tensors_in(v)] for v in value)


def _refuse_ambiguous(value: Any, count: int) -> None:
    """Raise where a list of N has tensors [N, ...] alone, and nothing tells what it holds."""
    firsts = {len(t) for t in tensors_in(value) if t.dim() > 0}
    if isinstance(value, list) and len(value) == count and firsts == {count}:
        raise ValueError(
            f"a list of {count} tensors [{count}, ...] may hold samples or columns of the batch: "
            "give torch.stack(tensors) for samples, tuple(tensors) for columns"
        )
    for inner in () if isinstance(value, Tensor) else _entries(value):
        _refuse_ambiguous(inner, count)


def _entries(value: Any) -> list[Any]:
    return [inner for _, inner in entries(value) or ()]


def _part(value: Any, cut: slice, count: int, by_sample: bool, is_top: bool = False) -> Any:
    if isinstance(value, Tensor):
        if value.dim() > 0 and len(value) != count:
            raise ValueError(f"one batch has one first dimension N, got {[count, len(value)]}")
        return value[cut] if value.dim() > 0 else value
    if isinstance(value, (tuple, list)):
        is_named = hasattr(value, "_make")
        if not is_top and not is_named and _has_entry_for_each(value, count, by_sample):
            return value[cut]
        parts = [_part(v, cut, count, by_sample) for v in value]
        if all(part is entry for part, entry in zip(parts, value, strict=True)):
            return value
        return value._make(parts) if is_named else tuple(parts) if is_top else type(value)(parts)
    if (inside := entries(value)) is not None:
        return rebuilt(value, [_part(v, cut, count, by_sample) for _, v in inside])
    shape = getattr(value, "shape", None)  # an array
    return value[cut] if isinstance(shape, tuple) and shape[:1] == (count,) else value


def _has_entry_for_each(value: tuple[Any, ...] | list[Any], count: int, by_sample: bool) -> bool:
    """A tuple of N numbers may be a size, and a list of tensors [N, ...] may hold columns."""
    if len(value) != count:
        return False
    if isinstance(value, list):
        firsts = {len(t) for t in tensors_in(value) if t.dim() > 0}
        return by_sample or _is_list_of_samples(value) or firsts != {count}
    return all(isinstance(entry, (str, bytes)) for entry in value)
