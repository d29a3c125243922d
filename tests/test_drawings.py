"""Are the drawings right, legible, and still there after GitHub's sanitizer?"""

import base64
import itertools
import math
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from github import Sanitizer
from torch.nn import functional as F

from dlhelpers.course import drawings
from dlhelpers.course.drawings.pairing import losses
from dlhelpers.drawing.panel import Panel

ALLOWED = {"svg", "rect", "text", "polyline", "polygon", "circle"}
each = pytest.mark.parametrize("name", drawings.__all__)


def light(colour):
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def faults(panel):
    """Texts that overlap, leave the panel or are too pale."""
    found = [
        f"{w.text!r} leaves the panel"
        for w in panel.words
        if w.left < 0 or w.top < 0 or w.right > panel.width or w.bottom > panel.height
    ]
    for a, b in itertools.combinations(panel.words, 2):
        if a.left < b.right and b.left < a.right and a.top < b.bottom and b.top < a.bottom:
            found.append(f"{a.text!r} on {b.text!r}")
    for w in panel.words:
        dark, pale = sorted((light(w.colour), light(w.ground)))
        if (pale + 0.05) / (dark + 0.05) < 4.5:
            found.append(f"{w.text!r} is too pale")
    return found


@each
def test_a_drawing_is_plain_xml_that_is_the_same_each_time(name):
    svg = getattr(drawings, name)().svg
    root = ElementTree.fromstring(svg)
    assert {e.tag.split("}")[1] for e in root.iter()} <= ALLOWED
    assert not any(
        "id" in e.attrib or any(k.startswith("on") for k in e.attrib) for e in root.iter()
    )
    assert not re.search(r"\b20\d\d-\d\d|nan|inf\b", svg)
    assert svg == getattr(drawings, name)().svg


@each
def test_texts_are_legible(name):
    assert faults(getattr(drawings, name)()) == []


def test_illegible_texts_are_found():
    panel = Panel(200, 100, "alt", "title")
    panel.text(20, 60, "over")
    panel.text(30, 62, "lap")
    panel.text(150, 90, "far too long for it", colour="#bbbbbb")
    text = " ".join(faults(panel))
    assert "'over' on 'lap'" in text
    assert "leaves the panel" in text
    assert "too pale" in text


@each
def test_the_picture_and_its_alt_text_survive_the_sanitizer(name):
    panel = getattr(drawings, name)()
    (kept,) = Sanitizer(panel._repr_html_()).pictures
    assert kept["alt"] == panel.alt
    assert len(panel.alt.split()) > 15
    assert base64.b64decode(kept["src"].split(",")[1]).decode() == panel.svg


@pytest.mark.parametrize("margin", [-10.0, -1.0, 0.0, 3.0, 10.0])
def test_the_curves_are_cross_entropy(margin):
    z = torch.zeros(1, 10, dtype=torch.float64)
    z[0, 0], y = margin, torch.tensor([0])
    expected = F.cross_entropy(z, y), F.cross_entropy(z.softmax(1), y)
    assert all(map(math.isclose, losses(margin), map(float, expected)))


def test_each_lesson_shows_two_drawings_and_each_drawing_is_shown_once():
    lessons = sorted((Path(__file__).parent.parent / "notebooks").glob("0[0-8]_*.ipynb"))
    lessons = [p for p in lessons if "_more" not in p.stem]
    shown = [re.findall(r"drawings\.(\w+)\(\)", p.read_text(encoding="utf-8")) for p in lessons]
    assert [len(names) for names in shown] == [2] * len(lessons)
    assert Counter(itertools.chain(*shown)) == Counter(drawings.__all__)
