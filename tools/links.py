"""Write what the notebooks list: the lesson's tips, the neighbours, and in 00 all lessons."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dlhelpers.course import claims

FOLDER = Path(__file__).parent.parent / "notebooks"
_NEIGHBOURS = re.compile(r"^Previous: \[.*$", re.M)
_TIPS = re.compile(r"(<!-- tips -->\n).*?(?=<!-- end -->)", re.S)
_LIST = re.compile(r"(<!-- lessons -->\n).*?(?=<!-- end -->)", re.S)


def main() -> None:
    for path, text in render().items():
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote {path}")


def render() -> dict[Path, str]:
    """Return notebook -> its text with the links; outputs and all else stay as they are.

    Raises:
        ValueError: a lesson has no line that begins with "Previous: [", or no list of tips.
    """
    every = claims.lessons()
    main = [lesson for lesson in every if not lesson.continues]
    found = {}
    for lesson in every:
        path = FOLDER / f"{lesson.stem}.ipynb"
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if lesson == main[0]:
            pattern, text = _LIST, rf"\g<1>{''.join(map(_entry, main[1:]))}"
        else:
            pattern, text = _NEIGHBOURS, _around(lesson, main)
            if not lesson.continues:
                _replace(notebook, _TIPS, rf"\g<1>{_tips(lesson)}", path)
        _replace(notebook, pattern, text, path)
        found[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    return found


def _tips(lesson: claims.Lesson) -> str:
    """Return the tips that a lesson settles, then those of its notebook of smaller tips."""
    lines = [
        f"- {tip.says} ({tip.said_by})\n"
        for tip in claims.all_tips()
        if lesson.stem in tip.notebooks
    ]
    for other in claims.lessons():
        if other.continues == lesson.number:
            own = [t for t in claims.all_tips() if other.stem in t.notebooks]
            rest = [tip.says for tip in own if lesson.stem not in tip.notebooks]
            lines += [f"- {says} (in {_link(other)})\n" for says in rest]
    return "".join(lines)


def _around(lesson: claims.Lesson, main: list[claims.Lesson]) -> str:
    """Return the line of links: a lesson that continues another one leads on as that one does."""
    own = [other.number for other in main].index(lesson.continues or lesson.number)
    before = main[own] if lesson.continues else main[own - 1]
    after = main[own + 1 : own + 2]
    last = f"This was the last lesson; [the start page]({main[0].stem}.ipynb) shows"
    then = f"Next: {_link(after[0])}." if after else f"{last} your ledger."
    return f"Previous: {_link(before)}. {then}"


def _entry(lesson: claims.Lesson) -> str:
    """Return a lesson's line in the list of all, with what continues it."""
    more = [other for other in claims.lessons() if other.continues == lesson.number]
    rest = "".join(f" More tips: {_link(other)}." for other in more)
    return f"- {_link(lesson)}: {lesson.learn}{'.' * bool(rest)}{rest}\n"


def _link(lesson: claims.Lesson) -> str:
    return f"[{lesson.number} {lesson.title}]({lesson.stem}.ipynb)"


def _replace(notebook: Any, pattern: re.Pattern[str], text: str, path: Path) -> None:
    for cell in reversed(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and pattern.search(source):
            cell["source"] = pattern.sub(text, source).splitlines(keepends=True)
            return
    raise ValueError(f"{path.name}: no text cell matches {pattern.pattern!r}")


if __name__ == "__main__":
    main()
