"""Whose class is it? A copy of a parametrized module shares the class that holds its property.

``torch.nn.utils.parametrize`` gives a module a class of its own, whose properties compute the
tensors, and ``copy.deepcopy`` gives the copy the same class. What ``remove_parametrizations`` then
takes from the copy's class is taken from the original.
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["own_classes"]

_NOT_COPIED = ("__dict__", "__weakref__")  # type() makes those


def own_classes(model: nn.Module) -> nn.Module:
    """Give each parametrized module of a copy a class of its own, in place, and return the copy.

    >>> import copy
    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    >>> plain = own_classes(copy.deepcopy(layer))
    >>> _ = parametrize.remove_parametrizations(plain, "weight")
    >>> type(plain).__name__, tuple(layer.weight.shape)
    ('Linear', (3, 4))
    """
    for module in model.modules():
        if parametrize.is_parametrized(module):
            cls = type(module)
            names = {name: value for name, value in vars(cls).items() if name not in _NOT_COPIED}
            module.__class__ = type(cls)(cls.__name__, cls.__bases__, names)
    return model
