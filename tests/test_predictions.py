"""Are predictions noted, kept and scored, and can none be right without looking at the claim?"""

import json
import math
import random
import re
import sys
from collections import Counter
from datetime import date
from html import escape
from pathlib import Path

import pytest

from dlhelpers.course import claims, ledger, notebook
from dlhelpers.course.claims import cards, catalog, predictions, said
from dlhelpers.measure import Comparison

LEDGERS = sorted((Path(__file__).parent.parent / "data" / "ledgers").glob("*.json"))
CLAIM = """
[[tip]]
id = "a-tip"
says = "Fuse."
said_by = "a README, 2021"
"""
CLAIMS = """
[[claim]]
id = "fusion.speeds-up"
tip = "a-tip"
says = "Fusing is faster."
source = "a paper, table 1"
kind = "time"
metric = "latency unfused / fused"
threshold = ">= 1.05"
since = 2026-01-02
words = {holds = "pays", fails = "does not pay"}
ask = ["batch 1", "batch 64"]
size = "batch 1"
[[claim.condition]]
name = "batch 1"
theory = "wins"
why = "fewer launches"
[[claim.condition]]
name = "batch 64"
theory = "open"
why = "who knows"
"""


def comparison(speedup, low, high, outcome="faster"):
    return Comparison(
        speedup, low, high, outcome, 50, 2e-3, 1e-3, 0.95, 0.03, 1.05, (speedup,), "cpu", 2, 1.0
    )


FAST, SAME = comparison(1.5, 1.4, 1.6), comparison(1.01, 0.99, 1.02, "no difference")
OPEN = comparison(1.05, 0.99, 1.2)


def evidence(first, second):
    return {"batch 1": first, "batch 64": second, "control": SAME}


@pytest.fixture
def claim(monkeypatch, tmp_path):
    """A claim of its own, with a ledger and a registry of this test alone."""
    monkeypatch.setenv("DLHELPERS_LEDGER", str(tmp_path / "ledger.json"))
    monkeypatch.setattr(ledger, "describe_machine", lambda: {"line": "this machine", "key": "k"})
    monkeypatch.setattr(predictions, "_said", {})
    monkeypatch.setattr(predictions, "_closed", set())
    (tmp_path / "tips.toml").write_text(CLAIM, encoding="utf-8")
    (tmp_path / "06_fusion.toml").write_text(CLAIMS, encoding="utf-8")
    tips = catalog.load_tips(tmp_path / "tips.toml")
    declared = catalog.load(tmp_path / "06_fusion.toml", tips)
    monkeypatch.setattr(catalog, "all_claims", lambda: declared)
    monkeypatch.setattr(catalog, "all_tips", lambda: tips)
    return declared[0]


@pytest.fixture
def displayed(monkeypatch):
    """Act as IPython and keep what is displayed."""
    shown = []
    for module in (predictions, notebook):
        monkeypatch.setattr(module, "in_ipython", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    return shown


def new_session(monkeypatch, day):
    monkeypatch.setattr(predictions, "_said", {})
    monkeypatch.setattr(predictions, "_closed", set())

    class Clock(predictions.datetime):
        @classmethod
        def now(cls, zone):
            return cls(2026, 1, day, tzinfo=zone)

    monkeypatch.setattr(predictions, "datetime", Clock)


# Asking


def test_the_card_of_a_claim_asks_and_its_text_is_the_same_in_every_run(claim, displayed):
    claims.card(claim.id)
    claims.answer(claim.id, "batch 1", "holds")
    claims.card(claim.id)
    card, question, again, asked_again = displayed
    assert card["text/plain"] == again["text/plain"]
    assert (
        question["text/plain"]
        == asked_again["text/plain"]
        == (
            "Predict before you run on: pays or does not pay?\n"
            + "".join(f"  - {name}\n" for name in predictions.shuffled(claim))
            + "How large will it be? batch 1: latency unfused / fused"
        )
    )
    assert "application/vnd.jupyter.widget-view+json" in question
    assert not any(word in question["text/plain"] for word in ("wins", "fewer launches"))


def rows_of(claim):
    """Condition -> its buttons in order, and the line that says what was noted; the slider."""
    _, *rows, sized = predictions._widget(claim).children
    found = {}
    for row in rows:
        name, scale = row.children
        low, *buttons, high, note = scale.children
        assert ("does not pay" in low.value, "pays" in high.value) == (True, True)
        found[name.value] = (buttons, note)
    return found, sized.children[1].children


def test_one_tap_notes_condition_and_sureness_until_the_verdict_is_shown(claim):
    rows, _ = rows_of(claim)
    buttons, note = rows["batch 1"]
    buttons[5].click()
    assert note.value == "noted: pays (sure)"
    buttons[1].click()
    assert note.value == "noted: does not pay (likely)"
    assert [bool(b.style.button_color) for b in buttons] == [False, True, *[False] * 4]
    assert rows_of(claim)[0]["batch 1"][1].value == note.value, "running the cell again shows it"
    verdict = claim.judge(evidence(FAST, SAME))
    assert [(p.condition, p.says, p.sure) for p in verdict.said] == [("batch 1", "fails", 2)]
    for late in (buttons[4], buttons[1], buttons[2]):  # another, the same, and less sure of it
        note.value = ""
        late.click()
        assert "the verdict is on the screen" in note.value
    with pytest.raises(ValueError, match=r"the verdict of .* is on the screen"):
        claims.answer(claim.id, "batch 1", "fails", 1)
    claims.answer(claim.id, "batch 1", "fails", 2)  # the same cell run again
    assert predictions.given(claim.id)[0].says == "fails"


def test_a_slider_notes_the_size(claim):
    _, (slider, button, note) = rows_of(claim)
    assert note.value == "", "nothing is noted before the reader says something"
    button.click()
    assert predictions.given(claim.id)[0].says == 1.0, "where the slider is, without moving it"
    assert note.value.startswith("noted: 1")
    slider.value = 3.0
    assert note.value.startswith("noted: 3")
    verdict = claim.judge(evidence(FAST, SAME))
    assert verdict.said[0].says == pytest.approx(3.0, rel=0.03)
    assert "off by 2 times" in verdict._repr_html_()
    for late in (lambda: setattr(slider, "value", 1.5), button.click):
        note.value = ""
        late()
        assert "the verdict is on the screen" in note.value


def test_without_ipywidgets_the_questions_are_text(claim, displayed, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    claims.card(claim.id)
    assert list(displayed[1]) == ["text/plain"]


def test_outside_ipython_nothing_is_shown(claim, capsys):
    claims.card(claim.id)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda id: claims.answer(id, "batch 2", "holds"), "asked are .'batch 1', 'batch 64'."),
        (lambda id: claims.answer(id, "batch 1", "perhaps"), "holds or fails, got 'perhaps'"),
        (lambda id: claims.answer(id, "batch 1", "holds", 4), "1 .a guess., 2 .*got 4"),
        (lambda id: claims.answer(id, "batch 1", "holds", True), "1 .a guess., 2 .*got True"),
        (lambda id: claims.answer(id, "batch 1", "holds", [3]), "1 .a guess., 2 .*got .3."),
        (lambda id: claims.guess(id, "batch 64", 2.0), "asked are .'batch 1'."),
        (lambda id: claims.guess(id, "batch 1", 0), "positive number, got 0"),
        (lambda id: claims.guess(id, "batch 1", float("nan")), "positive number, got nan"),
        (lambda id: claims.guess(id, "batch 1", True), "positive number, got True"),
    ],
)
def test_what_is_not_asked_is_refused(claim, call, told):
    with pytest.raises(ValueError, match=told):
        call(claim.id)


# Judging


def test_who_was_not_asked_is_judged_and_asked_anew(claim, monkeypatch):
    verdict = claim.judge(evidence(FAST, SAME))
    assert "Not asked" in verdict._repr_html_()
    assert ledger.read()["rows"][0]["predictions"] == []
    with pytest.raises(ValueError, match=r"verdict of fusion\.speeds-up is on the screen"):
        claims.answer(claim.id, "batch 1", "holds")
    new_session(monkeypatch, 2)
    claims.answer(claim.id, "batch 1", "holds")
    assert claim.judge(evidence(FAST, SAME)).said


def test_the_card_of_a_verdict_shows_mechanism_prediction_and_measurement(claim):
    claims.answer(claim.id, "batch 1", "fails", 3)
    claims.answer(claim.id, "batch 64", "fails", 1)
    verdict = claim.judge(evidence(FAST, SAME))
    page = verdict._repr_html_()
    row = next(row for row in page.split("<tr>") if "<b>batch 1</b>" in row)
    assert row.index("must hold") < row.index("does not pay (sure)") < row.index("1.50x")
    assert "Your predictions: 1 of 2 right." in page
    assert str(verdict).endswith("you said of batch 64: does not pay (guess)")


def test_a_second_run_asks_anew_and_shows_both(claim, monkeypatch):
    for day, says in ((1, "fails"), (2, "holds")):
        new_session(monkeypatch, day)
        claims.answer(claim.id, "batch 1", says, 3)
        verdict = claim.judge(evidence(FAST, SAME))
    page = verdict._repr_html_()
    assert "pays (sure)<br><small>2026-01-01: does not pay (sure)</small>" in page
    (row,) = ledger.read()["rows"]
    assert [(p["says"], p["when"][:10]) for p in row["predictions"]] == [("holds", "2026-01-02")]
    assert [(p["says"], p["when"][:10]) for p in row["earlier"]] == [("fails", "2026-01-01")]
    claim.judge(evidence(FAST, SAME))  # the same session again changes nothing
    assert ledger.read()["rows"][0]["earlier"] == row["earlier"]
    new_session(monkeypatch, 3)
    later = claim.judge(evidence(FAST, SAME))  # Run All: nobody is asked, nothing is lost
    assert ledger.read()["rows"][0]["predictions"] == row["predictions"]
    assert [p.says for p in later.earlier] == ["fails", "holds"]


# Scoring


def test_the_score_stands_beside_folklores_and_the_mechanisms(claim):
    assert str(claims.score()) == "no predictions yet"
    claims.answer(claim.id, "batch 1", "fails", 3)
    claims.answer(claim.id, "batch 64", "fails", 1)
    claims.guess(claim.id, "batch 1", 3.0)
    claim.judge(evidence(FAST, SAME))
    assert str(claims.score()).split("\n") == [
        "1 of 2 predictions right; 'it always holds' 1, 'it never does' 1, "
        "the mechanism 1 of the 1 it predicts",
        "1 size, off by 2 times in the middle",
        "guess: 1 of 1 right",
        "sure: 0 of 1 right",
    ]
    assert "100 % right" in claims.score()._repr_html_()
    claim.judge(evidence(FAST, OPEN))
    assert claims.score().given == claims.score().open == 1


def test_the_score_agrees_with_counting(claim):
    chance = random.Random(0)
    verdicts = {"holds": "agrees", "fails": "against", "unsettled": None}
    rows, right, given, sizes = [], 0, 0, []
    for _ in range(60):
        verdict, says = chance.choice(list(verdicts)), chance.choice(["holds", "fails", 2.0])
        condition = {
            "name": "c", "verdict": verdict, "agreement": verdicts[verdict], "effect": 4.0,
            "low": 4.0, "high": 4.0, "threshold": ">= 1", "theory": "wins",
            "since": "2026-01-02", "reason": "",
        }  # fmt: skip
        told = {"condition": "c", "says": says, "sure": 2, "when": None}
        rows.append({"predictions": [told], "earlier": [], "conditions": [condition]})
        if says == 2.0:
            sizes.append(2.0)
        elif verdict != "unsettled":
            given, right = given + 1, right + (says == verdict)
    found = said.score_of(rows)
    assert (found.right, found.given) == (right, given)
    assert found.off_by == pytest.approx(sizes)
    assert found.folklore == found.mechanism
    assert found.sure == ((2, right, given),)


def test_the_score_of_a_broken_ledger_warns_and_goes_on(claim):
    Path(ledger.default_path()).write_text("{")
    with pytest.warns(UserWarning, match="is no ledger"):
        assert claims.score() == said.Score()


@pytest.mark.parametrize("found", [math.inf, math.nan, 0.0, -2.0, True, None])
def test_a_size_is_not_compared_with_what_is_no_positive_number(found):
    assert said.Said("c", 2.0, None, None).off_by(found) is None


@pytest.mark.parametrize("found", [1.0, 4.0])
def test_a_size_is_off_by_the_larger_of_both_ratios(found):
    assert said.Said("c", 2.0, None, None).off_by(found) == pytest.approx(2.0)


# The course's own questions


def as_listed(claim):
    shown, names = cards.claim_html(claim), [c.name for c in claim.conditions]
    item = r"<li>{}( \([^<]*)?</li>".format  # a threshold of its own follows in brackets
    return sorted(names, key=lambda n: re.search(item(re.escape(escape(n))), shown).start())


ORDERS = {"of the questions": predictions.shuffled, "of the card": as_listed}
RULES = {
    "it always holds": lambda place, count: True,
    "the first holds, the rest do not": lambda place, count: place == 0,
    "the last holds, the rest do not": lambda place, count: place == count - 1,
    "every other one": lambda place, count: place % 2 == 0,
    "the first half": lambda place, count: place < count / 2,
}


def rows_in(path):
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def verdicts_in(path):
    """(claim, condition that it asks) -> its verdict there, ``lacking`` where the row has none."""
    found = {
        (row["id"], c["name"]): c["verdict"] for row in rows_in(path) for c in row["conditions"]
    }
    asked = [(claim.id, name) for claim in claims.all_claims() for name in claim.asks]
    return {key: found.get(key, "lacking") for key in asked}


NEWEST = max(LEDGERS, key=lambda path: max(row["judged"] or "" for row in rows_in(path)))


@pytest.mark.parametrize("path", LEDGERS, ids=lambda path: path.stem)
def test_what_the_rules_are_not_tried_on_is_counted(path):
    verdicts = verdicts_in(path)
    since = {(claim.id, c.name): c.since for claim in claims.all_claims() for c in claim.conditions}
    written = date.fromisoformat(json.loads(path.read_text(encoding="utf-8"))["created"][:10])
    lacking = [key for key, verdict in verdicts.items() if verdict == "lacking"]
    assert [key for key in lacking if since[key] <= written] == [], "asked, but never run"
    if path == NEWEST:
        assert lacking == [], "run the course anew: a condition that is asked is new"
    count = Counter(verdicts.values())
    tried = count["holds"] + count["fails"]
    assert tried + sum(count[why] for why in ("unsettled", "not-measured", "lacking")) == sum(
        len(claim.asks) for claim in claims.all_claims()
    )
    assert tried >= 0.8 * len(verdicts), count


@pytest.mark.parametrize("path", LEDGERS, ids=lambda path: path.stem)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
def test_no_rule_that_looks_at_no_claim_is_often_right(path, rule, order):
    verdicts = verdicts_in(path)
    right = total = 0
    for claim in claims.all_claims():
        for place, name in enumerate(listed := ORDERS[order](claim)):
            if verdicts.get((claim.id, name)) in ("holds", "fails"):
                total += 1
                is_right = verdicts[claim.id, name] == "holds"
                right += RULES[rule](place, len(listed)) == is_right
    assert total == sum(verdict in ("holds", "fails") for verdict in verdicts.values())
    assert 0.4 <= right / total <= 0.6  # its opposite is a rule as well


def test_a_notebook_asks_for_twelve_taps_and_three_sizes_at_most():
    for lesson in claims.lessons():
        own = [claim for claim in claims.all_claims() if claim.notebook == lesson.stem]
        assert sum(len(claim.asks) for claim in own) <= 12
        assert sum(bool(claim.sized) for claim in own) <= 3
