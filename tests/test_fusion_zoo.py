"""Norms of other projects: in one module with an activation, written as arithmetic, exported."""

import copy
import importlib.util

import pytest
import torch
import torchvision
from test_fusion import Graph, conv, image, lived, norm, relative
from torch import nn
from torch.fx.experimental.optimization import fuse as torch_fuse
from torch.nn import functional as F

from dlhelpers.fusion import fuse_conv_bn


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def with_statistics(model):
    """Give all statistics and scales values, in buffers and parameters, as training would."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.3, 2, generator=generator)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.3, generator=generator)
    return model


def calls_of_batch_norm(model, *inputs):
    """Return the number of F.batch_norm's calls, and of those on the output of a layer."""
    outputs, calls, behind, real = [], 0, 0, F.batch_norm

    def counted(x, *args, **kwargs):
        nonlocal calls, behind
        calls += 1
        behind += any(x is output for output in outputs)
        return real(x, *args, **kwargs)

    hooks = [
        module.register_forward_hook(lambda module, args, output: outputs.append(output))
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
    ]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "batch_norm", counted)
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return calls, behind


# ---- norms that do more than a norm ----


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: the call copied, then two modules."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.PReLU(channels)

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected 4D input")
        mean = self.running_mean if not self.training or self.track_running_stats else None
        var = self.running_var if not self.training or self.track_running_stats else None
        momentum = 0.0 if self.momentum is None else self.momentum
        trains = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(x, mean, var, self.weight, self.bias, trains, momentum, self.eps)
        return self.act(self.drop(x))


class Inherited(nn.BatchNorm2d):
    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.1, inplace=True)


class InheritedSync(nn.SyncBatchNorm):
    def forward(self, x):
        return F.silu(super().forward(x))


class Swish(nn.BatchNorm2d):
    def forward(self, x):
        y = super().forward(x)
        return y * y.sigmoid()


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x) - 1


class InFloat(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.float()).type_as(x)


class Buffers(nn.Module):
    """What DETR's FrozenBatchNorm2d and its relatives have in common."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))


class Detr(Buffers):
    def forward(self, x):
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        mean, var = self.running_mean.reshape(1, -1, 1, 1), self.running_var.reshape(1, -1, 1, 1)
        scale = w * (var + self.eps).rsqrt()
        return x * scale + (b - mean * scale)


class Detectron2(Buffers):
    def forward(self, x):
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)
            return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + bias.to(x.dtype)
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *statistics, training=False, eps=self.eps)


class Centred(Buffers):
    def forward(self, x):
        scale = self.weight / torch.sqrt(self.running_var + self.eps)
        centred = x - self.running_mean[None, :, None, None]
        return torch.addcmul(self.bias.view(-1, 1, 1), centred, scale.view(-1, 1, 1))


class FrozenAct(Detr):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(super().forward(x))


class InPlaceABN(Buffers):
    def forward(self, x):
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        return F.leaky_relu(F.batch_norm(x, *statistics, self.training, 0.1, self.eps), 0.01)


KINDS = [
    *(NormAct, Inherited, InheritedSync, Swish, Doubled, InFloat),
    *(Detr, Detectron2, Centred, FrozenAct, InPlaceABN),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_with_more_in_its_forward_is_folded_and_the_rest_is_kept(kind):
    model, x = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), kind(4))), image(3)
    fused, report = fuse_conv_bn(model, x)
    assert (report.folded, report.found, dict(report.left)) == (1, 1, {})
    assert calls_of_batch_norm(fused, x)[0] == 0
    assert not any("running_var" in name for name in fused.state_dict())
    with torch.no_grad():
        assert relative(model.eval()(x), fused(x)) < 1e-6
    if kind is NormAct:
        assert {"1.act.weight"} == {name for name in fused.state_dict() if name[0] == "1"}
        assert fused[1].num_features == 4
    copy.deepcopy(fused)


class Adds(nn.BatchNorm2d):
    def forward(self, x):
        return x + super().forward(x)


class Casts(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.half().float())


class OfTheBatch(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


class Halves(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) if x.shape[0] > 1 else x


class ByWeights(nn.Conv2d):
    """Standardizes its weights, by F.batch_norm: that is no BatchNorm."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([conv(3), Adds(3)], "Adds has a forward of its own, which uses its input more than once"),
        ([conv(3), Casts(3)], "which casts its input to another type"),
        ([conv(3), OfTheBatch(3)], "which uses the batch's statistics"),
        ([conv(3), Halves(3)], "which its arguments or inputs change"),
        ([NormAct(3), conv(3)], "its input comes from the input, and NormAct does more"),
        ([ByWeights(3, 4, 3), norm()], "ByWeights has a forward of its own"),
        ([conv(3), nn.ReLU(), NormAct(3)], "its input comes from ReLU"),
    ],
)
def test_what_a_norm_does_with_its_input_is_named_and_counted_once(layers, why):
    model, x = with_statistics(nn.Sequential(*copy.deepcopy(layers))), image(3)
    _, report = fuse_conv_bn(model, x)
    assert (report.folded, report.found) == (0, 1)
    assert why in next(iter(report.left.values()))


def test_an_affine_layer_that_divides_by_no_variance_is_no_batchnorm():
    class LayerScale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.rand(4, 1, 1))
            self.beta = nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x):
            return x * self.gamma + self.beta

    assert fuse_conv_bn(nn.Sequential(conv(), LayerScale()), image(4))[1].found == 0


# ---- what stands between, and what is only looked at ----


class KeptOn(nn.Dropout):
    def train(self, mode=True):
        return super().train(True)


class BlockKeptOn(torchvision.ops.DropBlock2d):
    def train(self, mode=True):
        return super().train(True)


class Triples(nn.Identity):
    def forward(self, x):
        return 3 * x


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5)


def dropped(run):
    return Graph(run, c=conv(), b=norm())


BETWEEN = {
    "Dropout": (nn.Sequential(conv(), nn.Dropout(), norm()), 1),
    "Dropout2d, twice": (nn.Sequential(conv(), nn.Dropout2d(), nn.AlphaDropout(), norm()), 1),
    "StochasticDepth": (
        nn.Sequential(conv(), torchvision.ops.StochasticDepth(0.1, "row"), norm()),
        1,
    ),
    "DropBlock": (nn.Sequential(conv(), torchvision.ops.DropBlock2d(0.1, 3), norm()), 1),
    "DropPath": (nn.Sequential(conv(), DropPath(), norm()), 1),
    "F.dropout": (dropped(lambda s, x: s.b(F.dropout(s.c(x), 0.5, s.training))), 1),
    "F.dropout that is on": (dropped(lambda s, x: s.b(F.dropout(s.c(x)))), 0),
    "a DropBlock that stays on": (nn.Sequential(conv(), BlockKeptOn(0.5, 3), norm()), 0),
    "an Identity that is none": (nn.Sequential(conv(), Triples(), norm()), 0),
    "a Dropout that stays on": (nn.Sequential(conv(), KeptOn(), norm()), 0),
    "before a layer": (nn.Sequential(norm(), nn.Dropout(), nn.Conv2d(4, 4, 1)), 1),
    "shape": (dropped(lambda s, x: (s.b(y := s.c(x)), y.shape[-2:])[0]), 1),
    "shape, used": (dropped(lambda s, x: s.b(y := s.c(x)).reshape(y.size(0), y.shape[1], -1)), 1),
    "dtype": (dropped(lambda s, x: s.b(y := s.c(x)) + torch.zeros_like(y).to(y.dtype)), 1),
    "mean": (dropped(lambda s, x: s.b(y := s.c(x)) + y.mean()), 0),
    "attributes": (dropped(lambda s, x: s.b(s.c(x)).reshape(-1, s.b.num_features) * s.b.eps), 1),
    "type of the layer's weights": (dropped(lambda s, x: s.b(s.c(x.to(s.c.weight.dtype)))), 1),
    "type of the norm's": (dropped(lambda s, x: s.b(s.c(x.to(s.b.weight.dtype)))), 0),
    "statistics": (dropped(lambda s, x: s.b(s.c(x)) * s.b.running_var.mean()), 0),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_passes_values_on_or_reads_no_values_forbids_nothing(name):
    model, folded = BETWEEN[name]
    model, x = lived(copy.deepcopy(model)), image(4)
    fused, report = fuse_conv_bn(model, x)
    assert (report.folded, report.found) == (folded, 1), report
    assert folded or next(iter(report.left.values()))
    with torch.no_grad():
        torch.manual_seed(1)
        wanted = model.eval()(x)
        torch.manual_seed(1)
        assert relative(wanted, fused(x)) < 1e-5


def test_a_norm_whose_tensors_train_or_eval_reads_stays():
    class Freezes(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].weight.requires_grad_(False)
            return self

    fused, report = fuse_conv_bn(lived(Freezes(conv(), norm())), image(4))
    assert report.left == {"1": "train() or eval() of the model reads its weight"}
    fused.eval()


@pytest.mark.parametrize("key", ["weight", "running_mean"])
def test_a_nan_is_named_and_is_no_overflow(key):
    model = nn.Sequential(conv(), norm())
    getattr(model[1], key).data[0] = float("nan")
    assert fuse_conv_bn(model, image(4))[1].left == {"1": f"its {key} holds NaN or infinity"}


# ---- graphs of torch.export ----


class Exportable(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(4, 4, 3, padding=1, bias=False), norm()
        self.t, self.tn = nn.ConvTranspose2d(4, 6, 3, groups=2), norm(6)
        self.fc, self.fn, self.drop = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout()

    def forward(self, x):
        y = self.n(self.drop(self.c(x)))
        z = self.tn(self.t(F.relu(y) + x))
        return self.fn(self.fc(z.mean((2, 3)))), y.reshape(y.shape[0], -1)


class Both(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run, self.c, self.a, self.b = run, conv(), norm(), norm()

    def forward(self, x):
        return self.run(self, x)


def exported(model, decomposed):
    sizes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(model.eval(), (image(4),), dynamic_shapes=sizes)
    return (program.run_decompositions({}) if decomposed else program).module()


@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_graphs_are_folded(decomposed):
    model, x = lived(Exportable()), torch.randn(5, 4, 9, 9)
    graph = exported(model, decomposed)
    names = {name for name, _ in graph.named_parameters()}
    fused, report = fuse_conv_bn(graph, image(4))
    assert (report.folded, report.found) == (3, 3), report
    assert report.algebra_error < 1e-12
    assert not any("batch_norm" in str(node.target) for node in fused.graph.nodes)
    assert {name for name, _ in graph.named_parameters()} == names
    assert {"c.bias", "t.bias", "fc.bias"} < {name for name, _ in fused.named_parameters()}
    with torch.no_grad():
        for wanted, found in zip(model(x), fused(x), strict=True):
            assert relative(wanted, found) < 1e-5


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda s, x: s.a(s.c(x)) + s.b(s.c(x)), "c.weight is used elsewhere, too"),
        (lambda s, x: s.a(y := s.c(x)) + y, "is used elsewhere, too"),
        (lambda s, x: s.a(F.relu(s.c(x))), "its input comes from relu"),
        (lambda s, x: s.c(s.a(x)), "its input comes from the input"),
    ],
)
def test_what_stays_in_an_exported_graph_has_its_reason(run, why, decomposed):
    _, report = fuse_conv_bn(exported(lived(Both(run)), decomposed), image(4))
    assert (report.folded, {why in one for one in report.left.values()}) == (0, {True}), report


# ---- timm ----

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)

# a small network of each of timm's families that hold BatchNorm
FEW = ["test_efficientnet", "test_resnet", "starnet_s050"]
MORE = [
    "test_byobnet",
    *("halonet_h1", "convmixer_768_32", "cpubone_nano", "cs3darknet_focus_s", "cspnext_tiny"),
    *("densenet121", "dla46x_c", "dpn48b", "efficientformer_l1", "efficientformerv2_s0"),
    *("efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "fasternet_t0", "fastvit_t8"),
    *("ghostnet_050", "hardcorenas_b", "hgnetv2_b0", "hrnet_w18_small", "iformer_t"),
    *("inception_next_atto", "inception_resnet_v2", "inception_v3", "inception_v4"),
    *("lcnetv2_small", "levit_128s", "lowformer_b0", "test_coatnet", "mobilenetv3_small_050"),
    *("mobilevit_xxs", "nasnetalarge", "nextvit_small", "pnasnet5large", "regnetx_002"),
    *("repghostnet_050", "repvit_m1", "res2next50", "resnest14d", "resnetv2_18", "rexnet_100"),
    *("selecsls42", "legacy_seresnet18", "shvit_s1", "skresnet18", "swiftformer_xs"),
    *("tiny_vit_5m_224", "tresnet_m", "vgg11_bn", "visformer_tiny"),
    *("vit_small_resnet50d_s16_224", "volo_d1_224", "ese_vovnet19b_slim_dw", "legacy_xception"),
    *("xception41p", "xcit_nano_12_p8_224"),
]


def timms(name):
    """Return a network of timm's and the smallest image that it takes."""
    import timm

    model = with_statistics(timm.create_model(name, pretrained=False)).eval()
    channels, *_, side = model.default_cfg["input_size"]
    for size in (64, 96, 128, side):
        x = torch.rand(1, channels, size, size)
        try:
            with torch.no_grad():
                model(x)
        except Exception:  # of every kind: it is too small
            continue
        return model, x
    raise AssertionError(f"{name} does not run")


def check_family(name):
    from timm.utils.model import reparameterize_model

    model, x = timms(name)
    fused, report = fuse_conv_bn(model, x)
    before, _ = calls_of_batch_norm(model, x)
    after, behind = calls_of_batch_norm(fused, x)
    assert (report.found, after) == (before, before - report.folded)  # each is counted once
    reasons = ["used elsewhere, too"]
    if name.endswith("large"):  # NASNet pads by sizes next to its layers, and in some of them
        reasons += ["calls it, and cannot be traced", "Conv2dSame has a forward of its own"]
    named = [why for why in report.left.values() if any(reason in why for reason in reasons)]
    assert behind <= len(named)
    assert not any("past its parent" in why for why in report.left.values())
    assert not report.folded or report.algebra_error < 1e-6
    assert after <= calls_of_batch_norm(reparameterize_model(model), x)[0]
    try:
        theirs = torch_fuse(copy.deepcopy(model))
    except Exception:  # it cannot be traced
        return
    assert after <= calls_of_batch_norm(theirs, x)[0]


@needs_timm
@pytest.mark.parametrize("name", FEW)
def test_timms_networks_keep_no_norm_that_stands_behind_a_layer(name):
    check_family(name)


@needs_timm
@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_nor_does_one_of_any_other_family(name):
    check_family(name)
