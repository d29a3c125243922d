"""Which modules does somebody import who uses the package? Found, not listed."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
# what the other modules share, of no use outside
INTERNAL = {"arguments", "drawing", "extras", "fakes", "files", "progress", "recording", "tables"}


def public(folder: str = "dlhelpers") -> list[str]:
    """Return the dotted names right below a package, by name.

    >>> "dlhelpers.fusion" in public(), "dlhelpers.course.claims" in public("dlhelpers/course")
    (True, True)
    """
    paths = [
        p for p in (ROOT / folder).iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    ]
    names = sorted({path.stem for path in paths if not path.stem.startswith("_")})
    package = folder.replace("/", ".")
    return [f"{package}.{name}" for name in names if name not in INTERNAL | {"course"}]
