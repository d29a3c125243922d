"""Write the picture of CONTRIBUTING.md: which module leans on which, read from the imports."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- made by tools/architecture.py -->\n", "<!-- end -->\n"
# what nearly every module may use is left out of the picture
EVERYWHERE = {"tables", "fakes", "notebook", "plots", "machine", "measure", "data", "training"}


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{picture()}{END}{after}", encoding="utf-8", newline="\n")
    print(f"wrote {PAGE}")


def edges() -> dict[str, set[str]]:
    """Return module or package right below dlhelpers -> those that it imports, at any time."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "dlhelpers").rglob("*.py")):
        name = file.relative_to(ROOT / "dlhelpers").parts[0].removesuffix(".py")
        if name.startswith("__"):
            continue
        used = found.setdefault(name, set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            used |= set(_named(node))
        used.discard(name)
    return found


def _named(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        parts = [alias.name.split(".") for alias in node.names]
        return [part[1] for part in parts if part[0] == "dlhelpers" and len(part) > 1]
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dlhelpers":
        inner = node.module.split(".")[1:]
        names = inner[:1] or [alias.name for alias in node.names]
        return [name for name in names if not name.startswith("__")]
    return []


def picture() -> str:
    """Return the graph for Mermaid, which GitHub draws; an arrow means "uses"."""
    lines = ["```mermaid", "graph LR"]
    for name, used in sorted(edges().items()):
        if name not in EVERYWHERE:
            lines += [f"  {name} --> {other}" for other in sorted(used - EVERYWHERE)]
    return "\n".join([*lines, "```", ""])


if __name__ == "__main__":
    main()
