"""A checkpointed step equals the plain one to the last bit, and keeps only its segments' inputs."""

import copy
import gc
import importlib
import io
import itertools
import math
import os
import pickle
import random
import sys
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
import torchvision.models as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, spectral_norm
from torch.utils.checkpoint import checkpoint_sequential
from torchvision.models.convnext import CNBlockConfig
from torchvision.ops import Conv2dNormActivation

from dlhelpers.memory import checkpointing
from dlhelpers.memory.checkpointing import checkpoint_blocks, checkpoint_plan
from dlhelpers.memory.estimating import estimate

pytestmark = pytest.mark.usefixtures("little_to_collect")


def trained(model, x, steps=2, lr=0.01):
    """Outputs, losses' gradients, buffers, parameters and random state of some SGD steps."""
    seen = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(steps):
        torch.manual_seed(step)
        inputs = x.clone().requires_grad_(x.is_floating_point())
        output = model(inputs)
        output.float().square().mean().backward()
        seen[f"output {step}"], seen[f"input's {step}"] = output.detach(), inputs.grad
        seen |= {f"grad {n} {step}": p.grad.clone() for n, p in grads(model)}
        seen |= {f"buffer {n} {step}": b.clone() for n, b in model.named_buffers()}
        seen[f"random state {step}"] = torch.get_rng_state()
        optimizer.step()
        optimizer.zero_grad()
    return seen | {f"parameter {n}": p.detach().clone() for n, p in model.named_parameters()}


def grads(model):
    return ((n, p) for n, p in model.named_parameters() if p.grad is not None)


def differing(model, x, segments, **options):
    """Names of what a checkpointed copy and a plain one end with unequal."""
    plain, own = copy.deepcopy(model), copy.deepcopy(model)
    checkpointed = checkpoint_blocks(own, segments)
    assert checkpoint_plan(checkpointed)
    wanted, got = trained(plain, x, **options), trained(checkpointed, x, **options)
    assert wanted.keys() == got.keys()
    return [n for n, w in wanted.items() if w is not None and not torch.equal(w, got[n])]


def kept_bytes(model, *args):
    """Bytes that autograd keeps of a forward, parameters and buffers apart, storages once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*args)
    return sum(kept.values()), output


def mlp(depth=6, width=8):
    layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
    return nn.Sequential(*layers)


def cnn(**options):
    def block(channels):
        return (
            nn.Conv2d(channels, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6, **options),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.3),
        )

    return nn.Sequential(*block(3), *block(6), *block(6), nn.Flatten(), nn.Linear(6 * 64, 4))


class Attention(nn.Module):
    """A causal block called with a keyword, whose mask is a buffer."""

    def __init__(self, width=16, length=12):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.register_buffer("mask", torch.ones(length, length).triu(1).bool())

    def forward(self, x, *, scale=None):
        y = self.norm(x)
        y, _ = self.attention(y, y, y, attn_mask=self.mask, need_weights=False)
        return x + self.mlp(y) * scale


class Gpt(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.wte = nn.Embedding(20, 16)
        self.h = nn.ModuleList(Attention() for _ in range(depth))
        self.scale = nn.Parameter(torch.ones(16))
        self.lm_head = nn.Linear(16, 20, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens)
        for block in self.h:
            x = block(x, scale=self.scale)
        return self.lm_head(x)


class Mixed(Gpt):
    """Two Sequential parts around the blocks of the list."""

    def __init__(self):
        super().__init__()
        self.before = nn.Sequential(nn.Linear(16, 16), nn.ReLU(True), nn.Dropout(0.2))
        self.after = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))

    def forward(self, tokens):
        x = self.before(self.wte(tokens))
        for block in self.h:
            x = block(x, scale=self.scale)
        return self.lm_head(self.after(x))


def small_vit():
    return tv.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64,
        num_classes=10, dropout=0.1, attention_dropout=0.1,
    )  # fmt: skip


def small_convnext():
    stages = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, 32, 3), CNBlockConfig(32, None, 1)]
    return tv.ConvNeXt(stages, stochastic_depth_prob=0.5, num_classes=10)


def small_swin():
    return tv.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.5, dropout=0.1, num_classes=10
    )


def small_densenet():
    return tv.DenseNet(8, (2, 3, 2), 16, drop_rate=0.2, num_classes=10)


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 3)


def images(size=32):
    return torch.randn(4, 3, size, size)


def tokens():
    return torch.randint(20, (2, 12))


@pytest.fixture(autouse=True)
def _seeded_on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("build", "inputs", "segments"),
    [
        (lambda: mlp(), lambda: torch.randn(3, 8), 4),
        (lambda: cnn(), lambda: images(8), 3),
        (lambda: cnn(momentum=0.0), lambda: images(8), 3),
        (lambda: cnn(momentum=None), lambda: images(8), 3),
        (lambda: cnn(affine=False), lambda: images(8), 3),
        (lambda: cnn(track_running_stats=False), lambda: images(8), 3),
        (lambda: tv.resnet18(num_classes=10), images, 5),
        (lambda: tv.mobilenet_v3_small(num_classes=10), images, 9),
        (lambda: tv.efficientnet_b0(num_classes=10), images, 6),
        (small_densenet, images, 7),
        (small_convnext, images, 5),
        (small_vit, images, 3),
        (small_swin, images, 4),
        (encoder, lambda: torch.randn(2, 12, 16), 0),
        (Gpt, tokens, 0),
        (Mixed, tokens, 4),
    ],
)
def test_two_steps_equal_those_of_the_plain_model_to_the_last_bit(build, inputs, segments):
    assert differing(build(), inputs(), segments) == []


@pytest.mark.parametrize("make", [cnn, small_convnext])
def test_every_number_of_segments_gives_the_same_step(make):
    model, x = make(), images(8 if make is cnn else 32)
    found = 0
    for segments in range(1, 99):
        try:
            assert differing(model, x, segments, steps=1) == []
        except ValueError:
            break
        found += 1
        plan = checkpoint_plan(checkpoint_blocks(model, segments))
        assert sum(len(cut) for _, cut in plan) == segments
    # cnn: 14 blocks less 3 in-place ReLUs; convnext: stem 2, blocks 6, downsampling 2 x 2, head 3
    assert found == (11 if make is cnn else 15)


chains = st.lists(st.lists(st.sampled_from("wiv"), max_size=9), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(chains=chains, data=st.data())
def test_segments_are_whole_in_order_even_and_never_begin_in_place(chains, data):
    make = {"w": lambda: nn.Linear(1, 1), "i": lambda: nn.ReLU(True), "v": nn.Identity}
    model = nn.ModuleDict(
        {str(n): nn.Sequential(*(make[c]() for c in c_)) for n, c_ in enumerate(chains)}
    )

    def may_start(letters):
        return letters.replace("v", "")[:1] != "i"

    startable = {
        str(n): [i for i in range(len(chain)) if may_start("".join(chain[i:]))]
        for n, chain in enumerate(chains)
    }
    startable = {name: starts for name, starts in startable.items() if starts}
    most = sum(map(len, startable.values()))
    if not most:
        with pytest.raises(ValueError, match="nothing to cut"):
            checkpoint_blocks(model, 1)
        return
    segments = data.draw(st.integers(1, most))
    plan = dict(checkpoint_plan(checkpoint_blocks(model, segments)))
    assert sum(map(len, plan.values())) == segments
    if segments >= len(startable):
        assert plan.keys() == startable.keys()
    else:
        chosen = min(len(chains[int(name)]) for name in plan)
        assert all(len(chains[int(n)]) <= chosen for n in startable.keys() - plan.keys())
    for name, cut in plan.items():
        chain, first = chains[int(name)], startable[name][0]
        assert [int(b) for segment in cut for b in segment] == list(range(first, len(chain)))
        begun = [startable[name].index(int(segment[0])) for segment in cut]  # and so not in place
        lengths = [b - a for a, b in zip(begun, [*begun[1:], len(startable[name])], strict=True)]
        assert max(lengths) - min(lengths) <= 1


def test_segments_are_shared_out_by_the_number_of_blocks():
    lengths = {"a": 12, "b": 6, "c": 2}
    model = nn.ModuleDict({name: mlp(n // 2) for name, n in lengths.items()})
    for segments, wanted in (
        (10, (6, 3, 1)),
        (3, (1, 1, 1)),
        (2, (1, 1)),
        (1, (1,)),
        (4, (2, 1, 1)),
    ):
        plan = checkpoint_plan(checkpoint_blocks(model, segments))
        assert tuple(len(cut) for _, cut in plan) == wanted
        assert tuple(name for name, _ in plan) == tuple("abc"[: len(wanted)])


def test_resnet_has_its_four_layers_and_nested_chains_count_as_one():
    plan = checkpoint_plan(checkpoint_blocks(tv.resnet18(), 4))
    assert plan == tuple((f"layer{n}", (("0", "1"),)) for n in (1, 2, 3, 4))
    ((name, cut), *_) = checkpoint_plan(checkpoint_blocks(small_convnext(), 15))
    assert name == "features"
    assert [block for (block,) in cut][:4] == ["0.0", "0.1", "1.0", "1.1"]


def test_one_segment_keeps_its_input_only_and_so_does_the_last_of_several():
    model, x = mlp(depth=6), torch.randn(1000, 8)
    one = x.nbytes
    plain, _ = kept_bytes(model, x)
    assert plain == 7 * one  # the input, and six Tanh outputs, each the next block's input
    for segments in (1, 2, 3, 6, 12):
        kept, output = kept_bytes(checkpoint_blocks(model, segments), x)
        assert kept == segments * one
        output.sum().backward()


def test_list_elements_keep_their_inputs_only():
    model, x = encoder(), torch.randn(2, 12, 16)
    kept, output = kept_bytes(checkpoint_blocks(model, 0), x)
    assert kept == 3 * x.nbytes
    output.sum().backward()


def test_the_copy_shares_tensors_and_leaves_the_model_as_it_was():
    for model, segments in ((tv.resnet18(), 4), (Gpt(), 0), (Mixed(), 3)):
        for module in model.modules():
            module.own = torch.zeros(2)  # a tensor that is neither parameter nor buffer
        before = [(m, type(m), dict(vars(m))) for m in model.modules()]
        result = checkpoint_blocks(model, segments)
        for module, cls, attributes in before:
            assert type(module) is cls
            assert vars(module).keys() == attributes.keys()
            assert all(vars(module)[name] is value for name, value in attributes.items())
        pairs = zip(
            [*model.named_parameters(remove_duplicate=False), *model.named_buffers()],
            [*result.named_parameters(remove_duplicate=False), *result.named_buffers()],
            strict=True,
        )
        assert all(a == b and mine is own for (a, mine), (b, own) in pairs)
        assert list(model.state_dict()) == list(result.state_dict())
        assert str(model) == str(result)
        for one, other in zip(model.modules(), result.modules(), strict=True):
            assert one is not other
            assert isinstance(other, type(one))
            assert one.own is other.own
        assert model is not result
    assert result.lm_head.weight is result.wte.weight is model.wte.weight


def test_the_plain_model_stays_plain_beside_its_copy():
    model, x = mlp(), torch.randn(10, 8)
    plain, _ = kept_bytes(model, x)
    checkpoint_blocks(model, 1)
    assert kept_bytes(model, x)[0] == plain
    assert checkpoint_plan(model) == ()


def test_a_copy_and_a_pickle_of_the_result_are_checkpointed_too():
    for model, x in ((cnn(), images(8)), (Gpt(), tokens())):
        result = checkpoint_blocks(model, 2 if isinstance(model, nn.Sequential) else 0)
        loaded = pickle.loads(pickle.dumps(result))
        for other in (copy.deepcopy(result), loaded):
            assert checkpoint_plan(other) == checkpoint_plan(result) != ()
            assert not {*map(id, other.parameters())} & {*map(id, result.parameters())}
            assert kept_bytes(other, x)[0] == kept_bytes(result, x)[0]
        loaded.load_state_dict(model.state_dict())
        wanted, got = trained(copy.deepcopy(model), x), trained(loaded, x)
        assert all(torch.equal(w, got[name]) for name, w in wanted.items() if w is not None)
        file = io.BytesIO()
        torch.save(result.state_dict(), file)
        file.seek(0)
        model.load_state_dict(torch.load(file))


@pytest.mark.parametrize("make", [cnn, small_vit])
def test_a_result_can_be_planned_anew_and_nothing_is_wrapped_twice(make):
    model, x = make(), images(8 if make is cnn else 32)
    twice = checkpoint_blocks(checkpoint_blocks(model, 2), 4)
    assert checkpoint_plan(twice) == checkpoint_plan(checkpoint_blocks(model, 4))
    once = checkpoint_blocks(model, 4)
    assert [type(m).__mro__[1:] for m in twice.modules()] == [
        type(m).__mro__[1:] for m in once.modules()
    ]
    assert kept_bytes(twice, x)[0] == kept_bytes(once, x)[0]


def test_plain_again_where_checkpointing_saves_nothing(monkeypatch):
    monkeypatch.setattr(checkpointing, "_estimated_peak", lambda *_: 7)
    result = checkpoint_blocks(checkpoint_blocks(mlp(), 3), inputs=torch.randn(1, 8))
    assert checkpoint_plan(result) == ()
    assert {type(m) for m in result.modules()} == {nn.Sequential, nn.Linear, nn.Tanh}


@pytest.mark.parametrize("segments", [1, 3, 11])
def test_eval_mode_with_gradients_equals_plain(segments):
    model, x = cnn(), images(8)
    model(x)  # statistics that are not those of the batch
    assert differing(model.eval(), x, segments) == []


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_plain_forward(grad):
    model, x = cnn(), images(8)
    other = copy.deepcopy(model)
    result = checkpoint_blocks(model, 3)
    for mode in (True, False):
        for each in (other, result):
            each.train(mode)
        with grad():
            torch.manual_seed(1)
            wanted = other(x)
            torch.manual_seed(1)
            assert torch.equal(result(x), wanted)
    assert all(map(torch.equal, model.buffers(), other.buffers()))


def after(model, work, x):
    """Gradients and buffers after some work on a model of its own."""
    torch.manual_seed(3)
    values = work(model, x)
    return [
        *(v.detach() for v in values),
        *(p.grad for _, p in grads(model)),
        *(b.clone() for b in model.buffers()),
        torch.get_rng_state(),
    ]


def two_forwards_then_two_backwards(model, x):
    first, second = model(x), model(x.flip(0) * 2)
    first.square().sum().backward()
    second.square().sum().backward()
    return first, second


def two_forwards_then_one_backward(model, x):
    first, second = model(x), model(x.flip(0) * 2)
    (first * second).sum().backward()
    return first, second


def backward_twice(model, x):
    y = model(x).square().sum()
    y.backward(retain_graph=True)
    y.backward()
    return (y,)


def backwards_backward(model, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    return grad, x.grad


def mode_changes_before_backward(model, x):
    y = model(x)
    model.eval()
    y.square().sum().backward()
    assert not any(module.training for module in model.modules())  # as it was left
    model.train()
    return (y,)


def under_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    return (y,)


class Counts(nn.Module):
    """A running mean by hand, which the output depends on; in place or rebound."""

    def __init__(self, rebinds):
        super().__init__()
        self.rebinds = rebinds
        self.register_buffer("mean", torch.zeros(6, 1, 1))
        self.register_buffer("big", torch.ones(64))

    def forward(self, x):
        if self.training:
            new = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3)).view(6, 1, 1)
            if self.rebinds:
                self.mean = new
            else:
                self.mean.copy_(new)
        return (x - self.mean.clone()).sigmoid()


class LikesRunningStatistics(nn.BatchNorm2d):
    """Normalises with the statistics in training too, as batch renormalisation does."""

    def forward(self, x):
        output = super().forward(x)
        return output + x * self.running_var.clone().view(-1, 1, 1)


def stateful(kind):
    convs = [nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)]
    if kind == "spectral norm":
        convs = [parametrizations.spectral_norm(conv) for conv in convs]
    if kind == "spectral norm by hooks":
        convs = [spectral_norm(conv) for conv in convs]
    norms = {
        "instance norm": lambda: nn.InstanceNorm2d(6, track_running_stats=True, affine=True),
        "running mean in place": lambda: Counts(rebinds=False),
        "running mean rebound": lambda: Counts(rebinds=True),
        "subclass of BatchNorm": lambda: LikesRunningStatistics(6),
        "batch norm": lambda: nn.BatchNorm2d(6),
    }
    make = norms.get(kind, nn.Identity)
    return nn.Sequential(convs[0], make(), nn.Tanh(), nn.Dropout(0.2), convs[1], make(), nn.Tanh())


KINDS = (
    "spectral norm", "spectral norm by hooks", "instance norm", "running mean in place",
    "running mean rebound", "subclass of BatchNorm", "batch norm",
)  # fmt: skip
WORKS = (
    two_forwards_then_two_backwards, two_forwards_then_one_backward, backward_twice,
    backwards_backward, mode_changes_before_backward, under_autocast,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("work", WORKS)
def test_buffers_that_a_forward_changes_change_once_and_are_recomputed_with(work, kind):
    model, x = stateful(kind), torch.randn(3, 3, 8, 8)
    plain, own = copy.deepcopy(model), copy.deepcopy(model)
    result = checkpoint_blocks(own, 2)
    for _ in range(2):
        pairs = zip(after(plain, work, x), after(result, work, x), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


GLOBAL_TORCH = torch.Generator()
GLOBAL_NUMPY = np.random.default_rng()
GLOBAL_PYTHON = random.Random()


def drawn_by_a_helper():
    return GLOBAL_PYTHON.random()


class Augments:
    """What a block holds is no module, and holds a generator itself."""

    rng = random.Random(8)

    def __init__(self):
        self.numpy = np.random.default_rng(5)

    def draw(self):
        return self.numpy.random() + self.rng.random()


class Draws(nn.Module):
    """A block whose output is multiplied by what it draws or counts."""

    def __init__(self, draw):
        super().__init__()
        self.linear, self.draw, self.calls, self.log, self.cache = nn.Linear(8, 8), draw, 0, [], {}
        self.torch, self.numpy = torch.Generator(), np.random.default_rng(6)
        self.state, self.python = np.random.RandomState(4), random.Random(7)
        self.several, self.augments = {"a": [np.random.default_rng(3)]}, Augments()
        self.mean, self.lazy = torch.ones(8), None

    def forward(self, x):
        return torch.tanh(self.linear(x) * self.draw(self, x))


def count(block, x):
    block.calls += 1
    return 1 / block.calls


def fill(block, x):
    block.log.append(1.0)
    block.cache["calls"] = block.cache.get("calls", 0) + 2
    return float(len(block.log) + block.cache["calls"])


def rebind(block, x):
    mean, block.mean = block.mean, x.detach().mean(0)
    block.attention = x  # as a block keeps it for drawing
    return mean.clone()


def fill_once(block, x):
    if block.lazy is None:
        block.lazy = torch.rand(8)
    return block.lazy


def closing_over(generator):
    return lambda block, x: generator.random() + 0.5


SOURCES = {
    "torch": lambda block, x: torch.rand_like(x),
    "random": lambda block, x: random.gauss(1, 0.5),
    "numpy": lambda block, x: torch.from_numpy(np.random.randn(8)).float(),
    "permutation": lambda block, x: x[:, torch.from_numpy(np.random.permutation(8))],
    "layer drop": lambda block, x: x.sin() if random.random() < 0.5 else x,
    "torch.Generator": lambda block, x: torch.rand(x.shape, generator=block.torch),
    "numpy Generator": lambda block, x: block.numpy.random() + 0.5,
    "RandomState": lambda block, x: block.state.rand() + 0.5,
    "random.Random": lambda block, x: block.python.random() + 0.5,
    "in containers": lambda block, x: block.several["a"][0].random() + 0.5,
    "in an object": lambda block, x: block.augments.draw(),
    "global torch": lambda block, x: torch.rand(x.shape, generator=GLOBAL_TORCH),
    "global numpy": lambda block, x: GLOBAL_NUMPY.random() + 0.5,
    "global by a helper": lambda block, x: drawn_by_a_helper() + 0.5,
    "closure": closing_over(np.random.default_rng(11)),
    "counter": count,
    "containers": fill,
    "rebound tensors": rebind,
    "filled once": fill_once,
}


def drawing(draw):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Draws(draw), nn.Linear(8, 8), Draws(draw))


def after_two_steps(model):
    """Gradients, and what every stream gives next."""
    random.seed(0)
    np.random.seed(0)
    GLOBAL_TORCH.manual_seed(1)
    GLOBAL_PYTHON.seed(2)
    Augments.rng.seed(3)
    seeds = np.random.PCG64(4).state
    closed = SOURCES["closure"].__closure__[0].cell_contents
    for generator in (GLOBAL_NUMPY, closed):
        generator.bit_generator.state = seeds
    block = model[1]
    block.torch.manual_seed(5)
    seen = trained(model, torch.randn(4, 8, generator=torch.Generator().manual_seed(6)))
    streams = [random.random(), np.random.rand(), torch.rand(1, generator=GLOBAL_TORCH).item()]
    streams += [GLOBAL_NUMPY.random(), GLOBAL_PYTHON.random(), Augments.rng.random()]
    streams += [torch.rand(1, generator=block.torch).item(), block.numpy.random(), closed.random()]
    streams += [block.state.rand(), block.python.random(), block.several["a"][0].random()]
    return seen, [*streams, block.augments.numpy.random(), block.calls, block.log, block.cache]


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("source", SOURCES)
def test_what_a_block_draws_or_counts_is_replayed_and_left_as_after_one_forward(source, segments):
    plain, own = drawing(SOURCES[source]), drawing(SOURCES[source])
    wanted, streams = after_two_steps(plain)
    got, own_streams = after_two_steps(checkpoint_blocks(own, segments))
    assert [name for name, w in wanted.items() if not torch.equal(w, got[name])] == []
    assert own_streams == streams


@pytest.mark.parametrize("work", WORKS)
def test_streams_and_counters_stand_several_forwards_and_backwards(work):
    def draw(block, x):
        return random.random() + block.numpy.random() + count(block, x)

    found = []
    for wrap in (lambda model: model, lambda model: checkpoint_blocks(model, 2)):
        model = wrap(drawing(draw))
        random.seed(0)
        values = after(model, work, torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
        found.append((values, [random.random(), model[1].numpy.random(), model[1].calls]))
    (wanted, streams), (got, own_streams) = found
    assert all(map(torch.equal, wanted, got))
    assert streams == own_streams


CLOCK = itertools.count(1)


def emas_in_place(block, x):
    block.mean.mul_(0.5).add_(x.detach().mean(0))
    return block.mean.clone()


@pytest.mark.parametrize(
    "draw",
    [
        lambda block, x: int.from_bytes(os.urandom(4), "big") / 2**32 + 0.5,
        lambda block, x: random.SystemRandom().random() + 0.5,
        lambda block, x: np.random.default_rng().random() + 0.5,
        lambda block, x: (torch.from_numpy(np.random.default_rng().random((4, 8))) > 0.1).float(),
        lambda block, x: x.detach()[:, torch.from_numpy(np.random.default_rng().permutation(8))],
        lambda block, x: 1 / next(CLOCK),
        emas_in_place,
    ],
    ids=["urandom", "system", "new generator", "mask", "order", "iterator", "tensor in place"],
)
def test_a_block_that_cannot_be_replayed_is_refused_by_name_in_the_first_backward(draw):
    model = nn.Sequential(nn.Linear(8, 8), Draws(draw), nn.Linear(8, 8))
    output = checkpoint_blocks(model, 1)(torch.randn(4, 8))
    with pytest.raises(RuntimeError, match="block '1' does not compute in backward what"):
        output.square().mean().backward()


def test_a_stream_that_begins_late_is_seen_in_one_of_the_next_samples():
    def draw(block, x):
        return os.urandom(1)[0] / 256 + 0.5 if begun else 1.0

    def step():
        result(torch.randn(4, 8)).square().mean().backward()

    result, begun = checkpoint_blocks(nn.Sequential(nn.Linear(8, 8), Draws(draw)), 1), []
    for _ in range(3):
        step()
    begun.append(True)
    with pytest.raises(RuntimeError, match="does not compute in backward"):
        step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "block",
    [
        lambda: nn.RReLU(),  # saves its noise before it is drawn
        lambda: nn.AlphaDropout(0.2),
        lambda: nn.Sequential(nn.LayerNorm(8), nn.Unflatten(1, (2, 4)), nn.Flatten()),
        lambda: Draws(lambda block, x: F.rrelu(x, training=True)),
        lambda: Draws(lambda block, x: F.gumbel_softmax(x, hard=True)),
        lambda: Draws(lambda block, x: torch.fft.irfft(torch.fft.rfft(x.float()), n=8)),
        lambda: Draws(lambda block, x: x.T.sort().values.T.cumsum(0)),
        lambda: Draws(lambda block, x: x[:, None].expand(4, 4, 8).max(1).values),
        lambda: Draws(lambda block, x: nn.functional.one_hot(x.argmax(1), 8)),
    ],
)
def test_a_healthy_block_is_never_refused(block, dtype):
    model, x = nn.Sequential(nn.Linear(8, 8), block(), nn.Linear(8, 8)), torch.randn(4, 8)
    plain, own = copy.deepcopy(model), checkpoint_blocks(model, 1)
    for each in (plain, own):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            output = each(x)
        output.float().square().mean().backward()
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(plain.parameters(), own.parameters(), strict=True)
    )


def test_an_old_output_that_a_block_keeps_holds_no_graph_of_former_steps():
    class Keeps(nn.Module):
        def forward(self, x):
            self.last = x.sin()
            graphs.append(weakref.ref(self.last))
            return self.last

    graphs = []
    result = checkpoint_blocks(nn.Sequential(nn.Linear(8, 8), Keeps()), 1)
    for _ in range(4):
        result(torch.randn(2, 8)).sum().backward()
    gc.collect()
    assert [ref() is not None for ref in graphs][:-2] == [False] * (len(graphs) - 2)


def test_steady_buffers_are_not_copied_from_step_to_step():
    model = stateful("running mean in place")
    result = checkpoint_blocks(model, 1)
    result(torch.randn(3, 3, 8, 8)).sum().backward()
    assert {name for name, _ in result._dlhelpers_steady} == {"1.big", "5.big"}


class Late(nn.Module):
    """A scale that moves from the second step on; its first step may rebind it to an equal one."""

    def __init__(self, rebinds):
        super().__init__()
        self.rebinds, self.by = rebinds, 0.0
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        if self.rebinds:
            self.scale = self.scale + self.by
        elif self.by:
            self.scale.add_(self.by)
        return (x * self.scale.clone()).tanh()


@pytest.mark.parametrize("steady_before", [True, False])
@pytest.mark.parametrize("rebinds", [True, False])
def test_a_buffer_that_changes_late_is_counted_once_and_recomputed_with(rebinds, steady_before):
    model, x = nn.Sequential(nn.Linear(8, 8), Late(rebinds)), torch.randn(2, 8)
    plain = copy.deepcopy(model)
    result = checkpoint_blocks(model, 1)
    for step in range(3):
        for each in (plain, result):
            each[1].by, each[1].rebinds = float(step), rebinds and (step > 0 or not steady_before)
            each.zero_grad()
        plain(x).sum().backward()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            result(x).sum().backward()
        named = [w for w in told if "buffer '1.scale' changed in this forward" in str(w.message)]
        assert len(named) == (step == 1 and not rebinds)
        if not named:  # its old value was overwritten before anyone knew that it would be needed
            assert torch.equal(result[0].weight.grad, plain[0].weight.grad)
        assert torch.equal(result[1].scale, plain[1].scale)


def test_a_momentum_that_is_zero_at_first_freezes_nothing():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=0.0)), torch.randn(9, 8)
    plain = copy.deepcopy(model)
    result = checkpoint_blocks(model, 1)
    for momentum in (0.0, 0.1, None):
        for each in (plain, result):
            each[1].momentum = momentum
            each(x).square().sum().backward()
        assert all(map(torch.equal, plain.buffers(), result.buffers()))


def test_nothing_of_a_step_is_left_for_the_garbage_collector():
    class Marks(nn.Module):
        def forward(self, x):
            y = x.tanh()
            made.append(weakref.ref(y))
            return y * 2

    made = []
    result = checkpoint_blocks(nn.Sequential(nn.Linear(8, 8), Marks(), nn.Linear(8, 8)), 2)
    gc.disable()
    try:
        result(torch.randn(2, 8)).sum().backward()
        result(torch.randn(2, 8))  # never backwarded
        assert len(made) == 3  # one of them in the recomputation
        assert [ref() for ref in made] == [None] * 3
    finally:
        gc.enable()


def test_torch_counts_a_batch_twice_and_this_does_not():
    block = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    theirs = copy.deepcopy(block)
    checkpoint_sequential([theirs, nn.Identity()], 2, x, use_reentrant=False).sum().backward()
    checkpoint_blocks(block, 1)(x).sum().backward()
    assert (int(theirs[1].num_batches_tracked), int(block[1].num_batches_tracked)) == (2, 1)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardswish, nn.SiLU])
def test_a_part_that_begins_in_place_runs_that_block_before_its_first_segment(activation):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3)
            self.rest = nn.Sequential(
                nn.Identity(), activation(inplace=True), nn.Dropout(0.2),
                nn.Conv2d(6, 6, 3), activation(inplace=True), nn.Conv2d(6, 6, 3),
            )  # fmt: skip

        def forward(self, x):
            return self.rest(self.stem(x))

    ((_, cut),) = checkpoint_plan(checkpoint_blocks(Net(), 2))
    assert cut == (("2",), ("3", "4", "5"))
    assert differing(Net(), torch.randn(2, 3, 8, 8), 2) == []


def test_a_block_that_overwrites_its_segments_input_is_named():
    class Overwrites(nn.Module):
        def forward(self, x):
            return nn.functional.silu(x, inplace=True) * 2

    model, x = nn.Sequential(nn.Linear(8, 8), Overwrites(), nn.Linear(8, 8)), torch.randn(2, 8)
    assert differing(model, x, 1) == []
    with pytest.raises(RuntimeError, match=r"block '1' overwrites the input .* inplace=False"):
        checkpoint_blocks(model, 3)(x)
    with torch.no_grad():
        assert torch.equal(checkpoint_blocks(model, 3)(x), model(x))
    gpt = Gpt()
    gpt.h[1].norm = Overwrites()
    with pytest.raises(RuntimeError, match=r"block 'h.1' overwrites"):
        checkpoint_blocks(gpt, 0)(tokens())


def test_changed_parameters_and_blocks_are_refused():
    model, x = mlp(), torch.randn(2, 8)
    result = checkpoint_blocks(model, 2)
    output = result(x)
    with torch.no_grad():
        model[0][0].bias.add_(1)
    with pytest.raises(RuntimeError, match=r"begins with '0.0' has changed since forward"):
        output.sum().backward()
    for change in (
        lambda m: m.append(nn.Tanh()),
        lambda m: m.pop(-1),
        lambda m: m[2].register_forward_hook(lambda *_: None),
    ):
        result = checkpoint_blocks(model, 2)
        change(result)
        with pytest.raises(RuntimeError, match="call checkpoint_blocks again"):
            result(x)
        result = checkpoint_blocks(result, 2)
        result(x).sum().backward()


def test_hooks_stay_and_a_hooked_chain_is_a_block():
    seen = []
    model, x = mlp(depth=3), torch.randn(2, 8)
    model[1].register_forward_hook(lambda module, args, output: seen.append("forward"))
    model[1].register_full_backward_hook(lambda module, args, output: seen.append("backward"))
    result = checkpoint_blocks(model, 5)
    assert checkpoint_plan(result)[0][1] == (("0.0",), ("0.1",), ("1",), ("2.0",), ("2.1",))
    assert differing(model, x, 5) == []
    seen.clear()
    checkpoint_blocks(model, 1)(x).sum().backward()
    assert seen.count("forward") == 2  # once more in the recomputation
    assert seen.count("backward") == 1


def test_parametrized_elements_and_subclasses_of_sequential_are_checkpointed():
    model, x = encoder(), torch.randn(2, 12, 16)
    parametrizations.orthogonal(model.layers[1].linear1)
    parametrize.register_parametrization(model.layers[2].norm1, "weight", nn.Tanh())
    assert differing(model, x, 0) == []
    block = Conv2dNormActivation(3, 6, activation_layer=nn.Hardswish)
    assert checkpoint_plan(checkpoint_blocks(block, 2))[0][1] == (("0",), ("1", "2"))

    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    with pytest.raises(ValueError, match="nothing to cut"):
        checkpoint_blocks(Residual(nn.Linear(3, 3)), 1)
    model = nn.Sequential(Residual(nn.Linear(8, 8), nn.Tanh()), Residual(nn.Linear(8, 8)))
    assert checkpoint_plan(checkpoint_blocks(model, 2)) == (("", (("0",), ("1",))),)
    assert differing(model, torch.randn(3, 8), 2) == []


@pytest.mark.parametrize("make", [Mixed, cnn, Gpt])
def test_it_runs_on_fake_tensors_and_leaves_the_random_state(make):
    x = images(8) if make is cnn else tokens()
    real = checkpoint_blocks(make(), 0 if make is Gpt else 2)
    shape, before = real(x).shape, torch.get_rng_state()
    with FakeTensorMode() as mode:
        built, fake = make(), mode.from_tensor(x)
        model = checkpoint_blocks(built, 0 if make is Gpt else 2)
        for _ in range(2):
            output = model(fake)
            output.sum().backward()
    assert isinstance(output, FakeTensor)
    assert output.shape == shape
    assert all(p.grad.shape == p.shape for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("model", "segments", "says"),
    [
        (mlp(), 0, "from 1 to 12, got 0"),
        (mlp(), 13, "from 1 to 12, got 13"),
        (mlp(), -1, "from 1 to 12"),
        (mlp(), 2.0, "whole number"),
        (mlp(), "some", "whole number"),
        (mlp(), None, "whole number"),
        (mlp(), "auto", "needs inputs"),
        (Gpt(), 1, "or 0, got 1"),
        (Mixed(), 9, "from 0 to 7, got 9"),
        (nn.Linear(3, 3), 1, "needs an nn.Sequential"),
        (nn.Sequential(), 1, "needs an nn.Sequential"),
        (nn.ModuleDict({"a": nn.ModuleList([nn.Linear(1, 1)] * 2)}), 1, "needs an nn.Sequential"),
    ],
)
def test_what_cannot_be_cut_is_told(model, segments, says):
    with pytest.raises(ValueError, match=says):
        checkpoint_blocks(model, segments)


@settings(max_examples=60, deadline=None)
@given(
    depth=st.integers(1, 150),
    segment=st.floats(0.05, 20),
    plain=st.floats(0.1, 2),
)
def test_auto_finds_the_smallest_of_a_valley_in_few_looks(depth, segment, plain):
    looks = []

    def peak(model, inputs, optimizer, loss, k):
        looks.append(k)
        if k is None:
            return plain * depth
        return segment * k + math.ceil(depth / k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "_estimated_peak", peak)
        model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(depth)))
        result = checkpoint_blocks(model, inputs=torch.zeros(1, 1))
    assert len(looks) == len(set(looks)) <= 24
    k = sum(len(cut) for _, cut in checkpoint_plan(result)) or None
    every = {k: peak(None, None, None, None, k) for k in (None, *range(1, depth + 1))}
    best = min(every.values())
    assert every[k] <= best * 1.2 + 1


@pytest.mark.parametrize("best", range(1, 41))
def test_auto_comes_to_the_very_bottom_of_a_valley_without_plateaus(best, monkeypatch):
    def peak(model, inputs, optimizer, loss, k):
        return 100 if k is None else abs(k - best)

    monkeypatch.setattr(checkpointing, "_estimated_peak", peak)
    result = checkpoint_blocks(mlp(depth=20), inputs=torch.zeros(1, 8))
    assert sum(len(cut) for _, cut in checkpoint_plan(result)) == best


def test_auto_asks_estimate_with_the_readers_arguments(monkeypatch):
    calls = []

    def estimate(*args, **options):
        calls.append((args, options))
        k = options["checkpoint"]
        return types.SimpleNamespace(peak_bytes=10 if k is None else abs(k - 2))

    fake = types.ModuleType("estimating")
    fake.estimate = estimate
    monkeypatch.setitem(sys.modules, "dlhelpers.memory.estimating", fake)
    model, x, sgd, loss = mlp(), torch.randn(2, 8), object(), object()
    result = checkpoint_blocks(model, inputs=x, optimizer=sgd, loss=loss)
    assert sum(len(cut) for _, cut in checkpoint_plan(result)) == 2
    assert all(args == (model, x, sgd) and options["loss"] is loss for args, options in calls)
    asked = [options["checkpoint"] for _, options in calls]
    assert len(asked) == len(set(asked)) <= 7
    assert asked[0] in (2, 3, 4)  # near the root of twelve
    listed = checkpoint_blocks(Gpt(), inputs=tokens())
    assert checkpoint_plan(listed) == (("h", (("0",), ("1",), ("2",))),)


def test_auto_by_the_real_estimate_is_the_best_of_all():
    estimating = importlib.import_module("dlhelpers.memory.estimating")
    model, x = mlp(depth=6, width=32), torch.randn(2000, 32)
    result = checkpoint_blocks(model, inputs=x)
    k = sum(len(cut) for _, cut in checkpoint_plan(result)) or None
    peaks = {
        k: estimating.estimate(model, x, None, checkpoint=k).peak_bytes
        for k in (None, *range(1, 13))
    }
    assert peaks[k] == min(peaks.values())


def test_parameters_that_were_lent_for_a_forward_are_recomputed_with():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    x, grads = torch.randn(4, 6), []
    start = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    for candidate in (model, checkpoint_blocks(model, 2)):
        lent = {name: value.clone().requires_grad_() for name, value in start.items()}
        torch.func.functional_call(candidate, lent, (x,)).square().mean().backward()
        grads.append([value.grad for value in lent.values()])
        assert all(parameter.grad is None for parameter in candidate.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_list_says_that_its_elements_are_segments():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    with pytest.raises(ValueError, match=r'"auto" or 0, got 4; each element of an nn\.ModuleList'):
        checkpoint_blocks(Listed(), 4)


class Activation(nn.Module):
    """Calls a function that it holds."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(8, 8), function

    def forward(self, x):
        return self.function(self.layer(x), training=True)


@pytest.mark.parametrize(
    "last",
    [
        nn.RReLU,
        lambda: nn.RReLU(inplace=True),
        lambda: nn.Sequential(nn.LayerNorm(8), nn.RReLU()),
        lambda: Draws(lambda block, x: F.rrelu(x, training=True)),
        lambda: Draws(lambda block, x: torch.rrelu(x, training=True)),
        lambda: Activation(torch.rrelu),
        lambda: nn.TransformerEncoderLayer(8, 2, 8, activation=nn.RReLU(), norm_first=True),
    ],
)
@pytest.mark.parametrize("segments", [1, 2])
def test_a_kernel_that_fills_what_was_saved_may_end_a_segment(last, segments):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), last(), nn.Linear(8, 8), last()), torch.randn(4, 8)
    plain, own = copy.deepcopy(model), checkpoint_blocks(model, segments)
    for each in (plain, own):
        torch.manual_seed(1)
        each(x).square().mean().backward()
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(plain.parameters(), own.parameters(), strict=True)
    )


class Noisy(nn.Module):
    """Adds noise from a generator of its own."""

    def __init__(self, generator):
        super().__init__()
        self.layer, self.generator = nn.Linear(8, 8), generator

    def forward(self, x):
        return self.layer(x) + torch.randn(x.shape, generator=self.generator)


def test_the_copy_draws_from_the_models_own_generator():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(Noisy(generator), Noisy(generator))
    copied = checkpoint_blocks(model, 1)
    assert copied[0].generator is copied[1].generator is generator  # no number comes twice


def test_auto_leaves_every_stream_as_it_was():
    class Streams(Noisy):
        def forward(self, x):
            noise = torch.rand(1, generator=GLOBAL_TORCH) + random.random() + np.random.rand()
            return super().forward(x) * noise * self.numpy.random()

        numpy = np.random.default_rng(0)

    own = torch.Generator().manual_seed(0)
    accesses = [random.getstate, np.random.get_state, torch.get_rng_state, own.get_state]
    accesses += [GLOBAL_TORCH.get_state, lambda: Streams.numpy.bit_generator.state]
    before = [str(access()) for access in accesses]
    states = [own.get_state(), GLOBAL_TORCH.get_state()]
    model = nn.Sequential(*(Streams(own) for _ in range(4)))
    estimate(model, torch.zeros(4, 8), torch.optim.AdamW, checkpoint=2, loss=torch.mean)
    checkpoint_blocks(model, "auto", inputs=torch.zeros(4, 8))
    assert [str(access()) for access in accesses] == before
    assert all(map(torch.equal, states, [own.get_state(), GLOBAL_TORCH.get_state()]))


def test_attributes_of_the_users_modules_are_left_to_them():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
            self._passes, self._steady, self._checkpointed, self._plain = 2, "a", "b", "c"

        def forward(self, x):
            for _ in range(self._passes):
                x = self.body(x)
            return x

    model, x = Net(), torch.randn(3, 4)
    copied = checkpoint_blocks(model, 2)
    assert torch.equal(copied(x), model(x))
    assert (copied._passes, copied._steady, copied._checkpointed, copied._plain) == (2, *"abc")
