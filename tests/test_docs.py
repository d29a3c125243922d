"""The pages that are made from the code are those that the code makes."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

from dlhelpers.course import claims, exercises, ledger

ROOT = Path(__file__).parent.parent


sys.path.insert(0, str(ROOT / "tools"))  # they import each other, as scripts do


def tool(name):
    return importlib.import_module(name)


def test_the_api_page_is_up_to_date():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == tool("api_page").render(), "make it anew: .venv/bin/python tools/api_page.py"


@pytest.mark.parametrize(
    "name", ["compare", "diagnose", "TorchReport", "fuse_conv_bn", "write_lmdb"]
)
def test_the_api_page_has_what_people_look_for(name):
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert f"\n### {name}\n" in page


def test_the_picture_of_the_modules_is_what_they_import():
    architecture = tool("architecture")
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    made = f"{architecture.BEGIN}{architecture.picture()}{architecture.END}"
    assert made in page, "make it anew: .venv/bin/python tools/architecture.py"


def test_no_module_of_the_picture_leans_on_itself_by_way_of_others():
    architecture = tool("architecture")
    used = architecture.edges()

    def below(name, seen):
        for other in used.get(name, set()) - seen:
            assert other != start, f"{start} uses {name}, which uses {start}"
            seen.add(other)
            below(other, seen)

    for start in used:
        below(start, set())


def test_the_readmes_table_is_that_of_the_notebooks_and_their_claims():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == tool("readme_table").render(), (
        "make it: .venv/bin/python tools/readme_table.py"
    )
    total = sum(int(n) for n in re.findall(r"\| (\d+) \| \d+ \|$", readme, re.M))
    assert total == len(claims.all_claims())


PROGRAMS = [*(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_a_program_imports_what_there_is(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dlhelpers"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def test_the_notebooks_link_to_their_neighbours_and_the_first_to_all():
    for path, text in tool("links").render().items():
        assert path.read_text(encoding="utf-8") == text, "make it: .venv/bin/python tools/links.py"


def test_the_page_of_ledgers_and_its_picture_are_up_to_date():
    page = (ROOT / "docs" / "where-tips-hold.md").read_text(encoding="utf-8")
    svg = (ROOT / "docs" / "where-tips-hold.svg").read_text(encoding="utf-8")
    made = tool("ledger_page")
    assert (page, svg) == (made.render(), made.drawn()), "make it: python tools/ledger_page.py"


def test_the_page_for_teachers_names_exercises_that_exist():
    text = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b0\d\.\d\b", text))
    lessons = {lesson.number for lesson in claims.lessons()}
    assert len(named) > 10
    assert named <= {id for number in lessons for id in exercises.ids(number)}


@pytest.mark.parametrize("path", sorted((ROOT / "data" / "ledgers").glob("*.json")))
def test_a_committed_ledger_knows_no_claim_that_is_gone(path):
    known = {claim.id for claim in claims.all_claims()}
    assert {row["id"] for row in ledger.read(path)["rows"]} <= known
