"""The page on fourteen million images is what its program writes, and its commands exist."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

from dlhelpers.__main__ import _parser

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("scale_page", ROOT / "benchmarks" / "scale_page.py")
scale_page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(scale_page)

ROW = {key: 1.0 for _, key, _, _ in scale_page.ROWS}


def rendered(**sizes):
    peers = {
        "one": {
            "version": "1", "files": 2, "own_bytes": 3.0,
            "write_us": 4.0, "open_ms": 5.0, "stream_us": 6.0,
        },
        "other": {"why": "other is not installed"},
    }  # fmt: skip
    found = {name[1:]: ROW | row for name, row in sizes.items()}
    return scale_page.render(
        {"machine": "a machine", "sizes": found, "peers": peers, "peers_count": 7}
    )


def cells(page, what):
    line = next(line for line in page.splitlines() if line.startswith(f"| {what} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_prose_of_the_page_stands_in_the_program():
    page = scale_page.PAGE.read_text(encoding="utf-8")
    prose = re.sub(r"^(\|.*|.*measured on.*|.*records on.*)$", "", page, flags=re.M | re.I)
    made = re.sub(
        r"^(\|.*|.*measured on.*|.*records on.*)$", "", rendered(_5={}), flags=re.M | re.I
    )
    assert re.sub(r"\n+", "\n", prose) == re.sub(r"\n+", "\n", made)
    assert page.endswith(scale_page.CHOICE)


def test_totals_follow_the_line_and_costs_per_image_stay():
    page = rendered(_1000={"targets_ms": 10.0}, _2000={"targets_ms": 20.0, "write_us": 3.0})
    assert cells(page, "`np.asarray(targets)`") == ["10.0 ms", "20.0 ms", "2.3 min"]  # 140 s
    assert cells(page, "conversion, per image, one process") == ["1.0 us", "3.0 us", "3.0 us"]
    assert cells(page, "conversion, one process, in whole")[-1] == "42.0 s"
    falling = rendered(_1000={"open_ms": 9.0}, _2000={"open_ms": 4.0})
    assert cells(falling, "opening, and the first record")[-1] == "4.0 ms"


def test_a_peer_that_is_missing_or_has_no_random_access_says_so():
    page = rendered(_5={})
    assert cells(page, "one")[5] == "none"
    assert cells(page, "other")[0] == "not measured: other is not installed"


@pytest.mark.parametrize(
    "command", re.findall(r"-m dlhelpers (lmdb (?:[^\n]*\\\n)*[^\n]*)", scale_page.CHOICE)
)
def test_the_commands_of_the_page_are_those_of_the_package(command):
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    assert _parser().parse_args(words).command == "lmdb"


@pytest.mark.slow
def test_the_program_runs_at_small_sizes(tmp_path):
    import subprocess

    program, page = ROOT / "benchmarks" / "scale.py", tmp_path / "page.md"
    command = [sys.executable, program, "--sizes", "50", "100", "--peers", "50", "--page", page]
    done = subprocess.run([*command, "--results", tmp_path / "scale.json"], check=False)
    assert done.returncode == 0
    assert "| 50 | 100 |" in page.read_text(encoding="utf-8")
