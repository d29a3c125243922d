"""Each step of the story changes what it says, and no answer that it promises to keep."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dlhelpers.course import story
from dlhelpers.course.story import MENU, STEPS, Script, Settings, after
from dlhelpers.course.story import script as whole
from dlhelpers.memory import measure_peak
from dlhelpers.profiling import profile_torch

pytestmark = pytest.mark.usefixtures("little_to_collect")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    return Script(tmp_path_factory.mktemp("story"), count=24, side=80, max_epochs=2)


def test_every_step_changes_one_habit_and_the_last_has_none_left():
    seen = Settings()
    for step in STEPS:
        now = after(step)
        changed = [
            field.name
            for field in dataclasses.fields(Settings)
            if getattr(now, field.name) != getattr(seen, field.name)
        ]
        assert changed == [STEPS[step].field]
        seen = now
    slow = [f.name for f in dataclasses.fields(Settings) if getattr(seen, f.name) == f.default]
    assert slow == ["depthwise"]  # which the menu offers, and no list of tips
    assert set(MENU) - set(STEPS) == {"depthwise convolutions"}
    assert {step.field for step in MENU.values()} == {f.name for f in dataclasses.fields(Settings)}
    with pytest.raises(ValueError, match="there is no step 'faster'"):
        after("faster")


def test_the_database_holds_the_same_images_and_classes(script):
    files = script.dataset("train", Settings())
    stored = script.dataset("train", Settings(database=True))
    assert len(files) == len(stored) == 24
    for index in range(24):
        assert torch.equal(files[index][0], stored[index][0])
        assert files[index][1] == stored[index][1]


def test_both_ways_to_put_a_batch_together_are_equal(script):
    by_row = list(script.loader("valid", Settings()))
    stacked = list(script.loader("valid", Settings(stack=True)))
    assert len(by_row) == len(stacked) == 1
    for one, other in zip(by_row, stacked, strict=True):
        assert all(map(torch.equal, one, other))


def test_training_is_the_same_to_the_last_bit_through_database_and_stacking(script):
    def weights(step):
        return torch.cat([p.flatten() for p in script.train(after(step))[0].parameters()])

    before = weights("logits into the loss")
    assert torch.equal(before, weights("one call stacks a batch"))
    assert torch.equal(before, weights("small photographs in LMDB"))


def test_training_in_memory_is_the_same_to_the_last_bit(script):
    settings = after("logits into the loss")
    read, kept = script.train(settings), script.train_in_memory(settings)
    assert read[1:3] == kept[1:3]  # epochs and accuracy
    for one, other in zip(read.model.parameters(), kept.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_depthwise_convolutions_need_fewer_multiply_adds():
    image, counts = torch.zeros(1, 3, 48, 48), []
    for depthwise in (False, True):
        with FlopCounterMode(display=False) as counter:
            story.network(12, softmax=False, depthwise=depthwise)(image)
        counts.append(counter.get_total_flops())
    assert counts[1] < counts[0] / 2


def test_scoring_gives_the_same_classes_in_batches_and_folded(script):
    model = script.train(after("one call stacks a batch"))[0]

    def labels(**changes):
        return script.score_step(dataclasses.replace(Settings(), **changes), model)()

    one_by_one = labels()
    assert len(one_by_one) == 24
    assert labels(score_batch=16) == one_by_one
    assert labels(score_batch=16, fold=True) == one_by_one


def test_photographs_decoded_small_are_nearly_the_whole_ones(tmp_path):
    story.write_parts(tmp_path, 12, 320, seed=0)
    whole, small = story.Photos(tmp_path), story.Photos(tmp_path, draft=True)
    for index in range(12):
        apart = (whole[index][0] - small[index][0]).abs().mean() / 2  # of the range -1 to 1
        assert 0 < apart < 0.03  # 0 would mean that draft did nothing
        assert whole[index][1] == small[index][1]


@pytest.mark.slow  # every engine
def test_the_fastest_backend_gives_the_networks_numbers_on_photographs_it_has_not_seen(script):
    model = script.train(after("one call stacks a batch"))[0].eval()
    backend = script.backend(after("the fastest backend"), model)
    photos = story.Photos(script.folders["new"])
    images = torch.stack([image for image, _ in photos])[:16]
    with torch.inference_mode():
        exact, found = model(images).double(), backend(images).double()
    signal, noise = exact.square().sum(), (found - exact).square().sum()
    assert noise < signal / 100  # 20 dB; 25 are asked for on the calibration photographs


def test_the_softmax_in_front_of_the_loss_is_what_pairing_finds(script):
    found = script.mistakes(Settings())
    assert [finding.name for finding in found] == ["softmax-into-cross-entropy"]
    assert script.mistakes(after("logits into the loss")) == []


def test_validation_without_graphs_needs_less_memory(script):
    model, batches = script.model(Settings()), list(script.loader("valid", Settings()))
    kept, plain = (
        measure_peak(lambda no_grad=no_grad: story.validate(model, batches, no_grad)).peak_bytes
        for no_grad in (False, True)
    )
    assert plain < kept
    assert script.validation_bytes(Settings()) == kept <= script.peak_bytes(Settings())
    assert script.validation_bytes(Settings(no_grad=True)) == plain


def test_a_run_is_whole(script):
    assert {name: len(story.Photos(script.folders[name])) for name in script.folders} == {
        "train": 24,
        "valid": 12,
        "new": 24,
    }
    outcome = script.run(Settings())
    assert outcome.epochs == 2
    assert len(outcome.labels) == 24
    assert outcome.agreement(outcome) == 1
    assert outcome.total_s > 0
    assert "epochs" in repr(outcome)
    assert f"{outcome.peak_bytes / 2**20:.1f} MiB" in outcome._repr_html_()


def test_dalis_wait_is_a_phase_of_its_own(script):
    pytest.importorskip("nvidia.dali", reason="extra dali")
    step = script.train_step(after("DALI prepares batches"))
    assert profile_torch(step, steps=2).phases["data loading"] > 0


def test_without_dali_a_worker_prepares_batches(script, monkeypatch):
    monkeypatch.setattr(whole, "has_dali", lambda: False)
    loader = script.loader("valid", after("DALI prepares batches"))
    assert loader.num_workers == 1
    wanted = list(script.loader("valid", after("small photographs in LMDB")))
    for one, other in zip(loader, wanted, strict=True):
        assert all(map(torch.equal, one, other))


def test_the_steps_for_a_profiler_have_no_end(script):
    step = script.train_step(after("one call stacks a batch"))
    for _ in range(4):  # one batch is an epoch
        step()
    script.validate_step(Settings())()
