"""Which models are taken: each works, or meets one sentence that says what to give instead."""

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from dlhelpers import machine
from dlhelpers.fusion import fuse_conv_bn
from dlhelpers.memory import estimate
from dlhelpers.models import copied, plain_copy
from dlhelpers.quantization import (
    affine,
    dynamic,
    quantize_aware,
    quantize_dynamic,
    quantize_static,
    sensitivity,
    simulate,
)
from dlhelpers.quantization.attention import close_attention_, open_attention_
from dlhelpers.quantization.dynamic_layers import converted
from dlhelpers.quantization.noise import sqnr_db
from dlhelpers.shufflenet import audit, layer_costs

FAST = {"budget_s": 0.05, "progress": False}
X = torch.rand(4, 3, 8, 8)


def net():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    return nn.Sequential(*layers).eval()


TAKE = {
    "fuse": lambda m: fuse_conv_bn(m, X),
    "static": lambda m: quantize_static(m, [X], engine="eager", **FAST),
    "dynamic": quantize_dynamic,
    "aware": quantize_aware,
    "simulate": lambda m: simulate(m, [X])(X),
    "sensitivity": lambda m: sensitivity(m, [X], progress=False),
    "costs": lambda m: layer_costs(m, X),
    "audit": lambda m: audit(m, X),
    "estimate": lambda m: estimate(m, X, None, training=False),
}
COPY = [name for name in TAKE if name not in ("costs", "audit", "estimate")]


def pruned():
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def keeps_its_output():
    model = net()
    model.last = {"outputs": [model(X)]}
    return model


class Box:
    pass


def keeps_it_in_an_object():
    model = net()
    model.box = Box()
    model.box.tensor = model(X)
    return model


@pytest.mark.parametrize("make", [pruned, keeps_its_output, keeps_it_in_an_object])
def test_tensors_with_a_graph_are_copied_without_it(make):
    model = make()
    made = copied(model)
    with torch.no_grad():
        assert torch.equal(made(X), model(X))
    for name in ("fuse", "static", "dynamic", "simulate", "sensitivity"):
        TAKE[name](model)


def test_a_pruned_model_is_rounded_as_what_it_computes():
    model, plain = pruned(), pruned()
    plain.load_state_dict(model.state_dict())
    prune.remove(plain[0], "weight")
    assert torch.equal(simulate(model, [X])(X), simulate(plain, [X])(X))
    with pytest.raises(ValueError, match=r"prune\.remove"):
        quantize_aware(model)


@pytest.mark.parametrize("name", COPY)
def test_what_cannot_be_copied_is_named(name):
    model = net()
    model[2].guard = [threading.Lock()]
    with pytest.raises(TypeError, match=r"its 2\.guard\[0\] is a _thread.lock .*leave guard out"):
        TAKE[name](model)


def test_generators_and_files_are_named(tmp_path):
    for value, kind in (((i for i in "a"), "generator"), (open(tmp_path / "f", "w"), "TextIO")):  # noqa: SIM115
        model = net()
        model.box = Box()
        model.box.held = value
        with pytest.raises(TypeError, match=rf"its box\.held is a .*{kind}"):
            copied(model)


@pytest.mark.parametrize("name", TAKE)
def test_inference_mode_changes_nothing(name):
    model = net()
    with torch.inference_mode():
        TAKE[name](model)
        inside = net()
        TAKE[name](inside)
    TAKE[name](inside)


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.last = inner, nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.inner(x))


def called_compiled():
    model = torch.compile(net(), backend="eager")
    model(X)
    return model


def on_meta():
    with torch.device("meta"):
        return net()


COMPILED = {"fuse": "fuse it first, then compile"}
PARALLEL = {"fuse": r"fuse model\.module, then wrap it"}
FUNCTIONS = dict.fromkeys(("dynamic", "aware", "simulate", "sensitivity"), "that it was made from")
SCRIPTED = FUNCTIONS | {"fuse": "TorchScript: fuse the module that it was made from"}
META = dict.fromkeys(COPY, "is on the meta device, which holds no values")
ALL = dict.fromkeys(TAKE)
KINDS = {
    "parallel": (lambda: nn.DataParallel(net()), PARALLEL),
    "compiled": (called_compiled, COMPILED),
    "compiled inside": (lambda: Holder(called_compiled()).eval(), COMPILED),
    "traced": (lambda: torch.jit.trace(net(), X), SCRIPTED),
    "exported, its module": (lambda: torch.export.export(net(), (X,)).module(), FUNCTIONS),
    "exported": (lambda: torch.export.export(net(), (X,)), ALL | dict.fromkeys(TAKE, "its module")),
    "meta": (on_meta, META),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), dict.fromkeys(TAKE, "run a batch, then")),
    "method": (lambda: net().forward, dict.fromkeys(TAKE, "give the module itself")),
    "class": (lambda: nn.Linear, dict.fromkeys(TAKE, r"give an instance, Linear\(")),
    "state": (lambda: net().state_dict(), dict.fromkeys(TAKE, "load a state_dict into a module")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_another_kind_works_or_meets_one_sentence(kind):
    make, refused = KINDS[kind]
    for name, take in TAKE.items():
        if name in refused:
            with pytest.raises((TypeError, ValueError), match=refused[name]):
                take(make())
        else:
            take(make())


def test_wrapped_models_are_rounded_and_counted_as_what_is_inside():
    model = net()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    plain = sensitivity(model, [X], progress=False)
    for wrapped in (compiled, nn.DataParallel(model)):
        assert sensitivity(wrapped, [X], progress=False) == plain
        assert torch.equal(simulate(wrapped, [X])(X), simulate(model, [X])(X))
        assert layer_costs(wrapped, X).flops == layer_costs(model, X).flops


# ---- attention ----


class Attends(nn.Module):
    def __init__(self, cross=False, **options):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"kdim": 12, "vdim": 10} if cross else {}
        self.attention, self.cross = nn.MultiheadAttention(16, 4, **sizes, **options), cross
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        key, value = (x[..., :12], x[..., :10]) if self.cross else (x, x)
        return self.attention(x, key, value)[0]


SEQUENCES = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"batch_first": True}, {"bias": False}, {"cross": True}),
        {"add_bias_kv": True, "add_zero_attn": True},
    ],
)
def test_opened_attention_computes_the_same_and_closes(options):
    model = Attends(**options).eval()
    opened = open_attention_(copied(model))
    with torch.no_grad():
        assert torch.allclose(opened(SEQUENCES), model(SEQUENCES), atol=1e-6)
        assert torch.allclose(opened(SEQUENCES[0]), model(SEQUENCES[0]), atol=1e-6)
        closed = close_attention_(opened)
        assert torch.equal(closed(SEQUENCES), model(SEQUENCES))
    assert list(closed.state_dict()) == list(model.state_dict())
    finished = quantize_aware(model).finish()
    for name, tensor in model.state_dict().items():
        assert torch.equal(finished.state_dict()[name], tensor)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 12, "vdim": 10}])
def test_attentions_that_share_projections_share_them_once_closed(sizes):
    first, second = (nn.MultiheadAttention(16, 4, **sizes) for _ in range(2))
    names = [name for name, _ in first.named_parameters(recurse=False)]
    for name in names:
        setattr(second, name, getattr(first, name))
    alone = nn.MultiheadAttention(16, 4, **sizes)
    closed = close_attention_(open_attention_(copied(nn.ModuleList([first, second, alone]))))
    for name in names:
        assert getattr(closed[0], name) is getattr(closed[1], name)
        assert getattr(closed[0], name) is not getattr(closed[2], name)
        assert torch.equal(getattr(closed[0], name), getattr(first, name))


def rounded_by_hand(weight):
    grid = affine.choose_affine(weight, bits=4, symmetric=True, axis=0)
    return affine.dequantize(affine.quantize(weight, grid), grid)


def test_each_projection_of_attention_is_a_row_that_brute_force_finds():
    model = Attends().eval()
    rows = {row.name: row for row in sensitivity(model, [SEQUENCES], bits=4, progress=False).rows}
    places = [f"attention.in_proj.{place}" for place in "qkv"]
    assert set(rows) == {*places, "attention.out_proj"}
    with torch.no_grad():
        wanted = model(SEQUENCES)
        for number, place in enumerate(places):
            other = copied(model)
            part = other.attention.in_proj_weight[16 * number : 16 * (number + 1)]
            part.copy_(rounded_by_hand(part))
            ratio = sqnr_db([[wanted]], [[other(SEQUENCES)]])
            assert rows[place].weights_db == pytest.approx(ratio, abs=0.05)
        other = copied(model)
        other.attention.out_proj.weight.copy_(rounded_by_hand(other.attention.out_proj.weight))
        ratio = sqnr_db([[wanted]], [[other(SEQUENCES)]])
        assert rows["attention.out_proj"].weights_db == pytest.approx(ratio, abs=0.05)


def test_what_is_not_rounded_is_named():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rnn = nn.Linear(16, 8), nn.LSTM(8, 8, batch_first=True)
            self.unused = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.linear(self.rnn(self.first(x))[0], self.unused.weight)

    left = ("rnn (LSTM)", "unused (Linear)")
    report = sensitivity(Own(), [SEQUENCES], progress=False)
    assert report.left_float == left
    assert "not rounded: rnn (LSTM), unused (Linear)" in str(report)
    assert simulate(Own(), [SEQUENCES]).left_float == left


# ---- dynamic ----


class First(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.last = layer, nn.Linear(8, 4)

    def forward(self, x):
        output = self.layer(x)
        return self.last(output[0] if isinstance(output, tuple) else output)


class Own(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Reads(First):
    def forward(self, x):
        return super().forward(x.to(self.kind)) + self.layer.weight.mean()

    @property
    def kind(self):
        return next(self.parameters()).dtype


def encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 8))


FAILED_ONCE = {
    "encoder": (encoder, "self_attn (MultiheadAttention)"),
    "proj_size": (lambda: First(nn.LSTM(16, 12, proj_size=8)), "layer (LSTM): proj_size"),
    "no bias": (lambda: First(nn.GRU(16, 8, bias=False)), "layer (GRU): bias=False"),
    "subclass": (lambda: First(Own(16, 8)), "layer (Own): torch.ao has no such layer"),
    "read": (lambda: Reads(nn.Linear(16, 8)), "layer (Linear): Reads reads its weight"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAILED_ONCE)
def test_without_inputs_what_would_raise_stays_float_and_is_named(name):
    make, said = FAILED_ONCE[name]
    model = make().eval()
    fast = quantize_dynamic(model)
    with torch.no_grad():
        assert sqnr_db([[model(SEQUENCES)]], [[fast(SEQUENCES)]]) > 20
    assert said in fast.report().notes[0]
    assert fast.report().rows[0].int8_kernels >= 1


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_cells_count_as_int8(cell):
    fast = quantize_dynamic(First(cell(16, 8)))
    assert fast.report().rows[0].int8_kernels == 2
    assert fast(SEQUENCES[0]).shape == (5, 4)


def test_a_call_that_an_unmeasured_engine_refuses_is_a_sentence():
    fast = quantize_dynamic(nn.Sequential(nn.Linear(16, 4)))
    fast(SEQUENCES)
    with pytest.raises(ValueError, match=r"dynamic int8 raises on inputs torch.float32 \[16\]"):
        fast(SEQUENCES[0, 0])


def test_sums_of_16_bits_get_a_reduced_range(monkeypatch):
    plans, described = [], machine.describe()

    def looked(task, plan, *rest):
        plans.append(plan)
        raise StopIteration

    monkeypatch.setattr(dynamic, "built", looked)
    for simd in (("avx2",), ("avx2", "avx_vnni"), ("avx2", "avx512_vnni"), ("neon",)):
        now = replace(described, simd=simd)
        monkeypatch.setattr(machine, "describe", lambda now=now: now)
        with pytest.raises(StopIteration):
            quantize_dynamic(nn.Sequential(nn.Linear(16, 4)), SEQUENCES, **FAST)
    reduced = ["ONNX Runtime dynamic int8, reduced range" in plan for plan in plans]
    assert reduced == [True, False, False, False]


def test_seven_bits_are_what_the_engine_is_asked_for():
    pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(nn.Linear(16, 4))
    made, left = converted(model, torch.backends.quantized.engine, reduce_range=True)
    assert left == []
    assert "quantized.dynamic" in type(made[0]).__module__
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_plain_copy_computes_the_weights_of_old_norms_for_good(norm):
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(8, 6)), nn.ReLU(), norm(nn.Conv1d(6, 3, 1), "weight"))
    model[0](torch.randn(5, 8))
    model.eval()
    made = plain_copy(model)
    assert not any(module._forward_pre_hooks for module in made.modules())
    assert set(dict(made.named_parameters())) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    x = torch.randn(5, 8)
    assert torch.allclose(made[0](x), model[0](x), atol=1e-6)
    assert all(model[place]._forward_pre_hooks for place in (0, 2))
