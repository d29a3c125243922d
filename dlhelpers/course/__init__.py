"""What do the notebooks share? Claims and their verdicts, data, exercises, plots, the report.

An engineer who imports ``dlhelpers`` needs none of it: ``pip install "dlhelpers[course]"`` brings
what it needs beyond the library. The library never imports it.
"""

import importlib
from importlib.util import find_spec
from pkgutil import iter_modules
from types import ModuleType

__all__: list[str] = []


def __getattr__(name: str) -> ModuleType:
    if name.isidentifier() and name[0] != "_" and find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__))
