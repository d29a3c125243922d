"""Accumulated gradients are those of the whole batch, or the loop says why they are not."""

import copy
import dataclasses
import functools
import gc
import warnings
import weakref
from collections import Counter, OrderedDict, UserDict, namedtuple
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from dlhelpers.memory.accumulating import accumulate
from dlhelpers.memory.divisors import terms_of
from dlhelpers.memory.measuring import measure_peak

pytestmark = pytest.mark.usefixtures("little_to_collect")


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def samples(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (n,), generator=generator)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def whole_gradients(model, inputs, targets, loss=F.cross_entropy):
    """The oracle: one forward and backward of everything, on a copy."""
    model = copy.deepcopy(model)
    value = loss(model(inputs), targets)
    value.backward()
    return gradients(model), value.detach()


def assert_same(got, wanted, rtol=1e-12):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-15)


def run(model, optimizer, batch, *, loss=F.cross_entropy, **options):
    """A loop as a reader writes it; gradients (before their step) and loss of each group."""
    groups = []
    total = 0.0
    for micro in accumulate(optimizer, batch, **options):
        inputs, targets = micro.batch
        total = total + micro.backward(loss(model(inputs), targets))
        if micro.is_last:
            groups.append((gradients(model), total))
            total = 0.0
    return groups


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 25), data=st.data())
def test_gradient_and_loss_are_those_of_the_whole_batch(n, data):
    steps = data.draw(st.integers(1, n))
    model, batch = mlp(), samples(n)
    wanted, value = whole_gradients(model, *batch)
    [(got, total)] = run(model, sgd(model), batch, steps=steps)
    assert_same(got, wanted)
    torch.testing.assert_close(total, value, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("n", "steps", "sizes"), [(8, 4, [2, 2, 2, 2]), (10, 4, [3, 3, 2, 2]), (3, 1, [3])]
)
def test_micro_batches_are_nearly_equal_and_in_order(n, steps, sizes):
    model, (inputs, targets) = mlp(), samples(n)
    seen = []
    for micro in accumulate(sgd(model), (inputs, targets), steps):
        x, y = micro.batch
        seen.append((x, len(y), micro.weight, micro.index, micro.of, micro.is_last))
        micro.backward(F.cross_entropy(model(x), y))
    assert torch.equal(torch.cat([x for x, *_ in seen]), inputs)
    assert [row[1:] for row in seen] == [
        (size, size / n, i, steps, i == steps - 1) for i, size in enumerate(sizes)
    ]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), batch_size=st.integers(1, 7), steps=st.integers(1, 5))
def test_a_loader_is_grouped_and_its_incomplete_last_group_is_exact(n, batch_size, steps):
    model, (inputs, targets) = mlp(), samples(n)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # all groups see the same weights
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=batch_size)
    groups = run(model, optimizer, loader, steps=steps)
    starts = range(0, n, batch_size * steps)
    assert len(groups) == len(starts)
    for start, (got, total) in zip(starts, groups, strict=True):
        part = slice(start, start + batch_size * steps)
        wanted, value = whole_gradients(model, inputs[part], targets[part])
        assert_same(got, wanted)
        torch.testing.assert_close(total, value, rtol=1e-12, atol=0)


def test_a_generator_is_read_no_further_than_its_group():
    model, read = mlp(), []

    def batches():
        for i in range(5):
            read.append(i)
            yield samples(2, seed=i)

    ahead = []
    for micro in accumulate(sgd(model), batches(), steps=2):
        ahead.append(len(read))
        micro.backward(F.cross_entropy(model(micro.batch[0]), micro.batch[1]))
    assert ahead == [2, 2, 4, 4, 5]


def test_batches_of_a_loader_are_dropped_after_their_turn():
    model, alive = mlp(), []
    counts = []

    def batches():
        for i in range(6):
            inputs, targets = samples(2, seed=i)
            alive.append(weakref.ref(inputs))
            yield inputs, targets

    for micro in accumulate(sgd(model), batches(), steps=3):
        micro.backward(F.cross_entropy(model(micro.batch[0]), micro.batch[1]))
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))
    assert counts == [3, 2, 1, 3, 2, 1]


TOKENS = [[6, 1, 3, 5], [2, 0, 6], [0, 4], [0, 6, 0]]  # targets a sequence; the rest is -100


@pytest.mark.parametrize("lengths", TOKENS)
@pytest.mark.parametrize("as_tensor", [True, False])
def test_tokens_weigh_alike_whatever_the_padding(lengths, as_tensor):
    model = mlp()
    inputs, targets = samples(6 * len(lengths))
    inputs, targets = inputs.view(-1, 6, 5), targets.view(-1, 6).clone()
    for row, length in enumerate(lengths):
        targets[row, length:] = -100

    def loss(logits, y):
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100)

    def count(micro_batch):
        number = (micro_batch[1] != -100).sum()
        return number if as_tensor else number.item()

    wanted, value = whole_gradients(model, inputs, targets, loss)
    batch, steps = (inputs, targets), len(lengths)
    [(got, total)] = run(model, sgd(model), batch, loss=loss, steps=steps, count=count)
    assert_same(got, wanted)  # also where one micro-batch has no target, and its mean is NaN
    torch.testing.assert_close(total, value, rtol=1e-12, atol=0)


def weights_of(y):
    return torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)[y]


EXACT = {
    "mean": lambda z, y, t: F.cross_entropy(z, y),
    "class weights": lambda z, y, t: F.cross_entropy(z, y, weight=weights_of([0, 1, 2])),
    "label smoothing": lambda z, y, t: F.cross_entropy(
        z, y, weight=weights_of([0, 1, 2]), label_smoothing=0.1
    ),
    "images": lambda z, y, t: F.cross_entropy(
        torch.stack([z, z * z], -1), torch.stack([y, y], -1), weight=weights_of([0, 1, 2])
    ),
    "sum": lambda z, y, t: F.cross_entropy(z, y, reduction="sum"),
    "soft targets": lambda z, y, t: F.cross_entropy(z, t, weight=weights_of([0, 1, 2])),
    "pos_weight": lambda z, y, t: F.binary_cross_entropy_with_logits(
        z, t, pos_weight=weights_of([1, 0, 2])
    ),
    "batchmean": lambda z, y, t: F.kl_div(z.log_softmax(1), t, reduction="batchmean"),
    "squared": lambda z, y, t: 2 * F.mse_loss(z, t) / 3,
    "two means over the same": lambda z, y, t: F.l1_loss(z, t) + 0.1 * F.mse_loss(z, t),
    "masked": lambda z, y, t: ((z - t) ** 2 * (t > 0.3)).sum() / (t > 0.3).sum(),
    "clamped": lambda z, y, t: ((z - t) ** 2 * (t > 0.6)).sum() / (t > 0.6).sum().clamp(min=1),
    "picked": lambda z, y, t: (z - t)[t > 0.3].square().mean(),
    "mean over the batch, sum over classes": lambda z, y, t: (z - t).square().mean(0).sum(),
    "mean over given dimensions": lambda z, y, t: (z - t)[t > 0.3].abs().mean(dim=(0,)),
    "mean of means": lambda z, y, t: torch.stack([F.l1_loss(z, t), F.mse_loss(z, t)]).mean(),
    "own quotient": lambda z, y, t: F.cross_entropy(z, y, reduction="sum") / (y != -100).sum(),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(4, 20),
    steps=st.integers(1, 4),
    name=st.sampled_from(sorted(EXACT)),
    seed=st.integers(0, 99),
    ignored=st.floats(0, 0.9),
)
def test_the_divisor_is_what_the_loss_divides_by(n, steps, name, seed, ignored):
    model, (inputs, targets) = mlp(), samples(n, seed)
    generator = torch.Generator().manual_seed(seed)
    soft = torch.rand(n, 3, generator=generator, dtype=torch.float64).softmax(1)
    targets[torch.rand(n, generator=generator) < ignored] = -100
    targets[-1] = 1  # one at least; whole micro-batches without any happen
    soft[-1] = torch.tensor([0.7, 0.2, 0.1])

    def loss(z, both):
        return EXACT[name](z, *both)

    wanted, value = whole_gradients(model, inputs, (targets, soft), loss)
    [(got, total)] = run(model, sgd(model), (inputs, (targets, soft)), loss=loss, steps=steps)
    assert_same(got, wanted, rtol=1e-9)
    torch.testing.assert_close(total, value, rtol=1e-9, atol=1e-12)


class Own(torch.autograd.Function):
    """A mean that its graph does not show."""

    @staticmethod
    def forward(ctx, z):
        ctx.shape = z.shape
        return z.mean()

    @staticmethod
    def backward(ctx, grad):
        return grad.expand(ctx.shape) / ctx.shape.numel()


INEXACT = {
    "means over different things": lambda z, y, t: F.cross_entropy(z, y) + F.mse_loss(z, t),
    "root": lambda z, y, t: F.mse_loss(z, t).sqrt(),
    "ratio of sums": lambda z, y, t: (z.sigmoid() * t).sum() / z.sigmoid().sum(),
    "mean and sum": lambda z, y, t: F.mse_loss(z, t) + z.square().sum(),
    "reduction is 'mean'": lambda z, y, t: z.square().sum(),
    "cannot be known": lambda z, y, t: Own.apply(z),
    "hardest samples": lambda z, y, t: (z - t).square().mean(1).topk(2).values.mean(),
    "hardest elements": lambda z, y, t: (z - t).square().flatten().topk(3).values.mean(),
    "largest of each class": lambda z, y, t: z.amax(0).square().mean(),
    "spread": lambda z, y, t: F.mse_loss(z, t) + (1 - (z.var(0) + 1e-4).sqrt()).relu().mean(),
    "pooled": lambda z, y, t: z.logsumexp(0).mean(),
}


@pytest.mark.parametrize("name", INEXACT)
def test_a_divisor_that_cannot_be_known_is_told_once_with_what_to_give(name):
    model, (inputs, targets) = mlp(), samples(7)
    targets[0] = -100
    batch = (inputs, (targets, torch.rand(7, 3, dtype=torch.float64)))
    with pytest.warns(UserWarning, match="may not be that of the whole batch") as told:
        run(model, sgd(model), batch, loss=lambda z, both: INEXACT[name](z, *both), steps=3)
    [message] = [str(w.message) for w in told if "accumulated gradient" in str(w.message)]
    assert "count=" in message or "give 'sum'" in message
    assert name not in ("means over different things", "cannot be known") or name in message


@pytest.mark.parametrize(
    "loss",
    [F.cross_entropy, lambda z, y: F.cross_entropy(z, y, reduction="sum") / len(z)],
    ids=["mean", "quotient"],
)
def test_a_mean_told_as_a_sum_is_warned_of(loss):
    model = mlp()
    with pytest.warns(UserWarning, match="reduction='sum', but the loss is a mean"):
        run(model, sgd(model), samples(7), loss=loss, steps=3, reduction="sum")


def test_a_penalty_on_the_parameters_has_no_divisor():
    model, batch = mlp(), samples(9)
    batch[1][:4] = -100

    def penalized(module):
        def loss(z, y):
            penalty = sum(p.square().sum() for p in module.parameters())
            return F.cross_entropy(z, y) + 0.1 * penalty + module[0].weight.abs().mean()

        return loss

    plain = copy.deepcopy(model)
    value = penalized(plain)(plain(batch[0]), batch[1])
    value.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [(got, total)] = run(model, sgd(model), batch, loss=penalized(model), steps=4)
    assert_same(got, gradients(plain), rtol=1e-10)
    torch.testing.assert_close(total, value.detach())


def test_a_group_without_targets_is_an_error_and_leaves_no_gradient():
    model, (inputs, targets) = mlp(), samples(6)
    with pytest.raises(ValueError, match="count 0 in all"):
        run(model, sgd(model), (inputs, targets.fill_(-100)), steps=3)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_are_corrected_before_they_are_unscaled_and_clipped():
    model, (inputs, targets) = mlp(), samples(9)
    targets[1:4] = -100
    wanted, _ = whole_gradients(model, inputs, targets)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    for micro in accumulate(optimizer, (inputs, targets), 3, scaler=scaler):
        micro.backward(F.cross_entropy(model(micro.batch[0]), micro.batch[1]))
        if micro.is_last:
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in wanted]).norm())


def test_a_checkpointed_loss_is_not_recomputed_to_read_its_divisor():
    model, batch, calls = mlp(), samples(6), []

    def loss(z, y):
        calls.append(1)
        return F.cross_entropy(z, y)

    def checkpointed(z, y):
        return checkpoint(loss, z, y, use_reentrant=False)

    with pytest.warns(UserWarning, match="cannot be known"):
        run(model, sgd(model), batch, loss=checkpointed, steps=2)
    assert len(calls) == 4  # a forward and a recomputation of each


def test_a_sum_without_a_count_is_the_whole_batchs_sum():
    model, (inputs, targets) = mlp(), samples(11)

    def summed(output, target):
        return F.cross_entropy(output, target, reduction="sum")

    wanted, value = whole_gradients(model, inputs, targets, summed)
    for options in ({"reduction": "sum"}, {}):
        [(got, total)] = run(
            model, torch.optim.SGD(model.parameters(), lr=0.0), (inputs, targets), loss=summed,
            steps=4, **options,
        )  # fmt: skip
        assert_same(got, wanted)
        torch.testing.assert_close(total, value, rtol=1e-12, atol=0)


def test_a_sum_with_a_count_is_divided_by_the_whole_groups_count():
    def summed(output, target):
        return F.cross_entropy(output, target, reduction="sum", ignore_index=-100)

    model, (inputs, targets) = mlp(), samples(11)
    targets[:3] = -100  # the whole first micro-batch of [3, 3, 3, 2]
    wanted, value = whole_gradients(model, inputs, targets)  # the mean
    [(got, total)] = run(
        model,
        sgd(model),
        (inputs, targets),
        loss=summed,
        reduction="sum",
        count=lambda batch: (batch[1] != -100).sum(),
    )
    assert_same(got, wanted)
    torch.testing.assert_close(total, value, rtol=1e-12, atol=0)


def test_a_dict_stays_a_dict_and_its_other_entries_go_everywhere():
    model, (inputs, targets) = mlp(), samples(10)
    wanted, _ = whole_gradients(model, inputs, targets)
    batch = {"name": "train", "scale": torch.tensor(1.0), "x": inputs, "y": targets}
    for micro in accumulate(sgd(model), batch, steps=3):
        assert list(micro.batch) == ["name", "scale", "x", "y"]
        assert micro.batch["name"] == "train"
        assert micro.batch["scale"] is batch["scale"]
        micro.backward(F.cross_entropy(model(micro.batch["x"]), micro.batch["y"]))
        if micro.is_last:
            got = gradients(model)
    assert_same(got, wanted)


def test_a_tensor_stays_a_tensor_and_a_named_tuple_named():
    model, (inputs, targets) = mlp(), samples(4)
    for micro in accumulate(sgd(model), inputs, steps=2):
        assert micro.batch.shape == (2, 5)
        micro.backward(model(micro.batch).mean())
    pair = namedtuple("pair", "x y")(inputs, targets)
    for micro in accumulate(sgd(model), pair, steps=2):
        assert micro.batch.x.shape == (2, 5)
        micro.backward(F.cross_entropy(model(micro.batch.x), micro.batch.y))


@dataclasses.dataclass(frozen=True)
class Record:
    x: torch.Tensor
    name: str


Pair = namedtuple("Pair", "x y")


def test_a_nested_batch_is_split_along_every_tensors_first_dimension():
    x, y = torch.arange(10.0).view(5, 2), torch.arange(5)
    batch = {
        "pair": (x, [y, y + 5]),
        "named": Pair(x, {"y": y}),
        "record": Record(x, "train"),
        "texts": ["a", "b", "c", "d", "e"],
        "keys": ("a", "b", "c", "d", "e"),
        "labels": [1, 2, 3, 4, 5],
        "rows": np.arange(10).reshape(5, 2),
        "size": (5, 5, 5, 5, 5),
        "vocabulary": ["a", "b"],
        "scale": torch.tensor(2.0),
        "epoch": 3,
        "missing": None,
    }
    weight = nn.Parameter(torch.zeros(()))
    optimizer, seen = torch.optim.SGD([weight], lr=0.1), []
    for micro in accumulate(optimizer, batch, steps=2):
        seen.append(micro.batch)
        micro.backward(weight.sum())
    for got, part in zip(seen, (slice(0, 3), slice(3, 5)), strict=True):
        assert list(got) == list(batch)
        assert torch.equal(got["pair"][0], x[part])
        assert [v.tolist() for v in got["pair"][1]] == [y[part].tolist(), (y + 5)[part].tolist()]
        assert isinstance(got["named"], Pair)
        assert torch.equal(got["named"].y["y"], y[part])
        assert got["record"].name == "train"
        assert torch.equal(got["record"].x, x[part])
        assert torch.equal(batch["record"].x, x)
        assert got["texts"] == batch["texts"][part]
        assert got["keys"] == batch["keys"][part]
        assert got["labels"] == batch["labels"][part]
        assert got["rows"].tolist() == batch["rows"][part].tolist()
        for whole in ("size", "vocabulary", "scale", "epoch", "missing"):
            assert got[whole] is batch[whole]


@pytest.mark.parametrize("kind", [OrderedDict, UserDict, MappingProxyType])
def test_a_mapping_keeps_its_type_where_it_can_be_written_to(kind):
    weight = nn.Parameter(torch.zeros(()))
    batch = kind({"x": torch.ones(4)})
    micro = next(accumulate(torch.optim.SGD([weight], lr=0.1), batch, steps=2))
    assert type(micro.batch) is (dict if kind is MappingProxyType else kind)
    assert (len(micro.batch["x"]), len(batch["x"])) == (2, 4)


def test_a_list_of_images_of_all_sizes_is_split_by_its_entries():
    weight = nn.Parameter(torch.zeros(()))
    images = [torch.ones(3, 4 + i, 5) for i in range(5)]
    boxes = [{"boxes": torch.ones(i, 4)} for i in range(5)]
    for batch in ((images, boxes), {"images": images, "targets": boxes}):
        micros = accumulate(torch.optim.SGD([weight], lr=0.1), batch, steps=2)
        first = next(micros).batch
        got = first if isinstance(first, tuple) else tuple(first.values())
        assert [len(part) for part in got] == [3, 3]
        assert got[0][2] is images[2]
        assert got[1][2] is boxes[2]


def test_the_samples_of_a_nested_batch_are_those_of_its_first_tensor():
    model, (inputs, targets) = mlp(), samples(5)
    batches = [("id", {"x": inputs[:4], "y": targets[:4]}), ("id", {"x": inputs[4:]})]
    weights = []
    for micro in accumulate(sgd(model), batches, steps=2):
        weights.append(micro.weight)
        micro.backward(model(micro.batch[1]["x"]).mean())
    assert weights == [0.8, 0.2]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.01),
    ],
    ids=["sgd with momentum", "adamw"],
)
def test_three_steps_end_in_the_parameters_of_three_plain_steps(make):
    model, (inputs, targets) = mlp(), samples(30)
    plain = copy.deepcopy(model)
    optimizer, plain_optimizer = make(model.parameters()), make(plain.parameters())
    for part in torch.arange(30).split(10):
        run(model, optimizer, (inputs[part], targets[part]), steps=4)
        plain_optimizer.zero_grad()
        F.cross_entropy(plain(inputs[part]), targets[part]).backward()
        plain_optimizer.step()
    # AdamW divides by the root of the gradient's square: rounding grows where that is small
    assert_same(model.parameters(), plain.parameters(), rtol=1e-9)
    assert not torch.allclose(model[0].weight, mlp()[0].weight)


class Counting(torch.optim.SGD):
    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


def test_a_group_makes_one_step_and_starts_without_gradients():
    model = mlp()
    optimizer = Counting(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(*samples(22)), batch_size=2)  # 11 batches: 4, 4, 3
    taken = []
    for micro in accumulate(optimizer, loader, steps=4):
        taken.append(optimizer.steps)
        if micro.index == 0:
            assert all(p.grad is None for p in model.parameters())
        micro.backward(F.cross_entropy(model(micro.batch[0]), micro.batch[1]))
    assert taken == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert optimizer.steps == 3


def test_gradients_clipped_at_the_last_micro_batch_are_those_of_the_step():
    model, batch = mlp(), samples(8)
    before = [p.detach().clone() for p in model.parameters()]
    for micro in accumulate(sgd(model), batch, steps=2):
        micro.backward(100 * F.cross_entropy(model(micro.batch[0]), micro.batch[1]))
        if micro.is_last:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    pairs = zip(before, model.parameters(), strict=True)
    moved = torch.cat([(old - new.detach()).flatten() for old, new in pairs])
    assert moved.norm().item() == pytest.approx(0.1, rel=1e-6)  # learning rate times norm 1


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("leave", ["break", "error"])
@pytest.mark.filterwarnings("ignore:the loop over accumulate was left")
def test_a_loop_left_early_makes_no_step_and_leaves_no_gradient(at, leave):
    model = mlp()
    optimizer = Counting(model.parameters(), lr=0.1)

    def loop():
        for micro in accumulate(optimizer, samples(8), steps=4):
            micro.backward(F.cross_entropy(model(micro.batch[0]), micro.batch[1]))
            if micro.index == at and leave == "break":
                break
            if micro.index == at:
                raise KeyError("stop")

    if leave == "break":
        loop()
    else:
        with pytest.raises(KeyError, match="stop"):
            loop()
    assert optimizer.steps == 0
    assert all(p.grad is None for p in model.parameters())
    assert_same(model.parameters(), mlp().parameters(), rtol=0)


@pytest.mark.parametrize("forgotten", [0, 2])  # of three: in the middle, and before the step
def test_a_forgotten_backward_is_an_error_that_says_what_to_call(forgotten):
    model = mlp()
    optimizer = Counting(model.parameters(), lr=0.1)

    def loop():
        for micro in accumulate(optimizer, samples(6), steps=3):
            loss = F.cross_entropy(model(micro.batch[0]), micro.batch[1])
            if micro.index == forgotten:
                loss.backward()
            else:
                micro.backward(loss)

    with pytest.raises(RuntimeError, match=rf"{forgotten + 1} of 3.*call micro.backward\(loss\)"):
        loop()
    assert optimizer.steps == 0
    assert all(p.grad is None for p in model.parameters())


def test_a_second_backward_is_an_error():
    model = mlp()
    micro = next(accumulate(sgd(model), samples(6), steps=3))
    micro.backward(model(micro.batch[0]).mean())
    with pytest.raises(RuntimeError, match="twice"):
        micro.backward(model(micro.batch[0]).mean())


@pytest.mark.parametrize("wrong", ["shape", "number"])
def test_a_loss_that_is_not_one_tensor_number_is_refused_and_can_be_mended(wrong):
    model = mlp()
    micro = next(accumulate(sgd(model), samples(6), steps=3))
    output = model(micro.batch[0])
    bad, says = (output, r"shape \(2, 3\)") if wrong == "shape" else (1.5, r"got 1\.5")
    with pytest.raises(ValueError, match=rf"one number.*{says}"):
        micro.backward(bad)
    assert not micro.backward(output.mean()).requires_grad


X, Y = samples(6)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"steps": 0}, ValueError, "got 0"),
        ({"steps": True}, ValueError, "got True"),
        ({"steps": 2.0}, ValueError, r"got 2\.0"),
        ({"steps": 7}, ValueError, "6 samples cannot make 7"),
        ({"reduction": "none"}, ValueError, "'none'"),
        ({"optimizer": [X]}, TypeError, "list"),
        ({"batch": 5}, TypeError, "int"),
        ({"batch": []}, ValueError, "no batch in this list"),
        ({"batch": iter(())}, ValueError, "no batch"),
        ({"batch": (X, Y[:4])}, ValueError, r"\[6, 4\]"),
        ({"batch": {"x": X, "y": Y[:4]}}, ValueError, r"\[6, 4\]"),
        ({"batch": ((X, Y), (X, Y[:4]))}, ValueError, "a list is many batches"),
        ({"model": mlp}, TypeError, "nn.Module, got function"),
        ({"batch": [X, Y]}, ValueError, r"tuple\(batch\)"),  # what a DataLoader gives
        ({"batch": ["text"]}, ValueError, r"\(str\).*count="),
        ({"count": lambda batch: -1}, ValueError, "got -1"),
        ({"count": lambda batch: True}, ValueError, "got True"),
        ({"count": lambda batch: float("nan")}, ValueError, "got nan"),
        ({"count": lambda batch: batch[1] != -100}, ValueError, "got tensor"),
        ({"count": lambda batch: 0}, ValueError, "count 0 in all"),
    ],
)
def test_bad_arguments_are_named_at_the_call(options, error, says):
    options = {"optimizer": sgd(mlp()), "batch": (X, Y), "steps": 2, **options}
    with pytest.raises(error, match=says):
        accumulate(**options)  # not iterated


def test_a_list_of_equal_tensors_is_many_batches():
    micros = accumulate(sgd(mlp()), [X, X[:3]], steps=2)
    assert next(micros).weight == 6 / 9


def warned(model, batch, steps=2, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for micro in accumulate(sgd(model, **options), batch, steps):
            micro.backward(model(micro.batch).square().mean())
    return [w for w in caught if "BatchNorm" in str(w.message)]


IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def test_batchnorm_in_train_mode_is_inexact_and_warned_of_once_at_the_readers_line():
    model = net(nn.BatchNorm2d(4))
    [warning] = warned(model, list(IMAGES.split(2)))  # two groups
    assert "GroupNorm" in str(warning.message)
    assert ".eval()" in str(warning.message)
    assert warning.filename == __file__
    assert issubclass(warning.category, UserWarning)


class Deep(nn.Module):
    """BatchNorm forty blocks from the loss, in one of two branches of the first."""

    def __init__(self, norm):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.norm = norm
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(40))

    def forward(self, x):
        x = self.first(x)
        x = x + self.norm(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))  # 2**40 paths, fewer than 300 nodes
        return x


class Frozen(nn.BatchNorm2d):
    def forward(self, x):
        self.eval()
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "batch", "times"),
    [
        (net(nn.BatchNorm2d(4)), IMAGES, 1),
        (net(nn.BatchNorm2d(4, affine=False)), IMAGES, 1),
        (net(nn.BatchNorm2d(4, track_running_stats=False)), IMAGES, 1),
        (net(nn.BatchNorm2d(4)), IMAGES[:2], 1),  # micro-batches of one image, as [1, N*C, ...]
        (nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()), IMAGES, 1),  # straight after the data
        (Deep(nn.BatchNorm1d(5)), torch.randn(8, 5), 1),
        (Deep(nn.Identity()), torch.randn(8, 5), 0),
        (net(nn.BatchNorm2d(4)).eval(), IMAGES, 0),
        (net(Frozen(4)), IMAGES, 0),
        (net(nn.InstanceNorm2d(4)), IMAGES, 0),
        (net(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), IMAGES, 0),
        (net(nn.InstanceNorm2d(4, affine=True)), IMAGES[:2], 0),
        (net(nn.GroupNorm(2, 4)), IMAGES, 0),
        (net(nn.LayerNorm([4, 4, 4])), IMAGES, 0),
    ],
)
def test_only_statistics_over_the_micro_batch_are_warned_of(model, batch, times):
    assert len(warned(model, batch)) == times
    # and the warning is right: gradients in micro-batches differ from the whole batch's just there
    model, batch = copy.deepcopy(model).double(), batch.double()
    model.zero_grad()
    model(batch).square().mean().backward()
    wanted = gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for micro in accumulate(optimizer, batch, steps=2):
            micro.backward(model(micro.batch).square().mean())
    near = [torch.allclose(a, b, rtol=1e-9) for a, b in zip(gradients(model), wanted, strict=True)]
    assert all(near) == (times == 0)


def test_a_group_of_one_micro_batch_is_exact_also_with_batchnorm():
    assert not warned(net(nn.BatchNorm2d(4)), IMAGES, steps=1)
    assert not warned(net(nn.BatchNorm2d(4)), [IMAGES], steps=4)


def test_looking_for_batchnorm_recomputes_no_checkpoint():
    calls = []

    def block(x):
        calls.append(1)
        return norm(x)

    norm, first = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
    parameters = [*norm.parameters(), *first.parameters()]
    micros = accumulate(torch.optim.SGD(parameters, lr=0.1), IMAGES, 2)
    micro = next(micros)
    output = checkpoint(block, first(micro.batch), use_reentrant=False)
    with pytest.warns(UserWarning, match="BatchNorm"):
        micro.backward(output.square().mean())
    assert len(calls) == 2  # forward, and once again in the backward


class Skipping(torch.amp.GradScaler):
    updates = 0

    def update(self, new_scale=None):
        self.updates += 1
        super().update(new_scale)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_changes_nothing_but_the_range(enabled):
    model, batch = mlp(), samples(10)
    plain = copy.deepcopy(model)
    run(plain, sgd(plain, momentum=0.9), batch, steps=3)
    scaler = Skipping("cpu", enabled=enabled)
    [(got, total)] = run(model, sgd(model, momentum=0.9), batch, steps=3, scaler=scaler)
    wanted, value = whole_gradients(mlp(), *batch)
    assert_same(model.parameters(), plain.parameters())
    assert_same(got, [scaler.get_scale() * g for g in wanted])  # of a scaled loss
    torch.testing.assert_close(total, value, rtol=1e-12, atol=0)  # the loss itself is not scaled
    assert scaler.updates == 1


def test_a_scaler_skips_the_step_of_a_group_with_an_infinite_gradient():
    model, (inputs, targets) = mlp(), samples(6)
    inputs[5] = float("inf")
    scaler = torch.amp.GradScaler("cpu")
    run(model, sgd(model), (inputs, targets), steps=3, scaler=scaler)
    assert_same(model.parameters(), mlp().parameters(), rtol=0)
    assert scaler.get_scale() == 2.0**15  # half of the first, as its documentation says


def test_one_graph_is_alive_at_a_time():
    model, alive = mlp(), []
    model[1].register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    total, kept = 0.0, []
    for micro in accumulate(sgd(model), samples(12), steps=4):
        assert all(ref() is None for ref in alive)
        inputs, targets = micro.batch
        total = total + micro.backward(F.cross_entropy(model(inputs), targets))
        kept.append(micro)  # a micro-batch holds no graph
    assert len(alive) == 4
    assert not total.requires_grad
    assert all(ref() is None for ref in alive)


def test_a_scheduler_steps_after_each_step_of_the_optimizer():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for micro in accumulate(optimizer, [torch.ones(1)] * 6, 2, scheduler=scheduler):
            micro.backward(weight.sum())
            if micro.is_last:
                rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.01, 0.001])
    assert weight.item() == pytest.approx(-0.111)


@pytest.mark.parametrize("overflows", [{0}, {1, 2}, {0, 2}, set()])
def test_the_scheduler_does_not_step_when_the_scaler_skips_the_step(overflows):
    weight = nn.Parameter(torch.ones(1))
    optimizer = Counting([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    scaler = torch.amp.GradScaler("cpu")
    options, group = {"scaler": scaler, "scheduler": scheduler}, 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's "Detected call of lr_scheduler.step()" as well
        for micro in accumulate(optimizer, [torch.ones(2)] * 8, 2, **options):
            loss = (weight * micro.batch).mean()
            micro.backward(loss * float("inf") if group in overflows else loss)
            group += micro.is_last
    assert optimizer.steps == scheduler.last_epoch == 4 - len(overflows)


def test_a_scheduler_skips_with_a_fused_optimizer_that_is_called_all_the_same():
    class Fused(Counting):
        _step_supports_amp_scaling = True  # as fused Adam: it looks at found_inf by itself

        def step(self, closure=None):
            return None if self.found_inf.item() else super().step(closure)

    weight = nn.Parameter(torch.ones(1))
    optimizer = Fused([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    options = {"scaler": torch.amp.GradScaler("cpu"), "scheduler": scheduler}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for micro in accumulate(optimizer, [torch.ones(2)] * 4, 2, **options):
            micro.backward((weight * micro.batch).mean() * (float("inf") if micro.of else 1.0))
    assert optimizer.steps == scheduler.last_epoch == 0


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential], ids=["itself", "a part"])
def test_a_ddp_model_averages_whole_gradients_once_a_group(wrap, one_rank):
    model, (inputs, targets) = mlp(), samples(12)
    targets[:2] = targets[5] = targets[8:] = -100  # the last micro-batch without targets
    wanted, _ = whole_gradients(model, inputs, targets)
    wrapped, reduced = DistributedDataParallel(model), []

    def hook(state, bucket):
        reduced.append([gradient.clone() for gradient in bucket.gradients()])
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    whole = wrap(wrapped)
    for micro in accumulate(sgd(model), (inputs, targets), 3, model=whole):
        micro.backward(F.cross_entropy(whole(micro.batch[0]), micro.batch[1]))
        assert wrapped.require_backward_grad_sync == micro.is_last
    [gradients_of_the_group] = reduced  # already corrected: ranks have other divisors
    shapes = {gradient.shape: gradient for gradient in gradients_of_the_group}
    assert_same([shapes[g.shape] for g in wanted], wanted, rtol=1e-10)
    assert wrapped.require_backward_grad_sync


def test_a_loop_left_early_leaves_ddp_synchronizing(one_rank):
    wrapped = DistributedDataParallel(mlp())
    for _ in accumulate(sgd(wrapped), samples(6), 3, model=wrapped):
        assert not wrapped.require_backward_grad_sync
        break
    assert wrapped.require_backward_grad_sync


class Sharded(nn.Linear):
    """Has FSDP's two names that matter here."""

    def reshard(self):
        raise NotImplementedError

    def set_requires_gradient_sync(self, requires):
        self.synced.append(requires)


def test_a_sharded_model_is_told_by_its_setter_and_needs_a_count_where_divisors_differ():
    model, (inputs, targets) = Sharded(5, 3).double(), samples(6)
    model.synced = []

    def train():
        for micro in accumulate(sgd(model), (inputs, targets), 3, model=model):
            micro.backward(F.cross_entropy(model(micro.batch[0]), micro.batch[1]))

    train()
    assert model.synced == [False, True, False, True]
    targets[1] = -100
    with pytest.raises(RuntimeError, match=r"sharded model.*count="):
        train()


def test_a_break_that_loses_a_whole_group_is_told():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def leaves_after(index):
        for micro in accumulate(optimizer, [torch.ones(1)] * 4, 2):
            micro.backward(weight.sum())
            if micro.index == index:
                break

    with pytest.warns(UserWarning, match="left after the last backward of a group"):
        leaves_after(1)
    assert (weight.item(), weight.grad) == (0, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leaves_after(0)


# ---- terms of the parameters alone in a sum ----


class Uncertain(nn.Module):
    """A sum weighed by a learned number, as for several tasks."""

    def __init__(self):
        super().__init__()
        self.net, self.s = mlp(), nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x):
        return self.net(x)


def squares(model):
    return 0.5 * sum(p.square().sum() for p in model.parameters())


def bayes(model):
    """The divergence of a posterior from its prior, of means and softplus of spreads."""
    mean, spread = model[0].weight, F.softplus(model[2].weight)
    return (mean.pow(2) - 1).sum() + 2 * (spread.pow(2) - 1 - 2 * (spread / 0.1).log()).sum()


def summed(z, y):
    return F.cross_entropy(z, y, reduction="sum")


PENALTIES = {
    "squares": (mlp, lambda model, z, y, of: summed(z, y) + squares(model) / of),
    "bayes": (mlp, lambda model, z, y, of: summed(z, y) + 0.1 * (bayes(model) / of)),
    "uncertainty": (
        Uncertain,
        lambda model, z, y, of: summed(z, y) * (-model.s).exp() + model.s / of,
    ),
    "of a constant": (mlp, lambda model, z, y, of: summed(z, y) / 12 + squares(model) / of),
    "all of it": (mlp, lambda model, z, y, of: (summed(z, y) + squares(model) / of) / 12),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("steps", [2, 5])
def test_a_penalty_beside_a_sum_is_exact_or_told(name, steps):
    make, loss = PENALTIES[name]
    model, (x, y) = make(), samples(12)
    whole = copy.deepcopy(model)
    loss(whole, whole(x), y, 1).backward()

    def got(of):
        for micro in accumulate(
            torch.optim.SGD(model.parameters(), lr=0.0), (x, y), steps, reduction="sum"
        ):
            micro.backward(loss(model, model(micro.batch[0]), micro.batch[1], of or micro.of))
            if micro.is_last:
                found = gradients(model)
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(got(of=None), gradients(whole), rtol=1e-9)
    model = copy.deepcopy(whole)
    with pytest.warns(UserWarning, match=rf"once per micro-batch, {steps} times.*micro\.of"):
        wrong = got(of=1)
    assert any(not torch.allclose(a, b) for a, b in zip(wrong, gradients(whole), strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum", "count": lambda batch: len(batch[1])}],
    ids=["own", "count"],
)
def test_a_penalty_is_told_also_where_the_sum_was_not(options):
    model = mlp()
    with pytest.warns(UserWarning, match="once per micro-batch, 3 times"):
        run(model, sgd(model), samples(7), steps=3, **options,
            loss=lambda z, y: summed(z, y) + squares(model))  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("factor", [0.0, torch.tensor(0.0)])
def test_a_term_times_0_changes_nothing(factor):
    model, batch = mlp(), samples(9)
    batch[1][:4] = -100
    for reduction in ("mean", "sum"):
        plain = functools.partial(F.cross_entropy, reduction=reduction)

        def loss(z, y, plain=plain):
            unused = factor * sum(p.sum() for p in model.parameters())
            return plain(z, y) + factor * z.sum() + unused

        wanted, value = whole_gradients(model, *batch, plain)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        [(got, total)] = run(model, optimizer, batch, loss=loss, steps=4, reduction=reduction)
        assert_same(got, wanted)
        torch.testing.assert_close(total, value)


# ---- losses of single samples, clamped ones, and hooks ----


def each(z, y):
    return [F.cross_entropy(a[None], b[None]) for a, b in zip(z, y, strict=True)]


def both(z, y):
    return [F.l1_loss(a, F.one_hot(b, 3) + 0.1) for a, b in zip(z, y, strict=True)]


ALONE = {
    "stack": lambda z, y: torch.stack(each(z, y)).mean(),
    "cat": lambda z, y: torch.cat([v[None] for v in each(z, y)]).mean(),
    "quotient": lambda z, y: sum(each(z, y)) / len(z),
    "weighed": lambda z, y: 0.3 * torch.stack(each(z, y)).mean(),
    "two": lambda z, y: (sum(each(z, y)) + sum(both(z, y))) / len(z),
    "topk of each": lambda z, y: torch.stack([a.topk(2).values.mean() for a in z]).mean(),
    "topk of a row": lambda z, y: z.topk(2, 1).values.mean() + z.var(-1).mean() + z.amax(1).mean(),
    "clamp": lambda z, y: F.cross_entropy(z, y).clamp(max=100),
    "bounds": lambda z, y: torch.clamp(F.cross_entropy(z, y), torch.tensor(0.0), torch.tensor(9.0)),
    "clamp_min": lambda z, y: 2 * F.cross_entropy(z, y).clamp_min(0),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ALONE)
def test_losses_of_single_samples_and_clamps_are_not_warned_of(name):
    model, batch = mlp(), samples(14)
    wanted, value = whole_gradients(model, *batch, ALONE[name])
    [(got, total)] = run(model, sgd(model), batch, loss=ALONE[name], steps=4)
    assert_same(got, wanted, rtol=1e-9)
    torch.testing.assert_close(total, value)


def test_a_sum_over_single_samples_is_a_sum():
    model, batch = mlp(), samples(12)
    loss = lambda z, y: sum(each(z, y))  # noqa: E731
    with pytest.warns(UserWarning, match="give 'sum'"):
        run(model, torch.optim.SGD(model.parameters(), lr=0.0), batch, loss=loss, steps=3)
    wanted, _ = whole_gradients(model, *batch, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [(got, _)] = run(model, sgd(model), batch, loss=loss, steps=3, reduction="sum")
    assert_same(got, wanted)


def test_a_clamp_that_cuts_is_told():
    model = mlp()
    with pytest.warns(UserWarning, match="cannot be known"):
        run(model, sgd(model), samples(8), steps=2,
            loss=lambda z, y: F.cross_entropy(z, y).clamp(max=1e-3))  # fmt: skip


HOOKS = {
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "identity": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "tuple": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: (t, t.dtype), lambda kept: kept[0]
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        lambda z, y: F.cross_entropy(z, y, reduction="sum") / (y != -100).sum(),
        lambda z, y: 2 * F.cross_entropy(z, y).clamp(max=100),
    ],
    ids=["mean", "quotient", "clamp"],
)
def test_a_divisor_is_read_where_a_hook_keeps_it_as_it_is(hooks, loss):
    model, (inputs, targets) = mlp(), samples(9)
    targets[:3] = targets[5] = -100

    def hooked(z, y):
        with HOOKS[hooks]():
            return loss(z, y)

    wanted, value = whole_gradients(model, inputs, targets, loss)
    [(got, total)] = run(model, sgd(model), (inputs, targets), loss=hooked, steps=4)
    assert_same(got, wanted)
    torch.testing.assert_close(total, value)


def test_a_hook_that_hides_the_divisor_is_named():
    def hooked(z, y):
        kept = []
        hooks = (lambda t: kept.append(t) or len(kept) - 1), kept.__getitem__
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            return F.cross_entropy(z, y)

    model = mlp()
    with pytest.warns(UserWarning, match="hidden by a saved-tensor hook"):
        run(model, sgd(model), samples(8), steps=2, loss=hooked)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss", [F.cross_entropy, lambda z, y: (z - y[:, None]).mul_(2).mean()])
def test_a_measured_loop_is_the_plain_one(loss):
    model, (inputs, targets) = mlp(), samples(9)
    targets[:3] = -100
    wanted, _ = whole_gradients(model, inputs, targets, loss)
    kept = []
    measure_peak(lambda: kept.extend(run(model, sgd(model), (inputs, targets), loss=loss, steps=4)))
    assert_same(kept[0][0], wanted)


# ---- lists of as many tensors as the batch has samples ----


def micro_batches(batch, steps=3):
    micros = accumulate(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0), batch, steps)
    for micro in micros:
        micro.backward(torch.zeros(1, requires_grad=True).sum())
        yield micro.batch


BOXES = [torch.rand(i + 1, 4) for i in range(3)]
BESIDE = {
    "records": [{"boxes": boxes} for boxes in BOXES],
    "sizes": BOXES,
    "records of one size": [{"boxes": torch.rand(3, 4)} for _ in range(3)],
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("nest", [lambda *b: b, lambda x, y: {"x": x, "y": y}], ids=["", "dict"])
def test_as_many_images_as_channels_are_still_images(beside, nest):
    images, targets = list(torch.rand(3, 3, 4, 4)), BESIDE[beside]
    for i, batch in enumerate(micro_batches(nest(images, targets))):
        x, y = batch.values() if isinstance(batch, dict) else batch
        assert len(x) == len(y) == 1
        assert x[0] is images[i]
        assert y[0] is targets[i]


@pytest.mark.parametrize(
    "batch",
    [
        (list(torch.rand(3, 3, 4, 4)), torch.arange(3)),
        (list(torch.rand(3, 3)),),
        {"x": {"y": list(torch.rand(3, 3))}},
    ],
)
def test_a_list_that_may_hold_samples_or_columns_is_refused(batch):
    with pytest.raises(ValueError, match=r"list of 3 tensors \[3, \.\.\.\].*torch.stack.*tuple\("):
        accumulate(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0), batch, 3)


def test_columns_of_another_number_than_the_samples_are_cut():
    columns = [torch.arange(4.0), torch.arange(4), torch.rand(4, 2)]
    for i, (x, y) in enumerate(micro_batches((columns, torch.arange(4)), 4)):
        assert [column.tolist() for column in x] == [
            column[i : i + 1].tolist() for column in columns
        ]
        assert y.tolist() == [i]
    for i, (x,) in enumerate(micro_batches(((torch.arange(3), torch.eye(3), torch.ones(3)),))):
        assert [len(column) for column in x] == [1, 1, 1]
        assert x[0].tolist() == [i]


def test_lists_of_samples_weigh_by_their_number():
    images, boxes = list(torch.rand(5, 4, 2)), [torch.rand(1 + i % 2, 4) for i in range(5)]
    weight = nn.Parameter(torch.zeros(1))
    weights = []
    for micro in accumulate(torch.optim.SGD([weight], lr=0.0), (images, boxes), 3):
        weights.append(micro.weight)
        assert len(micro.batch[0]) == len(micro.batch[1])
        micro.backward(weight.sum())
    assert weights == [2 / 5, 2 / 5, 1 / 5]


def test_a_loss_of_very_many_terms_is_read():
    x, parameters = torch.randn(8, 4), [nn.Parameter(torch.randn(2)) for _ in range(1500)]
    layer = nn.Linear(4, 3)
    loss = F.cross_entropy(layer(x), torch.randint(0, 3, (8,)))
    for parameter in parameters:
        loss = loss + 1e-4 * parameter.pow(2).sum()
    for _ in range(1500):
        loss = loss + F.mse_loss(layer(x), torch.zeros(8, 3))
    kinds = Counter(term.kind for term in terms_of(loss))
    assert kinds == {"mean": 1501, "parameters": 1500}


def test_a_loss_added_to_itself_has_no_end_of_terms():
    loss = F.cross_entropy(nn.Linear(4, 3)(torch.randn(8, 4)), torch.randint(0, 3, (8,)))
    for _ in range(200):
        loss = (loss + loss) / 2
    assert len(terms_of(loss)) <= 10_000
