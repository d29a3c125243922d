"""What does each step leave behind in memory? Nodes of autograd's graphs, and tensors."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import CellType, FrameType, FunctionType, GeneratorType, ModuleType
from typing import Any

from torch import Tensor

from dlhelpers.profiling.watching import count_nodes, living_tensors

__all__ = ["Kept", "what_is_kept"]

_LOOKED_AT = 3  # new tensors, whose holders are looked for
_LEVELS = 4  # of containers and objects in containers: tensor, __dict__, object, tuple, deque
_FOLLOWED = 8  # holders of one level
# what refers to a tensor and keeps it no longer than a call, or for another reason
_PASSED_BY = (FrameType, GeneratorType, ModuleType, FunctionType, CellType, type, weakref.ref)


@dataclass(frozen=True)
class Kept:
    """What is alive after each of some steps.

    Attributes:
        nodes: of autograd's graphs.
        nbytes: of the memory of tensors.
        where: a tensor that is new and what holds it, in words; empty where none is.
        is_bounded: whether a ``deque`` with a ``maxlen`` holds what is new.
    """

    nodes: tuple[int, ...]
    nbytes: tuple[int, ...]
    where: str = ""
    is_bounded: bool = False


def what_is_kept(step: Callable[[], Any], steps: int) -> Kept:
    """Run the step a few times and count what is alive after each."""
    nodes, nbytes, before, new = [], [], {}, []
    with living_tensors() as tensors:
        for number in range(steps):
            step()
            nodes.append(count_nodes(tensors()))
            gc.collect()  # what lies in a circle is not kept for ever
            alive = tensors()
            nbytes.append(_nbytes(alive))
            if number == 0:
                before = {id(tensor): weakref.ref(tensor) for tensor in alive}
            elif number == 1:  # of these, those that are there at the end are kept
                fresh = [t for t in alive if (note := before.get(id(t))) is None or note() is not t]
                new = [weakref.ref(t) for t in sorted(fresh, key=_own_bytes, reverse=True)]
                del fresh
            del alive
    told, is_bounded = "", False
    if steps > 1 and all(b > a for a, b in itertools.pairwise(nbytes)):
        kept = (tensor for note in new if (tensor := note()) is not None)
        for tensor in itertools.islice(kept, _LOOKED_AT):
            where, bounded = _holder(tensor)
            told, is_bounded = told or where, is_bounded or bounded
    return Kept(tuple(nodes), tuple(nbytes), told, is_bounded)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the memory that tensors hold; what two share counts once."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        except Exception:  # sparse, fake, or a dead proxy
            continue
    return sum(storages.values())


def _own_bytes(tensor: Tensor) -> int:
    try:
        return tensor.nbytes
    except Exception:
        return 0


def _holder(tensor: Tensor) -> tuple[str, bool]:
    """Return what is kept and in what, in words, and whether that has a limit."""
    shape, dtype = "x".join(map(str, tensor.shape)) or "scalar", str(tensor.dtype)[6:]
    what, told, things = f"a tensor {shape} of {dtype}", "", [tensor]
    mine = {id(things)}  # lists of this search hold what they found, too
    for _ in range(_LEVELS):
        found = gc.get_referrers(*things)
        mine.add(id(found))
        things = [t for t in found if id(t) not in mine and not isinstance(t, _PASSED_BY)]
        mine.add(id(things))
        if any(isinstance(thing, deque) and thing.maxlen is not None for thing in things):
            return told, True
        for thing in things:
            if not told and isinstance(thing, list | deque | dict) and len(thing) > 1:
                told = f"{what} in a {type(thing).__name__} of {len(thing)}"
        del things[_FOLLOWED:]
        if not things:
            break
    return told or what, False
