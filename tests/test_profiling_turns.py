"""What of a loop stays where its turns are one call: the work of its kernels."""

from collections import namedtuple

import pytest
import torch
from test_profiling_bounds import Steps

from dlhelpers.profiling import rules_loops
from dlhelpers.profiling.dataflow import Node, loop_lines
from dlhelpers.profiling.diagnosing import rank
from dlhelpers.profiling.following import follow
from dlhelpers.profiling.program_lines import ProgramLines
from dlhelpers.profiling.turns import OperatorCall, form_of, kernels_ms

pytestmark = pytest.mark.usefixtures("little_to_collect")  # living tensors are looked for

LINE = ("a.py", 2, "f")


def call_of(operator, *args, count=1):
    return OperatorCall(operator, form_of(args), {}, count)


def test_operators_on_small_tensors_have_no_work_and_on_large_ones_some():
    small, large = torch.ones(2), torch.ones(512, 512)
    assert kernels_ms([call_of(torch.ops.aten.add.Tensor, small, small, count=100)]) == 0
    once = kernels_ms([call_of(torch.ops.aten.mm.default, large, large)])
    often = kernels_ms([call_of(torch.ops.aten.mm.default, large, large, count=1000)])
    assert 0 < once < often


def test_an_operator_whose_arguments_fit_no_form_counts_as_no_work():
    def refuses(*_):
        raise RuntimeError

    assert kernels_ms([call_of(refuses, torch.ones(9))]) == 0


def test_named_tuples_among_the_arguments_stay_what_they_are():
    pair = namedtuple("pair", "first rest")
    given = form_of((pair(torch.ones(3), [torch.ones(2, 2), 1]), {"dim": 0}))
    assert (given[0].first.shape, given[0].rest[0].shape, given[0].rest[1]) == ((3,), (2, 2), 1)
    run = OperatorCall(print, given, {}, 1).ready(tiny=False)
    assert type(run.args[0]) is pair
    assert run.args[0].rest[0].shape == (2, 2)
    assert run.args[1] == {"dim": 0}


def test_the_forms_of_a_loops_operators_are_known_and_no_others():
    whole = torch.ones(16, 64)

    def step():
        turns = [whole[i].exp() for i in range(16)]
        return torch.stack(turns).mm(torch.ones(64, 3))

    [exp] = follow(step).turns
    assert exp.operator is torch.ops.aten.exp.default
    assert exp.args[0].shape == (64,)
    assert exp.count == 16


@pytest.mark.parametrize(
    ("kernels", "found"), [(0.0, True), (1.0, True), (6.0, False), (50.0, False)]
)
def test_a_loop_counts_as_far_as_its_cost_is_not_its_kernels(monkeypatch, kernels, found):
    """100 turns of 0.1 ms: what the kernels take of the 10 ms stays, and most of it is no loop."""
    monkeypatch.setattr(rules_loops, "kernels_ms", lambda calls: kernels)
    record = Steps()
    for _ in range(100):
        record.operator("aten::sub", 100.0)
    record.operator("aten::mm", 5000.0)
    record.steps.append((0.0, record.now))
    flow = follow(lambda: [torch.ones(4) - i for i in range(100)])
    seen = record.seen(lines=ProgramLines("", "", 1.0, outside_line=LINE), flow=flow)
    findings = [f for f in rank(seen, 0.05, lambda *_: 9.0) if f.name == "python-loop"]
    assert bool(findings) == found
    if found:
        assert findings[0].saves_ms == pytest.approx(10 - 0.1 - kernels, rel=0.01)


def test_one_plus_and_minus_is_a_sum():
    """``loss + 1 - x`` in each turn: no turn needs another one's result."""
    x = torch.rand(20)

    def sums():
        loss = 0
        for i in range(20):
            loss = loss + 1 - x[i].exp()
        return loss

    def decays():
        loss = torch.zeros(())
        for i in range(20):
            loss = loss * 0.9 - x[i]
        return loss

    assert follow(sums).operators_at_once >= 8
    assert follow(decays).operators_at_once < 8


@pytest.mark.parametrize(
    ("sizes", "uneven"),
    [
        ([("sub", 16), ("sub", 16), ("sub", 1), ("norm", 1)], False),  # each turn alike
        ([("mul", 16)], False),
    ],
)
def test_turns_that_make_tensors_of_several_sizes_are_even(sizes, uneven):
    nodes = [Node(name, set(), True, (), False, (n, "cpu"), LINE) for name, n in sizes * 20]
    assert loop_lines(nodes)[LINE].uneven == uneven


def test_parameters_of_a_model_are_uneven():
    nodes = [Node("mul_", set(), True, (), False, (n, "cpu"), LINE) for n in (64, 8) * 10]
    assert loop_lines(nodes)[LINE].uneven


def test_a_loop_has_as_many_turns_as_most_of_its_operators_have_calls():
    """Each of 50 turns takes four rows and calls three other operators once."""
    record = Steps()
    for _ in range(50):
        for name in ("aten::select",) * 4 + ("aten::sub", "aten::clamp", "aten::div"):
            record.operator(name, 10.0)
    record.steps.append((0.0, record.now))
    outside = record.seen().outside
    assert outside.turns == 50
    assert outside.loop_ms == pytest.approx(3.5)


def test_operators_of_each_turn_belong_to_the_loop_however_often_others_come():
    record = Steps()
    for _ in range(20):
        for name in ("aten::select",) * 20 + ("aten::maximum", "aten::minimum", "aten::div"):
            record.operator(name, 10.0)
    record.steps.append((0.0, record.now))
    assert record.seen().outside.loop_ms == pytest.approx(20 * 23 / 100)
