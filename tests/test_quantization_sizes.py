"""Which sizes a quantized model takes: against the model itself, run with other sizes."""

import dataclasses
import importlib.util
import logging
import sys
import threading
import warnings

import fresh
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dlhelpers.quantization import (
    onnx_backends,
    quantize_dynamic,
    quantize_static,
    sqnr_db,
    static,
    torch_backends,
)
from dlhelpers.quantization.batches import Outputs, named_leaves, read_batches, run_float
from dlhelpers.quantization.judging import judge_of
from dlhelpers.quantization.quiet import quiet
from dlhelpers.quantization.sizes import exported_with, free_groups

FAST = {"budget_s": 0.02, "progress": False}
pytestmark = pytest.mark.usefixtures("one_table_of_operators")
ONNX = ("onnx", "onnxruntime", "onnxscript")
has_onnx = all(importlib.util.find_spec(name) for name in ONNX)
needs_onnx = pytest.mark.skipif(not has_onnx, reason="the extra engines is not installed")
causal = nn.Transformer.generate_square_subsequent_mask


class WithState(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x, state):
        return self.cell(x, state)


class OfState(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x, h, c):
        return self.cell(x, (h, c))


class WithMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, x, mask):
        return self.layer(x, mask)


class OneBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x).view(4, 2, 4)


class Table(nn.Module):
    def forward(self, x, table):
        return x @ table.T


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, given, flag=None):
        y = self.layer(given["x"]) * given["scale"]
        return {"y": y if flag is None else -y, "best": [y.argmax(1), None]}


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return list(self.layer(x).unbind(1))


def state(batch):
    return torch.randn(1, batch, 8), torch.randn(1, batch, 8)


def found(model, *batches, dynamic=None):
    model.eval()
    read = read_batches(batches)
    groups = free_groups(model, read, run_float(model, read), dynamic)
    return {place for group in groups for place in group.places}


def right(model, fast, *inputs, least=60):
    with torch.no_grad():
        wanted, given = Outputs(model(*inputs)).tensors, Outputs(fast(*inputs)).tensors
    return sqnr_db([wanted], [given]) > least


@pytest.mark.parametrize(
    ("model", "batch", "free"),
    [
        (nn.Conv2d(3, 4, 3), (torch.rand(4, 3, 8, 8),), {(0, 0)}),
        (nn.Conv2d(3, 4, 3), (torch.rand(1, 3, 8, 8),), {(0, 0)}),
        (WithState(), (torch.randn(8, 12, 8), state(8)), {(0, 0), (1, 1), (2, 1)}),
        (WithState(), (torch.randn(1, 12, 8), state(1)), {(0, 0), (1, 1), (2, 1)}),
        (WithMask(), (torch.rand(2, 10, 16), causal(10)), {(0, 0)}),
        (WithMask(), (torch.rand(10, 10, 16), causal(10)), {(0, 0)}),
        (Table(), (torch.rand(4, 8), torch.rand(6, 8)), {(0, 0), (1, 0)}),
        (nn.LSTM(8, 8), (torch.rand(12, 3, 8),), {(0, 0)}),
        (OneBatch(), (torch.rand(4, 8),), set()),
        (nn.Sequential(nn.Flatten(0), nn.Linear(32, 2)), (torch.rand(4, 8),), set()),
    ],
)
def test_a_first_dimension_is_free_where_the_model_runs_with_another_size(model, batch, free):
    torch.manual_seed(0)
    assert found(model, batch) == free


@pytest.mark.parametrize(
    ("model", "batch", "samples"),
    [
        (nn.LSTM(6, 4), (torch.rand(7, 8, 6),), {(0, 1)}),
        (nn.GRU(6, 4), (torch.rand(7, 1, 6),), {(0, 1)}),
        (nn.LSTM(6, 4), (torch.rand(8, 8, 6),), {(0, 1)}),
        (
            OfState(nn.LSTM(6, 4)),
            (torch.rand(7, 8, 6), torch.rand(1, 8, 4), torch.rand(1, 8, 4)),
            {(0, 1), (1, 1), (2, 1)},
        ),
        (nn.TransformerEncoderLayer(16, 2, 32), (torch.rand(7, 8, 16),), {(0, 1)}),
        (Table(), (torch.rand(6, 8), torch.rand(4, 8)), {(0, 0)}),
        (nn.Linear(6, 4), (torch.rand(8, 6),), {(0, 0)}),
    ],
)
def test_the_dimension_that_counts_samples_is_the_first_to_be_free(model, batch, samples):
    """An exporter that fixes time as well as a first dimension leaves the samples free."""
    torch.manual_seed(0)
    model = model.eval()
    batches = read_batches([batch])
    outputs = run_float(model, batches)
    layout = judge_of(model, batches, outputs).layout
    groups = free_groups(model, batches, outputs, samples=layout.inputs)
    assert groups[0].places == samples

    def export(batch, shapes):
        free = {(i, dim) for i, dims in enumerate(shapes) for dim in dims or ()}
        if free - samples:
            raise ValueError("it takes no other size there")
        return None, lambda given: list(Outputs(model(*given)).tensors)

    made = exported_with(batches[0], groups, export, lambda *_: True)[1]
    free = {(i, d) for i, dims in enumerate(made.dimensions) for d, n in enumerate(dims) if not n}
    assert free == samples


def test_what_batches_vary_and_what_dynamic_names_is_free():
    torch.manual_seed(0)
    image, wide = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 12)
    conv, mask = nn.Conv2d(3, 4, 3), WithMask()
    assert found(conv, image, wide) == {(0, 0), (0, 3)}
    assert found(conv, image, torch.rand(1, 3, 10, 9)) == {(0, 0), (0, 2), (0, 3)}
    assert found(conv, image, dynamic={0: (2, 3)}) == {(0, 0), (0, 2), (0, 3)}
    assert found(conv, image, dynamic={0: -1}) == {(0, 0), (0, 3)}
    wanted = {(0, 0), (0, 1), (1, 0), (1, 1)}
    short, long = (torch.rand(2, 6, 16), causal(6)), (torch.rand(2, 10, 16), causal(10))
    assert found(mask, long, short) == wanted
    assert found(mask, long, dynamic={0: 1, 1: (0, 1)}) == wanted
    assert found(WithState(), (torch.randn(2, 4, 8), state(2)), dynamic={0: 1}) == {
        *((0, 0), (0, 1)),
        *((1, 1), (2, 1)),
    }


@pytest.mark.parametrize(
    ("dynamic", "error", "says"),
    [
        ([2], TypeError, "must be a dictionary .* got list"),
        ({1: 2}, ValueError, "names input 1, the inputs are 0 to 0"),
        ({"x": 2}, ValueError, "names input 'x'"),
        ({0: 4}, ValueError, r"names dimension 4 of input 0, which is \[2, 3, 8, 8\]"),
        ({0: 1}, ValueError, "dimension 1 of input 0, but the model itself raises with another"),
    ],
)
def test_a_dynamic_that_cannot_be_is_named(dynamic, error, says):
    with pytest.raises(error, match=says):
        quantize_static(
            nn.Conv2d(3, 4, 3), [torch.rand(2, 3, 8, 8)], engine="eager", dynamic=dynamic, **FAST
        )


def test_what_an_exporter_fixes_without_a_word_is_found_by_running_it():
    model = nn.Linear(8, 8).eval()
    batches = read_batches([torch.rand(4, 8)])
    groups = free_groups(model, batches, run_float(model, batches))

    def export(is_wrong):
        def run(batch):
            return [model(batch[0]).detach() * (2 if is_wrong(len(batch[0])) else 1)]

        return exported_with(batches[0], groups, lambda *_: (None, run), lambda *_: True)[1]

    assert export(lambda n: False).dimensions == ((None, 8),)
    assert export(lambda n: n != 4).dimensions == ((4, 8),)
    from_two = export(lambda n: n == 1)
    assert str(from_two) == "[any from 2, 8]"
    assert not from_two.why_not((torch.rand(7, 8),))
    assert "is [1, 8], it takes [any from 2, 8]" in from_two.why_not((torch.rand(1, 8),))
    assert "torch.float64, it takes torch.float32" in from_two.why_not((torch.rand(2, 8).double(),))


@pytest.fixture
def float_alone(monkeypatch):
    """Two backends, where sizes are what is asked for."""
    plan = {
        "eager float32": ("float32", torch_backends.eager),
        "ONNX Runtime float32": ("float32", onnx_backends.onnxruntime_float),
    }
    monkeypatch.setattr(static, "_plan", lambda engines, own: plan)


@needs_onnx
@pytest.mark.usefixtures("float_alone")
def test_an_engine_takes_states_of_other_batches_and_says_what_it_does_not_take():
    torch.manual_seed(0)
    model = WithState().eval()
    given = torch.randn(4, 6, 8), state(4)
    options = {"engine": "onnxruntime", "keep_backends": True, **FAST}
    fixed = quantize_static(model, [given], **options).on("ONNX Runtime float32")
    assert right(model, fixed, torch.randn(3, 6, 8), state(3))
    assert right(model, fixed, torch.randn(1, 6, 8), state(1))
    says = r"input 0 is \[4, 5, 8\], it takes \[any, 6, 8\].*dynamic="
    with pytest.raises(ValueError, match=says):
        fixed(torch.randn(4, 5, 8), state(4))
    with pytest.raises(ValueError, match=r"input 1\[0\] was a tensor .* got nothing"):
        fixed(torch.randn(4, 6, 8))
    assert "for inputs of sizes [any, 6, 8], [1, any, 8], [1, any, 8]" in str(fixed.report())
    free = quantize_static(model, [given], dynamic={0: 1}, **options).on("ONNX Runtime float32")
    assert right(model, free, torch.randn(3, 9, 8), state(3))


@needs_onnx
def test_a_time_that_the_exporter_fixes_is_a_sentence_and_not_the_engines_own_error():
    torch.manual_seed(0)
    model = nn.LSTM(8, 8)
    fast = quantize_dynamic(model, torch.randn(6, 3, 8), **FAST)
    with torch.no_grad():
        for x in (torch.randn(6, 3, 8), torch.randn(4, 3, 8), torch.randn(6, 2, 8)):
            given = answer(fast, x)
            is_right = sqnr_db([[model(x)[0]]], [[given]]) > 20 if isinstance(given, Tensor) else 0
            assert is_right or "was built for inputs of other sizes" in given


def answer(fast, x):
    try:
        return fast(x)[0]
    except ValueError as error:
        return str(error)


def test_constants_in_nested_inputs_are_part_of_the_model():
    given = {"x": torch.rand(4, 8), "scale": 2.0}
    model = Nested().eval()
    fast = quantize_static(model, [(given, None)], engine="eager", **FAST)
    assert right(model, fast, {"x": torch.rand(3, 8), "scale": 2.0}, None, least=20)
    assert fast(given, None)["best"][1] is None
    with pytest.raises(ValueError, match=r"input 0\['scale'\] was 2.0 .* got 3.0"):
        fast({"x": torch.rand(4, 8), "scale": 3.0}, None)
    with pytest.raises(ValueError, match=r"input 1 was None .* got torch\.float32"):
        fast(given, torch.rand(1))
    with pytest.raises(ValueError, match="input 2 was not there"):
        fast(given, None, 3)
    with pytest.raises(ValueError, match=r"input 1 of calibration batch 1 is True, .* it is None"):
        read_batches([(given, None), (given, True)])
    with pytest.raises(TypeError, match=r"is a dict of x, scale: give a tuple .* inputs"):
        read_batches([given])
    with pytest.raises(ValueError, match="all batches must be nested alike"):
        read_batches([(given, None), ({"x": given["x"]}, None)])
    assert [name for name, _ in named_leaves((given, (1, [2])))][1:] == [
        "input 0['scale']",
        "input 1[0]",
        "input 1[1][0]",
    ]


@needs_onnx
@pytest.mark.usefixtures("float_alone")
def test_an_exported_model_has_nested_inputs_and_outputs():
    model = Nested().eval()
    given = {"x": torch.rand(4, 8), "scale": 2.0}
    kept = quantize_static(model, [(given, None)], engine="onnxruntime", keep_backends=True, **FAST)
    backend = kept.on("ONNX Runtime float32")
    other = {"x": torch.rand(3, 8), "scale": 2.0}
    assert right(model, backend, other, None)
    assert torch.equal(backend(other, None)["best"][0], model(other, None)["best"][0])


def test_a_list_with_an_entry_for_each_step_follows_the_steps():
    model = Steps().eval()
    fast = quantize_static(model, [torch.rand(4, 5, 8)], engine="eager", **FAST)
    longer = torch.rand(4, 7, 8)
    assert len(fast(longer)) == 7
    assert right(model, fast, longer, least=20)  # a half type may have won the race


def test_a_mask_may_hold_minus_infinity_and_a_lone_input_may_not():
    x = torch.rand(2, 10, 16)
    assert read_batches([(x, causal(10))])[0][1].isinf().any()
    with pytest.raises(ValueError, match="has 45 values that are not finite"):
        read_batches([causal(10)])
    with pytest.raises(ValueError, match=r"input 1 .* has 1 value that is not finite"):
        read_batches([(x, torch.tensor([torch.nan, 1.0]))])


@dataclasses.dataclass
class Record:
    logits: torch.Tensor


class OfRecords(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return Record(self.layer(x))


def test_a_dataclass_comes_back_as_one():
    fast = quantize_static(OfRecords(), [torch.rand(4, 8)], engine="eager", **FAST)
    assert fast(torch.rand(2, 8)).logits.shape == (2, 8)


@needs_onnx
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_model_of_another_type_is_quantized_and_gives_that_type(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype)
    x = torch.rand(8, 32).to(dtype)
    options = {"engine": "onnxruntime", "calibrator": "min-max", "keep_backends": True, **FAST}
    fast = quantize_static(model, [x], **options)
    row = fast.report()["ONNX Runtime int8"]
    assert row.int8_kernels == 2
    given = fast.on("ONNX Runtime int8")(x[:3])
    assert given.dtype == dtype
    assert sqnr_db([[model(x[:3]).detach()]], [[given]]) > 20


# ---- what engines say ----

SILENT = """
import sys
import torch
from torch import nn
from dlhelpers.quantization import quantize_static

class Fixed(nn.Linear):  # in its sizes, so that each is exported once
    def forward(self, x):
        return super().forward(x.view(4, 8))

class Flows(Fixed):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)

class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() ** 2).clone()

class Own(Fixed):
    def forward(self, x):
        y = super().forward(x)
        if torch.compiler.is_compiling():
            raise RuntimeError("first line\\nsecond line")
        return Square.apply(y)

class Unsupported(Fixed):
    def forward(self, x):
        return torch.special.bessel_j0(super().forward(x))

kinds = {"data-dependent": Flows, "first line": Own, "bessel": Unsupported}
for says in sys.argv[1:]:
    kind = kinds[says]
    torch.manual_seed(0)
    fast = quantize_static(kind(8, 8), [torch.rand(4, 8)], engine="onnxruntime", budget_s=0.02)
    dropped = fast.report()["ONNX Runtime float32"].dropped
    assert says in dropped and "\\n" not in dropped, dropped
"""


@needs_onnx
@pytest.mark.parametrize(
    "kinds",
    [["data-dependent"], pytest.param(["first line", "bessel"], marks=pytest.mark.slow)],
)
def test_a_backend_that_is_dropped_writes_nothing(kinds):
    done = fresh.run(SILENT, *kinds)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_only_the_thread_that_quantizes_is_quiet_and_all_is_restored(capsys, caplog):
    logger = logging.getLogger("torch.export")
    handlers = [*logging.root.handlers, logging.lastResort]

    def state():
        return (
            [one.filters[:] for one in (logger, logger.parent, logging.root, *handlers)],
            [one.level for one in (logger, logger.parent, logging.root, *handlers)],
            (sys.stderr, list(warnings.filters), warnings.showwarning),
        )

    def say(who):
        print(f"{who} print", file=sys.stderr)
        logging.warning(f"{who} root")
        logging.getLogger("torch").error(f"{who} error")
        logging.getLogger("torch.export.of_later").critical(f"{who} later")
        logging.getLogger("somebody").warning(f"{who} somebody's")
        warnings.warn(f"{who} warning", UserWarning, stacklevel=1)
        warnings.warn(f"{who} deprecation", DeprecationWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        kept = state()
        loud = threading.Thread(target=say, args=("other",))
        with quiet(), quiet():
            say("own")
            loud.start()
            loud.join()
        assert kept == state()
        print("after", file=sys.stderr)
    lines = capsys.readouterr().err.split("\n")
    assert (lines[0], lines[-2]) == ("other print", "after")
    assert not any("own" in line for line in lines)
    assert [record.message for record in caplog.records] == [
        "own somebody's",
        *("other root", "other error", "other later", "other somebody's"),
    ]
    assert [str(one.message) for one in shown] == ["other warning", "other deprecation"]


def test_a_warning_that_is_kept_back_raises_nothing_and_is_shown_after():
    def warn():
        warnings.warn("said in one place", UserWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet():
            warn()
        with pytest.raises(UserWarning):
            warn()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        with quiet():
            warn()
        assert not shown
        warn()
        assert len(shown) == 1


def test_blocks_of_two_threads_may_overlap():
    filters, stream = logging.getLogger("torch").filters[:], sys.stderr
    inside, leave = threading.Event(), threading.Event()

    def other():
        with quiet():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with quiet():
        thread.start()
        inside.wait(10)
    assert sys.stderr is not stream
    leave.set()
    thread.join()
    assert sys.stderr is stream
    assert logging.getLogger("torch").filters == filters


@pytest.mark.parametrize(
    "dims", [None, 1.0, "all", True, (2, None), (2.0,), ["N"], (True,), torch.tensor([2, 3])]
)
def test_dimensions_that_are_no_numbers_are_one_error_that_shows_the_form(dims):
    with pytest.raises(TypeError, match=r"dynamic must be .* such as \{0: \(2, 3\)\}, got \{0: "):
        quantize_static(nn.Linear(4, 2), [torch.rand(4, 4)], dynamic={0: dims}, engine="qnnpack")


@pytest.mark.parametrize(
    ("inputs", "targets", "said"),
    [
        (np.zeros((4, 4), np.float32), np.zeros(4, np.int64), r"inputs .* ndarray: .*from_numpy"),
        (torch.zeros(4, 4), np.zeros(4, np.int64), r"class numbers .* ndarray: .*from_numpy"),
        (torch.zeros(4, 4), [0, 1, 0, 1], r"class numbers .* list: .*as_tensor"),
        ([torch.zeros(4)], torch.zeros(4).long(), r"inputs .* list: .*as_tensor"),
        (torch.zeros(4, 4), None, r"class numbers .* NoneType"),
    ],
)
def test_a_test_set_of_anything_but_tensors_is_named(inputs, targets, said):
    with pytest.raises(TypeError, match=said):
        quantize_static(
            nn.Linear(4, 2), [torch.rand(4, 4)], test=(inputs, targets), engine="qnnpack"
        )


def test_a_test_function_may_leave_its_model_in_training_mode():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Flatten(), nn.Linear(8 * 36, 10)),
    ).eval()
    net[1].running_mean.normal_()

    def left_in_training(model):
        model.eval()
        model.train()
        with torch.no_grad():
            model(torch.rand(8, 3, 8, 8))  # changes what BatchNorm keeps
        for parameter in model.parameters():
            parameter.data.mul_(2)
        return 1.0

    batches = [torch.rand(16, 3, 8, 8) for _ in range(4)]
    options = {"engine": "eager", "budget_s": 0.05, "progress": False}
    ends = (lambda model: 1.0), left_in_training
    found = [quantize_static(net, batches, test=end, **options).report() for end in ends]
    plain, trained = ([row.sqnr_db for row in one.rows] for one in found)
    assert trained == pytest.approx(plain, abs=1e-6, nan_ok=True)
    assert found[0].notes[:-1] == found[1].notes[:-1]
