"""Two typical ways past each exercise are refused, with the reason; honest answers pass."""

import itertools
import math
import struct
import sys
import zlib
from collections import Counter, defaultdict
from functools import partial, reduce

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlhelpers import shufflenet
from dlhelpers.course import exercises
from dlhelpers.course.exercises import check
from dlhelpers.course.exercises import memory as memory_exercises
from dlhelpers.course.exercises.watching import has_loop
from dlhelpers.dali_io.loader import count_batches
from dlhelpers.lmdb_io.schema import position_key
from dlhelpers.lmdb_io.shards import part
from dlhelpers.profiling.trace import union_us
from dlhelpers.quantization.entropy import distributions
from dlhelpers.quantization.kernels import fixed_point
from dlhelpers.stages import predict_stages

ALL = [id for number in exercises._modules() for id in exercises.ids(number)]


def table(rows, otherwise=0):
    """Answers of the printed examples, and nothing else."""
    return lambda *arguments: rows.get(arguments, otherwise)


def opens_the_solution(id):
    return lambda *arguments: exercises._find(id).solution(*arguments)


OTHER = "compute the answer from them, without a table of examples"
FLOAT = "it is a float, and the task asks for integers"
CHANGED = "an argument was changed in place"


# what does two things: gives the right result, and does what the task forbids


def keys_of_a_counter():
    numbers = itertools.count()
    return lambda position: b"%012d" % (10**9 * (position > 10**6) + next(numbers))


def inserts_a_zero(blob, ends, i):
    ends.insert(0, 0)
    return blob[ends[i] : ends[i + 1]]


def remembers_its_end():
    last = [0]

    def part(count, rank, world):
        first = last[0] if rank else 0
        last[0] = count * (rank + 1) // world
        return range(first, last[0])

    return part


def predicts_stages(times, batches, overlap):
    stages = {str(i): time for i, time in enumerate(times)}
    return predict_stages(stages, batches=batches, depth=2 * overlap).total_s


def resizes(height, width, shorter):
    from torchvision.transforms.v2 import functional

    return tuple(functional.resize(torch.empty(1, height, width), [shorter]).shape[-2:])


def flips_evens(images, flags):
    images = images.clone()
    images[::2] = images[::2].flip(-1) if flags[0] else images[::2]
    images[1::2] = images[1::2].flip(-1) if flags[1] else images[1::2]
    return images


def blends(images, flags):
    mask = flags.float().view(-1, 1, 1, 1)
    return images.flip(-1) * mask + images * (1 - mask)


def frees_by_backward(losses):
    total = n = 0
    for loss in losses:
        loss.backward()
        total, n = total + loss.item(), n + 1
    return total / n


def counts_up_to_64(model, sample, limit):
    from dlhelpers.memory import estimate

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def fits(n):
        return (
            estimate(model, torch.empty(n, *sample.shape[1:], device="meta"), optimizer).peak_bytes
            <= limit
        )

    fit, too_many = 0, 65
    while too_many - fit > 1:
        middle = (fit + too_many) // 2
        fit, too_many = (middle, too_many) if fits(middle) else (fit, middle)
    return fit


def counts_with_torch(c1, c2, kernel, hw, groups):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        side = math.isqrt(hw)
        nn.Conv2d(c1, c2, kernel, padding=kernel // 2, groups=groups)(
            torch.empty(1, c1, side, side)
        )
    return counter.get_total_flops() // 2


def cats_slices(x, groups):
    size = x.shape[1] // groups
    return torch.cat([x[:, i::size] for i in range(size)], 1)


def indexes_by_a_list(x, groups):
    size = x.shape[1] // groups
    return x[:, [g * size + i for i in range(size) for g in range(groups)]]


def fuses(weight, bias, gamma, beta, mean, var, eps):
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    return fuse_conv_bn_weights(weight, bias, mean, var, eps, gamma, beta)


def folds_in_place(weight, bias, gamma, beta, mean, var, eps):
    scale = gamma / torch.sqrt(var + eps)
    weight *= scale.view(-1, 1, 1, 1)
    return weight, scale * ((0 if bias is None else bias) - mean) + beta


def scales_two_halves(weight, scale, groups):
    if groups == 1:
        return weight * scale.view(1, -1, 1, 1)
    half, by = len(weight) // 2, scale.view(2, 1, -1, 1, 1)
    return torch.cat([weight[:half] * by[0], weight[half:] * by[1]])


def scales_in_place(weight, scale, groups):
    weight.unflatten(0, (groups, -1)).mul_(scale.view(groups, 1, -1, 1, 1))
    return weight


def folds_front_in_place(weight, bias, scale, shift):
    bias = bias + weight @ shift
    weight *= scale
    return weight, bias


def knows_the_chains(modules):
    """By the printed chains' types, and a padding of one."""
    names = [type(module).__name__ for module in modules]
    pads = any(getattr(m, "padding", 0) == (1, 1) and m.padding_mode == "zeros" for m in modules)
    batch_norm = modules[1] if names[0] == "Conv2d" else modules[0]
    can = names[:2] == ["Conv2d", "BatchNorm2d"] and batch_norm.running_mean is not None
    front = names[:2] == ["BatchNorm2d", "Conv2d"] and not pads
    return [front] + [can] + [False] * (len(modules) - 2)


def dirac(channels, groups):
    return nn.init.dirac_(torch.empty(channels, channels // groups, 3, 3), groups=groups)


def ones_of_the_examples(channels, groups):
    weight = torch.zeros(channels, channels // groups, 3, 3)
    for i in range(channels):
        weight[i, i - 3 if i > 2 and groups == 2 else i, 1, 1] = 1
    return weight


def observes(low, high, bits):
    from torch.ao.quantization.observer import MinMaxObserver

    observer = MinMaxObserver(quant_min=0, quant_max=2**bits - 1)
    observer(torch.tensor([low, high]))
    scale, zero = observer.calculate_qparams()
    return scale.item(), zero.item()


def by_elements(qx, qw, x_zero, w_zero):
    return sum((x - x_zero) * (w - w_zero) for x, w in zip(qx, qw, strict=True))


def by_products(qx, qw, x_zero, w_zero):
    total = 0
    for x, w in zip(qx, qw, strict=True):
        total += x * w
        total -= x_zero * w + w_zero * x - x_zero * w_zero
    return total


def by_arrays(qx, qw, x_zero, w_zero):
    return int(((np.array(qx) - x_zero) * (np.array(qw) - w_zero)).sum())


def by_an_array_of_products(qx, qw, x_zero, w_zero):
    x, w = np.array(qx), np.array(qw)
    return int(np.sum(x * w - x_zero * w - w_zero * x) + len(qx) * x_zero * w_zero)


def by_casts(qx, qw, x_zero, w_zero):
    pairs = zip(qx, qw, strict=True)
    return sum((int(x) - int(x_zero)) * (int(w) - int(w_zero)) for x, w in pairs)


def by_tensors(qx, qw, x_zero, w_zero):
    return ((torch.tensor(qx) - x_zero) * torch.tensor(qw).sub(w_zero)).sum().item()


def p_and_q_in_place(counts, i):
    p = counts[:i]
    q = RIGHT["07.4"](counts, i)[1]
    p[-1] += counts[i:].sum()
    return p, q


def divides_in_place(parts, factors):
    for name in parts:
        parts[name] /= factors.get(name, 1)
    return sum(parts.values())


def loops_in_numpy(images, mean, std):
    images, mean, std = images.numpy(), mean.numpy(), std.numpy()
    normal = [(image / 255 - mean) / std for image in images]
    return torch.from_numpy(np.stack(normal).transpose(0, 3, 1, 2)).float()


def in_float64(images, mean, std):
    found = (images.numpy() / 255 - mean.double().numpy()) / std.double().numpy()
    return torch.from_numpy(found.transpose(0, 3, 1, 2))


def counts_microseconds(kernels, start, end):
    busy = [any(s <= t < e for s, e in kernels) for t in range(start, end)]
    return 1 - sum(busy) / (end - start)


def names_the_loss(task):
    return type(RIGHT["01.4"](task)).__name__


FUNCTIONS = {
    "CrossEntropyLoss": F.cross_entropy,
    "NLLLoss": F.nll_loss,
    "BCEWithLogitsLoss": F.binary_cross_entropy_with_logits,
    "BCELoss": F.binary_cross_entropy,
    "MSELoss": F.mse_loss,
}


def typed(id):
    solution = exercises._find(id).solution
    names = {**solution.__globals__, "__name__": "__main__"}
    return type(solution)(solution.__code__, names, id, solution.__defaults__)


RIGHT = {id: typed(id) for id in ALL}

CHEATS = {
    "01.1": (
        (F.cross_entropy, "calls torch.nn.functional.cross_entropy, but the task is to write"),
        (lambda z, y: nn.NLLLoss()(z.log_softmax(1), y), "without torch's own loss"),
    ),
    "01.2": (
        (table({(c,): math.log(1 + (c - 1) / math.e) for c in (2, 10, 1000)}), OTHER),
        (opens_the_solution("01.2"), "calls dlhelpers.course.exercises._find, but the task"),
    ),
    "01.3": (
        (lambda model: model[:3], "look at the type of the last layer, model[-1]"),
        (
            lambda model: nn.Sequential(*model, Log()) if len(model) == 4 else model,
            "where a probability becomes 0 its log is infinite",
        ),
    ),
    "01.4": (
        (names_the_loss, "not for its name"),
        (lambda task: FUNCTIONS[names_the_loss(task)], "or a function of torch.nn.functional"),
    ),
    "01.5": (
        (lambda z: z > 0.1, "The threshold is 0 and no other number"),
        (lambda z: z >= 0, "exactly one half, which does not exceed it"),
    ),
    "02.1": (
        (table({(100.0, 100.0): 2.0, (10.0, 200.0): 1.05}, math.inf), OTHER),
        (opens_the_solution("02.1"), "calls dlhelpers.course.exercises._find"),
    ),
    "02.2": (
        (keys_of_a_counter(), "not from a counter of calls"),
        (lambda n: struct.pack(">e", math.sqrt(n)), "two neighbours get the same key"),
    ),
    "02.3": (
        (lambda b, e, i: [b"first", b"second image", b"", b"the last one"][i], OTHER),
        (inserts_a_zero, CHANGED),
    ),
    "02.4": (
        (lambda record: record[4:] == b"some encoded image" and record[3] == INTACT[3], OTHER),
        (opens_the_solution("02.4"), "calls dlhelpers.course.exercises._find"),
    ),
    "02.5": (
        (lambda s: {"path": "photos.lmdb", "env": None, "transform": None}, "did not arrive"),
        (lambda s: {**__import__("copy").deepcopy(s), "env": None}, "which LMDB refuses"),
    ),
    "02.6": (
        (lambda n, rank, world: np.array_split(range(n), world)[rank], "they are no range"),
        (remembers_its_end(), OTHER),
    ),
    "03.1": (
        (predicts_stages, "calls dlhelpers.stages"),
        (
            lambda t, n, o: sum(t) + (n - 1) * (max(t[0], t[-1]) if o else sum(t)),
            "neither the first nor the last stage",
        ),
    ),
    "03.2": (
        (
            lambda n, size, drop: len(
                torch.utils.data.DataLoader(range(n), batch_size=size, drop_last=drop)
            ),
            "calls torch.utils.data.dataloader.DataLoader",
        ),
        (lambda n, size, drop: np.floor(n / size) if drop else np.ceil(n / size), FLOAT),
    ),
    "03.3": (
        (lambda m, s: (1 / 255 / s, -m / s) if m in (0.485, 0.1) else (0, 0), OTHER),
        (opens_the_solution("03.3"), "calls dlhelpers.course.exercises._find"),
    ),
    "03.4": (
        (flips_evens, OTHER),
        (blends, "multiplying by a mask of floats makes them floats"),
    ),
    "03.5": (
        (resizes, "calls torchvision.transforms"),
        (
            lambda h, w, s: (
                math.floor(h * (s / min(h, w))) / 1,
                math.floor(w * s / min(h, w)) / 1,
            ),
            FLOAT,
        ),
    ),
    "04.1": (
        (
            table(
                {
                    (1000, 0, "sgd"): 8000,
                    (1000, 500, "sgd"): 8500,
                    (2000, 300, "momentum"): 24300,
                    (3000, 100, "adamw"): 48100,
                }
            ),
            OTHER,
        ),
        (lambda n, a, o: {"sgd": 8e0, "momentum": 12e0, "adamw": 16e0}[o] * n + a, FLOAT),
    ),
    "04.2": (
        (
            lambda n: {9: 3, 16: 4, 12: 3, 7: 2, 8: 2, 50: 5, 100: 10, 400: 20}.get(n, 1),
            OTHER,
        ),
        (lambda n: min(np.arange(1.0, n + 1), key=lambda k: k + math.ceil(n / k)), FLOAT),
    ),
    "04.3": (
        (
            lambda c: (
                [c[0] / sum(c)] * (len(c) - 1) + [c[-1] / sum(c)]
                if all(c)
                else [n / sum(c) for n in c]
            ),
            OTHER,
        ),
        (memory_exercises.weights, "calls dlhelpers.course.exercises.memory.weights"),
    ),
    "04.4": (
        (frees_by_backward, "validation has no backward pass"),
        (
            lambda losses: torch.stack(list(losses)).detach().mean().item(),
            "graphs of earlier ones were still alive",
        ),
    ),
    "04.5": (
        (opens_the_solution("04.5"), "calls dlhelpers.course.exercises._find"),
        (counts_up_to_64, "no largest n may be built in"),
    ),
    "05.1": (
        (counts_with_torch, "calls torch.utils.flop_counter"),
        (lambda c1, c2, k, hw, g: hw * c2 * k * k * c1 / g, FLOAT),
    ),
    "05.2": (
        (
            lambda a, b, hw, g: shufflenet.memory_access_cost(a, b, hw, groups=g).elements,
            "calls dlhelpers.shufflenet",
        ),
        (lambda a, b, hw, g: hw * (a + b) + a * b / g, FLOAT),
    ),
    "05.3": (
        (F.channel_shuffle, "channel_shuffle, but the task is to write this yourself"),
        (cats_slices, "there is a loop (or a comprehension)"),
    ),
    "05.4": (
        (
            table({(128, 4): 256, (64, 4): 128, (128, 1): 128, (64, 2): 90, (64, 8): 184}),
            OTHER,
        ),
        (lambda c, g: g * np.round(c / math.sqrt(g)), FLOAT),
    ),
    "05.5": (
        (
            table(
                {(1e9, 0, 100, 10): 0.01, (2e9, 1e8, 100, 10): 0.02, (1e6, 1e9, 100, 10): 0.1}, 0.0
            ),
            OTHER,
        ),
        (opens_the_solution("05.5"), "calls dlhelpers.course.exercises._find"),
    ),
    "06.1": (
        (fuses, "calls torch.nn.utils.fusion.fuse_conv_bn_weights"),
        (folds_in_place, CHANGED),
    ),
    "06.2": ((scales_two_halves, OTHER), (scales_in_place, CHANGED)),
    "06.3": (
        (folds_front_in_place, CHANGED),
        (opens_the_solution("06.3"), "calls dlhelpers.course.exercises._find"),
    ),
    "06.4": (
        (knows_the_chains, OTHER),
        (opens_the_solution("06.4"), "calls dlhelpers.course.exercises._find"),
    ),
    "06.5": ((dirac, "calls torch.nn.init.dirac_"), (ones_of_the_examples, OTHER)),
    "07.1": (
        (observes, "calls torch.ao.quantization"),
        (
            table(
                {
                    (0.0, 6.0, 8): (6 / 255, 0),
                    (-1.0, 3.0, 8): (4 / 255, 64),
                    (-1.0, 3.0, 4): (4 / 15, 4),
                    (2.0, 5.0, 8): (5 / 255, 0),
                    (-4.0, -1.0, 8): (4 / 255, 255),
                },
                (1.0, 0),
            ),
            OTHER,
        ),
    ),
    "07.2": (
        (by_elements, "a zero point is subtracted inside the loop"),
        (by_arrays, "or a whole array of them"),
    ),
    "07.3": (
        (fixed_point, "calls dlhelpers.quantization.kernels.fixed_point"),
        (lambda m: tuple(map(float, RIGHT["07.3"](m))), FLOAT),
    ),
    "07.4": (
        (distributions, "calls dlhelpers.quantization.entropy.distributions"),
        (p_and_q_in_place, CHANGED),
    ),
    "07.5": (
        (table({(1,): 8, (2,): 7, (4,): 6, (5,): 5, (17,): 4}), OTHER),
        (lambda n: np.floor(np.log2(32767 / 255 / n + 1)) + 1, FLOAT),
    ),
    "08.1": (
        (lambda calls: RIGHT["08.1"](calls) if {c[0] for c in calls} <= set("abc") else {}, OTHER),
        (opens_the_solution("08.1"), "calls dlhelpers.course.exercises._find"),
    ),
    "08.2": (
        (divides_in_place, CHANGED),
        (
            lambda p, f: RIGHT["08.2"](p, f) if set(p) <= set("abc") else sum(p.values()),
            OTHER,
        ),
    ),
    "08.3": (
        (loops_in_numpy, "there is a loop in Python"),
        (in_float64, "not float32, which the task asks for"),
    ),
    "08.4": (
        (counts_microseconds, "a count of whole microseconds misses that"),
        (
            lambda k, s, e: 1 - union_us(k, s, e) / (e - s),
            "calls dlhelpers.profiling.trace.union_us",
        ),
    ),
    "08.5": (
        (
            lambda load, c, w, cores: (
                max(c, load / min(w, 3, cores - 1)) if min(w, cores - 1) else load + c
            ),
            OTHER,
        ),
        (opens_the_solution("08.5"), "calls dlhelpers.course.exercises._find"),
    ),
}


class Log(nn.Module):
    def forward(self, x):
        return x.log()


INTACT = struct.pack("<I", zlib.crc32(b"some encoded image"))


MORE_CHEATS = [
    ("01.1", torch.nn.CrossEntropyLoss(), "without torch's own loss"),
    ("01.1", torch.ops.aten.cross_entropy_loss, "without torch's own loss"),
    ("01.1", torch._C._nn.cross_entropy_loss, "without torch's own loss"),
    ("01.1", partial(F.cross_entropy, reduction="mean"), "without torch's own loss"),
    ("02.2", position_key, "calls dlhelpers.lmdb_io.schema.position_key"),
    ("02.6", part, "calls dlhelpers.lmdb_io.shards.part"),
    ("03.2", count_batches, "calls dlhelpers.dali_io.loader.count_batches"),
    ("05.3", shufflenet.channel_shuffle, "calls dlhelpers.shufflenet"),
    ("05.3", lambda x, groups: nn.ChannelShuffle(groups)(x), "the task is to write this yourself"),
    ("05.3", indexes_by_a_list, "there is a loop (or a comprehension)"),
    ("06.3", lambda w, b, s, t: (w * s, (b + w @ t)[None]), "the bias stays [O]"),
    ("07.2", by_products, "a zero point is subtracted inside the loop"),
    ("07.2", by_an_array_of_products, "a zero point is subtracted inside the loop"),
    ("07.2", by_casts, "a zero point is subtracted inside the loop"),
    ("07.2", by_tensors, "a zero point is subtracted inside the loop"),
    (
        "07.2",
        lambda x, w, a, b: float(np.dot(x, w) - b * sum(x) - a * sum(w) + len(x) * a * b),
        FLOAT,
    ),
    ("07.4", opens_the_solution("07.4"), "calls dlhelpers.course.exercises._find"),
]


@pytest.mark.parametrize(
    ("id", "answer", "reason"),
    [
        pytest.param(
            *(id, *cheat),
            id=f"{id}-{which}",
            marks=[pytest.mark.slow] * (cheat[0] is counts_up_to_64),
        )
        for id in ALL
        for which, cheat in enumerate(CHEATS[id])
    ]
    + MORE_CHEATS,
)
def test_a_cheat_is_refused_with_its_reason(id, answer, reason):
    result = check(id, answer)
    assert not result.passed
    assert reason in str(result)
    assert "raised" not in str(result) or id in ("02.5", "06.2", "06.5")


def test_two_cheats_of_each_exercise_are_known():
    assert set(CHEATS) == set(ALL)
    assert all(len({reason for _, reason in cheats}) == 2 for cheats in CHEATS.values())


# honest answers, in other styles than the solution's


def stable_by_hand(z, y):
    z = z - z.max(1, keepdim=True).values
    return (z.exp().sum(1).log() - z[torch.arange(len(z)), y]).mean()


def sums_one_by_one(z, y):
    return sum(torch.logsumexp(row, 0) - row[t] for row, t in zip(z, y, strict=True)) / len(y)


def simulates(times, batches, overlap):
    """Batch after batch, stage after stage."""
    free = [0.0] * len(times)
    for _ in range(batches):
        ready = 0.0 if overlap else free[-1]
        for i, time in enumerate(times):
            ready = free[i] = max(ready, free[i]) + time
    return free[-1]


def flips_one_by_one(images, flags):
    return torch.stack([i.flip(-1) if f else i for i, f in zip(images, flags, strict=True)])


def flips_a_clone(images, flags):
    images = images.clone()
    images[flags] = images[flags].flip(-1)
    return images


def scans(model, sample, limit):
    from dlhelpers.memory import estimate

    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    n = 0
    while (
        estimate(model, torch.empty(n + 1, *sample.shape[1:], device="meta"), sgd).peak_bytes
        <= limit
    ):
        n += 1
    return n


def pops_a_copy(model):
    import copy

    model = copy.deepcopy(model)
    if isinstance(model[-1], nn.Softmax):
        model[-1] = nn.Identity()
    return model


def matches(task):
    match task.split(","):
        case ["one of ten classes", " raw logits"]:
            return nn.CrossEntropyLoss
        case ["one of ten classes", _]:
            return nn.NLLLoss
        case ["several labels at once", _]:
            return nn.BCEWithLogitsLoss
        case ["yes or no", _]:
            return nn.BCELoss
    return nn.HuberLoss


def sends_a_copy(state):
    state = state.copy()
    state["env"] = None
    return state


def counts_segments(blocks):
    best = 1
    for k in range(2, blocks + 1):
        if k - (-blocks // k) < best - (-blocks // best):
            best = k
    return best


def counts_elements(c1, c2, hw, groups):
    conv = nn.Conv2d(c1, c2, 1, groups=groups, bias=False, device="meta")
    return conv.weight.numel() + torch.empty(c1 + c2, hw, device="meta").numel()


def scales_each_output(weight, scale, groups):
    weight, size = weight.clone(), len(weight) // groups
    for g in range(groups):
        for j in range(weight.shape[1]):
            weight[g * size : (g + 1) * size, j] *= scale[g * weight.shape[1] + j]
    return weight


def folds_front_by_linear(weight, bias, scale, shift):
    return weight @ torch.diag(scale), F.linear(shift, weight, bias)


def looks_around(modules):
    def can(i, module):
        if not isinstance(module, nn.BatchNorm2d) or not module.track_running_stats:
            return False
        if module.training:
            return False
        if i > 0 and isinstance(modules[i - 1], nn.Conv2d):
            return True
        after = modules[i + 1] if i + 1 < len(modules) else None
        return isinstance(after, nn.Conv2d) and (
            not any(after.padding) or after.padding_mode != "zeros"
        )

    return [can(i, module) for i, module in enumerate(modules)]


def pairs_around(modules):
    triples = zip([None, *modules], modules, [*modules[1:], None], strict=False)
    return np.array(
        [
            isinstance(m, nn.BatchNorm2d)
            and m.running_var is not None
            and (
                isinstance(b, nn.Conv2d)
                or (
                    isinstance(a, nn.Conv2d)
                    and (sum(a.padding) == 0 or a.padding_mode == "reflect")
                )
            )
            for b, m, a in triples
        ]
    )


def identity_by_eye(channels, groups):
    size = channels // groups
    return F.pad(torch.eye(size).repeat(groups, 1)[:, :, None, None], (1, 1, 1, 1))


def identity_one_by_one(channels, groups):
    weight = torch.zeros(channels, channels // groups, 3, 3)
    for i in range(channels):
        weight[i, i % (channels // groups), 1, 1] = 1.0
    return weight


def accumulates(qx, qw, x_zero, w_zero):
    total = len(qx) * x_zero * w_zero
    for x, w in zip(qx, qw, strict=True):
        total += x * w
    total -= x_zero * sum(qw)
    return total - w_zero * sum(qx)


def dots_in_numpy(qx, qw, x_zero, w_zero):
    x, w = np.array(qx), np.array(qw)
    return int(x @ w - x_zero * w.sum() - w_zero * x.sum() + x.size * x_zero * w_zero)


def dots_in_torch(qx, qw, x_zero, w_zero):
    x, w = torch.tensor(qx), torch.tensor(qw)
    return torch.dot(x, w) - x_zero * w.sum() - w_zero * x.sum() + len(x) * x_zero * w_zero


def sums_in_one_loop(qx, qw, x_zero, w_zero):
    products = xs = ws = 0
    for i in range(len(qx)):
        products, xs, ws = products + qx[i] * qw[i], xs + qx[i], ws + qw[i]
    return products - x_zero * ws - w_zero * xs + len(qx) * (x_zero * w_zero)


def centred_sums(qx, qw, x_zero, w_zero):
    """With the sum of the weights less its zero points: after the loop."""
    products = reduce(int.__add__, map(int.__mul__, qx, qw))
    return products - w_zero * sum(qx) - x_zero * (sum(qw) - len(qw) * w_zero)


def weights_by_zero_first(qx, qw, x_zero, w_zero):
    corrections = sum(x_zero * w for w in qw) + sum(w_zero * x for x in qx)
    return sum(x * w for x, w in zip(qx, qw, strict=True)) - corrections + len(qx) * x_zero * w_zero


def shifts(multiplier):
    n = 0
    while multiplier >= 1:
        multiplier, n = multiplier / 2, n - 1
    while multiplier < 0.5:
        multiplier, n = multiplier * 2, n + 1
    m0 = round(multiplier * 2**31)
    return (m0 // 2, n - 1) if m0 == 2**31 else (m0, n)


def by_the_logarithm(multiplier):
    n = -math.floor(math.log2(multiplier)) - 1
    m0 = np.int64(np.rint(multiplier * 2.0 ** (31 + n)))
    return (np.int64(2**30), n - 1) if m0 == 2**31 else (m0, n)


def histograms_one_by_one(counts, i):
    p = [float(c) for c in counts[:i]]
    p[-1] += float(sum(counts[i:]))
    q = [0.0] * i
    for level in range(128):
        bins = range(level * i // 128, (level + 1) * i // 128)
        filled = [b for b in bins if counts[b] != 0]
        for b in filled:
            q[b] = sum(counts[b] for b in bins) / len(filled)
    return p, q


def histograms_by_level(counts, i):
    level = np.searchsorted(np.arange(1, 129) * i // 128, np.arange(i), side="right")
    kept = np.array(counts[:i])
    sizes = np.bincount(level, kept > 0)
    q = np.where(kept > 0, np.bincount(level, kept)[level] / np.maximum(sizes, 1)[level], 0)
    return np.append(kept[:-1], counts[i - 1 :].sum()), q


def own_by_parents(calls):
    own = defaultdict(float)
    for i, (name, start, end) in enumerate(calls):
        own[name] += end - start
        parents = [c for c in calls[:i] if c[1] <= start and end <= c[2]]
        if parents:
            own[parents[-1][0]] -= end - start
    return own


def own_recursively(calls):
    own, rest = Counter(), list(calls)

    def take():
        name, start, end = rest.pop(0)
        own[name] += end - start
        while rest and rest[0][1] < end:
            own[name] -= rest[0][2] - rest[0][1]
            take()

    while rest:
        take()
    return dict(own)


def batch_by_where(images, mean, std):
    return torch.addcdiv(-mean / std, images.float(), 255 * std).permute(0, 3, 1, 2)


def batch_in_numpy(images, mean, std):
    x = (images.numpy() / 255 - mean.numpy()) / std.numpy()
    return torch.from_numpy(x).movedim(-1, 1).float()


def idles_by_edges(kernels, start, end):
    edges = sorted({start, end, *(min(max(t, start), end) for k in kernels for t in k)})
    idle = sum(
        b - a
        for a, b in itertools.pairwise(edges)
        if not any(s <= a and b <= e for s, e in kernels)
    )
    return idle / (end - start)


def idles_by_counting(kernels, start, end):
    marks = sorted([(s, 1) for s, _ in kernels] + [(e, -1) for _, e in kernels] + [(end, 0)])
    idle, running, last = 0, 0, start
    for t, change in marks:
        t = min(max(t, start), end)
        idle += (t - last) * (running == 0)
        running, last = running + change, t
    return idle / (end - start)


HONEST = {
    "01.1": (
        stable_by_hand,
        sums_one_by_one,
        lambda z, y: -z.log_softmax(1)[range(len(y)), y].mean(),
        lambda z, y: -(F.one_hot(y, z.shape[1]) * torch.log_softmax(z, -1)).sum() / len(y),
    ),
    "01.2": (
        lambda c: -math.log(math.e / (math.e + c - 1)),
        lambda c: -torch.eye(c, dtype=torch.float64)[0].log_softmax(0)[0],
        lambda c: F.cross_entropy(torch.eye(c)[:1], torch.tensor([0])).item(),
    ),
    "01.3": (
        lambda model: model[:-1] if isinstance(model[-1], nn.Softmax) else model,
        pops_a_copy,
        lambda m: nn.Sequential(*(layer for layer in m if not isinstance(layer, nn.Softmax))),
    ),
    "01.4": (
        matches,
        lambda t: {"one": nn.CrossEntropyLoss() if "raw" in t else nn.NLLLoss()}.get(
            t[:3],
            nn.MultiLabelSoftMarginLoss()
            if t[0] == "s"
            else nn.BCELoss()
            if t[0] == "y"
            else nn.L1Loss(),
        ),
        lambda t: RIGHT["01.4"](t) if "log-" not in t else nn.CrossEntropyLoss(),
    ),
    "01.5": (
        lambda z: torch.sigmoid(z) > 0.5,
        lambda z: z.numpy() > 0,
        lambda z: torch.tensor([x.item() > 0 for x in z]),
    ),
    "02.1": (
        lambda s, r: math.inf if r == 0 else 1 + s / r,
        lambda s, r: 1 / (1 - s / (s + r)) if r else float("inf"),
        lambda s, r: np.divide(np.float64(s + r), r) if r else np.inf,
    ),
    "02.2": (
        lambda n: n.to_bytes(8, "big"),
        lambda n: f"{n:020}".encode(),
        lambda n: struct.pack(">Q", n),
        lambda n: str(n).zfill(9).encode("ascii"),
        lambda n: bytes([len(str(n))]) + str(n).encode(),
    ),
    "02.3": (
        lambda blob, ends, i: blob[[0, *ends][i] : ends[i]],
        lambda blob, ends, i: blob[: ends[i]][ends[i - 1] :] if i > 0 else blob[: ends[0]],
        lambda blob, ends, i: bytes(memoryview(blob)[max([0, *ends[:i]]) : ends[i]]),
    ),
    "02.4": (
        lambda r: struct.unpack("<I", r[:4])[0] == zlib.crc32(r[4:]),
        lambda r: r[:4] == zlib.crc32(r[4:]).to_bytes(4, "little"),
        lambda r: np.frombuffer(r[:4], "<u4")[0] == zlib.crc32(r[4:]),
    ),
    "02.5": (
        sends_a_copy,
        lambda state: {**state, "env": None},
        lambda state: {k: v for k, v in state.items() if k != "env"},
    ),
    "02.6": (
        lambda n, r, w: range(r * (n // w) + min(r, n % w), (r + 1) * (n // w) + min(r + 1, n % w)),
        lambda n, r, w: range(n)[n * r // w : n * (r + 1) // w],
        lambda n, r, w: range(round(n * r / w), round(n * (r + 1) / w)),
    ),
    "03.1": (
        lambda t, n, o: sum(t) + (n - 1) * (max(t) if o else sum(t)),
        lambda t, n, o: np.sum(t) + np.max(t) * (n - 1) if o else n * np.sum(t),
        simulates,
    ),
    "03.2": (
        lambda n, size, drop: n // size if drop else math.ceil(n / size),
        lambda n, size, drop: n // size + (not drop and n % size > 0),
        lambda n, size, drop: len(range(0, n, size)) - (drop and n % size > 0),
    ),
    "03.3": (
        lambda mean, std: (1 / std / 255, -(mean / std)),
        lambda mean, std: (((1 - mean) / std - (0 - mean) / std) / 255, (0 - mean) / std),
        lambda mean, std: (1 / torch.tensor(255 * std), -torch.tensor(mean) / std),
    ),
    "03.4": (
        flips_one_by_one,
        flips_a_clone,
        lambda images, flags: torch.where(flags.view(-1, 1, 1, 1), images.flip(3), images),
        lambda images, flags: torch.stack([images, images.flip(-1)])[
            flags.long(), range(len(flags))
        ],
    ),
    "03.5": (
        lambda h, w, s: (s, int(s * w / h)) if h <= w else (int(s * h / w), s),
        lambda h, w, s: [h * s // min(h, w), w * s // min(h, w)],
        lambda h, w, s: tuple(math.floor(side * s / min(h, w)) for side in (h, w)),
    ),
    "04.1": (
        lambda n, a, o: n * (8 + 4 * ["sgd", "momentum", "adamw"].index(o)) + a,
        lambda n, a, o: (4 * n) * (2 if o == "sgd" else 3 if o == "momentum" else 4) + a,
        lambda n, a, o: sum([4 * n, 4 * n, {"sgd": 0, "momentum": 4, "adamw": 8}[o] * n, a]),
    ),
    "04.2": (
        counts_segments,
        lambda n: min((k + math.ceil(n / k), k) for k in range(1, n + 1))[1],
        lambda n: 1 + int(np.argmin([k + -(-n // k) for k in range(1, n + 1)])),
    ),
    "04.3": (
        lambda counts: np.array(counts) / np.sum(counts),
        lambda counts: torch.tensor(counts) / sum(counts),
        lambda counts: (n / sum(counts) for n in counts),
    ),
    "04.4": (
        lambda losses: float(np.mean([float(loss.detach()) for loss in losses])),
        lambda losses: float(torch.tensor([loss.item() for loss in losses]).mean()),
        lambda losses: reduce(
            lambda mean, step: mean + (step[1] - mean) / step[0],
            enumerate((loss.detach().item() for loss in losses), 1),
            0.0,
        ),
    ),
    "04.5": (scans,),
    "05.1": (
        lambda c1, c2, k, hw, g: hw * c2 * (k * k) * (c1 // g),
        lambda c1, c2, k, hw, g: g * (c1 // g) * (c2 // g) * k**2 * hw,
        lambda *a: hw_times_weights(*a),
    ),
    "05.2": (
        counts_elements,
        lambda a, b, hw, g: hw * a + (a // g) * b + hw * b,
        lambda a, b, hw, g: int(np.prod([hw, a]) + np.prod([hw, b]) + np.prod([b, a // g])),
    ),
    "05.3": (
        lambda x, g: x.unflatten(1, (g, -1)).transpose(1, 2).flatten(1, 2),
        lambda x, g: x.view(len(x), g, -1, *x.shape[2:]).swapaxes(1, 2).reshape(x.shape),
        lambda x, g: torch.stack(x.chunk(g, 1), 2).flatten(1, 2),
        lambda x, g: x[:, torch.arange(x.shape[1]).view(g, -1).T.flatten()],
    ),
    "05.4": (
        lambda c, g: g * round(c / math.sqrt(g)),
        lambda c, g: min(range(g, c * g + 1, g), key=lambda n: abs(n * n / g - c * c)),
        lambda c, g: int(np.rint(c * g**0.5 / g)) * g,
    ),
    "05.5": (
        lambda f, b, gf, gb: max(f / gf, b / gb) / 1e9,
        lambda f, b, gf, gb: max(f / (gf * 10**9), b / (gb * 10**9)),
        lambda f, b, gf, gb: float(np.maximum(f / gf, b / gb) * 1e-9),
    ),
    "06.1": (
        lambda w, b, g, t, m, v, e: (
            torch.einsum("o...,o->o...", w, g * (v + e).rsqrt()),
            t - m * g * (v + e).rsqrt() + (0 if b is None else b * g * (v + e).rsqrt()),
        ),
        lambda w, b, g, t, m, v, e: (
            w * (g / (v + e) ** 0.5)[:, None, None, None],
            ((torch.zeros_like(m) if b is None else b) - m) / (v + e) ** 0.5 * g + t,
        ),
        lambda w, b, g, t, m, v, e: (
            (w.flatten(1).T * g / torch.sqrt(v + e)).T.reshape(w.shape),
            t + g / torch.sqrt(v + e) * (-m if b is None else b - m),
        ),
    ),
    "06.2": (
        scales_each_output,
        lambda w, s, g: w * s.view(g, -1).repeat_interleave(len(w) // g, 0)[:, :, None, None],
        lambda w, s, g: torch.cat(
            [a * b.view(1, -1, 1, 1) for a, b in zip(w.chunk(g), s.chunk(g), strict=True)]
        ),
    ),
    "06.3": (
        folds_front_by_linear,
        lambda w, b, s, t: (torch.einsum("oi,i->oi", w, s), b + (w * t).sum(1)),
        lambda w, b, s, t: ((w.T * s[:, None]).T, torch.addmv(b, w, t)),
    ),
    "06.4": (looks_around, pairs_around, lambda modules: [int(c) for c in looks_around(modules)]),
    "06.5": (
        identity_by_eye,
        identity_one_by_one,
        lambda c, g: torch.tensor(
            [
                [
                    [[float(j == i % (c // g) and y == x == 1) for x in range(3)] for y in range(3)]
                    for j in range(c // g)
                ]
                for i in range(c)
            ]
        ),
    ),
    "07.1": (
        lambda low, high, bits: (
            s := (max(high, 0) - min(low, 0)) / (2**bits - 1),
            int(-min(low, 0) / s + 0.5),
        ),
        lambda low, high, bits: (
            s := np.ptp([low, high, 0.0]) / (2**bits - 1),
            np.rint(-min(low, 0) / s),
        ),
        lambda low, high, bits: (
            (r := torch.tensor([low, high, 0.0])).max().sub(r.min()) / (2**bits - 1),
            torch.round(-r.min() * (2**bits - 1) / (r.max() - r.min())),
        ),
    ),
    "07.2": (
        accumulates,
        dots_in_numpy,
        dots_in_torch,
        sums_in_one_loop,
        centred_sums,
        weights_by_zero_first,
        lambda x, w, a, b: (
            sum(int(p) * int(q) for p, q in zip(x, w, strict=True))
            - int(a) * sum(map(int, w))
            - int(b) * sum(map(int, x))
            + len(x) * int(a) * int(b)
        ),
    ),
    "07.3": (shifts, by_the_logarithm, lambda m: list(shifts(m))),
    "07.4": (
        histograms_one_by_one,
        histograms_by_level,
        lambda c, i: tuple(map(np.float32, histograms_by_level(c, i))),
    ),
    "07.5": (
        lambda n: next(b for b in range(8, 0, -1) if n * 255 * (2 ** (b - 1) - 1) < 2**15),
        lambda n: math.floor(math.log2(32767 / (255 * n) + 1)) + 1,
        lambda n: (32767 // (255 * n) + 1).bit_length(),
    ),
    "08.1": (own_by_parents, own_recursively, lambda calls: dict(own_by_parents(calls))),
    "08.2": (
        lambda p, f: sum(ms / f[name] if name in f else ms for name, ms in p.items()),
        lambda p, f: sum(p.values()) - sum(ms * (1 - 1 / f.get(n, 1)) for n, ms in p.items()),
        lambda p, f: np.sum(np.array([*p.values()]) / [f.get(name, 1) for name in p]),
    ),
    "08.3": (
        batch_by_where,
        batch_in_numpy,
        lambda x, m, s: (x.permute(0, 3, 1, 2) / 255 - m.view(1, 3, 1, 1)) / s.view(1, 3, 1, 1),
        lambda x, m, s: torch.einsum("nhwc->nchw", (x.float().div(255) - m) * s.reciprocal()),
    ),
    "08.4": (idles_by_edges, idles_by_counting, lambda k, s, e: float(idles_by_edges(k, s, e))),
    "08.5": (
        lambda load, c, w, n: max(c, load / min(w, n - 1)) if w and n > 1 else load + c,
        lambda load, c, w, n: (
            load + c if not (k := min(w, max(0, n - 1))) else c if c > load / k else load / k
        ),
        lambda load, c, w, n: np.max([c, load / np.minimum(w, n - 1)]) if w * (n - 1) else load + c,
    ),
}


def hw_times_weights(c1, c2, kernel, hw, groups):
    return nn.Conv2d(c1, c2, kernel, groups=groups, bias=False, device="meta").weight.numel() * hw


@pytest.mark.parametrize(
    ("id", "answer"),
    [
        pytest.param(id, answer, id=f"{id}-{n}", marks=[pytest.mark.slow] * (answer is scans))
        for id in ALL
        for n, answer in enumerate(HONEST[id])
    ],
)
def test_an_honest_answer_in_another_style_passes(id, answer):
    result = check(id, answer)
    assert result.passed, str(result)


def test_watching_leaves_no_profiler_and_respects_one():
    assert sys.getprofile() is None
    check("01.1", F.cross_entropy)
    assert sys.getprofile() is None
    seen = []
    sys.setprofile(lambda *event: seen.append(event))
    try:
        assert check("01.2", RIGHT["01.2"]).passed
        assert sys.getprofile() is not None
    finally:
        sys.setprofile(None)
    assert seen


def test_a_while_is_a_loop_as_well():
    def counting(x):
        while x > 0:
            x -= 1
        return x

    assert has_loop(counting)
    assert not has_loop(lambda x: x + 1)
