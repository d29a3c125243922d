"""A bound that means what it says: for each sample, held out, beside the accuracy."""

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from dlhelpers.quantization import (
    QuantizationReport,
    backends,
    onnx_backends,
    openvino_backends,
    quantize_dynamic,
    quantize_static,
    racing,
    sample_sqnr_db,
    sqnr_db,
    static,
    torch_backends,
)
from dlhelpers.quantization.batches import Outputs, read_batches, run_float
from dlhelpers.quantization.judging import held_out, judge_of
from dlhelpers.quantization.report import BackendRow
from dlhelpers.quantization.samples import layout_of, outliers
from dlhelpers.quantization.sizes import Sizes

FAST = {"budget_s": 0.02, "progress": False}
pytestmark = pytest.mark.usefixtures("one_table_of_operators")
has_onnx = all(importlib.util.find_spec(n) for n in ("onnx", "onnxruntime", "onnxscript"))
has_openvino = has_onnx and importlib.util.find_spec("openvino") is not None
needs_onnx = pytest.mark.skipif(not has_onnx, reason="the extra engines is not installed")
needs_openvino = pytest.mark.skipif(not has_openvino, reason="OpenVINO is not installed")


def by_numpy(y, z):
    """The rule again, for one output [N, ...]."""
    y, z = (np.asarray(t, dtype=np.float64).reshape(len(t), -1) for t in (y, z))
    power, noise = (y**2).mean(1), ((y - z) ** 2).mean(1)
    floor = 0.01 * np.median(power[power > 0]) if power.any() else 0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(noise == 0, np.inf, 10 * np.log10(np.maximum(power, floor) / noise))
    return np.quantile(ratios, 0.1) if len(ratios) >= 20 else ratios.min()


# ---- the measure ----


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60).filter(lambda n: n % 2 or n > 20), st.integers(0, 10_000))
def test_the_ratio_of_samples_is_numpys_whatever_the_batches_and_the_scale(n, seed):
    generator = torch.Generator().manual_seed(seed)
    loud = torch.randn(n, 1, generator=generator).mul(2).exp()  # samples of unlike power
    y = loud * torch.randn(n, 5, generator=generator)
    z = y + 0.1 * torch.randn(n, 5, generator=generator)
    expected = by_numpy(y, z)
    assert sample_sqnr_db([[y]], [[z]]) == pytest.approx(expected, abs=1e-3)
    cut = int(torch.randint(0, n + 1, (), generator=generator))
    parts = [[[t[:cut]], [t[cut:]]] for t in (y, z)]
    assert sample_sqnr_db(*parts) == pytest.approx(expected, abs=1e-3)
    scaled = sample_sqnr_db([[1000 * y.double()]], [[1000 * z.double()]])
    assert scaled == pytest.approx(expected, abs=1e-3)


def test_even_numbers_of_samples_have_a_median_between_two():
    y = torch.tensor([[1.0], [0.01], [3.0], [0.02]])
    z = y + 0.001
    assert sample_sqnr_db([[y]], [[z]]) == pytest.approx(by_numpy(y, z), abs=1e-3)


def test_one_loud_sample_hides_the_others_in_the_sum_alone():
    y = torch.ones(30, 4)
    y[7] = 1000
    z = y + 1.0
    assert sqnr_db([[y]], [[z]]) > 40
    assert sample_sqnr_db([[y]], [[z]]) == pytest.approx(0, abs=1e-6)


def test_a_quiet_sample_does_not_condemn_and_one_in_ten_may_be_bad():
    y = torch.ones(10, 4)
    y[3] = 1e-6
    assert sample_sqnr_db([[y]], [[y + 0.01]]) == pytest.approx(20)  # 40 dB less 20 of the floor
    y, z = torch.ones(30, 4), torch.ones(30, 4) + 0.01
    z[3] = 5.0
    assert sample_sqnr_db([[y]], [[z]]) == pytest.approx(40)
    assert sample_sqnr_db([[y[:19]]], [[z[:19]]]) < 0  # few samples: the worst


@pytest.mark.parametrize(("zero", "n"), [(11, 21), (16, 30), (20, 21), (3, 5), (1, 1), (0, 7)])
def test_samples_that_are_zero_throughout_are_no_part_of_the_median(zero, n):
    """As after a ReLU: a rounding error in one of them condemns no more than in a quiet one."""
    y = randn(n, 4)
    y[:zero] = 0
    z = y + 1e-3 * randn(n, 4, seed=1) * (torch.arange(n)[:, None] >= zero // 2)
    found = sample_sqnr_db([[y]], [[z]])
    assert found == pytest.approx(by_numpy(y, z), abs=1e-3)
    assert (found > 20) == (zero < n)


def test_the_worst_output_counts_and_nonsense_is_minus_infinite():
    y = torch.ones(4, 3)
    whole = torch.arange(4)
    ratio = sample_sqnr_db([[y, whole, y]], [[y + 0.1, whole + 1, y + 0.01]])
    assert ratio == pytest.approx(20)
    assert sample_sqnr_db([[y]], [[y]]) == math.inf
    assert sample_sqnr_db([[0 * y]], [[y]]) == -math.inf
    assert sample_sqnr_db([[y]], [[y * torch.nan]]) == -math.inf
    assert sample_sqnr_db([[y]], [[y[:2]]]) == -math.inf
    assert sample_sqnr_db([[y]], [[]]) == -math.inf
    assert sample_sqnr_db([[y[0, 0]]], [[y[0, 0] + 0.1]]) == pytest.approx(20)  # one sample


# ---- where the samples stand ----


class Of(nn.Module):
    """A forward as a function of the module and its inputs."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.of = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs):
        return self.of(self, *inputs)


def layout(model, *inputs):
    model, batches = model.eval(), [inputs]
    return layout_of(model, batches, [o.tensors for o in run_float(model, batches)])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recurrent(**options):
    torch.manual_seed(0)
    return nn.LSTM(4, 4, **options)


def masked(module, x, mask):
    return module.layer(x, src_mask=mask)


def attending():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)


@pytest.mark.parametrize(
    ("model", "inputs", "axes", "outputs"),
    [
        (nn.Linear(10, 10), (randn(10, 10),), (10, (0,)), [0]),
        (nn.Linear(4, 10), (randn(1, 4),), (1, (0,)), [0]),
        (Of(lambda m, x: x.transpose(0, 1) * 2), (randn(6, 6, 4),), (6, (0,)), [1]),
        (recurrent(), (randn(5, 5, 4),), (5, (1,)), [1] * 3),
        (
            Of(lambda m, x, h, c: m.rnn(x, (h, c)), rnn=recurrent(batch_first=True)),
            (randn(5, 7, 4), randn(1, 5, 4, seed=1), randn(1, 5, 4, seed=2)),
            (5, (0, 1, 1)),
            [0, 1, 1],
        ),
        (
            Of(masked, layer=attending()),
            (randn(10, 10, 16), torch.zeros(10, 10)),
            (10, (0, None)),
            [0],
        ),
        (Of(lambda m, x: (2 * x).view(-1, 9)), (randn(4, 6, 9),), (4, (0,)), [0]),
        (Of(lambda m, x: (2 * x).mean()), (randn(6, 4),), (None, (None,)), [None]),
        (Of(lambda m, x: x.view(6, 4) * 2), (randn(6, 4),), (None, (None,)), [None]),
        (Of(lambda m, x: (x * 2, x @ x.T)), (randn(6, 4),), (6, (0,)), [0, 0]),
        (nn.Conv2d(3, 8, 3), (randn(3, 9, 9),), (None, (None,)), [None]),
    ],
)
def test_samples_are_found_by_running_with_another_number(model, inputs, axes, outputs):
    found = layout(model, *inputs)
    assert (found.size, found.inputs) == axes
    assert [place.axis for place in found.outputs] == outputs
    assert not any(place.is_open for place in found.outputs)


def scaled_layer(module, *inputs):
    """A layer on the last input, times or after the others."""
    *others, x = inputs
    y = module.layer(x)
    for other in others:
        y = other @ y if other.dim() == 2 else y * other
    return y.mean(1) if y.dim() == 3 else y


def six_to_three():
    torch.manual_seed(0)
    return nn.Linear(6, 3)


GRAPH = Of(scaled_layer, layer=six_to_three())


@pytest.mark.parametrize(
    ("model", "inputs", "size", "axes"),
    [
        (GRAPH, (randn(5, 5), randn(24, 5, 6)), 24, (None, 0)),
        (GRAPH, (randn(5, 5), randn(5, 5, seed=1), randn(24, 5, 6)), 24, (None, None, 0)),
        (GRAPH, (randn(5, 5), randn(5, 5, 6)), 5, (None, 0)),
        (GRAPH, (torch.tensor([1.5]), randn(24, 6)), 24, (None, 0)),
        (GRAPH, (torch.tensor(1.5), randn(24, 6)), 24, (None, 0)),
        (Of(lambda m, p, x: x @ p.T), (randn(10, 8), randn(24, 8)), 24, (None, 0)),
        (Of(lambda m, p, x: 2 * (x + p)), (randn(7, 6), randn(4, 7, 6)), 4, (None, 0)),
        (Of(lambda m, p, x: 2 * (x + p)), (randn(4, 6), randn(4, 4, 6)), 4, (None, 0)),
        (
            Of(lambda m, k, x: m.layer(x, src_mask=k), layer=attending()),
            (torch.zeros(10, 10), randn(10, 10, 16)),
            10,
            (None, 0),
        ),
        (
            Of(lambda m, h, x: m.rnn(x, h)[0], rnn=nn.GRU(4, 4)),
            (randn(1, 5, 4), randn(7, 5, 4)),
            5,
            (1, 1),
        ),
    ],
)
def test_samples_may_stand_in_another_input_than_the_first(model, inputs, size, axes):
    found = layout(model, *inputs)
    assert (found.size, found.inputs) == (size, axes)
    turned = Of(lambda m, *given: m.inner(*given[::-1]), inner=model)
    found = layout(turned, *inputs[::-1])
    assert (found.size, found.inputs) == (size, axes[::-1])


def entries_of(y):
    return [{"a": one, "b": 2 * one.sum() + 1} for one in y]


def lists_of(y):
    return {"a": list(y), "b": [2 * one.sum() + 1 for one in y]}


def alike_entries_of(y):
    return [(one, one.flip(0) + 1) for one in y]


def alike_lists_of(y):
    return list(y), [one.flip(0) + 1 for one in y]


@pytest.mark.parametrize("as_given", [entries_of, lists_of, alike_entries_of, alike_lists_of])
@pytest.mark.parametrize("sizes", [(8,), (1,), (24,), (6, 5), (3, 8, 1, 5)])
def test_an_output_with_an_entry_for_each_sample_is_judged_by_them(as_given, sizes):
    """Against NumPy, of the same outputs as one tensor for each kind."""
    model = Of(lambda m, x: as_given(m.layer(x)), layer=six_to_three()).eval()
    batches = [(randn(n, 6, seed=n),) for n in sizes]
    outputs = run_float(model, batches)
    judge = judge_of(model, batches, outputs)
    assert judge.layout.size == sizes[0]
    noisy = [[t + 0.1 * (t + i).sin() for i, t in enumerate(o.tensors)] for o in outputs]
    # a kind is known by its place: every other one, or the first half
    each = []
    for kind in range(2):
        pairs = []
        for output, found in zip(outputs, noisy, strict=True):
            half = len(found) // 2
            chosen = slice(kind, None, 2)
            if as_given in (lists_of, alike_lists_of):
                chosen = slice(kind * half, (kind + 1) * half)
            pairs += zip(output.tensors[chosen], found[chosen], strict=True)
        each.append(by_numpy(*(torch.stack([pair[i] for pair in pairs]) for i in (0, 1))))
    ratio, _ = judge.ratios(noisy)
    assert ratio == pytest.approx(min(each), abs=1e-3)


def test_an_outlier_is_named_where_the_output_is_a_list():
    x = randn(16, 6)
    x[5] *= 300
    model = Of(lambda m, x: entries_of(m.layer(x)), layer=six_to_three())
    _, judge, notes = divided([x], model)
    assert "batch 0, sample 5 (" in notes[0]
    assert notes[1] == "4 of 16 samples were held out of the calibration, to judge on"
    assert judge.is_bounded


def test_shapes_that_follow_from_the_data_are_told_from_those_of_the_batch():
    found = layout(Of(lambda m, x: (2 * x, x[x > 0.3], x[x.sum(1) > 0])), randn(6, 4))
    assert [place.is_open for place in found.outputs] == [False, True, True]
    # a convolution over time that is no batch follows in no proportion, but from its size alone
    conv = nn.Conv1d(1, 2, 3)
    assert not layout(Of(lambda m, x: m.c(x[None, None])[0], c=conv), randn(40)).outputs[0].is_open


def test_samples_of_a_time_first_batch_are_judged_one_by_one():
    """Against NumPy; the sum over time and samples together says something else."""
    model, x = recurrent().eval(), randn(7, 25, 4)
    x[:, 3] *= 100
    batches = [(x,)]
    wanted = run_float(model, batches)
    judge = judge_of(model, batches, wanted)
    noisy = [t + 0.05 * randn(*t.shape, seed=9) for t in wanted[0].tensors]
    ratio, total = judge.ratios([noisy])
    each = [
        by_numpy(*(t.movedim(1, 0) for t in pair))
        for pair in zip(wanted[0].tensors, noisy, strict=True)
    ]
    assert ratio == pytest.approx(min(each), abs=1e-3)
    assert total == pytest.approx(sqnr_db([wanted[0].tensors], [noisy]))


# ---- what is held out ----


def divided(batches, model=None):
    model = (model or nn.Linear(4, 3)).eval()
    batches = read_batches(batches)
    return held_out(model, batches, run_float(model, batches))


def rows_of(batches):
    return {tuple(row.tolist()) for (x,) in batches for row in x}


@pytest.mark.parametrize(
    ("sizes", "held", "says"),
    [
        ([8], 2, "2 of 8 samples were held out"),
        ([4], 1, "1 of 4 samples was held out"),
        ([59], 14, "14 of 59 samples"),
        ([64], 20, "20 of 64 samples"),  # enough for a quantile
        ([5] * 12, 20, "4 of 12 batches were"),
        ([100], 25, "25 of 100 samples"),
        ([6, 6], 3, "3 of 12 samples"),
        ([5] * 8, 10, "2 of 8 batches were held out"),
        ([1] * 4, 1, "1 of 4 batches was held out"),
        ([4, 4, 4, 4, 3], 4, "1 of 5 batches"),
        (
            [3],
            3,
            "same data: ranges were chosen and judged on the same samples (there are fewer",
        ),
        ([1, 1], 2, "same data"),
    ],
)
def test_no_sample_is_calibrated_on_and_judged(sizes, held, says):
    batches = [randn(n, 4, seed=i) for i, n in enumerate(sizes)]
    rest, judge, notes = divided(batches)
    assert any(says in note for note in notes)
    assert [len(x) for (x,) in rest] == sizes[: len(rest)] or len(rest) < len(sizes)
    looked = set()
    for (x,), samples in zip(judge.batches, judge.samples or [None] * 9, strict=False):
        looked |= rows_of([(x if samples is None else x[samples],)])
    assert len(looked) == held
    seen = rows_of(rest)
    if "same data" in says:
        assert seen == looked
    else:
        assert not seen & looked
        assert seen | looked == rows_of([(x,) for x in batches])


def test_where_nothing_counts_samples_whole_batches_are_held_out():
    fixed = Of(lambda m, x: m.l(x.view(6, 4)), l=nn.Linear(4, 3))
    rest, judge, notes = divided([randn(6, 4), randn(6, 4, seed=1)], fixed)
    assert len(rest) == 1
    assert judge.samples == [None, []]
    assert notes == ["1 of 2 batches was held out of the calibration, to judge on"]
    _, judge, notes = divided([randn(6, 4)], fixed)
    assert not judge.samples
    assert "no axis of the inputs was found that counts samples" in notes[0]


def unlike_images(count, channels=1):
    return [randn(1, channels, 8 + i % 7, 9 + i % 5, seed=i) for i in range(count)]


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (nn.Conv2d(1, 2, 3), unlike_images(30)),
        (nn.Conv2d(1, 2, 3), [randn(2, 1, 8, 8), *(randn(8, 1, 8, 8, seed=i) for i in range(4))]),
        (nn.Conv2d(1, 2, 3), [randn(1, 1, 8, 8), randn(25, 1, 9, 8)]),
        (Of(lambda m, x: m.r(x)[0], r=recurrent()), [randn(5 + i, 6, 4, seed=i) for i in range(5)]),
        (
            Of(lambda m, x: (2 * x).view(-1, 4)),
            [randn(6, 5 + i, 4, seed=i) for i in range(5)],
        ),
        (Of(lambda m, a, x: a @ x), [(randn(n, n), randn(7, n, 3, seed=n)) for n in (5, 6, 7, 8)]),
    ],
)
def test_batches_of_other_sizes_decide_as_well(model, batches):
    """Against NumPy over the samples that were held out, whatever their sizes."""
    model = model.eval()
    batches = read_batches(batches)
    rest, judge, notes = held_out(model, batches, run_float(model, batches))
    assert any("held out of the calibration" in note for note in notes)
    assert rest[0][0].shape == batches[0][0].shape
    noisy = [
        [t + 0.1 * (1 + i) * randn(*t.shape, seed=i) for t in wanted]
        for i, wanted in enumerate(judge.wanted)
    ]
    ratios = []
    axis = next(a for a in judge.layout.inputs if a is not None)
    place = judge.layout.outputs[0]
    for i, batch in enumerate(judge.batches):
        size = batch[-1].shape[axis]
        y, z = (
            t[i][0].unflatten(place.axis, (size, -1)).movedim(place.axis, 0)
            for t in (judge.wanted, noisy)
        )
        for sample in range(size) if judge.samples[i] is None else judge.samples[i]:
            error = y[sample] - z[sample]
            ratios.append((y[sample].square().mean(), error.square().mean()))
    power, noise = np.array(ratios).T
    each = 10 * np.log10(np.maximum(power, 0.01 * np.median(power)) / noise)
    expected = np.quantile(each, 0.1) if len(each) >= 20 else each.min()
    assert judge.ratios(noisy)[0] == pytest.approx(expected, abs=1e-3)


def of_eights():
    """Inputs that a backend takes, of the sizes of the first."""
    dimensions = ((None, 8),)
    return Sizes(("input 0",), (torch.float32,), dimensions)


def test_a_backend_is_judged_on_the_batches_that_it_takes_and_its_row_says_so(monkeypatch):
    ran = []

    def build(task):
        def run(batch):
            ran.append(batch[0].shape[1])
            return torch_backends.runner(task.model)(batch)

        return backends.Backend("X", "int8", run, 1, int8_kernels=1, sizes=of_eights())

    plan = {"eager float32": ("float32", torch_backends.eager), "X": ("int8", build)}
    monkeypatch.setattr(static, "_plan", lambda engines, own: plan)
    model = Of(lambda m, x: 2 * x)
    sizes = [5, 8, 6, 8, 8, 7, 8, 8, 4, 8, 3, 8]
    report = quantize_static(model, [randn(4, n) for n in sizes], **FAST).report()
    assert set(ran) == {8}
    assert "batches of [[4, 8]]" in str(report)  # the most common size, not the first
    assert "3 of 12 batches were held out" in str(report)
    assert "judged on 2 of 3 batches, those of its sizes" in report["X"].note
    # it takes none that was held out
    report = quantize_static(model, [randn(4, n) for n in (8, 5, 6, 7, 3)], **FAST).report()
    assert "judged on batches that it was calibrated on" in report["X"].note
    assert not report["eager float32"].note
    report = quantize_static(model, [randn(4, 8) for n in range(5)], **FAST).report()
    assert not report["X"].note


def test_the_first_batch_is_no_way_around_the_bound(monkeypatch):
    """A backend that is right for the sizes of the first alone."""

    def build(task):
        def run(batch):
            (y,) = torch_backends.runner(task.model)(batch)
            return [y if len(y) == 2 else y + 1]

        return backends.Backend("X", "int8", run, 1, int8_kernels=1)

    plan = {"eager float32": ("float32", torch_backends.eager), "X": ("int8", build)}
    monkeypatch.setattr(static, "_plan", lambda engines, own: plan)
    monkeypatch.setattr(static, "_mixed", lambda *given: ([], {}))
    batches = [100 * randn(2, 4), *(randn(8, 4, seed=i) for i in range(4))]
    report = quantize_static(nn.Linear(4, 3), batches, **FAST).report()
    assert "lies below 20 dB" in report["X"].dropped
    assert "batch 0, sample 0" in str(report)  # by the number that was given
    assert "same data" not in str(report)


def test_only_calls_of_the_examples_size_are_timed(monkeypatch):
    """In others an engine may compile first."""
    clock = iter(range(10**6))
    monkeypatch.setattr(racing, "perf_counter", lambda: next(clock) * 0.001)
    slow = iter(range(0, 10**6, 100))

    def run(batch):
        if len(batch[0]) != 4:
            monkeypatch.setattr(racing, "perf_counter", lambda: next(slow))
        else:
            monkeypatch.setattr(racing, "perf_counter", lambda: next(clock) * 0.001)
        return [batch[0]]

    pace = racing.Pace()
    usual = backends.Backend("usual", "float32", lambda batch: [batch[0]], 1)
    other = backends.Backend("other", "int8", run, 1)
    four, two = (torch.ones(4, 2),), (torch.ones(2, 2),)
    assert pace.outputs(usual, [four], four)[1] == ""
    for batches in ([four, two, four], [two, two]):
        found, why = pace.outputs(other, batches, four)
        assert (len(found), why) == (len(batches), "")


def test_engines_calibrate_on_the_others_alone(monkeypatch):
    """The samples held out never reach an observer."""
    taken = {}

    def spy(task):
        taken["task"] = task
        return torch_backends.eager(task)

    plan = {"eager float32": ("float32", torch_backends.eager), "spy": ("float32", spy)}
    monkeypatch.setattr(static, "_plan", lambda engines, own: plan)
    x = randn(8, 4)
    report = quantize_static(nn.Linear(4, 3), [x], **FAST).report()
    calibrated = rows_of(taken["task"].batches)
    assert calibrated == rows_of([(x[[0, 1, 2, 4, 5, 6]],)])
    assert all(batch[0].shape == x.shape for batch in taken["task"].batches)
    assert "2 of 8 samples were held out of the calibration" in str(report)


def test_outliers_are_named_and_stay_in_the_calibration():
    x = randn(16, 4)
    x[7, 2] = 1000.0  # the eighth would be held out
    rest, judge, notes = divided([x])
    assert "an outlier in the calibration set" in notes[0]
    assert "batch 0, sample 7 (" in notes[0]
    assert tuple(x[7].tolist()) in rows_of(rest)
    assert 7 not in judge.samples[0]
    batches = [randn(4, 4, seed=i) for i in range(6)]
    batches[3][1] *= 300
    rest, judge, notes = divided(batches)
    assert "batch 3, sample 1" in notes[0]
    assert tuple(batches[3][1].tolist()) in rows_of(rest)


@pytest.mark.parametrize(
    "values",
    [
        randn(200, 4),
        randn(200, 1),
        randn(200, 3, 8, 8),
        randn(200, 16).mul(2).exp(),  # heavy tails, as of sound
        torch.rand(200, 4) * torch.logspace(-3, 3, 200)[:, None],
        torch.ones(50, 4),
        torch.zeros(50, 4),
        torch.cat((torch.ones(70, 4), 10 * torch.ones(30, 4))),  # two kinds
        torch.zeros(50, 4).masked_fill(torch.arange(200).view(50, 4) % 7 == 0, -math.inf),
        (torch.rand(100, 30, generator=torch.Generator().manual_seed(0)) < 0.02).float(),
    ],
)
def test_ordinary_inputs_have_no_outliers(values):
    batches = [(values,)]
    assert outliers(batches, layout(Of(lambda m, x: x.clamp(-9, 9)), values)) == []


# ---- in quantize_static ----


def bands(n, seed=0):
    """Ten classes, told by the row that is bright."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 10, (n,), generator=generator)
    x = 0.3 * torch.rand(n, 1, 10, 10, generator=generator)
    x[torch.arange(n), 0, classes] += 0.7
    return x, classes


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x, y = bands(256)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


ENGINES = [
    *(
        pytest.param(e, marks=marks)
        for e, marks in (("x86", ()), ("qnnpack", pytest.mark.slow))
        if e in torch.backends.quantized.supported_engines
    ),
    pytest.param("onnxruntime", marks=[needs_onnx, pytest.mark.slow]),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_outlier_in_the_calibration_set_does_not_hide_the_ordinary_images(
    trained, engine, monkeypatch
):
    monkeypatch.setattr(static, "_mixed", lambda *given: ([], {}))  # it takes its time
    x, _ = bands(64, seed=3)
    options = {"engine": engine, "calibrator": "min-max", "keep_backends": True, **FAST}
    ordinary = quantize_static(trained, [x], **options).report()
    rows = [row for row in ordinary.rows if row.precision == "int8"]
    assert any(not row.dropped for row in rows)
    assert "outlier" not in str(ordinary)
    x[5, 0, 3, 3] = 1000.0
    fast = quantize_static(trained, [x], **options)
    report = fast.report()
    assert report[report.chosen].precision != "int8"
    assert "batch 0, sample 5 (1,0" in str(report)
    test, classes = bands(400, seed=4)
    with torch.no_grad():
        wanted = trained(test)
    for row in (row for row in report.rows if row.precision == "int8"):
        assert row.total_sqnr_db > 20  # which is what was looked at
        assert "lies below 20 dB" in row.dropped
        found = fast.on(row.name)(test)
        assert row.sqnr_db == pytest.approx(by_numpy(wanted, found), abs=3)
        lost = (wanted.argmax(1) == classes).float() - (found.argmax(1) == classes).float()
        assert lost.mean() > 0.1
    text, html = str(report), report._repr_html_()
    assert "SQNR (dB)  SQNR, all samples together (dB)" in text
    assert "<th>SQNR (dB)</th><th>SQNR, all samples together (dB)</th>" in html


@needs_onnx
def test_auto_takes_the_calibrator_that_is_best_for_the_ordinary_images(trained, monkeypatch):
    x, _ = bands(64, seed=3)
    x[5, 0, 3, 3] = 40.0
    batches = read_batches([x])
    outputs = run_float(trained, batches)
    rest, judge, _ = held_out(trained, batches, outputs)
    task = backends.Task(trained, rest, outputs, "auto", 1, judge=judge)
    backend = onnx_backends.onnxruntime_int8(task)
    graph, found = onnx_backends.graph_of(task), {}
    held = judge.samples[0]
    for method in graph.calibrators:
        session, _ = graph.session(graph.quantized(method))
        (z,) = onnx_backends.runner(session)((x,))
        found[method] = by_numpy(outputs[0].tensors[0][held], z[held])
    best = max(found, key=found.get)
    assert backend.note == f"calibrated by {best}"
    # not the one that is best in the sum
    given = iter([(15.0, 40.0), (20.0, 10.0), (10.0, 30.0)])
    monkeypatch.setattr(judge, "ratios", lambda found: next(given), raising=False)
    second = list(graph.calibrators)[1]
    assert onnx_backends.onnxruntime_int8(task).note == f"calibrated by {second}"


def off_by(noise):
    """Return the builder of a backend with int8 kernels whose output is wrong by that much."""

    def build(task):
        def run(batch):
            (y,) = torch_backends.runner(task.model)(batch)
            return [y + noise * torch.sign(y.roll(1, -1))]

        return backends.Backend("X", "int8", run, 1, int8_kernels=1)

    return build


@pytest.fixture
def two_backends(monkeypatch):
    def planned(noise):
        plan = {
            "eager float32": ("float32", torch_backends.eager),
            "X": ("int8", off_by(noise)),
        }
        monkeypatch.setattr(static, "_plan", lambda engines, own: plan)

    return planned


def test_a_backend_that_loses_accuracy_is_refused_and_its_row_says_so(trained, two_backends):
    x, y = bands(64, seed=3)
    with torch.no_grad():
        margin = trained(x).topk(2).values.diff().abs().median().item()
    two_backends(margin)
    options = {"min_sqnr_db": -100, **FAST}
    fast = quantize_static(trained, [x], test=(x, y), **options)
    row = fast.report()["X"]
    assert row.accuracy < 0.95 < fast.report()["eager float32"].accuracy
    assert row.dropped == (
        f"accuracy {row.accuracy:.1%} is more than max_drop=0.01 below the model's "
        f"{fast.report()['eager float32'].accuracy:.1%}"
    )
    assert fast.report().chosen == "eager float32"
    assert "within 0.01 of the model's: the model stays float" in fast.report().why
    allowed = quantize_static(trained, [x], test=(x, y), max_drop=1.0, **options).report()
    assert not allowed["X"].dropped
    assert not quantize_static(trained, [x], **options).report()["X"].dropped  # no test


def test_the_drop_is_allowed_up_to_its_bound_exactly(trained, two_backends):
    two_backends(0.0)
    x, _ = bands(8, seed=3)
    for found, max_drop, is_dropped in ((0.8, 0.1, False), (0.79, 0.1, True), (0.95, 0.0, False)):
        calls = iter([0.9, 0.9, found])
        report = quantize_static(
            trained, [x], test=lambda m, c=calls: next(c), max_drop=max_drop, **FAST
        ).report()
        assert bool(report["X"].dropped) == is_dropped


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, "0.1", None])
def test_max_drop_is_checked(value):
    with pytest.raises(ValueError, match="max_drop must be a number from 0 to 1"):
        quantize_static(nn.Linear(2, 2), [torch.rand(4, 2)], max_drop=value, **FAST)


@pytest.mark.parametrize("value", [math.nan, np.float32("nan"), "20", None, True, [20.0]])
def test_min_sqnr_db_is_checked(value):
    model, x = nn.Linear(2, 2), torch.rand(4, 2)
    for quantize, inputs in (
        (quantize_static, [x]),
        (quantize_dynamic, x),
        (quantize_dynamic, None),
    ):
        with pytest.raises(ValueError, match="min_sqnr_db must be a number of decibels"):
            quantize(model, inputs, min_sqnr_db=value, **FAST)


def test_a_test_may_be_a_function_and_must_return_a_number(trained):
    x, _ = bands(8, seed=3)
    report = quantize_static(trained, [x], engine="eager", test=lambda m: 0.5, **FAST).report()
    assert report["eager float32"].accuracy == 0.5
    metric = torch.tensor(0.25)  # as torchmetrics returns one
    report = quantize_static(trained, [x], engine="eager", test=lambda m: metric, **FAST).report()
    assert report["eager float32"].accuracy == 0.25
    with pytest.raises(TypeError, match=r"two tensors, or a function .* got list"):
        quantize_static(trained, [x], engine="eager", test=[x], **FAST)
    for wrong in (None, "high", math.nan):
        with pytest.raises(ValueError, match="test must return a finite number"):
            quantize_static(trained, [x], engine="eager", test=lambda m, w=wrong: w, **FAST)


class Detector(nn.Module):
    """Heads, and the boxes that pass a threshold."""

    def __init__(self, shows_heads):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.shows_heads = nn.Linear(4, 8), shows_heads

    def forward(self, x):
        heads = self.layer(x)
        boxes = heads[heads[:, 0] > 0]
        return {"heads": heads, "boxes": boxes} if self.shows_heads else boxes


def moved(by):
    """Return the builder of a backend whose heads are off by that much: other boxes pass."""

    def build(task):
        def run(batch):
            tensors = torch_backends.runner(task.model)(batch)
            return [*(t + by for t in tensors[:-1]), tensors[-1][1:]]

        return backends.Backend("X", "int8", run, 1, int8_kernels=1)

    return build


def test_a_detector_is_judged_by_its_heads_else_by_the_test_else_not_at_all(monkeypatch):
    def report(shows_heads, by=0.001, **options):
        plan = {"eager float32": ("float32", torch_backends.eager), "X": ("int8", moved(by))}
        monkeypatch.setattr(static, "_plan", lambda engines, own: plan)
        model = Detector(shows_heads)
        return quantize_static(model, [randn(16, 4)], engine="eager", **options, **FAST).report()

    found = report(True)
    assert not found["X"].dropped
    assert 40 < found["X"].sqnr_db < 80
    assert "outputs whose shapes depend on the data are not part of the SQNR" in found.notes
    assert "lies below" in report(True, by=1.0)["X"].dropped
    found = report(False)
    assert found["X"].dropped == "the shapes of its outputs depend on the data: give test="
    assert found["X"].sqnr_db is None
    assert any("only test= can tell" in note for note in found.notes)
    assert "no bound applies to int8 backends" in found.why
    assert not report(False, test=lambda m: 1.0)["X"].dropped
    scores = iter([1.0, 1.0, 0.9])
    assert "max_drop" in report(False, test=lambda m: next(scores))["X"].dropped


@pytest.mark.parametrize("samples", [1, 16])
def test_a_detector_that_gives_a_list_of_images_is_judged_by_the_test(samples, monkeypatch):
    def forward(module, x):
        heads = module.layer(x)
        return [{"boxes": one[one > 0], "scores": one[one > 0].exp()} for one in heads]

    plan = {"eager float32": ("float32", torch_backends.eager), "X": ("int8", moved(0.1))}
    monkeypatch.setattr(static, "_plan", lambda engines, own: plan)
    monkeypatch.setattr(static, "_mixed", lambda *given: ([], {}))
    x = randn(samples, 6, seed=1)
    torch.manual_seed(0)
    model = Of(forward, layer=nn.Linear(6, 8))

    def report(**options):
        return quantize_static(model, [x], engine="eager", **options, **FAST).report()

    found = report()
    assert found["X"].dropped == "the shapes of its outputs depend on the data: give test="
    assert "no axis of the inputs" not in str(found)
    assert "same data" not in str(found)
    assert not report(test=lambda m: 1.0)["X"].dropped
    scores = iter([1.0, 1.0, 0.9])
    assert "max_drop" in report(test=lambda m: next(scores))["X"].dropped


def test_an_output_of_another_shape_is_named(monkeypatch):
    def build(task):
        run = torch_backends.runner(task.model)
        return backends.Backend(
            "X", "int8", lambda batch: [run(batch)[0][:, :2]], 1, int8_kernels=1
        )

    plan = {"eager float32": ("float32", torch_backends.eager), "X": ("int8", build)}
    monkeypatch.setattr(static, "_plan", lambda engines, own: plan)
    report = quantize_static(nn.Linear(4, 3), [randn(8, 4)], **FAST).report()
    assert report["X"].dropped == "an output has the shape [8, 2], the model's [8, 3]"


# ---- labels ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_bear_the_models_own_type(dtype):
    name = str(dtype).removeprefix("torch.")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval().to(dtype)
    x = randn(8, 4).to(dtype)
    fast = quantize_static(model, [x], engine="eager", **FAST)
    report = fast.report()
    own = report[f"eager {name}"]
    assert own.precision == name
    assert own.sqnr_db == math.inf
    names = [row.name for row in report.rows]
    assert len(names) == len(set(names))
    assert report["eager float32"].precision == "float32"
    assert 20 < report["eager float32"].sqnr_db < 200  # in another type than the model's
    assert report.baseline.startswith(f"eager {name}")
    assert f"the model is {name}" in str(report)
    with torch.no_grad():
        assert fast(x).dtype == model(x).dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dynamic_rows_bear_it_too(dtype):
    torch.manual_seed(0)
    model = nn.Linear(8, 3).eval().to(dtype)
    report = quantize_dynamic(model, randn(8, 8).to(dtype), **FAST).report()
    name = str(dtype).removeprefix("torch.")
    assert report.rows[0].name == f"eager {name}"
    assert report[report.chosen].precision == name


def test_finding_the_samples_leaves_no_trace_in_the_model():
    class Keeps(nn.Module):
        def forward(self, x):
            self.last = x
            return 2 * x

    model, batches = Keeps(), [(randn(8, 4),)]
    outputs = run_float(model, batches)
    judge_of(model, batches, outputs)
    assert torch.equal(model.last, batches[0][0])


@needs_onnx
def test_onnx_runtime_says_that_it_computes_a_half_model_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval().half()
    report = quantize_static(model, [randn(8, 4).half()], engine="onnxruntime", **FAST).report()
    row = report["ONNX Runtime float32"]
    assert row.precision == "float32"
    assert 30 < row.sqnr_db < 120  # of the float16 model, whose arithmetic is another
    assert report.baseline.startswith("eager float16")


@needs_openvino
def test_openvino_bfloat16_that_is_float32_says_so(monkeypatch):
    original = openvino_backends._OpenVino

    def without(data, precision, threads):
        return original(data, "f32", threads)

    monkeypatch.setattr(openvino_backends, "_OpenVino", without)
    report = quantize_static(nn.Linear(4, 3), [randn(8, 4)], engine="openvino", **FAST).report()
    assert report["OpenVINO bfloat16"].dropped == (
        "its output is bit for bit that of OpenVINO float32: OpenVINO has no bfloat16 on this "
        "processor"
    )
    # of so small a model a busy machine may find it too slow
    assert "bit for bit" not in report["OpenVINO float32"].dropped


def test_a_model_that_stays_eager_is_not_called_compiled():
    model = Of(torch._dynamo.disable(lambda m, x: m.l(x)), l=nn.Linear(4, 3)).eval()
    batches = [(randn(8, 4),)]
    task = backends.Task(model, batches, run_float(model, batches), "min-max", 1)
    if torch_backends.machine.describe().compiler is None:
        pytest.skip("no C++ compiler")
    with pytest.raises(backends.BackendError, match="nothing was compiled"):
        torch_backends.compiled(task)


def test_the_report_shows_both_figures():
    row = BackendRow("X", "int8", sqnr_db=2.44, total_sqnr_db=20.53, nbytes=1)
    other = BackendRow("Y", "float32", sqnr_db=math.inf, total_sqnr_db=math.inf)
    text = str(QuantizationReport((row, other), "Y", "Y", 20.0, "why"))
    line = next(line for line in text.splitlines() if line.startswith("X"))
    assert line.split()[1:3] == ["2.4", "20.5"]
    assert text.count("equal") == 2


def test_outputs_without_samples_in_common_are_one_sample():
    model = Of(lambda m, x: (2 * x, x.mean())).eval()
    batches = [(randn(24, 4),)]
    wanted = run_float(model, batches)
    judge = judge_of(model, batches, wanted)
    noisy = Outputs(tuple(t + 0.01 for t in wanted[0].tensors)).tensors
    ratio, _ = judge.ratios([noisy])
    mean = float(wanted[0].tensors[1])
    each = [by_numpy(wanted[0].tensors[0], noisy[0]), 20 * math.log10(abs(mean) / 0.01)]
    assert ratio == pytest.approx(min(each), abs=1e-3)
