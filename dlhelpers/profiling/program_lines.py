"""At which of the program's own lines is a step? Its stacks, read as shares of its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dlhelpers.profiling.code_report import place_of
from dlhelpers.profiling.decoders import decodes
from dlhelpers.profiling.sampling import Line, Look, Stack, is_standard

__all__ = ["ProgramLines", "decodes", "is_own", "program_lines"]

_LOADER = "/torch/utils/data/"
_PARTS = ("nn/modules/module.py", "nn/utils/", "autograd/", "optim/", "amp/", "_dynamo/")
_WATCHES = ("dlhelpers/profiling/", "dlhelpers/patching.py")
_TORCHS = tuple(f"/torch/{part}" for part in _PARTS)


@dataclass(frozen=True)
class ProgramLines:
    """Where the calling thread was, what a DataLoader does left out.

    Attributes:
        hottest: the program's own line on or below which most time passed, as ``file.py:12``.
        outside: the same of the time outside modules, backward, optimizers and decoders.
        outside_share: share of all time that passed outside them, on or below any own line, 0 to 1.
        decoding_share: share of all time in which a picture was decoded.
        outside_line: the line of ``outside``, with the whole path of its file.
        decoding: the own line at which most pictures are decoded, as ``file.py:12``.
    """

    hottest: str = ""
    outside: str = ""
    outside_share: float = 0.0
    decoding_share: float = 0.0
    outside_line: Line = ("", 0, "")
    decoding: str = ""


def program_lines(looks: Sequence[Look]) -> ProgramLines:
    """Read what was seen of the calling thread; libraries are not the program's own."""
    decoding_s = 0.0
    below: dict[Line, float] = {}
    outside: dict[Line, float] = {}
    decoding: dict[Line, float] = {}
    for seconds, stacks in looks:
        stack = stacks.get("", ())
        if _passes(stack, _LOADER):
            continue
        in_torch = _passes(stack, *_TORCHS)
        pictures = not in_torch and any(map(decodes, stack))
        decoding_s += seconds * pictures
        line = next((line for line in reversed(stack) if is_own(line[0])), None)
        if line is None:
            continue
        below[line] = below.get(line, 0.0) + seconds
        if pictures:
            decoding[line] = decoding.get(line, 0.0) + seconds
        elif not in_torch:
            outside[line] = outside.get(line, 0.0) + seconds
    whole = sum(look.seconds for look in looks) or 1.0
    longest = max(outside, key=outside.__getitem__, default=("", 0, ""))
    return ProgramLines(
        hottest=_longest(below),
        outside=_longest(outside),
        outside_share=sum(outside.values()) / whole,
        decoding_share=decoding_s / whole,
        outside_line=longest,
        decoding=_longest(decoding),
    )


def is_own(file: str) -> bool:
    """Whether a file is the program's: no library, and none of what watches it."""
    name = file.replace("\\", "/")
    return not (
        "site-packages/" in name
        or is_standard(file)
        or any(part in name for part in _WATCHES)
        or (name.startswith("<") and "ipython" not in name)
    )


def _longest(lines: dict[Line, float]) -> str:
    return place_of(*max(lines, key=lines.__getitem__)[:2]) if lines else ""


def _passes(stack: Stack, *parts: str) -> bool:
    files = (file.replace("\\", "/") for file, _, _ in stack)
    return any(part in file for file in files for part in parts)
