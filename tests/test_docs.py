"""The pages that are made from the code are those that the code makes."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_page_is_up_to_date():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == tool("api_page").render(), "make it anew: .venv/bin/python tools/api_page.py"


@pytest.mark.parametrize("name", ["compare", "diagnose", "fuse_conv_bn", "write_lmdb"])
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
        for other in used[name] - architecture.EVERYWHERE - seen:
            below(other, seen | {other})
            assert other != start, f"{start} uses {other} in a circle"

    for start in set(used) - architecture.EVERYWHERE:
        below(start, set())
