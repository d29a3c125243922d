"""Which modules are for users? All that are found, except those that only other modules use."""

from __future__ import annotations

from pathlib import Path
from pkgutil import iter_modules

ROOT = Path(__file__).parent.parent
INTERNAL = {"arguments", "drawing", "extras", "fakes", "files", "patching", "progress", "recording"}
INTERNAL |= {"stderr_filter", "tables", "classes", "models", "printable", "reached", "trees"}
INTERNAL |= {"untouched", "without_data"}


def public(folder: str = "dlhelpers") -> list[str]:
    """Return the dotted names right below a package, by name.

    >>> "dlhelpers.fusion" in public(), "dlhelpers.course.claims" in public("dlhelpers/course")
    (True, True)
    """
    names = sorted(module.name for module in iter_modules([str(ROOT / folder)]))
    package, hidden = folder.replace("/", "."), INTERNAL | {"course"}
    return [f"{package}.{name}" for name in names if name[0] != "_" and name not in hidden]
