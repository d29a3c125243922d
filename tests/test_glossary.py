"""Does the glossary hold the terms that readers search for, once each and in order?"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
ENTRY = re.compile(r"^## (.+)\n\n((?:.+\n)+)\nLesson \[(\d\d)\]\(\.\./(.+)\)\.\n", re.MULTILINE)
WANTED = """activation checkpointing, arithmetic intensity, autocast, B-tree, backend, break-even,
broadcasting, calibration, channels_last, compute-bound, confidence interval, control, depthwise
convolution, fake quantization, FLOPs, gradient accumulation, group convolution, kernel, logits,
loss scaling, MACs, memory map, memory-bound, mixed precision, page cache, per-channel, per-tensor,
pinned memory, prefetch, PTQ, QAT, roofline, scale, SQNR, straight-through estimator, throughput,
zero point"""


def test_each_term_is_there_once_and_in_alphabetical_order():
    terms = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    assert terms == sorted(" ".join(WANTED.split()).split(", "), key=str.lower)
    assert [entry[0] for entry in ENTRY.findall(TEXT)] == terms, "a text or a lesson is missing"


def test_each_entry_is_short_and_its_lesson_exists():
    for term, text, number, notebook in ENTRY.findall(TEXT):
        assert len(re.findall(r"[.:?!](?:\s|$)", text)) <= 4, term
        assert Path(notebook).name.startswith(number), term
        assert (ROOT / notebook).is_file(), term


def test_the_readme_links_the_glossary():
    assert "(docs/glossary.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_each_entry_is_linked_in_the_lesson_that_it_names():
    for term, _, _, notebook in ENTRY.findall(TEXT):
        cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
        text = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        assert f"docs/glossary.md#{term.lower().replace(' ', '-')})" in text, term
