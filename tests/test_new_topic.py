"""A new topic is five files; everything that lists topics finds it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fresh
import pytest

ROOT = Path(__file__).parent.parent

LESSON = """
title = "Toy"
learn = "whether toys are fast"
minutes = 5

[[claim]]
id = "toy.is-fast"
tip = "design-prune"
says = "A toy is fast."
source = "this test"
kind = "exact"
metric = "toys"
threshold = "== 1"
since = 2026-11-30
[[claim.condition]]
name = "one toy"
theory = "wins"
why = "one is one"
"""
MODULE = '''"""How fast is a toy?"""

__all__ = ["speed"]


def speed() -> int:
    """Return 1."""
    return 1
'''
EXERCISES = """
from dlhelpers.course.exercises import Case, Exercise
from dlhelpers.toy import speed

EXERCISES = (
    Exercise("90.1", "Toy", "Return 1.", (Case("one", "it is 1", lambda f: f() == 1),), (), speed),
)
"""
CELLS = [
    ("markdown", "# 90 · Is a toy fast?\n\n**Minutes:** 5 to read."),
    ("markdown", "## The tips\n\n<!-- tips -->\n<!-- end -->"),
    ("code", 'claims.card("toy.is-fast").judge({"one toy": 1})'),
    ("markdown", "## Take away\n\nPrevious: [nothing yet](00_start_here.ipynb)."),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp("copy")
    for name in ("dlhelpers", "notebooks", "tools"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", root)
    cells = [
        {"cell_type": kind, "id": f"c{n}", "metadata": {}, "source": text.splitlines(True)}
        | ({"outputs": [], "execution_count": None} if kind == "code" else {})
        for n, (kind, text) in enumerate(CELLS)
    ]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (root / "notebooks" / "90_toy.ipynb").write_text(json.dumps(notebook))
    (root / "dlhelpers" / "toy.py").write_text(MODULE)
    (root / "dlhelpers" / "course" / "lessons" / "90_toy.toml").write_text(LESSON)
    (root / "dlhelpers" / "course" / "exercises" / "toy.py").write_text(EXERCISES)
    return root


def run_here(copy, code):
    """Run code on the copied package."""
    here = f"import os, sys; os.chdir({str(copy)!r}); sys.path.insert(0, {str(copy)!r})\n"
    here += f"os.environ['DLHELPERS_LEDGER'] = {str(copy / 'ledger.json')!r}\n"
    done = fresh.run(here + code)
    assert done.returncode == 0, done.stderr


def run(copy, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "DLHELPERS_LEDGER": str(copy / "ledger.json")},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_finds_it(copy):
    code = """
import dlhelpers
from dlhelpers.course import claims, exercises
assert dlhelpers.__file__.startswith(PATH)
assert "toy" in dir(dlhelpers) and dlhelpers.toy.speed() == 1
says = "Prune the model: fewer layers and parameters."
rows = {(stem, tip): left for stem, tip, _, left in claims.standing().rows}
assert rows["90_toy", says] == 1
assert exercises.check("90.1", dlhelpers.toy.speed).passed
assert exercises.ids("90_toy") == ("90.1",)
claims.card("toy.is-fast").judge({"one toy": 1})
stem, tip, tally, not_run = claims.standing().rows[-1]
assert (stem, tip) == ("90_toy", "Prune the model: fewer layers and parameters.")
assert (tally.holds, tally.settled, not_run) == (1, 1, 0)
"""
    run_here(copy, code.replace("PATH", repr(str(copy))))


def test_the_report_shows_its_claim_with_a_link(copy):
    judge = "claims.card('toy.is-fast').judge({'one toy': 1})"
    run_here(copy, f"from dlhelpers.course import claims; {judge}")
    run(copy, "-m", "dlhelpers", "report")
    page = (copy / "report.html").read_text("utf-8")
    assert "A toy is fast." in page
    assert "notebooks/90_toy.ipynb#cell-id=c2" in page


def test_the_readme_lists_the_notebook_and_the_module(copy):
    run(copy, "tools/readme_table.py")
    readme = (copy / "README.md").read_text("utf-8")
    assert "| [90 Toy](notebooks/90_toy.ipynb) | whether toys are fast | 1 | 5 |" in readme
    assert "| `toy` | How fast is a toy? |" in readme


def test_the_neighbours_link_to_it(copy):
    run(copy, "tools/links.py")
    link = "[90 Toy](90_toy.ipynb)"
    paths = sorted((copy / "notebooks").glob("*.ipynb"))
    assert f"Next: {link}." in paths[-2].read_text("utf-8")
    assert f"- {link}: whether toys are fast" in paths[0].read_text("utf-8")
    assert "This was the last lesson" in paths[-1].read_text("utf-8")
