"""How is a backend that fails kept from writing to the terminal? Its error says what is needed.

By filters on the loggers and their handlers; and since torch.export prints a failed graph to
``sys.stderr``, without a switch, what this thread writes there is dropped as well. Warnings and
messages of other threads pass. No file descriptor is redirected: a crash can still say where it
happened.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

__all__ = ["quiet"]

_TALKATIVE = ("torch", "torchao", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "openvino")
_LOCK = threading.Lock()
_THREADS: Counter[int] = Counter()  # thread -> how many blocks it is in
_UNDO = ExitStack()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what exporters, compilers and deprecated modules say while they work.

    Of other threads nothing is kept back. Blocks of several threads may overlap: the first one to
    begin adds the filters, the last one to end removes them.
    """
    me = threading.get_ident()
    with _LOCK:
        if not _THREADS:
            _begin(_UNDO)
        _THREADS[me] += 1
    try:
        yield
    finally:
        with _LOCK:
            _THREADS[me] -= 1
            if not _THREADS[me]:
                del _THREADS[me]
            if not _THREADS:
                _UNDO.close()


def _begin(undo: ExitStack) -> None:
    for one in {*_loggers(), *_handlers()}:  # a handler also gets what loggers below its own say
        one.addFilter(_is_loud)
        undo.callback(one.removeFilter, _is_loud)
    undo.enter_context(warnings.catch_warnings())  # what was kept back may be shown again after
    warnings.filters[:] = [
        ("always" if action == "error" else action, *rest) for action, *rest in warnings.filters
    ]
    shown = warnings.showwarning
    warnings.showwarning = loud = partial(_show_if_loud, shown)
    undo.callback(_give_back, warnings, "showwarning", shown, loud)
    stream = sys.stderr
    sys.stderr = silent = _Silent(stream)
    undo.callback(_give_back, sys, "stderr", stream, silent)


def _is_loud(record: logging.LogRecord) -> bool:
    is_own = record.name.partition(".")[0] in (*_TALKATIVE, logging.root.name)
    return not is_own or threading.get_ident() not in _THREADS


def _show_if_loud(shown: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    if threading.get_ident() not in _THREADS:
        shown(*args, **kwargs)


def _give_back(owner: Any, name: str, before: Any, ours: Any) -> None:
    if getattr(owner, name) is ours:  # else somebody has replaced it since
        setattr(owner, name, before)


def _loggers() -> list[logging.Logger]:
    """Return the root, the packages' loggers and those below them."""
    found = [logging.root, *map(logging.getLogger, _TALKATIVE)]
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.partition(".")[0] in _TALKATIVE and isinstance(logger, logging.Logger):
            found.append(logger)
    return found


def _handlers() -> list[logging.Handler]:
    found = [handler for logger in _loggers() for handler in logger.handlers]
    return [*found, *filter(None, [logging.lastResort])]


class _Silent:
    """Standard error for all threads but those that are to be quiet."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or not."""
        if threading.get_ident() in _THREADS:
            return len(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
