"""What may stand for a model's inputs: batches of tensors, checked before anything long begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

__all__ = [
    "Outputs",
    "Structure",
    "batch_size",
    "first_line",
    "first_samples",
    "read_batches",
    "run_float",
]

Batch = tuple[Any, ...]
_PLACE = object()


class Outputs:
    """The tensors of a model's output, and how to put them back into its structure."""

    def __init__(self, output: Any) -> None:
        leaves, spec = _pytree.tree_flatten(output)
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.structure = Structure(
            spec, [_PLACE if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        )


class Structure:
    """Where in an output its tensors stand, without them."""

    def __init__(self, spec: Any, leaves: list[Any]) -> None:
        self._spec, self._leaves = spec, leaves

    @property
    def numbers(self) -> list[Any]:
        """Whole and other numbers among the leaves, which an engine does not compute anew."""
        return [x for x in self._leaves if isinstance(x, int | float) and not isinstance(x, bool)]

    def restore(self, tensors: Iterable[Tensor]) -> Any:
        """Return tensors in this structure."""
        given = iter(tensors)
        leaves = [next(given) if leaf is _PLACE else leaf for leaf in self._leaves]
        return _pytree.tree_unflatten(leaves, self._spec)


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line of 160 characters at most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else repr(error))[:160]


def read_batches(calibration: Any) -> list[Batch]:
    """Return the batches as tuples of positional inputs, copied.

    Args:
        calibration: an iterable of tensors or of tuples; one tensor is one batch. What a loader
            writes into the same tensor again does not change the copies.

    Raises:
        TypeError: no iterable of tensors or tuples.
        ValueError: no batch, an empty one, values that are not finite, or batches whose shapes
            differ in more than the first dimension.
    """
    if isinstance(calibration, Tensor):
        calibration = [calibration]
    if not isinstance(calibration, Iterable):
        raise TypeError(
            "calibration must be an iterable of tensors or of tuples of the model's positional "
            f"inputs, such as [images] or a list of batches, got {type(calibration).__name__}"
        )
    batches: list[Batch] = []
    for index, item in enumerate(calibration):
        batch = tuple(item) if isinstance(item, tuple | list) else (item,)
        if not any(isinstance(value, Tensor) for value in batch):
            raise TypeError(
                f"batch {index} of calibration holds no tensor but {type(item).__name__}: give "
                "tensors, or tuples of the model's positional inputs"
            )
        first = batches[0] if batches else batch
        if len(batch) != len(first):
            raise ValueError(
                f"batch {index} of calibration has {len(batch)} inputs, the first has {len(first)}"
            )
        for place, value in enumerate(batch):
            if isinstance(value, Tensor):
                _check(index, place, value, first[place])
        batches.append(tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in batch))
    if not batches:
        raise ValueError(
            "calibration is empty: give some batches of real inputs, a hundred samples are enough "
            "(a generator that was read once is empty the second time)"
        )
    return batches


def _check(index: int, place: int, value: Tensor, first: Tensor) -> None:
    where = f"input {place} of calibration batch {index}"
    if not value.numel():
        raise ValueError(f"{where} is empty, of shape {list(value.shape)}: leave it out")
    if value.dtype.is_floating_point and not torch.isfinite(value).all():
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(
            f"{where} has {bad} values that are not finite, of {value.numel()}: look at how the "
            "inputs are loaded and normalised"
        )
    if value.shape[1:] != first.shape[1:] or value.dtype != first.dtype:
        raise ValueError(
            f"{where} is {value.dtype} {list(value.shape)}, in the first batch it is "
            f"{first.dtype} {list(first.shape)}: all batches must have one type and one size but "
            "for the first dimension; resize or pad them"
        )


def batch_size(batch: Batch) -> int | None:
    """Return the number of samples; None where the inputs do not agree on one."""
    sizes = {len(t) for t in batch if isinstance(t, Tensor) and t.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def first_samples(batch: Batch, n: int) -> Batch:
    """Return the batch of its first n samples; inputs that are not tensors stay as they are."""
    return tuple(t[:n] if isinstance(t, Tensor) and t.dim() else t for t in batch)


def run_float(model: Callable[..., Any], batches: list[Batch]) -> list[Outputs]:
    """Return a model's outputs for each batch, without gradients.

    Raises:
        ValueError: it cannot be called with a batch, writes into its input, gives no
            floating-point tensor, or one whose values are not finite, or numbers beside tensors.
    """
    found = []
    for index, batch in enumerate(batches):
        shapes = ", ".join(
            str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
            for value in batch
        )
        versions = [value._version if isinstance(value, Tensor) else 0 for value in batch]
        try:
            with torch.no_grad():
                outputs = Outputs(model(*batch))
        except Exception as error:
            raise ValueError(
                f"the model raises on calibration batch {index} with inputs {shapes}: "
                f"{first_line(error)}. Give the model's positional inputs alone, in its order, "
                "without labels"
            ) from error
        for place, (value, version) in enumerate(zip(batch, versions, strict=True)):
            if isinstance(value, Tensor) and value._version != version:
                raise ValueError(
                    f"the model writes into its input {place}, so that no two runs are alike: let "
                    "its first operation make a new tensor (inplace=False, x - y for x.sub_(y))"
                )
        if outputs.structure.numbers:
            raise ValueError(
                f"the model's output holds numbers beside tensors, {outputs.structure.numbers}: "
                "engines compute tensors alone; return them as tensors, or leave them out"
            )
        floats = [t for t in outputs.tensors if t.dtype.is_floating_point]
        if not floats:
            raise ValueError(
                "the model's output holds no floating-point tensor: there is nothing whose error "
                "could be measured"
            )
        if not all(torch.isfinite(t).all() for t in floats):
            raise ValueError(
                f"the model's own float32 output for calibration batch {index} is not finite: "
                "mend that first"
            )
        found.append(outputs)
    return found
