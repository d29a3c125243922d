"""One change alone: measured against the script as found, kept, and shown on the start page."""

import math
from types import SimpleNamespace

import pytest

from dlhelpers.course import ledger, story
from dlhelpers.course.story import growing
from dlhelpers.course.story.script import fair_steps
from dlhelpers.course.story.settings import MENU, Settings


@pytest.fixture(autouse=True)
def own_ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("DLHELPERS_LEDGER", str(tmp_path / "ledger.json"))
    monkeypatch.setattr(ledger, "describe_machine", lambda: {"line": "2 cores", "key": "here"})


class Fake:
    """A script whose steps are the settings themselves; with Softmax it needs twice the epochs."""

    accuracy = 1.0

    def step(self, part, settings):
        return lambda: (part, settings)

    def train_in_memory(self, settings):
        return SimpleNamespace(epochs=12 if settings.softmax else 6, accuracy=self.accuracy)

    def validation_bytes(self, settings):
        return 1 << 20 if settings.no_grad else 3 << 20


@pytest.fixture
def measured(monkeypatch):
    """What is compared, and a comparison that says 1.5 times as fast."""
    compared = []

    def compare(before, after, *, budget_s, negligible, setup=None):
        assert budget_s <= 5
        compared.append((before(), after()))
        outcome = "faster" if negligible < 0.4 else "undecided"
        return SimpleNamespace(speedup=1.5, low=1.4, high=1.6, outcome=outcome)

    monkeypatch.setattr(growing.measure, "compare", compare)
    return compared


@pytest.mark.parametrize("name", MENU)
def test_each_change_is_measured_alone_against_the_script_as_found(measured, name):
    step = MENU[name]
    found = story.change(script=Fake(), **{step.field: step.value})
    ((before, after),) = measured
    assert before == (step.part, Settings())
    assert after == (step.part, step.done(Settings()))
    assert found.name == name


def test_a_change_of_the_network_counts_the_epochs_to_the_target(measured):
    found = story.change(script=Fake(), softmax=False)
    assert found.epochs == (12, 6)
    assert "with one seed, 6 epochs to the target instead of 12" in repr(found)
    assert story.change(script=Fake(), stack=True).epochs is None


def test_epochs_count_only_where_both_reach_the_target(measured, monkeypatch):
    monkeypatch.setattr(Fake, "accuracy", 0.5)
    found = story.change(script=Fake(), softmax=False)
    assert (found.epochs, found.speedup, found.outcome) == (None, 1.5, "faster")


def test_epochs_of_one_seed_are_no_part_of_the_speedup(measured):
    found = story.change(script=Fake(), softmax=False)
    assert (found.speedup, found.low, found.high) == (1.5, 1.4, 1.6)
    assert "another seed may reverse that" in found.sentence


def test_batches_that_a_loader_prepared_meanwhile_are_used_up(monkeypatch):
    """Before each timed step, of the side whose loader works ahead alone."""
    steps, setup = fair_steps(Counting(), "train", Settings(), Settings(dali=True))
    setup()
    assert [step.calls for step in steps] == [0, 4]
    assert fair_steps(Counting(), "train", Settings(), Settings(stack=True))[1] is None
    assert fair_steps(Counting(), "score", Settings(), Settings(dali=True))[1] is None


class Counting:
    def step(self, part, settings):
        def step():
            step.calls += 1

        step.calls = 0
        return step


def test_validation_without_graphs_shows_both_peaks(measured):
    found = story.change(script=Fake(), no_grad=True)
    assert repr(found).endswith("peak 1.0 MiB instead of 3.0 MiB")


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({}, "one field at a time, got 0"),
        ({"database": True, "dali": True}, "only the game of notebook 08 combines"),
        ({"faster": True}, "no field 'faster' to change; there are softmax=False"),
        ({"softmax": True}, "softmax=True is the script as found; the change is softmax=False"),
        ({"score_batch": 3}, "score_batch can become 16, got 3"),
    ],
)
def test_anything_but_one_change_is_refused(field, said):
    with pytest.raises(ValueError, match=said):
        story.change(script=Fake(), **field)
    assert not ledger.default_path().exists()


def test_the_start_page_shows_what_was_measured_and_not_yet_for_the_rest(measured):
    every = story.changes().rows
    assert [lesson[:2] for lesson, _, _ in every] == ["01", "02", "03", "04", "05", "06", "07"]
    assert {said for _, _, said in every} == {"not yet"}
    story.change(script=Fake(), database=True)
    story.change(script=Fake(), score_batch=16)
    shown = {code.split(": ")[1]: said for _, code, said in story.changes().rows}
    assert shown.pop("database=True") == "training becomes faster: 1.5 times as fast [1.4, 1.6]"
    assert shown.pop("score_batch=16").startswith("scoring becomes faster")
    assert set(shown.values()) == {"not yet"}
    assert "<table>" in story.changes()._repr_html_()


def test_a_second_run_replaces_its_row_and_one_of_another_value_is_not_shown(measured):
    for _ in range(2):
        story.change(script=Fake(), database=True)
    (row,) = ledger.read()["script"]
    assert (row["id"], row["value"]) == ("database", True)
    ledger.update(row | {"value": "lmdb"}, part="script")
    assert {said for _, _, said in story.changes().rows} == {"not yet"}


def test_no_interval_and_no_gain_are_said_as_such():
    nothing = growing.Change("BatchNorm folded", 1.0, 0.99, 1.01, "no difference")
    assert nothing.sentence == "brings nothing to the time of scoring: 1 times as fast [0.99, 1.01]"
    ledger.update(
        growing.Change("BatchNorm folded", 1.2, 0, math.inf, "undecided").as_row(), part="script"
    )
    (said,) = [said for _, code, said in story.changes().rows if "fold=" in code]
    assert said == "undecided for scoring: 1.2 times as fast [no interval]"


@pytest.mark.slow  # each change for real; the clock decides nothing
@pytest.mark.parametrize("name", MENU)
def test_each_change_runs(name, tmp_path):
    script = story.Script(tmp_path, count=24, side=80, max_epochs=2)
    found = story.change(script=script, budget_s=0.3, **{MENU[name].field: MENU[name].value})
    assert found.speedup > 0
    assert [row["id"] for row in ledger.read()["script"]] == [MENU[name].field]
