"""Backends, layers and training with rounding, on real engines; times are not asserted."""

import copy
import ctypes
import dataclasses
import importlib
import math
import subprocess
import sys
import threading

import pytest
import torch
from interrupts import heeding
from torch import nn
from torch.nn import functional as F

from dlhelpers.fusion import fuse_conv_bn
from dlhelpers.measure import Comparison
from dlhelpers.quantization import (
    Calibrator,
    backends,
    choose_affine,
    dequantize,
    openvino_backends,
    quantize,
    quantize_aware,
    quantize_dynamic,
    quantize_static,
    racing,
    sensitivity,
    simulate,
    static,
    taking,
)
from dlhelpers.quantization.accuracy import accuracy_in_batches
from dlhelpers.quantization.batches import Outputs, read_batches
from dlhelpers.quantization.fake import fake_quantize, layers_of, rounded, weight_affine
from dlhelpers.quantization.kernels import linear_accumulate
from dlhelpers.quantization.noise import sqnr_db

FAST = {"budget_s": 0.02, "progress": False}
pytestmark = pytest.mark.usefixtures("one_table_of_operators")
ONNX = ("onnx", "onnxruntime", "onnxscript")
has_onnx = all(importlib.util.find_spec(name) for name in ONNX)
has_openvino = has_onnx and importlib.util.find_spec("openvino") is not None
needs_onnx = pytest.mark.skipif(not has_onnx, reason="the extra engines is not installed")
needs_openvino = pytest.mark.skipif(not has_openvino, reason="OpenVINO is not installed")
ENGINES = [
    *(e for e in ("x86", "onednn", "qnnpack") if e in torch.backends.quantized.supported_engines),
    pytest.param("onnxruntime", marks=needs_onnx),
    pytest.param("openvino", marks=needs_openvino),
]
SIGN = {"onnxruntime": "ONNX Runtime int8", "openvino": "OpenVINO int8"}


def int8_row(report, engine):
    """The better one, where a processor without VNNI has a backend of reduced range as well."""
    name = SIGN.get(engine, f"torch.ao {engine} int8")
    rows = [row for row in report.rows if row.name in (name, f"{name}, reduced range")]
    return max(rows, key=lambda row: -math.inf if row.sqnr_db is None else row.sqnr_db)


def with_statistics(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 16, 3, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return with_statistics(nn.Sequential(*layers))


def images(n=8, seed=0):
    return torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


class TwoInTwoOut(nn.Module):
    """Several inputs, one of them a whole number, and a mapping of outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.left, self.right = nn.Linear(8, 16), nn.Linear(4, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, a, b):
        hidden = torch.relu(self.left(a) + self.right(b))
        return {"logits": self.head(hidden), "hidden": [hidden, hidden.argmax(1)]}


@pytest.fixture(autouse=True)
def every_backend_is_raced(monkeypatch):
    """So that no row depends on how long a call took in this run."""
    monkeypatch.setattr(racing, "_HOPELESS", math.inf)


# ---- the backends ----


@pytest.mark.parametrize("engine", ENGINES)
def test_a_backend_is_right_counts_its_kernels_and_leaves_the_model_alone(engine):
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    fast = quantize_static(model, [images(), images(seed=1)], engine=engine, **FAST)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    report = fast.report()
    row = int8_row(report, engine)
    # qnnpack's ReLU6 is wrong behind its own convolutions; without VNNI oneDNN's sums may overflow
    if engine != "qnnpack" and not (engine == "onednn" and backends.saturates()):
        assert not row.dropped
        assert row.sqnr_db > 20
        assert row.speed.speedup > 0
    assert row.int8_kernels == 3
    # less than the float weights in a file of a network so small that its graph is most of it
    assert 500 < row.nbytes < 60_000
    assert f"-> {report.chosen}" in str(report)
    assert report.chosen in report._repr_html_()
    x = images(5, seed=9)
    with torch.no_grad():
        wanted = model.eval()(x)
    assert sqnr_db([[wanted]], [[fast(x)]]) > 15
    assert fast(x[:1]).shape == (1, 10)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_reported_ratio_is_that_of_the_int8_output(engine, monkeypatch):
    """Taken again from the backend itself, with nothing of the report's."""
    taken = {}
    original = taking.raced

    def spy(built, *options):
        taken.update(built)
        return original(built, *options)

    monkeypatch.setattr(taking, "raced", spy)
    model, batches = network().eval(), [images()]
    report = quantize_static(model, batches, engine=engine, min_sqnr_db=-50, **FAST).report()
    name = SIGN.get(engine, f"torch.ao {engine} int8")
    with torch.no_grad():
        wanted = model(batches[0]).double()
    error = taken[name].run((batches[0],))[0].double() - wanted
    ratio = 10 * math.log10(wanted.square().sum() / error.square().sum())
    assert report[name].total_sqnr_db == pytest.approx(ratio, abs=0.01)
    assert ratio < 80  # it is rounded
    held = 10 * (wanted.square().sum(1) / error.square().sum(1)).log10()[[3, 7]]
    assert report[name].sqnr_db == pytest.approx(held.min().item(), abs=0.01)


@needs_onnx
def test_kept_backends_can_be_taken_instead():
    batches = [images()]
    fast = quantize_static(
        network(), batches, engine="onnxruntime", min_sqnr_db=90, keep_backends=True, **FAST
    )
    row = fast.report()["ONNX Runtime int8"]
    assert "lies below" in row.dropped  # and is kept all the same
    other = fast.on("ONNX Runtime int8")
    with torch.no_grad():
        wanted = network().eval()(batches[0])
    assert sqnr_db([[wanted]], [[other(batches[0])]]) == pytest.approx(row.total_sqnr_db, abs=0.01)
    with pytest.raises(KeyError, match="keep_backends=True"):
        fast.on("TensorRT")


@needs_onnx
@pytest.mark.parametrize("engine", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_several_inputs_and_a_mapping_of_outputs(engine):
    model = TwoInTwoOut().eval()
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(6, 8, generator=generator), torch.randn(6, 4, generator=generator))
        for _ in range(3)
    ]
    fast = quantize_static(model, iter(batches), engine=engine, **FAST)
    found, wanted = fast(*batches[0]), model(*batches[0])
    assert found.keys() == wanted.keys()
    assert found["hidden"][1].dtype == torch.int64
    assert sqnr_db([[wanted["logits"]]], [[found["logits"]]]) > 20
    assert not int8_row(fast.report(), engine).dropped


@needs_onnx
def test_where_int8_misses_the_bound_layers_stay_float_and_then_all_of_them():
    model, batches = network(), [images(), images(seed=3)]
    whole = quantize_static(model, batches, engine="onnxruntime", **FAST).report()
    reached = int8_row(whole, "onnxruntime").sqnr_db
    mixed = quantize_static(
        model, batches, engine="onnxruntime", min_sqnr_db=reached + 1, **FAST
    ).report()
    assert "lies below" in int8_row(mixed, "onnxruntime").dropped
    row = mixed["ONNX Runtime int8, mixed"]
    assert not row.dropped
    assert row.sqnr_db >= reached + 1
    assert 0 < row.int8_kernels <= 3
    nothing = quantize_static(model, batches, engine="onnxruntime", min_sqnr_db=90, **FAST)
    report = nothing.report()
    assert report[report.chosen].precision == "float32"
    assert "stays float" in report.why
    with torch.no_grad():
        assert torch.allclose(nothing(images()), model.eval()(images()), atol=1e-5)


@needs_onnx
def test_the_layer_that_costs_most_is_the_one_kept_float():
    """One layer's input is ruined by an outlier; the bound is met without it alone."""

    class Spiky(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 8)
            self.spike = nn.Linear(8, 8)

        def forward(self, x):
            y = self.second(torch.relu(self.first(x)))
            large = torch.cat((y[:, :7], 3000 + y[:, 7:]), 1)
            return self.spike(large) - self.spike.weight[:, 7] * 3000

    model = Spiky().eval()
    batches = [torch.randn(256, 8, generator=torch.Generator().manual_seed(0))]
    assert sensitivity(model, batches).rows[0].name == "spike"
    report = quantize_static(
        model, batches, engine="onnxruntime", min_sqnr_db=25, calibrator="min-max", **FAST
    ).report()
    row = report["ONNX Runtime int8, mixed"]
    assert not row.dropped
    assert "1 layer float" in row.note


@pytest.mark.parametrize("missing", ["onnxruntime", "openvino"])
def test_a_missing_package_is_a_row_that_says_what_to_install(missing, monkeypatch):
    pytest.importorskip("onnx", reason="extra engines")  # else it is the first that is missing
    monkeypatch.setitem(sys.modules, missing, None)
    report = quantize_static(network(), [images()], engine=[missing], **FAST).report()
    for row in report.rows:
        if "eager" not in row.name:
            assert f"needs {missing}" in row.dropped
            assert 'pip install "dlhelpers[engines]"' in row.dropped
    assert report[report.chosen].precision in ("float32", "bfloat16")


def test_an_engine_that_raises_is_a_row_and_not_the_end(monkeypatch):
    def broken(task):
        raise RuntimeError("Input partition has more than one output node\nmore")

    monkeypatch.setattr(
        static,
        "_plan",
        lambda engines, own: {
            "eager float32": ("float32", static.torch_backends.eager),
            "X": ("int8", broken),
        },
    )
    report = quantize_static(network(), [images()], **FAST).report()
    assert report["X"].dropped == "RuntimeError: Input partition has more than one output node"
    assert report.chosen == "eager float32"


def test_a_backend_without_int8_kernels_is_dropped(monkeypatch):
    def pretends(task):
        backend = static.torch_backends.eager(task)
        return backends.Backend("Y", "int8", backend.run, 1, 0)

    plan = {"eager float32": ("float32", static.torch_backends.eager), "Y": ("int8", pretends)}
    monkeypatch.setattr(static, "_plan", lambda engines, own: plan)
    report = quantize_static(network(), [images()], **FAST).report()
    assert report["Y"].dropped == "its graph holds no int8 kernel"


def test_accuracy_stands_in_every_row():
    model, x = network().eval(), images(40)
    with torch.no_grad():
        targets = model(x).argmax(1)
    report = quantize_static(model, [x], engine="eager", test=(x, targets), **FAST).report()
    assert report["eager float32"].accuracy == 1.0
    assert "100.0%" in str(report)


def test_a_dropout_is_off_and_a_rounding_model_is_finished_first():
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 10), nn.Dropout(0.9)).train()
    fast = quantize_static(quantize_aware(model), [images()], engine="eager", **FAST)
    with torch.no_grad():
        assert sqnr_db([[model.eval()(images())]], [[fast(images())]]) > 30


@needs_onnx
def test_the_file_is_written_and_the_model_refuses_to_be_pickled(tmp_path):
    import onnx

    fast = quantize_static(network(), [images()], engine="onnxruntime", keep_backends=True, **FAST)
    fast.on("ONNX Runtime int8").save(tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    with pytest.raises(ValueError, match="has no ONNX file"):
        fast.on("eager float32").save(tmp_path / "n.onnx")
    assert not (tmp_path / "n.onnx").exists()
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        copy.deepcopy(fast)


BAD = torch.rand(4, 3, 12, 12)
BAD[1, 0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("calibration", "error", "says"),
    [
        ([], ValueError, "calibration is empty"),
        (iter([]), ValueError, "a generator that was read once"),
        (3, TypeError, "must be an iterable"),
        (["a"], TypeError, "batch 0 of calibration holds no tensor but str"),
        ([BAD], ValueError, "input 0 of calibration batch 0 has 1 value that is not finite"),
        ([images(), images()[0]], ValueError, r"\[3, 12, 12\], in the first batch it is"),
        ([images()[:0]], ValueError, "is empty, of shape"),
        ([torch.rand(4, 5, 12, 12)], ValueError, "raises on calibration batch 0 with inputs"),
        ([(images(), torch.arange(8))], ValueError, "without labels"),
        ([(images(),), (images(), images())], ValueError, "batch 1 of calibration has 2 inputs"),
    ],
)
def test_a_bad_calibration_set_is_named(calibration, error, says):
    with pytest.raises(error, match=says):
        quantize_static(network(), calibration, engine="eager", **FAST)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="'tensorrt': engine must be"):
        quantize_static(network(), [images()], engine="tensorrt")
    with pytest.raises(ValueError, match="calibrator='kl' is neither"):
        quantize_static(network(), [images()], calibrator="kl")
    with pytest.raises(ValueError, match="on the meta device"):
        quantize_static(network().to("meta"), [images()])
    with pytest.raises(ValueError, match="no floating-point tensor"):
        quantize_static(nn.Sequential(nn.Flatten(), Argmax()), [images()])
    with pytest.raises(ValueError, match="is not finite"):
        quantize_static(nn.Sequential(Huge(), Huge()), [images()])


class Argmax(nn.Module):
    def forward(self, x):
        return x.argmax(1)


class Huge(nn.Module):
    def forward(self, x):
        return x * 1e30


def fake_speed(speedup, low=None, high=None):
    low, high = low or speedup / 1.01, high or speedup * 1.01
    return Comparison(
        speedup, low, high, "faster", 20, 1.0, 1 / speedup, 0.95, 0.03, None, (), "cpu", 1, 1.0
    )


def chosen(monkeypatch, speeds, final=None):
    def race(calls, *, baseline, **options):
        table = final or speeds
        return {n: fake_speed(table[n] / table[baseline]) for n in calls if n != baseline}

    monkeypatch.setattr(racing, "compare_many", race)
    built = {n: backends.Backend(n, "int8", lambda batch: [], 1) for n in [*speeds, "float"]}
    found = {n: fake_speed(s) for n, s in speeds.items()}
    return racing.fastest(built, found, "float", (), 0.1)


def test_a_hopeless_backend_gets_one_look_and_no_race(monkeypatch):
    monkeypatch.setattr(racing, "_HOPELESS", 8.0)
    cost = {"eager": 1.0, "slow": 50.0, "fast": 0.5}
    monkeypatch.setattr(racing, "_timed", lambda call: cost[call()])
    raced_names = []

    def race(calls, *, baseline, **options):
        raced_names.append(set(calls))
        return {n: fake_speed(cost[baseline] / cost[n]) for n in calls if n != baseline}

    monkeypatch.setattr(racing, "compare_many", race)
    built = {
        name: backends.Backend(
            name, "int8" if name == "fast" else "float32", lambda batch, name=name: name, 1
        )
        for name in cost
    }
    speeds, baseline, slower = racing.raced(built, (), 0.1)
    assert (baseline, slower) == ("eager", {"slow": 50.0})
    assert raced_names == [{"eager", "fast"}]
    assert set(speeds) == {"fast"}


@pytest.fixture
def costly(monkeypatch):
    """Return backends whose calls take seconds for each sample on a fake clock, and count them."""
    monkeypatch.setattr(racing, "_HOPELESS", 8.0)
    now = [0.0]

    def timed(call):
        begin = now[0]
        call()
        return now[0] - begin

    monkeypatch.setattr(racing, "_timed", timed)

    def backend(name, precision, sample_s, *, any_batch=False):
        def run(batch):
            calls.append((name, len(batch[0])))
            now[0] += sample_s * len(batch[0])
            return [batch[0]]

        return backends.Backend(name, precision, run, 1, takes_any_batch=any_batch)

    calls = backend.calls = []
    return backend


@pytest.mark.parametrize(
    ("any_batch", "calls", "why"),
    [
        (True, [1], "one sample took 2 s, 200 times as long as eager float32: not raced"),
        (False, [8], "one call took 16 s, 200 times as long as eager float32: not raced"),
    ],
)
def test_a_hopeless_backend_is_not_called_again(costly, any_batch, calls, why):
    eager = costly("eager float32", "float32", 0.01)
    slow = costly("half", "bfloat16", 2.0, any_batch=any_batch)
    batches = [(torch.ones(8, 2),)] * 3
    wanted = [Outputs(torch.ones(8, 2))] * 3
    task = backends.Task(nn.Linear(2, 2), batches, wanted, "min-max", 1)
    plan = {r.name: (r.precision, lambda task, r=r: r) for r in (eager, slow)}
    rows, found = taking.built(task, plan, 20.0, False)
    assert list(found) == ["eager float32"]
    assert rows[1].dropped == why
    assert [n for name, n in costly.calls if name == "half"] == calls
    assert [n for name, n in costly.calls if name != "half" and n == 8] == [8, 8, 8]


def test_a_backend_that_is_slow_in_its_first_call_alone_is_raced(costly):
    usual = costly("eager float32", "float32", 0.01)
    other = costly("half", "bfloat16", 0.02, any_batch=True)
    first = iter([costly("half", "bfloat16", 0.4).run])
    late = dataclasses.replace(other, run=lambda batch: next(first, other.run)(batch))
    pace, batches = racing.Pace(), [(torch.ones(8, 2),)]
    assert pace.outputs(usual, batches)[1] == ""
    found, why = pace.outputs(late, batches)
    assert (len(found), why) == (1, "")


def test_slow_calls_have_a_bound_for_the_race(monkeypatch):
    budgets = []

    def race(calls, *, baseline, budget_s, **options):
        budgets.append(budget_s)
        return {n: fake_speed(2.0) for n in calls if n != baseline}

    monkeypatch.setattr(racing, "compare_many", race)
    monkeypatch.setattr(racing, "_timed", lambda call: 30.0)
    built = {
        n: backends.Backend(n, p, lambda batch: [], 1) for n, p in (("a", "int8"), ("b", "float32"))
    }
    racing.raced(built, (), 0.1)
    assert budgets == [20.0]


def test_ranking_takes_as_many_samples_as_its_time_allows(monkeypatch):
    module = sys.modules["dlhelpers.quantization.sensitivity"]
    now, sizes = [0.0], []

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            sizes.append(len(x))
            now[0] += 0.5 * len(x)
            return self.b(self.a(x))

    monkeypatch.setattr(module, "_clock", lambda: now[0])
    order = module.ranked_layers(Slow(), [(torch.rand(64, 4),), (torch.rand(64, 4),)])
    assert sorted(order) == ["a", "b"]
    assert sizes[0] == 64  # 32 s a layer
    few = int(64 * 20 / 64)
    assert set(sizes[1:]) == {few, few // 2}  # half of them tells where the samples stand
    assert sum(sizes[1:]) * 0.5 < 3 * 20


def test_a_bound_that_nothing_meets_leaves_a_float_backend():
    report = quantize_static(
        network(), [images()], engine="eager", min_sqnr_db=500, **FAST
    ).report()
    assert report[report.chosen].precision == "float32"
    assert "lies below 500 dB" in report["eager bfloat16"].dropped


def test_accuracy_is_taken_in_batches(monkeypatch):
    sizes = []

    class Watch(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return x.flatten(1)[:, :10]

    x = images(21)
    targets = x.flatten(1)[:, :10].argmax(1)
    found = accuracy_in_batches(Watch(), (x, targets), (images(8),))
    assert found == 1.0
    assert sizes == [8, 8, 5]


def test_the_fastest_backend_is_taken_and_near_ones_race_once_more(monkeypatch):
    assert chosen(monkeypatch, {"a": 2.0, "b": 1.0}) == "a"
    assert chosen(monkeypatch, {"a": 2.0, "b": 1.9}, {"a": 2.0, "b": 2.1}) == "b"
    assert chosen(monkeypatch, {"a": 0.5, "b": 0.9}) == "float"
    assert chosen(monkeypatch, {"a": 0.5}) == "float"


def test_too_few_pairs_for_an_interval_do_not_hide_a_faster_backend(monkeypatch):
    monkeypatch.setattr(racing, "compare_many", None)  # no second race
    built = {n: backends.Backend(n, "int8", lambda batch: [], 1) for n in ("a", "float")}
    unknown = {"a": fake_speed(3.7, low=1e-300, high=math.inf)}
    assert racing.fastest(built, unknown, "float", (), 0.1) == "a"


def test_a_backend_whose_interval_reaches_below_one_is_not_taken(monkeypatch):
    monkeypatch.setattr(racing, "compare_many", None)  # no second race
    built = {n: backends.Backend(n, "int8", lambda batch: [], 1) for n in ("a", "float")}
    for low, high, taken in ((0.60, 2.0, "float"), (1.05, 1.15, "a")):
        speeds = {"a": fake_speed(1.10, low, high)}
        assert racing.fastest(built, speeds, "float", (), 0.1) == taken


def test_the_budget_lets_slow_calls_have_an_interval(monkeypatch):
    budgets = []

    def race(calls, *, baseline, budget_s, **options):
        budgets.append(budget_s * (len(calls) - 1))
        return {n: fake_speed(2.0) for n in calls if n != baseline}

    monkeypatch.setattr(racing, "compare_many", race)
    monkeypatch.setattr(racing, "_timed", lambda call: 0.5)
    built = {
        "a": backends.Backend("a", "int8", lambda batch: [], 1),
        "float": backends.Backend("float", "float32", lambda batch: [], 1),
    }
    racing.raced(built, (), 0.1)
    assert budgets == [pytest.approx(16 * 1.0)]  # 8 pairs of a second, and as long to warm up
    budgets.clear()
    near = {"a": fake_speed(2.0), "b": fake_speed(2.1)}  # of half a second a call
    racing.fastest(dict.fromkeys("ab", built["a"]), near, "float", (), 0.1)
    assert budgets == [pytest.approx(16 * (1 / 2.0 + 1 / 2.1))]


def test_of_close_float_backends_the_one_that_wins_their_race_is_the_baseline(monkeypatch):
    looks = {"first": 1.0, "second": 1.2, "third": 1.4}
    truth = {"first": 1.0, "second": 0.9, "third": 0.8}
    monkeypatch.setattr(racing, "_timed", lambda call: looks[call()])
    races = []

    def race(calls, *, baseline, **options):
        races.append((set(calls), baseline))
        return {n: fake_speed(truth[baseline] / truth[n]) for n in calls if n != baseline}

    monkeypatch.setattr(racing, "compare_many", race)
    built = {n: backends.Backend(n, "float32", lambda batch, n=n: n, 1) for n in looks}
    speeds, baseline, _ = racing.raced(built, (), 0.1)
    assert races == [({"first", "second"}, "first"), (set(looks), "second")]  # 1.4 is not close
    assert baseline == "second"
    assert set(speeds) == {"first", "third"}


def test_a_look_is_the_least_of_five_times_or_of_two_seconds(monkeypatch):
    def look(*seconds):
        left = list(seconds)
        monkeypatch.setattr(racing, "_timed", lambda call: left.pop(0))
        return racing._looked_at(None), left

    assert look(0.5, 0.1, 0.2, 0.3, 0.4, 0.0) == (0.1, [0.0])
    assert look(1.5, 0.6, 0.1) == (0.6, [0.1])


def test_the_ratio_is_that_of_the_worst_output_and_minus_infinity_for_nonsense():
    y = torch.tensor([3.0, 4.0])
    assert sqnr_db([[y, y]], [[y, y + torch.tensor([0.0, 0.5])]]) == pytest.approx(20)
    assert sqnr_db([[y]], [[y]]) == math.inf
    assert sqnr_db([[y]], [[torch.full((2,), torch.nan)]]) == -math.inf
    assert sqnr_db([[y]], [[y[:1]]]) == -math.inf
    assert sqnr_db([[y]], [[]]) == -math.inf


def test_outputs_go_back_into_their_structure():
    given = {"a": torch.ones(1), "b": [torch.zeros(2), "kept"]}
    outputs = Outputs(given)
    back = outputs.structure.restore([t + 1 for t in outputs.tensors])
    assert back["a"].item() == 2
    assert back["b"][1] == "kept"


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "regnet_y_400mf"]
)
def test_torchvision_models_reach_the_bound_in_int8(name):
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name)
    with torch.no_grad():  # statistics that fit
        for seed in range(3):
            model.train()(images_of(64, seed))
    report = quantize_static(
        model.eval(), [images_of(64, 7)], engine=["onnxruntime", "openvino"], budget_s=0.2
    ).report()
    best = max(row.sqnr_db for row in report.rows if row.precision == "int8" and row.sqnr_db)
    assert best > 20


def images_of(side, seed):
    return torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
def test_pt2e_lowers_its_layers_or_says_why_not():
    pytest.importorskip("torchao")
    report = quantize_static(network(), [images()], engine="pt2e", **FAST).report()
    row = report["PT2E int8"]
    if row.dropped:  # a compiler is needed, and torchao's quantizer raises on some versions
        assert "compiler" in row.dropped or ":" in row.dropped
    else:
        assert row.int8_kernels >= 3
        assert row.sqnr_db > 20


@pytest.mark.slow
def test_a_compiled_backend_computes_what_the_model_does():
    fast = quantize_static(network(), [images()], engine="compile", **FAST)
    row = fast.report()["torch.compile float32"]
    if row.dropped:
        assert "compiler" in row.dropped
    else:
        assert row.sqnr_db > 80


class Masked(nn.Module):
    """Scores of -inf, which attention has, have no range and stay float."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        scores = self.first(x)
        hidden = torch.arange(8) > 5
        return self.second(scores.masked_fill(hidden, -torch.inf).softmax(-1))


@needs_onnx
def test_tensors_without_a_range_stay_float_and_the_others_do_not():
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    report = quantize_static(Masked(), [x], engine=["onnxruntime"], **FAST).report()
    assert not report["ONNX Runtime float32"].dropped
    assert int8_row(report, "onnxruntime").int8_kernels >= 1
    assert int8_row(report, "onnxruntime").sqnr_db > 20


@needs_onnx
def test_a_grouped_transposed_convolution_stays_float_and_nothing_is_said(caplog, capfd):
    torch.manual_seed(0)
    layers = [nn.ConvTranspose2d(4, 8, 3, groups=2), nn.LayerNorm(11), nn.Conv2d(8, 4, 1)]
    x = torch.randn(2, 4, 9, 9)
    report = quantize_static(nn.Sequential(*layers), [x], engine="onnxruntime", **FAST).report()
    assert int8_row(report, "onnxruntime").int8_kernels == 1
    assert int8_row(report, "onnxruntime").sqnr_db > 20
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert capfd.readouterr().err == ""


@needs_openvino
def test_openvino_takes_onnx_runtimes_file_and_ranges_are_searched_for_once(monkeypatch):
    made, searched = [], []
    original = static.onnx_backends.onnxruntime_int8

    def counted(task, **options):
        made.append(options)
        return original(task, **options)

    plain = Calibrator.range
    monkeypatch.setattr(static.onnx_backends, "onnxruntime_int8", counted)
    monkeypatch.setattr(Calibrator, "range", lambda self: searched.append(self) or plain(self))
    report = quantize_static(
        network(), [images()], engine=["onnxruntime", "openvino"], min_sqnr_db=90, **FAST
    ).report()
    assert report["ONNX Runtime int8, mixed"].dropped
    assert made
    keys = [tuple(sorted(options.items())) for options in made]
    assert keys.count(keys[0]) == 1
    graph = [calibrator for calibrator in searched if calibrator.method == "percentile"]
    assert graph
    assert len(graph) == len({id(calibrator) for calibrator in graph})


@needs_openvino
@pytest.mark.skipif(sys.platform != "linux", reason="the signal stack is asked of Linux's libc")
def test_openvino_leaves_a_thread_its_signal_stack():
    """Without it Ctrl-C may end in a crash."""
    found = []

    def run():
        fast = quantize_static(network(), [images()], engine="openvino", keep_backends=True, **FAST)
        fast.on("OpenVINO int8")(images(2))
        stack = openvino_backends._Stack()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
        found.append(stack.pointer)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]


@pytest.mark.slow
@needs_openvino
@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_is_still_ctrl_c_after_openvino(tmp_path):
    script = tmp_path / "stopped.py"
    code = (
        "import os, time, torch\n"
        "from torch import nn\n"
        "from dlhelpers.quantization import quantize_static\n"
        "net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(800, 10))\n"
        "x = torch.rand(4, 3, 12, 12)\n"
        "fast = quantize_static(net, [x], engine='openvino', budget_s=0.05, keep_backends=True)\n"
        "fast.on('OpenVINO int8')(x[:2])\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped', flush=True)\n"
    )
    script.write_text(heeding(code))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "stopped"
    assert done.returncode == 0


def test_a_loader_that_reuses_its_buffer_and_a_model_that_writes_into_its_input():
    buffer = torch.empty(4, 3, 12, 12)

    def loader():
        for seed in range(2):
            yield buffer.copy_(images(4, seed))

    found = read_batches(loader())
    assert torch.equal(found[0][0], images(4, 0))
    assert torch.equal(found[1][0], images(4, 1))

    class Writes(nn.Module):
        def forward(self, x):
            return x.sub_(0.5).div_(0.5)

    x = images()
    kept = x.clone()
    with pytest.raises(ValueError, match="writes into its input 0"):
        quantize_static(Writes(), [x], engine="eager", **FAST)
    assert torch.equal(x, kept)


def test_a_model_that_is_not_the_same_twice_is_an_error():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    with pytest.raises(ValueError, match="gives other outputs when it is run again"):
        quantize_static(Noisy(), [images()], engine="eager", **FAST)


def test_numbers_beside_tensors_and_other_constants_are_named():
    class Sized(nn.Module):
        def forward(self, x):
            return x * 2, x.shape[0]

    with pytest.raises(ValueError, match=r"numbers beside tensors, \[8\]"):
        quantize_static(Sized(), [images()], engine="eager", **FAST)

    class Flagged(nn.Module):
        def forward(self, x, twice):
            return x.flatten(1) * (2 if twice else 1)

    fast = quantize_static(Flagged(), [(images(), True)], engine="eager", **FAST)
    assert fast(images(), True).shape == (8, 432)
    with pytest.raises(ValueError, match="input 1 was True"):
        fast(images(), False)
    with pytest.raises(ValueError, match="input 1 was True"):
        fast(images())


@needs_onnx
def test_a_mixed_backend_is_kept_and_inputs_may_require_grad():
    batches = [images(), images(seed=3)]
    first = quantize_static(network(), batches, engine="onnxruntime", **FAST).report()
    bound = int8_row(first, "onnxruntime").sqnr_db + 1
    fast = quantize_static(
        network(), batches, engine="onnxruntime", min_sqnr_db=bound, keep_backends=True, **FAST
    )
    mixed = fast.on("ONNX Runtime int8, mixed")
    assert mixed(images().requires_grad_()).shape == (8, 10)


def test_test_data_that_do_not_fit_are_named_at_once():
    x = images()
    with pytest.raises(ValueError, match="as many targets as inputs, got 8 and 3"):
        quantize_static(network(), [x], test=(x, torch.zeros(3).long()), **FAST)
    model = TwoInTwoOut()
    model.forward = lambda a: {"y": a}
    with pytest.raises(ValueError, match=r"one tensor \[N, C\], got dict"):
        quantize_static(model, [x], test=(x, torch.zeros(8).long()), **FAST)


# ---- dynamic ----


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), (4, 64)),
        (nn.LSTM(32, 64, batch_first=True), (2, 5, 32)),
        pytest.param(nn.GRU(32, 64), (5, 2, 32), marks=pytest.mark.slow),
    ],
    ids=["linear", "LSTM", "GRU"],
)
def test_dynamic_is_right_with_and_without_inputs(model, shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = Outputs(model(x)).tensors
    unmeasured, measured = quantize_dynamic(model), quantize_dynamic(model, x, **FAST)
    for fast in (unmeasured, measured):
        assert sqnr_db([wanted], [Outputs(fast(x)).tensors]) > 25
    assert "not measured" in str(unmeasured.report())
    int8 = [row for row in measured.report().rows if row.precision == "int8" and not row.dropped]
    assert int8
    layers = 2 if isinstance(model, nn.Sequential) else 1
    assert all(row.int8_kernels == layers for row in int8)
    floats = measured.report()["eager float32"].nbytes
    assert min(row.nbytes for row in int8) < 0.45 * floats
    assert unmeasured.report().rows[0].nbytes < 0.45 * floats


def test_dynamic_refuses_a_model_of_convolutions():
    with pytest.raises(ValueError, match="convolutions need quantize_static"):
        quantize_dynamic(nn.Sequential(nn.Conv2d(3, 4, 3)))


# ---- rounding in float: training, simulation, sensitivity ----


def test_the_gradient_passes_rounding_and_stops_at_the_ends():
    x = torch.linspace(-2, 2, 41, requires_grad=True)
    grid = choose_affine((-1.0, 1.0), bits=4, symmetric=True)
    y = fake_quantize(x, grid)
    y.sum().backward()
    # half a step beyond the end still rounds to it
    assert torch.equal(x.grad, (x.abs() <= grid.high + grid.scale / 2).float())
    assert torch.equal(y, dequantize(quantize(x, grid), grid))


def test_a_simulated_layer_is_the_integer_layer():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 5)), torch.randn(64, 12)
    simulated = simulate(model, [x])
    weight, inputs = weight_affine(model[0]), choose_affine(x, signed=False)
    sums = linear_accumulate(
        quantize(x, inputs), quantize(model[0].weight, weight), x_zero=int(inputs.zero_point)
    )
    exact = sums.double() * (inputs.scale.double() * weight.scale.double()) + model[0].bias
    with torch.no_grad():
        assert torch.allclose(simulated(x).double(), exact, atol=1e-5)


def test_folding_a_batchnorm_keeps_the_grid_that_was_trained():
    """Rounding the folded weights is folding the rounded ones: no simulation of BatchNorm."""
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))).eval()
    nn.init.uniform_(model[1].weight, 0.2, 3.0)
    fused, _ = fuse_conv_bn(model)
    conv = next(iter(layers_of(fused).values()))
    scale = model[1].weight / torch.sqrt(model[1].running_var + model[1].eps)
    grid = weight_affine(model[0])
    first = dequantize(quantize(model[0].weight, grid), grid) * scale.view(-1, 1, 1, 1)
    folded_grid = weight_affine(conv)
    second = dequantize(quantize(conv.weight, folded_grid), folded_grid)
    differ = (first - second).abs() > 1e-5 * second.abs().max()
    assert differ.double().mean() < 0.005  # ties of rounding alone


def test_training_with_rounding_learns_to_live_with_few_bits():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 16, generator=generator)
    y = (x[:, :8].sum(1) > x[:, 8:].sum(1)).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    train(model, x, y, 150)
    plain = simulate(model, [x], bits=2)
    aware = train(quantize_aware(model, bits=2), x, y, 150)
    losses = [F.cross_entropy(m.eval()(x), y).item() for m in (plain, aware)]
    assert losses[1] < 0.7 * losses[0]


def train(model, x, y, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    return model


def test_an_aware_model_gives_back_what_it_was_given():
    model = network().train()
    aware = quantize_aware(model, bits=8)
    aware.train()(images())
    back = aware.finish()
    assert not back.training
    assert back.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(back[0].weight, model[0].weight)
    assert not back[0]._forward_pre_hooks
    assert not back[0]._forward_pre_hooks_with_kwargs
    # it ran on a copy: the original's statistics did not move
    assert model[1].num_batches_tracked == 0
    assert aware.model[1].num_batches_tracked == 1
    assert quantize_aware(model).state_dict().keys() == aware.state_dict().keys()


def test_a_lone_layer_and_awkward_names_can_be_aware():
    assert quantize_aware(nn.Linear(4, 3))(torch.rand(2, 4)).shape == (2, 3)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.values, self.keys = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.keys(self.values(x))

    model = Named()
    assert len(quantize_aware(model)._inputs) == 2
    assert simulate(nn.Linear(4, 3), [torch.rand(2, 4)])(torch.rand(2, 4)).shape == (2, 3)


def test_finish_keeps_the_readers_own_hooks():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_pre_hook(lambda module, given: (10 * given[0],))
    x = torch.rand(2, 4)
    assert torch.allclose(quantize_aware(model).finish()(x), model(x))


def test_a_copy_of_an_aware_model_has_ranges_of_its_own():
    aware = quantize_aware(nn.Sequential(nn.Linear(4, 2))).train()
    aware(torch.ones(1, 4))
    copied = copy.deepcopy(aware)
    copied(5 * torch.ones(1, 4))
    ends = [next(iter(m._inputs.values())).ends.tolist() for m in (aware, copied)]
    assert ends[0] == [1.0, 1.0]
    assert ends[1][1] > 1.0
    copied.freeze()
    fresh = quantize_aware(nn.Sequential(nn.Linear(4, 2)))
    fresh.load_state_dict(copied.state_dict())
    assert next(iter(fresh._inputs.values())).is_frozen


def test_layers_that_share_a_weight_are_rounded_one_at_a_time():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(input=torch.relu(self.a(input=x)))

    model = Tied()
    x = torch.randn(8, 6)
    grid = weight_affine(model.a, 2)
    with rounded(model.a, weight=grid):
        assert not torch.equal(model.a.weight, model.b.weight)
    assert model.a.weight is model.b.weight
    assert len(sensitivity(model, [x], bits=4).rows) == 2
    assert simulate(model, [x])(x).shape == (8, 6)


def test_frozen_ranges_and_statistics_stay():
    aware = quantize_aware(network())
    aware.train()(images())
    ends = {n: r.ends.clone() for n, r in aware._inputs.items()}
    mean = aware.model[1].running_mean.clone()
    aware.freeze().train()(3 * images())
    assert all(torch.equal(ends[n], r.ends) for n, r in aware._inputs.items())
    assert torch.equal(aware.model[1].running_mean, mean)
    assert aware.finish().train()[1].training


def test_the_moving_range_follows_the_batches():
    aware = quantize_aware(nn.Sequential(nn.Linear(4, 2)), momentum=0.5).train()
    aware(torch.tensor([[0.0, 1.0, 2.0, 4.0]]))
    aware(torch.tensor([[0.0, 1.0, 2.0, 8.0]]))
    (rounding,) = aware._inputs.values()
    assert rounding.ends.tolist() == [0.0, 6.0]
    aware.eval()(torch.full((1, 4), 100.0))
    assert rounding.ends.tolist() == [0.0, 6.0]


def test_per_channel_saves_a_layer_whose_channels_differ():
    """Depthwise weights behind a fold: one scale for all wastes the small channels' bits."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, groups=8)
    with torch.no_grad():
        conv.weight *= torch.logspace(-2, 0, 8).view(-1, 1, 1, 1)
    model, x = nn.Sequential(conv, nn.GroupNorm(8, 8)), torch.randn(4, 8, 9, 9)
    with torch.no_grad():
        wanted = model(x)
        one, many = (
            sqnr_db([[wanted]], [[simulate(model, [x], per_channel=c)(x)]]) for c in (False, True)
        )
    assert many > one + 10


def test_sensitivity_leaves_the_model_as_it_was_and_finds_the_worst_layer():
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        targets = model.eval()(images(32)).argmax(1)
    model.train()
    report = sensitivity(model, [images(32)[:16], images(32)[16:]], bits=4, targets=targets)
    assert model.training
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert {row.name for row in report.rows} == set(layers_of(model))
    for row in report.rows:
        # errors of weights and input add up: neither alone is worse than both by much
        assert row.sqnr_db < min(row.weights_db, row.inputs_db) + 3
    finer = {row.name: row.sqnr_db for row in sensitivity(model, [images(32)], bits=8).rows}
    assert all(finer[row.name] > row.sqnr_db + 12 for row in report.rows)
    assert "points" in str(report)
    assert "<table" in report._repr_html_()


def test_a_layer_is_given_back_even_when_the_model_raises():
    layer = nn.Linear(4, 2)
    kept = layer.weight.clone()
    with pytest.raises(RuntimeError), rounded(layer, weight=weight_affine(layer, 2)):
        layer(torch.ones(1, 3))
    assert torch.equal(layer.weight, kept)


def test_bad_models_and_targets_are_named():
    with pytest.raises(ValueError, match="neither convolutions nor linear layers"):
        sensitivity(nn.ReLU(), [images()])
    with pytest.raises(ValueError, match="neither convolutions nor linear layers"):
        quantize_aware(nn.ReLU())
    with pytest.raises(ValueError, match="bits must be a whole number from 2 to 16, got 1"):
        quantize_aware(network(), bits=1)
    with pytest.raises(ValueError, match=r"targets must be \[8\].* got \[3\]"):
        sensitivity(network(), [images()], targets=torch.zeros(3))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="the weight of 0 has a parametrization already"):
        quantize_aware(normed)
