"""Has a call done its work, or did it hand out something that only begins it?

An iterator, an awaitable and a future do their work when they are used up, awaited or waited
for. The time of the call that made them says nothing about that work.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any

__all__ = ["unfinished"]


def unfinished(result: Any) -> str | None:
    """Return the name of the type that a call handed out with its work undone, else None.

    Args:
        result: what the call returned. Of a list or a tuple the members are looked at too, for
            what is awaited or waited for. An open file is no iterator here: opening it was the
            work. A process or thread that has ended is done, a future never is.
    """
    if isinstance(result, (Iterator, AsyncIterator)) and not isinstance(result, io.IOBase):
        return type(result).__name__
    members = result if type(result) in (list, tuple) else ()
    return next((type(x).__name__ for x in (result, *members) if _is_waited_for(x)), None)


def _is_waited_for(value: Any) -> bool:
    def has(*names: str) -> bool:  # of the type: an object may invent attributes
        return any(callable(getattr(type(value), name, None)) for name in names)

    if isinstance(value, type):
        return False
    if isinstance(value, Awaitable) or (
        has("wait", "result") and has("done", "ready", "is_completed")
    ):
        return True  # asyncio, concurrent.futures, multiprocessing, torch.futures and .distributed
    if has("wait") and has("poll"):  # subprocess
        return value.poll() is None
    return has("start") and has("is_alive") and value.is_alive()  # threading, multiprocessing
