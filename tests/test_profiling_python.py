"""Python's profilers behind one face: what each counts, what it cannot see, how it ends."""

import collections
import html
import json
import math
import multiprocessing
import pstats
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlhelpers.profiling import code_report, overheads, sampling
from dlhelpers.profiling.code_report import Unseen, place_of, unseen
from dlhelpers.profiling.line_profile import profile_lines
from dlhelpers.profiling.overheads import overhead
from dlhelpers.profiling.program_lines import ProgramLines, program_lines
from dlhelpers.profiling.python_profile import profile_python
from dlhelpers.profiling.sampling import Look, attribute, sample, sample_threads

sys.path.insert(0, str(Path(__file__).parent / "browser"))
import lab_session


def leaf(n):
    total = 0
    for i in range(n):
        total += i
    return total


def tree():
    for _ in range(3):
        leaf(10)
    return max(leaf(5), 1)


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        leaf(1000)


def fails():
    raise KeyError("mine")


RUNS = {
    "cProfile": profile_python,
    "lines": profile_lines,
    "sample": sample,
    "threads": sample_threads,
}
every_profiler = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


# ---- the common face ----


@every_profiler
def test_an_error_is_passed_on_and_the_profiler_is_off_afterwards(run):
    for _ in range(2):  # a second time: nothing is left of the first
        with pytest.raises(KeyError, match="mine"):
            run(fails)
    assert sys.getprofile() is None
    assert run(lambda: burn(0.15)).rows


@every_profiler
def test_what_cannot_be_called_is_refused(run):
    with pytest.raises(TypeError, match="fn must be a function without arguments, got int"):
        run(3)


@every_profiler
def test_a_report_prints_its_table_and_what_it_sees(run):
    report = run(lambda: burn(0.15))
    text, page = str(report), report._repr_html_()
    assert report.profiler in text
    assert html.escape(report.sees) in page
    assert "own ms" in text
    owns = [row.own_s for row in report.table(50)]
    assert owns == sorted(owns, reverse=True)
    totals = [row.total_s for row in report.table(50, by="total")]
    assert totals == sorted(totals, reverse=True)
    assert len(report.table(1)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "calls"}, "by must be 'own' or 'total', got 'calls'"),
        ({"top": 0}, "top must be a whole number, 1 or more, got 0"),
    ],
)
def test_a_table_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        profile_python(tree).table(**arguments)


def test_places_are_short():
    assert place_of("/a/b/site-packages/torch/x.py", 3) == "torch/x.py:3"
    assert place_of("/home/me/course/train.py", 12) == "course/train.py:12"
    assert place_of("<frozen importlib>", 5) == ""
    assert place_of("", 5) == ""
    assert place_of("/tmp/ipykernel_77/123.py", 2) == "cell:2"


def test_a_place_in_a_notebook_is_its_cell():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    try:
        shell.run_cell("def in_a_cell():\n    return 1", store_history=True)
        name = shell.user_ns["in_a_cell"].__code__.co_filename
        assert re.fullmatch(r"In\[\d+\]:2", place_of(name, 2))
    finally:
        InteractiveShell.clear_instance()


# ---- what is not seen ----


def test_time_of_other_threads_is_noted():
    with unseen() as found:
        thread = threading.Thread(target=burn, args=(0.1,))
        thread.start()
        thread.join()
    assert found.threads_s >= 0.09
    assert "other threads" in str(found)


@pytest.mark.skipif(sys.platform != "linux", reason="processes that live are counted on Linux")
def test_time_of_worker_processes_is_noted_alive_or_ended():
    context = multiprocessing.get_context("fork")
    gate = context.Event()

    def alive():
        burn(0.1)
        gate.wait()

    with unseen() as found:
        child = context.Process(target=burn, args=(0.1,))
        child.start()
        child.join()
    assert found.processes_s >= 0.07
    living = context.Process(target=alive)
    with unseen() as found:
        living.start()
        while code_report._used_by(living.pid) < 0.07:  # the kernel counts in hundredths
            time.sleep(0.01)
    gate.set()
    living.join()
    assert found.processes_s >= 0.07
    assert "worker processes" in str(found)


def test_what_is_next_to_nothing_is_not_mentioned():
    assert str(Unseen(0.001, 0.001, 0.05)) == ""
    assert str(Unseen(0.5, 0.0, 100.0)) == ""
    assert str(Unseen(2.0, 0.0, 100.0)) == "Not seen: 2 s of processor time in other threads."


# ---- cProfile ----


def test_calls_are_counted_as_they_were_made():
    report = profile_python(tree)
    counts = {row.name: row.calls for row in report.rows}
    assert counts["leaf"] == 4
    assert counts["tree"] == 1
    assert counts["<built-in method builtins.max>"] == 1
    assert report.find("leaf").place.startswith("tests/test_profiling_python.py:")
    assert report.find("no such name") is None


def test_the_file_is_what_pstats_and_snakeviz_read(tmp_path):
    report = profile_python(tree)
    path = report.save(tmp_path / "run.prof")
    assert pstats.Stats(str(path)).stats == report.stats.stats
    assert [p.name for p in tmp_path.iterdir()] == ["run.prof"]
    with pytest.raises(ValueError, match=r"must end in \.prof"):
        report.save(tmp_path / "run.txt")
    with pytest.raises(FileNotFoundError, match="no folder"):
        report.save(tmp_path / "none" / "run.prof")


@pytest.mark.parametrize("outer", [profile_python, sample])
def test_a_sampler_inside_another_profiler_is_refused(outer):
    pytest.importorskip("pyinstrument", reason="extra profiling")
    with pytest.raises(RuntimeError, match="at work: stop it before sample"):
        outer(lambda: sample(tree))
    assert sample(lambda: burn(0.15)).rows


def test_functions_of_one_name_in_files_of_one_name_stay_apart(tmp_path):
    pytest.importorskip("pyinstrument", reason="extra profiling")
    spaces = []
    for folder in "ab":
        code = compile("def work(burn): burn(0.05)", str(tmp_path / folder / "p" / "u.py"), "exec")
        spaces.append({})
        exec(code, spaces[-1])
    report = sample(lambda: [space["work"](burn) for space in spaces])
    assert len([row for row in report.rows if row.name == "work"]) == 2


def test_a_second_profiler_is_told_what_to_do():
    report = []

    def inner():
        with pytest.raises(RuntimeError, match="another profiler of Python is at work"):
            profile_python(tree)
        report.append(1)

    profile_python(inner)
    assert report == [1]


# ---- the interactive view ----


def test_the_page_needs_nothing_from_outside():
    page = profile_python(tree).flame().page
    assert 'src="/static' not in page
    assert 'href="/static' not in page
    assert "importScripts(" not in page
    assert "url(" not in re.search(r"<style>.*?</style>", page, re.S)[0]
    links = re.findall(r"(?:src|href)=[\"'](http[^\"']*)", page)
    assert all("snakeviz" in link for link in links)  # its own documentation, where one clicks


def test_no_name_of_a_function_breaks_out_of_the_script():
    namespace = {}
    code = compile("def evil():\n    return len([])\nevil()", "</script><b>", "exec")
    page = profile_python(lambda: exec(code, namespace)).flame().page
    assert "</script><b>" not in page
    data = re.search(r"var profile_data = (.*?);\n", page)[1]
    assert any("</script><b>" in name for name in json.loads(data))


def test_a_height_that_is_no_height_is_refused():
    with pytest.raises(ValueError, match="height must be a whole number, 100 or more, got 5"):
        profile_python(tree).flame(height=5)


def test_the_view_is_a_frame_that_may_run_scripts_and_nothing_else(tmp_path):
    flame = profile_python(tree).flame(height=321)
    assert 'sandbox="allow-scripts"' in flame._repr_html_()
    assert "height:321px" in flame._repr_html_()
    assert re.fullmatch(r"an interactive view of \d+ functions; a click zooms in", repr(flame))
    assert flame.save(tmp_path / "view.html").read_text("utf-8") == flame.page


@pytest.mark.browser
@pytest.mark.skipif(lab_session.chromium() is None, reason="no Chromium: `make chromium`")
def test_the_icicle_is_drawn_and_a_click_zooms(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright (extra dev)")

    def outer():
        middle()

    def middle():
        for _ in range(50):
            leaf(2000)

    file = tmp_path / "page.html"
    file.write_text(f"<body>{profile_python(outer).flame()._repr_html_()}</body>", "utf-8")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=lab_session.chromium(),
            args=["--no-sandbox", "--disable-dev-shm-usage"],
        )
        page = browser.new_page()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        frame = page.frame_locator("iframe")
        boxes = frame.locator("#chart rect")
        boxes.nth(1).wait_for(timeout=30_000)
        before = boxes.count()
        assert before >= 3
        boxes.nth(1).dispatch_event("click")  # middle, nearly as wide as outer
        frame.locator("#resetbutton-zoom:enabled").wait_for(timeout=30_000)
        assert all(not url.startswith("http") for url in asked)
        browser.close()


# ---- line_profiler ----


def test_lines_are_counted_as_they_ran():
    pytest.importorskip("line_profiler", reason="extra profiling")
    report = profile_lines(tree)
    hits = {row.name: row.calls for row in report.rows}
    assert hits["total += i"] == 3 * 10 + 5
    assert hits["leaf(10)"] == 3
    assert hits["return total"] == 4
    assert "leaf" in report.sees  # tree names it, so it is timed as well
    alone = profile_lines(tree, leaf)
    assert "leaf(10)" not in {row.name for row in alone.rows}


def test_only_python_has_lines(tmp_path):
    pytest.importorskip("line_profiler", reason="extra profiling")
    with pytest.raises(TypeError, match="not written in Python"):
        profile_lines(tree, math.sqrt)
    path = profile_lines(tree).save(tmp_path / "run.lprof")
    assert path.stat().st_size > 0


# ---- samplers ----

lines = st.tuples(st.sampled_from("ab"), st.integers(1, 3), st.just("f"))
stacks = st.lists(lines, max_size=4)
threads = st.dictionaries(st.sampled_from(["", "other"]), stacks)
looks = st.lists(st.builds(Look, st.integers(1, 50), threads), max_size=6)


@settings(deadline=None)
@given(looks)
def test_the_time_of_each_look_is_given_to_the_lines_of_each_thread_once(taken):
    rows = {(row.name, row.place): row for row in attribute(taken)}
    own, total = collections.Counter(), collections.Counter()
    for seconds, seen in taken:
        for thread, stack in seen.items():
            name = "f" if not thread else f"f [{thread}]"
            keys = [(name, place_of(file, line)) for file, line, _ in stack]
            own.update(keys[-1:] * seconds)
            total.update([*set(keys)] * seconds)
    assert set(rows) == set(total)
    for key, row in rows.items():
        assert row.own_s == own[key]
        assert row.total_s == total[key]


@pytest.fixture
def wait_for_looks(monkeypatch):
    """Return a function that spins until ``sample_threads`` has looked so many times more."""
    taken = []
    names = sampling._names
    monkeypatch.setattr(sampling, "_names", lambda *given: (taken.append(1), names(*given))[1])

    def wait(looks):
        enough = len(taken) + looks + 1  # the last of them may not have seen the stacks yet
        for _ in range(10**9):  # a minute at most, should the sampler have died
            if len(taken) >= enough:
                return
        pytest.fail(f"{len(taken)} looks, expected were {enough}")

    return wait


def test_c_that_holds_the_gil_counts_for_all_of_its_time(wait_for_looks):
    """No look comes through while it runs; the one after it stands for the whole of it."""
    took = []

    def in_c():
        begin = time.perf_counter()
        sum(range(3_000_000))
        took.append(time.perf_counter() - begin)
        wait_for_looks(1)

    report = sample_threads(lambda: (wait_for_looks(3), in_c()))
    assert sum(row.total_s for row in report.rows if row.name == "in_c") > 0.9 * took[0]


def test_a_thread_that_waits_is_left_out():
    waiting = [("prog.py", 1, "main"), (queue.__file__, 180, "get")]
    assert attribute([Look(1.0, {"": waiting})]) == ()
    own = [("prog.py", 1, "main"), ("/home/me/queue.py", 180, "get")]  # no file of Python's own
    assert len(attribute([Look(1.0, {"": own})])) == 2
    package = str(Path(queue.__file__).parent / "site-packages" / "mine" / "queue.py")
    assert len(attribute([Look(1.0, {"": [own[0], (package, 1, "get")]})])) == 2


def test_threads_of_one_name_are_told_apart():
    gate = threading.Barrier(3)
    first, second = (threading.Thread(target=gate.wait, name="w") for _ in range(2))
    known = {}
    assert sampling._names([first], known) == {}  # listed, but it has not begun
    first.start()
    second.start()
    assert sampling._names([first, second], known) == {first.ident: "w", second.ident: "w (2)"}
    assert sampling._names([second], known) == {second.ident: "w (2)"}  # when the first has ended
    gate.wait()


def test_time_of_several_threads_is_put_on_the_right_lines(wait_for_looks):
    """Each thread burns at a line of its own; that line is the one where it is seen most."""

    def burn_here():
        while going:
            pass

    def program():
        thread = threading.Thread(target=burn_here, name="second")
        thread.start()
        wait_for_looks(40)
        going.clear()
        thread.join()

    going = [True]

    report = sample_threads(program)
    mine = {"own": collections.Counter(), "second": collections.Counter()}
    for row in report.rows:
        if row.name.endswith("]") and not row.name.endswith("[second]"):
            continue  # a thread that an earlier test has left
        thread = "second" if row.name.endswith("[second]") else "own"
        mine[thread][row.name.removesuffix(" [second]")] += row.own_s
    assert mine["own"].most_common(1)[0][0] == "wait"
    assert mine["second"].most_common(1)[0][0] == "burn_here"
    assert report.samples > 0
    assert sys.getswitchinterval() == pytest.approx(0.005)


VAE = ("/home/me/pytorch/optim/train.py", 3, "step")  # in a folder that is not torch
VAE_MODULE = ("/x/site-packages/torch/nn/modules/module.py", 1, "_call_impl")
VAE_DECODE = ("/home/me/vae.py", 9, "decode")  # no picture


def test_a_folder_that_is_named_like_torchs_is_the_programs_own():
    assert program_lines([Look(1.0, {"": [VAE]})]).outside == "optim/train.py:3"


def test_the_hot_line_is_the_programs_own_and_not_the_loaders():
    assert not program_lines([Look(1.0, {"": [VAE, VAE_MODULE, VAE_DECODE]})]).decoding_share
    own, lib = ("/me/train.py", 7, "step"), ("/x/site-packages/PIL/ImageFile.py", 1, "load")
    other = ("/me/train.py", 9, "step")
    loader = ("/x/site-packages/torch/utils/data/dataloader.py", 2, "__next__")
    model = ("/x/site-packages/torch/nn/modules/module.py", 3, "_call_impl")
    stacks = [own, lib], [own], [other], [other, loader, own], [other, model, lib]
    found = program_lines([Look(1 + 3 * (len(s) == 3), {"": s}) for s in stacks])
    assert found == ProgramLines(
        hottest="me/train.py:9",
        outside="me/train.py:7",
        outside_share=2 / 11,
        decoding_share=1 / 11,
        outside_line=own,
        decoding="me/train.py:7",
    )
    assert program_lines([Look(2.0, {"": [lib]})]) == ProgramLines(decoding_share=1.0)
    assert program_lines([]) == ProgramLines()


@pytest.mark.parametrize("run", [sample, sample_threads])
def test_an_interval_that_is_none_is_refused(run):
    for interval in (0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"interval_s must be above 0 .*got {interval}"):
            run(tree, interval_s=interval)


def test_a_sampler_finds_the_function_that_burns_and_saves_its_page(tmp_path):
    pytest.importorskip("pyinstrument", reason="extra profiling")

    def program():
        for _ in range(40):
            leaf(100_000)

    report = sample(program)
    assert report.table(1)[0].name == "leaf"
    assert all(row.calls is None for row in report.rows)
    assert "program" in report.save(tmp_path / "run.txt").read_text("utf-8")
    assert report.save(tmp_path / "run.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(ValueError, match="keeps a table alone"):
        sample_threads(tree).save(tmp_path / "run.html")


# ---- what is not installed, and what looking costs ----


@pytest.mark.parametrize(
    ("run", "package"), [(profile_lines, "line_profiler"), (sample, "pyinstrument")]
)
def test_a_package_that_is_not_there_says_what_to_install(monkeypatch, run, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=re.escape('pip install "dlhelpers[profiling]"')):
        run(tree)


def test_the_cost_compares_a_run_under_the_profiler_with_one_without(monkeypatch):
    seen = []

    def compare(under, plain, *, budget_s):
        calls.clear()
        under()
        with_it = len(calls)
        calls.clear()
        plain()
        assert with_it == len(calls)  # the same work on both sides
        seen.append(budget_s)
        return "a comparison"

    calls = []
    monkeypatch.setattr(overheads, "compare", compare)
    monkeypatch.setattr(overheads, "perf_counter", iter([0.0, 0.01] * 9).__next__)
    report = overhead(lambda: calls.append(1), budget_s=3.0, run_s=0.05)
    assert len(calls) == 5
    assert seen == [3.0] * len(report)
    assert dict(report) == dict.fromkeys(report, "a comparison")
    assert {"cProfile", "torch.profiler"} <= set(report)
    assert sys.getprofile() is None


def test_a_slow_first_run_is_not_what_a_profiler_is_compared_with(monkeypatch):
    now, calls = [0.0], []

    def step():
        calls.append(1)
        now[0] += 3.0 if len(calls) == 1 else 0.1

    monkeypatch.setattr(overheads, "perf_counter", lambda: now[0])
    monkeypatch.setattr(overheads, "compare", lambda *_, **__: "a comparison")
    report = overhead(step, profilers=["cProfile"], budget_s=1.0)
    assert dict(report) == {"cProfile": "a comparison"}


def test_a_run_that_spends_the_budget_is_made_once_under_each_profiler(monkeypatch):
    now, calls = [0.0], []

    def slow():
        calls.append(1)
        now[0] += 20.0 if len(calls) == 1 else 30.0

    monkeypatch.setattr(overheads, "perf_counter", lambda: now[0])
    report = overhead(slow, profilers=["cProfile", "sample_threads"], budget_s=2.0)
    assert len(calls) == 3  # alone, and under each
    for row in report.values():
        assert (row.speedup, row.pairs, row.outcome) == (1.5, 1, "undecided")
    assert "[0.00, inf]" in str(report)
    assert "give budget_s=" in str(report)


def test_line_profiler_watches_the_same_functions_when_a_run_is_repeated():
    pytest.importorskip("line_profiler", reason="extra profiling")
    repeated = overheads._repeated(tree, 3)
    report = overheads.PROFILERS["line_profiler"](repeated)()
    assert {row.name: row.calls for row in report.rows}["total += i"] == 3 * 35
    builtin = overhead(time.time, profilers=["line_profiler"])
    assert "not written in Python" in builtin.missing["line_profiler"]


def test_a_missing_profiler_is_a_row_and_an_unknown_one_an_error(monkeypatch):
    def absent(fn):
        raise ImportError

    monkeypatch.setitem(overheads.PROFILERS, "pyinstrument", absent)
    report = overhead(tree, profilers=["pyinstrument"])
    assert not report
    assert "pip install" in str(report)
    with pytest.raises(ValueError, match="no profiler 'perf'"):
        overhead(tree, profilers=["perf"])


def test_without_samples_there_are_no_rows():
    assert sampling.attribute([]) == ()


# ---- functions and folders that do not fit ----


def lazy():
    yield 1


def test_a_function_that_only_begins_its_work_is_refused():
    for run in (profile_python, profile_lines, sample, sample_threads, overhead):
        with pytest.raises(TypeError, match=r"write lambda: list\(fn\(\)\)"):
            run(lazy)


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    def refuse(self, target):
        raise PermissionError(13, "Permission denied")

    report = profile_python(tree)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError, match=r"cannot write 'a.prof' into .*own"):
        report.save(tmp_path / "a.prof")
    assert list(tmp_path.iterdir()) == []


def test_lines_of_recursion_are_said_to_count_for_each_level():
    pytest.importorskip("line_profiler", reason="extra profiling")

    def down(levels):
        if levels:
            down(levels - 1)
        return sum(range(20_000))

    report = profile_lines(lambda: down(12), down)
    assert "counts once for each level" in report.sees
    assert "each level" not in profile_lines(lambda: down(0), down).sees


def test_a_name_without_a_value_is_no_function_to_time():
    pytest.importorskip("line_profiler", reason="extra profiling")

    def outer():
        def inner():
            return unset if hits else 1

        hits = 0
        report = profile_lines(inner)
        unset = 1
        return report

    assert outer().rows


def test_a_child_that_began_before_counts_with_what_it_uses_meanwhile():
    if sys.platform != "linux":
        pytest.skip("processes are counted from /proc")
    code = "import time\nfor _ in iter(input, 'end'):\n    end = time.process_time() + float(_)\n"
    code += "    while time.process_time() < end: pass\n    print('done', flush=True)"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def burn_there(seconds):
        child.stdin.write(f"{seconds}\n")
        child.stdin.flush()
        child.stdout.readline()

    with child:
        burn_there(1.0)  # before anybody looks
        with unseen() as found:
            burn_there(0.3)
        with unseen() as nothing:
            child.stdin.write("end\n")
            child.stdin.close()
            child.wait()
    assert found.processes_s == pytest.approx(0.3, abs=0.1)
    assert nothing.processes_s < 0.2  # it ended meanwhile, and used its time before
