"""Write the links between the notebooks: to the previous and the next one, and 00's list of all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dlhelpers.course import claims

FOLDER = Path(__file__).parent.parent / "notebooks"
_NEIGHBOURS = re.compile(r"^Previous: \[.*$", re.M)
_LIST = re.compile(r"(<!-- lessons -->\n).*?(?=<!-- end -->)", re.S)


def main() -> None:
    for path, text in render().items():
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote {path}")


def render() -> dict[Path, str]:
    """Return notebook -> its text with the links; outputs and all else stay as they are.

    Raises:
        ValueError: a lesson has no line that begins with "Previous: [".
    """
    lessons, found = claims.lessons(), {}
    for place, lesson in enumerate(lessons):
        path = FOLDER / f"{lesson.stem}.ipynb"
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if place == 0:
            entries = "".join(f"- {_link(other)}: {other.learn}\n" for other in lessons[1:])
            pattern, text = _LIST, rf"\g<1>{entries}"
        else:
            after = lessons[place + 1 : place + 2]
            last = f"This was the last lesson; [the start page]({lessons[0].stem}.ipynb) shows"
            then = f"Next: {_link(after[0])}." if after else f"{last} your ledger."
            pattern, text = _NEIGHBOURS, f"Previous: {_link(lessons[place - 1])}. {then}"
        _replace(notebook, pattern, text, path)
        found[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    return found


def _link(lesson: claims.Lesson) -> str:
    number = lesson.stem.partition("_")[0]
    return f"[{number} {lesson.title}]({lesson.stem}.ipynb)"


def _replace(notebook: Any, pattern: re.Pattern[str], text: str, path: Path) -> None:
    for cell in reversed(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and pattern.search(source):
            cell["source"] = pattern.sub(text, source).splitlines(keepends=True)
            return
    raise ValueError(f"{path.name}: no text cell matches {pattern.pattern!r}")


if __name__ == "__main__":
    main()
