"""A step that is followed computes what it does alone, whatever its tensors are."""

import pytest
import torch
from torch import nn

from dlhelpers.profiling import following
from dlhelpers.profiling.diagnosing import _follow
from dlhelpers.profiling.following import follow
from dlhelpers.profiling.watching import watch

pytestmark = pytest.mark.usefixtures("little_to_collect")  # living tensors are looked for

NEXT = nn.Module.__call__


class Odd(torch.Tensor):
    """Cannot be asked for its memory."""

    def untyped_storage(self):
        raise TypeError("no storage")


class Unlisted(nn.Linear):
    """Cannot be asked for its parameters."""

    def parameters(self, recurse=True):
        raise NotImplementedError


class Shifted(torch.optim.SGD):
    """Keeps its parameters elsewhere after a step."""

    def step(self, closure=None):
        super().step()
        self.kept, self.param_groups = self.param_groups, [{}]


def nested():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rows = [torch.ones(n, 4) for n in (2, 5, 3)]

    def step():
        x = torch.nested.nested_tensor(rows, layout=torch.jagged)
        loss = model(x).values().pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def sparse():
    return lambda: (torch.eye(4).to_sparse() @ torch.ones(4, 4)).sum()


def odd():
    x = torch.ones(4).as_subclass(Odd)
    return lambda: (x + 1).mul(2).sum()


def unlisted():
    model = Unlisted(4, 4)
    return lambda: model(torch.ones(2, 4)).sum()


def shifted():
    weights = [nn.Parameter(torch.ones(3))]
    optimizer = Shifted(weights, 0.1)

    def step():
        loss = weights[0].square().sum()
        loss.backward()
        optimizer.step()
        optimizer.param_groups = optimizer.kept
        return loss

    return step


def per_sample():
    weight, x = torch.ones(4, requires_grad=True), torch.ones(6, 4)
    loss = lambda w, row: (w * row).sum().square()  # noqa: E731
    return lambda: torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x).sum()


MAKERS = [nested, sparse, odd, unlisted, shifted, per_sample]


def watched(step):
    with watch() as seen:
        return seen.step(step)()


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("look", [follow, watched])
@pytest.mark.parametrize("make", MAKERS)
def test_a_step_of_unusual_tensors_computes_the_same_while_it_is_looked_at(make, look):
    torch.manual_seed(0)
    alone = [loss.item() for step in [make()] for loss in (step(), step())]
    torch.manual_seed(0)
    step, losses = make(), []
    for _ in range(2):
        look(lambda: losses.append(step().item()))
    assert losses == alone
    assert nn.Module.__call__ is NEXT


def test_of_a_step_that_cannot_be_followed_nothing_is_at_once():
    assert follow(nested()).operators_at_once == 1.0


def test_what_the_step_raises_is_raised():
    def step():
        raise AttributeError("its own")

    with pytest.raises(AttributeError, match="its own"):
        follow(step)
    assert nn.Module.__call__ is NEXT
    assert "tolist" not in vars(torch.Tensor)


class Decoder(nn.Module):
    """Is given the true words in some of its steps, and its own in the others."""

    def __init__(self, forced):
        super().__init__()
        self.cell, self.out, self.words = nn.GRUCell(3, 4), nn.Linear(4, 3), nn.Embedding(3, 3)
        self.forced = iter(forced)

    def forward(self, y):
        forced, state, word = next(self.forced), None, y[:, 0]
        for place in range(6):
            state = self.cell(self.words(word), state)
            word = y[:, place] if forced else self.out(state).argmax(1)
        return state


@pytest.mark.parametrize(
    ("forced", "needs", "steps"),
    [
        ([True] * 8, False, 8),
        ([True, True, False, True, True, True, True, True], True, 3),
        ([False] * 8, True, 1),
    ],
    ids=["always", "mostly", "never"],
)
def test_a_cell_that_needs_its_outputs_in_some_steps_is_needed(forced, needs, steps):
    model, y = Decoder(forced), torch.randint(0, 3, (2, 6))
    cells = _follow(lambda: model(y).sum(), 8).cells
    assert len(cells) == 6
    assert any(call.needs_cell for call in cells) is needs
    assert 8 - len(list(model.forced)) == steps


def test_where_a_step_is_slow_only_one_more_is_followed():
    model, y = Decoder([True] * 8), torch.randint(0, 3, (2, 6))
    _follow(lambda: model(y).sum(), 8, 0.0)
    assert len(list(model.forced)) == 6


def test_of_the_further_steps_the_forward_pass_alone_is_looked_at(monkeypatch):
    """The first step is followed whole; what is noted of the others is no more than they need."""
    noted, cell = [], nn.GRUCell(3, 4)
    note = following._Graph._note_inputs
    monkeypatch.setattr(
        following._Graph, "_note_inputs", lambda me, *a: (noted.append(1), note(me, *a))[1]
    )
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1, foreach=False)

    def forward():
        state = None
        for x in torch.ones(5, 2, 3):
            state = cell(x, state)
        return state.sum()

    def step():
        forward().backward()
        optimizer.step()

    following.cells_that_need(forward, {id(cell)}, 1, 0.0)
    of_forward = len(noted)
    noted.clear()
    assert following.cells_that_need(step, {id(cell)}, 3, 60.0) == set()
    assert 3 * of_forward <= len(noted) < 3 * (of_forward + 9)  # and the gradient that begins
