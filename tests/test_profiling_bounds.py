"""What diagnose says of a loop: its gain counts all that goes away, and chains are no loops."""

import collections
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from dlhelpers.profiling import rules_loops
from dlhelpers.profiling.dataflow import CellCall, Dataflow, Node, operators_at_once
from dlhelpers.profiling.decoders import decoders_shown, decodes
from dlhelpers.profiling.diagnosing import rank
from dlhelpers.profiling.following import follow
from dlhelpers.profiling.outside import _owned
from dlhelpers.profiling.program_lines import ProgramLines, program_lines
from dlhelpers.profiling.recurrent import recurrent_cells
from dlhelpers.profiling.sampling import Look
from dlhelpers.profiling.seen import Bottleneck, Seen
from dlhelpers.profiling.torch_profile import record_steps
from dlhelpers.profiling.trace import BACKWARD, MODEL, Event, Trace, in_order
from dlhelpers.profiling.watching import ModelCalls, watch

pytestmark = pytest.mark.usefixtures("little_to_collect")  # living tensors are looked for

# ---- steps whose waste is known by construction ----


class Steps:
    """Writes the record of equal steps on a clock of its own, in microseconds."""

    def __init__(self):
        self.events, self.steps, self.now, self.nodes, self.sequence = [], [], 0.0, [], 0

    def operator(self, name, us, node_us=0.0):
        self.events.append(
            Event(name, self.now, self.now + us, sequence=self.sequence if node_us else -1)
        )
        self.now += us
        if node_us:
            self.nodes.append((f"{BACKWARD}: {name}", node_us, self.sequence))
            self.sequence += 1

    def model(self, us, node_us):
        begin = self.now
        self.operator("aten::linear", us, node_us)
        self.events.append(Event(MODEL, begin, self.now, kind="mark"))

    def backward(self, leaf_us):
        for name, us, sequence in [*self.nodes[::-1], (f"{BACKWARD}: leaf", leaf_us, -1)]:
            self.events.append(Event(name, self.now, self.now + us, sequence=sequence))
            inner = Event(name.partition(": ")[2], self.now, self.now + us, sequence=sequence)
            self.events.append(inner)
            self.now += us
        self.nodes = []

    def optimizer(self, us):
        self.events.append(Event("Optimizer.step#SGD.step", self.now, self.now + us, kind="mark"))
        self.now += us

    def seen(self, **facts):
        trace = Trace(in_order(self.events), tuple(self.steps), 1)
        return Seen(trace, trace.wall_us / 1e3 / len(self.steps), **facts)


us = st.floats(1, 100)


@st.composite
def loops_in_steps(draw, name="aten::sub"):
    """A loop over operators beside a model: (what is seen, milliseconds that are wasted)."""
    turns, few = draw(st.integers(10, 60)), draw(st.integers(1, 3))
    parts = [(draw(us), draw(st.floats(0, 20)), draw(st.floats(0, 100))) for _ in range(few)]
    model, loss, leaf, updates = (draw(st.floats(100, 3000)) for _ in range(4))
    record = Steps()
    for _ in range(3):
        begin = record.now
        record.model(model, 2 * model)
        for _ in range(turns):
            for number, (forward, gap, node) in enumerate(parts):
                record.now += gap  # Python
                record.operator(name if number == 0 else f"aten::part{number}", forward, node)
        record.operator("aten::mean", loss, loss)
        record.backward(leaf)
        record.optimizer(updates)
        record.steps.append((begin, record.now))
    wasted = (turns - 1) * sum(map(sum, parts)) / 1e3
    call = ModelCalls(nn.Linear(2, 2), True, 3, 4, True)
    lines = ProgramLines("a.py:1", "a.py:2", 1.0)
    return record.seen(calls=[call], lines=lines), wasted


@st.composite
def python_in_steps(draw):
    model, python = draw(st.floats(100, 3000)), draw(st.floats(1000, 9000))
    record = Steps()
    for _ in range(3):
        begin = record.now
        record.model(model, model)
        record.now += python
        record.backward(10.0)
        record.steps.append((begin, record.now))
    call = ModelCalls(nn.Linear(2, 2), True, 3, 4, True)
    share = python / (record.now / 3)
    return record.seen(calls=[call], lines=ProgramLines("", "", share)), python / 1e3


@st.composite
def decoding_in_steps(draw):
    seen, decoded = draw(python_in_steps())
    lines = ProgramLines("a.py:1", decoding_share=decoded / seen.step_ms, decoding="a.py:3")
    return Seen(seen.trace, seen.step_ms, calls=seen.calls, lines=lines), decoded


WASTE = {
    "python-loop": loops_in_steps(),
    "item-every-step": loops_in_steps("aten::_local_scalar_dense"),
    "python-in-step": python_in_steps(),
    "slow-decoding": decoding_in_steps(),
}


@pytest.mark.parametrize("name", WASTE)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_a_loop_wastes_is_bounded_from_above_and_not_by_much(name, data):
    seen, wasted_ms = data.draw(WASTE[name])
    found = [f for f in rank(seen, 0.02, lambda *_: 1.0) if f.name == name]
    if not found:
        assert wasted_ms <= 0.2 * seen.step_ms or name == "item-every-step"  # one of many parts
        return
    assert found[0].is_estimated
    assert wasted_ms * (1 - 1e-6) <= found[0].saves_ms <= 1.5 * wasted_ms
    truth = min(100.0, seen.step_ms / (seen.step_ms - wasted_ms))
    assert truth * (1 - 1e-6) <= found[0].speedup <= 1.5 * truth


@given(st.floats(1.0, 3.0))
@settings(max_examples=20, deadline=None)
def test_what_recording_costs_is_not_counted_as_waste(slower):
    """Each event takes the profiler as long; the loop has most of them, the model takes long."""
    record, turns, each = Steps(), 40, 10.0 * (slower - 1)
    for _ in range(3):
        begin = record.now
        record.model(900.0 + each, 900.0 + each)
        for _ in range(turns):
            record.operator("aten::sub", 10 + each, 10 + each)
        record.backward(10.0 + each)
        record.steps.append((begin, record.now))
    trace = Trace(in_order(record.events), tuple(record.steps), 1)
    plain_ms = (900 * 2 + turns * 20 + 10) / 1e3
    lines = ProgramLines("", "", 1.0)
    [found] = rank(Seen(trace, plain_ms, lines=lines), 0.05, lambda *_: 1.0)
    wasted = 20 * (turns - 1) / 1e3
    assert wasted * 0.9 <= found.saves_ms <= 1.5 * wasted


def test_a_node_belongs_to_the_operator_that_made_it():
    """By autograd's own graph: all nodes between the loss and the model's output are the loop's."""
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    losses = []

    def step():
        outputs, total = model(x), 0
        for row in range(6):
            total = total + (outputs[row] - outputs[0]).pow(2).sum()
        losses[:] = [total, outputs.grad_fn]
        total.backward(retain_graph=True)

    with watch():
        trace = record_steps(step, 1, 1).trace
    wanted, todo, stop = collections.Counter(), [losses[0].grad_fn], losses[1]
    seen = {stop}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        wanted[node.name()] += 1
        todo += [parent for parent, _ in node.next_functions]
    events = trace.on()
    nodes = [event for event in trace.events if event.name.startswith(BACKWARD)]
    model_ends = max(e.end_us for e in events if e.name == MODEL)
    begin = min(event.start_us for event in nodes)
    loop, reached = [], 0.0
    for event in events:
        outermost = event.kind == "operator" and event.start_us >= max(reached, model_ends)
        if outermost and event.start_us < begin:
            loop.append(event)
            reached = event.end_us
    owned = dict(_owned(nodes, events, loop))
    names = [e.name.partition(": ")[2] for e in nodes if owned.get(e.start_us) == e.end_us]
    assert collections.Counter(names) == wanted


def test_a_gain_that_was_not_tried_is_no_promise():
    bound = Bottleneck("x", "suspicion", "", "", "", saves_ms=3.0, speedup=1.5, is_estimated=True)
    assert bound.gain == "about 3 ms a step: about 1.50 times as fast, not tried"
    tried = Bottleneck("x", "suspicion", "", "", "", saves_ms=3.0, speedup=1.5)
    assert tried.gain == "3 ms a step: 1.50 times as fast"


def test_a_step_that_is_all_waste_has_no_number_of_times():
    record = Steps()
    record.now = 5000.0
    record.steps.append((0.0, record.now))
    lines = ProgramLines("a.py:1", "a.py:1", 1.0)
    seen = record.seen(calls=[ModelCalls(nn.Linear(2, 2), True, 1, 4)], lines=lines)
    [found] = rank(seen, 0.05, lambda *_: 1.0)
    assert found.gain == "about 5 ms a step: next to nothing of it is left, not tried"


def test_a_loop_over_one_of_two_models_saves_no_time_of_the_other():
    def saved(*seconds):
        record = Steps()
        record.model(1000.0, 1000.0)
        record.backward(0.0)
        record.steps.append((0.0, record.now))
        made = [ModelCalls(nn.Linear(2, 2), True, 8, 1, args=(torch.zeros(1, 2),)),
                ModelCalls(nn.Linear(2, 2), True, 1, 4)]  # fmt: skip
        for call, took in zip(made, seconds, strict=True):
            call.seconds = took
        return rank(record.seen(calls=made), 0.05, lambda *_: 2.0)[0].saves_ms

    assert saved(1.0, 0.0) == pytest.approx(1.0)
    assert saved(1.0, 3.0) == pytest.approx(0.25)


# ---- loops and chains ----

V = 30


def by_sample(x, model):
    hits = 0
    for i in range(len(x)):
        hits += int(model(x[i][None]).argmax().item() == i)


def by_sample_with_a_sum(x, model):
    total = 0
    for row in x:
        total = total + model(row[None]).pow(2).sum()
    total.backward()


def eight_views(x, model):
    for _ in range(3):  # each photograph is made after the last one's class was read
        image = torch.tensor([[0.5] * 8])
        torch.cat([model(image.roll(n, 1)) for n in range(8)]).mean(0).argmax().item()


def greedy(x, model):
    y = x[:1]
    for _ in range(12):
        y = model(y)


def greedy_by_number(x, model):
    word = 1
    for _ in range(12):
        word = model(x[word][None]).argmax().item()


def greedy_by_list(x, model):
    words = [1.0] * 8
    for _ in range(12):
        words = model(torch.tensor([words])).squeeze().tolist()


def rollout(x, model):
    state = x[0].numpy()
    for _ in range(12):
        action = model(torch.from_numpy(state)[None]).detach().numpy()[0]
        state = (0.9 * state + 0.1 * action).astype("float32")


def diffusion(x, model):
    y = torch.randn(1, 8)
    for _ in range(12):
        y = y - 0.1 * model(y) + 0.01 * torch.randn_like(y)


def through_a_buffer(x, model):
    buffer = torch.zeros(13, 8)
    for t in range(12):
        buffer[t + 1] = model(buffer[t][None])[0].detach()


def through_the_weights(x, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for row in x:
        optimizer.zero_grad()
        model(row[None]).sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("run", "at_once"),
    [(by_sample, 30), (by_sample_with_a_sum, 30), (eight_views, 8)]
    + [(chain, 1) for chain in (greedy, greedy_by_number, greedy_by_list, rollout, diffusion,
                                through_a_buffer, through_the_weights)],
)  # fmt: skip
@pytest.mark.parametrize(
    "mode", [torch.enable_grad, pytest.param(torch.inference_mode, marks=pytest.mark.slow)]
)
def test_calls_of_a_model_are_a_loop_unless_one_needs_another(run, at_once, mode):
    if mode is torch.inference_mode and run in (by_sample_with_a_sum, through_the_weights):
        pytest.skip("it has a backward")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8).eval(), nn.Tanh())
    with mode():
        flow = follow(lambda: run(torch.randn(V, 8), model))
    assert flow.calls_at_once == {(id(model), True): at_once}


def pairs(x):
    total = 0
    for i in range(12):
        for j in range(i):
            total = total + (x[i] - x[j]).pow(2).sum()
    return total


def largest(x):
    best = x[0].sum()
    for row in x:
        best = torch.maximum(best, row.exp().sum())
    return best


def rows_in_place(x):
    made = x.clone()
    for row in made:
        row.sub_(row.mean()).div_(row.std())
    return made


def rows_into_another(x):
    made = torch.empty_like(x)
    for i in range(len(x)):
        made[i] = x[i].softmax(0)
    return made


def recurrence(x):
    h, weight = torch.zeros(8), torch.eye(8)
    for row in x:
        h = torch.tanh(row + weight @ h)
    return h


def discounted(x):
    value, all_of_them = torch.zeros(8), []
    for row in x:
        value = row + 0.9 * value
        all_of_them.append(value)
    return torch.stack(all_of_them)


def power_method(x):
    v, a = torch.ones(8), x[:8]
    for _ in range(20):
        v = a @ v
        v = v / v.norm()
    return v


def running_and_read(x):
    total, seen = torch.zeros(8), []
    for row in x:
        total = total + row
        seen.append((total.exp() * row).sum())
        total = total.clamp(max=5)
    return torch.stack(seen)


@pytest.mark.parametrize("run", [pairs, largest, rows_in_place, rows_into_another])
def test_turns_that_need_no_other_are_a_loop(run):
    assert follow(lambda: run(torch.randn(V, 8))).operators_at_once >= 8


@pytest.mark.parametrize("run", [recurrence, discounted, power_method, running_and_read])
def test_a_recurrence_is_no_loop(run):
    assert follow(lambda: run(torch.randn(V, 8))).operators_at_once < 8


def test_the_longest_chain_is_that_of_brute_force():
    """Against all paths of small random graphs, without sums."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        arrows = torch.rand(7, 7, generator=draw) < 0.4
        counts = [bool(c) for c in torch.rand(7, generator=draw) < 0.7]
        nodes = [
            Node("exp", {m for m in range(n) if arrows[m, n]}, counts[n], ()) for n in range(7)
        ]
        longest = max(
            sum(counts[n] for n in path)
            for size in range(1, 8)
            for path in itertools.combinations(range(7), size)
            if all(arrows[m, n] for m, n in itertools.pairwise(path))
        )
        assert operators_at_once(nodes) == sum(counts) / max(1, longest)


def test_following_a_step_leaves_everything_as_it_was():
    before = nn.Module.__call__, torch.Tensor.numpy, torch.Tensor.tolist
    with pytest.raises(KeyError):
        follow(lambda: {}["a"])
    assert before == (nn.Module.__call__, torch.Tensor.numpy, torch.Tensor.tolist)
    assert "numpy" not in vars(torch.Tensor)


def test_of_a_step_that_cannot_be_followed_nothing_is_a_loop_and_that_is_said():
    flow = follow(lambda: [torch.zeros(3).to_mkldnn() for _ in range(20)])
    assert flow == Dataflow(1.0, is_lost=True)
    lost = Seen(Trace((), ((0.0, 1000.0),)), 1.0, flow=flow)
    assert "no loop was looked for" in rank(lost, 0.05, lambda before, after: 1.0).scope


def test_turns_beside_a_sparse_gradient_are_followed():
    words, labels = nn.Embedding(50, 4, sparse=True), torch.rand(20, 4)
    optimizer = torch.optim.SGD(words.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        z = words(torch.arange(20))
        sum((z[i] - labels[i]).pow(2).sum() for i in range(20)).backward()
        optimizer.step()

    step()
    flow = follow(step)
    assert not flow.is_lost
    assert flow.operators_at_once > 8


# ---- cells ----


def teacher_forced(cell, x):
    state = None
    for row in x:
        state = cell(row, state)
    return state if isinstance(state, torch.Tensor) else state[0]


def own_words(cell, x):
    state, row = None, x[0]
    for _ in x:
        state = cell(row, state)
        row = (state if isinstance(state, torch.Tensor) else state[0])[:, :5]
    return row


def dropped_out(cell, x):
    state = torch.zeros(3, 6)
    for row in x:
        state = cell(row, F.dropout(state))
    return state


def cells_found(cell, run, speedup=lambda before, after: (before(), after(), 4.0)[2]):
    x = torch.randn(20, 3, 5)
    flow = follow(lambda: run(cell, x).sum().backward())
    record = Steps()
    record.model(4e6, 1e6)  # as long as any machine takes for it
    record.backward(1.0)
    record.steps.append((0.0, record.now))
    seen = record.seen(flow=flow)
    return list(recurrent_cells(seen, 0.0, speedup)), seen


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_loop_over_a_cell_is_told_with_its_layer(kind):
    [found], _ = cells_found(getattr(nn, f"{kind}Cell")(5, 6), teacher_forced)
    assert found.name == "recurrent-cell-loop"
    assert f"nn.{kind}(5, 6)" in found.remedy
    assert "test_profiling_bounds.py" in found.where
    assert found.saves_ms > 0
    assert found.gain.startswith("about ")  # the loop was tried, not the step
    assert found.gain.endswith(" times as fast, tried on this part alone")


def test_a_cell_that_a_layer_cannot_replace_is_no_finding():
    assert cells_found(nn.GRUCell(5, 6), own_words)[0] == []
    assert cells_found(nn.LSTMCell(5, 6), own_words)[0] == []
    assert cells_found(nn.GRUCell(5, 6), dropped_out)[0] == []

    class Own(nn.GRUCell):
        """It may compute something else."""

    assert cells_found(Own(5, 6), teacher_forced)[0] == []


def test_a_layer_that_brings_nothing_is_told_as_tried():
    found, seen = cells_found(nn.LSTMCell(5, 6), teacher_forced, lambda *_: 1.0)
    assert found == [] or found[0].saves_ms == 0
    assert CellCall is type(seen.flow.cells[0])


def test_what_was_tried_and_what_was_looked_for_is_told():
    record = Steps()
    record.model(1000.0, 1000.0)
    record.backward(1.0)
    record.steps.append((0.0, record.now))
    seen = record.seen(tried=["num_workers=2"])
    told = str(rank(seen, 0.05, lambda *_: 1.0))
    assert "tried, no gain shown: num_workers=2" in told
    assert "looked for: slow loading" in told
    assert "need not" not in told


def test_large_operators_one_by_one_are_no_waste():
    seen = _one_loop()
    flow = Dataflow(50.0, elements=4)
    looked = Seen(seen.trace, seen.step_ms, calls=seen.calls, lines=seen.lines, flow=flow)
    assert [f.name for f in rank(looked, 0.05, lambda *_: 9.0)] == ["python-loop"]
    assert rank(looked, 0.05, lambda *_: 1.2) == []
    chain = Seen(seen.trace, seen.step_ms, lines=seen.lines, flow=Dataflow(2.0, elements=4))
    assert rank(chain, 0.05, lambda *_: 9.0) == []


def _one_loop():
    record = Steps()
    for _ in range(30):
        record.operator("aten::sub", 20.0, 20.0)
    record.backward(1.0)
    record.steps.append((0.0, record.now))
    return record.seen(lines=ProgramLines("a.py:1", "a.py:2", 1.0))


# ---- decoders ----


@pytest.mark.parametrize(
    "where",
    [
        ("/v/site-packages/PIL/Image.py", 1, "open"),
        ("/v/site-packages/PIL/ImageFile.py", 1, "load"),
        ("/v/site-packages/torchvision/io/image.py", 1, "decode_jpeg"),
        ("C:\\v\\site-packages\\torchvision\\datasets\\folder.py", 1, "pil_loader"),
        ("/v/site-packages/imageio/v3.py", 1, "imread"),
        ("~", 0, "<method 'decode' of 'ImagingDecoder' objects>"),
        ("~", 0, "<imdecode>"),
    ],
)
def test_a_known_librarys_decoder_counts(where):
    assert decodes(where)


@pytest.mark.parametrize(
    "where",
    [
        ("/home/me/boxes.py", 1, "decode_boxes"),
        ("/home/me/data.py", 1, "decode"),
        ("/home/me/data.py", 1, "imread"),
        ("/v/site-packages/transformers/tokenization_utils_base.py", 1, "batch_decode"),
        ("/v/site-packages/torchvision/models/detection/_utils.py", 1, "decode"),
        ("/v/site-packages/diffusers/models/autoencoder_kl.py", 1, "decode"),
        ("/usr/lib/python3.12/json/decoder.py", 1, "decode"),
        ("/usr/lib/python3.12/base64.py", 1, "b64decode"),
        ("/v/site-packages/PIL/Image.py", 1, "resize"),
        ("~", 0, "<method 'decode' of 'bytes' objects>"),
        ("~", 0, "<built-in method zlib.decompress>"),
    ],
)
def test_a_name_alone_is_no_decoder(where):
    assert not decodes(where)


def test_a_decoder_in_c_is_shown_while_a_step_is_watched(monkeypatch):
    import sys
    import types

    stacks = []

    def imdecode(data):
        frame = sys._getframe(1)
        stacks.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        return data

    module = types.ModuleType("cv2")
    module.imdecode = imdecode
    monkeypatch.setitem(sys.modules, "cv2", module)
    with decoders_shown():
        assert module.imdecode(3) == 3
    assert module.imdecode is imdecode
    assert decodes(stacks[0])


def test_the_line_that_decodes_is_told_and_is_not_outside():
    own, pillow = ("/me/a.py", 3, "step"), ("/v/site-packages/PIL/ImageFile.py", 9, "load")
    lines = program_lines([Look(1.0, {"": [own, pillow]}), Look(3.0, {"": [("/me/a.py", 5, "f")]})])
    assert lines.decoding == "me/a.py:3"
    assert lines.decoding_share == 0.25
    assert lines.outside_line == ("/me/a.py", 5, "f")


# ---- what the bound of a loop rests on ----


def test_noise_in_some_steps_does_not_hide_what_a_loop_wastes():
    """Another program takes the machine in two of three steps, while the model runs."""
    record, turns = Steps(), 40
    for noise in (0.0, 30_000.0, 20_000.0):
        begin = record.now
        record.model(500.0 + noise, 500.0)
        for _ in range(turns):
            record.operator("aten::sub", 100.0, 100.0)
        record.backward(10.0)
        record.steps.append((begin, record.now))
    trace = Trace(in_order(record.events), tuple(record.steps), 1)
    plain_ms, wasted_ms = (20_000 + 1010 + turns * 200) / 1e3, (turns - 1) * 0.2
    facts = Seen(trace, plain_ms, lines=ProgramLines("", "", 1.0), least_ms=plain_ms - 20.0)
    [found] = rank(facts, 0.05, lambda *_: 1.0)
    truth = (plain_ms - 20.0) / (plain_ms - 20.0 - wasted_ms)
    assert truth * (1 - 1e-6) <= found.speedup <= 1.5 * truth


def test_large_operators_are_no_part_of_taking_numbers_out():
    record = Steps()
    for _ in range(4):
        record.operator("aten::matmul", 5000.0, 5000.0)
    for _ in range(12):
        record.operator("aten::mean", 100.0, 10.0)
    for _ in range(12):
        record.operator("aten::_local_scalar_dense", 2.0)
    record.backward(10.0)
    record.steps.append((0.0, record.now))
    seen = record.seen(lines=ProgramLines("", "", 1.0), flow=Dataflow(20.0, elements=9))
    assert [f.name for f in rank(seen, 0.05, lambda *_: 1.2)] == []
    assert seen.items_ms <= 12 * 2e-3
    assert seen.item_loop_ms <= 12 * 2e-3


def test_views_before_a_number_go_away_with_it():
    record = Steps()
    for _ in range(64):
        record.operator("aten::select", 10.0)
        record.operator("aten::_local_scalar_dense", 10.0)
    record.model(1000.0, 0.0)
    record.steps.append((0.0, record.now))
    [found] = rank(record.seen(flow=Dataflow(64.0)), 0.05, lambda *_: 1.0)
    assert found.name == "item-every-step"
    assert found.saves_ms == pytest.approx(63 * 20e-3)


def test_a_few_calls_of_a_large_operator_are_no_loop():
    record = Steps()
    for _ in range(6):
        record.operator("aten::matmul", 1000.0, 1000.0)
    record.backward(10.0)
    record.steps.append((0.0, record.now))
    assert record.seen().outside.loop_ms == 0


# ---- turns that need earlier ones, and tensors that are not alike ----


def three_neighbours(x):
    cells = {(i, j): torch.zeros(8) for i in range(21) for j in range(21) if i * j == 0}
    for i in range(1, 21):
        for j in range(1, 21):
            near = torch.stack([cells[i - 1, j], cells[i, j - 1], cells[i - 1, j - 1]])
            cells[i, j] = x[i] - torch.logsumexp(-near, 0)
    return cells[20, 20]


def edit_distance(x):
    row = list(x[:12].sum(1).unbind())
    for i in range(12):
        made = [row[0] + 1]
        for j in range(1, 12):
            made.append(torch.minimum(torch.minimum(row[j], made[-1]), row[j - 1]) + x[i, 0].abs())
        row = made
    return row[-1]


def sequences(x):
    """Each of 30 rows has a recurrence of its own."""
    ends = []
    for row in x:
        state = row[:1].clone()
        for t in range(8):
            state = torch.tanh(state + row[t])
        ends.append(state)
    return torch.cat(ends)


def penalty(x):
    return sum(w.pow(2).sum() for w in (torch.ones(n + 1, 3) for n in range(30)))


def loop_line_of(run):
    flow = follow(lambda: run(torch.randn(V, 8)))
    return max(flow.loops.values(), key=lambda line: line.count)


@pytest.mark.parametrize("run", [three_neighbours, edit_distance, recurrence, discounted])
def test_a_line_whose_turns_need_earlier_ones_is_no_loop(run):
    assert loop_line_of(run).at_once < 8


@pytest.mark.parametrize(
    ("run", "at_once"), [(pairs, 66), (rows_into_another, 30), (sequences, 30), (penalty, 30)]
)
def test_turns_that_need_no_other_are_counted(run, at_once):
    found = loop_line_of(run)
    assert found.at_once == at_once
    assert found.uneven == (run is penalty)


def test_a_table_of_cells_that_need_their_neighbours_is_no_finding():
    seen = _one_loop()
    flow = follow(lambda: three_neighbours(torch.randn(V, 8)))
    assert flow.operators_at_once >= 8  # on average
    looked = Seen(seen.trace, seen.step_ms, lines=seen.lines, flow=flow)
    assert rank(looked, 0.05, lambda *_: 9.0) == []


def test_parameters_that_differ_in_size_are_told_with_calls_on_lists(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(
        "def step(m, e):\n"
        "    for p, q in zip(m.parameters(), e.parameters()):\n"
        "        q.mul_(0.9).add_(p)\n"
    )
    scope = {}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    layers = [nn.Linear(n, 3, bias=False).requires_grad_(False) for n in range(1, 21)]
    flow = follow(lambda: scope["step"](nn.Sequential(*layers), nn.Sequential(*layers)))
    seen = _one_loop()
    looked = Seen(seen.trace, seen.step_ms, lines=seen.lines, flow=flow)
    [found] = rank(looked, 0.05, lambda *_: 2.0)
    assert "program.py:3" in found.where
    assert "torch._foreach_" in found.remedy
    assert "AveragedModel" in found.remedy
    assert found.saves_ms == pytest.approx(seen.outside.loop_ms * (1 - 1 / 20) * (1 - 1 / 4))


def test_the_line_is_that_of_the_loop_and_not_of_a_large_operator():
    def step():
        large = torch.mm(torch.ones(9, 9), torch.ones(9, 9))
        return [large[i % 9].exp() for i in range(30)]

    flow = follow(step)
    lines = ProgramLines("a.py:1", "a.py:2", 1.0, outside_line=("a.py", 2, "f"))
    seen = _one_loop()
    looked = Seen(seen.trace, seen.step_ms, lines=lines, flow=flow)
    [found] = rank(looked, 0.05, lambda *_: 9.0)
    assert "test_profiling_bounds.py" in found.where


@pytest.mark.parametrize(("alone_ms", "left_ms"), [(0.2, 0.3), (None, 1.11), (50.0, 1.11)])
def test_what_is_left_of_a_step_are_its_models_as_they_are_alone(monkeypatch, alone_ms, left_ms):
    """Their threads fell asleep while the loop ran, so in the step they take five times as long."""
    monkeypatch.setattr(rules_loops, "alone_ms", lambda calls: alone_ms)
    record = Steps()
    record.model(500.0, 500.0)
    for _ in range(100):
        record.operator("aten::sub", 50.0, 50.0)
    record.backward(10.0)
    record.steps.append((0.0, record.now))
    lines = ProgramLines("", "", 1.0)
    facts = record.seen(calls=[ModelCalls(nn.Linear(2, 2), True, 1, 4)], lines=lines)
    [found] = rank(facts, 0.05, lambda *_: 1.0)
    wasted_ms = 9.9
    least = (wasted_ms + left_ms) / left_ms
    assert 0.98 * least <= found.speedup <= 1.02 * facts.step_ms / left_ms


def test_a_loop_takes_no_longer_than_the_thread_that_runs_it(monkeypatch):
    monkeypatch.setattr(rules_loops, "alone_ms", lambda calls: 1.0)
    record = Steps()
    record.model(500.0, 500.0)
    for _ in range(100):
        record.operator("aten::sub", 50.0, 50.0)
    record.backward(10.0)
    record.steps.append((0.0, record.now))
    made = [ModelCalls(nn.Linear(2, 2), True, 1, 4)]
    lines = ProgramLines("", "", 1.0)
    busy = record.seen(calls=made, lines=lines, thread_ms=5.0)  # half of the time another ran
    [found] = rank(busy, 0.05, lambda *_: 1.0)
    assert found.speedup == pytest.approx(1 + 5.0 / 1.05, rel=0.03)
