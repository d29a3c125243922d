import copy
import dataclasses
import functools
import io
import warnings

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.optimization import fuse as torch_fuse
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dlhelpers.fusion import (
    FusionError,
    RepVGGBlock,
    fold_after,
    fold_before,
    fuse_conv_bn,
    fusing,
    proving,
    reparameterize,
)
from dlhelpers.fusion.folding import why_not_before
from dlhelpers.fusion.tracing import is_batch_norm


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def lived(model, seed=0):
    """Give every BatchNorm statistics and weights, and every layer a bias, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if is_batch_norm(module):
                if module.running_mean is not None:
                    module.running_mean.normal_(0, 0.3, generator=generator)
                    module.running_var.uniform_(0.3, 2, generator=generator)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.3, generator=generator)
            elif getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.1, generator=generator)
    return model


def batch_norms(model):
    return [module for module in model.modules() if is_batch_norm(module)]


def relative(a, b):
    return ((a - b).abs().max() / a.abs().max()).item()


# ---- the algebra ----


@st.composite
def cases(draw):
    d = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    groups = draw(st.sampled_from([1, 2, 3]))
    c1, c2 = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    options = {
        "kernel_size": kernel,
        "stride": stride,
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding": draw(st.integers(0, 1)),
    }
    if not transposed:
        modes = ["zeros", "replicate", "circular"] + ["reflect"] * (d < 3)
        options["padding_mode"] = draw(st.sampled_from(modes))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{d}d")
    torch.manual_seed(draw(st.integers(0, 99)))
    conv = kind(c1, c2, **options)
    norm = functools.partial(getattr(nn, f"BatchNorm{d}d"), affine=draw(st.booleans()))
    return conv, norm, torch.randn(2, c1, *[7] * d), dtype


def check_random_case(case):
    """The fold in the layer's own type is the float64 fold, rounded once."""
    conv, norm, x, dtype = case
    for bn, fold, chain in (
        (lived(norm(conv.out_channels)).eval(), "after", lambda c, b: b(c(x.double()))),
        (lived(norm(conv.in_channels)).eval(), "before", lambda c, b: c(b(x.double()))),
    ):
        layer = conv.to(dtype)
        exact_layer, exact_bn = copy.deepcopy(layer).double(), copy.deepcopy(bn).double()
        if fold == "before" and why_not_before(layer):
            with pytest.raises(ValueError, match=r"zeros|transposed"):
                fold_before(bn, layer)
            continue
        if fold == "after":
            folded, exact = fold_after(layer, bn), fold_after(exact_layer, exact_bn)
        else:
            folded, exact = fold_before(bn, layer), fold_before(exact_bn, exact_layer)
        with torch.no_grad():
            wanted, found = chain(exact_layer, exact_bn), exact(x.double())
        assert torch.allclose(wanted, found, rtol=1e-10, atol=1e-10)
        assert folded.weight.dtype == folded.bias.dtype == dtype
        assert torch.equal(folded.weight.double(), exact.weight.to(dtype).double())
        assert torch.equal(folded.bias.double(), exact.bias.to(dtype).double())
        assert type(folded) is type(layer)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_kind_of_convolution_is_folded_exactly(case):
    check_random_case(case)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(cases())
def test_every_kind_of_convolution_is_folded_exactly_in_600_cases(case):
    check_random_case(case)


@given(st.booleans(), st.booleans())
def test_linear_layers_are_folded_both_ways(bias, affine):
    layer = nn.Linear(5, 7, bias=bias).double()
    behind = lived(nn.BatchNorm1d(7, affine=affine)).double().eval()
    before = lived(nn.BatchNorm1d(5, affine=affine)).double().eval()
    x = torch.randn(4, 5, dtype=torch.float64)
    assert torch.allclose(fold_after(layer, behind)(x), behind(layer(x)), atol=1e-12)
    assert torch.allclose(fold_before(before, layer)(x), layer(before(x)), atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "dilation", "pads"), [(1, 1, False), (3, 1, True), (2, 1, True), ((1, 3), 2, True)]
)
def test_a_batchnorm_before_same_padding_is_folded_where_the_kernel_sees_no_padding(
    kernel, dilation, pads
):
    conv = nn.Conv2d(4, 8, kernel, padding="same", dilation=dilation).double()
    bn, x = lived(nn.BatchNorm2d(4)).double().eval(), torch.randn(2, 4, 6, 6).double()
    assert bool(why_not_before(conv)) == pads
    if not pads:
        assert torch.allclose(fold_before(bn, conv)(x), conv(bn(x)), atol=1e-12)


def test_folding_keeps_what_a_layer_is():
    conv = nn.Conv2d(8, 8, 3, bias=False).to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    bn = lived(nn.BatchNorm2d(8)).eval()
    before = conv.weight.clone(), bn.state_dict()
    folded = fold_after(conv, bn)
    assert folded.weight.is_contiguous(memory_format=torch.channels_last)
    assert (folded.weight.requires_grad, folded.bias.requires_grad) == (False, False)
    assert fold_after(nn.Conv2d(8, 8, 1, bias=False), bn).bias.requires_grad
    half = nn.Conv2d(8, 8, 1)
    half.bias.requires_grad_(False)
    folded = fold_after(half, bn)
    assert (folded.weight.requires_grad, folded.bias.requires_grad) == (True, False)
    assert torch.equal(conv.weight, before[0])
    assert conv.bias is None
    with pytest.raises(ValueError, match="8 channels after a layer of 4 outputs"):
        fold_after(nn.Conv2d(8, 4, 1), bn)
    with pytest.raises(ValueError, match="8 channels before 4 inputs"):
        fold_before(bn, nn.Conv2d(4, 8, 1))
    with pytest.raises(ValueError, match="running statistics"):
        fold_after(conv, nn.BatchNorm2d(8, track_running_stats=False))
    with pytest.raises(TypeError, match="ReLU is neither"):
        fold_after(nn.ReLU(), bn)


# ---- models ----


def fused_all(model, *inputs):
    lived(model)
    wanted = copy.deepcopy(model).eval()
    fused, report = fuse_conv_bn(model, inputs)
    with torch.no_grad():
        assert relative(wanted(*inputs), fused(*inputs)) < 1e-4
    return fused, report


def image(*channels, side=9):
    return torch.randn(2, *channels, *[side] * 2)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_transposed_convolutions_which_torch_cannot(groups):
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=groups), nn.BatchNorm2d(4))
    fused, report = fused_all(model, image(4))
    assert (report.folded, batch_norms(fused)) == (1, [])


class Subclassed(nn.Conv3d):
    pass


@pytest.mark.parametrize(
    ("layer", "norm", "x"),
    [
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), torch.randn(2, 3, 9)),
        (nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), torch.randn(2, 3, 9, 9)),
        (nn.Conv2d(3, 4, 3), torchvision.ops.FrozenBatchNorm2d(4), torch.randn(2, 3, 9, 9)),
        (Subclassed(3, 4, 3), nn.BatchNorm3d(4), torch.randn(2, 3, 5, 5, 5)),
        (nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), torch.randn(2, 3)),
        (nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), torch.randn(2, 3, 9, 9)),
    ],
)
def test_every_kind_of_batch_norm_goes(layer, norm, x):
    fused, report = fused_all(nn.Sequential(layer, norm), x)
    assert (report.folded, report.found, batch_norms(fused)) == (1, 1, [])


def test_a_chain_of_norms_and_one_in_front_go_too():
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()
    )
    fused, report = fused_all(model, image(3))
    assert (report.folded, batch_norms(fused)) == (3, [])
    assert {row.into for row in report.rows} == {"1"}


def test_zeros_of_padding_keep_the_norm_in_front():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    _, report = fused_all(model, image(3))  # onnx/tensorflow-onnx#2186
    assert list(report.left) == ["0"]
    assert "pads with zeros" in report.left["0"]
    reflecting = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    )
    assert fused_all(reflecting, image(3))[1].folded == 1


class Graph(nn.Module):
    """A model whose forward is given."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


def conv(c=4):
    return nn.Conv2d(c, c, 3, padding=1)


def norm(c=4):
    return nn.BatchNorm2d(c)


REFUSED = {
    "one conv, two norms": (
        Graph(lambda s, x: s.a(s.c(x)) + s.b(s.c(x)), c=conv(), a=norm(), b=norm()),
        "called again without it",
    ),
    "conv called once more": (
        Graph(lambda s, x: s.a(s.c(x)) + s.c(x), c=conv(), a=norm()),
        "called again without it",
    ),
    "output used elsewhere": (
        Graph(lambda s, x: (y := s.c(x)) + s.a(y), c=conv(), a=norm()),
        "is used elsewhere, too",
    ),
    "norm called elsewhere": (
        Graph(lambda s, x: s.a(s.c(x)) + s.a(x), c=conv(), a=norm()),
        "called after c and elsewhere",
    ),
    "activation between": (  # opencv/opencv#28689
        Graph(lambda s, x: s.a(F.relu(s.c(x))), c=conv(), a=norm()),
        "its input comes from relu",
    ),
    "no statistics": (
        Graph(lambda s, x: s.a(s.c(x)), c=conv(), a=nn.BatchNorm2d(4, track_running_stats=False)),
        "keeps no running statistics",
    ),
    "weight norm": (
        Graph(lambda s, x: s.a(s.c(x)), c=nn.utils.parametrizations.weight_norm(conv()), a=norm()),
        "parametrized",
    ),
    "spectral norm of old": (
        Graph(lambda s, x: s.a(s.c(x)), c=nn.utils.spectral_norm(conv()), a=norm()),
        "has hooks",
    ),
    "tensors read": (
        Graph(lambda s, x: s.a(s.c(x)) * s.a.weight.mean(), c=conv(), a=norm()),
        "read elsewhere",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused_with_the_reason(name):
    model, why = REFUSED[name]
    fused, report = fused_all(copy.deepcopy(model), image(4))
    assert report.folded == 0
    assert len(batch_norms(fused)) == report.found
    assert any(why in reason for reason in report.left.values()), report


def test_a_pair_that_is_called_twice_is_folded_once():
    model = Graph(lambda s, x: s.a(s.c(s.a(s.c(x)))), c=conv(), a=norm())
    _, report = fused_all(model, image(4))  # torch.fx folds it twice: 18 times off
    assert report.folded == 1


def test_a_shared_module_under_two_names_is_one():
    first = nn.Sequential(conv(), norm())
    model = nn.Sequential(first, nn.ReLU(), first)
    fused, _ = fused_all(model, image(4))
    assert batch_norms(fused) == []


def test_the_axis_of_a_linear_layer_is_looked_at():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    _, report = fused_all(model, torch.randn(2, 6, 6))  # [N, L, C] with L = C
    assert "dimension 1 of tensors of [3] dimensions" in report.left["1"]
    assert fused_all(copy.deepcopy(model), torch.randn(2, 6))[1].folded == 1
    _, unknown = fuse_conv_bn(model)
    assert "needs example_inputs" in unknown.left["1"]


def test_hooks_stay_and_forbid():
    seen = []
    model = nn.Sequential(conv(), norm(), nn.ReLU())
    model[0].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    fused, report = fused_all(model, image(4))
    assert "has hooks" in report.left["1"]
    seen.clear()
    fused(image(4))
    assert len(seen) == 1


class KeepsTraining(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(True)


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return x + super().forward(x)


def test_norms_with_a_mind_of_their_own_stay():
    model = nn.Sequential(conv(), KeepsTraining(4), conv(), OwnForward(4))
    _, report = fuse_conv_bn(lived(model), image(4))
    assert "train mode" in report.left["1"]
    assert "forward of its own" in report.left["3"]


def test_what_only_train_mode_calls_is_folded_as_well():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.extra = nn.Sequential(conv(), norm()), nn.Sequential(conv(), norm())

        def forward(self, x):
            y = self.body(x)
            return (y, self.extra(y)) if self.training else y

    assert fused_all(Auxiliary(), image(4))[1].folded == 2


class Branches(nn.Module):
    """Control flow on data, which no symbolic trace can follow."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(), norm(), nn.ReLU())
        self.c, self.n = conv(), norm()

    def forward(self, x):
        y = self.body(x)
        return self.n(self.c(y)) if float(y.sum()) > 0 else y


def test_what_cannot_be_traced_is_entered_part_by_part():
    _, report = fused_all(Branches(), image(4))
    assert report.folded == 1
    assert "Branches calls it, and cannot be traced" in report.left["n"]


def test_a_part_whose_inside_is_reached_past_it_is_left():
    class Reaches(Branches):
        def forward(self, x):
            return self.body.first(x) if float(x.sum()) > 1e9 else self.body(x)

    model = Reaches()
    model.body = nn.Sequential()
    for name, module in {"first": conv(), "second": norm()}.items():
        model.body.add_module(name, module)
    _, report = fused_all(model, image(4))
    assert "body.second" in report.left


def test_a_module_that_folds_itself_is_asked():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n = conv(), conv(), norm()

        def forward(self, x):
            return self.n(self.a(x) + self.b(x)) if hasattr(self, "n") else self.a(x)

        def reparameterize(self):
            summed = nn.Conv2d(4, 4, 3, padding=1)
            summed.weight.data = self.a.weight.data + self.b.weight.data
            summed.bias.data = self.a.bias.data + self.b.bias.data
            self.a = fold_after(summed, self.n)
            del self.b, self.n

    fused, report = fused_all(nn.Sequential(Own(), nn.ReLU()), image(4))
    assert (report.folded, batch_norms(fused)) == (1, [])
    assert report.rows[0].into == "0.reparameterize()"


def test_everything_else_is_kept():
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), norm(), nn.PReLU(), nn.Conv2d(4, 2, 1))
    lived(model)
    model[3].requires_grad_(False)
    model[3].register_forward_hook(lambda *_: None)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fused, report = fuse_conv_bn(model, image(4))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not fused.training
    assert dict(fused.named_parameters()).keys() == {
        "0.weight",
        "0.bias",
        "2.weight",
        *("3.weight", "3.bias"),
    }
    assert not fused[3].weight.requires_grad
    assert fused[3]._forward_hooks
    assert report.bytes_saved == 4 * (4 * 4) + 8 - 4 * 4  # four vectors and a counter for a bias


def test_the_result_is_an_ordinary_module():
    x = image(4)
    fused, _ = fused_all(nn.Sequential(conv(), norm(), nn.ReLU()), x)
    wanted = fused(x)
    other, _ = fuse_conv_bn(nn.Sequential(conv(), norm(), nn.ReLU()))
    other.load_state_dict(fused.state_dict())
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    exported = torch.export.export(fused, (x,)).module()
    for again in (other, loaded, copy.deepcopy(fused), exported):
        assert torch.allclose(again(x), wanted, atol=1e-6)


@pytest.mark.slow
def test_the_result_compiles():
    x = image(4)
    fused, _ = fused_all(nn.Sequential(conv(), norm(), nn.ReLU()), x)
    with torch.no_grad():
        assert torch.allclose(torch.compile(fused)(x), fused(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_folded_in_float64_and_rounded_once(dtype):
    model = lived(nn.Sequential(conv(), norm())).eval()
    half = copy.deepcopy(model).to(dtype)
    fused, report = fuse_conv_bn(half, image(4).to(dtype))
    assert fused[0].weight.dtype == dtype
    assert report.algebra_error < 1e-12
    exact = fold_after(copy.deepcopy(half[0]).double(), copy.deepcopy(half[1]).double())
    assert torch.equal(fused[0].weight, exact.weight.to(dtype))


def test_a_mistake_is_caught_and_nothing_wrong_returned(monkeypatch):
    def forgets_the_bias(layer, bn):  # ultralytics/yolov3#807
        folded = fold_after(layer, bn)
        folded.bias = nn.Parameter(folded.bias + 0.1 * layer.bias)
        return folded

    monkeypatch.setattr(fusing, "fold_after", forgets_the_bias)
    model = lived(nn.Sequential(conv(), norm()))
    with pytest.raises(FusionError, match=r"in float64 .* which is no rounding"):
        fuse_conv_bn(model, image(4))
    _, unverified = fuse_conv_bn(model, image(4), verify=False)
    assert unverified.max_rel_error is None


class Detects(nn.Module):
    """Its outputs are sorted by values, or empty."""

    def __init__(self, threshold):
        super().__init__()
        self.body, self.threshold = nn.Sequential(conv(), norm()), threshold

    def forward(self, x):
        scores = self.body(x).flatten()
        if scores.sum() == float("inf"):
            return scores
        return scores[scores > self.threshold]


def test_outputs_without_a_number_are_no_proof():
    _, report = fuse_conv_bn(lived(nn.Sequential(Detects(1e9))), image(4))
    assert report.folded == 1
    assert 0 < report.max_rel_error < 1e-5
    assert "hold no number on this example" in report.notes[0]


class Returns(nn.Module):
    """A convolution, a norm, and what is made of them."""

    def __init__(self, made, **modules):
        super().__init__()
        self.c, self.n, self.made = conv(), norm(), made

    def forward(self, x):
        return self.made(self.n(self.c(x)))


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


class Named(dict):
    """As transformers' outputs: a mapping of a type of its own."""


CONTAINERS = {
    "dataclass": lambda y: Answer(y, (y.exp(),)),
    "mapping": lambda y: Named(logits=y, hidden=(y.exp(),)),
    "nested": lambda y: [{"logits": (y, [y.exp()])}],
    "complex": lambda y: torch.complex(y, y.exp()),
    "half": lambda y: y.half(),
    "with NaNs and infinities": lambda y: torch.cat([y, y * float("nan"), y * float("inf")]),
}


def with_a_wrong_bias(layer, bn):
    folded = fold_after(layer, bn)
    folded.bias = nn.Parameter(folded.bias + 0.1)
    return folded


@pytest.mark.parametrize("kind", CONTAINERS)
def test_outputs_are_compared_in_whatever_they_come(kind, monkeypatch):
    model = lived(Returns(CONTAINERS[kind]))
    _, report = fuse_conv_bn(model, image(4))
    assert report.max_rel_error < 1e-2
    assert report.algebra_error < 1e-12
    monkeypatch.setattr(fusing, "fold_after", with_a_wrong_bias)
    with pytest.raises(FusionError, match="in float64"):
        fuse_conv_bn(model, image(4))


def test_whole_numbers_are_compared_too(monkeypatch):
    model = lived(Returns(lambda y: y.argmax(1)))
    _, report = fuse_conv_bn(model, image(4))
    assert report.algebra_error == 0
    assert proving.difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
    assert proving.difference(torch.tensor([True]), torch.tensor([False])) == float("inf")
    monkeypatch.setattr(fusing, "fold_after", with_a_wrong_bias)
    model.made = lambda y: (10 * y).int()
    with pytest.raises(FusionError, match="differ in sizes, whole numbers or NaNs"):
        fuse_conv_bn(model, image(4))


def test_a_nan_in_one_of_them_is_no_agreement():
    one, nan = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert proving.difference(one, nan) == proving.difference(nan, one) == float("inf")
    assert proving.difference(nan, nan.clone()) == 0
    assert proving.difference(nan, torch.tensor([1.5, float("nan"), 1.0])) == 0.5
    infinite = torch.tensor([float("inf"), 2.0])
    assert proving.difference(infinite, torch.tensor([float("inf"), 1.0])) == 0.5
    assert proving.difference(infinite, -infinite) == float("inf")
    assert proving.difference((one, one), one) == float("inf")
    assert proving.difference(one, one[:2]) == float("inf")
    assert proving.difference({"a": 3}, {"a": 3}) is None


def test_nothing_to_compare_is_no_agreement():
    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.n = conv(), norm()

        def forward(self, x):
            self.n(self.c(x)) if hasattr(self, "n") else self.c(x)

        def fuse(self):
            self.c = fold_after(self.c, self.n)
            del self.n

    model = lived(Folds())
    _, report = fuse_conv_bn(model, image(4))
    assert (report.folded, report.rows[0].into) == (1, "fuse()")
    assert report.max_rel_error is report.algebra_error is None
    assert "NOT VERIFIED" in report.notes[-1]
    assert "not verified: give example_inputs that yield a number" in str(report)


def test_rounding_is_told_from_a_mistake():
    judged, notes = proving.judged(proving.Errors(own=0.5, exact=1e-13))
    assert (judged.own, judged.exact) == (0.5, 1e-13)
    assert "rounding changes them by that much" in notes[0]
    assert proving.judged(proving.Errors(own=1e-6, exact=1e-13))[1] == []
    # right layers excuse no wrong outputs
    for wrong in (0.5, 1e-5, float("inf"), float("nan")):
        with pytest.raises(FusionError, match="is no rounding"):
            proving.judged(proving.Errors(1e-7, wrong, layers={"0": 1e-7}, worst_exact=1e-16))
    # but where the model against itself differs, too, it is the layers that are compared
    sorts = proving.Errors(0.5, 0.5, layers={"0": 1e-7}, worst_exact=1e-16, control=0.5)
    judged, notes = proving.judged(sorts)
    assert (judged.own, judged.exact) == (1e-7, 1e-16)
    assert "sorted or selected" in notes[0]
    with pytest.raises(FusionError, match="does not run in float64"):
        proving.judged(proving.Errors(own=0.5, no_float64="no kernel", allowed=0.4))
    _, notes = proving.judged(proving.Errors(own=0.3, no_float64="no kernel", allowed=0.4))
    assert "Allowed are outputs that differ by 4.0e-01" in notes[0]
    # where rounding alone changes a choice, nothing is known
    _, notes = proving.judged(proving.Errors(0.5, no_float64="no", allowed=float("inf")))
    assert "NOT VERIFIED" in notes[-1]


class ByType(nn.Module):
    """A proxy is no tensor: the trace follows the other branch."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), norm()

    def forward(self, x):
        z = self.conv(x)
        return (self.norm(z), z) if isinstance(z, torch.Tensor) else self.norm(z)


def test_what_the_trace_could_not_see_is_not_returned():
    with pytest.raises(FusionError, match="no rounding"):
        fuse_conv_bn(lived(ByType()), image(4))


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), norm()

    def forward(self, x, skip=None, scale=1.0):
        z = self.conv(x)
        return self.norm(z) * scale if skip is None else z + skip


@pytest.mark.parametrize("verify", [True, False])
def test_both_branches_of_an_optional_argument_count(verify):
    model, x = lived(Optional()), image(4)
    for example in ((x,), (x, x)):
        fused, report = fuse_conv_bn(model, example, verify=verify)
        assert (report.folded, report.left["norm"]) == (0, "conv is called again without it")
    assert torch.equal(fused(x, x), model(x, x))


class Picks(nn.Module):
    """Reaches into its children on one of two branches that torch.fx cannot follow."""

    def __init__(self, way):
        super().__init__()
        self.way, self.body = way, nn.Sequential(conv(), norm())
        self.parts = nn.ModuleList([Cell(), Cell()])

    def forward(self, x):
        if float(x.sum()) > 0:
            return self.body(x) + sum(part(x) for part in self.parts)
        return self.way(self, x)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.after = conv(), norm()

    def forward(self, x):
        return self.after(self.stem(x))


class PicksByIndex(Picks):
    def forward(self, x):
        return self.body(x) if float(x.sum()) > 0 else self.body[0](x)


class PicksInAGenerator(Picks):
    def forward(self, x):
        return self.body(x) if float(x.sum()) > 0 else sum(part.stem(x) for part in self.parts)


def test_layers_reached_past_their_parents_stay():
    x = image(4).abs()
    for kind, stays in ((PicksByIndex, "body.1"), (PicksInAGenerator, "parts.0.after")):
        model = lived(kind(None))
        fused, report = fuse_conv_bn(model, x, verify=False)
        assert "cannot be traced" in report.left[stays]
        with torch.no_grad():
            assert torch.allclose(fused(-x), model.eval()(-x), atol=1e-5)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.seen = conv(), norm(), None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen = x
        return self.norm(self.conv(x)) * self.calls


def test_the_result_is_as_fresh_as_the_model():
    model = lived(Counts())
    fused, report = fuse_conv_bn(model, image(4))
    assert report.folded == 1
    for one in (model, fused):
        assert (one.calls.item(), one.seen) == (0, None)
    x = image(4)
    assert torch.allclose(fused(x), model.eval()(x), atol=1e-5)


class Sorts(nn.Module):
    """Equal scores: rounding decides which one comes first."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), norm()

    def forward(self, x):
        scores = self.norm(self.conv(x)).mean((1, 2, 3))
        return x[scores.add(scores.flip(0)).argmax()]


def test_where_rounding_selects_the_layers_are_compared():
    one = image(4)[:1]
    x = torch.cat([one, image(4)[:1], one.flip(0)])
    _, report = fuse_conv_bn(lived(Sorts()), x)
    assert report.folded == 1
    assert report.max_rel_error < 1e-5


def test_a_readers_hook_sees_no_proxies_and_stops_the_fold():
    seen, model = [], lived(nn.Sequential(nn.Sequential(conv()), norm()))

    def look(module, args, output):
        assert type(output) is torch.Tensor
        seen.append(output)

    model[0].register_forward_hook(look)
    _, report = fuse_conv_bn(model, image(4))
    assert report.left["1"] == "hooks of 0 would see other values"
    assert not seen  # no more than before


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


def test_layers_that_compute_something_else_stay():
    patched, padded = conv(), nn.Conv2d(4, 4, 3)
    patched.forward = lambda x: nn.Conv2d.forward(patched, x) * 2
    padded.padding = (1, 1)
    for model, why in (
        (nn.Sequential(Standardised(4, 4, 3), norm()), "a forward of its own"),
        (nn.Sequential(patched, norm()), "a forward of its own"),
        (nn.Sequential(norm(), padded), "pads with zeros"),
    ):
        _, report = fuse_conv_bn(lived(model), verify=False)
        assert why in "".join(report.left.values())


class Before(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.norm, self.conv, self.way = norm(), nn.Conv2d(4, 4, 1), way

    def forward(self, x):
        normed = self.norm(x)
        return self.conv(normed) + (normed if self.way == "output" else self.conv(x))


@pytest.mark.parametrize(
    ("way", "why"),
    [("output", "its output is used elsewhere"), ("layer", "after it is called without it")],
)
def test_in_front_of_a_layer_nothing_else_may_be_touched(way, why):
    model, x = lived(Before(way)), image(4)
    fused, report = fuse_conv_bn(model, x, verify=False)
    assert why in report.left["norm"]
    assert torch.equal(fused(x), model.eval()(x))


@pytest.mark.parametrize(
    ("branches", "why"),
    [
        ([conv(), nn.Conv2d(4, 4, 3, padding=1, dilation=2)], "square odd kernels"),
        ([conv(), nn.Conv2d(8, 4, 1)], "square odd kernels"),
        ([conv(), nn.BatchNorm2d(8)], "8 channels"),
        ([nn.Sequential(conv(), nn.ReLU())], "a branch must be"),
        (nn.ReLU(), "expected branches"),
    ],
)
def test_branches_that_are_no_sum_of_convolutions_are_refused(branches, why):
    with pytest.raises(ValueError, match=why):
        reparameterize(branches)


def test_weights_that_do_not_fit_their_type_stay():
    model = nn.Sequential(conv(), norm())
    model[1].running_var.fill_(1e-10)
    model[1].eps = 1e-12
    _, report = fuse_conv_bn(model.half(), verify=False)
    assert report.left["1"] == "the folded weights do not fit into torch.float16"


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Another project's, with the name of torchvision's."""

    def forward(self, x):
        return x * 2


class FusesItself(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.way = conv(), norm(), way

    def forward(self, x):
        return self.norm(self.conv(x))

    def fuse(self):
        self.way(self)


def test_foreign_classes_and_methods_are_not_trusted():
    _, report = fuse_conv_bn(nn.Sequential(conv(), FrozenBatchNorm2d(4)), image(4))
    assert "forward of its own" in report.left["1"]


def drops_its_norm(module):
    module.norm = nn.Identity()


@pytest.mark.parametrize(
    ("way", "note"),
    [
        (lambda m: nn.init.zeros_(m.conv.weight), None),  # leaves the norm where it is
        (lambda m: m.missing, r"fuse() of FusesItself was not used: it raised AttributeError"),
        (drops_its_norm, "fuse(): not used, since with it in float64 the fused model's outputs"),
    ],
)
def test_a_method_that_does_not_fold_is_not_used(way, note):
    model, x = lived(FusesItself(way)), image(4)
    fused, report = fuse_conv_bn(model, x)
    assert (report.folded, report.rows[0].into) == (1, "conv")
    assert [note in found for found in report.notes] == ([] if note is None else [True])
    with torch.no_grad():
        assert relative(model.eval()(x), fused(x)) < 1e-4


def test_what_cannot_be_fused_says_how_to_go_on():
    with pytest.raises(ValueError, match="run a batch, then fuse"):
        fuse_conv_bn(nn.Sequential(nn.LazyConv2d(4, 3), norm()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(conv(), norm()))
    with pytest.raises(TypeError, match="fuse the module that it was made from"):
        fuse_conv_bn(nn.Sequential(scripted))
    x = image(4).requires_grad_() * 1
    assert fuse_conv_bn(nn.Sequential(conv(), norm()), x)[1].folded == 1


def test_the_error_of_a_layer_is_that_of_all_that_it_took_in():
    model = nn.Sequential(norm(), nn.Conv2d(4, 4, 3), norm(), norm(), nn.ReLU(), norm(), conv())
    _, report = fused_all(model, image(4))
    assert [row.into for row in report.rows] == ["1", "1", "1", ""]
    assert all(0 < row.error < 1e-5 for row in report.rows[:3])
    assert report.rows[3].error is None
    before = nn.Sequential(norm(), nn.Conv2d(4, 4, 3), nn.ReLU())
    assert 0 < fused_all(before, image(4))[1].rows[0].error < 1e-5


def test_errors_are_told_layer_by_layer():
    deep = nn.Sequential(*(layer for _ in range(4) for layer in (conv(), norm(), nn.ReLU())))
    _, report = fused_all(deep, image(4))
    assert all(0 < row.error < 1e-5 for row in report.rows)
    assert report.max_rel_error < 1e-5
    assert report.algebra_error < 1e-12
    assert str(report).startswith("4 of 4 BatchNorms folded; outputs differ by")
    assert report._repr_html_().count("<tr>") == 5


def test_what_is_no_model_is_named():
    with pytest.raises(TypeError, match="got int"):
        fuse_conv_bn(3)
    with pytest.raises(TypeError, match="fuse it first, then compile"):
        fuse_conv_bn(torch.compile(nn.Linear(2, 2)))


# ---- torchvision's models ----


def small_densenet():
    return torchvision.models.DenseNet(8, (2, 3), 16)


def small_efficientnet():
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 16, 16, 1), MBConvConfig(4, 5, 2, 16, 24, 2)]
    return EfficientNet(blocks, 0.2, last_channel=64)


def small_video():
    from torchvision.models.video import resnet as video

    convolutions = [video.Conv3DSimple, video.Conv3DNoTemporal, video.Conv2Plus1D]
    convolutions.append(video.Conv3DSimple)
    return video.VideoResNet(video.BasicBlock, convolutions, [1, 1, 1, 1], video.BasicStem)


SMALL = {  # the blocks of densenet121, efficientnet_b0, r3d_18
    "densenet": (small_densenet, (1, 3, 64, 64)),
    "efficientnet": (small_efficientnet, (1, 3, 64, 64)),
    "video": (small_video, (1, 3, 4, 16, 16)),
}
FEW = ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "lraspp_mobilenet_v3_large"]


def holding_batch_norm():
    found = []
    for name in torchvision.models.list_models():
        if name.startswith(("quantized_",)) or name in FEW:
            continue
        found.append(name)
    return found


def built(name):
    options = {"weights": None}
    if name in torchvision.models.list_models(module=torchvision.models.detection):
        options |= {"weights_backbone": None, "min_size": 96, "max_size": 128}
        if name.startswith("ssd"):
            options = {"weights": None, "weights_backbone": None}
    elif name in torchvision.models.list_models(module=torchvision.models.segmentation):
        options |= {"weights_backbone": None}
    return torchvision.models.get_model(name, **options)


def inputs_for(name):
    if name in torchvision.models.list_models(module=torchvision.models.detection):
        return ([torch.rand(3, 96, 128)],)
    if name in torchvision.models.list_models(module=torchvision.models.video):
        frames, side = (8, 32) if name == "r3d_18" else (16, 224 if name == "s3d" else 64)
        return (torch.rand(1, 3, frames, side, side),)
    if name.startswith("raft"):
        return torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)
    side = 299 if name == "inception_v3" else 224 if name.startswith("maxvit") else 96
    return (torch.rand(1, 3, side, side),)


def check_torchvision(name, model=None, inputs=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = built(name) if model is None else model
    if not batch_norms(model):
        pytest.skip("no BatchNorm")
    lived(model)
    fused, report = fuse_conv_bn(model, inputs_for(name) if inputs is None else inputs)
    detects = name in torchvision.models.list_models(module=torchvision.models.detection)
    if not any("sorted or selected" in note for note in report.notes):
        # a detector takes exponentials, and chooses boxes: that amplifies rounding
        assert report.max_rel_error < (1e-2 if detects else 1e-4)
    if name.startswith("raft"):  # does not run in float64
        assert report.algebra_error is None
    else:
        assert report.algebra_error < (1e-7 if detects else 1e-9)
    assert len(batch_norms(fused)) == report.found - report.folded
    assert all(row.into or row.why for row in report.rows)
    try:
        theirs = torch_fuse(copy.deepcopy(model).eval())
    except Exception:  # all detection models
        assert report.folded == report.found
        return
    kept = sum(isinstance(module, _BatchNorm) for module in theirs.modules())
    assert report.folded >= report.found - kept


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * name.startswith(("mobilenet", "lraspp")))
        for name in FEW
    ],
)
def test_torchvisions_models_are_fused_no_less_than_by_torch(name):
    check_torchvision(name)


@pytest.mark.parametrize("name", SMALL)
def test_so_are_small_ones_of_the_same_blocks(name):
    make, shape = SMALL[name]
    check_torchvision(name, make(), (torch.rand(shape),))


@pytest.mark.slow
@pytest.mark.parametrize("name", holding_batch_norm())
def test_all_of_torchvisions_models_are(name):
    large = ("regnet_y_128gf", "regnet_y_32gf", "regnet_x_32gf", "vit_", "efficientnet_v2_l")
    if name.startswith(large):
        pytest.skip("no BatchNorm, or the same blocks as its smaller relatives")
    check_torchvision(name)


# ---- functions, and branches that become one ----


class Functional(nn.Module):
    def __init__(self, training=False):
        super().__init__()
        self.conv, self.training_flag = conv(), training
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.gamma, self.beta = nn.Parameter(torch.rand(4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        y = self.conv(x)
        return F.relu(
            F.batch_norm(
                y, self.mean, self.var, self.gamma, self.beta, training=self.training_flag, eps=1e-3
            )
        )


def test_a_batch_norm_that_is_a_function_is_folded_where_the_trace_shows_it():
    fused, report = fused_all(nn.Sequential(Functional(), nn.ReLU()), image(4))
    assert (report.folded, report.found) == (1, 1)
    assert report.rows[0].into == "0.conv"
    assert "batch_norm" not in fused[0].code
    training = nn.Sequential(Functional(training=True))
    _, report = fuse_conv_bn(training, image(4))
    assert "training=True" in next(iter(report.left.values()))


class Around(Functional):
    """Its own call of F.batch_norm around that of a child."""

    def __init__(self, child):
        super().__init__()
        self.child = child

    def forward(self, x):
        return x + super().forward(self.child(x))


def test_functions_inside_of_each_other_are_folded_once():
    fused, report = fused_all(Around(Around(Functional())), image(4))
    assert (report.folded, report.found) == (3, 3)
    assert {row.into for row in report.rows} == {"conv", "child.conv", "child.child.conv"}
    shared = Functional()
    twice = nn.Sequential(shared, nn.ReLU(), shared)
    fused, report = fused_all(twice, image(4))
    assert (report.folded, report.found) == (1, 1)
    assert fused[0] is fused[2]


FUNCTIONS_LEFT = {
    "its layer called elsewhere": (
        lambda f: Graph(lambda s, x: s.f(x) + s.f.conv(x), f=f),
        "is used elsewhere, too",
    ),
    "its layer behind another function": (
        lambda f: Graph(lambda s, x: s.f(x) + F.batch_norm(s.f.conv(x), *s.other(x)), f=f),
        "another batch_norm follows conv, too",
    ),
    "a parametrized layer": (
        lambda f: nn.Sequential(spectral(f)),
        "is parametrized",
    ),
    "a layer that a module shares": (
        lambda f: nn.Sequential(f, f.conv),
        "is used elsewhere, too",
    ),
    "a linear layer's third axis": (
        lambda f: nn.Sequential(nn.Flatten(2), with_linear(f)),
        "dimension 1 of tensors of [3] dimensions",
    ),
}


def spectral(owner):
    nn.utils.parametrizations.spectral_norm(owner.conv)
    return owner


def with_linear(owner):
    owner.conv = nn.Linear(81, 4)
    return owner


@pytest.mark.parametrize("name", FUNCTIONS_LEFT)
def test_a_function_whose_layer_is_seen_elsewhere_stays(name):
    build, why = FUNCTIONS_LEFT[name]
    model = build(Functional())
    model.other = lambda x: (torch.zeros(4), torch.ones(4))
    _, report = fused_all(model, image(4))
    assert report.folded == 0
    assert any(why in reason for reason in report.left.values()), report


@pytest.mark.parametrize(
    ("c1", "c2", "stride", "groups"), [(8, 8, 1, 1), (8, 8, 1, 4), (8, 16, 2, 2)]
)
def test_a_repvgg_block_becomes_one_convolution(c1, c2, stride, groups):
    block = lived(RepVGGBlock(c1, c2, stride, groups)).double().eval()
    x = torch.randn(2, c1, 9, 9, dtype=torch.float64)
    one = reparameterize(block)
    assert torch.allclose(F.relu(one(x)), block(x), atol=1e-12)
    fused, report = fuse_conv_bn(nn.Sequential(block), x)
    assert report.folded == report.found == len(block.branches)
    assert sum(isinstance(m, nn.Conv2d) for m in fused.modules()) == 1


def test_branches_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="square odd kernels"):
        reparameterize([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3)])
    with pytest.raises(ValueError, match="equal channels and stride 1"):
        reparameterize([nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(4)])
    with pytest.raises(ValueError, match="ReLU"):
        reparameterize([nn.Conv2d(4, 4, 3, padding=1), nn.Sequential(nn.ReLU())])
    with pytest.raises(ValueError, match="no branch holds a convolution"):
        reparameterize([nn.BatchNorm2d(4)])
