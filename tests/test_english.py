"""Words that stop an English reader, and what to write in their place."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BETTER = {
    r"mend(s|ed|ing)?": "fix",
    r"roads?": "backend, path or way",
    r"holes?": "blank or gap",
    r"turn(s|ed|ing)? (a)?round": "reverse or swap",
    r"lights? up": "enable",
    r"(?<!times )as many [\w-]+(?: [\w-]+){0,2}(?=[.,;:)]| in | with | for )": "the same number of",
    r"behind (?:the|a|an|each|every|its) (?:first |last )?"
    r"(?:ReLU|softmax|sigmoid|convolution|layer|BatchNorm|linear|activation)\w*": "after",
    r"stands? (?!in for)(?:in|on|at|there|beside|under|above)": "is, is listed or depends",
    r"(?:tells?|told) (?:apart|what|the time|the speed)": "show, predict or separate",
    r"by (?:the )?so (?:many|much)": "by that",
    r"is no [\w-]+ by name": "does not look like",
}
MADE = ("api.md", "where-tips-hold.md")  # from docstrings and claims
WRITTEN = sorted(
    [
        *(ROOT / "notebooks").glob("*.ipynb"),
        *(ROOT / "dlhelpers" / "course").rglob("*.toml"),
        *(ROOT / "dlhelpers" / "course").rglob("*.py"),
        *(p for p in (ROOT / "docs").glob("*.md") if p.name not in MADE),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]
)


def written(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        shown = [
            o.get("data", {}).get("text/html", []) for c in cells for o in c.get("outputs", [])
        ]
        parts = [*(cell["source"] for cell in cells), *shown]
        text = re.sub(r"<[^>]+>", " ", "\n".join(map("".join, parts)))
    return re.sub(r"https?://\S+", "", re.sub(r"\s+", " ", text))


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_no_phrase_that_needs_a_second_reading(path):
    text = written(path)
    found = [
        f"...{text[max(0, hit.start() - 40) : hit.end() + 30]}...: {better}"
        for phrase, better in BETTER.items()
        for hit in re.finditer(rf"\b(?:{phrase})\b", text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "the first mend",
        "the fastest road",
        "fill the hole",
        "a chain with as many multiply-adds, and more",
        "What was measured stands in an output",
        "behind the first ReLU",
        "what does tell the time of a network",
    ],
)
def test_the_phrases_are_found(text):
    assert any(re.search(rf"\b(?:{phrase})\b", text) for phrase in BETTER)
