"""Write the picture of CONTRIBUTING.md: which module leans on which, read from the imports."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- made by tools/architecture.py -->\n", "<!-- end -->\n"
# what nearly every module may use is left out of the picture
EVERYWHERE = {"extras", "fakes", "machine", "measure", "tables", "trees"}
EVERYWHERE |= {f"course.{name}" for name in ("data", "notebook", "plots", "training")}


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{picture()}{END}{after}", encoding="utf-8", newline="\n")
    print(f"wrote {PAGE}")


def edges() -> dict[str, set[str]]:
    """Return module or package right below dlhelpers -> those that it imports, at any time.

    Those of the course are named with it: ``course.claims``.
    """
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "dlhelpers").rglob("*.py")):
        parts = file.relative_to(ROOT / "dlhelpers").with_suffix("").parts
        name = ".".join(parts[: 1 + (parts[0] == "course")])
        if "__" in name:
            continue
        used = found.setdefault(name, set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            used |= set(_named(node))
        used.discard(name)
    return found


def _named(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        named = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        named = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        named = []
    parts = [name.split(".") for name in named]
    parts = [part[1:] for part in parts if part[0] == "dlhelpers" and part[1:]]
    names = [".".join(part[: 1 + (part[0] == "course")]) for part in parts]
    return [name for name in names if "__" not in name]


def picture() -> str:
    """Return the graph for Mermaid, which GitHub draws; an arrow means "uses".

    The library comes first, then the course, of which the library knows nothing.
    """
    arrows = [
        f"  {name} --> {other}"
        for name, used in sorted(edges().items(), key=lambda edge: ("." in edge[0], edge[0]))
        if name not in EVERYWHERE
        for other in sorted(used - EVERYWHERE)
    ]
    return "\n".join(["```mermaid", "graph LR", *arrows, "```", ""])


if __name__ == "__main__":
    main()
