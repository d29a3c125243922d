"""Is the break-even where the verdicts change, and nowhere else?"""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlhelpers.course import claims, ledger_schema, plots
from dlhelpers.course.claims import break_even, catalog, judging
from dlhelpers.course.claims.break_even import Axis
from dlhelpers.course.verdicts import Threshold
from dlhelpers.drawing.style import BASELINE
from dlhelpers.measure import Comparison
from dlhelpers.shufflenet import guideline_networks, layer_costs

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"

POINTS = (32.0, 64.0, 128.0, 256.0, 512.0)
HOLDS, FAILS, OPEN = (1.5, 1.4, 1.6), (1.0, 0.98, 1.02), (1.2, 1.0, 1.4)


@pytest.fixture(scope="module")
def claim():
    """One of the course's with an axis of its own."""
    (found,) = (c for c in claims.all_claims() if c.id == "shufflenet.element-wise")
    words = {"holds": "pays", "fails": "does not pay"}
    axis = Axis("channels", POINTS, "at 14 by 14 pixels")
    return replace(found, axis=axis, threshold=Threshold(">=", 1.2), words=words)


def comparison(speedup, low, high):
    return Comparison(
        speedup, low, high, "faster", 50, 2e-3, 1e-3, 0.95, 0.03, 1.05, (speedup,), "cpu", 2, 1.0
    )


def along(claim, kinds):
    ends = {"h": HOLDS, "f": FAILS, "u": OPEN}
    found = {at: comparison(*ends[kind]) for at, kind in zip(POINTS, kinds, strict=True)}
    return break_even.from_points(claim, found)


@pytest.mark.parametrize(
    ("kinds", "bracket", "told"),
    [
        ("ffhhh", (64, 128), "pays from 128 channels on, not up to 64 (at 14 by 14 pixels)"),
        ("hhhhf", (256, 512), "pays up to 256 channels, not from 512 on (at 14 by 14 pixels)"),
        (
            "fhuuu",
            (32, 64),
            "pays from 64 channels on, not up to 32; unsettled at 128, 256, 512",
        ),
        ("uuhfu", (128, 256), "pays up to 128 channels, not from 256 on; unsettled at 32, 64, 512"),
        ("fuuhh", (32, 256), "pays from 256 channels on, not up to 32"),
        ("hhhhh", None, "none, pays everywhere from 32 to 512 channels"),
        ("fffff", None, "none, does not pay anywhere from 32 to 512 channels"),
        ("hfhff", None, "not monotone over 32 to 512 channels: pays at 32, 128, not at 64"),
        ("uuuuu", None, "from 32 to 512 channels nothing is settled"),
        ("ffuuu", None, "does not pay at 32, 64 channels, the rest of 32 to 512 channels is"),
    ],
)
def test_the_bracket_and_its_sentence(claim, kinds, bracket, told):
    found = along(claim, kinds)
    assert found.bracket == bracket
    assert told in str(found)


@given(st.text("hfu", min_size=5, max_size=5))
def test_a_bracket_holds_the_only_change(claim, kinds):
    found = along(claim, kinds)
    settled = [(at, kind) for at, kind in zip(POINTS, kinds, strict=True) if kind != "u"]
    changes = [(a, b) for (a, one), (b, other) in pairwise(settled) if one != other]
    assert found.bracket == (changes[0] if len(changes) == 1 else None)
    row = found.as_row()
    assert break_even.read(row, claim.words) == found
    assert ledger_schema._axis_problem(row) == ""


def test_every_point_is_measured_within_the_budget_of_all(claim, monkeypatch):
    seen = []

    def compare(self, baseline, candidate, **options):
        seen.append((baseline(), candidate(), options["budget_s"]))
        return comparison(*(HOLDS if baseline() > 100 else FAILS))

    monkeypatch.setattr(type(claim), "compare", compare)
    found = claim.along_axis(lambda at: (lambda: at, lambda: -at), budget_s=5)
    assert seen == [(at, -at, 1.0) for at in POINTS]
    assert found.bracket == (64, 128)


def test_a_point_that_is_a_condition_is_measured_once(claim, monkeypatch):
    seen = []

    def compare(self, baseline, candidate, **options):
        seen.append((baseline(), options["budget_s"]))
        return comparison(*HOLDS)

    monkeypatch.setattr(type(claim), "compare", compare)
    known = {512: comparison(*FAILS), 32: comparison(*OPEN)}  # in any order
    found = claim.along_axis(lambda at: (lambda: at, print), budget_s=6, known=known)
    assert seen == [(64, 2), (128, 2), (256, 2)]
    assert [p.verdict for p in found.points] == ["unsettled", "holds", "holds", "holds", "fails"]
    assert found.points[4].effect == known[512].speedup
    every = dict.fromkeys(POINTS, comparison(*HOLDS))
    claim.along_axis(lambda at: pytest.fail("measured again"), known=every)
    with pytest.raises(ValueError, match=r"known has \[100\]"):
        claim.along_axis(lambda at: (print, print), known={100: known[32]})


def test_a_claim_without_an_axis_and_other_points_are_refused(claim):
    with pytest.raises(ValueError, match="declares no axis: add one to"):
        replace(claim, axis=None).along_axis(lambda at: (print, print))
    with pytest.raises(ValueError, match="declares"):
        break_even.from_points(claim, {1.0: comparison(*HOLDS)})


def test_the_verdict_tells_it_and_where_the_control_is_off_nothing_is_settled(claim):
    evidence = {condition.name: comparison(*HOLDS) for condition in claim.conditions}
    for control, told in ((FAILS, "break-even: pays from 128"), ((1.3, 1.2, 1.4), "withdrawn")):
        control = replace(
            comparison(*control), outcome="no difference" if control == FAILS else "faster"
        )
        verdict = judging.settle(
            claim, evidence | {"control": control}, break_even=along(claim, "ffhhh")
        )
        assert told in verdict.sentence
        row = verdict.as_row()["axis"]
        assert row["points"][4]["effect"] == 1.5
        assert told in f"break-even: {break_even.read(row, claim.words)}", "the report says so too"


@pytest.mark.parametrize("kinds", ["ffhhh", "uuuuh"])
def test_the_figure_of_a_withdrawn_break_even_says_so(claim, kinds):
    evidence = {condition.name: comparison(*HOLDS) for condition in claim.conditions}
    evidence["control"] = comparison(1.3, 1.2, 1.4)
    left = judging.settle(claim, evidence, break_even=along(claim, kinds)).break_even
    (axes,) = plots.break_even(left, ylabel="speedup").axes
    curve, hollow, _, _ = axes.lines
    assert axes.get_title(loc="left") == "Break-even: withdrawn, as the control is off"
    assert curve.get_color() == BASELINE
    assert list(hollow.get_xdata()) == list(POINTS)
    assert not axes.patches, "no bracket"
    straddling = along(claim, "uuuuu")
    assert not straddling.is_withdrawn
    assert "nothing is settled" in straddling.told


@pytest.mark.parametrize(
    ("axis", "told"),
    [
        ({"unit": "x", "points": [2, 1]}, "2 to 5 growing positive numbers"),
        ({"unit": "x", "points": [1]}, "2 to 5 growing positive numbers"),
        ({"unit": "x", "points": [1, 2, 3, 4, 5, 6]}, "2 to 5 growing positive numbers"),
        ({"unit": "x", "points": [0, 1]}, "2 to 5 growing positive numbers"),
        ({"points": [1, 2]}, "lacks the key 'unit'"),
        ({"unit": "x", "points": [1, 2], "more": 1}, "unknown key 'more'"),
    ],
)
def test_a_bad_axis_is_refused_by_name(axis, told):
    with pytest.raises(ValueError, match=told):
        catalog._axis(catalog._Row("a.toml, entry 1", {"axis": axis}), "time")
    with pytest.raises(ValueError, match="measured in times"):
        catalog._axis(catalog._Row("a", {"axis": {"unit": "x", "points": [1, 2]}}), "exact")


@pytest.mark.parametrize(
    "changes",
    [
        {"unit": 3},
        {"points": []},
        {"points": [{"at": 1}]},
        {"threshold": "1.2"},
        {"more": 1},
    ],
)
def test_an_axis_that_breaks_the_schema_is_refused(claim, changes):
    assert ledger_schema._axis_problem(along(claim, "ffhhh").as_row() | changes)


@pytest.mark.parametrize("kinds", ["ffhhh", "hhhhh", "uuuuu"])
def test_the_figure_shows_curve_band_threshold_and_bracket(claim, kinds):
    found = along(claim, kinds)
    figure = plots.break_even(found, ylabel="speedup")
    (axes,) = figure.axes
    curve, _, neutral, threshold = axes.lines
    assert list(curve.get_xdata()) == list(POINTS)
    assert list(neutral.get_ydata()) == [1, 1]
    assert list(threshold.get_ydata()) == [1.2, 1.2]
    assert len(axes.collections) == 1, "the band"
    assert len(axes.patches) == (found.bracket is not None), "the bracket"
    title = axes.get_title(loc="left").replace("\n", " ")
    assert title == f"Break-even: {found.told}"
    assert all(math.isfinite(end) for end in axes.get_ylim())


def test_an_infinite_end_leaves_the_picture(claim):
    points = {at: comparison(1.5, 0.0, math.inf) for at in POINTS}
    figure = plots.break_even(break_even.from_points(claim, points), ylabel="speedup")
    assert figure.axes[0].get_ylim()[1] < 1000


def test_eight_claims_of_the_course_or_more_have_an_axis():
    assert sum(claim.axis is not None for claim in claims.all_claims()) >= 8


def code_of(stem):
    notebook = json.loads((NOTEBOOKS / f"{stem}.ipynb").read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("claim_", [c for c in claims.all_claims() if c.axis], ids=lambda c: c.id)
def test_a_notebook_measures_conditions_once_and_draws_what_its_verdict_holds(claim_):
    cells = code_of(claim_.notebook)
    start = next(i for i, cell in enumerate(cells) if f'card("{claim_.id}")' in cell)
    along, judge, figure = (
        next(i for i in range(start, len(cells)) if text in cells[i])
        for text in ("along_axis(", ".judge(evidence, ", "plots.break_even(")
    )
    assert along <= judge <= figure
    assert "known=known" in cells[along]
    assert re.search(r"break_even\(verdict\S*\.break_even,", cells[figure])


def test_what_the_conditions_say_of_bytes_is_true_at_their_size():
    says = {(k.id, c.name): c.why for k in claims.all_claims() for c in k.conditions}

    def cost(guideline, row, scale):
        network, x = guideline_networks(guideline, scale=scale)[row]
        found = layer_costs(network, x[:, :, :28, :28], policy="all")
        own = sum(row.nbytes for row in found.layers if row.operator == "convolution")
        return found.nbytes, found.multiply_adds, own

    four, one = (cost("G3", row, 1)[0] for row in ("4-fragment-parallel", "1-fragment"))
    assert (
        f"{four / one:.1f} times the bytes"
        in (says["shufflenet.few-fragments", "4 in parallel of 32 channels"])
    )
    narrow, wide = (cost("G4", "ReLU and shortcut", scale) for scale in (1, 16))
    assert 1 - narrow[2] / narrow[0] == pytest.approx(2 / 3, abs=0.01)
    for_each_byte = wide[1] / wide[0] / (narrow[1] / narrow[0])
    assert for_each_byte == pytest.approx(15, abs=0.5)
    assert "Fifteen times the multiply-adds" in says["shufflenet.element-wise", "512 channels"]


def test_a_card_says_the_axis():
    for claim in claims.all_claims():
        assert claim.axis is None or claim.axis.unit in str(claim)


def test_reading_needs_no_measurement():
    row = {"unit": "channels", "where": "", "threshold": ">= 1.2", "points": [
        {"at": 1, "effect": None, "low": None, "high": None, "verdict": "not-measured"},
    ]}  # fmt: skip
    words = SimpleNamespace(words={"holds": "pays", "fails": "does not"}).words
    assert "nothing is settled" in str(break_even.read(row, words))
