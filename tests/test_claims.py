"""Claims: the catalogue is read strictly, evidence gives the verdict that it supports."""

import ast
import base64
import dataclasses
import html
import json
import math
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dlhelpers.course import claims, ledger
from dlhelpers.course.claims import catalog, judging, predictions
from dlhelpers.course.claims.advice import advice
from dlhelpers.course.claims.cards import claim_html, claim_text, verdict_html
from dlhelpers.course.claims.conditions import Judged, Tally
from dlhelpers.course.claims.intervals import Scale, bar_colour, interval
from dlhelpers.course.claims.said import Said
from dlhelpers.course.claims.sentences import asked, effect_text, headline, sentence, short
from dlhelpers.course.verdicts import Threshold, agreement_of
from dlhelpers.measure import Comparison, Estimate, estimate_mean

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

TIPS = """
[[tip]]
id = "pair-failure"
says = "A wrong pair fails."
said_by = "a README, 2021"
"""
TIME = """
[[claim]]
id = "fusion.speeds-up"
tip = "pair-failure"
says = "Fusing is faster."
source = "a paper, table 1"
kind = "time"
metric = "latency unfused / fused"
threshold = ">= 1.05"
since = 2026-01-02
[[claim.condition]]
name = "batch 1, launch-bound"
theory = "wins"
why = "fewer launches"
[[claim.condition]]
name = "batch 64, compute-bound"
theory = "cannot"
why = "the same arithmetic"
"""
EXACT = """
[[claim]]
id = "pairing.floor"
tip = "pair-failure"
says = "Softmax leaves a floor."
source = "a paper, equation 1"
kind = "exact"
metric = "loss of a perfect output"
threshold = "{threshold}"
since = 2026-01-02
[[claim.condition]]
name = "ten classes"
theory = "wins"
why = "ln(1 + (C - 1) / e)"
"""


def load(text, tmp_path, tips=TIPS):
    (tmp_path / "tips.toml").write_text(tips, encoding="utf-8")
    (tmp_path / "01_pairing.toml").write_text(text, encoding="utf-8")
    return claims.load(tmp_path / "01_pairing.toml", catalog.load_tips(tmp_path / "tips.toml"))


def comparison(speedup, low, high, outcome="faster"):
    return Comparison(
        speedup, low, high, outcome, 50, 2e-3, 1e-3, 0.95, 0.03, 1.05, (speedup,), "cpu", 2, 1.0
    )


FAST, SAME = comparison(1.21, 1.17, 1.26), comparison(1.01, 0.99, 1.02, "no difference")
QUIET, OFF = comparison(1.0, 0.98, 1.02, "no difference"), comparison(1.08, 1.05, 1.11)


@pytest.fixture
def time_claim(tmp_path):
    return load(TIME, tmp_path)[0]


@pytest.fixture
def exact_claim(tmp_path):
    return lambda threshold: load(EXACT.format(threshold=threshold), tmp_path)[0]


@pytest.fixture(autouse=True)
def own_session(monkeypatch, tmp_path):
    """A ledger, a machine and a registry of this test alone."""
    monkeypatch.setenv("DLHELPERS_LEDGER", str(tmp_path / "ledger.json"))
    monkeypatch.setattr(ledger, "describe_machine", lambda: {"line": "this machine", "key": "k"})
    monkeypatch.setattr(predictions, "_said", {})
    monkeypatch.setattr(predictions, "_closed", set())


@pytest.fixture
def declared(monkeypatch, time_claim, exact_claim, tmp_path):
    """Make the two claims of this file those of the course."""
    both = (time_claim, exact_claim(">= 0.3"))
    tips = catalog.load_tips(tmp_path / "tips.toml")
    monkeypatch.setattr(catalog, "all_claims", lambda: both)
    monkeypatch.setattr(catalog, "all_tips", lambda: tips)
    return both


def by_time(claim, first, second, control=QUIET):
    names = [c.name for c in claim.conditions]
    return dict(zip([*names, "control"], [first, second, control], strict=True))


# The catalogue


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('source = "a paper', 'sorce = "a paper', "lacks the key 'source'"),
        ("metric =", 'colour = "red"\nmetric =', "unknown key 'colour'"),
        ('tip = "pair-failure"', 'tip = "pair-failur"', "did you mean 'pair-failure'"),
        (">= 1.05", "=> 1.05", "'=> 1.05' must be one of"),
        (">= 1.05", ">= nan", "'>= nan' must be one of"),
        (">= 1.05", ">= -1", "must bound a positive speedup"),
        (">= 1.05", "== true", "is for kind 'exact'"),
        ('kind = "time"', 'kind = "speed"', "kind 'speed' is not known: one of exact, time"),
        ('kind = "time"', 'kind = "memory"\ncontrol = true', "belong to kind 'time'"),
        ('theory = "wins"', 'theory = "win"', "condition 1: theory 'win' is not known"),
        ('why = "fewer launches"', "", "condition 1: lacks the key 'why'"),
        ('"batch 64, compute-bound"', '"control"', "the name 'control' is taken"),
        ('"batch 64, compute-bound"', '"batch 1, launch-bound"', "is taken"),
        ('"fusion.speeds-up"', '"Fusion"', "id 'Fusion' must be lower case"),
        ('metric = "latency unfused / fused"', "metric = 3", "metric must be of type str"),
        ("since =", "negligible = true\nsince =", "negligible must be of type float or int"),
        ("since =", "negligible = 3\nsince =", "negligible must lie between 0 and 1"),
        (">= 1.05", "within 0.9x", "a band such as 'within 1.2x' of a factor above 1"),
        (
            'kind = "time"\nmetric = "latency unfused / fused"\nthreshold = ">= 1.05"',
            'kind = "accuracy"\nmetric = "points"\nthreshold = "within 2x"',
            "is a band of a ratio",
        ),
        ("since =", 'words = {holds="pays"}\nsince =', "words lacks 'fails'"),
        (
            "since =",
            'words = {holds="pays", fails=""}\nsince =',
            "words.fails must be a label",
        ),
        ("since =", 'found = {true="a", false="b"}\nsince =', "and >= 1.05 asks for none"),
        ("since = 2026-01-02\n", "", "lacks the key 'since'"),
        ("2026-01-02", '"2026-01-02"', "2026-11-30 without quotes"),
        ("2026-01-02", "2026-01-02T03:04:05", "since must be a day without a time"),
        ('theory = "wins"', 'theory = "wins"\nsince = 2026-01-01', "lies before the claim's 2026"),
        ("since =", 'ask = ["batch 2"]\nsince =', "ask names 'batch 2', the conditions are"),
        ("since =", 'ask = "all"\nsince =', "ask must be of type list"),
        (
            "since =",
            'ask = ["batch 1, launch-bound", "batch 1, launch-bound"]\nsince =',
            "ask names a condition twice",
        ),
        ("since =", 'size = "batch 2"\nsince =', "size names 'batch 2'"),
    ],
)
def test_a_bad_claim_is_an_error_that_names_file_entry_and_mistake(old, new, said, tmp_path):
    assert old in TIME
    with pytest.raises(ValueError, match=r"01_pairing\.toml, entry 1") as caught:
        load(TIME.replace(old, new, 1), tmp_path)
    assert said in str(caught.value)


def test_a_second_claim_of_the_same_id_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r'entry 2 "fusion.speeds-up": entry 1 has that id'):
        load(TIME + TIME, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[claim]\n", "01_pairing.toml is no TOML"),
        ("[claim]\nid = 'x'\n", "double brackets"),
        ("[[tips]]\nid = 'x'\n", "unknown key 'tips'"),
        ("claim = [3]\n", "entry 1: must be a table"),
    ],
)
def test_a_file_that_is_no_list_of_claims_is_an_error(text, said, tmp_path):
    with pytest.raises(ValueError, match="01_pairing") as caught:
        load(text, tmp_path)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("said_by =", "later = true\nsaid_by =", "unknown key 'later'"),
        ("said_by", "who", "lacks the key 'said_by'"),
    ],
)
def test_a_bad_tip_is_an_error_that_names_file_entry_and_mistake(old, new, said, tmp_path):
    with pytest.raises(ValueError, match=r'tips\.toml, entry 1 "pair-failure"') as caught:
        load(TIME, tmp_path, tips=TIPS.replace(old, new))
    assert said in str(caught.value)


def test_control_is_asked_of_times_and_of_nothing_else(time_claim, exact_claim):
    assert time_claim.control
    assert not exact_claim(">= 0.3").control


def test_a_condition_may_override_the_threshold(tmp_path):
    text = TIME.replace('why = "the same', 'threshold = "<= 1.02"\nwhy = "the same')
    (claim,) = load(text, tmp_path)
    assert [str(c.threshold) for c in claim.conditions] == [">= 1.05", "<= 1.02"]


def test_an_unknown_id_is_answered_with_the_nearest_one(declared):
    with pytest.raises(ValueError, match=r"nearest: fusion\.speeds-up"):
        claims.card("fusion.speed-up")


# Thresholds


@given(
    st.sampled_from([">=", "<=", ">", "<"]),
    st.floats(-5, 5),
    st.floats(-5, 5),
    st.floats(-5, 5),
    st.floats(0, 1),
)
def test_an_interval_is_settled_only_where_every_point_of_it_agrees(op, bound, a, b, share):
    low, high = sorted((a, b))
    settled = Threshold(op, bound).settle(low, high)
    inside = min(max(low + share * (high - low), low), high)
    compare = {">=": inside >= bound, "<=": inside <= bound, ">": inside > bound}
    met = compare.get(op, inside < bound)
    assert settled is None or settled == met


@given(st.floats(1.01, 3), st.floats(-3, 3), st.floats(-3, 3))
@example(1.2, math.log(0.78), math.log(1.09))  # a ratio of 0.78 is as far from 1 as one of 1.28
@example(1.2, math.log(0.5), math.log(2.0))
def test_a_band_is_settled_alike_for_a_ratio_and_its_inverse(factor, a, b):
    low, high = sorted(map(math.exp, (a, b)))
    band = Threshold.parse(f"within {factor!r}x")
    inside, outside = abs(a) < math.log(factor), min(a, b) * max(a, b) > 0
    inside, outside = inside and abs(b) < math.log(factor), outside and min(abs(a), abs(b))
    wanted = True if inside else False if outside > math.log(factor) else None
    assert band.settle(low, high) is wanted
    assert band.settle(1 / high, 1 / low) is wanted


def test_a_band_is_measured_and_shown_by_both_of_its_ends(tmp_path, monkeypatch):
    (claim,) = load(TIME.replace(">= 1.05", "within 1.25x"), tmp_path)
    monkeypatch.setattr("dlhelpers.measure.compare", lambda a, b, **kw: kw["threshold"])
    assert claim.compare(int, int) == (0.8, 1.25)
    assert asked(claim) == "latency unfused / fused: between 0.8x and 1.25x"
    wide = comparison(1.0, 0.78, 1.09, "undecided")
    verdict = claim.judge(by_time(claim, wide, comparison(0.7, 0.6, 0.75, "slower")))
    assert [c.verdict for c in verdict.conditions] == ["unsettled", "fails"]
    assert "".join(svgs_of(verdict._repr_html_())).count("stroke-dasharray") == 2 * 2
    (row,) = ledger.read()["rows"]
    judged = [Judged.from_row(c) for c in row["conditions"]]
    assert judged == list(verdict.conditions)
    assert {str(c.threshold) for c in judged} == {"within 1.25x"}


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-5, 5))
@example(1.0, 1.0, 1.0)
def test_equality_holds_for_no_interval_wider_than_a_point(bound, a, b):
    low, high = sorted((a, b))
    settled = Threshold("==", bound).settle(low, high)
    assert settled == (False if not low <= bound <= high else True if low == high else None)


@given(st.text(max_size=12))
@example(">= 1_000")
@example(">=1e999")
@example("within 1.2x")
@example("within 0.9x")
def test_a_threshold_reads_back_as_it_prints_or_is_refused(text):
    try:
        threshold = Threshold.parse(text)
    except ValueError:
        return
    assert Threshold.parse(str(threshold)).op == threshold.op
    assert math.isfinite(threshold.bound)


# Judging


def test_the_line_of_a_verdict_is_the_one_of_the_style_guide(time_claim):
    verdict = time_claim.judge(by_time(time_claim, FAST, SAME))
    assert str(verdict) == (
        "Holds in 1 of 2, as the mechanism says · Confirmed for batch 1, launch-bound "
        "(1.21x [1.17, 1.26]); refuted for batch 64, compute-bound (1.01x [0.99, 1.02])"
        " · control 1.00x [0.98, 1.02]"
    )


STRADDLES = comparison(1.06, 1.01, 1.12, "undecided")
FEW = comparison(1.3, 0.0, math.inf, "undecided")
ABSENT = claims.not_measured("no CUDA device")
GONE = claims.not_measured("DALI is not installed")


@pytest.mark.parametrize(
    ("first", "second", "control", "said"),
    [
        (FAST, SAME, QUIET, "holds in 1 of 2, as the mechanism says"),
        (FAST, FAST, QUIET, "holds in both, against the mechanism in 1: batch 64, compute-bound"),
        (SAME, SAME, QUIET, "fails in both, against the mechanism in 1: batch 1, "
         "launch-bound"),
        (
            SAME, FAST, QUIET,
            "holds in 1 of 2, against the mechanism in 2: batch 1, launch-bound; "
            "batch 64, compute-bound",
        ),
        (FAST, STRADDLES, QUIET, "holds in the one that is settled, as the mechanism says; "
         "1 unsettled"),
        (SAME, ABSENT, QUIET, "fails in the one that is settled, against the mechanism in 1: "
         "batch 1, launch-bound; 1 not measured"),
        (FEW, STRADDLES, QUIET, "2 unsettled"),
        (FAST, FAST, OFF, "2 unsettled"),
        (FAST, SAME, comparison(0.9, 0.85, 0.95, "slower"), "2 unsettled"),
        (FAST, SAME, comparison(1.02, 1.01, 1.04, "undecided"),
         "holds in 1 of 2, as the mechanism says"),
        (FAST, FAST, ABSENT, "2 unsettled"),
        (FAST, ABSENT, OFF, "1 unsettled, 1 not measured"),
        (ABSENT, STRADDLES, QUIET, "1 unsettled, 1 not measured"),
        (ABSENT, ABSENT, QUIET, "not measured"),
        (ABSENT, ABSENT, OFF, "not measured"),
    ],
)  # fmt: skip
def test_the_short_form_counts_conditions_and_compares_them_with_the_mechanism(
    time_claim, first, second, control, said
):
    assert time_claim.judge(by_time(time_claim, first, second, control)).short == said


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (claims.not_measured("no GPU"), "not measured"),
        (0.5, "holds, as the mechanism says"),
        (0.1, "fails, against the mechanism in 1: ten classes"),
    ],
)
def test_one_condition_is_not_counted(exact_claim, found, said):
    assert exact_claim(">= 0.3").judge({"ten classes": found}).short == said


def test_what_goes_against_the_mechanism_stands_out(time_claim):
    verdict = time_claim.judge(by_time(time_claim, SAME, SAME))
    said = "Fails in both, AGAINST THE MECHANISM in 1: batch 1, launch-bound"
    assert str(verdict).startswith(f"{said} · ")
    assert said in verdict._repr_html_()
    assert "AGAINST IT" in verdict._repr_html_()


def test_a_claim_may_say_it_in_its_own_words(tmp_path):
    words = 'words = {holds = "pays", fails = "does not pay"}\nwhere = "at"\nsince ='
    text = TIME.replace("since =", words).replace('"cannot"', '"cannot"\nwhere = "with"')
    (claim,) = load(text, tmp_path)
    assert claim.judge(by_time(claim, FAST, SAME)).sentence == (
        "Pays at batch 1, launch-bound (1.21x [1.17, 1.26]); "
        "not with batch 64, compute-bound (1.01x [0.99, 1.02])"
    )
    assert claim.judge(by_time(claim, SAME, SAME)).sentence == (
        "Does not pay at batch 1, launch-bound (1.01x [0.99, 1.02]) or "
        "with batch 64, compute-bound (1.01x [0.99, 1.02])"
    )


def test_what_was_not_measured_is_named_with_its_reason(time_claim):
    first, second = (c.name for c in time_claim.conditions)
    verdict = time_claim.judge(by_time(time_claim, FAST, ABSENT))
    assert verdict.sentence.endswith(f"; not measured: {second} (no CUDA device)")
    verdict = time_claim.judge(by_time(time_claim, GONE, ABSENT))
    assert verdict.sentence == (
        f"Not measured: {first} (DALI is not installed); not measured: {second} (no CUDA device)"
    )


def test_nothing_measured_says_what_is_missing(time_claim):
    verdict = time_claim.judge(ABSENT)
    assert str(verdict) == "Not measured: no CUDA device"
    assert verdict._repr_html_().count("Not measured") == 1


def test_what_is_unsettled_says_whether_it_has_an_interval(time_claim):
    verdict = time_claim.judge(by_time(time_claim, FEW, STRADDLES))
    assert verdict.sentence == (
        "Unsettled for batch 1, launch-bound (1.30x [no interval]): too few repetitions for an "
        "interval; unsettled for batch 64, compute-bound (1.06x [1.01, 1.12]): "
        "the interval straddles the threshold"
    )
    remedy = "Give a larger budget_s"
    assert remedy in str(verdict)
    assert remedy not in str(time_claim.judge(by_time(time_claim, FAST, STRADDLES)))


def test_a_ratio_that_still_changes_settles_no_condition(time_claim):
    changing = dataclasses.replace(FEW, still_changing=True)
    verdict = time_claim.judge(by_time(time_claim, FAST, changing))
    assert verdict.conditions[1].verdict == "unsettled"
    assert verdict.conditions[1].reason == "the ratio was still changing"
    assert "too few" not in str(verdict)


def test_a_control_that_is_off_unsettles_what_was_measured_beside_it(time_claim):
    verdict = time_claim.judge(by_time(time_claim, FAST, ABSENT, OFF))
    assert [c.verdict for c in verdict.conditions] == ["unsettled", "not-measured"]
    assert verdict.conditions[0].reason == "the control came back faster"
    assert str(verdict).endswith("control 1.08x [1.05, 1.11], faster")
    unmeasured = time_claim.judge(by_time(time_claim, FAST, STRADDLES, ABSENT))
    reasons = [c.reason for c in unmeasured.conditions]
    assert reasons == ["the control was not measured", "the interval straddles the threshold"]


NUMBERS = {"exact": 3, "time": 1.5, "memory": 2.25, "accuracy": -7.0}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["holds", "fails", "unsettled", "not-measured"]),
            st.sampled_from(["wins", "cannot", "open", None]),
            st.sampled_from(["", "no GPU", "the interval straddles the threshold"]),
            st.sampled_from(["for", "with", ""]),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(list(NUMBERS)),
    st.sampled_from(["", "x", "points"]),
    st.booleans(),
)
def test_any_outcome_makes_a_sentence_that_names_each_condition_once(outcomes, kind, unit, truth):
    effect = truth if kind == "exact" and unit == "" else NUMBERS[kind]
    conditions = [
        Judged(f"<{n}>", verdict, effect, effect, effect, None, why, theory)
        for n, (verdict, theory, why, _) in enumerate(outcomes)
    ]
    wheres = [SimpleNamespace(name=f"<{n}>", where=o[3]) for n, o in enumerate(outcomes)]
    claim = SimpleNamespace(
        kind=kind, unit=unit, conditions=wheres, words={"holds": "confirmed", "fails": "refuted"},
        found={"true": "yes", "false": "no"},
    )  # fmt: skip
    tally, said = Tally.of(conditions), sentence(claim, conditions)
    counted = tally.holds + tally.fails + tally.unsettled + tally.missing
    assert counted == len(outcomes)
    alone = tally.missing == len(outcomes) and len({c.reason for c in conditions}) == 1
    assert [said.count(c.name) for c in conditions] == [int(not alone)] * len(outcomes)
    assert "depends" not in said + short(tally)
    assert said[0].isupper()
    # an independent count of what theory says
    right = {("wins", "holds"), ("cannot", "fails")}
    wrong = {("wins", "fails"), ("cannot", "holds")}
    pairs = [(theory, verdict) for verdict, theory, *_ in outcomes]
    assert tally.agrees == sum(pair in right for pair in pairs)
    assert tally.against == tuple(f"<{n}>" for n, pair in enumerate(pairs) if pair in wrong)
    assert ("against the mechanism" in short(tally)) == bool(tally.against)
    numbers = [int(part) for part in re.findall(r"\d+", short(tally).partition(";")[2])]
    if tally.settled and not tally.against:
        assert sum(numbers) == tally.unsettled + tally.missing
    for c in conditions:
        assert (
            agreement_of(c.verdict, c.theory)
            == c.agreement
            == Judged.from_row(c.as_row()).agreement
        )


def test_missing_and_undeclared_conditions_are_named(time_claim):
    found = {"batch 1, launch-bound": FAST, "batch 65": FAST}
    with pytest.raises(ValueError, match="lacks") as caught:
        time_claim.judge(found)
    said = str(caught.value)
    assert "lacks ['batch 64, compute-bound', 'control'] and has undeclared ['batch 65']" in said
    assert "01_pairing.toml declares ['batch 1, launch-bound', 'batch 64, compute-bound']" in said


@pytest.mark.parametrize("found", [1.2, True, Estimate(1.2, 1.1, 1.3, 5), "fast", None])
def test_time_takes_nothing_but_comparisons(time_claim, found):
    with pytest.raises(TypeError, match=r"needs a Comparison, as from claim\.compare"):
        time_claim.judge(by_time(time_claim, FAST, found))
    with pytest.raises(TypeError, match="'control': time needs a Comparison"):
        time_claim.judge(by_time(time_claim, FAST, FAST, found))


def test_evidence_must_be_a_mapping(time_claim):
    with pytest.raises(TypeError, match=r"must map each of \['batch 1"):
        time_claim.judge([FAST, SAME])


ACCURACY = TIME.replace('kind = "time"', 'kind = "accuracy"\nunit = "points"').replace(
    ">= 1.05", ">= 5"
)


def test_accuracy_needs_an_estimate_over_seeds_in_the_unit_of_the_claim(tmp_path):
    (claim,) = load(ACCURACY, tmp_path)
    first, second = (c.name for c in claim.conditions)
    good = estimate_mean([9.0, 10.0, 11.0], unit="points")
    assert claim.judge({first: good, second: good}).verdict == "holds in both"
    with pytest.raises(TypeError, match="needs an Estimate over several seeds"):
        claim.judge({first: good, second: 10.0})
    with pytest.raises(ValueError, match="is in '%', the claim in 'points'"):
        claim.judge({first: good, second: estimate_mean([9.0, 10.0], unit="%")})
    with pytest.raises(ValueError, match="is no interval"):
        claim.judge({first: good, second: Estimate(1.0, 2.0, 1.0, 3)})
    with pytest.raises(ValueError, match="is no interval"):
        claim.judge({first: good, second: Estimate(1.0, math.nan, 1.0, 3)})
    with pytest.raises(ValueError, match=r"undeclared \['control'\]"):
        claim.judge({first: good, second: good, "control": QUIET})


class Scalar:
    """Stands for a NumPy scalar or a tensor: a number behind ``item()``."""

    def __init__(self, value):
        self.value = value

    def item(self):
        return self.value


@pytest.mark.parametrize(
    ("threshold", "found", "verdict"),
    [
        (">= 0.3", 1.461, "holds"),
        (">= 0.3", 0.2, "fails"),
        (">= 0.3", 0.3, "holds"),
        ("> 0.3", 0.3, "fails"),
        ("<= 1e-6", 0, "holds"),
        (">= 0.3", math.nan, "fails"),
        ("<= 0.3", math.nan, "fails"),
        ("== 0", math.nan, "fails"),
        (">= 0.3", math.inf, "holds"),
        ("== 2", 2, "holds"),
        ("== true", True, "holds"),
        ("== true", False, "fails"),
        ("== false", Scalar(False), "holds"),
        ("== 1", True, "holds"),
        (">= 0.3", Scalar(0.5), "holds"),
        (">= 0.3", ABSENT, "not-measured"),
    ],
)
def test_an_exact_number_is_compared_as_it_is(exact_claim, threshold, found, verdict):
    (judged,) = exact_claim(threshold).judge({"ten classes": found}).conditions
    assert judged.verdict == verdict


@pytest.mark.parametrize(
    ("threshold", "found", "said"),
    [
        ("<= 1e-6", True, "asks for a number, got True"),
        ("== true", 1, "asks for True or False"),
        (">= 0.3", "0.5", "expected a number or a truth value"),
        (">= 0.3", None, "expected a number or a truth value"),
        (">= 0.3", Scalar([1, 2]), "expected a number or a truth value"),
        (">= 0.3", Estimate(1.0, 0.9, 1.1, 3), "an exact claim needs a number"),
        (">= 0.3", FAST, "expected a number or a truth value"),
    ],
)
def test_exact_evidence_of_another_type_is_refused(exact_claim, threshold, found, said):
    with pytest.raises(TypeError) as caught:
        exact_claim(threshold).judge({"ten classes": found})
    assert said in str(caught.value)
    assert "pairing.floor, condition 'ten classes'" in str(caught.value)


@pytest.mark.parametrize("reason", ["", "  ", None, 3])
def test_not_measured_wants_a_reason(reason):
    with pytest.raises(ValueError, match="say what is missing"):
        claims.not_measured(reason)


def test_compare_measures_with_the_threshold_and_band_of_the_claim(time_claim, monkeypatch):
    asked = {}
    monkeypatch.setattr("dlhelpers.measure.compare", lambda a, b, **kw: asked.update(kw) or FAST)
    assert time_claim.compare(int, int, budget_s=1.0) is FAST
    assert asked == {"threshold": 1.05, "negligible": 0.03, "overtime": 2.0, "budget_s": 1.0}


def test_compare_takes_the_threshold_of_a_condition(tmp_path, monkeypatch):
    text = TIME.replace('why = "the same', 'threshold = ">= 1.5"\nwhy = "the same')
    (claim,) = load(text, tmp_path)
    monkeypatch.setattr("dlhelpers.measure.compare", lambda a, b, **kw: kw["threshold"])
    assert claim.compare(int, int, condition="batch 64, compute-bound") == 1.5
    with pytest.raises(ValueError, match="got 'batch 65'"):
        claim.compare(int, int, condition="batch 65")


def test_compare_is_refused_where_the_claim_is_not_about_time(exact_claim):
    with pytest.raises(TypeError, match="kind exact"):
        exact_claim(">= 0.3").compare(int, int)


# The ledger's row


def test_judging_writes_one_row_a_claim(time_claim):
    time_claim.judge(by_time(time_claim, FAST, FAST))
    time_claim.judge(by_time(time_claim, SAME, STRADDLES))
    (row,) = ledger.read()["rows"]
    assert row["control"] == {"effect": 1.0, "low": 0.98, "high": 1.02, "outcome": "no difference"}
    first, second = row["conditions"]
    assert first == {
        "name": "batch 1, launch-bound", "verdict": "fails", "agreement": "against",
        "effect": 1.01, "low": 0.99, "high": 1.02, "threshold": ">= 1.05", "theory": "wins",
        "since": "2026-01-02", "reason": "",
    }  # fmt: skip
    assert (second["verdict"], second["agreement"]) == ("unsettled", None)
    assert second["reason"] == "the interval straddles the threshold"


def test_no_interval_and_nan_are_null_in_the_ledger(time_claim, exact_claim):
    time_claim.judge(by_time(time_claim, comparison(1.3, 0.0, math.inf, "undecided"), FAST))
    exact_claim(">= 0.3").judge({"ten classes": math.nan})
    first, second = ledger.read()["rows"]
    (few, _), (nan,) = first["conditions"], second["conditions"]
    assert (few["low"], few["high"]) == (0.0, None)
    assert (nan["effect"], nan["verdict"]) == (None, "fails")


def test_judging_where_nothing_can_be_written_gives_one_warning(exact_claim, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DLHELPERS_LEDGER", str(tmp_path / "file" / "ledger.json"))
    claim = exact_claim(">= 0.3")
    with pytest.warns(UserWarning, match="Set the environment variable DLHELPERS_LEDGER"):
        claim.judge({"ten classes": 1.0})
    with warnings.catch_warnings(action="error"):
        assert claim.judge({"ten classes": 1.0}).verdict == "holds"


# Cards


@pytest.mark.parametrize(
    ("threshold", "found", "said"),
    [
        (">= 0.3", 1.46123456, "1.461"),
        (">= 0.3", 11904.7, "11900"),
        ("<= 1e-6", 3.3e-8, "within 1e-6"),
        ("<= 1e-6", 2.0, "beyond 1e-6"),
        ("< 1e-6", 1e-7, "within 1e-6"),
        ("<= 1e-6", math.nan, "not a number"),
        (">= 0.3", math.inf, "infinite"),
        (">= 0.3", -math.inf, "minus infinite"),
        ("<= 0", 0, "0"),
        ("<= -1.2", -1.25, "-1.25"),
        ("<= 100", 12, "12"),
        (">= -1", -0.0, "0"),
        ("== true", True, "yes"),
        ("== true", False, "no"),
    ],
)
def test_an_exact_card_puts_the_value_alone_into_words(exact_claim, threshold, found, said):
    verdict = exact_claim(threshold).judge({"ten classes": found})
    assert verdict.sentence.endswith(f"for ten classes ({said})")
    assert verdict.machine == ""


def test_truth_values_and_counts_are_put_into_words(tmp_path):
    found = 'found = {true = "an error is raised", false = "no error is raised"}\nsince ='
    (claim,) = load(EXACT.format(threshold="== true").replace("since =", found), tmp_path)
    verdict = claim.judge({"ten classes": False})
    assert verdict.sentence == "Refuted for ten classes (no error is raised)"
    assert asked(claim) == "loss of a perfect output: yes"
    counts = EXACT.format(threshold="== 0").replace("since =", 'unit = "images"\nsince =')
    (claim,) = load(counts, tmp_path)
    said = [effect_text(claim, claim.judge({"ten classes": n}).conditions[0]) for n in (0, 1, 2)]
    assert said == ["0 images", "1 image", "2 images"]
    assert asked(claim) == "loss of a perfect output: 0"


def test_an_exact_card_is_the_same_on_two_machines_and_two_roundings(exact_claim, monkeypatch):
    claim, shown = exact_claim("<= 1e-6"), []
    for line, error in (("one machine", 3.0e-8), ("another machine", 1.2e-7)):
        monkeypatch.setattr(
            ledger, "describe_machine", lambda line=line: {"line": line, "key": "k"}
        )
        verdict = claim.judge({"ten classes": error})
        shown.append((str(verdict), verdict._repr_html_()))
    assert shown[0] == shown[1]
    assert "machine" not in shown[0][1]


def test_a_timed_card_shows_intervals_threshold_control_and_machine(time_claim):
    page = time_claim.judge(by_time(time_claim, FAST, SAME))._repr_html_()
    for said in (
        "Holds in 1 of 2, as the mechanism says", "1.21x [1.17, 1.26]", "1.00x [0.98, 1.02]",
        "this machine", "latency unfused / fused &gt;= 1.05x", "as of 2026-01-02",
    ):  # fmt: skip
        assert said in page
    # side by side, a row a condition
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    for row, theory in zip(rows[1:3], ("must hold: fewer", "cannot hold: the same"), strict=True):
        assert theory in row
        assert "as it says" in row
    assert page.count("<img") == 4  # the axis, two conditions, the control
    assert "<script" not in page


@given(st.text(max_size=30), st.text(min_size=1, max_size=30).filter(str.strip))
@example("<script>alert(1)</script>", "'\"><img src=x onerror=alert(1)>")
def test_arbitrary_text_is_escaped_in_cards(says, reason):
    condition = SimpleNamespace(
        name=says,
        theory="wins",
        why=reason,
        threshold=Threshold(">=", 1.05),
        since=says,
        where=says,
    )
    claim = SimpleNamespace(
        id=says, says=says, kind="time", metric=reason, threshold=Threshold(">=", 1.05), unit=says,
        conditions=(condition,), control=False, asks=(says,), sized="", axis=None,
        words={"holds": says, "fails": says}, found={"true": says, "false": says},
    )  # fmt: skip
    for found in (judging.not_measured(reason), FAST):
        both = Said(says, "holds", 2, reason), Said(says, 2.0, None, None)
        verdict = judging.settle(claim, {says: found}, both)
        page = verdict_html(dataclasses.replace(verdict, earlier=both))
        assert tags_of(page) <= {
            "div", "b", "table", "tbody", "tr", "td", "img", "small", "code", "span", "br",
            "details", "summary",
        }  # fmt: skip


def svgs_of(page):
    return [
        base64.b64decode(data).decode()
        for data in re.findall(r"data:image/svg\+xml;base64,([^\"]*)", page)
    ]


def tags_of(page):
    from html.parser import HTMLParser

    tags = set()
    parser = HTMLParser(convert_charrefs=True)
    parser.handle_starttag = lambda tag, attributes: tags.add(tag)
    parser.feed(page)
    parser.close()
    return tags


@given(
    st.floats(1e-3, 1e3), st.floats(0, 1e3), st.floats(0, 1e3), st.booleans(), st.floats(0.5, 2.0)
)
@example(1.0, 0.0, math.inf, True, 1.05)
def test_an_interval_is_drawn_inside_its_picture(effect, a, b, log, bound):
    low, high = sorted((a, b))
    threshold = Threshold(">=", bound)
    judged = Judged("x", "holds", effect, low, high, threshold)
    scale = Scale.over([judged], log=log)
    picture = interval(effect, low, high, threshold, scale, "holds")
    lines = re.findall(r'points="([^"]*)"', picture.svg)
    numbers = [float(point.split(",")[0]) for line in lines for point in line.split()]
    assert len(lines) == 3 + log
    assert all(0 <= number <= picture.width for number in numbers)
    assert f"{effect:.3g}, interval" in picture.alt
    assert scale.x(low) <= scale.x(high)
    assume(low < effect < high)
    assert scale.x(low) <= scale.x(effect) <= scale.x(high)


@pytest.mark.parametrize(
    ("kind", "unit", "numbers", "said"),
    [
        ("accuracy", "points", (-10.0, -12.5, -7.52), "-10 [-12.5, -7.52] points"),
        ("accuracy", "points", (1.0, 0.5, 1.5), "1 [0.5, 1.5] points"),
        ("memory", "", (4.0, 4.0, 4.0), "4"),
        ("memory", "x", (4.0, 4.0, 4.0), "4x"),
        ("memory", "bytes", (1, 1, 1), "1 byte"),
        ("exact", "dB", (1, 1, 1), "1 dB"),
        ("time", "", (1.3, 0.0, None), "1.30x [no interval]"),
        ("time", "", (250.0, 240.0, 260.0), "250x [240, 260]"),
        ("exact", "", (None, None, None), "not finite"),
    ],
)
def test_effects_keep_their_unit_and_say_where_there_is_no_interval(kind, unit, numbers, said):
    claim = SimpleNamespace(kind=kind, unit=unit, found={})
    assert effect_text(claim, Judged("x", "fails", *numbers, threshold=None)) == said


@pytest.mark.parametrize(
    ("unit", "found", "said", "bound"),
    [
        ("% of the file", 0.25, "25 % of the file", ">= 50 %"),
        ("% of the file", 1, "100 % of the file", ">= 50 %"),
        ("a loss of {}", -0.5, "a loss of -0.5", ">= 0.5"),
        ("steps of 1/255", 1, "1 step of 1/255", ">= 0.5"),
        ("steps of 1/255", 2, "2 steps of 1/255", ">= 0.5"),
        ("differing values", 1, "1 differing value", ">= 0.5"),
        ("x", math.inf, "infinite", ">= 0.5x"),
        ("% of the file", math.nan, "not a number", ">= 50 %"),
    ],
)
@pytest.mark.parametrize("kind", ["exact", "memory"])
def test_a_count_or_a_share_has_its_word(exact_claim, kind, unit, found, said, bound):
    claim = dataclasses.replace(exact_claim(">= 0.5"), unit=unit, kind=kind)
    judged = Judged("x", "fails", found, found, found, claim.threshold)
    assert effect_text(claim, judged) == said
    counted = kind == "exact" or "%" in unit or "{" in unit or unit == "x"
    assert not counted or asked(claim).endswith(f" {bound}")


def test_seeds_that_all_gave_the_same_are_no_interval():
    claim = SimpleNamespace(kind="accuracy", unit="points")
    judged = Judged("x", "fails", 0.0, 0.0, 0.0, Threshold(">=", 5.0))
    assert effect_text(claim, judged) == "0 points each time"


def test_what_stands_before_names_is_said_once_but_for_its_preposition():
    where = SimpleNamespace(where="with the")
    conditions = [SimpleNamespace(name=name, where=where.where) for name in "AB"]
    claim = SimpleNamespace(
        kind="time", unit="", conditions=conditions, words={"holds": "pays", "fails": "fails"}
    )
    judged = [Judged(name, "holds", 2.0, 2.0, 2.0, None) for name in "AB"]
    assert sentence(claim, judged) == "Pays with the A (2.00x) and the B (2.00x)"


@pytest.mark.parametrize(
    ("control", "said"),
    [
        ((1.0, 0.98, 1.02, "no difference"), ("1.00x [0.98, 1.02]", "")),
        ((1.1, 0.99, 1.23, "undecided"), ("1.10x [0.99, 1.23]", "too wide to rule out 1.1x")),
        ((0.95, 0.88, 1.02, "undecided"), ("0.95x [0.88, 1.02]", "too wide to rule out 1.1x")),
        ((1.0, 0.0, None, "undecided"), ("1.00x [no interval]", "too few repetitions to tell "
                                         "anything")),
        ((0.8, 0.7, 0.9, "slower"), ("0.80x [0.70, 0.90]", "slower")),
        ((None, None, None, "not measured"), ("", "not measured")),
    ],
)  # fmt: skip
def test_a_control_says_what_it_cannot_rule_out(control, said):
    bars = [Threshold(">=", 1 / 1.1), Threshold("<=", 3.0), None]
    assert judging.Control(*control).told(bars) == said


@pytest.mark.parametrize(
    ("tally", "colour"),
    [
        (Tally(holds=1, agrees=1), "TREATMENT"),
        (Tally(holds=1, agrees=1, unsettled=2), "BASELINE"),
        (Tally(holds=1, agrees=1, missing=1), "TREATMENT"),
        (Tally(holds=1, unsettled=3, against=("batch 64",)), "FAILING"),
        (Tally(holds=1), "BASELINE"),
        (None, "BASELINE"),
    ],
)
def test_the_bar_of_a_claim_is_grey_where_little_is_settled(tally, colour):
    from dlhelpers.course import plots

    assert bar_colour(tally) == getattr(plots, colour)


def test_a_card_outside_ipython_shows_nothing_and_prints_everything(declared, capsys):
    claim = claims.card("fusion.speeds-up")
    assert capsys.readouterr().out == ""
    assert str(claim).splitlines() == [
        "CLAIM fusion.speeds-up",
        "  claim     Fusing is faster.",
        "  tip       A wrong pair fails. (a README, 2021)",
        "  source    a paper, table 1",
        "  holds if  latency unfused / fused >= 1.05x (time)",
        "  - batch 1, launch-bound",
        "  - batch 64, compute-bound",
    ]


def test_the_card_of_a_claim_gives_nothing_away_of_what_theory_says():
    for claim in claims.all_claims():
        page = claim_text(claim) + claim_html(claim)
        assert all(condition.why not in page for condition in claim.conditions)
        assert not any(word in page for word in ("theory", "must hold", "cannot hold"))


def test_a_condition_that_is_no_longer_declared_gives_no_advice(time_claim):
    (tip,) = (tip for tip in claims.all_tips() if tip.id == "pair-failure")
    old = judging.settle(time_claim, by_time(time_claim, FAST, SAME)).conditions[0]
    assert advice(tip, time_claim, [dataclasses.replace(old, name="batch 2")]) == "Not run."
    assert old.name in advice(tip, time_claim, [old])


# The course's own tips and claims


def settled_by(notebook):
    """Return the ids that a notebook's code passes to ``claims.card`` or ``card``."""
    ids = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        for node in ast.walk(ast.parse("\n".join(lines))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name == "card" and isinstance(node.args[0], ast.Constant):
                ids.append(node.args[0].value)
    return ids


def test_settled_by_reads_calls_and_not_text():
    cell = {"cell_type": "code", "source": ['a = claims.card("x.y")\n', 'card("x.z")  # card("n")']}
    text = {"cell_type": "markdown", "source": 'claims.card("no")'}
    assert settled_by({"cells": [cell, text]}) == ["x.y", "x.z"]


def test_every_notebook_has_a_lesson_and_every_lesson_a_notebook():
    assert [lesson.stem for lesson in claims.lessons()] == [path.stem for path in NOTEBOOKS]


def test_a_lesson_that_takes_a_claim_of_another_one_is_an_error(monkeypatch, tmp_path):
    for stem in ("01_pairing", "02_lmdb_io"):
        (tmp_path / f"{stem}.toml").write_text(TIME, encoding="utf-8")
    tips = tmp_path / "tips.toml"
    tips.write_text(TIPS, encoding="utf-8")
    known = catalog.load_tips(tips)
    monkeypatch.setattr(catalog, "_lesson_files", lambda: sorted(tmp_path.glob("0*.toml")))
    monkeypatch.setattr(catalog, "load_tips", lambda path: known)
    with pytest.raises(ValueError, match=r"02_lmdb_io\.toml: 01_pairing has claim"):
        catalog.all_claims.__wrapped__()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("pairing", 'title = "P"\nlearn = "l"', "named as its notebook"),
        ("1_pairing", 'title = "P"\nlearn = "l"', "named as its notebook"),
        ("01_pairing", 'title = "P"', "lacks the key 'learn'"),
        ("01_pairing", 'title = "P"\nlearn = "l"\nminutes = 3\nhours = 1', "unknown key 'hours'"),
        ("01_pairing", 'title = "P"\nlearn = "l"', "lacks the key 'minutes'"),
    ],
)
def test_a_bad_lesson_is_an_error_that_names_the_file(name, text, said, tmp_path):
    path = tmp_path / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said) as caught:
        catalog._lesson(path)
    assert path.name in str(caught.value)


def test_a_tip_names_the_notebooks_that_have_claims_of_it():
    for tip in claims.all_tips():
        stems = {claim.notebook for claim in claims.all_claims() if claim.tip == tip.id}
        assert set(tip.notebooks) == stems, tip.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_settles_each_of_its_claims_once_and_no_other(path):
    settled = settled_by(json.loads(path.read_text(encoding="utf-8")))
    declared = [claim.id for claim in claims.all_claims() if claim.notebook == path.stem]
    assert sorted(settled) == sorted(declared)


def test_the_catalogue_holds_what_its_files_hold():
    folder = ROOT / "dlhelpers" / "course"
    rows = [tomllib.loads(path.read_text("utf-8")) for path in (folder / "lessons").glob("*.toml")]
    tips = tomllib.loads((folder / "tips.toml").read_text("utf-8"))
    assert len(claims.all_tips()) == len(tips["tip"])
    assert len(claims.all_claims()) == sum(len(one.get("claim", [])) for one in rows)


def test_what_a_truth_value_means_is_said_by_every_claim_that_asks_for_one():
    for claim in claims.all_claims():
        asks = isinstance(claim.threshold.bound, bool)
        assert asks == (claim.found != {"true": "yes", "false": "no"}), claim.id


@pytest.mark.parametrize(
    "path", sorted((ROOT / "data" / "ledgers").glob("*.json")), ids=lambda path: path.stem
)
def test_the_sentences_of_the_committed_ledgers_read_as_sentences(path):
    declared = {claim.id: claim for claim in claims.all_claims()}
    for row in ledger.read(path)["rows"]:
        conditions = [Judged.from_row(c) for c in row["conditions"]]
        said = f"{headline(Tally.of(conditions))}. {sentence(declared[row['id']], conditions)}."
        assert not re.search(r"\((True|False|None|nan)\b|\bdepends\b|  | \(\)", said), said
        assert not re.search(r"\b(?:[02-9]|\d\d+) (?:image|record|value|year|result)\b", said), said
        for c in conditions:
            assert c.verdict == "not-measured" or " ".join(c.name.split()) in said


def test_importing_claims_loads_neither_torch_nor_matplotlib():
    code = (
        "import sys; from dlhelpers.course import claims, ledger, report; claims.all_claims();"
        "print([m for m in ('torch', 'matplotlib', 'IPython', 'ipywidgets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stderr


# The course as it stands on this machine


@pytest.fixture
def standing(declared, monkeypatch):
    from dlhelpers.course.claims import course

    monkeypatch.setattr(course, "all_claims", lambda: declared)
    monkeypatch.setattr(course, "all_tips", catalog.all_tips)
    return course.standing


def test_the_standing_counts_each_tips_conditions(declared, standing):
    before = standing()
    assert before.counts == {"not run": 3}
    assert "no notebook has been run" in str(before)
    timed, exact = declared
    exact.judge({c.name: 0.5 for c in exact.conditions})
    assert standing().counts == {"holds": 1, "not run": 2}
    timed.judge(by_time(timed, FAST, FAST))
    after = standing()
    assert after.counts == {"holds": 3}
    assert after.machine == "this machine"
    assert after.against == ((timed.id, "batch 64, compute-bound"),)
    assert "2 of 3 as the mechanism says" in str(after)
    assert "AGAINST THE MECHANISM: fusion.speeds-up: batch 64, compute-bound" in str(after)
    assert "1 against the mechanism" in after._repr_html_()


def test_the_standing_says_why_a_condition_is_unsettled(declared, standing):
    timed, _ = declared
    timed.judge(by_time(timed, FAST, STRADDLES, control=OFF))
    first, second = (c.name for c in timed.conditions)
    assert standing().unsettled == (
        (timed.id, first, "the control came back faster"),
        (timed.id, second, "the interval straddles the threshold"),
    )
    assert timed.id in standing()._repr_html_()


def test_what_is_missing_says_how_to_light_it(monkeypatch):
    from dlhelpers import machine
    from dlhelpers.course.claims import lights

    here = machine.describe()
    bare = {extra: dict.fromkeys(names) for extra, names in here.extras.items()}
    dark = dataclasses.replace(here, extras=bare, simd=(), compiler=None, cuda_devices=())
    monkeypatch.setattr(machine, "describe", lambda: dark)
    monkeypatch.setattr(lights.sys, "platform", "linux")
    found = claims.lights_up()
    assert not any(light.on for light in found)
    assert 'pip install "dlhelpers[engines]"' in str(found)
    assert "another machine" in found._repr_html_()
    bright = dataclasses.replace(
        dark, cuda_devices=("a GPU",), simd=("avx_vnni", "amx_bf16"), compiler="/usr/bin/c++",
        extras={extra: dict.fromkeys(names, "1.0") for extra, names in bare.items()},
    )  # fmt: skip
    monkeypatch.setattr(machine, "describe", lambda: bright)
    assert all(light.on for light in claims.lights_up())
    assert "pip install" not in str(claims.lights_up())
    monkeypatch.setattr(machine, "describe", lambda: dark)
    monkeypatch.setattr(lights.sys, "platform", "darwin")
    [dali] = [light for light in claims.lights_up() if light.name == "DALI"]
    assert dali.get == "a machine with Linux"


def test_a_card_folds_who_says_the_tip_and_names_what_is_measured_besides():
    asking = catalog.find("shufflenet.few-groups")
    page = claim_html(asking)
    assert html.escape(asking.source) in page
    assert "also measured" in page
    silent = next(claim for claim in claims.all_claims() if not claim.asks)
    assert "also measured" not in claim_html(silent)
    assert "conditions" in claim_html(silent)
