"""How is a backend that fails kept from writing to the terminal? Its error says what is needed.

By the loggers' own levels; and since torch.export prints a failed graph to ``sys.stderr``, without
a switch, what this thread writes there is dropped as well. No file descriptor is redirected: a
crash can still say where it happened.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

__all__ = ["quiet"]

_TALKATIVE = ("torch", "torchao", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "openvino")
_LOCK = threading.Lock()
_THREADS: Counter[int] = Counter()  # thread -> how many blocks it is in
_UNDO = ExitStack()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what exporters, compilers and deprecated modules say while they work.

    Blocks of several threads may overlap: the first one to begin changes the levels, the last one
    to end restores them.
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
    undo.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    for logger in _loggers():
        undo.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL + 1)
    logging.root.addFilter(_is_loud)  # ONNX Runtime's quantizer logs there
    undo.callback(logging.root.removeFilter, _is_loud)
    undo.callback(_give_back, sys.stderr, silent := _Silent(sys.stderr))
    sys.stderr = silent


def _is_loud(record: logging.LogRecord) -> bool:
    return threading.get_ident() not in _THREADS


def _give_back(stream: Any, silent: _Silent) -> None:
    if sys.stderr is silent:  # else somebody has replaced it since
        sys.stderr = stream


def _loggers() -> list[logging.Logger]:
    """Return the packages' loggers, and those below them with a level of their own."""
    found = [logging.getLogger(name) for name in _TALKATIVE]
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.partition(".")[0] in _TALKATIVE and isinstance(logger, logging.Logger):
            found.append(logger)
    return list(dict.fromkeys(found))


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
