"""pyproject.toml and environment.yml name the same packages; importing the package is cheap."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {  # name on the package index -> name on conda-forge
    "torch": "pytorch",
    "matplotlib": "matplotlib-base",
    "lmdb": "python-lmdb",
    "opencv-python-headless": "py-opencv",
    "playwright": "playwright-python",
    "isal": "python-isal",
}
NOT_A_NEED = {"bench"}  # extras that the environment does not hold


def split(requirement):
    name, rest = re.fullmatch(r"\s*([\w.-]+)\s*(.*?)\s*", requirement.split(";")[0]).groups()
    return name.lower(), rest.replace(" ", "")


def wanted():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lists = [project["dependencies"], *(v for k, v in extras.items() if k not in NOT_A_NEED)]
    every = [need for needs in lists for need in needs if not need.startswith("dlhelpers[")]
    return dict(map(split, every))


def conda():
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in entries if isinstance(entry, dict))
    return [entry for entry in entries if isinstance(entry, str)], pip


def test_both_files_name_the_same_packages_and_ranges():
    specs, pip = conda()
    named = dict(map(split, specs)) | dict(split(p) for p in pip if not p.startswith("-e"))
    named.pop("pip")
    python = named.pop("python")
    assert named == {
        name if name in dict(map(split, pip[:-1])) else CONDA_NAMES.get(name, name): rest
        for name, rest in wanted().items()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert python == project["requires-python"].replace(" ", "")
    assert pip[-1] == "-e ."


def test_every_conda_spec_parses():
    rattler = pytest.importorskip("rattler", reason="py-rattler (extra dev) is not installed")
    for spec in conda()[0]:
        assert rattler.MatchSpec(re.sub(r"(?<=[\w-])(?=[<>=])", " ", spec, count=1)).name


def test_versions_agree():
    import dlhelpers

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert dlhelpers.__version__ == project["version"] == citation["version"]


def test_importing_the_package_loads_neither_torch_nor_matplotlib():
    code = (
        "import sys, dlhelpers, dlhelpers.measure, dlhelpers.lmdb_io,"
        "dlhelpers.course.claims, dlhelpers.course.report;"
        "dir(dlhelpers);"
        "sys.exit(' '.join({'torch', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_submodules_load_on_first_use():
    code = "import dlhelpers; print(dlhelpers.measure.compare.__name__); dlhelpers.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "compare\n"
    assert "has no attribute 'nothing'" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["data"],
        ["data", "photos"],
        ["lmdb"],
        ["lmdb", "write"],
        ["lmdb", "verify"],
        ["lmdb", "info"],
        ["measure"],
        ["report"],
    ],
)
def test_every_command_explains_itself(command):
    done = subprocess.run(
        [sys.executable, "-m", "dlhelpers", *command, "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "usage: python -m dlhelpers" in done.stdout


def test_the_extras_stand_in_the_package_as_in_the_project():
    from dlhelpers.course.claims import lights
    from dlhelpers.extras import EXTRAS

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    own = {k: needs for k, needs in extras.items() if k not in {"course", "dev", "bench"}}
    assert set(EXTRAS) == set(own)
    # the first two the course brings itself, the others no notebook needs
    assert set(lights._EXTRAS) == set(own) - {"lmdb", "plots", "ray", "torchdata"}
    for name, needs in own.items():
        assert sorted(EXTRAS[name]) == sorted(split(need)[0] for need in needs)
    skipped = [need for needs in own.values() for need in needs if "!= 'win32'" in need]
    assert {(split(need)[0], "win32") for need in skipped} == lights._NO_BUILD
