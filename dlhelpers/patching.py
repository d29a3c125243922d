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
"""Held while a patch is put in or taken out, and while torch.fx traces; not while code runs that a
program gave to be watched, which may start threads that trace or are watched, and wait for them."""

_STAND_INS: dict[tuple[Any, str], _StandIn] = {}


class _StandIn:
    """What is in the place of one function of a class or module, for all threads.

    Attributes:
        old: the function that was there.
        chains: thread -> what it calls instead.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name, self._is_own = owner, name, name in vars(owner)
        self.old = old = getattr(owner, name)
        self._news: dict[int, list[Callable[..., Any]]] = {}
        self.chains: dict[int, Callable[..., Any]] = {}
        chains = self.chains

        @functools.wraps(old)
        def stands_in(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return old(*args, **kwargs)
            if not chains:  # somebody else's patch put it back
                self._put_back(blocking=False)
            return chains.get(threading.get_ident(), old)(*args, **kwargs)

        self._function = stands_in
        setattr(owner, name, stands_in)

    def add(self, thread: int, new: Callable[..., Any]) -> Callable[..., Any]:
        """Let a thread call ``new``; return what it called until now."""
        below = self.chains.get(thread, self.old)
        self._news.setdefault(thread, []).append(new)
        self._chain(thread)
        return below

    def remove(self, thread: int, new: Callable[..., Any]) -> None:
        """Take out what was added; with the last one, put back the function that was there."""
        news = self._news[thread]
        del news[next(i for i in reversed(range(len(news))) if news[i] is new)]
        self._chain(thread)
        if not self.chains:
            _STAND_INS.pop((self._owner, self._name))
            self._put_back()

    def _chain(self, thread: int) -> None:
        call = self.old
        for new in self._news[thread]:
            call = functools.partial(new, call)
        if self._news[thread]:
            self.chains[thread] = call
        else:
            del self._news[thread], self.chains[thread]

    def _put_back(self, blocking: bool = True) -> None:
        """Undo it, where nobody has put something else in front since."""
        if not PATCHING.acquire(blocking=blocking):
            return
        try:
            if not self.chains and vars(self._owner).get(self._name) is self._function:
                if self._is_own:
                    setattr(self._owner, self._name, self.old)
                else:
                    delattr(self._owner, self._name)
        finally:
            PATCHING.release()


@contextmanager
def patched(owner: Any, name: str, new: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Call ``new`` in place of a function of a class or module, in this thread alone.

    Other threads, and what torch.compile traces, call the function that was there. Patches may end
    in any order. Gives what ``new`` stands in front of.

    Args:
        owner: the class or module.
        name: of its function, such as ``"__call__"``.
        new: takes the function that was there, then that function's arguments.
    """
    me = threading.get_ident()
    with PATCHING:
        stand_in = _STAND_INS.get((owner, name))
        if stand_in is None:
            stand_in = _STAND_INS[owner, name] = _StandIn(owner, name)
        below = stand_in.add(me, new)
    try:
        yield below
    finally:
        with PATCHING:
            stand_in.remove(me, new)


class Tracer(fx.Tracer):
    """A ``torch.fx.Tracer`` that leaves other threads alone and waits for other traces.

    A model that computes in threads of its own is not traceable.
    """

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of a module or function.

        Raises:
            fx.proxy.TraceError: root computes in a thread of its own.
        """
        with PATCHING:
            self._traced_by = threading.get_ident()
            self.is_threaded = False
            graph = super().trace(root, concrete_args)
        if self.is_threaded:
            raise fx.proxy.TraceError("the model computes in threads of its own, in any order")
        return graph

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Return a node of the graph; note whether another thread makes it."""
        self.is_threaded |= threading.get_ident() != self._traced_by
        return super().create_node(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call in the thread that traces, and where proxies are given; else run it."""
        me = threading.get_ident()
        if me == self._traced_by or _holds_proxy((args, kwargs)):
            return super().call_module(m, forward, args, kwargs)
        # torch.fx calls the function that was there when it was imported, not what is patched
        stand_in = _STAND_INS.get((nn.Module, "__call__"))
        chain = None if stand_in is None else stand_in.chains.get(me)
        return forward(*args, **kwargs) if chain is None else chain(m, *args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a proxy of a parameter in the thread that traces; the parameter elsewhere."""
        if threading.get_ident() != self._traced_by:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _holds_proxy(value: Any) -> bool:
    kinds: set[type] = set()
    fx.node.map_aggregate(value, lambda one: kinds.add(type(one)))
    return any(issubclass(kind, fx.Proxy) for kind in kinds)
