"""Each real exercise passes its solution, refuses two cheats, and keeps what was reached."""

import ast
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from dlhelpers import measure
from dlhelpers.course import ledger
from dlhelpers.course.data import photos
from dlhelpers.course.exercises import real
from dlhelpers.course.exercises.real import dali_io
from dlhelpers.lmdb_io import LMDBDataset, write_lmdb
from dlhelpers.shufflenet import layer_costs

IDS = ["01", "02", "03", "04", "05", "06", "07", "08"]
NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
THREE = "The first thing. The second thing. And how one knows."


@pytest.fixture(autouse=True)
def own_ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("DLHELPERS_LEDGER", str(tmp_path / "ledger.json"))
    monkeypatch.setattr(ledger, "describe_machine", lambda: {"line": "2 cores", "key": "here"})


@pytest.fixture
def clock(monkeypatch):
    """Comparisons whose interval the test sets; both functions are called once."""
    found = SimpleNamespace(speedup=3.0, low=2.9, high=3.1)

    def compare(baseline, candidate, **_):
        baseline(), candidate()
        return found

    monkeypatch.setattr(measure, "compare", compare)
    return found


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def solve(id, name):
    return real.attempt(id, real._find(id).solution, name, THREE)


def refusal(id, answer, name=None):
    found = real.attempt(id, answer, name, THREE)
    assert not found.passed
    return found.refused


# 05: the same multiply-adds, faster


@pytest.mark.parametrize("name", ["unequal", *slow("grouped", "fragmented", "elementwise")])
def test_dense_convolutions_have_the_multiply_adds_of_each_offered_block(name, clock):
    assert solve("05", name).passed


def test_a_block_with_fewer_multiply_adds_is_refused(clock):
    assert "multiply-adds" in refusal("05", lambda block, x: nn.Conv2d(256, 256, 1, groups=8))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("grouped", lambda block, x: nn.Sequential(*(layer[0] for layer in block))),
        ("elementwise", lambda block, x: block[0]),
    ],
)
def test_a_block_without_its_activations_is_refused(clock, name, answer):
    assert "no activation left" in refusal("05", answer, name)


def test_a_block_with_another_shape_is_refused(clock):
    assert "[4, 16, 28, 28]" in refusal("05", lambda block, x: nn.Conv2d(256, 16, 1))


def test_a_block_that_ignores_its_input_is_refused(clock):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    assert "does not depend" in refusal("05", lambda block, x: Constant())


def test_the_unchanged_block_is_not_fast_enough(clock):
    clock.speedup, clock.low, clock.high = 1.0, 0.98, 1.02
    found = real.attempt("05", lambda block, x: block)
    assert not found.passed
    assert "1.00 [0.98, 1.02] times as fast" in str(found)
    assert "try next: audit(new, x)" in str(found)


def test_an_interval_that_holds_the_goal_is_no_pass_and_says_so(clock):
    clock.speedup, clock.low, clock.high = 1.25, 1.15, 1.35
    found = solve("05", "grouped")
    assert not found.passed
    assert "the interval holds the goal" in str(found)


# what is kept and shown


def documented(*_):
    """What it should do."""
    ...


def not_seen_to_be_blank(*_):
    return [None][0]


@pytest.mark.parametrize("blank", [..., None, documented, lambda *_: ...])
@pytest.mark.parametrize("id", IDS)
def test_a_blank_answer_makes_measures_and_keeps_nothing(id, blank):
    found = real.attempt(id, blank, pytest.fail)
    goal = real._find(id).goal
    assert str(found) == f"{id} real exercise · not attempted yet · goal: {goal}"
    assert not ledger.default_path().exists()


@pytest.mark.parametrize("id", ["01", "04", "05", "06", "07", "08"])
def test_an_answer_that_turns_out_to_be_blank_is_not_kept(id, monkeypatch):
    monkeypatch.setattr(measure, "compare", pytest.fail)
    assert not real.attempt(id, not_seen_to_be_blank).number
    assert not ledger.default_path().exists()


@pytest.mark.parametrize("id", IDS)
def test_the_notebook_has_the_exercise_unsolved(id):
    (path,) = NOTEBOOKS.glob(f"{id}_[!_]*.ipynb")
    cells = {cell["id"]: cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]}
    assert f'real.names("{id}")' in "".join(cells[f"real-task-{id}"]["source"])
    call = ast.parse("".join(cells[f"real-{id}"]["source"])).body[-1].value
    on = next(word.value.value for word in call.keywords if word.arg == "on")
    assert call.args[0].value == id
    assert on in real.names(id)


def test_figure_sentences_and_attempts_are_kept_and_a_pass_outlives_a_later_failure(clock):
    clock.low = 1.0
    real.attempt("05", real._find("05").solution)
    clock.low = 2.9
    assert "now explain in three sentences" in str(solve_without_words())
    assert "done: 3.00 [2.90, 3.10] times as fast" in str(solve("05", "unequal"))
    real.attempt("05", lambda block, x: 1 / 0, on="grouped", explanation="Shorter.")
    (row,) = ledger.read()["real"]
    assert (row["attempts"], row["passed"], row["value"], row["on"]) == (4, True, 3.0, "unequal")
    assert row["explanation"] == "Shorter."
    assert row["measured"][:2] == "20"


def solve_without_words():
    return real.attempt("05", real._find("05").solution)


def test_an_answer_that_raises_is_an_attempt_and_says_so(clock):
    found = real.attempt("05", lambda block, x: 1 / 0)
    assert found.refused == "it raised ZeroDivisionError: division by zero"
    assert found.number == 1


def test_rubric_and_model_answer_are_shown_after_a_pass_or_three_attempts(clock, capsys):
    task = real._find("05")
    for attempts in range(3):
        real.review("05")
        assert f"so far: {attempts}" in capsys.readouterr().out
        real.attempt("05", lambda block, x: 1 / 0)
    real.review("05")
    shown = capsys.readouterr().out
    assert task.rubric[0] in shown
    assert task.explanation in shown
    ledger.start(ledger.default_path())
    solve("05", "grouped")
    real.review("05")
    assert f"You: {THREE}" in capsys.readouterr().out


def test_something_of_the_readers_own_is_taken(clock):
    def own():
        return nn.Conv2d(16, 16, 3, padding=1, groups=4), torch.ones(2, 16, 8, 8)

    assert real.attempt("05", real._find("05").solution, own, THREE).passed
    assert ledger.read()["real"][0]["on"] == "your own"


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("99", ...), ValueError, "no real exercise '99'"),
        (("05", ..., "wide"), ValueError, "on must be one of 'grouped'"),
        (("05", 3), TypeError, "answer must be a function"),
        (("05", ..., None, 3), TypeError, "explanation must be text"),
    ],
)
def test_bad_arguments_are_named(arguments, error, said):
    with pytest.raises(error, match=said):
        real.attempt(*arguments)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attempts": 0}, "attempts must be a whole number"),
        ({"passed": 1}, "passed must be true or false"),
        ({"value": "1"}, "value must be a number or null"),
        ({"explanation": None}, "explanation must be text"),
        ({"more": 1}, "expected the keys"),
    ],
)
def test_a_row_that_breaks_the_schema_is_not_written(changes, said):
    row = {"id": "05", "on": "grouped", "passed": True, "attempts": 1, "value": 1.5}
    row |= {"low": None, "high": None, "unit": "times", "explanation": ""}
    with pytest.raises(ledger.LedgerError, match=said):
        ledger.update(row | changes, part="real")


@pytest.mark.slow
@pytest.mark.alone
def test_the_offered_block_becomes_faster_on_this_machine():
    assert solve("05", "grouped").passed


# 06: the same outputs, every BatchNorm folded


@pytest.mark.parametrize("name", real.names("06"))
def test_each_offered_network_refuses_as_it_is_and_folds_when_rewritten(name):
    found = real.attempt("06", lambda model: model, name)
    assert not found.passed
    assert found.reached.value == 0
    assert "remove the reason of" in str(found)
    assert solve("06", name).passed


def test_a_network_without_its_batch_norm_is_refused():
    def folded_by_hand(model):
        model.bn = nn.Identity()
        return model

    assert "other outputs" in refusal("06", folded_by_hand, "skip")

    class Hidden(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)
            self.hidden = [model]

        def forward(self, x):
            return self.hidden[0](x)

    assert "0 BatchNorm layers of 1" in refusal("06", Hidden, "skip")


def test_swapping_a_batch_norm_with_a_relu_changes_outputs():
    class Swapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.conv, self.bn, self.pool = model.conv, model.bn, model.pool

        def forward(self, x):
            return self.bn(self.conv(x)).relu().mean() + self.pool(self.conv(x))

    assert "other outputs" in refusal("06", Swapped, "pooled")


def test_a_network_of_ones_own_must_refuse():
    def own():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.ones(1, 3, 8, 8)

    found = real.attempt("06", lambda model: model, own)
    assert "nothing refuses" in found.refused


# 04: the same gradients, fewer bytes


@pytest.mark.parametrize("name", ["wide loss", *slow("deep", "convolutions", "normalised")])
def test_the_small_step_has_the_gradients_of_the_plain_one_in_fewer_bytes(name):
    found = solve("04", name)
    assert found.passed, found
    assert found.reached.value <= 70


def test_the_plain_step_is_not_small_enough():
    def plain(model, loss, inputs, targets):
        whole = loss(model(inputs), targets)
        whole.backward()
        return whole

    found = real.attempt("04", plain, "wide loss")
    assert not found.passed
    assert found.reached.value == pytest.approx(100, abs=3)
    assert "at the peak, in backward, most bytes are" in str(found)


def half_of_the_batch(model, loss, inputs, targets):
    part = loss(model(inputs[::2]), targets[::2])
    part.backward()
    return part


def parts_without_weights(model, loss, inputs, targets):
    for x, y in zip(inputs.chunk(4), targets.chunk(4), strict=True):
        loss(model(x), y).backward()
    return 0.0


def parts_with_batch_norm(model, loss, inputs, targets):
    for x, y in zip(inputs.chunk(4), targets.chunk(4), strict=True):
        (loss(model(x), y) / 4).backward()
    return 0.0


def no_backward(model, loss, inputs, targets):
    with torch.no_grad():
        return loss(model(inputs), targets)


@pytest.mark.parametrize(
    ("answer", "name", "said"),
    [
        (half_of_the_batch, "wide loss", "is another one"),
        (parts_without_weights, "wide loss", "is another one"),
        (parts_with_batch_norm, "normalised", "look at the whole batch"),
        (no_backward, "wide loss", "has no gradient"),
    ],
)
def test_other_gradients_are_refused(answer, name, said):
    assert said in refusal("04", answer, name)


# 01: nothing found, and it learns


@pytest.mark.parametrize("name", ["ink", *slow("digits", "odd digits", "probabilities")])
def test_each_offered_set_up_learns_once_repaired(name):
    assert solve("01", name).passed


@pytest.mark.parametrize("name", real.names("01"))
def test_the_unchanged_set_up_is_refused_by_what_pairing_finds(name):
    said = refusal("01", lambda setup: setup, name)
    assert said.startswith("pairing.check still finds ")


def test_a_set_up_without_findings_that_cannot_learn_does_not_pass():
    def flat(setup):
        return replace(
            setup, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0), Stuck())
        )

    class Stuck(nn.Module):
        def forward(self, x):
            return x * 0

    found = real.attempt("01", flat, "ink")
    assert not found.passed
    assert abs(found.reached.value) < 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": torch.zeros(1797, 1)}, "must keep their values"),
        ({"loss": lambda outputs, targets: outputs.mean() * 0}, "must be a module of torch.nn"),
    ],
)
def test_other_targets_and_losses_of_ones_own_are_refused(changes, said):
    assert said in refusal("01", lambda setup: replace(setup, **changes), "ink")


def test_a_sound_set_up_is_no_task():
    def own():
        return real._find("01").solution(real.offered("01", "ink"))

    assert "finds nothing in this set-up" in real.attempt("01", lambda setup: setup, own).refused


# 07: eight bits, at most two layers in float


@pytest.mark.parametrize("name", ["outlier", *slow("channels", "inputs", "depthwise")])
def test_two_layers_in_float_and_scales_per_channel_are_enough_and_either_alone_is_not(name):
    assert solve("07", name).passed
    model, data = real.offered("07", name)
    best = real._find("07").solution(model, data)
    for changes in ({"per_channel": False}, {"left_float": []}):
        found = real.attempt("07", lambda *_, changes=changes: best | changes, name)
        assert not found.passed
        assert "scales per channel help" in str(found)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"left_float": ["0", "2", "4"]}, "2 layers at most"),
        ({"left_float": ["", "1"]}, "left_float must list layers of 0, 2, 4, 6, 8"),
        ({"calibrator": "none"}, "calibrator must be one of min-max"),
        ({"per_channel": "yes"}, "per_channel must be True or False"),
        ({"bits": 16}, "must be a dict with calibrator, left_float, per_channel"),
    ],
)
def test_another_choice_than_the_three_is_refused(changes, said):
    choice = {"calibrator": "min-max", "per_channel": True, "left_float": []}
    assert said in refusal("07", lambda model, data: choice | changes)


# 08: the same results, faster


@pytest.mark.parametrize("name", real.names("08"))
def test_whole_tensors_give_the_results_of_each_offered_step(name, clock):
    clock.speedup, clock.low, clock.high = 20.0, 19.0, 21.0
    assert solve("08", name).passed


def test_a_stored_result_and_another_one_are_refused(clock):
    def stored(step):
        result = step()
        return lambda: result

    assert "compute them at each call" in refusal("08", stored, "distances")
    assert "the results differ" in refusal("08", lambda step: lambda: step() * 1.01)
    assert "must be a tensor [512, 10]" in refusal("08", lambda step: lambda: step()[:256])


@pytest.mark.slow
def test_the_unchanged_step_is_not_fast_enough_and_its_largest_cost_is_named(clock):
    clock.speedup, clock.low, clock.high = 1.0, 0.98, 1.02
    found = real.attempt("08", lambda step: step, "distances")
    assert not found.passed
    assert "try next: diagnose names python-loop" in str(found)


# 03: the step does not wait, for the same batches


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_the_share_of_waiting_counts_the_first_batch_and_all_others():
    clock, kept = FakeClock(), []

    def batches():
        for number in range(4):
            clock.sleep(1.0)
            yield number

    timeline = dali_io.waiting(batches(), 3.0, kept, clock)
    assert timeline.busy_share("train") == pytest.approx(3 / 4)
    assert kept == [0, 1, 2, 3]


@pytest.fixture
def waits(monkeypatch):
    """Shares of waiting that the test sets; the batches are read all the same."""
    found = SimpleNamespace(share=0.1)

    def waiting(batches, step_s, kept):
        kept.extend(batches)
        return SimpleNamespace(busy_share=lambda stage: 1 - found.share)

    monkeypatch.setattr(dali_io, "waiting", waiting)
    return found


def same_each_time():
    loaded = torch.arange(240.0).view(3, 8, 1, 2, 5)
    return dali_io.Work(lambda number: loaded[number], dali_io._flipped, 3)


def test_loading_once_gives_the_same_batches_and_a_step_that_waits_fails(waits):
    assert real.attempt("03", real._find("03").solution, same_each_time, THREE).passed
    waits.share = 0.5
    found = real.attempt("03", real._find("03").solution, same_each_time, THREE)
    assert not found.passed
    assert "50 % of its time the step waits" in str(found)
    assert "try next: time work.load and work.augment" in str(found)


def test_batches_of_another_epoch_and_missing_ones_are_refused(waits):
    def always_the_first(work):
        batches = [work.batch(0, number) for number in range(work.batches)]
        return lambda epoch: batches

    def one_less(work):
        return lambda epoch: [work.batch(epoch, n) for n in range(work.batches - 1)]

    assert "is not the one that work gives" in refusal("03", always_the_first, same_each_time)
    assert "must give 3 batches" in refusal("03", one_less, same_each_time)


@pytest.mark.slow
@pytest.mark.alone
def test_the_step_no_longer_waits_on_this_machine():
    assert not real.attempt(
        "03", lambda work: lambda e: (work.batch(e, n) for n in range(12))
    ).passed
    assert solve("03", "decoding").passed


# 02: the same images from a database, faster


@pytest.fixture
def folder(tmp_path):
    return photos(tmp_path / "photos", count=8, size=320, progress=False)


def of_files(folder, change=lambda images: images, **options):
    """Answer 02 with a database of changed images; options as of write_lmdb."""

    def answer(_, path):
        write_lmdb(change(folder), path, progress=False, **options)
        return LMDBDataset(path)

    found = real.attempt("02", answer, lambda: folder, THREE)
    assert not found.passed
    return found.refused


def test_images_that_were_made_small_once_are_those_of_the_folder(folder, clock):
    clock.speedup, clock.low, clock.high = 4.0, 3.9, 4.1
    found = real.attempt("02", real._find("02").solution, lambda: folder, THREE)
    assert found.passed, found
    clock.speedup, clock.low = 3.2, 2.8
    assert not real.attempt("02", real._find("02").solution, lambda: folder).passed


def test_other_images_sizes_and_too_many_bytes_are_refused(folder, tmp_path, clock):
    assert "not [3, 96, 96]" in of_files(folder, resize=(80, 80))
    assert "the database takes" in of_files(folder, encode="raw")
    black = tmp_path / "black"
    for file in folder.rglob("*.jpg"):
        there = black / file.relative_to(folder)
        there.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (96, 96)).save(there)
    assert "not those of the folder" in of_files(folder, lambda _: black)


def test_images_kept_in_memory_are_no_database(folder, clock):
    def in_memory(folder, path):
        return [(torch.zeros(3, 96, 96, dtype=torch.uint8), 0)] * 8

    assert "must be an LMDBDataset" in refusal("02", in_memory)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("name", real.names("02"))
def test_the_offered_folders_are_read_faster_on_this_machine(name):
    assert solve("02", name).passed


def test_a_block_with_half_of_the_multiply_adds_is_refused(clock):
    block, x = real.offered("05", "grouped")
    count = layer_costs(block, x).multiply_adds
    half = layer_costs(nn.Conv2d(x.shape[1], x.shape[1], 1), x).multiply_adds
    layers = [nn.Conv2d(x.shape[1], x.shape[1], 1) for _ in range(max(1, round(count / 2 / half)))]
    found = refusal("05", lambda block, x: nn.Sequential(*layers, nn.ReLU()), "grouped")
    assert "multiply-adds" in found


def test_an_error_in_what_is_the_readers_own_is_no_attempt():
    def broken():
        raise ZeroDivisionError("division by zero")

    with pytest.raises(ValueError, match=r"on raised ZeroDivisionError: .* anew at each call"):
        real.attempt("05", real._find("05").solution, broken, THREE)
    assert not ledger.default_path().exists()


def test_a_block_that_works_less_in_later_calls_is_refused(clock):
    class Lazy(nn.Module):
        def __init__(self, block, channels):
            super().__init__()
            self.block, self.cheap, self.calls = block, nn.Conv2d(channels, channels, 1), 0

        def forward(self, x):
            self.calls += 1
            return self.block(x) if self.calls < 6 else self.cheap(x)

    found = refusal("05", lambda block, x: Lazy(block, x.shape[1]), "grouped")
    assert "other work in later calls" in found or "multiply-adds" in found
