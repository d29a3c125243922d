"""Write docs/api.md: every public name of the package, with its signature and its docstring."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import typing
from pathlib import Path
from typing import Any

from modules import public

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
    names = [*public(), *public("dlhelpers/course")]
    modules = [importlib.import_module(name) for name in names]
    index = " · ".join(
        f"[{short}](#{module.__name__.replace('.', '')})"
        for module in modules
        for short in [module.__name__.partition(".")[2]]
    )
    # a class that is met as a result alone is described where it is met first
    shown = [getattr(module, name) for module in modules for name in module.__all__]
    return "\n".join([HEAD, index, "", *(_module(module, shown) for module in modules)])


def _module(module: Any, shown: list[Any]) -> str:
    first, rest = _split(module)
    parts = [f"## {module.__name__}", "", first, *_fenced(rest)]
    public = {name: getattr(module, name) for name in module.__all__}
    public = {name: thing for name, thing in public.items() if not inspect.ismodule(thing)}
    given = {}
    for name, thing in public.items():
        parts += ["", f"### {name}"]
        if not (inspect.isclass(thing) or inspect.isroutine(thing)):
            parts += ["", f"A value of type `{type(thing).__name__}`."]
            continue
        parts += [*_described(name, thing), *_methods(thing)]
        given |= {kind: name for kind in _results(thing) if kind not in [*shown, *given]}
    shown += given
    for kind, name in given.items():
        parts += ["", f"### {kind.__name__}", "", f"What `{name}` returns."]
        first, rest = _split(kind)
        parts += ["", first, *_fenced(rest), *_methods(kind)]
    return "\n".join([*parts, ""])


def _described(name: str, thing: Any) -> list[str]:
    first, rest = _split(thing)
    return [*_fenced(f"{name}{_signature(thing)}", "python"), "", first, *_fenced(rest)]


def _methods(thing: Any) -> list[str]:
    """Return the public methods and properties of a class that the package itself describes."""
    parts: list[str] = []
    own = [
        base for base in getattr(thing, "__mro__", ()) if base.__module__.startswith("dlhelpers")
    ]
    for name in dict.fromkeys(name for base in own for name in vars(base) if name[0] != "_"):
        member = inspect.getattr_static(thing, name)
        if not getattr(member, "__doc__", None):
            continue
        if isinstance(member, (property, functools.cached_property)):
            parts += ["", f"`.{name}`: {_split(member)[0]}"]
        elif inspect.isfunction(member) or isinstance(member, (classmethod, staticmethod)):
            parts += _described(f"{thing.__name__}.{name}", getattr(thing, name))
    return parts


def _results(thing: Any) -> list[type]:
    """Return the classes of the package that a function's annotation says it returns."""
    if not inspect.isfunction(thing):
        return []
    try:
        hint = typing.get_type_hints(thing).get("return")
    except NameError:  # a name for type checkers alone
        return []
    kinds = [hint, *typing.get_args(hint)]
    return [k for k in kinds if inspect.isclass(k) and k.__module__.startswith("dlhelpers")]


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
