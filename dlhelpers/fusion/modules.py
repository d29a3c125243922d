"""Which modules may an expression of Python's stand for?"""

from __future__ import annotations

import dis
import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["NOTHING", "Modules", "changed_in", "given_by", "held_by", "is_torchs"]


@dataclass(frozen=True)
class Modules:
    """The modules that an expression may be, and those that a collection may hold."""

    direct: frozenset[nn.Module] = frozenset()
    inside: frozenset[nn.Module] = frozenset()
    pairs: str = ""  # "keyed": an index or a name, then a module; "zipped": each may be one

    def __or__(self, other: Modules) -> Modules:
        pairs = self.pairs if self.pairs == other.pairs or not other else "zipped"
        pairs = other.pairs if not self else pairs
        return Modules(self.direct | other.direct, self.inside | other.inside, pairs)

    def __bool__(self) -> bool:
        return bool(self.direct or self.inside)

    @property
    def elements(self) -> frozenset[nn.Module]:
        """What iterating over it, or an index, gives."""
        return self.inside.union(*(given_by(module, "__iter__") for module in self.direct))

    @property
    def each(self) -> Modules:
        """One of the elements: of a collection it may be a collection again."""
        return Modules(self.elements, self.inside)


NOTHING = Modules()


def is_torchs(function: Any, where: str = "") -> bool:
    """Whether a function is of torch's own modules."""
    return getattr(function, "__module__", "").startswith(f"torch.nn.modules.{where}".rstrip("."))


def given_by(module: nn.Module, name: str) -> frozenset[nn.Module]:
    """Return what a method gives: children where it is torch's, else anything inside."""
    method = inspect.getattr_static(type(module), name, None)
    is_plain = method is None or is_torchs(method) or name == "_modules"
    return frozenset(module.children() if is_plain else module.modules())


def held_by(value: Any) -> Modules:
    """Return the modules that an object is or holds."""
    if isinstance(value, nn.Module):
        return Modules(frozenset({value}))
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list | set):
        inside = (held_by(one) for one in value)
        return Modules(inside=frozenset().union(*(one.direct | one.inside for one in inside)))
    return NOTHING


def changed_in(kind: type) -> frozenset[str]:
    """Return the attributes that a class's forward, and what it leads to, may assign."""
    functions = {
        name: getattr(value, "__func__", value)
        for base in reversed(kind.__mro__)
        for name, value in vars(base).items()
        if base is not nn.Module
    }
    todo, seen, changed = ["forward"], set(), set()
    while todo:
        code = getattr(inspect.unwrap(functions.get(name := todo.pop())), "__code__", None)
        seen.add(name)
        if code is not None:
            steps = dis.get_instructions(code)
            changed |= {step.argval for step in steps if step.opname == "STORE_ATTR"}
            todo += [one for one in code.co_names if one in functions and one not in seen]
    return frozenset(changed)
