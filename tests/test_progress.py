"""A bar goes when the work is done; what stays in a notebook's file is a line of text."""

import nbformat
import pytest
from nbclient import NotebookClient

from dlhelpers import progress
from dlhelpers.course.report.running import kernel_of_this_python
from dlhelpers.progress import bar


@pytest.fixture(scope="module")
def outputs():
    cells = [
        "from time import sleep\nfrom dlhelpers.progress import bar",
        "for _ in bar(range(3), progress=True, desc='photos'):\n    pass\nprint('done')",
        "for _ in bar(range(3), progress=True, delay=0.1, leave=False):\n    sleep(0.1)",
        "for _ in bar(range(3), progress=None):\n    pass",
        "for _ in bar(range(3), progress=False):\n    pass",
        "with bar(total=2, progress=True, unit='backend') as shown:\n"
        "    shown.update()\n    raise ValueError",
        "with bar(total=1, progress=True, desc='racing two', bar_format='{desc}'):\n    pass",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    client = NotebookClient(
        notebook, allow_errors=True, kernel_manager_class=kernel_of_this_python()
    )
    client.execute()
    return [cell.outputs for cell in notebook.cells]


@pytest.mark.parametrize(
    ("number", "line"),
    [(1, "photos: 3"), (2, "done: 3"), (5, "backend: 2"), (6, "racing two")],
)
def test_a_bar_that_has_gone_leaves_a_line_of_text(outputs, number, line):
    shown = outputs[number][0]
    assert shown.output_type == "display_data"
    assert dict(shown.data) == {"text/plain": line}


def test_the_line_is_the_same_at_the_beginning_and_the_end():
    """nbval sees the first text alone."""
    kind = progress._fleeting()
    shown = kind.__new__(kind)
    shown.desc, shown.unit, shown.total, shown.n = "photos: ", "it", 7, 0
    first = shown._line()
    shown.n = 7
    assert shown._line() == first == "photos: 7"


def test_what_comes_after_a_bar_stands_after_it(outputs):
    assert [output.output_type for output in outputs[1]] == ["display_data", "stream"]
    assert outputs[5][-1].ename == "ValueError"


@pytest.mark.parametrize("number", [3, 4])
def test_a_notebook_shows_no_bar_that_was_not_asked_for(outputs, number):
    assert outputs[number] == []


def test_a_program_has_a_bar_on_stderr(capfd):
    assert list(bar(range(3), progress=True)) == [0, 1, 2]
    assert "3/3" in capfd.readouterr().err
    assert list(bar(range(3), progress=False)) == [0, 1, 2]
    assert capfd.readouterr().err == ""
