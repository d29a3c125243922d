"""The game: rules, players who follow one, the score; all with a script that takes no time."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dlhelpers import measure, profiling
from dlhelpers.course import story
from dlhelpers.course.story import game as playing
from dlhelpers.course.story import players
from dlhelpers.course.story.settings import MENU, STEPS, Settings
from dlhelpers.findings import Findings
from dlhelpers.measure.comparison import single_pair
from dlhelpers.profiling import Bottleneck

TRAIN = {"softmax": 2, "stack": 2, "database": 4, "dali": 1, "depthwise": 0.5}
COSTS = {"train": (64.0, TRAIN), "valid": (8.0, {"no_grad": 2})}
COSTS["score"] = (16.0, {"score_batch": 4, "draft": 1, "fold": 1, "int8": 2})


def seconds(part, settings):
    """The time of a part: as found, divided by what each of its changes brings."""
    took, factors = COSTS[part]
    for name, factor in factors.items():
        if getattr(settings, name) != getattr(Settings(), name):
            took /= factor
    return took


class Fake:
    """A script whose times are those above; the third of its runs anew is disturbed."""

    def __init__(self):
        self.ran, self.anew = [], []

    def run(self, settings, *, anew=False):
        (self.anew if anew else self.ran).append(settings)
        times = [seconds(part, settings) for part in ("train", "valid", "score")]
        times[0] += 100 * (anew and len(self.anew) == 3)
        return story.ScriptRun(*times, 5, 0.75, (0, 1), 1 << 20)

    def step(self, part, settings):
        return lambda: (part, settings)

    def mistakes(self, settings):
        return Findings([SimpleNamespace(name="softmax-into-cross-entropy")] * settings.softmax)


@pytest.fixture
def game():
    compared = []

    def compare(before, after, *, budget_s, setup=None):
        (part, one), (same, other) = before(), after()
        assert part == same
        compared.append((part, one, other))
        return single_pair(seconds(part, one), seconds(part, other))

    made = story.Game(Fake(), compare=compare)
    made.compared = compared
    return made


@pytest.fixture
def diagnosed(monkeypatch):
    """What is looked at; part -> (finding, speedup, field that fixes it), which a test fills in."""
    looks, found = [], {}

    def diagnose(step, *, steps):
        part, settings = step()
        looks.append((part, settings))
        return Findings(
            Bottleneck(name, "suspicion", "seen", "why", "remedy", speedup=speedup)
            for name, speedup, field in found.get(part, [])
            if getattr(settings, field) == getattr(Settings(), field)
        )

    monkeypatch.setattr(profiling, "diagnose", diagnose)
    return SimpleNamespace(looks=looks, found=found)


def following(*names):
    def player(position):
        left = [name for name in names if name in position.menu]
        return (left[0], 1.5) if left else None

    return player


def test_a_game_has_its_rounds_and_each_is_measured_against_the_one_before(game):
    played = game.play(following("one call stacks a batch", "scoring in batches"))
    stacked, batched = Settings(stack=True), Settings(stack=True, score_batch=16)
    assert game.compared == [("train", Settings(), stacked), ("score", stacked, batched)]
    assert [done.pair.speedup for done in played.rounds] == [2, 4]
    assert played.gains() == [88 / 56, 56 / 44]
    assert played.speedup == 2
    assert played.settings == batched
    assert [done.expected for done in played.rounds] == [1.5, 1.5]
    assert "2 times as fast after 2 changes, accuracy 75%" in repr(played)
    assert "<table>" in played._repr_html_()


def test_no_player_makes_more_changes_than_the_game_has_rounds(game):
    assert len(game.play(following(*MENU)).rounds) == game.rounds == 5
    assert len(game.play(following(*MENU), rounds=99).rounds) == len(MENU)
    assert game.play(lambda position: None).rounds == ()


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (("go faster", 1.5), "'go faster' is not on the menu; left are logits into the loss"),
        (("BatchNorm folded", 0), "must be above 0, such as 1.5, got 0"),
        (("BatchNorm folded", float("nan")), "must be above 0"),
    ],
)
def test_a_move_that_is_none_is_refused(game, said, match):
    with pytest.raises(ValueError, match=match):
        game.play(lambda position: said)
    assert game.compared == []


def test_a_change_is_not_made_twice(game):
    with pytest.raises(ValueError, match="is not on the menu"):
        game.play(lambda position: ("BatchNorm folded", 1.5))


def test_players_who_take_the_same_way_do_not_measure_it_twice(game):
    way = following("one call stacks a batch", "scoring in batches")
    one, other = game.play(way), game.play(way)
    assert [done.pair for done in one.rounds] == [done.pair for done in other.rounds]
    assert len(game.compared) == 2
    assert len(game.script.ran) == 3
    # scoring does not depend on what was done to training
    game.play(following("scoring in batches", "one call stacks a batch"))
    assert len(game.compared) == 2


def test_every_change_is_among_the_settings_that_its_parts_time_depends_on():
    for step in MENU.values():
        assert step.field in playing._FIELDS[step.part]


@pytest.mark.parametrize(("part", "factor"), [("train", 4), ("valid", 2), ("score", 8)])
def test_the_expected_gain_is_the_time_before_over_the_time_after(game, part, factor):
    took = {name: seconds(name, Settings()) for name in COSTS}
    after = took | {part: took[part] / factor}
    expected = sum(took.values()) / sum(after.values())
    assert players.expected_gain(game.start(), part, factor) == pytest.approx(expected)


def test_the_diagnosing_player_first_fixes_what_is_wrong_then_the_largest_part(game, diagnosed):
    diagnosed.found["train"] = [("slow-collate", 2.0, "stack"), ("slow-decoding", 4, "database")]
    diagnosed.found["score"] = [("item-every-step", 3, "int8"), ("python-loop", 4, "score_batch")]
    played = game.play(story.diagnosing_player)
    assert [done.name for done in played.rounds] == [
        "logits into the loss",
        "one call stacks a batch",
        "small photographs in LMDB",  # training is still the largest part
        "scoring in batches",
    ]
    assert played.rounds[1].advice == ("slow-collate", 2.0)
    assert played.rounds[1].expected == pytest.approx((32 + 24) / (16 + 24))
    assert len(diagnosed.looks) == len(set(diagnosed.looks))


def test_the_diagnosing_player_passes_where_nothing_on_the_menu_helps(game, diagnosed):
    diagnosed.found["train"] = [("tensors-kept", 1.0, "stack")]
    played = game.play(story.diagnosing_player)
    assert [done.name for done in played.rounds] == ["logits into the loss"]
    assert {part for part, _ in diagnosed.looks} == {"train", "valid", "score"}


def test_in_order_every_step_is_made_and_a_claims_condition_is_measured(game, diagnosed):
    diagnosed.found["valid"] = [("evaluation-without-no-grad", 2.0, "no_grad")]
    played = game.play(story.in_order, rounds=len(STEPS))
    assert [done.name for done in played.rounds] == list(STEPS)
    assert played.settings == story.after(list(STEPS)[-1])
    for done, (part, before, after) in zip(played.rounds, game.compared, strict=True):
        assert (part, done.step.done(before)) == (done.step.part, after)
        assert done.pair.speedup == seconds(part, before) / seconds(part, after)
    assert played.rounds[4].advice == ("evaluation-without-no-grad", 2.0)
    assert ("train", Settings()) not in diagnosed.looks  # its first step needs no profile


def test_every_condition_of_the_claim_belongs_to_one_step():
    from dlhelpers.course import claims

    (claim,) = (one for one in claims.all_claims() if one.id == "profiling.profile-first")
    named = [step.condition for step in STEPS.values() if step.condition]
    assert sorted(named) == sorted(condition.name for condition in claim.conditions)


def test_the_best_known_order_and_the_remedies_are_on_the_menu(game):
    assert len(set(players.BEST_KNOWN)) == len(players.BEST_KNOWN)
    named = {name for names in players._REMEDIES.values() for name in names}
    assert named | set(players.BEST_KNOWN) <= set(MENU)
    for (part, _), names in players._REMEDIES.items():
        assert {MENU[name].part for name in names} == {part}
    played = game.play(story.best_known, rounds=99)
    assert [done.name for done in played.rounds] == list(players.BEST_KNOWN)


def test_the_remedies_are_for_findings_that_diagnose_has():
    folder = Path(profiling.__file__).parent
    source = "".join(file.read_text() for file in folder.glob("*.py"))
    for _, finding in players._REMEDIES:
        assert f'"{finding}"' in source


def test_the_score_takes_the_fastest_of_runs_in_turn(game):
    slow = game.play(following("validation without graphs"))
    fast = game.play(following("small photographs in LMDB"))
    score = game.score(you=slow, the_best_known_order=fast, twin=fast, turns=2)
    assert game.script.anew == [Settings(), slow.settings, fast.settings] * 2
    assert score.final_s == {"you": 84, "the best known order": 40, "twin": 40}
    assert list(score.speedups.values()) == [88 / 40, 88 / 40, 88 / 84]
    assert repr(score).splitlines()[-1].startswith("you")
    assert "validation without graphs" in score._repr_html_()


def test_who_changes_nothing_scores_exactly_one(game):
    """The script as found runs in the same turns, so that no warm-up counts for a player."""
    passed = game.play(lambda position: None)
    assert game.score(nobody=passed).speedups == {"nobody": 1.0}


@pytest.mark.parametrize("said", ["scoring in batches", ("scoring in batches",), 2.0])
def test_a_player_that_returns_something_else_is_refused(game, said):
    with pytest.raises(ValueError, match="a player returns"):
        game.play(lambda position: said)


def test_a_reader_plays_on_the_board(game, diagnosed):
    pytest.importorskip("ipywidgets")
    diagnosed.found["score"] = [("python-loop", 4.0, "score_batch")]
    other = game.play(following("BatchNorm folded"))
    board = story.Board(game, the_best_known_order=other)
    measured = len(game.compared)
    assert board.played is None
    shown = board._repr_mimebundle_()
    assert shown["text/plain"].startswith("Run this notebook to play")  # where no kernel runs
    assert len(shown) == 2
    board.part.value = "scoring"
    board.look.click()
    assert "python-loop" in board.profile.value
    assert diagnosed.looks == [("score", Settings())]
    names = list(MENU)
    for number, name in enumerate(names[:5], start=1):
        assert name in board.next.options
        board.next.value, board.expected.value = name, 2.0
        board.go.click()
        assert len(board.played.rounds) == number
        assert name not in board.next.options
    assert len(game.compared) == measured + 5
    assert board.go.disabled
    assert "the best known order" in board.rounds.value
    board.again.click()
    assert board.played is None
    assert list(board.next.options) == names
    assert not board.go.disabled


@pytest.mark.slow  # the clock decides nothing
def test_a_game_for_real(tmp_path):
    script = story.Script(tmp_path, count=24, side=80, max_epochs=1)
    game = story.Game(script, rounds=2)
    played = game.play(story.best_known)
    assert played.speedup > 0
    assert isinstance(played.rounds[0].pair, measure.Comparison)
    assert game.score(the_best_known_order=played, turns=1).speedups
