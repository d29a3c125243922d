"""Models that engines find hard: masks, wrappers, kept tensors, readers of weights, names."""

import importlib
import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from dlhelpers.models import plain_copy
from dlhelpers.quantization import (
    quantize_aware,
    quantize_dynamic,
    quantize_static,
    sensitivity,
    simulate,
)
from dlhelpers.quantization.attention import run_reference
from dlhelpers.quantization.aware import finished_copy
from dlhelpers.quantization.calling import by_place
from dlhelpers.quantization.noise import sqnr_db
from dlhelpers.quantization.weight_reads import weight_reads

FAST = {"budget_s": 0.02, "progress": False}
pytestmark = pytest.mark.usefixtures("one_table_of_operators")
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="the extra engines is not installed")
ENGINES = [e for e in ("qnnpack", "x86") if e in torch.backends.quantized.supported_engines]


# ---- encoders with masks ----


class Masked(nn.Module):
    """An encoder, then a layer; padded positions are part of the output."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder, self.last = nn.TransformerEncoder(layer, 1), nn.Linear(16, 4)

    def forward(self, x, padding=None):
        return self.last(self.encoder(x, src_key_padding_mask=padding))


class Translates(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)

    def forward(self, x, padding):
        return self.body(x, x, src_key_padding_mask=padding, memory_key_padding_mask=padding)


def masked_batch():
    torch.manual_seed(0)
    padding = torch.zeros(16, 6, dtype=torch.bool)
    padding[:, 4:] = True
    return torch.randn(16, 6, 16), padding


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [Masked, Translates])
def test_encoders_with_masks_are_rounded_in_eval_mode_and_finish_as_they_were(make):
    model, (x, padding) = make().eval(), masked_batch()
    aware = quantize_aware(model, bits=16).eval()
    with torch.no_grad():
        wanted, found = model(x, padding), aware(x, padding)
    shown = ~padding if make is Masked else torch.ones_like(padding)
    assert sqnr_db([[wanted[shown]]], [[found[shown]]]) > 60
    assert aware(x, padding).requires_grad
    assert simulate(model, [(x, padding)])(x, padding).shape == wanted.shape
    assert len(sensitivity(model, [(x, padding)], progress=False).rows) >= 7
    finished = aware.finish()
    kept = [m for m in finished.modules() if isinstance(m, nn.TransformerEncoder)]
    given = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    assert [vars(m).keys() for m in kept] == [vars(m).keys() for m in given]
    assert all(m.use_nested_tensor for m in kept)
    with torch.no_grad():
        torch.testing.assert_close(finished(x, padding), wanted)


@pytest.mark.filterwarnings("ignore")
def test_backends_are_compared_with_what_an_exported_graph_computes():
    model, batch = Masked(), masked_batch()
    with torch.no_grad():
        wanted = model.train()(*batch)  # without dropout
        assert not torch.allclose(model.eval()(*batch), wanted, atol=0.1)  # the fast path
    (found,), notes = run_reference(plain_copy(model), [batch])
    torch.testing.assert_close(found.tensors[0], wanted)
    assert len(notes) == 1
    assert "src_key_padding_mask" in notes[0]
    for call in (
        lambda *given: quantize_static(model, [given], engine="eager", **FAST),
        lambda *_: quantize_dynamic(model),
    ):
        fast = call(*batch)
        assert notes[0] in fast.report().notes
        assert sqnr_db([[wanted]], [[fast(*batch)]]) > 20
    assert model.encoder.use_nested_tensor
    assert run_reference(plain_copy(model), [batch[:1]])[1] == []


@pytest.mark.filterwarnings("ignore")
def test_a_mask_does_not_condemn_an_exported_graph():
    model, batch = plain_copy(Masked()), masked_batch()
    (wanted,), _ = run_reference(model, [batch])
    exported = torch.export.export(model, batch).module()
    with torch.no_grad():
        assert sqnr_db([wanted.tensors], [[exported(*batch)]]) > 60


# ---- what a model keeps, and what wraps it ----


class Keeps(nn.Module):
    """Keeps a tensor with a graph of its last call."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.seen = []

    def forward(self, x):
        with torch.enable_grad():
            self.kept = self.last(torch.tanh(self.first(x)))
            self.seen = [{"hidden": self.kept * 2}]
        return self.kept.detach()


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)]
)
def test_a_model_that_keeps_computed_tensors_is_quantized(dtype):
    torch.manual_seed(0)
    model, x = Keeps().to(dtype), torch.randn(16, 8, dtype=dtype)
    fast = quantize_static(model, [x], engine=("eager", *ENGINES[:1]), **FAST)
    assert not any("deepcopy" in row.dropped for row in fast.report().rows)
    assert quantize_dynamic(model, x, **FAST)(x).shape == (16, 3)
    assert sensitivity(model, [x], progress=False).rows


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": torch.compile,
    "average": torch.optim.swa_utils.AveragedModel,
    "average of DataParallel": lambda m: torch.optim.swa_utils.AveragedModel(nn.DataParallel(m)),
    "inside": lambda model: nn.Sequential(nn.Identity(), model),
    "inside, compiled": lambda model: nn.Sequential(nn.Identity(), torch.compile(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_aware_model_is_finished(name):
    torch.manual_seed(0)
    aware = quantize_aware(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    x = torch.randn(16, 8)
    aware(x)
    wrapped = WRAPPERS[name](aware)
    made = finished_copy(wrapped)
    assert not any(parametrize.is_parametrized(module) for module in made.modules())
    torch.testing.assert_close(made(x), aware.finish()(x))
    assert parametrize.is_parametrized(aware.model[0])
    assert quantize_dynamic(wrapped).report().rows[0].int8_kernels == 2
    assert quantize_static(wrapped, [x], engine="eager", **FAST)(x).shape == (16, 3)


# ---- whose weight is read ----


def product(layer, x):
    return F.linear(x, layer.weight, layer.bias)


class Config:
    weight = 2.0


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.config = nn.Linear(8, 8), nn.Linear(8, 2), Config()
        self.more = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def hidden(self, x):
        return F.relu(self.a(x))


class Plain(Two):
    def forward(self, x):
        # unlike self.b.weight of the paper, nothing is tied here
        return self.b(self.hidden(x)) * self.config.weight


class Asks(Two):
    def forward(self, x):
        first = next(self.b.parameters())
        return self.b(self.hidden(x.to(first.device, first.dtype)))


class AsksAll(Two):
    def forward(self, x):
        return self.b(self.hidden(x.to({p.dtype for p in self.parameters()}.pop())))


class Helper(Two):
    def forward(self, x):
        return product(self.b, self.hidden(x))


class ByName(Two):
    def forward(self, x):
        return F.linear(self.hidden(x), getattr(self.b, "weight"))  # noqa: B009


class Unpacked(Two):
    def forward(self, x):
        weight, bias = self.b.parameters()
        return F.linear(self.hidden(x), weight, bias)


class Local(Two):
    def forward(self, x):
        def inner(layer, y):
            return F.linear(y, layer.weight)

        head = self.b
        return inner(head, self.hidden(x))


class Looped(Two):
    def forward(self, x):
        for _, layer in enumerate(self.more):
            x = F.linear(x, layer.weight)
        return self.b(self.hidden(x))


class Inherits(Helper):
    def forward(self, x):
        return super().forward(x)


class Checkpointed(Two):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.end, self.hidden(x), use_reentrant=False)

    def end(self, x):
        return product(layer=self.b, x=x)


class Mapped(Two):
    def forward(self, x):
        weights = list(map(lambda layer: layer.weight, self.more))  # noqa: C417
        return self.b(self.hidden(x @ weights[0]))


class Penalised(Two):
    def forward(self, x):
        return self.b(self.hidden(x)) + sum(p.square().sum() for p in self.a.parameters())


READ = {
    **{kind: set() for kind in (Plain, Asks, AsksAll)},
    **{kind: {"b"} for kind in (Helper, ByName, Unpacked, Local, Inherits, Checkpointed)},
    **{kind: {"more.0", "more.1"} for kind in (Looped, Mapped)},
    Penalised: {"a"},
}


@pytest.mark.parametrize("kind", READ, ids=lambda kind: kind.__name__)
def test_layers_whose_weight_is_read_stay_float_and_no_others(kind):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(4, 8)
    read = weight_reads(model).read
    assert {name for name, module in model.named_modules() if id(module) in read} == READ[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = quantize_dynamic(model)
        found = fast(x)
    assert fast.report().rows[0].int8_kernels == 4 - len(READ[kind])
    with torch.no_grad():
        assert sqnr_db([[model(x)]], [[found]]) > 20


class Hidden(Two):
    """Reads a weight in code that has no source."""

    exec("def forward(self, x):\n    return self.hidden(x) @ self.b.weight.T")


def test_a_model_that_raises_in_its_first_call_stays_float_and_says_so():
    torch.manual_seed(0)
    model, x = Hidden().eval(), torch.randn(4, 8)
    fast = quantize_dynamic(model)
    with pytest.raises(ValueError, match="raises on inputs"):  # nor does the model take that
        fast(torch.randn(4, 5))
    with pytest.warns(UserWarning, match="raised in the first call .*: the model stays float"):
        found = fast(x)
    torch.testing.assert_close(found, model(x).detach())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(x)
    report = fast.report()
    assert report.chosen == "eager float32"
    assert "the model stays float" in report.notes[-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_an_unmeasured_float_model_bears_its_own_type(dtype):
    fast = quantize_dynamic(nn.Linear(4, 4).to(dtype))
    assert fast.report().chosen == f"eager {dtype}".replace("torch.", "")
    assert next(fast.parameters()).dtype is dtype


# ---- inputs by name ----


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x, scale=None, shift=None, *, flag=False):
        y = self.layer(x) if scale is None else self.layer(x) * scale
        return y if shift is None else y + shift


@pytest.mark.parametrize("measured", [True, False])
def test_inputs_by_name_find_their_places(measured):
    torch.manual_seed(0)
    model, x, shift = Named().eval(), torch.randn(8, 6), torch.full((8, 4), 100.0)
    batch = (x, None, shift)
    fast = (
        quantize_static(model, [batch], engine="eager", **FAST)
        if measured
        else quantize_dynamic(model)
    )
    wanted = model(x, shift=shift).detach()
    for found in (fast(x, shift=shift), fast(shift=shift, x=x), fast(*batch)):
        assert sqnr_db([[wanted]], [[found]]) > 40
    for options, says in (
        ({"flag": True}, "input flag has no place among the model's inputs"),
        ({"skift": shift}, "input skift has no place"),
        ({"x": x}, "input x is given twice"),
    ):
        with pytest.raises(TypeError, match=says):
            fast(x, **options)
    with pytest.raises(TypeError, match="input x is missing, which comes before shift"):
        fast(shift=shift)


def test_inputs_that_are_by_position_alone_come_first():
    def forward(x, /, y=None, z=None):
        return x

    takes = inspect.signature(forward)
    assert by_place(takes, (1,), {"z": 3}) == (1, None, 3)
    for given, options, says in (
        ((), {"z": 3}, "input x is missing"),
        ((1,), {"x": 1}, r"input x has no place among the model's inputs \(y, z\)"),
    ):
        with pytest.raises(TypeError, match=says):
            by_place(takes, given, options)
    with pytest.raises(TypeError, match="give inputs by position"):
        by_place(None, (1,), {"x": 1})


def test_a_test_function_may_ask_for_the_device_and_give_names():
    torch.manual_seed(0)
    model, x = Named().eval(), torch.randn(16, 6)
    y = model(x).argmax(1)

    def accuracy(tested):
        first = next(tested.parameters())
        return (tested(x=x.to(first.device, first.dtype)).argmax(1) == y).float().mean()

    report = quantize_static(
        model, [x], engine=("eager", *ENGINES[:1]), test=accuracy, **FAST
    ).report()
    assert all(row.accuracy is not None for row in report.rows if not row.dropped)
    assert not any("on the test data" in row.dropped for row in report.rows)


# ---- parametrizations, and arguments that are wrong ----


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


def tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    return model


PARAMETRIZED = {
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8))),
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8))),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8))),
    "tied": tied,
    "frozen": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8))).requires_grad_(
        False
    ),
    "recurrent": lambda: nn.ModuleList(
        [parametrizations.weight_norm(nn.LSTM(8, 8), "weight_hh_l0")]
    )[0],
}


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrizations_are_computed_for_good_in_a_plain_copy(name):
    torch.manual_seed(0)
    model, x = PARAMETRIZED[name]().eval(), torch.randn(16, 8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = plain_copy(model)
    with torch.no_grad():
        torch.testing.assert_close(first_of(made(x)), first_of(model(x)), rtol=0, atol=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if name != "recurrent":
        assert type(made[0]) is nn.Linear
        assert made[0].weight.requires_grad is (name != "frozen")
        assert parametrize.is_parametrized(model[0])
        assert sensitivity(model, [x], progress=False).rows
        assert simulate(model, [x])(x).shape == (16, 8)


@needs_onnx
@pytest.mark.filterwarnings("ignore")
def test_layers_with_weight_norm_are_ranked():
    torch.manual_seed(0)
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))
    report = quantize_static(
        net, [torch.randn(16, 8)], engine="onnxruntime", min_sqnr_db=90, **FAST
    ).report()
    assert report["ONNX Runtime int8, mixed"].sqnr_db is not None


@pytest.mark.parametrize("call", [sensitivity, simulate, lambda m, x, **o: quantize_aware(m, **o)])
@pytest.mark.parametrize("bits", [1, 17, 2.5, True])
def test_wrong_bits_do_not_blame_the_model(call, bits):
    with pytest.raises(ValueError, match=f"bits must be a whole number from 2 to 16, got {bits}"):
        call(nn.Sequential(nn.Linear(8, 3)), [torch.randn(4, 8)], bits=bits)


@pytest.mark.parametrize("call", [sensitivity, simulate])
def test_an_unknown_calibrator_does_not_blame_the_model(call):
    with pytest.raises(ValueError, match=r"^method='max' is not one of"):
        call(nn.Sequential(nn.Linear(8, 3)), [torch.randn(4, 8)], calibrator="max")


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_told_what_to_give_instead():
    x = torch.randn(16, 8)
    scripted = torch.jit.trace(nn.Sequential(nn.Linear(8, 3)).eval(), x)
    notes = quantize_static(scripted, [x], engine="eager", **FAST).report().notes
    assert any("quantize the module that it was made from" in note for note in notes)
