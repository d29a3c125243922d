"""Where does an input that is given by name stand? A backend takes them by place alone."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

__all__ = ["by_place", "signature_of"]


def signature_of(model: nn.Module) -> inspect.Signature | None:
    """Return the signature of a model's forward; None where it tells no names, as a graph's."""
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None


def by_place(
    takes: inspect.Signature | None, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, ...]:
    """Return a call's inputs by place; what stands before the last one given has its default.

    Args:
        takes: signature of the model's forward, without self.
        inputs, options: positional and keyword inputs.

    Raises:
        TypeError: an input has no place, or one before it is missing.

    >>> takes = inspect.signature(lambda x, mask=None, scale=None: x)
    >>> by_place(takes, (1,), {"scale": 2})
    (1, None, 2)
    """
    kinds = inspect.Parameter
    named = dict(takes.parameters) if takes else {}
    places = [n for n, p in named.items() if p.kind is kinds.POSITIONAL_OR_KEYWORD]
    before = sum(p.kind is kinds.POSITIONAL_ONLY for p in named.values())
    if without := [name for name in options if name not in places]:
        raise TypeError(
            f"input {', '.join(without)} has no place among the model's inputs"
            + (f" ({', '.join(places)})" if places else "")
            + ": give inputs by position, as in calibration; one that is by name alone needs a "
            "module around the model whose forward takes it by position"
        )
    if len(inputs) < before:
        raise TypeError(f"input {[*named][len(inputs)]} is missing, which is given by position")
    found = list(inputs)
    last = max(places.index(name) for name in options)
    for place in range(last + 1):
        name, default = places[place], named[places[place]].default
        if before + place < len(found):
            if name in options:
                raise TypeError(f"input {name} is given twice, by position and by name")
        elif name not in options and default is kinds.empty:
            raise TypeError(f"input {name} is missing, which comes before {places[last]}")
        else:
            found.append(options.get(name, default))
    return tuple(found)
