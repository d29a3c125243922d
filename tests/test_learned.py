"""The reader's progress: what a ledger says of predictions and exercises."""

import pytest

from dlhelpers.course import claims, exercises, ledger
from dlhelpers.course.claims import catalog
from dlhelpers.course.learned import learned

SAID = "It was slow here. It is fast now. I measured both sides."
CLAIM = "shufflenet.element-wise"


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("DLHELPERS_LEDGER", str(tmp_path / "ledger.json"))
    return tmp_path / "ledger.json"


def progress(number):
    return next(row for row in learned().lessons if row.lesson.number == number)


def test_without_a_ledger_nothing_is_done_and_every_lesson_is_there(path):
    rows = learned().lessons
    assert [row.lesson.stem for row in rows] == [
        lesson.stem for lesson in claims.lessons() if len(lesson.number) == 2
    ]
    assert {(row.right, row.predicted, row.passed) for row in rows} == {(0, 0, 0)}
    assert sum(row.asked for row in rows) == sum(len(claim.asks) for claim in claims.all_claims())
    assert sum(row.minutes for row in rows) == sum(lesson.minutes for lesson in claims.lessons())
    assert "0 of 0 predictions right" in repr(learned())


def test_exercises_are_kept_in_a_notebook_alone_and_a_pass_stays(path, monkeypatch):
    right, wrong = (lambda logits: logits > 0), (lambda logits: logits > 0.5)
    exercises.check("01.5", right)
    assert not path.exists()
    monkeypatch.setattr(exercises, "in_ipython", lambda: True)
    exercises.check("01.5", ...)
    assert not path.exists()
    for answer in (wrong, right, wrong):
        exercises.check("01.5", answer)
    (row,) = ledger.read()["short"]
    assert (row["id"], row["passed"], row["attempts"]) == ("01.5", True, 3)
    assert progress("01").passed == 1
    assert progress("01").short == len(exercises.ids("01"))
    assert progress("02").passed == 0


def test_a_real_exercise_is_done_with_its_explanation(path):
    row = {
        "id": "05", "on": "your own", "passed": True, "attempts": 1, "value": 1.4, "low": 1.3,
        "high": 1.5, "unit": "x", "explanation": "",
    }  # fmt: skip
    ledger.record(row, "real")
    assert progress("05").real is False
    for half in (
        {"explanation": "Because."},
        {
            "passed": False,
            "explanation": SAID,
        },
    ):
        ledger.record(row | half, "real")
        assert progress("05").real is False
    ledger.record(row | {"explanation": SAID}, "real")
    assert progress("05").real is True
    assert progress("00").real is None


def test_predictions_count_for_their_lesson(path):
    claim = catalog.find(CLAIM)
    for name, says in zip(claim.asks, ("holds", "holds"), strict=True):
        claims.answer(CLAIM, name, says)
    claim.judge(claims.not_measured("this is a test"))
    assert (progress("05").right, progress("05").predicted) == (0, 2)
    assert progress("06").predicted == 0


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"id": "01.5", "passed": 1, "attempts": 1}, "passed true or false"),
        ({"id": "01.5", "passed": True, "attempts": 0}, "attempts must be"),
        ({"id": "01.5", "passed": True}, "expected the keys"),
    ],
)
def test_a_row_that_breaks_the_schema_is_refused(path, row, says):
    with pytest.raises(ledger.LedgerError, match=says):
        ledger.update(row, path, "short")
