"""Bytes and multiply-adds of operators, against what real tensors show."""

import copy
from collections import defaultdict

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dlhelpers.roofline import Roofline
from dlhelpers.shufflenet import audit, layer_costs

TAKES = ("embedding", "gather", "index", "index_select")


def places(tensor):
    """Where in memory its elements begin."""
    begin, size = tensor.data_ptr(), tensor.element_size()
    if torch.ops.aten.is_non_overlapping_and_dense(tensor):  # the quick way, for large ones
        return begin + size * np.arange(tensor.numel())
    where = np.array([begin] if tensor.numel() else [])
    for length, step in zip(tensor.shape, tensor.stride(), strict=True):
        where = np.unique(where[..., None] + step * size * np.arange(length))
    return where


def bytes_of(tensors):
    """Of all of them together, the same place in memory once."""
    views = {(t.data_ptr(), tuple(t.shape), t.stride()): t for t in tensors}
    storages = defaultdict(list)
    for t in views.values():
        storages[t.untyped_storage().data_ptr(), t.element_size()].append(t)
    return sum(
        size * np.unique(np.concatenate([*map(places, parts)])).size
        for (_, size), parts in storages.items()
    )


class Watch(TorchDispatchMode):
    """Which bytes does each operator read and write? By running it on memory full of NaN."""

    def __init__(self):
        super().__init__()
        self.moved = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        before = [t.clone() for t in given]
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        changed = [t for t, old in zip(given, before, strict=True) if not same(t, old)]
        homes = {t.untyped_storage().data_ptr() for t in given}
        fresh = [t for t in made if t.untyped_storage().data_ptr() not in homes]
        name = func._schema.name.removeprefix("aten::")
        if not (changed or fresh) or name.startswith(("empty", "new_empty")):
            return out
        read = [t for t in given if not any(t is c for c in changed)]
        read += [old for t, old in zip(given, before, strict=True)
                 if any(t is c for c in changed) and is_read(func, args, kwargs, t)]  # fmt: skip
        sources, results = bytes_of(read), bytes_of([*changed, *fresh])
        if name in TAKES:  # what is taken, and the places
            sources = min(bytes_of(read[:1]), bytes_of(fresh)) + bytes_of(read[1:])
        self.moved.append((name, sources + results))
        return out


def same(a, b):
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def is_read(func, args, kwargs, target):
    """Whether NaN in the tensor that is changed is there afterwards."""
    poisoned = torch.full_like(target, torch.nan)
    swap = lambda t: poisoned if t is target else t  # noqa: E731
    func(*tree_map(swap, args), **tree_map(swap, kwargs))
    return bool(torch.isnan(poisoned).any())


class Block(nn.Module):
    """A layer of a language model as people write it: rotated queries, a cache, a gated MLP."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads, self.words = heads, nn.Embedding(50, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out, self.gate = nn.Linear(width, width), nn.Linear(width, 4 * width, bias=False)
        self.down, self.scale = nn.Linear(2 * width, width), nn.Parameter(torch.ones(width))

    def forward(self, ids):
        x = self.words(ids)
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        q, k, v = self.qkv(normed).chunk(3, -1)
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = split(q), split(k), split(v)
        half = q.shape[-1] // 2
        q = torch.cat((-q[..., half:], q[..., :half]), -1)
        mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu_(1)
        weights = (q @ k.transpose(-1, -2) / 4 + mask).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        cache = torch.empty_like(x).copy_(x)
        cache.add_(1.0).relu_()
        return self.down(F.glu(self.gate(cache))) @ self.words.weight.T


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(8, 16), nn.Linear(16, 3, bias=False)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


IDS, IMAGE = torch.randint(0, 50, (2, 12)), torch.rand(2, 3, 64, 64)
SMALL = {
    "language model": (Block, IDS),
    "recurrent": (Recurrent, torch.rand(5, 4, 8)),
    "turned sequence": (
        lambda: nn.Sequential(Call(lambda x: x.transpose(0, 1)), nn.Linear(8, 3, bias=False)),
        torch.rand(5, 4, 8),
    ),
    "shufflenet": (torchvision.models.shufflenet_v2_x0_5, IMAGE),
    "neighbours": (lambda: Call(lambda x: (x[..., 1:] - x[..., :-1]).abs()), IMAGE),
    "windows": (lambda: Call(lambda x: x.unfold(-1, 5, 1).mean(-1) @ torch.rand(60, 2)), IMAGE),
    "itself turned": (lambda: Call(lambda x: torch.cat((x + x.mT, x[:, :2]), 1)), IMAGE),
    "activations": (lambda: nn.Sequential(nn.PReLU(3), nn.LogSigmoid(), nn.Hardswish()), IMAGE),
}


def agrees(model, x):
    for name, buffer in model.eval().named_buffers():
        if name.endswith("running_mean"):  # else an in-place ReLU may find nothing to change
            buffer.normal_()
    with torch.no_grad(), Watch() as watch:
        model(x)
    counted = [(layer.operator, layer.nbytes) for layer in layer_costs(model, x).layers]
    assert counted == watch.moved


@pytest.mark.parametrize("name", SMALL)
def test_bytes_are_those_that_real_tensors_show(name):
    make, x = SMALL[name]
    torch.manual_seed(0)
    agrees(make(), x)


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(torchvision.models))
def test_bytes_of_torchvisions_models_are_those_that_real_tensors_show(name):
    size = {"inception_v3": 96}.get(name, 64)
    if name.startswith(("vit", "swin", "maxvit")):
        size = 224 if name != "vit_h_14" else 518
    agrees(torchvision.models.get_model(name, weights=None), torch.rand(1, 3, size, size))


def test_a_product_without_a_bias_moves_its_three_matrices():
    costs = layer_costs(nn.Linear(256, 256, bias=False), torch.rand(8, 64, 256))
    assert costs.nbytes == 4 * (2 * 8 * 64 * 256 + 256 * 256)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
def test_recurrent_layers_have_their_products(kind, options):
    layer = kind(64, 128, **options)
    weights = sum(p.numel() for n, p in layer.named_parameters() if n.startswith("weight"))
    costs = layer_costs(layer, torch.rand(20, 8, 64))
    assert costs.multiply_adds == 20 * 8 * weights
    assert not {"mkldnn_rnn_layer"} & set(costs.without_formula)


MATRIX, VECTOR = torch.rand(5, 7), torch.rand(7)


@pytest.mark.parametrize(
    ("function", "inputs", "multiply_adds"),
    [
        (torch.mv, (MATRIX, VECTOR), 35),
        (torch.dot, (VECTOR, VECTOR), 7),
        (torch.vdot, (VECTOR, VECTOR), 7),
        (torch.addmv, (torch.rand(5), MATRIX, VECTOR), 35),
        (torch.addbmm, (torch.rand(5, 5), MATRIX[None], MATRIX.T[None]), 175),
    ],
)
def test_products_with_vectors_count(function, inputs, multiply_adds):
    assert layer_costs(Call(function), inputs).multiply_adds == multiply_adds


@pytest.mark.parametrize("act", [nn.PReLU(8), nn.GLU(1), nn.LogSigmoid(), nn.RReLU()], ids=str)
def test_activations_are_element_wise(act):
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), act).eval()
    found = audit(model, torch.rand(1, 8, 32, 32))
    assert [finding.name for finding in found] == ["element-wise (G4)"]
    assert not layer_costs(model, torch.rand(1, 8, 32, 32), policy="all").without_formula


ROWS, PUT, AT = torch.rand(7, 4), torch.rand(2, 4), torch.tensor([1, 5])
SPOTS, FEW = torch.tensor([[0, 2, 1, 3], [4, 1, 0, 6]]), torch.rand(3, 4)
CLASSES = torch.tensor([1, 0, 3, 2, 1, 1, 0])
# each changes, or takes from, its first input; the function, the other inputs
PARTS = {
    "index_copy_": (lambda x, v: x.index_copy_(0, AT, v), PUT),
    "index_add_": (lambda x, v: x.index_add_(0, AT, v), PUT),
    "index_fill_": (lambda x: x.index_fill_(0, AT, 9.0),),
    "index_put_": (lambda x, v: x.index_put_((AT,), v), PUT),
    "index_put_ of a number": (lambda x, v: x.index_put_((AT,), v), torch.rand(())),
    "index_put_ of a column": (
        lambda x, v: torch.ops.aten.index_put_(x, [None, AT[:1]], v),
        torch.rand(7, 1),
    ),
    "index_put_, accumulate": (lambda x, v: x.index_put_((AT,), v, accumulate=True), PUT),
    "scatter_": (lambda x, v: x.scatter_(0, SPOTS, v), FEW),
    "scatter_ of a number": (lambda x: x.scatter_(0, SPOTS, 9.0),),
    "scatter_add_": (lambda x, v: x.scatter_add_(0, SPOTS, v), FEW),
    "scatter_reduce_": (lambda x, v: x.scatter_reduce_(0, SPOTS, v, "sum"), FEW),
    "put_": (lambda x, v: x.put_(AT, v), torch.rand(2)),
    "a cache's slice": (lambda x, v: x[3:5].copy_(v), PUT),
    "addmm, beta=0": (lambda x, a, b: torch.addmm(x, a, b, beta=0), torch.rand(7, 3), FEW),
    "addmm_, beta=0": (lambda x, a, b: x.addmm_(a, b, beta=0), torch.rand(7, 3), FEW),
    "take": (lambda x: x.take(AT),),
    "embedding": (lambda x: F.embedding(AT, x),),
    "embedding_bag": (lambda x: F.embedding_bag(AT[None], x, mode="sum"),),
    "nll_loss": (lambda x: F.nll_loss(x, CLASSES, reduction="sum"),),
    "nll_loss2d": (lambda x: F.nll_loss(x.T[None, ..., None], CLASSES[None, :, None]),),
}


def touched(function, inputs):
    """Count the elements read and written: a NaN in one that is read, or in all sources, shows."""

    def nans(*poisoned):
        given = [t.clone() for t in inputs]
        for which, place in poisoned:
            given[which].view(-1)[place] = torch.nan
        out = function(*given)
        return given[0].isnan().flatten(), out.isnan().flatten(), given[0].flatten(), out

    kept, _, changed, out = nans()
    is_new = out.untyped_storage().data_ptr() != changed.untyped_storage().data_ptr()
    sources = [(i, slice(None)) for i in range(1, len(inputs))]
    written = (changed != inputs[0].flatten()) | (nans(*sources)[0] if sources else kept)
    read = 0
    for i, tensor in enumerate(inputs):
        for place in range(tensor.numel()):
            in_first, in_out, *_ = nans((i, place))
            if i == 0 and not is_new:  # what stays in its place is not read
                read += bool(in_first[place] and written[place])
            else:
                read += bool((in_out if is_new else in_first).any())
    return read + int(out.numel() if is_new else written.sum())


@pytest.mark.parametrize("name", PARTS)
def test_of_a_table_what_is_taken_or_put_counts(name):
    function, *others = PARTS[name]
    layer = layer_costs(Call(function), (ROWS, *others)).layers[-1]
    _, args, kwargs = layer.call
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    besides = sum(t.numel() for t in given if not t.is_floating_point())  # all indices
    besides += {"embedding_bag": 2, "nll_loss": 1, "nll_loss2d": 1}.get(name, 0)  # second outputs
    assert layer.elements - besides == touched(function, [ROWS, *others])


LOGITS = torch.randn(6, 11)


@pytest.mark.parametrize(
    ("function", "inputs", "flops"),
    [
        (lambda x: F.nll_loss(x, torch.arange(6)), (LOGITS,), 2 * 6),
        (F.mse_loss, (LOGITS, LOGITS + 1), 3 * 66),
        (lambda x: x.topk(2), (LOGITS,), 66),
        (lambda x, v: x.index_add_(0, AT, v), (ROWS, PUT), 8),
        (lambda x, v: x.scatter_add_(0, SPOTS, v), (ROWS, FEW), 8),
        (lambda x: F.embedding_bag(AT[None], x), (ROWS,), 8),
        (lambda x: F.max_pool3d(x, 2), (torch.rand(1, 1, 4, 4, 4),), 8 * 8),
        (
            lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
            (IMAGE[..., :2, :2],),
            7 * 96,
        ),
        (torch.fft.fft, (torch.rand(8, dtype=torch.complex64),), 5 * 8 * 3),
        (torch.fft.rfft, (torch.rand(2, 8),), 5 * 8 * 3),
        (torch.fft.irfft, (torch.rand(2, 5, dtype=torch.complex64),), 5 * 8 * 3),
    ],
)
def test_the_operators_of_language_models_and_losses_have_a_formula(function, inputs, flops):
    costs = layer_costs(Call(function), inputs, policy="all")
    assert not costs.without_formula
    assert costs.layers[-1].flops == flops


@pytest.mark.parametrize("name", ["addmm_", "baddbmm_", "addmv_", "addbmm_"])
def test_products_in_place_count_as_those_that_are_not(name):
    a, b = torch.rand(3, 4, 5), torch.rand(3, 5, 6)
    inputs = {
        "addmm_": (torch.rand(4, 6), a[0], b[0]),
        "addmv_": (torch.rand(4), a[0], b[0, :, 0]),
        "baddbmm_": (torch.rand(3, 4, 6), a, b),
        "addbmm_": (torch.rand(4, 6), a, b),
    }[name]
    in_place = layer_costs(Call(lambda x, *more: getattr(x, name)(*more)), inputs)
    plain = layer_costs(Call(getattr(torch, name[:-1])), inputs)
    assert in_place.multiply_adds == plain.multiply_adds > 0


def test_a_bilinear_layer_has_its_products():
    costs = layer_costs(nn.Bilinear(4, 5, 6), (torch.rand(3, 4), torch.rand(3, 5)))
    assert costs.multiply_adds == 3 * 4 * 5 * 6


LARGE = Roofline(1e9, {"fp32": 100.0, "bf16": 400.0, "fp64": 25.0, "int8": None}, 1)


@pytest.mark.parametrize(
    ("dtype", "gflops"), [(torch.float32, 100.0), (torch.bfloat16, 400.0), (torch.float64, 25.0)]
)
@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Conv2d(64, 64, 1), nn.ReLU()], ids=str)
def test_a_type_is_priced_by_its_own_peak(layer, dtype, gflops):
    x = torch.rand(8, 64, 64, 64, dtype=dtype)
    costs = layer_costs(copy.deepcopy(layer).to(dtype), x, policy="all", peaks=LARGE)
    assert costs.predicted_s == pytest.approx(costs.flops / gflops / 1e9)
    assert {one.bound for one in costs.layers} == {"arithmetic"}


def test_a_type_without_a_peak_has_no_time_and_the_report_says_so():
    model = nn.Sequential(nn.Conv2d(8, 96, 1), nn.ReLU()).half()
    x = torch.rand(1, 8, 32, 32, dtype=torch.float16)
    costs = layer_costs(model, x, peaks=LARGE)
    assert costs.predicted_s is None
    assert {(one.predicted_s, one.bound) for one in costs.layers} == {(None, "no peak for float16")}
    for text in (str(costs), costs._repr_html_()):
        assert "NO TIME IS PREDICTED: no peak for float16" in text
        assert "ms" not in text
    found = audit(model, x, peaks=LARGE)
    assert [str(one) for one in found] == [str(one) for one in audit(model, x)]
    assert found.note == "ranked by bytes: no peak for float16 among peaks.gflops"


def test_copies_and_indices_need_no_peak():
    def moves(x, i):
        return torch.cat((x.half()[i + 1], x.half()[i * 2]))

    costs = layer_costs(Call(moves), (ROWS, AT - 1), peaks=LARGE)
    assert {one.operator for one in costs.layers} == {"_to_copy", "add", "mul", "index", "cat"}
    assert costs.predicted_s == pytest.approx(costs.nbytes / LARGE.bandwidth_gb_s / 1e9)
