"""Where did a module of the course go? Its former name still works, and says so once."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__ = ["install"]

_MOVED = ("claims", "data", "exercises", "ledger", "notebook")
_MOVED += ("plots", "report", "stores", "story", "training")
_DRAWING = ("plots.strips", "plots.style", "plots.traces")  # these the library draws with
_PASSED = ("importlib", "dlhelpers")  # modules between a program's import and this one


class _Forward(MetaPathFinder, Loader):
    """Answers for ``dlhelpers.data`` and below with ``dlhelpers.course.data``."""

    _warned = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        if package != "dlhelpers" or rest.partition(".")[0] not in _MOVED:
            return None
        try:
            exists = find_spec(_today(rest)) is not None
        except ModuleNotFoundError:  # below a module that is no package
            exists = False
        return ModuleSpec(name, self) if exists else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        rest = name.partition(".")[2]
        if not self._warned:
            _warn(
                f"{name} is now {_today(rest)}; the old name still works. {', '.join(_MOVED)} "
                "have moved to dlhelpers.course, all other modules stay where they were"
            )
        self._warned = True
        sys.modules[name] = importlib.import_module(_today(rest))


def _today(rest: str) -> str:
    if rest in _DRAWING:
        return f"dlhelpers.drawing.{rest.partition('.')[2]}"
    return f"dlhelpers.course.{rest}"


def _warn(message: str) -> None:
    """Warn at the line that imports, past the import system and ``dlhelpers.__getattr__``."""
    frame = sys._getframe(2)
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith(_PASSED):
        frame = frame.f_back
    where = frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__")
    warnings.warn_explicit(message, FutureWarning, *where)


def install() -> None:
    """Let the former names be found; first, or else a submodule would be loaded a second time."""
    if not any(isinstance(finder, _Forward) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Forward())
