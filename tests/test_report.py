"""The report: one page of its own, every tip and claim on it, and notebooks that may fail."""

import asyncio
import dataclasses
import json
import re
import sys
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from queue import Empty
from xml.etree import ElementTree

import nbformat
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dlhelpers.course import claims, ledger, report
from dlhelpers.course.claims.advice import advice
from dlhelpers.course.claims.claim import Claim, Condition, Tip
from dlhelpers.course.claims.conditions import Judged, Tally
from dlhelpers.course.claims.course import agreement_text
from dlhelpers.course.report import command
from dlhelpers.course.report import machines as machines_page
from dlhelpers.course.report.cells import Cell, cells_of_claims
from dlhelpers.course.report.headlines import timed_headline
from dlhelpers.course.report.picture import picture_svg
from dlhelpers.course.report.running import kernel_of_this_python
from dlhelpers.course.report.squares import lines_of
from dlhelpers.course.verdicts import Threshold

BAR = Threshold(">=", 1.05)


def a_claim(id="fusion.speeds-up", says="Fusing is faster.", kind="time", **changes):
    conditions = (
        Condition("batch 1", "wins", "fewer launches", BAR, date(2026, 1, 2)),
        Condition("batch 64", "cannot", "same arithmetic", BAR, date(2026, 1, 2)),
    )
    facts = {
        "id": id,
        "tip": "infer-fuse",
        "says": says,
        "source": "a paper, table 1",
        "kind": kind,
        "metric": "latency",
        "threshold": BAR,
        "unit": "",
        "notebook": "06_fusion",
        "conditions": conditions,
        "control": kind == "time",
        "negligible": 0.03,
        "needs": "",
    }
    return Claim(**facts | changes)


TIPS = (
    Tip("infer-fuse", "Fuse them.", "a README, 2021", notebooks=("06_fusion",)),
    Tip("io-lmdb", "Use LMDB.", "a README, 2021", "Still there.", ("02_lmdb_io",)),
    Tip("design-prune", "Prune.", "a README, 2021"),
)


def a_condition(name, verdict, effect=1.21, low=1.17, high=1.26, theory="wins", **changes):
    judged = Judged(name, verdict, effect, low, high, BAR, "", theory, date(2026, 1, 2))
    return dataclasses.replace(judged, **changes).as_row()


def a_row(id="fusion.speeds-up", first="holds", second="fails", **changes):
    conditions = [
        a_condition("batch 1", first),
        a_condition("batch 64", second, 1.01, 0.99, 1.02, "cannot"),
    ]
    control = {"effect": 1.0, "low": 0.98, "high": 1.02, "outcome": "no difference"}
    now = "2026-01-03T00:00:00+00:00"
    told = {"id": id, "judged": now, "versions": {"torch": "2.13.0"}, "control": control}
    return (
        told | {"conditions": conditions, "predictions": [], "earlier": [], "axis": None} | changes
    )


def predicted(says, condition="batch 1", sure=2, when="2026-01-02T00:00:00+00:00"):
    return {"condition": condition, "says": says, "sure": sure, "when": when}


def a_ledger(*rows, line="2 cores, AVX2"):
    machine = {"line": line, "key": line, "cores": 2, "extras": {"dali": None}}
    return {
        "schema": 2,
        "machine": machine,
        "versions": {"python": "3.12.1", "torch": "2.13.0", "torchvision": None},
        "created": "2026-01-02T03:04:05+00:00",
        "rows": list(rows),
    }


class Page(HTMLParser):
    """Tags, links and visible text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.rows, self.stack = [], [], [], []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        named = dict(attrs)
        self.addresses += [named[k] for k in ("href", "src", "action", "data") if k in named]
        if tag == "tr" and "data-condition" in named:
            self.rows.append(named)
        if tag not in ("meta", "input", "img", "br", "wbr"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack[-1:] not in (["style"], ["script"]):
            self.text += data + " "


def test_the_page_asks_for_nothing_from_outside():
    page = report.render(a_ledger(a_row()), claims=[a_claim()], tips=TIPS)
    assert all(
        re.match(r"#|notebooks/|data:image/svg", address) for address in Page(page).addresses
    )
    assert not re.search(r"https?://|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page


def test_tags_are_balanced_and_ids_unique():
    page = report.render(a_ledger(a_row()), claims=[a_claim(), a_claim("fusion.other")], tips=TIPS)
    assert Page(page).stack == []
    ids = re.findall(r" id='([^']*)'", page)
    assert len(ids) == len(set(ids))


def test_a_row_shows_verdict_evidence_source_and_a_link_to_its_notebook():
    row = a_row(predictions=[predicted("fails"), predicted(2.0, sure=None)])
    page = Page(report.render(a_ledger(row), claims=[a_claim()], tips=TIPS))
    for said in (
        "Holds in 1 of 2, as the mechanism says",
        "Confirmed for batch 1 (1.21x [1.17, 1.26]); refuted for batch 64 (1.01x [0.99, 1.02])",
        "mechanism: must hold",
        "mechanism: cannot hold",
        "judged 2026-01-03",
        "Timed conditions for which the mechanism commits itself: 2 of 2 came out as it says. "
        "A theory or a threshold last changed on 2026-01-02.",
        "no difference",
        "a paper, table 1",
        "Fuse them.",
        "predicted (2026-01-02): batch 1: does not hold (likely)",
        "predicted (2026-01-02): batch 1: 2",
        "0 of 1 prediction right",
        "2 cores, AVX2",
        "torch 2.13.0",
        "torchvision absent",
    ):
        assert said in page.text, said
    assert "notebooks/06_fusion.ipynb" in page.addresses
    cells = {"fusion.speeds-up": Cell("fusion 1", 7)}
    page = Page(report.render(a_ledger(a_row()), claims=[a_claim()], tips=TIPS, cells=cells))
    assert "notebooks/06_fusion.ipynb#cell-id=fusion%201" in page.addresses
    assert "06_fusion, cell [7]" in page.text
    assert page.tags.count("img") == 3, "two conditions and the control"


def test_filters_offer_what_the_rows_carry():
    rows = [a_claim(), a_claim("pairing.floor", kind="exact")]
    page = report.render(a_ledger(a_row()), claims=rows, tips=TIPS)
    found = [(r["data-topic"], r["data-condition"], r["data-kind"]) for r in Page(page).rows]
    assert found == [("fusion", "agrees", "time"), ("pairing", "not-run", "exact")]
    for value in ("fusion", "pairing", "agrees", "not-run", "time", "exact"):
        assert f"<option value='{value}'>" in page


def test_a_filter_finds_every_claim_with_such_a_condition():
    row = a_row(second="unsettled")
    page = report.render(a_ledger(row), claims=[a_claim()], tips=TIPS)
    assert Page(page).rows[0]["data-condition"].split() == ["agrees", "unsettled"]
    assert "<option value='unsettled'>unsettled</option>" in page


def test_a_control_that_rules_out_little_is_named():
    wide = {"effect": 1.0, "low": 0.9, "high": 1.1, "outcome": "undecided"}
    page = Page(report.render(a_ledger(a_row(control=wide)), claims=[a_claim()], tips=TIPS))
    said = " ".join(page.text.split())
    assert "reaches a threshold of their claim: fusion.speeds-up" in said
    assert "undecided, too wide to rule out 1.05x" in page.text
    quiet = Page(report.render(a_ledger(a_row()), claims=[a_claim()], tips=TIPS))
    assert "rule out" not in quiet.text


def test_a_headline_names_no_group_that_is_empty():
    said = timed_headline([a_row(conditions=[interval(1.2, 1.1, 1.3, theory=None)])], [a_claim()])
    assert said.startswith("Of 1 timed condition no prediction by the mechanism was recorded.")
    assert "0 " not in timed_headline([a_row()], [a_claim()])
    assert agreement_text(Tally(fails=2, open=2)) == "2 that the mechanism leaves open"


def test_every_tip_is_listed_with_advice_or_where_it_will_be_treated():
    tips = (dataclasses.replace(TIPS[0], do="Fuse"), *TIPS[1:])
    text = Page(report.render(a_ledger(a_row()), claims=[a_claim()], tips=tips)).text
    told = " ".join(text[text.index("Advice for this machine") :].split())
    assert (
        "Fuse for batch 1 (1.21x); it does nothing for batch 64 (1.01x). fusion.speeds-up" in told
    )
    assert "Use LMDB. Still there. a README, 2021 not treated yet: 02_lmdb_io" in told
    assert "Prune. a README, 2021 not treated yet: a later notebook" in told


def test_a_claim_without_a_row_is_shown_as_not_run():
    page = Page(report.render(a_ledger(), claims=[a_claim()], tips=TIPS))
    assert page.rows[0]["data-condition"] == "not-run"
    assert "Not run" in page.text
    assert "2 conditions: 2 not run." in page.text


def test_what_goes_against_the_mechanism_stands_out():
    row = a_row(first="fails")
    page = Page(report.render(a_ledger(row), claims=[a_claim()], tips=TIPS))
    text = " ".join(page.text.split())
    assert "Against the mechanism: Fusing is faster. batch 1" in text
    assert "Fails in both, AGAINST THE MECHANISM in 1: batch 1" in text
    assert "refuted AGAINST THE MECHANISM" in text
    assert page.rows[0]["data-condition"] == "against agrees"


def test_an_old_row_says_that_its_sizes_were_others():
    now = [
        Condition("batch 1", "wins", "?", Threshold(">=", 1.05), date(2026, 2, 3)),
        Condition("batch 64", "cannot", "?", Threshold(">=", 1.05), date(2026, 1, 2)),
    ]
    claim = a_claim(conditions=tuple(now))
    page = report.render(a_ledger(a_row()), claims=[claim], tips=TIPS)
    assert Page(page).text.count("measured differently since 2026-02-03") == 1


def test_an_old_row_is_judged_by_what_it_was_measured_with():
    old = a_condition("batch 1", "holds", 1.06, 1.055, 1.07, threshold=Threshold(">=", 1.01))
    older = a_condition("batch 64", "holds", theory=None, threshold=None, since=None)
    strict = Threshold(">=", 1.5)
    now = [
        Condition("batch 1", "cannot", "?", strict, date(2026, 2, 3)),
        Condition("batch 64", "cannot", "?", strict, date(2026, 2, 3)),
    ]
    row = a_row(conditions=[old, older], judged=None, versions=None)
    row["earlier"] = [predicted("none", condition="", sure=None, when=None)]
    claim = a_claim(conditions=tuple(now), threshold=strict)
    page = report.render(a_ledger(row), claims=[claim], tips=TIPS)
    text = " ".join(Page(page).text.split())
    assert "theory was 'wins', is 'cannot' since 2026-02-03" in text
    assert "threshold was >= 1.01, is >= 1.5 since 2026-02-03" in text
    assert "threshold &gt;= 1.01" in page, "the dashed line is the old one"
    assert "threshold &gt;= 1.5" not in page
    assert "mechanism unknown" in text
    assert "Of 1 more condition no prediction by the mechanism was recorded" in text
    assert "predicted (on a day unknown): none of them" in text
    assert "day and versions unknown" in text
    assert "no predictions yet; 1 of an earlier release, kept and not scored" in text


def test_the_course_itself_renders_with_an_empty_ledger():
    page = Page(report.render(a_ledger()))
    for claim in claims.all_claims():
        assert claim.id in page.text
    for tip in claims.all_tips():
        assert tip.says in page.text


def test_a_row_of_an_undeclared_claim_is_named():
    page = Page(report.render(a_ledger(a_row("old.claim")), claims=[], tips=[]))
    assert "does not declare" in page.text
    assert "old.claim" in page.text


@pytest.mark.parametrize("kind", ["exact", "time", "memory", "accuracy"])
def test_null_numbers_and_renamed_conditions_render(kind):
    row = a_row(control=None)
    nothing = (None, None, None)
    row["conditions"] = [
        a_condition("gone", "fails", *nothing, threshold=None),
        a_condition("batch 1", "unsettled", 1.3, 0.0, None),
        a_condition("batch 64", "not-measured", *nothing, reason="no CUDA device"),
    ]
    page = Page(report.render(a_ledger(row), claims=[a_claim(kind=kind)], tips=TIPS))
    assert "not finite" in page.text
    assert "not measured: no CUDA device" in page.text


def test_a_control_that_was_not_measured_renders():
    control = {"effect": None, "low": None, "high": None, "outcome": "not measured"}
    page = Page(report.render(a_ledger(a_row(control=control)), claims=[a_claim()], tips=TIPS))
    assert "not measured" in page.text


KNOWN_TAGS = set(
    Page(
        report.compare([a_ledger(a_row())] * 2, claims=[])
        + report.render(
            a_ledger(
                a_row(predictions=[predicted("fails", sure=1)], first="fails"),
                a_row("x.y"),
                a_row("fusion.against"),
            ),
            claims=[
                a_claim(),
                a_claim("fusion.old"),
                a_claim("fusion.exact", kind="exact", needs="cuda"),
            ],
            tips=TIPS,
            failed=[report.NotebookRun("a", 1.0, 1, "b")],
        )
    ).tags
)


@given(st.text(max_size=25))
@example("<script>alert(1)</script>")
@example("' onmouseover='alert(1)")
@example('"><img src=x>&amp;')
@example("</style></script><b>")
def test_arbitrary_text_is_escaped(text):
    row = a_row(text, predictions=[predicted("holds", text, when=text)])
    row["conditions"][0] |= {"name": text, "reason": text}
    row["versions"], row["judged"] = {text: text}, text
    row["control"] |= {"outcome": text}
    tip = Tip(text, text, text, text, (text,))
    claim = a_claim(text, says=text, tip=text, source=text, metric=text, unit=text, notebook=text)
    book = a_ledger(row, a_row(f"{text}.orphan"), line=text)
    book["machine"][text], book["versions"][text], book["created"] = text, text, text
    pages = [
        report.render(
            book, claims=[claim], tips=[tip], failed=[report.NotebookRun(text, 1.0, 1, text)]
        ),
        report.compare([book, a_ledger()], claims=[claim]),
    ]
    for page in map(Page, pages):
        assert set(page.tags) <= KNOWN_TAGS | {"wbr"}
        assert not page.stack
        assert "".join(text.split()) in "".join(page.text.split())


# Machines side by side


def machines(*verdicts):
    books = [a_ledger(a_row(first=v), line=f"machine {n}") for n, v in enumerate(verdicts)]
    return report.compare(books, claims=[a_claim()])


@pytest.mark.parametrize(
    ("verdicts", "turned"),
    [
        (("holds", "fails"), True),
        (("holds", "holds", "fails"), True),
        (("holds", "holds"), False),
        (("holds", "unsettled"), False),
        (("not-measured", "fails"), False),
    ],
)
def test_a_condition_turns_round_where_two_machines_settled_it_differently(verdicts, turned):
    page = machines(*verdicts)
    assert f"{int(turned)} of 2 conditions turn{'s' * turned} round" in page
    assert all(f"machine {n}" in page for n in range(len(verdicts)))


def test_a_claim_that_one_machine_lacks_is_not_run_there():
    text = Page(report.compare([a_ledger(a_row()), a_ledger()], claims=[a_claim()])).text
    assert "not run" in text


def interval(effect, low, high, verdict="holds", **changes):
    return a_condition("batch 1", verdict, effect, low, high, **changes)


def of_machines(*conditions, kind="time"):
    books = [a_ledger(a_row(conditions=[c])) for c in conditions]
    return next(iter(lines_of(books, [a_claim(kind=kind)])))


@pytest.mark.parametrize(
    ("others", "gap"),
    [
        ([(2.0, 1.9, 2.1), (1.0, 0.9, 1.0)], (1, 0, 1.9)),
        ([(2.0, 1.9, 2.1), (1.0, 0.9, 1.0), (0.5, 0.4, 0.5)], (2, 0, 3.8)),
        ([(1.2, 1.1, 1.3), (1.3, 1.3, 1.4)], None),
        ([(1.2, 1.1, None), (9.0, 8.0, 9.0)], None),
    ],
)
def test_machines_differ_where_their_intervals_do_not_meet(others, gap):
    found = of_machines(*(interval(*numbers) for numbers in others)).gap
    assert (found and (found.low, found.high, pytest.approx(found.factor))) == gap


def test_what_a_bad_control_left_unsettled_differs_from_nothing():
    off = interval(9.0, 8.0, 9.5, "unsettled", reason="the control came back slower")
    assert of_machines(interval(1.2, 1.1, 1.3), off).gap is None


def test_differences_are_told_largest_first():
    books = [
        a_ledger(a_row("a.small"), a_row("a.large")),
        a_ledger(
            a_row("a.small", conditions=[interval(1.4, 1.3, 1.5)]),
            a_row("a.large", conditions=[interval(9.0, 6.3, 9.5)]),
        ),
    ]
    told = machines_page.differences(books, claims=[a_claim("a.small"), a_claim("a.large")])
    assert told == [
        "5x: a.large, batch 1: 1.21x on 1, 9.00x on 2",
        "1.03x: a.small, batch 1: 1.21x on 1, 1.40x on 2",
    ]


# Squares and advice


@pytest.mark.parametrize(
    ("threshold", "verdict", "effect", "tone"),
    [
        (">= 1.05", "holds", 1.06, "h0"),
        (">= 1.05", "holds", 1.3, "h1"),
        (">= 1.05", "holds", 30.0, "h3"),
        (">= 2", "fails", 1.0, "f2"),
        ("<= 1.3", "holds", 1.0, "h1"),
        ("<= 1.3", "fails", 4.0, "f3"),
        ("within 1.3x", "holds", 0.97, "h1"),
        ("within 1.3x", "fails", 0.2, "f3"),
        (">= 1.05", "unsettled", 1.06, "u"),
        (">= 1.05", "not-measured", None, "n"),
        (">= 1.05", "fails", None, "fc"),
    ],
)
def test_a_colour_is_the_distance_from_the_threshold(threshold, verdict, effect, tone):
    bar = Threshold.parse(threshold)
    (square,) = of_machines(interval(effect, effect, effect, verdict, threshold=bar)).squares
    assert square.tone == tone
    assert square.distance is None or (square.distance > 0) == (tone[0] in "hu")


@pytest.mark.parametrize("kind", ["exact", "accuracy"])
def test_what_is_counted_or_a_difference_has_a_fixed_tone(kind):
    assert [s.tone for s in of_machines(interval(9, 9, 9), kind=kind).squares] == ["hc"]


@pytest.mark.parametrize(
    ("verdict", "numbers", "said"),
    [
        ("holds", (1.21, 1.17, 1.26), "Fuse for batch 1 (1.21x)."),
        ("fails", (1.01, 0.99, 1.02), "Of no use here: it does nothing for batch 1 (1.01x)."),
        ("fails", (0.5, 0.4, 0.6), "it costs more than it saves for batch 1 (0.50x)."),
        ("fails", (0.98, 0.92, 1.08), "it does nothing for batch 1 (0.98x)."),
        ("fails", (1.12, 1.07, 1.14), "too little for batch 1 (1.12x)."),
        ("fails", (1.04, 1.01, 1.14), "too little for batch 1 (1.04x)."),
        ("fails", (1.01, 0.8, 1.14), "undecided whether it saves or costs for batch 1 (1.01x)."),
        ("fails", (0.95, 0.9, 1.09), "undecided whether it saves or costs for batch 1 (0.95x)."),
        ("unsettled", (1.21, 0.9, 1.5), "Unsettled for batch 1 (1.21x)."),
    ],
)
def test_advice_says_what_was_found(verdict, numbers, said):
    bar = Threshold(">=", 1.15)
    judged = Judged.from_row(interval(*numbers, verdict, threshold=bar))
    tip = dataclasses.replace(TIPS[0], do="Fuse")
    assert advice(tip, a_claim(), [judged]).endswith(said)


def test_the_headline_counts_what_is_timed_and_committed_only():
    rows = [
        a_row("a.timed", first="fails", second="unsettled"),
        a_row("a.open", conditions=[interval(1.2, 1.1, 1.3, theory="open")]),
        a_row("a.counted"),
    ]
    kinds = {"a.timed": "time", "a.open": "time", "a.counted": "exact"}
    said = timed_headline(rows, [a_claim(id, kind=kind) for id, kind in kinds.items()])
    assert "0 of 1 came out as it says, 1 against it, 1 unsettled." in said
    assert "It leaves 1 more open." in said


def test_the_svg_is_xml_with_every_condition_and_its_interval():
    claim = a_claim()
    lines = lines_of([a_ledger(a_row(first="fails")), a_ledger()], [claim])
    root = ElementTree.fromstring(picture_svg(lines, TIPS, ["1", "2"], "../notebooks"))
    text = " ".join(root.itertext())
    assert "1.21x [1.17, 1.26], threshold >= 1.05, against the mechanism" in text
    assert "batch 64" in text
    assert "F!" in text


def test_one_ledger_is_no_comparison():
    with pytest.raises(ValueError, match="two ledgers at least, got 1"):
        report.compare([a_ledger()])


# Running notebooks


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Write notebooks of the given cells; keep the machine's description out of it."""
    monkeypatch.setattr(ledger, "describe_machine", lambda: {"line": "m", "key": "m"})
    monkeypatch.chdir(tmp_path)

    def write(**cells):
        folder = tmp_path / "notebooks"
        folder.mkdir(exist_ok=True)
        for name, sources in cells.items():
            book = nbformat.v4.new_notebook(
                cells=[nbformat.v4.new_code_cell(source) for source in sources]
            )
            nbformat.write(book, folder / f"{name}.ipynb")
        return folder

    return write


RECORD = (
    "from dlhelpers.course import ledger\n"
    "ledger.describe_machine = lambda: {'line': 'm', 'key': 'm'}\n"
    "ledger.update(dict(id='a.b', control=None, conditions=[]))"
)


def test_notebooks_run_in_their_folder_with_this_python_into_the_given_ledger(notebooks, tmp_path):
    where = "import os, sys\nassert os.path.basename(os.getcwd()) == 'notebooks', os.getcwd()"
    python = f"assert sys.executable == {sys.executable!r}, sys.executable"
    folder = notebooks(a=[where, python, "", RECORD])
    before = (folder / "a.ipynb").read_bytes()
    summary = report.run_notebooks(folder, ledger=tmp_path / "own.json", progress=False)
    assert summary.failed == (), str(summary)
    assert summary.runs[0].cells == 3
    assert [row["id"] for row in ledger.read(tmp_path / "own.json")["rows"]] == ["a.b"]
    assert (folder / "a.ipynb").read_bytes() == before


def test_a_failing_notebook_is_named_with_its_cell_and_the_next_one_runs(notebooks, tmp_path):
    folder = notebooks(a=["x = 1", "x / 0", "x = 2"], b=[RECORD])
    (folder / "c.ipynb").write_text("{", encoding="utf-8")
    summary = report.run_notebooks(folder, ledger=tmp_path / "own.json", progress=False)
    assert [run.name for run in summary.failed] == ["a", "c"]
    assert summary.runs[0].error == "code cell 2 (x / 0): ZeroDivisionError: division by zero"
    assert summary.runs[0].cells == 1
    assert len(ledger.read(tmp_path / "own.json")["rows"]) == 1


def test_a_kernel_that_dies_or_hangs_is_a_failure_of_its_notebook(notebooks, tmp_path):
    folder = notebooks(a=["import os", "os._exit(3)"], b=["import time", "time.sleep(600)"])
    summary = report.run_notebooks(folder, ledger=tmp_path / "own.json", progress=False, timeout=3)
    dead, hung = summary.failed
    assert dead.error.startswith("code cell 2 (os._exit(3)): DeadKernelError")
    assert hung.error.startswith("code cell 2 (time.sleep(600)): CellTimeoutError")


@pytest.mark.parametrize("timeout", [600, None])
def test_a_message_that_woke_nobody_is_found_by_the_next_look(timeout):
    class Socket:
        def __init__(self):
            self.looks = []

        async def poll(self, timeout_ms):
            self.looks.append(timeout_ms)
            return len(self.looks) > 2

        async def recv_multipart(self):
            return [b"message"]

    class Session:
        def feed_identities(self, parts):
            return [], parts

        def deserialize(self, parts):
            return {"parts": parts}

    channel_class = kernel_of_this_python()().client().shell_channel_class
    channel = channel_class.__new__(channel_class)  # which asks for a true socket
    channel.socket, channel.session = socket, _ = Socket(), Session()
    assert asyncio.run(channel.get_msg(timeout=timeout)) == {"parts": [b"message"]}
    assert socket.looks == [1000, 1000, 1000]
    socket.looks.clear()
    with pytest.raises(Empty):
        asyncio.run(channel.get_msg(timeout=1.5))
    assert socket.looks == [1000, 500]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_stops_the_whole_run_and_keeps_the_ledger(notebooks, tmp_path):
    stop = "import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(600)"
    folder = notebooks(a=[RECORD, stop], b=["1"])
    with pytest.raises(KeyboardInterrupt):
        report.run_notebooks(folder, ledger=tmp_path / "own.json", progress=False)
    assert len(ledger.read(tmp_path / "own.json")["rows"]) == 1


def test_a_folder_without_notebooks_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no notebook in"):
        report.run_notebooks(tmp_path, ledger=tmp_path / "own.json")
    assert not (tmp_path / "own.json").exists()


# The command


def test_run_writes_ledger_and_page_and_says_by_its_status_that_a_notebook_failed(
    notebooks, tmp_path, capsys
):
    notebooks(a=[RECORD], b=["1 / 0"])
    assert report.main(["--run"]) == 1
    assert "b: 0 code cells" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "code cell 1 (1 / 0): ZeroDivisionError" in Page(page).text
    assert len(ledger.read(tmp_path / "ledger.json")["rows"]) == 1


@pytest.fixture
def two(tmp_path):
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path in paths:
        path.write_text(json.dumps(a_ledger(a_row())), encoding="utf-8")
    return [str(path) for path in paths]


def test_without_run_the_ledger_is_rendered_as_it_is(two, tmp_path, monkeypatch, capsys):
    output = tmp_path / "page" / "r.html"
    output.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    assert report.main(["--ledger", two[0], "--output", str(output)]) == 0
    assert "1 verdicts in" in capsys.readouterr().out
    page = Page(output.read_text(encoding="utf-8"))
    assert "../notebooks/01_pairing.ipynb" in page.addresses
    monkeypatch.setenv("DLHELPERS_LEDGER", two[1])
    assert report.main(["--output", str(output)]) == 0


def test_compare_writes_the_page_of_two_machines(two, tmp_path):
    output = tmp_path / "c.html"
    assert report.main(["--compare", *two, "--output", str(output)]) == 0
    assert "side by side" in output.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", [None, "", "{", '{"schema": 9}', '{"rows": NaN}'])
def test_a_ledger_that_cannot_be_read_is_one_line_and_status_2(text, two, tmp_path, capsys):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    output = tmp_path / "r.html"
    for arguments in (["--ledger", str(path)], ["--compare", two[0], str(path)]):
        assert report.main([*arguments, "--output", str(output)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert str(path) in err
    assert not output.exists()


def test_an_output_that_cannot_be_written_is_one_line_and_status_2(two, tmp_path, capsys):
    output = tmp_path / "absent" / "r.html"
    assert report.main(["--ledger", two[0], "--output", str(output)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert str(output.parent) in err


@pytest.mark.parametrize(
    "arguments", [["--compare", "a"], ["--compare", "a", "b", "--run"], ["--nonsense"]]
)
def test_arguments_that_make_no_sense_are_refused(arguments):
    with pytest.raises(SystemExit, match="2"):
        report.main(arguments)


def test_the_link_of_a_page_on_another_drive_is_a_whole_address(monkeypatch):
    def on_another_drive(*paths):
        raise ValueError("path is on mount 'D:'")

    monkeypatch.setattr(command.os.path, "relpath", on_another_drive)
    assert command._seen_from(Path.cwd(), Path("notebooks")).startswith("file:///")


def test_the_report_links_to_the_cell_of_each_claim(tmp_path):
    from dlhelpers.course.claims import all_claims

    folder = Path(__file__).parent.parent / "notebooks"
    cells = cells_of_claims(folder)
    assert set(cells) == {claim.id for claim in all_claims()}
    for claim in all_claims():
        notebook = json.loads((folder / f"{claim.notebook}.ipynb").read_text("utf-8"))
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        cell = code[cells[claim.id].number - 1]
        assert cell["id"] == cells[claim.id].id
        assert claim.id in "".join(cell["source"])
    (tmp_path / "broken.ipynb").write_text("{")
    assert cells_of_claims(tmp_path) == cells_of_claims(tmp_path / "none") == {}
