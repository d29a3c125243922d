"""The ledger: strict JSON, one row a claim, nothing lost between processes or machines."""

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dlhelpers.course import ledger, ledger_schema
from dlhelpers.course.verdicts import Threshold

LEDGERS = sorted((Path(__file__).parent.parent / "data" / "ledgers").glob("*.json"))
MACHINE = {"line": "2 cores", "key": "here"}
DESCRIBE = ledger.describe_machine  # before the fixture below replaces it


@pytest.fixture(autouse=True)
def this_machine(monkeypatch):
    monkeypatch.setattr(ledger, "describe_machine", lambda: MACHINE)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "ledger.json"


def condition(verdict="holds", **changes):
    numbers = {"effect": 1.0, "low": 1.0, "high": 1.0}
    theory = {"threshold": ">= 0.3", "theory": "wins", "since": "2026-01-02", "reason": ""}
    agreement = {"holds": "agrees", "fails": "against"}.get(verdict)
    told = {"name": "ten classes", "verdict": verdict, "agreement": agreement}
    return told | numbers | theory | changes


def row(id="pairing.floor", verdict="holds", **changes):
    rest = {"control": None, "conditions": [condition(verdict)]}
    return {"id": id} | rest | changes


def old_row(id="pairing.floor", verdict="holds", **changes):
    """A row as schema 1 had it."""
    numbers = {"effect": 1.0, "low": 1.0, "high": 1.0}
    first = {"name": "ten classes", "verdict": "holds", "reason": ""} | numbers
    rest = {"control": None, "answer": None, "conditions": [first]}
    return {"id": id, "verdict": verdict} | numbers | rest | changes


def old_ledger(*rows):
    return {"schema": 1, "machine": MACHINE, "versions": {}, "created": "", "rows": list(rows)}


def test_a_ledger_holds_exactly_the_keys_of_its_schema(path):
    ledger.update(row(), path)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert list(found) == ["schema", "machine", "versions", "created", "rows"]
    keys = "id judged versions control predictions earlier axis conditions"
    assert " ".join(found["rows"][0]) == keys
    assert found["schema"] == 2
    assert found["machine"] == MACHINE
    assert {"python", "torch", "dlhelpers"} <= set(found["versions"])


def test_a_second_verdict_replaces_the_first_in_its_place(path):
    for id, verdict in (("a.x", "holds"), ("a.y", "holds"), ("a.x", "fails")):
        ledger.update(row(id, verdict), path)
    rows = ledger.read(path)["rows"]
    assert [(r["id"], r["conditions"][0]["verdict"]) for r in rows] == [
        ("a.x", "fails"),
        ("a.y", "holds"),
    ]


def told(says="holds", when="2026-01-01T00:00:00+00:00", condition="ten classes", sure=2):
    return {"condition": condition, "says": says, "sure": sure, "when": when}


def test_predictions_outlive_runs_without_any_and_move_on_when_new_ones_come(path):
    first, second = told("fails"), told("holds", "2026-01-03T00:00:00+00:00")
    kept = []
    for new in ([first], [], [second], [second]):
        written = ledger.update(row(predictions=new), path)
        (found,) = ledger.read(path)["rows"]
        assert written == found
        kept.append((found["predictions"], found["earlier"]))
    assert kept == [([first], []), ([first], []), ([second], [first]), ([second], [first])]


def test_an_answer_on_all_conditions_is_read_as_an_earlier_prediction(path):
    ledger.update(row(), path)
    found = json.loads(path.read_text(encoding="utf-8"))
    (old,) = found["rows"]
    del old["predictions"], old["earlier"], old["axis"]
    old |= {"answer": "some", "answered": "2026-01-01T00:00:00+00:00"}
    path.write_text(json.dumps(found), encoding="utf-8")
    (read,) = ledger.read(path)["rows"]
    assert read["earlier"] == [told("some", condition="", sure=None)]
    assert read["predictions"] == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null(path, value):
    ledger.update(row(conditions=[condition(effect=value, high=value)]), path)
    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    (kept,) = found["rows"][0]["conditions"]
    assert (kept["effect"], kept["high"]) == (None, None)


@settings(deadline=None)
@given(st.text(max_size=20), st.floats(allow_nan=False, allow_infinity=False))
@example("\ud800 lone surrogate", 1e308)
@example('"\\\n', 5e-324)
def test_any_text_and_finite_number_comes_back(tmp_path_factory, text, number):
    path = tmp_path_factory.mktemp("ledger") / "ledger.json"
    ledger.update(row(id=text, conditions=[condition(effect=number)]), path)
    (found,) = ledger.read(path)["rows"]
    assert (found["id"], found["conditions"][0]["effect"]) == (text, number)


BROKEN = [
    "",
    "{",
    "[]",
    '{"schema": 3, "machine": {}, "versions": {}, "created": "", "rows": []}',
    json.dumps({"schema": 2, "machine": {}, "versions": {}, "created": "", "rows": [old_row()]}),
    '{"schema": true, "machine": {}, "versions": {}, "created": "", "rows": []}',
    '{"schema": 1, "machine": {}, "versions": {}, "created": "", "rows": [3]}',
    '{"schema": 1, "machine": [], "versions": {}, "created": "", "rows": []}',
    '{"schema": 1, "rows": []}',
    json.dumps(
        {"schema": 1, "machine": {}, "versions": {}, "created": "", "rows": [old_row()] * 2}
    ),
    json.dumps(
        {
            "schema": 1,
            "machine": {"x": math.nan},
            "versions": {},
            "created": "",
            "rows": [],
        }
    ),
    "[" * 100_000,
    "\x00\xff",
]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_what_is_no_ledger_is_put_aside_and_never_lost(path, text):
    path.parent.mkdir()
    for number in (1, 2):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ledger.LedgerError, match="is no ledger"):
            ledger.read(path)
        with pytest.warns(UserWarning, match=f"put aside as ledger.json.bad-{number}"):
            ledger.update(row(), path)
        aside = path.with_name(f"ledger.json.bad-{number}")
        assert aside.read_bytes() == text.encode("latin-1")
        assert len(ledger.read(path)["rows"]) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conditions": [condition("depends")]}, "verdict 'depends' is none of"),
        ({"conditions": [condition(effect="1")]}, "effect must be a number or null"),
        ({"conditions": [condition(threshold="1.05")]}, "threshold must be text such as"),
        ({"conditions": [condition(threshold=1.05)]}, "threshold must be text such as"),
        ({"conditions": [condition(since="yesterday")]}, "since must be a day"),
        ({"conditions": [condition(theory="win")]}, "theory 'win' is none of wins, cannot, open"),
        ({"conditions": [condition(agreement="against")]}, "must be 'agrees'"),
        ({"conditions": [condition(agreement=None)]}, "must be 'agrees'"),
        ({"conditions": [condition("fails", theory=None)]}, "must be None"),
        ({"judged": "noon"}, "judged must be a time"),
        ({"predictions": [told(when="noon")]}, "when must be a time"),
        ({"predictions": [told(sure=4)]}, "sure must be 1, 2, 3 or null, got 4"),
        ({"predictions": [told("perhaps")]}, "says must be 'holds', 'fails' or a positive number"),
        ({"predictions": [told(-1.5, sure=None)]}, "predictions: says must be"),
        ({"earlier": [told(True, sure=None)]}, "earlier: says must be"),
        ({"earlier": [told(2.0, condition="")]}, "earlier: says must be"),
        ({"earlier": [{"says": 1}]}, "earlier: expected the keys condition, says, sure, when"),
        ({"predictions": None}, "predictions: must be a list"),
        ({"versions": "2.13"}, "versions must map"),
        ({"predictions": [told(says=None)]}, "predictions: says must be"),
        ({"conditions": [{"name": "x"}]}, "conditions: expected the keys"),
        ({"control": {"effect": 1}}, "control: expected the keys"),
        ({"more": 1}, "expected the keys"),
    ],
)
def test_a_row_that_breaks_the_schema_is_refused(path, changes, said):
    with pytest.raises(ledger.LedgerError, match="this row cannot be kept") as caught:
        ledger.update(row(**changes), path)
    assert said in str(caught.value)
    assert not path.exists()


def test_an_infinite_literal_in_a_file_reads_as_null(path):
    ledger.update(row(), path)
    path.write_text(path.read_text().replace('"effect": 1.0', '"effect": 1e999', 1))
    assert ledger.read(path)["rows"][0]["conditions"][0]["effect"] is None


# A ledger of schema 1


def read_old(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(old_ledger(*rows)), encoding="utf-8")
    return ledger.read(path)["rows"]


def test_what_an_old_row_lacks_is_unknown_and_nothing_of_it_is_lost(path):
    (found,) = read_old(path, old_row(answer="depends"))
    for key in ("judged", "versions"):
        assert found[key] is None
    (kept,) = found["conditions"]
    for key in ("threshold", "theory", "since", "agreement"):
        assert kept[key] is None
    assert {key: kept[key] for key in ("name", "verdict", "effect")} == {
        "name": "ten classes", "verdict": "holds", "effect": 1.0,
    }  # fmt: skip
    assert found["earlier"] == [told("some", when=None, condition="", sure=None)]


@pytest.mark.parametrize(
    ("changes", "control", "verdict", "reason"),
    [
        ({}, None, "holds", ""),
        ({}, "no difference", "holds", ""),
        ({}, "slower", "unsettled", "the control came back slower"),
        ({}, "not measured", "unsettled", "the control was not measured"),
        ({"verdict": "unsettled"}, None, "unsettled", "the interval straddles the threshold"),
        ({"verdict": "unsettled", "high": None}, None, "unsettled", "no interval, the reason is "
         "unknown"),
        ({"verdict": "unsettled", "high": None, "reason": "still warming up"}, None, "unsettled",
         "still warming up"),
        ({"verdict": "not-measured", "reason": "no GPU"}, "slower", "not-measured", "no GPU"),
    ],
)  # fmt: skip
def test_the_reason_of_an_old_row_is_what_it_tells(path, changes, control, verdict, reason):
    numbers = {"effect": 1.1, "low": 1.0, "high": 1.2}
    old = {"name": "x", "verdict": "holds", "reason": ""} | numbers | changes
    beside = control and numbers | {"outcome": control}
    (found,) = read_old(path, old_row(verdict="depends", control=beside, conditions=[old]))
    (kept,) = found["conditions"]
    assert (kept["verdict"], kept["reason"]) == (verdict, reason)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["holds", "fails", "unsettled", "not-measured"]),
            st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False),
            st.none() | st.floats(0, 9),
            st.sampled_from(["", "still warming up", "no GPU"]),
        ),
        max_size=4,
    ),
    st.sampled_from([None, "faster", "slower", "no difference", "undecided", "not measured"]),
    st.sampled_from([None, "holds", "fails", "depends", "another"]),
)
def test_any_old_row_becomes_a_row_of_today_that_invents_nothing(found, control, answer):
    old = [
        {"name": f"<{n}>", "verdict": v, "effect": e, "low": e, "high": h, "reason": why}
        for n, (v, e, h, why) in enumerate(found)
    ]
    beside = control and {"effect": 1.0, "low": 0.9, "high": 1.1, "outcome": control}
    before = old_ledger(old_row(answer=answer, control=beside, conditions=old))
    assert ledger_schema.problem(before) == ""
    after = ledger_schema.upgraded(before)
    assert ledger_schema.problem(after) == ""
    (row,) = after["rows"]
    assert len(row["earlier"]) == (answer is not None)
    off = control in ("faster", "slower", "not measured")
    for one, c in zip(old, row["conditions"], strict=True):
        assert [c[key] for key in ("name", "effect", "low", "high")] == [
            one[key] for key in ("name", "effect", "low", "high")
        ]
        settled = one["verdict"] in ("holds", "fails")
        assert c["verdict"] == ("unsettled" if off and settled else one["verdict"])
        assert c["reason"] or c["verdict"] in ("holds", "fails") or not one["reason"]
        assert [c[k] for k in ("threshold", "theory", "since", "agreement")] == [None] * 4


def test_an_old_ledger_is_written_on_as_a_new_one_and_keeps_its_answers(path):
    read_old(path, old_row("a.old", answer="holds"), old_row("a.again", answer="fails"))
    ledger.update(row("a.again"), path)
    assert json.loads(path.read_text(encoding="utf-8"))["schema"] == 2
    old, again = ledger.read(path)["rows"]
    assert [(p["says"], p["when"]) for p in old["earlier"]] == [("all", None)]
    assert [(p["says"], p["when"]) for p in again["earlier"]] == [("none", None)]
    assert again["judged"] is not None
    assert again["versions"]["python"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"verdict": "true"}, "none of holds"),
        ({"effect": "1"}, "number or null"),
        ({"x": 1}, "keys"),
    ],
)
def test_an_old_row_that_breaks_its_schema_is_no_ledger(path, changes, said):
    with pytest.raises(ledger.LedgerError, match=said):
        read_old(path, old_row(**changes))


@pytest.mark.parametrize("file", LEDGERS, ids=lambda file: file.stem)
def test_the_committed_ledgers_know_theory_and_threshold_of_every_condition(file):
    for found in ledger.read(file)["rows"]:
        for c in found["conditions"]:
            assert c["theory"]
            assert c["since"]
            if c["verdict"] in ("holds", "fails") and None not in (c["low"], c["high"]):
                met = Threshold.parse(c["threshold"]).settle(c["low"], c["high"])
                assert met == (c["verdict"] == "holds"), (found["id"], c)


def test_processes_that_write_at_once_lose_no_row(path, tmp_path):
    code = (
        "import sys\n"
        "from dlhelpers.course import ledger\n"
        "sys.path.insert(0, sys.argv[3])\n"
        "from test_ledger import row\n"
        "ledger.describe_machine = lambda: {'line': 'm', 'key': 'm'}\n"
        "for n in range(8):\n"
        "    ledger.update(row(f'p{sys.argv[1]}.claim-{n}'), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code]
    folder = str(Path(__file__).parent)
    processes = [
        subprocess.Popen([*command, str(number), str(path), folder]) for number in range(4)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    ids = {r["id"] for r in ledger.read(path)["rows"]}
    assert ids == {f"p{p}.claim-{n}" for p in range(4) for n in range(8)}
    assert not list(path.parent.glob("*.tmp"))


def test_a_write_that_fails_halfway_leaves_the_old_ledger(path, monkeypatch):
    ledger.update(row("a.x"), path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        ledger.update(row("a.y"), path)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*.tmp"))


def test_record_warns_once_for_each_ledger_and_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DLHELPERS_LEDGER", str(tmp_path / "file" / "ledger.json"))
    with pytest.warns(UserWarning, match="DLHELPERS_LEDGER"):
        ledger.record(row())
    with warnings.catch_warnings(action="error"):
        ledger.record(row())


def test_another_machines_ledger_is_put_aside_and_taken_up_again(path, monkeypatch):
    ledger.update(row("a.here"), path)
    monkeypatch.setattr(ledger, "describe_machine", lambda: {"line": "other", "key": "th/ere"})
    ledger.update(row("a.there"), path)
    assert [r["id"] for r in ledger.read(path)["rows"]] == ["a.there"]
    assert path.with_name("ledger.json.here").exists()
    monkeypatch.setattr(ledger, "describe_machine", lambda: MACHINE)
    ledger.update(row("a.back"), path)
    assert [r["id"] for r in ledger.read(path)["rows"]] == ["a.here", "a.back"]
    assert path.with_name("ledger.json.th-ere").exists()


def test_start_begins_without_rows(path):
    ledger.update(row(), path)
    ledger.start(path)
    assert ledger.read(path)["rows"] == []


def test_the_path_is_the_environments_or_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DLHELPERS_LEDGER", str(tmp_path / "own.json"))
    assert ledger.default_path() == tmp_path / "own.json"
    monkeypatch.delenv("DLHELPERS_LEDGER")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name, **kw: tmp_path / name)
    assert ledger.default_path() == tmp_path / "dlhelpers" / "ledger.json"


def test_the_machine_of_a_ledger_has_its_line_and_key():
    pytest.importorskip("dlhelpers.machine")
    found = DESCRIBE()
    assert found["line"]
    assert found["key"]
    json.dumps(found, allow_nan=False)


def a_change(**changes):
    numbers = {"speedup": 1.5, "low": 1.4, "high": 1.6}
    rest = {"outcome": "faster", "epochs": None, "peak_bytes": [9, 3]}
    return {"id": "no_grad", "value": True} | numbers | rest | changes


def test_a_change_to_the_script_is_kept_beside_the_claims_and_replaced_by_a_second_run(path):
    ledger.update(row(), path)
    before = ledger.read(path)
    assert "script" not in before  # as every ledger of before
    for speedup in (1.5, 2.5):
        ledger.update(a_change(speedup=speedup, high=math.inf), path, "script")
        ledger.update(a_change(id="database", epochs=[13, 6]), path, "script")
    found = ledger.read(path)
    assert found["rows"] == before["rows"]
    assert [(r["id"], r["speedup"], r["high"]) for r in found["script"]] == [
        ("no_grad", 2.5, None),
        ("database", 1.5, 1.6),
    ]
    ledger.update(row(verdict="fails"), path)
    assert ledger.read(path)["script"] == found["script"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"speedup": "1"}, "speedup must be a number or null"),
        ({"outcome": None}, "outcome must be text"),
        ({"epochs": [13]}, "epochs must be two whole numbers"),
        ({"peak_bytes": [1.5, 2]}, "peak_bytes must be two whole numbers"),
        ({"measured": "noon"}, "measured must be a time"),
        ({"more": 1}, "expected the keys"),
    ],
)
def test_a_change_that_breaks_the_schema_is_neither_written_nor_read(path, changes, said):
    with pytest.raises(ledger.LedgerError, match="this row cannot be kept") as caught:
        ledger.update(a_change(**changes), path, "script")
    assert said in str(caught.value)
    ledger.start(path)
    whole = a_change(measured="2026-12-01T12:00:00+00:00") | changes
    path.write_text(json.dumps(ledger.read(path) | {"script": [whole]}))
    with pytest.raises(ledger.LedgerError, match="script: ") as caught:
        ledger.read(path)
    assert said in str(caught.value)
