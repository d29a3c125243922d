import importlib.util
from pathlib import Path

import nbformat
import pytest

spec = importlib.util.spec_from_file_location(
    "lab", Path(__file__).parent.parent / "tools" / "lab.py"
)
lab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lab)


@pytest.fixture
def folders(tmp_path):
    source, target = tmp_path / "notebooks", tmp_path / "work"
    source.mkdir()
    return source, target


def put_lesson(source, text, name="01_x.ipynb"):
    cell = nbformat.v4.new_code_cell(text, id="a", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", text="the answer\n")]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), source / name)


def sources(path):
    return [cell.source for cell in nbformat.read(path, 4).cells]


def test_lessons_are_laid_without_outputs(folders):
    source, target = folders
    put_lesson(source, "print('the ' + 'answer')")
    assert list(lab.lay(source, target)) == []
    text = (target / "01_x.ipynb").read_text()
    assert "the answer" not in text
    assert nbformat.read(target / "01_x.ipynb", 4).cells[0].execution_count is None
    assert "the answer" in (source / "01_x.ipynb").read_text()


def test_an_untouched_lesson_is_renewed(folders):
    source, target = folders
    put_lesson(source, "1")
    list(lab.lay(source, target))
    put_lesson(source, "2")
    assert list(lab.lay(source, target)) == []
    assert sources(target / "01_x.ipynb") == ["2"]
    assert [p.name for p in target.glob("*.ipynb")] == ["01_x.ipynb"]


def test_what_the_learner_changed_is_never_overwritten(folders):
    source, target = folders
    put_lesson(source, "1")
    list(lab.lay(source, target))
    mine = target / "01_x.ipynb"
    mine.write_text(mine.read_text().replace('"1"', '"my answer"'))
    kept = mine.read_bytes()
    assert list(lab.lay(source, target)) == []  # no newer lesson: nothing to say
    put_lesson(source, "2")
    (said,) = lab.lay(source, target)
    assert "01_x.newer.ipynb" in said
    assert mine.read_bytes() == kept
    assert sources(target / "01_x.newer.ipynb") == ["2"]
    assert list(lab.lay(source, target)) == []  # and it is said once

    beside = target / "01_x.newer.ipynb"
    beside.write_text(beside.read_text().replace('"2"', '"mine too"'))
    put_lesson(source, "3")
    assert len(list(lab.lay(source, target))) == 1
    assert sources(mine) == ["my answer"]
    assert sources(beside) == ["mine too"]
    assert sources(target / "01_x.newer-2.ipynb") == ["3"]


def test_a_file_of_the_learners_own_with_a_lessons_name_stays(folders):
    source, target = folders
    target.mkdir()
    (target / "01_x.ipynb").write_text("not even a notebook")
    put_lesson(source, "1")
    assert len(list(lab.lay(source, target))) == 1
    assert (target / "01_x.ipynb").read_text() == "not even a notebook"


def test_a_deleted_lesson_comes_back(folders):
    source, target = folders
    put_lesson(source, "1")
    list(lab.lay(source, target))
    (target / "01_x.ipynb").unlink()
    list(lab.lay(source, target))
    assert sources(target / "01_x.ipynb") == ["1"]


def test_jupyterlab_listens_on_localhost_alone_with_its_token():
    command = lab.command(["--no-browser", "--port=8899"])
    assert "--ServerApp.ip=localhost" in command
    assert f"--ServerApp.root_dir={lab.REPOSITORY}" in command
    assert not any("token" in word.lower() or "password" in word.lower() for word in command)
    assert command[-2:] == ["--no-browser", "--port=8899"]  # what the caller says comes last


def test_a_broken_record_loses_nothing_of_the_learners(folders):
    source, target = folders
    put_lesson(source, "1")
    list(lab.lay(source, target))
    (target / lab.LAID).write_text("{broken")
    kept = (target / "01_x.ipynb").read_bytes()
    put_lesson(source, "2")
    list(lab.lay(source, target))
    assert (target / "01_x.ipynb").read_bytes() == kept
