"""Where in the program? The line of the reader's own code that calls, or that raised."""

from __future__ import annotations

import contextlib
import os
import sys
from types import FrameType

import torch

__all__ = ["place_of", "shown_path", "user_frame"]

_SKIPPED = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
    "<frozen",
)


def user_frame() -> FrameType:
    """Return the innermost frame of neither torch, nor this package, nor another mode."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if not path.startswith(_SKIPPED) and name != "__torch_function__":
            return frame
        frame = frame.f_back
    return frame


def place_of(error: BaseException) -> str:
    """Return ``file.py:12``, the innermost line of the reader's own that ``error`` went through.

    Empty where it went through none.
    """
    place, trace = "", error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if not path.startswith(_SKIPPED):
            place = f"{shown_path(path)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def shown_path(path: str) -> str:
    """Name a file as its reader would: a notebook's cell, or relative to the working folder."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    cells = getattr(getattr(shell, "compile", None), "_filename_map", {})
    if path in cells:
        return f"In [{cells[path]}]"
    with contextlib.suppress(ValueError, OSError):  # another drive, a folder that is gone
        relative = os.path.relpath(path)
        return path if relative.startswith("..") else relative
    return path
