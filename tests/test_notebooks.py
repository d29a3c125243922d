"""What every notebook of the course must be, read from the files as they are committed."""

import ast
import html
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from dlhelpers.course import claims, exercises
from dlhelpers.course.report.running import kernel_of_this_python

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MORE = [path for path in NOTEBOOKS if path.stem.endswith("b_more")]  # smaller tips of a lesson
LESSONS = [path for path in NOTEBOOKS if path not in MORE and not path.stem.startswith("00")]
SECTIONS = [
    "The tips",
    "Set-up",
    "Mechanism",
    "Main claims",
    "More tips",
    "The trap",
    "Try it",
    "Exercises",
    "Take away",
]
IGNORED = {"nbval-ignore-output", "nbval-skip"}
UNIT = (
    r"(?:ms|µs|us|ns|s|seconds?|min|hours?|MiB|MB|GB|GiB|KB|KiB|bytes?|GFLOPS?|img/s|images/s|%"
    r"|percent|per cent|times|x|×|points)"
)

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
every_more = pytest.mark.parametrize("path", MORE, ids=lambda p: p.stem)


def cells(path, kind="code"):
    every = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c for c in every if c["cell_type"] == kind and "".join(c["source"]).strip()]


def source(cell):
    return "".join(cell["source"])


def tags(cell):
    return set(cell["metadata"].get("tags", []))


def is_picture_or_widget(output):
    data = output.get("data", {})
    shown = "".join(data.get("text/html", ""))
    return "image/png" in data or "<img" in shown or any("widget" in key for key in data)


def prints(cell):
    return any(not is_picture_or_widget(output) for output in cell["outputs"])


def calls(path, function):
    """First arguments of all calls of `function` (its last name), as written in the cells."""
    found = []
    for cell in cells(path):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name == function and node.args and isinstance(node.args[0], ast.Constant):
                    found.append(node.args[0].value)
    return found


def test_the_course_opens_with_start_here():
    assert [path.stem for path in NOTEBOOKS][:2] == ["00_start_here", "01_pairing"]


@every_notebook
def test_was_run_from_top_to_bottom(path):
    counts = [cell["execution_count"] for cell in cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_left_no_stderr_and_no_unplanned_error(path):
    for cell in cells(path):
        kinds = {output.get("name", output["output_type"]) for output in cell["outputs"]}
        assert "stderr" not in kinds, source(cell)
        assert ("error" in kinds) <= ("raises-exception" in tags(cell)), source(cell)


@every_notebook
def test_cells_are_short(path):
    assert max(len(cell["source"]) for cell in cells(path)) <= 15


@every_notebook
def test_has_forty_code_cells_at_most(path):
    assert len(cells(path)) <= 40


def test_all_lessons_to_date_have_420_code_cells_at_most():
    assert sum(len(cells(path)) for path in NOTEBOOKS if path.stem < "09") <= 420


def words(text):
    """The number of words that are seen: those of folded parts and of alt texts are not."""
    text = re.sub(r"<details.*?</details>|<!--.*?-->|<[^>]+>", " ", text, flags=re.DOTALL)
    return len(re.findall(r"[^\W\d_]{2,}(?:['’-]\w+)*", html.unescape(text)))


@every_lesson
def test_two_thousand_words_at_most_lead_to_the_exercises(path):
    """Those on cards included; the list of tips, which others have written, is not."""
    seen = 0
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text, _, exercises_ = source(cell).partition("## Exercises")
        if cell["cell_type"] == "markdown":
            seen += words(re.sub(r"<!-- tips -->.*<!-- end -->", "", text, flags=re.DOTALL))
        for output in cell.get("outputs", []):
            shown = "".join(output.get("data", {}).get("text/html", ""))
            if "Claim <code>" in shown or (".judge(" in text and "border-left" in shown):
                seen += words(shown)
        if exercises_:
            break
    assert 800 < seen <= 2000


@every_notebook
def test_is_small_enough_to_load(path):
    assert path.stat().st_size < 500_000


@every_lesson
def test_has_every_section_in_order(path):
    text = "\n".join(source(cell) for cell in cells(path, "markdown"))
    headings = [re.sub(r":.*", "", h).strip() for h in re.findall(r"^## (.+)$", text, re.M)]
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS


@every_more
def test_more_tips_are_linked_from_their_lesson_and_back(path):
    (lesson,) = [other for other in LESSONS if other.stem[:2] == path.stem[:2]]
    text = "\n".join(source(cell) for cell in cells(path, "markdown"))
    headings = re.findall(r"^## (.+)$", text, re.M)
    assert [h for h in headings if h in SECTIONS] == ["Set-up", "More tips", "Take away"]
    assert f"Previous: [{lesson.stem[:2]} " in text
    assert f"]({lesson.name})" in text
    linking = [c for c in cells(lesson, "markdown") if source(c).startswith("## More tips")]
    assert len(linking) == 1
    assert f"]({path.name})" in source(linking[0])


@every_notebook
def test_opens_with_what_the_reader_will_be_able_to_do(path):
    first = source(cells(path, "markdown")[0])
    names = re.findall(r"^\*\*(.+?)\*\*", first, re.M)
    assert names == ["You will be able to", "Minutes:", "You need"]
    total, *parts = map(int, re.findall(r"\d+", re.search(r"\*\*Minutes:\*\*(.+)", first)[1]))
    assert total == sum(parts) or not parts
    text = "\n".join(source(cell) for cell in cells(path, "markdown"))
    short = sum(map(int, re.findall(r"\*\*\d · [^*]+\*\* \((\d+) min", text)))
    real = sum(map(int, re.findall(r"\*\*Real exercise\*\* \((\d+) min", text)))
    assert not short or [short, real] == parts[-2:]
    assert total == next(lesson.minutes for lesson in claims.lessons() if lesson.stem == path.stem)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p not in MORE], ids=lambda p: p.stem)
def test_ends_with_three_readings(path):
    last = source(cells(path, "markdown")[-1])
    assert last.startswith("## Read on")
    assert len(re.findall(r"^- \[.+\]\(https://\S+\): .{20,}\.$", last, re.M)) == 3


@every_lesson
def test_links_back_to_the_previous_and_to_the_next(path):
    text = "\n".join(source(cell) for cell in cells(path, "markdown"))
    place = LESSONS.index(path)
    around = [NOTEBOOKS[0], *LESSONS[max(0, place - 1) : place], *LESSONS[place + 1 : place + 2]]
    for other in around:
        assert f"]({other.name})" in text, other.name


@every_notebook
def test_at_least_half_of_what_is_printed_is_compared(path):
    says = [cell for cell in cells(path) if prints(cell)]
    strict = [cell for cell in says if not tags(cell) & IGNORED]
    assert 2 * len(strict) >= len(says)


@every_notebook
def test_what_is_compared_names_no_machine(path):
    """A card of what was not measured holds the machine's line, which the sanitizer replaces."""
    text = (ROOT / "tests" / "nbval_sanitize.cfg").read_text(encoding="utf-8")
    rules = re.findall(r"^regex: (.+)$", text, re.M)
    for cell in cells(path):
        for output in cell["outputs"] if not tags(cell) & IGNORED else []:
            for shown in [*output.get("data", {}).values(), output.get("text", "")]:
                shown = "".join(shown) if isinstance(shown, list | str) else ""
                for rule in rules:
                    shown = re.sub(rule, "", shown)
                assert " cores · " not in shown, source(cell)


@every_notebook
def test_a_cell_that_is_not_compared_says_why(path):
    for cell in cells(path):
        if tags(cell) & IGNORED:
            assert cell["metadata"].get("why_ignored", "").strip(), source(cell)


@every_notebook
def test_timed_cells_are_not_compared(path):
    timed = re.compile(r"\bcompare\(|\bcompare_many\(|roofline\(|perf_counter")
    for cell in cells(path):
        if timed.search(source(cell)) and prints(cell):
            assert tags(cell) & IGNORED, source(cell)


@every_notebook
def test_no_measured_number_stands_in_the_text(path):
    for cell in cells(path, "markdown"):
        for paragraph in source(cell).split("\n\n"):
            number = re.search(rf"(?<![\w.$-])\d+(?:[.,]\d+)?\s?{UNIT}(?![\w$])", paragraph)
            has_source = re.search(r"arXiv|doi|https?://|\[.+\]\(.+\)|Minutes:\*\*", paragraph)
            assert not number or has_source, number


@every_notebook
def test_pictures_carry_alt_text(path):
    for cell in cells(path):
        for output in cell["outputs"]:
            data = output.get("data", {})
            assert "image/png" not in data, source(cell)
            for image in re.findall(r"<img[^>]*>", "".join(data.get("text/html", ""))):
                assert re.search(r'alt="[^"]{20,}"', image), source(cell)


@every_notebook
def test_set_up_installs_and_hides_nothing(path):
    for cell in cells(path):
        for forbidden in ("pip install", "sys.path", "filterwarnings", "%%capture", "time.time()"):
            assert forbidden not in source(cell)


@every_notebook
def test_relative_links_lead_somewhere(path):
    for cell in cells(path, "markdown"):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", source(cell)):
            if not re.match(r"https?://|attachment:", link):
                assert (path.parent / link).exists(), link


@every_lesson
def test_has_four_exercises_that_are_not_solved(path):
    checked = calls(path, "check")
    assert len([id for id in checked if isinstance(id, str) and id[:2] == path.stem[:2]]) >= 4
    assert "solution" not in {n for c in cells(path) for n in re.findall(r"\b(\w+)\(", source(c))}


@every_lesson
def test_checks_every_exercise_that_the_package_holds(path):
    checked = [id for id in calls(path, "check") if isinstance(id, str)]
    assert set(exercises.ids(path.stem)) == set(checked)


@every_notebook
def test_every_card_is_judged(path):
    judged = sum(source(cell).count(".judge(") for cell in cells(path))
    assert judged == len(calls(path, "card"))


@pytest.mark.slow
@every_notebook
def test_passes_twice_in_one_kernel(path, tmp_path, monkeypatch):
    monkeypatch.setenv("DLHELPERS_LEDGER", str(tmp_path / "ledger.json"))
    twice = nbformat.read(path, as_version=4)
    twice.cells += nbformat.read(path, as_version=4).cells
    for number, cell in enumerate(twice.cells):
        cell.id = f"cell-{number}"
    client = NotebookClient(
        twice,
        timeout=120,
        kernel_manager_class=kernel_of_this_python(),
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()  # raises at the first cell that fails
