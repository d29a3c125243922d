# ruff: noqa: PT012, PT031  (the block under test is a training loop)
"""pairing.guard: finds what is wrong, keeps silent where nothing is, and leaves nothing behind."""

import inspect
import re
import threading
import warnings

import healthy_programs
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode

from dlhelpers import pairing
from dlhelpers.pairing import PairingWarning

held = F.nll_loss
X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 5


def line() -> int:
    return inspect.currentframe().f_back.f_lineno


def model(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), *more)


def train(net, loss, steps=3, target=Y):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net(X), target).backward()
        optimizer.step()


def stack() -> list:
    return torch.overrides._get_current_function_mode_stack()


def hooks() -> tuple[int, int]:
    from torch.nn.modules import module
    from torch.optim import optimizer

    return len(optimizer._global_optimizer_post_hooks), len(module._global_forward_pre_hooks)


@pytest.fixture(autouse=True)
def _nothing_remains():
    before = stack(), hooks()
    yield
    assert (stack(), hooks()) == before


SUSPICIONS = {"least_squares_gan_with_noisy_labels": {"target-outside-0-1"}}  # labels up to 1.2


@pytest.mark.parametrize("program", healthy_programs.PROGRAMS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("steps", [3, 20])
def test_healthy_programs_are_left_in_peace(program, steps):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PairingWarning)
        with pairing.guard(steps=steps) as findings:
            program()
    assert not findings.errors
    looked = r"nothing found in [1-9]\d* looks? at [1-9]\d* loss(es)?"
    unseen = program.__name__ == "triplet"  # none of pairing.LOSSES
    assert bool(re.fullmatch(looked, findings.scope)) is not unseen
    assert {f.name for f in findings} == SUSPICIONS.get(program.__name__, set())


@pytest.mark.parametrize("program", healthy_programs.PROGRAMS[:8], ids=lambda p: p.__name__)
def test_the_guard_changes_no_random_number(program):
    torch.manual_seed(3)
    program(2)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with pairing.guard():
        program(2)
    assert torch.equal(torch.rand(3), expected)


def test_the_guard_changes_no_bit_of_the_weights():
    plain, watched = model(nn.Dropout(0.5), nn.Softmax(1)), model(nn.Dropout(0.5), nn.Softmax(1))
    torch.manual_seed(1)
    train(plain, nn.CrossEntropyLoss(), 5)
    torch.manual_seed(1)
    with pytest.warns(PairingWarning), pairing.guard(steps=3):
        train(watched, nn.CrossEntropyLoss(), 5)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)


def test_it_reports_once_a_call_site_with_file_and_line():
    net, criterion = model(nn.Softmax(1)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(PairingWarning) as caught, pairing.guard() as findings:
        for _ in range(4):
            criterion(net(X), Y).backward()
            first = line() - 1
            assert len(findings) >= 1, "live"
            F.cross_entropy(net(X), Y).backward()
            second = line() - 1
            optimizer.step()
    assert [f.name for f in findings] == ["softmax-into-cross-entropy"] * 2
    assert [f.where for f in findings] == [f"{_name()}:{first}", f"{_name()}:{second}"]
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, first), (__file__, second)]


def _name() -> str:
    from dlhelpers.pairing.places import shown_path

    return shown_path(__file__)


WAYS = {
    "module": (nn.CrossEntropyLoss(), nn.Softmax(1), "softmax-into-cross-entropy"),
    "function": (F.cross_entropy, nn.Softmax(1), "softmax-into-cross-entropy"),
    "imported name": (cross_entropy, nn.Softmax(1), "softmax-into-cross-entropy"),
    "held reference": (held, nn.Softmax(1), "softmax-into-nll"),
    "lambda": (lambda p, t: F.cross_entropy(p, t), nn.Softmax(1), "softmax-into-cross-entropy"),
    "raw logits": (held, nn.Identity(), "logits-into-nll"),
    "wrong axis": (nn.NLLLoss(), nn.LogSoftmax(0), "softmax-over-wrong-axis"),
    "sigmoid": (
        lambda p, t: nn.BCEWithLogitsLoss()(p, F.one_hot(t, 5).float()),
        nn.Sigmoid(),
        "sigmoid-into-bce-with-logits",
    ),
    "keywords": (
        lambda p, t: F.cross_entropy(target=t, input=p, label_smoothing=0.1),
        nn.Softmax(1),
        "softmax-into-cross-entropy",
    ),
}


@pytest.mark.parametrize(("loss", "head", "name"), WAYS.values(), ids=WAYS)
def test_every_way_to_call_a_loss_is_seen(loss, head, name):
    with pytest.warns(PairingWarning), pairing.guard() as findings:
        train(model(head), loss, 2)
    assert [f.name for f in findings.errors] == [name]


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_broadcasting_is_found_in_unchanged_code():
    with pytest.warns(PairingWarning, match="broadcast-target"), pairing.guard() as findings:
        train(model(nn.Linear(5, 1)), nn.MSELoss(), target=torch.randn(16))
    assert [f.name for f in findings] == ["broadcast-target"]


def test_a_loud_error_is_explained_before_it_is_raised():
    with pytest.warns(PairingWarning), pytest.raises(IndexError), pairing.guard() as findings:
        F.cross_entropy(model()(X), Y + 3)
    assert [f.name for f in findings] == ["class-index-out-of-range"]


def _evaluate(batches):
    with torch.no_grad():
        for outputs in batches:
            F.cross_entropy(outputs, Y)


def test_numbers_alone_count_only_where_every_look_shows_them():
    probabilities, logits = X[:, :5].softmax(1), 3 * X[:, :5]
    with pytest.warns(PairingWarning), pairing.guard() as findings:
        _evaluate([probabilities, probabilities])
    assert findings.errors
    with pairing.guard() as findings:
        _evaluate([probabilities, logits, probabilities, probabilities])
    assert not findings
    with pairing.guard() as findings:
        _evaluate([logits, probabilities, probabilities])
    assert not findings


def test_numbers_alone_wait_for_the_second_look():
    with pytest.warns(PairingWarning), pairing.guard() as findings:
        for expected in (0, 1, 1):
            F.cross_entropy(X[:, :5].softmax(1), Y)
            assert len(findings) == expected


def test_a_block_of_one_look_reports_at_its_end():
    with pytest.warns(PairingWarning), pairing.guard() as findings:
        _evaluate([X[:, :5].softmax(1)])
    assert [f.severity for f in findings] == ["error"]


def test_a_suspicion_of_numbers_alone_needs_every_look_too():
    inside = torch.rand(16, 5)
    with pairing.guard() as findings:
        _evaluate([inside] * 6)
    assert [(f.name, f.severity) for f in findings] == [("sigmoid-into-cross-entropy", "suspicion")]
    with pairing.guard() as findings:
        _evaluate([inside] * 4 + [3 * X[:, :5]] * 2)
    assert not findings


def test_it_leaves_the_stack_after_its_steps():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pairing.guard(steps=3):
        for step in range(5):
            assert len(stack()) == (step < 3)
            F.cross_entropy(net(X), Y).backward()
            optimizer.step()


class Other(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_it_leaves_the_stack_from_under_other_modes():
    with pairing.guard(steps=1) as findings, Other() as above, Other() as top:
        train(model(), F.cross_entropy, 2)
        assert stack() == [above, top]
    assert not findings


def test_two_optimizers_do_not_count_double():
    net = model()
    both = [torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2)]
    with pairing.guard(steps=2):
        for _ in range(2):
            assert stack()
            F.cross_entropy(net(X), Y).backward()
            for optimizer in both:
                optimizer.step()
        assert not stack()


def test_it_leaves_without_an_optimizer_too():
    net = model()
    with pairing.guard(steps=3):
        for _ in range(9):
            F.cross_entropy(net(X), Y).backward()
            for parameter in net.parameters():
                parameter.data -= 0.1 * parameter.grad
                parameter.grad = None
        assert not stack()


@pytest.mark.parametrize("batches", [3, 100])
def test_a_validation_before_training_does_not_end_the_watch(batches):
    net, sound = model(nn.Softmax(1)), model()
    with pytest.warns(PairingWarning), pairing.guard(steps=5) as findings, Other() as other:
        for _ in range(batches):
            _evaluate([sound(X)])
        assert len(stack()) == 1 + (batches < 10)
        train(net, nn.CrossEntropyLoss(), 4)
        assert len(stack()) == 2
        assert stack()[-1] is other
        train(net, nn.CrossEntropyLoss(), 5)
        assert stack() == [other]
    assert len(findings.errors) == 1


def test_many_calls_a_step_end_the_watch_after_two_steps():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pairing.guard(steps=4):
        for step in range(4):
            assert len(stack()) == (step < 3)
            for _ in range(7):
                F.cross_entropy(net(X), Y).backward()
            optimizer.step()


def test_an_evaluation_without_end_is_left():
    net = model()
    with pairing.guard(steps=2):
        for _ in range(30):
            _evaluate([net(X)])
        assert not stack()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_loop_leaves_nothing_behind(error):
    with pytest.raises(error), pairing.guard():
        train(model(), F.cross_entropy, 1)
        raise error


def test_guards_nest_and_are_used_again():
    again = pairing.guard(steps=2)
    for _ in range(2):
        warned = pytest.warns(PairingWarning)
        with warned, again as outer, pairing.guard() as inner, again as same:
            train(model(nn.Softmax(1)), F.cross_entropy)
        assert [len(findings) for findings in (outer, inner, same)] == [1, 1, 1]
    assert outer is not same


def test_other_threads_are_not_watched_and_do_not_end_the_watch():
    with pairing.guard(steps=1) as findings:
        thread = threading.Thread(target=train, args=(model(nn.Softmax(1)), F.cross_entropy))
        thread.start()
        thread.join()
        assert len(stack()) == 1
        assert not findings
        with pytest.warns(PairingWarning):
            train(model(nn.Softmax(1)), F.cross_entropy, 1)
    assert len(findings) == 1


def test_a_validation_after_the_first_steps_does_not_end_the_watch():
    sound, wrong = model(), model(nn.Softmax(1))
    with pytest.warns(PairingWarning), pairing.guard(steps=5) as findings:
        train(sound, F.cross_entropy, 2)
        for _ in range(30):
            _evaluate([sound(X)])
        F.cross_entropy(wrong(X), Y)
    assert len(findings) == 1


def test_each_call_site_is_looked_at_no_more_than_steps_times(monkeypatch):
    looks = []
    monkeypatch.setattr("dlhelpers.pairing.watch.look", lambda *a, **k: looks.append(a) or ())
    with pairing.guard(steps=3):
        for _ in range(5):
            F.mse_loss(X, X)
    assert len(looks) == 3


def test_a_failing_inspection_is_not_seen_by_the_program(monkeypatch):
    def broken(*_args, **_kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("dlhelpers.pairing.watch.look", broken)
    with pairing.guard() as findings:
        train(model(nn.Softmax(1)), F.cross_entropy)
    assert not findings


@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_pass():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with pairing.guard() as findings:
        F.mse_loss(torch.empty(3, device="meta"), torch.empty(3, device="meta"))
        with FakeTensorMode():
            F.cross_entropy(torch.randn(3, 5), torch.zeros(3).long())
        grad = torch.func.grad(lambda w: F.mse_loss(w * X, X))
        assert grad(torch.tensor(2.0)) > 0
        torch.vmap(lambda p, t: F.mse_loss(p, t))(X, X)
        with pytest.raises(TypeError):
            F.cross_entropy(X)
    assert not findings.errors


def test_a_compiled_model_goes_on_working():
    torch._dynamo.reset()
    net = model(nn.Softmax(1))
    compiled = torch.compile(net, backend="aot_eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(PairingWarning), pairing.guard(steps=3) as findings:
        for _ in range(5):
            cross_entropy(compiled(X), Y).backward()
            optimizer.step()
    assert [f.name for f in findings] == ["softmax-into-cross-entropy"]
    torch._dynamo.reset()


def test_warnings_turned_into_errors_raise():
    with pytest.raises(PairingWarning), warnings.catch_warnings(), pairing.guard():
        warnings.simplefilter("error", PairingWarning)
        train(model(nn.Softmax(1)), F.cross_entropy)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "20", True, None])
def test_odd_steps_are_named(steps):
    with pytest.raises(ValueError, match="whole number"):
        pairing.guard(steps=steps)


def test_large_tensors_are_sampled():
    from dlhelpers.pairing.values import Values

    big = torch.zeros(1000, 1000).softmax(1)
    seen = Values(big, 4096)
    assert 1 < seen.sums_to_one(1) <= 5


def test_an_empty_list_says_how_much_was_looked_at():
    with pairing.guard() as findings:
        assert str(findings).startswith("no loss of pairing.LOSSES was seen")
        train(model(), nn.CrossEntropyLoss(), 3)
        assert str(findings) == "nothing found in 3 looks at 1 loss"
        F.cross_entropy(X, Y)
    assert str(findings) == "nothing found in 4 looks at 2 losses"
    assert findings._repr_html_() == "<p>Nothing found in 4 looks at 2 losses.</p>"
    with pairing.guard() as findings:
        thread = threading.Thread(target=train, args=(model(), nn.CrossEntropyLoss()))
        thread.start()
        thread.join()
    assert (
        str(findings)
        == "no loss of pairing.LOSSES was seen: other threads and later phases are not watched"
    )


@pytest.mark.parametrize("with_grad", [False, True])
def test_it_leaves_a_loop_written_from_scratch(with_grad):
    weight, left = torch.zeros(6, 5, requires_grad=True), []
    before = stack()
    with pairing.guard(steps=3):
        for _ in range(20):
            loss = F.cross_entropy(X @ weight, Y)
            if with_grad:
                (gradient,) = torch.autograd.grad(loss, weight)
            else:
                loss.backward()
                gradient, weight.grad = weight.grad, None
            with torch.no_grad():
                weight -= 0.1 * gradient
            left.append(stack() == before)
    assert left[-1]
    assert left.index(True) < 10


def test_a_torch_without_the_private_names_is_left_alone(monkeypatch):
    def missing():
        raise AttributeError("_get_current_function_mode_stack")

    with monkeypatch.context() as patch:
        patch.setattr(torch.overrides, "_get_current_function_mode_stack", missing)
        with pytest.warns(RuntimeWarning, match="watches nothing"), pairing.guard() as findings:
            train(model(nn.Softmax(1)), nn.CrossEntropyLoss())
    assert "nothing was watched" in str(findings)


def test_it_decorates_a_function():
    @pairing.guard()
    def program():
        train(model(nn.Softmax(1)), nn.CrossEntropyLoss())

    for _ in range(2):
        with pytest.warns(PairingWarning):
            program()


def test_the_line_is_the_programs_own_where_a_helper_of_the_package_trains():
    from dlhelpers.course.training import fit

    net = nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=1))
    data = torch.rand(8, 4), torch.zeros(8, dtype=torch.long)
    with warnings.catch_warnings(record=True), pairing.guard() as findings:
        fit(net, nn.CrossEntropyLoss(), data, epochs=1)
    assert "test_pairing_guard.py" in findings[0].where
