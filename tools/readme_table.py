"""Write README's tables: the notebooks with their claims and minutes, and the library's modules."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from modules import public

from dlhelpers.course import claims

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "README.md"
BEGIN, END = "<!-- {}: made by tools/readme_table.py -->\n\n", "\n<!-- end -->\n"


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8", newline="\n")
    print(f"wrote {PAGE}")


def render() -> str:
    """Return README with the tables of the notebooks and of the modules that are there.

    Raises:
        ValueError: a notebook has no lesson's file.
    """
    readme = PAGE.read_text(encoding="utf-8")
    for name, table in (("notebooks", _notebooks()), ("modules", _modules())):
        before, _, rest = readme.partition(BEGIN.format(name))
        readme = f"{before}{BEGIN.format(name)}{table}{END}{rest.partition(END)[2]}"
    return readme


def _notebooks() -> str:
    settled = Counter(claim.notebook for claim in claims.all_claims())
    stems = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    if stems != [lesson.stem for lesson in claims.lessons()]:
        raise ValueError(f"dlhelpers/course/lessons must hold one file for each of {stems}")
    rows = [
        f"| [{lesson.number} {lesson.title}](notebooks/{lesson.stem}.ipynb) "
        f"| {lesson.learn} | {settled[lesson.stem]} | {lesson.minutes} |"
        for lesson in claims.lessons()
    ]
    head = ["| notebook | what you learn | claims settled | minutes |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def _modules() -> str:
    rows = [f"| `{name.partition('.')[2]}` | {_question(name)} |" for name in public()]
    rows.append(f"| `course` | {_question('dlhelpers.course')} |")
    return "\n".join(["| module | question |", "|---|---|", *rows, ""])


def _question(module: str) -> str:
    """Return the first line of a module's docstring, read without importing it."""
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n\n")[0]


if __name__ == "__main__":
    main()
