"""Write docs/api.md: every public name of the package, with its signature and its docstring."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import dlhelpers

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
HEAD = """# The package, name by name

Made from the docstrings by `tools/api_page.py`; a test keeps it true. Every example in it is run by
`make test`.
"""


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8", newline="\n")
    print(f"wrote {PAGE}")


def render() -> str:
    """Return the whole page as Markdown."""
    modules = [importlib.import_module(f"dlhelpers.{name}") for name in dlhelpers._SUBMODULES]
    index = " · ".join(
        f"[{short}](#{module.__name__.replace('.', '')})"
        for module in modules
        for short in [module.__name__.partition(".")[2]]
    )
    return "\n".join([HEAD, index, "", *(_module(module) for module in modules)])


def _module(module: Any) -> str:
    first, rest = _split(module)
    parts = [f"## {module.__name__}", "", first, *_fenced(rest)]
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.ismodule(thing):
            continue
        parts += ["", f"### {name}"]
        if not (inspect.isclass(thing) or inspect.isroutine(thing)):
            parts += ["", f"A value of type `{type(thing).__name__}`."]
            continue
        first, rest = _split(thing)
        parts += [*_fenced(f"{name}{_signature(thing)}", "python"), "", first, *_fenced(rest)]
    return "\n".join([*parts, ""])


def _signature(thing: Any) -> str:
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return "(...)"
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)  # annotations are kept as strings
    text = re.sub(r"<function (\w+)[^>]*>", r"\1", text)
    return re.sub(r"<(\w[\w.]*) object at [^>]*>", r"\1()", text)


def _split(thing: Any) -> tuple[str, str]:
    first, _, rest = inspect.cleandoc(thing.__doc__ or "").partition("\n\n")
    return first.replace("\n", " "), rest.strip()


def _fenced(text: str, language: str = "text") -> list[str]:
    return ["", f"```{language}", text, "```"] if text else []


if __name__ == "__main__":
    main()
