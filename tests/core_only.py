"""Hide every package but the core dependencies, as in an environment without extras.

Imported by child processes of the tests: what pyproject.toml does not bring with the core is
neither imported nor found among the installed distributions, as if it were not there.
"""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def brought_by(requirements):
    """Return the distributions that requirements bring, with what those need themselves."""
    found, left = set(), list(requirements)
    while left:
        name = canonical(re.match(r"[\w.-]+", left.pop())[0])
        if name in found:
            continue
        found.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        left += [need for need in needs if "extra ==" not in need]
    return found


class Without:
    """A finder that finds neither some modules nor the distributions that they belong to."""

    def __init__(self, finder, modules, kept):
        self._finder, self._modules, self._kept = finder, modules, kept

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_distributions(self, *context):
        found = getattr(self._finder, "find_distributions", lambda *_: ())(*context)
        return [one for one in found if canonical(one.metadata["Name"]) in self._kept]

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self._modules:
            return None
        return self._finder.find_spec(name, path, target)


def hide(*more):
    """Hide everything but the core and ``more``; return the top-level modules that are hidden."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    kept = brought_by([*project["dependencies"], *more]) | {"dlhelpers"}
    owners = importlib.metadata.packages_distributions()
    hidden = {module for module, names in owners.items() if not set(map(canonical, names)) & kept}
    loaded = hidden & set(sys.modules)
    assert not loaded, f"loaded before it could be hidden: {loaded}"
    sys.meta_path[:] = [Without(finder, hidden, kept) for finder in sys.meta_path]
    return hidden
