"""Who patches torch's classes? One at a time, and no other thread sees it.

torch.fx traces by putting functions of its own in the place of ``nn.Module.__call__`` and
``__getattr__``, for the whole process: a model that another thread runs meanwhile meets proxies,
and of two traces at once the second one keeps what the first one put there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import fx, nn

__all__ = ["PATCHING", "Tracer"]

PATCHING = threading.RLock()
"""Held by whatever patches a class of torch's, from before the patch until it is undone."""


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
