"""Bytes and multiply-adds of operators, against what real tensors show."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dlhelpers.shufflenet import audit, layer_costs

TAKES = ("embedding", "gather", "index", "index_select")


def places(tensor):
    """How many places in memory its elements have."""
    if torch.ops.aten.is_non_overlapping_and_dense(tensor):  # the quick way, for large ones
        return tensor.numel()
    where = np.zeros((), dtype=np.int64)
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        where = np.unique(where[..., None] + step * tensor.element_size() * np.arange(size))
    return where.size


def bytes_of(tensors):
    views = {(t.data_ptr(), tuple(t.shape), t.stride()): t for t in tensors}
    return sum(places(t) * t.element_size() for t in views.values())


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


IDS, IMAGE = torch.randint(0, 50, (2, 12)), torch.rand(2, 3, 64, 64)
SMALL = {
    "language model": (Block, IDS),
    "recurrent": (Recurrent, torch.rand(5, 4, 8)),
    "shufflenet": (torchvision.models.shufflenet_v2_x0_5, IMAGE),
    "activations": (lambda: nn.Sequential(nn.PReLU(3), nn.LogSigmoid(), nn.Hardswish()), IMAGE),
}


def agrees(model, x):
    model.eval()
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


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


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
