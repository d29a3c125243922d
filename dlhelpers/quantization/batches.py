"""What may stand for a model's inputs: batches of tensors, checked before anything long begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlhelpers.trees import entries, flatten, map_leaves, tensors_in

__all__ = [
    "Outputs",
    "Structure",
    "Tensors",
    "batch_size",
    "described",
    "first_line",
    "first_samples",
    "is_same",
    "named_leaves",
    "read_batches",
    "run_float",
]

Batch = tuple[Any, ...]


@dataclass(frozen=True)
class _Place:
    """Where a tensor stood, of this type."""

    dtype: torch.dtype


class Outputs:
    """The tensors of a model's output, and how to put them back into its structure."""

    def __init__(self, output: Any) -> None:
        leaves, rebuild = flatten(output)
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.structure = Structure(
            rebuild, [_Place(leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        )


class Structure:
    """Where in an output its tensors stand, without them."""

    def __init__(self, rebuild: Callable[[Iterable[Any]], Any], leaves: list[Any]) -> None:
        self._rebuild, self._leaves = rebuild, leaves

    @property
    def numbers(self) -> list[Any]:
        """Whole and other numbers among the leaves, which an engine does not compute anew."""
        return [x for x in self._leaves if isinstance(x, int | float) and not isinstance(x, bool)]

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating-point tensor; float32 where there is none."""
        types = (leaf.dtype for leaf in self._leaves if isinstance(leaf, _Place))
        return next((dtype for dtype in types if dtype.is_floating_point), torch.float32)

    def restore(self, tensors: Iterable[Tensor], *, as_were: bool = False) -> Any:
        """Return tensors in this structure.

        Args:
            as_were: give floating-point tensors the type that stood in their place.
        """
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, _Place) else leaf for leaf in self._leaves]
        if as_were:
            leaves = [_typed(*pair) for pair in zip(leaves, self._leaves, strict=True)]
        return self._rebuild(leaves)


def _typed(leaf: Any, place: Any) -> Any:
    is_float = isinstance(place, _Place) and leaf.dtype.is_floating_point
    return leaf.to(place.dtype) if is_float else leaf


class Tensors(list[Tensor]):
    """An output's tensors, from a backend that knows the structure of this very output.

    Its structure may depend on the inputs' sizes, as where a list has an entry for each time step.
    """

    def __init__(self, tensors: Iterable[Tensor], structure: Structure) -> None:
        super().__init__(tensors)
        self.structure = structure


def named_leaves(
    inputs: Any, name: str = "", around: frozenset[int] = frozenset()
) -> list[tuple[str, Any]]:
    """Return (name, value) of everything in a model's positional inputs, however nested.

    >>> named_leaves((1, ({"a": 2}, 3)))
    [('input 0', 1), ("input 1[0]['a']", 2), ('input 1[1]', 3)]
    """
    inner = None if id(inputs) in around else entries(inputs)
    if inner is None:
        return [(name, inputs)]
    inside = around | {id(inputs)}
    return [
        leaf
        for key, value in inner
        for leaf in named_leaves(value, f"{name}[{key!r}]" if name else f"input {key}", inside)
    ]


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line of 160 characters at most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("Exception from ")]  # OpenVINO's places
    lines = told or lines
    return (lines[0] if lines else repr(error))[:160]


def read_batches(calibration: Any) -> list[Batch]:
    """Return the batches as tuples of positional inputs, copied.

    Args:
        calibration: an iterable of tensors or of tuples; one tensor is one batch. An input may be
            nested: a pair of states, a dictionary of tensors, None. What a loader writes into the
            same tensor again does not change the copies.

    Raises:
        TypeError: no iterable of tensors or tuples.
        ValueError: no batch, an empty one, values that are not finite (-inf alone may stand in a
            mask), or batches that differ in anything but their sizes.
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
        is_plain = isinstance(item, tuple | list) and not hasattr(item, "_fields")
        batch = tuple(item) if is_plain else (item,)
        if isinstance(item, Mapping):
            names = ", ".join(map(str, item))
            raise TypeError(
                f"batch {index} of calibration is a {type(item).__name__} of {names}: give a tuple "
                "of the model's positional inputs, in the order of its forward; a dictionary that "
                "is itself an input goes into a tuple of one"
            )
        if next(tensors_in(batch), None) is None:
            raise TypeError(
                f"batch {index} of calibration holds no tensor but {type(item).__name__}: give "
                "tensors, or tuples of the model's positional inputs"
            )
        first = batches[0] if batches else batch
        if len(batch) != len(first):
            raise ValueError(
                f"batch {index} of calibration has {len(batch)} inputs, the first has {len(first)}"
            )
        _check(index, batch, first)
        batches.append(
            map_leaves(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, batch)
        )
    if not batches:
        raise ValueError(
            "calibration is empty: give some batches of real inputs, a hundred samples are enough "
            "(a generator that was read once is empty the second time)"
        )
    return batches


def _check(index: int, batch: Batch, first: Batch) -> None:
    named, wanted = named_leaves(batch), named_leaves(first)
    kinds, firsts = ([(name, type(leaf)) for name, leaf in leaves] for leaves in (named, wanted))
    if [name for name, _ in kinds] != [name for name, _ in firsts]:
        raise ValueError(
            f"batch {index} of calibration holds {', '.join(name for name, _ in kinds)}, the first "
            f"one {', '.join(name for name, _ in firsts)}: all batches must be nested alike"
        )
    for (name, value), (_, other) in zip(named, wanted, strict=True):
        where = f"{name} of calibration batch {index}"
        if isinstance(value, Tensor):
            _check_tensor(where, value, other, alone=len(list(tensors_in(batch))) == 1)
        elif isinstance(other, Tensor) or not is_same(value, other):
            raise ValueError(
                f"{where} is {value!r}, in the first batch it is {described(other)}: what is no "
                "tensor becomes part of the model, so give the same value in all batches"
            )


def _check_tensor(where: str, value: Tensor, first: Any, alone: bool) -> None:
    if not value.numel():
        raise ValueError(f"{where} is empty, of shape {list(value.shape)}: leave it out")
    if value.dtype.is_floating_point:
        wrong = ~torch.isfinite(value)
        if not alone:  # a mask's -inf
            wrong &= value != -math.inf
        if bad := int(wrong.sum()):
            raise ValueError(
                f"{where} has {bad} value{'s' * (bad > 1)} that {'are' if bad > 1 else 'is'} not "
                f"finite, of {value.numel()}: look at how the inputs are loaded and normalised"
            )
    if (
        not isinstance(first, Tensor)
        or value.dim() != first.dim()
        or value.dtype != first.dtype
        or value.device != first.device
    ):
        raise ValueError(
            f"{where} is {described(value)}, in the first batch it is {described(first)}: all "
            "batches must have one type and the same number of dimensions"
        )


def described(value: Any) -> str:
    """Return type and shape of a tensor, the ``repr`` of anything else."""
    if not isinstance(value, Tensor):
        return repr(value)
    place = "" if value.device.type == "cpu" else f" on {value.device}"
    return f"{value.dtype} {list(value.shape)}{place}"


def is_same(value: Any, other: Any) -> bool:
    """Whether two inputs that are no tensors are equal; NaN is equal to itself."""
    try:
        return bool(value is other or (type(value) is type(other) and value == other)) or (
            value != value and other != other
        )
    except Exception:  # comparing is theirs: an array's result is no bool
        return False


def batch_size(batch: Batch) -> int | None:
    """Return the number of samples; None where the tensors do not agree on one."""
    sizes = {len(t) for t in tensors_in(batch) if t.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def first_samples(batch: Batch, n: int) -> Batch:
    """Return the batch of its first n samples; what is no tensor stays as it is."""
    return map_leaves(lambda t: t[:n] if isinstance(t, Tensor) and t.dim() else t, batch)


def run_float(model: Callable[..., Any], batches: list[Batch]) -> list[Outputs]:
    """Return a model's outputs for each batch, without gradients.

    Raises:
        ValueError: it cannot be called with a batch, writes into its input, gives no
            floating-point tensor, or one whose values are not finite, or numbers beside tensors.
    """
    found = []
    for index, batch in enumerate(batches):
        named = [(name, leaf) for name, leaf in named_leaves(batch) if isinstance(leaf, Tensor)]
        versions = [version_of(tensor) for _, tensor in named]
        try:
            with torch.no_grad():
                outputs = Outputs(model(*batch))
        except Exception as error:
            shapes = ", ".join(
                str(list(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__
                for _, leaf in named_leaves(batch)
            )
            raise ValueError(
                f"the model raises on calibration batch {index} with inputs {shapes}: "
                f"{first_line(error)}. Give the model's positional inputs alone, in its order, "
                "without labels"
            ) from error
        for (name, tensor), version in zip(named, versions, strict=True):
            if version_of(tensor) != version:
                raise ValueError(
                    f"the model writes into its {name}, so that no two runs are alike: let "
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
                f"the model's own output for calibration batch {index} is not finite: "
                "fix that first"
            )
        found.append(outputs)
    return found


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written into; 0 for one made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
