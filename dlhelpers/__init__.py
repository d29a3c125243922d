"""Deep learning, measured: tools that settle PyTorch tips by experiment.

Submodules load on first use, so ``import dlhelpers`` costs nothing and
``dlhelpers.pairing.check(...)`` works without a second import; ``dir(dlhelpers)`` lists them, and
the first line of each says which question it answers. :mod:`dlhelpers.course` holds what the
notebooks stand on; nothing else here imports it.
"""

import importlib
from importlib.util import find_spec
from pkgutil import iter_modules
from types import ModuleType

from dlhelpers import _former

__all__ = ["__version__"]
__version__ = "0.1.0"

_former.install()


def __getattr__(name: str) -> ModuleType:
    if name.isidentifier() and name[0] != "_" and find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    found = {module.name for module in iter_modules(__path__) if not module.name.startswith("_")}
    return sorted(found | {"__version__"})
