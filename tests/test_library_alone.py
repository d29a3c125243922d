"""The library stands without the course, and without every package that it can do without."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import fresh
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dlhelpers"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if "course" not in path.parts and path.name != "__main__.py"
)


def run(code, cwd=ROOT, **environment):
    """Run code in a new Python; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | environment,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


# The library never imports the course


def tree_of(module):
    path = ROOT.joinpath(*module.split("."))
    file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    text = file.read_text(encoding="utf-8")
    return ast.parse(text), text, file.name == "__init__.py"


def imported(node, module, is_package):
    """Return what a statement imports, relative names resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    above = module.split(".")[: len(module.split(".")) + is_package - node.level]
    start = [*(above if node.level else []), *filter(None, [node.module])]
    return [".".join([*start, alias.name]) for alias in node.names]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "dlhelpers._former"])
def test_no_module_of_the_library_but_the_forwarding_one_names_the_course(module):
    """Neither in an import nor in an example, nor in a string that could be imported."""
    tree, text, is_package = tree_of(module)
    for node in ast.walk(tree):
        for name in imported(node, module, is_package):
            assert not f"{name}.".startswith("dlhelpers.course."), name
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith("dlhelpers.course"), node.value
    assert not [line for line in text.splitlines() if ">>>" in line and "dlhelpers.course" in line]


def test_relative_imports_of_the_course_would_be_seen():
    statement = ast.parse("from .course import claims").body[0]
    assert imported(statement, "dlhelpers.fusion", is_package=False) == ["dlhelpers.course.claims"]
    deep = ast.parse("from ..course.claims import card").body[0]
    named = imported(deep, "dlhelpers.fusion.fusing", is_package=False)
    assert named == ["dlhelpers.course.claims.card"]


def test_the_library_alone_loads_nothing_of_the_course():
    code = f"""
import importlib, sys
for name in {MODULES!r}:
    importlib.import_module(name)
print([name for name in sys.modules if name.startswith("dlhelpers.course")])
"""
    done = fresh.run(code)
    assert done.stdout.strip() == "[]", done.stderr


# Without extras


MISSING = {  # what is done without its extra -> the extra that its error names
    "lmdb_io.write_lmdb([], 'x.lmdb')": "lmdb",
    "lmdb_io.verify_lmdb('x.lmdb')": "lmdb",
    "lmdb_io.LMDBDataset('x.lmdb')": "lmdb",
    "lmdb_io.load_decoder('simplejpeg')": "codecs",
    "lmdb_io.load_decoder('opencv')": "codecs",
    "dali_io.image_pipeline('photos', size=8, batch_size=1, train=False)": "dali",
    "dali_io.torchvision_transform(8, train=False)": "dali",
    "profiling.profile_lines(work)": "profiling",
    "profiling.sample(work)": "profiling",
    "profiling.profile_python(work).flame()": "profiling",
    "profiling.profile_torch(work, steps=1).overview()": "plots",
    "drawing.lanes({'a': [(0.0, 1.0, 'b')]}, title='t')": "plots",
}


COMMANDS = {
    ("data", "photos", "somewhere"): "course",
    ("lmdb", "write", "photos", "x.lmdb"): "lmdb",
    ("lmdb", "verify", "x.lmdb"): "lmdb",
    ("report", "--run", "--notebooks", str(ROOT / "notebooks")): "course",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Do all of it in one process without extras; return what each was told, and what is left.

    Every module of the library is loaded first.
    """
    folder = tmp_path_factory.mktemp("bare")
    printed = run(
        f"""
        import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
        from core_only import hide
        hidden = hide("pytest")
        assert {{"lmdb", "PIL", "torchvision", "matplotlib", "sklearn", "IPython"}} <= hidden
        import contextlib, importlib, io, json, os
        from pathlib import Path
        for name in {MODULES!r}:
            importlib.import_module(name)
        beside = {{"exceptiongroup", "iniconfig", "packaging", "pluggy", "pygments", "tomli"}}
        assert not beside & set(sys.modules), beside & set(sys.modules)  # what pytest brings
        import pytest, torch
        from dlhelpers import dali_io, drawing, lmdb_io, profiling
        from dlhelpers.__main__ import main

        def work():
            return inner(torch.ones(4))

        def inner(x):
            return sum(sorted(x.tolist()))

        told = {{}}
        for arguments in {list(COMMANDS)!r}:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                status = main(arguments)
            told[" ".join(arguments)] = f"{{status}}: {{said.getvalue()}}"
        told["left"] = os.listdir()
        Path("photos/cats").mkdir(parents=True)
        Path("photos/cats/1.jpg").write_bytes(b"")
        for call in {list(MISSING)!r}:
            try:
                told[call] = f"no error: {{eval(call)}}"
            except ImportError as error:
                told[call] = str(error)
        from dlhelpers.quantization import quantize_static
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        engines = ["onnxruntime", "openvino"]
        fast = quantize_static(model, [torch.randn(4, 8)], engine=engines, budget_s=0.05)
        told["engines"] = str(fast.report())
        os.chdir({str(ROOT)!r})
        with contextlib.redirect_stdout(io.StringIO()) as said:
            arguments = ["-q", "-rs", "-o", "addopts=--doctest-modules", "-p", "no:cacheprovider"]
            tested = ["lmdb_io", "dali_io", "fusion", "tables.py"]
            status = pytest.main([*arguments, *(f"dlhelpers/{{name}}" for name in tested)])
        told["doctests"] = f"{{status:d}}: {{said.getvalue()}}"
        print(json.dumps(told))
        """,
        cwd=folder,
        PYTHONPATH=str(ROOT),
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize(("call", "extra"), MISSING.items())
def test_what_needs_an_extra_says_which_one_to_install(call, extra, told):
    assert f'pip install "dlhelpers[{extra}]"' in told[call]


@pytest.mark.parametrize(("arguments", "extra"), COMMANDS.items())
def test_the_command_line_says_which_extra_to_install(arguments, extra, told):
    said = told[" ".join(arguments)]
    assert said.startswith("2: ")
    assert f'pip install "dlhelpers[{extra}]"' in said
    assert told["left"] == []


def test_an_engine_that_is_not_here_drops_out_and_says_what_to_install(told):
    assert 'pip install "dlhelpers[engines]"' in told["engines"]


def test_doctests_that_need_an_extra_are_skipped_by_name_without_it(told):
    said = told["doctests"]
    assert said.startswith("0: "), said
    assert "extra lmdb" in said
    assert "extra dali" in said
    assert "passed" in said


# The wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build the wheel from the files that git knows, install it alone into a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        cwd=ROOT,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        packed = name.split("/")[0] in ("dlhelpers", "pyproject.toml", "README.md", "LICENSE")
        if packed and (ROOT / name).exists():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    run(build, cwd=source)  # as pip does
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    zipfile.ZipFile(wheel).extractall(site)  # which installs what holds Python alone
    return wheel, site


def test_the_wheel_holds_the_courses_files_and_nothing_beside_the_package(installed):
    wheel, _ = installed
    names = zipfile.ZipFile(wheel).namelist()
    lessons = {path.name for path in (PACKAGE / "course" / "lessons").glob("*.toml")}
    assert {Path(name).name for name in names if "course/lessons/" in name} == lessons
    assert {"dlhelpers/course/tips.toml", "dlhelpers/py.typed"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dlhelpers"}


def test_the_wheel_asks_for_the_core_alone(installed):
    wheel, _ = installed
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    lines = archive.read(metadata).decode().splitlines()
    asked = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(asked) == len(project["dependencies"]) == 5


GIVEN = """
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from dlhelpers.lmdb_io import LMDBDataset

torch.manual_seed(0)
torch.set_num_threads(1)
model, faster_model = (
    nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 10),
    )
    for _ in range(2)
)
loss = nn.CrossEntropyLoss()
images, targets = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
x = inputs = images
optimizer = torch.optim.AdamW(model.parameters())
calibration = [images[:4], images[4:]]
loader = DataLoader([(images[0], 3)] * 8000, batch_size=8)
batches = None

pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
scene = {"image": pixels, "mask": pixels[0], "boxes": x[0, 0], "caption": "black", "label": 0}
scenes = ConcatDataset([[scene] * 2])

def transform(image):
    return image.float()

def joint_transform(sample):
    return sample

def step():
    x, y = (images, targets) if batches is None else next(batches)
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()

def train(model):
    for _ in range(3):
        step()

"""
EXAMPLES = [
    block
    for part in (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    for block in [part.partition("```")[0]]
    if sys.platform == "linux" or "dali_io" not in block
]
ONE_BY_ONE = """
import os, runpy, sys
import dlhelpers
print(dlhelpers.__file__)
for script in sys.argv[1:]:
    os.chdir(os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")
    print(f"{script} ran", flush=True)
"""


@pytest.mark.parametrize(
    "examples",
    [
        pytest.param([block for block in EXAMPLES if "quantize_static" not in block], id="most"),
        pytest.param(  # tries every engine
            [block for block in EXAMPLES if "quantize_static" in block],
            id="quantize_static",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_readmes_examples_run_from_the_wheel_outside_the_repository(
    examples, installed, tmp_path
):
    """One after the other in one process, each in a folder of its own."""
    from PIL import Image

    for kind in ("cats", "dogs"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for name in range(40):
            image = Image.effect_noise((300, 280), 64).convert("RGB")
            image.save(tmp_path / "photos" / kind / f"{name}.jpg")
    scripts = []
    for number, block in enumerate(examples):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "photos", folder / "photos")
        scripts.append(folder / f"{block.split()[1]}.py")
        body = textwrap.indent(f"{GIVEN}{block}", "    ")
        scripts[-1].write_text(f'if __name__ == "__main__":\n{body}', "utf-8")
    _, site = installed
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE, *map(str, scripts)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.startswith(str(site))
    assert [f"{script} ran" for script in scripts if f"{script} ran" not in done.stdout] == []


def test_the_readme_has_an_example_for_every_topic_of_a_lesson():
    from dlhelpers.course import claims

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = "".join(part.partition("```")[0] for part in text.split("```python\n")[1:])
    topics = {lesson.stem.partition("_")[2] for lesson in claims.lessons() if not lesson.continues}
    topics -= {"start_here"}
    imports = re.findall(r"^from dlhelpers(?:\.(\w+))? import (.*)$", examples, re.M)
    named = {name for topic, names in imports for name in [topic, *names.split(", ")]}
    assert topics <= named


# Former names


def test_a_former_name_is_the_module_of_today_and_warns_once(tmp_path):
    script = tmp_path / "learners.py"
    script.write_text(
        "from dlhelpers import claims, data\n"
        "from dlhelpers.training import fit\n"
        "import dlhelpers.stores.timing\n"
        "import dlhelpers.course.claims, dlhelpers.course.training\n"
        "import dlhelpers.course.stores.timing\n"
        "assert claims is dlhelpers.course.claims and data is dlhelpers.course.data\n"
        "assert fit is dlhelpers.course.training.fit\n"
        "import sys\n"
        "assert sys.modules['dlhelpers.stores.timing'] is dlhelpers.course.stores.timing\n"
        "from dlhelpers.plots.style import new_axes\n"
        "assert new_axes.__module__ == 'dlhelpers.drawing.style'\n"
        "assert claims.__spec__.name == 'dlhelpers.course.claims'\n"
        "print(len(claims.all_claims()))\n"
    )
    done = fresh.run(f"import runpy; runpy.run_path({str(script)!r})")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Warning") == 1
    assert (
        f"{script}:1: FutureWarning: dlhelpers.claims is now dlhelpers.course.claims" in done.stderr
    )


def test_a_name_that_never_was_is_no_module():
    found = run("""
        import dlhelpers
        from importlib.util import find_spec
        for module in ("dlhelpers.nothing", "dlhelpers.claims.nothing", "dlhelpers.data.nothing"):
            if module != "dlhelpers.data.nothing":  # below a module find_spec itself raises
                assert find_spec(module) is None
            try:
                __import__(module)
            except ModuleNotFoundError as error:
                print(error)
        print(hasattr(dlhelpers, "nothing"))
    """)
    assert found.count("No module named") == 3
    assert found.endswith("False\n")
