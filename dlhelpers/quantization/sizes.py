"""Which sizes of a model's inputs may change once it is built for an engine?

Free is what the calibration batches vary, what ``dynamic`` names, the dimension that counts
samples, and a first dimension with which the model itself runs at another size. An exporter may
still fix a size without a word: so what it wrote is run on inputs of other sizes, and a dimension
with which it is wrong there is fixed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.quantization.batches import Batch, Outputs, first_line, named_leaves
from dlhelpers.quantization.noise import sqnr_db
from dlhelpers.trees import tensors_in

__all__ = ["Flat", "Group", "Sizes", "exported_with", "free_groups"]

Place = tuple[int, int]  # which tensor of the inputs, which of its dimensions
_RIGHT_DB = 40.0
_MOST_SETS = 16


@dataclass(frozen=True)
class Group:
    """Dimensions whose sizes change together.

    Attributes:
        places: (tensor's number among the inputs, dimension).
        probes: inputs in which they have other sizes, and what the model gives for those.
        ones: the same with sizes of 1, where the model takes them.
    """

    places: frozenset[Place]
    probes: tuple[tuple[Batch, Outputs], ...] = field(repr=False)
    ones: tuple[tuple[Batch, Outputs], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Sizes:
    """The inputs that a backend takes.

    Attributes:
        names: of the tensors among the inputs, such as ``input 1[0]``.
        dtypes: of each.
        dimensions: of each, the size or None where any size is right.
        not_one: free dimensions whose size must be 2 or more.
    """

    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    dimensions: tuple[tuple[int | None, ...], ...]
    not_one: frozenset[Place] = frozenset()

    @property
    def are_all_free(self) -> bool:
        """Whether nothing is fixed."""
        return not self.not_one and all(
            n is None for dimensions in self.dimensions for n in dimensions
        )

    def __str__(self) -> str:
        return ", ".join(self._shown(i) for i in range(len(self.names)))

    def _shown(self, number: int) -> str:
        words = [
            "any from 2" if (number, dim) in self.not_one else "any" if n is None else str(n)
            for dim, n in enumerate(self.dimensions[number])
        ]
        return f"[{', '.join(words)}]"

    def why_not(self, batch: Batch) -> str:
        """Return what is wrong with inputs, empty for nothing."""
        tensors = list(tensors_in(batch))
        if len(tensors) != len(self.names):
            return f"{len(tensors)} tensors were given, it takes {len(self.names)}"
        for number, tensor in enumerate(tensors):
            name, dtype = self.names[number], self.dtypes[number]
            if tensor.dtype != dtype:
                return f"{name} is {tensor.dtype}, it takes {dtype}"
            if tensor.device.type != "cpu":
                return f"{name} is on {tensor.device}, it takes tensors on the CPU"
            dimensions = self.dimensions[number]
            if tensor.dim() != len(dimensions) or any(
                n not in (None, size) or (size == 1 and (number, dim) in self.not_one)
                for dim, (n, size) in enumerate(zip(dimensions, tensor.shape, strict=True))
            ):
                return f"{name} is {list(tensor.shape)}, it takes {self._shown(number)}"
        return ""


class Flat(nn.Module):
    """A model as every exporter takes it: tensors alone come in, a tuple of tensors goes out."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.model = model
        self._inputs = Outputs(batch).structure

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the model's output."""
        return tuple(tensors_in(self.model(*self._inputs.restore(tensors))))


def free_groups(
    model: Callable[..., Any],
    batches: list[Batch],
    outputs: list[Outputs],
    dynamic: Mapping[int, int | Sequence[int]] | None = None,
    samples: Sequence[int | None] = (),
) -> list[Group]:
    """Return the dimensions that are free, found by running the model with other sizes.

    Args:
        model: as it was given; it is called a few times.
        batches, outputs: of the calibration set, and what the model gives for each.
        dynamic: input's place -> its dimensions that are free as well; of every tensor in it.
        samples: for each tensor of the inputs the dimension that counts samples, tried first: an
            exporter that cannot free it and the first dimensions together frees it alone.

    Raises:
        TypeError, ValueError: ``dynamic`` is no such mapping, names what is not there, or the model
            itself raises with every other size that was tried.
    """
    finder = _Finder(model, batches[0], outputs[0])
    asked = _asked(dynamic, batches[0])
    groups: list[Group] = []
    places = frozenset((i, dim) for i, dim in enumerate(samples) if dim is not None)
    if places and (found := finder.first_that_runs([places])):
        groups.append(found)
    for seed in [(i, 0) for i, tensor in enumerate(finder.tensors) if tensor.dim()]:
        if any(seed in group.places for group in groups):
            continue
        taken = {place for group in groups for place in group.places}
        if found := finder.first_that_runs(finder.sets_around(seed, taken)):
            groups.append(found)
    groups += _varied(finder, batches, outputs, groups)
    for seed in sorted(asked):
        if any(seed in group.places for group in groups):
            continue
        alike = frozenset(p for p in asked if finder.size(p) == finder.size(seed))
        found = finder.first_that_runs([alike, frozenset({seed}), frozenset(asked)])
        if found is None:
            name = finder.names[seed[0]]
            raise ValueError(
                f"dynamic names dimension {seed[1]} of {name}, but the model itself raises with "
                f"another size than {finder.size(seed)} there: {finder.said}. Leave it out, or "
                "name the dimensions of other inputs that change with it"
            )
        groups.append(found)
    return groups


def _asked(dynamic: Any, batch: Batch) -> set[Place]:
    """Return the places that ``dynamic`` names."""
    if dynamic is None:
        return set()
    form = "a dictionary of input's place -> dimensions, such as {0: (2, 3)}"
    if not isinstance(dynamic, Mapping):
        raise TypeError(f"dynamic must be {form}, got {type(dynamic).__name__}")
    counts = [len(list(tensors_in(value))) for value in batch]
    tensors = list(tensors_in(batch))
    places: set[Place] = set()
    for key, dims in dynamic.items():
        if not _is_whole(key) or not 0 <= key < len(batch):
            raise ValueError(
                f"dynamic names input {key!r}, the inputs are 0 to {len(batch) - 1}: give {form}"
            )
        given = dims
        dims = tuple(dims) if isinstance(dims, tuple | list | set | frozenset | range) else (dims,)
        if not all(map(_is_whole, dims)):
            raise TypeError(f"dynamic must be {form}, got {{{key}: {given!r}}}")
        first = sum(counts[:key])
        numbers = range(first, first + counts[key])
        for dim in dims:
            known = [
                (number, dim % tensors[number].dim())
                for number in numbers
                if -tensors[number].dim() <= dim < tensors[number].dim()
            ]
            if not known:
                shapes = ", ".join(str(list(tensors[number].shape)) for number in numbers)
                raise ValueError(
                    f"dynamic names dimension {dim!r} of input {key}, which is "
                    f"{shapes or 'no tensor'}: give {form}"
                )
            places.update(known)
    return places


def _is_whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _varied(
    finder: _Finder, batches: list[Batch], outputs: list[Outputs], groups: list[Group]
) -> list[Group]:
    """Return the group of what the batches vary, beyond what is free already."""
    shapes = [[tuple(t.shape) for t in tensors_in(batch)] for batch in batches]
    free = {place for group in groups for place in group.places}
    places = {
        (i, dim)
        for i, first in enumerate(shapes[0])
        for dim, size in enumerate(first)
        if any(other[i][dim] != size for other in shapes)
    } - free
    if not places:
        return []
    unlike = [
        (batch, output)
        for batch, output, shape in zip(batches, outputs, shapes, strict=True)
        if any(shape[i][dim] != shapes[0][i][dim] for i, dim in places)
        and len(output.tensors) == len(finder.output.tensors)
    ]
    if not unlike:
        return []
    probes = (unlike[0], unlike[-1])
    return [Group(frozenset(places), probes, finder.ones(frozenset(places)))]


class _Finder:
    """Runs a model with inputs of other sizes."""

    def __init__(self, model: Callable[..., Any], batch: Batch, output: Outputs) -> None:
        self._model, self.output = model, output
        inputs = Outputs(batch)
        self.tensors, self._structure = inputs.tensors, inputs.structure
        self.names = [name for name, leaf in named_leaves(batch) if isinstance(leaf, Tensor)]
        self.said = ""

    def size(self, place: Place) -> int:
        return self.tensors[place[0]].shape[place[1]]

    def resized(self, places: frozenset[Place], sizes: Mapping[int, int]) -> Batch:
        """Return the inputs with other sizes, their values repeated or cut."""
        return _resized(self.tensors, self._structure, places, sizes)

    def ran(self, batch: Batch) -> tuple[Batch, Outputs] | None:
        """Return inputs and outputs, None where the model does not take them."""
        try:
            with torch.no_grad():
                output = Outputs(self._model(*batch))
        except Exception as error:
            self.said = first_line(error)
            return None
        is_alike = len(output.tensors) == len(self.output.tensors) and all(
            torch.isfinite(t).all() for t in output.tensors
        )
        self.said = "" if is_alike else "its output has another structure, or is not finite"
        return (batch, output) if is_alike else None

    def first_that_runs(self, sets: Sequence[frozenset[Place]]) -> Group | None:
        """Return the first set of places with which the model runs at another size."""
        for places in dict.fromkeys(sets):
            sizes = {self.size(place) for place in places}
            for other in (_smaller, _larger, _longer):
                if ran := self.ran(self.resized(places, {n: other(n) for n in sizes})):
                    return Group(places, (ran,), self.ones(places))
        return None

    def ones(self, places: frozenset[Place]) -> tuple[tuple[Batch, Outputs], ...]:
        sizes = {self.size(place) for place in places}
        ran = self.ran(self.resized(places, dict.fromkeys(sizes, 1)))
        return () if ran is None else (ran,)

    def sets_around(self, seed: Place, taken: set[Place]) -> list[frozenset[Place]]:
        """Return what might change together with a first dimension, the likeliest set first.

        The batch may stand elsewhere in other inputs: in those of an LSTM's state [1, B, H].
        """
        size = self.size(seed)
        options: list[list[Place | None]] = []
        for i, tensor in enumerate(self.tensors):
            if i == seed[0]:
                continue
            dims = [(i, d) for d, n in enumerate(tensor.shape) if n == size]
            options.append([place for place in dims if place not in taken] + [None])
        first = frozenset({seed} | {o[0] for o in options if o[0] is not None and o[0][1] == 0})
        sets = (
            frozenset({seed} | {place for place in chosen if place is not None})
            for chosen in itertools.product(*options)
        )
        return [first, *itertools.islice(sets, _MOST_SETS), frozenset({seed})]


def _smaller(size: int) -> int:
    return size // 2 if size > 3 else 2 * size


def _larger(size: int) -> int:
    return 2 * size


def _longer(size: int) -> int:
    return size + 1


def _resized(
    tensors: Sequence[Tensor], structure: Any, places: frozenset[Place], sizes: Mapping[int, int]
) -> Batch:
    """Return inputs in which the places of each size have another one."""
    changed = list(tensors)
    for i, dim in places:
        size = changed[i].shape[dim]
        index = torch.arange(sizes.get(size, size)) % size
        changed[i] = changed[i].index_select(dim, index)
    return structure.restore(changed)


def exported_with(
    batch: Batch,
    groups: Sequence[Group],
    export: Callable[[Batch, tuple[Any, ...]], tuple[Any, Callable[[Batch], list[Tensor]]]],
    is_free: Callable[[Any, Place], bool],
) -> tuple[Any, Sizes]:
    """Return what an exporter makes, with as many free dimensions as it gets right.

    Args:
        batch: the example.
        groups: that may be free.
        export: (inputs, dimensions for each tensor as torch.export takes them) -> (what it makes, a
            function that runs that on inputs).
        is_free: whether the exporter has left a place free.

    Raises:
        Exception: the exporter's, where it raises with fixed sizes, too.
    """
    for free in _narrower(list(groups)):
        while True:
            given = _without_ones(batch, free)
            shapes = _dynamic_shapes(given, free)
            try:
                made, run = export(given, shapes)
            except Exception:
                if not free:
                    raise
                break  # to fewer
            left = [g for g in free if all(is_free(made, place) for place in g.places)]
            right = [g for g in left if _all_right(run, g.probes)]
            not_one = [g for g in right if not _all_right(run, g.ones)]
            right = [g for g in right if g not in not_one or not _has_one(batch, g)]
            if right == free:
                return made, _sizes_of(batch, free, not_one)
            free = right
    raise AssertionError("unreachable: the last export has nothing free")


def _narrower(groups: list[Group]) -> Iterator[list[Group]]:
    yield groups
    if len(groups) > 1:
        yield groups[:1]
    if groups:
        yield []


def _has_one(batch: Batch, group: Group) -> bool:
    tensors = list(tensors_in(batch))
    return any(tensors[i].shape[dim] == 1 for i, dim in group.places)


def _without_ones(batch: Batch, free: Sequence[Group]) -> Batch:
    """Return the example with no free size of 1, which an exporter takes for a constant."""
    inputs = Outputs(batch)
    places = frozenset(
        (i, dim) for g in free for i, dim in g.places if inputs.tensors[i].shape[dim] == 1
    )
    return _resized(inputs.tensors, inputs.structure, places, {1: 2}) if places else batch


def _dynamic_shapes(batch: Batch, free: Sequence[Group]) -> tuple[Any, ...]:
    places = {place for group in free for place in group.places}
    return tuple(
        {dim: torch.export.Dim.AUTO for dim in range(tensor.dim()) if (i, dim) in places} or None
        for i, tensor in enumerate(tensors_in(batch))
    )


def _all_right(
    run: Callable[[Batch], list[Tensor]], probes: Sequence[tuple[Batch, Outputs]]
) -> bool:
    try:
        return all(sqnr_db([output.tensors], [run(batch)]) >= _RIGHT_DB for batch, output in probes)
    except Exception:  # an engine's own, of many kinds
        return False


def _sizes_of(batch: Batch, free: Sequence[Group], not_one: Sequence[Group]) -> Sizes:
    named = [(name, leaf) for name, leaf in named_leaves(batch) if isinstance(leaf, Tensor)]
    places = {place for group in free for place in group.places}
    return Sizes(
        tuple(name for name, _ in named),
        tuple(tensor.dtype for _, tensor in named),
        tuple(
            tuple(None if (i, dim) in places else n for dim, n in enumerate(tensor.shape))
            for i, (_, tensor) in enumerate(named)
        ),
        frozenset(place for group in not_one for place in group.places),
    )
