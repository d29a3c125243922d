"""Who patches torch's classes? One at a time, and no other thread sees it.

torch.fx traces by putting functions of its own in the place of ``nn.Module.__call__`` and
``__getattr__``, for the whole process: a model that another thread runs meanwhile meets proxies,
and of two traces at once the second one keeps what the first one put there. What the package itself
puts in front of a function of torch's goes through :func:`patched`, for the same two reasons.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

__all__ = ["PATCHING", "Tracer", "patched"]

PATCHING = threading.RLock()
"""Held by whatever patches a class of torch's, from before the patch until it is undone."""


@contextmanager
def patched(owner: Any, name: str, new: Callable[..., Any]) -> Iterator[None]:
    """Call ``new`` in place of a function of a class or module, in this thread alone.

    Other threads, and what torch.compile traces, call the function that was there. Inside the
    ``with`` block this thread holds :data:`PATCHING`, so patches are undone in reverse order.

    Args:
        owner: the class or module.
        name: of its function, such as ``"__call__"``.
        new: takes the function that was there, then that function's arguments.
    """
    me = threading.get_ident()
    with PATCHING:
        is_own, old = name in vars(owner), getattr(owner, name)

        @functools.wraps(old)
        def stands_in(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or threading.get_ident() != me:
                return old(*args, **kwargs)
            return new(old, *args, **kwargs)

        setattr(owner, name, stands_in)
        try:
            yield
        finally:
            if is_own:
                setattr(owner, name, old)
            else:
                delattr(owner, name)


class Tracer(fx.Tracer):
    """A ``torch.fx.Tracer`` that leaves other threads alone and waits for other patches."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of a module or function."""
        with PATCHING:
            self._traced_by = threading.get_ident()
            return super().trace(root, concrete_args)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call in the thread that traces; run it in any other one."""
        if threading.get_ident() != self._traced_by:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a proxy of a parameter in the thread that traces; the parameter elsewhere."""
        if threading.get_ident() != self._traced_by:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)
