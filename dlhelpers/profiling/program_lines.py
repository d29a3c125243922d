"""At which of the program's own lines is a step? Its stacks, read as shares of its time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dlhelpers.profiling.code_report import place_of
from dlhelpers.profiling.sampling import Line, Look, Stack, is_standard

__all__ = ["ProgramLines", "decodes", "program_lines"]

_DECODING = re.compile(r"decode|decompress|imread|read_image|default_loader|pil_loader", re.I)
_LOADER = "/torch/utils/data/"
_PARTS = ("nn/modules/module.py", "nn/utils/", "autograd/", "optim/", "amp/", "_dynamo/")
_TORCHS = tuple(f"/torch/{part}" for part in _PARTS)


@dataclass(frozen=True)
class ProgramLines:
    """Where the calling thread was, what a DataLoader does left out.

    Attributes:
        hottest: the program's own line on or below which most time passed, as ``file.py:12``.
        outside: the same of the time outside modules, backward, optimizers and decoders.
        outside_share: share of all time that passed outside them, on or below any own line, 0 to 1.
        decoding_share: share of all time in which a picture was decoded.
    """

    hottest: str = ""
    outside: str = ""
    outside_share: float = 0.0
    decoding_share: float = 0.0


def program_lines(looks: Sequence[Look]) -> ProgramLines:
    """Read what was seen of the calling thread; libraries are not the program's own."""
    decoding = 0.0
    below: dict[Line, float] = {}
    outside: dict[Line, float] = {}
    for seconds, stacks in looks:
        stack = stacks.get("", ())
        if _passes(stack, _LOADER):
            continue
        in_torch = _passes(stack, *_TORCHS)  # where a method named decode decodes no picture
        pictures = not in_torch and any(map(decodes, stack))
        decoding += seconds * pictures
        line = next((line for line in reversed(stack) if _is_own(line[0])), None)
        if line is None:
            continue
        below[line] = below.get(line, 0.0) + seconds
        if not pictures and not in_torch:
            outside[line] = outside.get(line, 0.0) + seconds
    whole = sum(look.seconds for look in looks) or 1.0
    return ProgramLines(
        _longest(below), _longest(outside), sum(outside.values()) / whole, decoding / whole
    )


def decodes(where: Line) -> bool:
    """Whether a function reads or decodes pictures, by its name."""
    file, _, name = where
    return bool(_DECODING.search(name)) or (name == "load" and file.endswith("ImageFile.py"))


def _longest(lines: dict[Line, float]) -> str:
    return place_of(*max(lines, key=lines.__getitem__)[:2]) if lines else ""


def _passes(stack: Stack, *parts: str) -> bool:
    files = (file.replace("\\", "/") for file, _, _ in stack)
    return any(part in file for file in files for part in parts)


def _is_own(file: str) -> bool:
    name = file.replace("\\", "/")
    return not (
        "site-packages/" in name
        or is_standard(file)
        or "dlhelpers/profiling/" in name
        or (name.startswith("<") and "ipython" not in name)
    )
