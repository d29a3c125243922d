"""Each check passes its solution and tells at least three typical mistakes apart."""

import bisect
import copy
import itertools
import math
import statistics
import types
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from dlhelpers.course import exercises
from dlhelpers.course.exercises import check, hint, ids
from dlhelpers.memory import estimate

ALL = [id for number in exercises._modules() for id in ids(number)]


def typed(id):
    """The solution as a learner's own function, which it is once it has been typed in."""
    solution = exercises._find(id).solution
    names = {**solution.__globals__, "__name__": "__main__"}
    return types.FunctionType(solution.__code__, names, id, solution.__defaults__)


CAN_FOLD, CHOOSE_LOSS = typed("06.4"), typed("01.4")


def of_each(z, y):
    return torch.logsumexp(z, 1) - z.gather(1, y[:, None])[:, 0]


def no_mean(z, y):
    return of_each(z, y).sum()


def no_reduction(z, y):
    return of_each(z, y)


def overflows(z, y):
    return (z.exp().sum(1).log() - z.gather(1, y[:, None])[:, 0]).mean()


def log_of_softmax(z, y):
    return -z.softmax(1).log().gather(1, y[:, None]).mean()


def wrong_sign(z, y):
    return -of_each(z, y).mean()


def over_the_batch(z, y):
    return -z.log_softmax(0).gather(1, y[:, None]).mean()


def picks_the_largest(z, y):
    return of_each(z, z.argmax(1)).mean()


def drops_the_last_layer_always(model):
    return nn.Sequential(*copy.deepcopy(list(model))[:-1])


def keeps_the_softmax(model):
    return copy.deepcopy(model)


def drops_the_relu(model):
    return nn.Sequential(*[copy.deepcopy(m) for m in model if isinstance(m, nn.Linear)])


def changes_in_place(model):
    if isinstance(model[-1], nn.Softmax):
        del model[-1]
    return model


def chooses(**changes):
    def choose_loss(task):
        right = CHOOSE_LOSS(task)
        return {
            "several": changes.get("several", right),
            "yes": changes.get("yes", right),
            "a": changes.get("a", right),
        }.get(task.split()[0], changes.get(task.split()[-2].strip(","), right))

    return choose_loss


def unpadded(position):
    return b"%d" % position


def padded_to_four(position):
    return b"%04d" % position


def starts_at_its_own_end(blob, ends, i):
    return blob[ends[i] : ends[i + 1]]


def wraps_around(blob, ends, i):
    return blob[ends[i - 1] : ends[i]]


def needs_a_next_one(blob, ends, i):
    return blob[[0, *ends][i] : [0, *ends][i + 1]] if i + 1 < len(ends) else b""


def skips_the_empty(blob, ends, i):
    starts = [0, *ends]
    return blob[starts[i] : starts[i + 1]] or blob[starts[i + 1] : starts[i + 2]]


def crc_of_the_whole(record):
    return zlib.crc32(record) == int.from_bytes(record[:4], "little")


def big_endian(record):
    return zlib.crc32(record[4:]) == int.from_bytes(record[:4], "big")


def looks_at_three_bytes(record):
    return zlib.crc32(record[4:]).to_bytes(4, "little")[:3] == record[:3]


def adds_up(record):
    return sum(record) % 65536 == SUM_OF_THE_INTACT_RECORD


DATA = b"some encoded image"
SUM_OF_THE_INTACT_RECORD = sum(zlib.crc32(DATA).to_bytes(4, "little") + DATA)


def removes_in_place(state):
    state["env"] = None
    return state


def rounds_down(count, rank, world):
    size = count // world
    return range(rank * size, (rank + 1) * size)


def rounds_down_with_the_rest_at_the_end(count, rank, world):
    size = count // world
    return range(rank * size, count if rank == world - 1 else (rank + 1) * size)


def rounds_up(count, rank, world):
    size = -(-count // world)
    return range(min(count, rank * size), min(count, (rank + 1) * size))


def every_third(count, rank, world):
    return range(rank, count, world)


def first_decides(times, batches, overlap):
    return sum(times) + (batches - 1) * (times[0] if overlap else sum(times))


def flips_in_place(images, flags):
    images[flags] = images[flags].flip(-1)
    return images


def sums_tensors(losses):
    losses = list(losses)
    return (sum(losses) / len(losses)).item()


def adds_tensors(losses):
    total = count = 0
    for loss in losses:
        total, count = total + loss, count + 1
    return total.item() / count


def sums_twice(losses):
    return sum(loss.item() for loss in losses) / sum(1 for _ in losses)


def mean_of_numbers_as_tensor(losses):
    return torch.tensor([loss.item() for loss in losses]).mean()


def last_loss(losses):
    for loss in losses:
        last = loss.item()
    return last


def peak_of(model, sample, n):
    batch = torch.empty(n, *sample.shape[1:], device="meta")
    return estimate(model, batch, torch.optim.SGD(model.parameters(), lr=0.1)).peak_bytes


def peak_of_expanded(model, sample, n):
    batch = sample.expand(n, *sample.shape[1:])
    return estimate(model, batch, torch.optim.SGD(model.parameters(), lr=0.1)).peak_bytes


def bisects(model, sample, limit, peak=peak_of):
    return bisect.bisect_right(range(1, 1024), limit, key=lambda n: peak(model, sample, n))


def grids(steps=lambda b: 2**b - 1, zero=lambda low, s: round(-low / s), widened=True):
    def f(low, high, bits):
        if widened:
            low = min(low, 0)
        if widened is True:
            high = max(high, 0)
        scale = (high - low) / steps(bits)
        return scale, zero(low, scale)

    return f


def mantissas(multiplier):
    mantissa, exponent = math.frexp(multiplier)
    return round(mantissa * 2**31), -exponent


def mantissas_cut(multiplier):
    mantissa, n = mantissas(multiplier)
    return min(mantissa, 2**31 - 1), n


def dots(of_inputs, of_weights, of_both):
    def f(qx, qw, x_zero, w_zero):
        found = sum(a * b for a, b in zip(qx, qw, strict=True))
        found -= of_inputs * x_zero * sum(qw) + of_weights * w_zero * sum(qx)
        return found + of_both * len(qx) * x_zero * w_zero

    return f


def histograms(
    p=None, folded=False, all_bins=False, equal=False, not_zero="counts", divides_by_zero=False
):
    def f(counts, i):
        found = np.array(counts[:i], dtype=float)
        found[-1] += counts[i:].sum()
        source, q = found if folded else np.array(counts[:i], dtype=float), np.zeros(i)
        for j in range(128):
            first, last = j * i // 128, (j + 1) * i // 128
            if equal:
                first, last = j * (i // 128), (j + 1) * (i // 128)
            filled = found if not_zero == "p" else counts
            bins = [k for k in range(first, last) if all_bins or filled[k]]
            if divides_by_zero and not bins:
                q[first:last] = np.nan
            for k in bins:
                q[k] = source[first:last].sum() / len(bins)
        return (found if p is None else p(counts, i)), q

    return f


def forgets_buffers(model, sample, limit):
    def tensors(model, sample, n):
        batch = torch.empty(n, *sample.shape[1:], device="meta")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return estimate(model, batch, optimizer).tensor_bytes

    return bisects(model, sample, limit, tensors)


def goes_backward(losses):
    total, n = 0.0, 0
    for loss in losses:
        loss.backward()
        total, n = total + loss, n + 1
    return (total / n).item()


def takes_inputs_for_outputs_in_groups(c1, c2, kernel, hw, groups):
    return hw * (c1 if groups > 1 else c2) * kernel**2 * c1 // groups


def shuffles_images_alone(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def fears_any_padding_after(modules):
    can = CAN_FOLD(modules)
    for i, module in enumerate(modules[1:]):
        zeros = isinstance(module, nn.Conv2d) and module.padding != (0, 0)
        can[i] = can[i] and not (zeros and module.padding_mode == "zeros")
    return can


def needs_no_convolution(modules):
    return [
        isinstance(m, nn.BatchNorm2d)
        and not (i and isinstance(modules[i - 1], nn.ReLU))
        and not any(getattr(n, "padding", 0) == (1, 1) for n in modules[i + 1 : i + 2])
        for i, m in enumerate(modules)
    ]


def forgets_statistics(modules):
    for module in modules:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.zeros(module.num_features)
    return CAN_FOLD(modules)


def one_too_many(model, sample, limit):
    return next(n for n in itertools.count(1) if peak_of(model, sample, n) > limit)


def strictly_below(model, sample, limit):
    return next(n for n in itertools.count() if peak_of(model, sample, n + 1) >= limit)


def at_least_one(model, sample, limit):
    return max(1, bisects(model, sample, limit))


def doubles_only(model, sample, limit):
    return next(
        (n for n in (2**e for e in itertools.count()) if peak_of(model, sample, 2 * n) > limit), 0
    ) * (peak_of(model, sample, 1) <= limit)


def divides(model, sample, limit):
    return limit // peak_of(model, sample, 1)


def straight_line(model, sample, limit):
    one, two = peak_of(model, sample, 1), peak_of(model, sample, 2)
    return max(0, (limit - one) // (two - one) + 1)


def expands(model, sample, limit):
    return bisects(model, sample, limit, peak_of_expanded)


def no_division(c1, c2, kernel, hw, groups):
    return hw * c2 * kernel**2 * c1


def side_not_square(c1, c2, kernel, hw, groups):
    return hw * c2 * kernel * c1 // groups


def divides_twice(c1, c2, kernel, hw, groups):
    return hw * (c2 // groups) * kernel**2 * (c1 // groups)


def two_flops(c1, c2, kernel, hw, groups):
    return 2 * hw * c2 * kernel**2 * c1 // groups


def sums_what_is_close(flops, nbytes, gflops, gb_s):
    both = flops / gflops / 1e9, nbytes / gb_s / 1e9
    return sum(both) if max(both) < 9 * min(both) else max(both)


def shuffles_back(x, groups):
    c = x.shape[1]
    return x.unflatten(1, (c // groups, groups)).transpose(1, 2).flatten(1, 2)


def shuffles_pixels(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, w, h).transpose(1, 2).reshape(n, c, h, w).transpose(2, 3)


def folds(s=lambda g, v, e: g / torch.sqrt(v + e), b=lambda s, b, m, t: s * (b - m) + t):
    def answer(weight, bias, gamma, beta, mean, var, eps):
        scale = s(gamma, var, eps)
        old = torch.zeros_like(beta) if bias is None else bias
        return weight * scale.view(-1, 1, 1, 1), b(scale, old, mean, beta)

    return answer


def needs_a_bias(weight, bias, gamma, beta, mean, var, eps):
    return folds()(weight, bias + 0, gamma, beta, mean, var, eps)


def scales_inputs(weight, scale, groups):
    return weight * scale[: len(weight)].view(-1, 1, 1, 1)


def scales_outputs_where_counts_agree(weight, scale, groups):
    if len(weight) == len(scale):
        return weight * scale.view(1, -1, 1, 1)
    return scales_inputs(weight, scale, groups)


def scales_inputs_where_they_fit(weight, scale, groups):
    if len(weight) == len(scale):
        return weight * scale.view(-1, 1, 1, 1)
    return weight * scale[: weight.shape[1]].view(1, -1, 1, 1)


def forgets_groups(weight, scale, groups):
    return weight * scale[: weight.shape[1]].view(1, -1, 1, 1)


def sees_only_before(modules):
    return [
        isinstance(m, nn.BatchNorm2d) and i > 0 and isinstance(modules[i - 1], nn.Conv2d)
        for i, m in enumerate(modules)
    ]


def sees_both_sides(modules):
    around = [None, *modules, None]
    return [
        isinstance(m, nn.BatchNorm2d)
        and (isinstance(around[i], nn.Conv2d) or isinstance(around[i + 2], nn.Conv2d))
        for i, m in enumerate(modules)
    ]


def sees_any_padding(modules):
    around = [*modules, None]
    both = sees_both_sides(modules)
    for i in range(len(modules)):
        after = around[i + 1]
        padded = isinstance(after, nn.Conv2d) and after.padding != (0, 0)
        if padded and not (i and isinstance(modules[i - 1], nn.Conv2d)):
            both[i] = False
    return both


def ones_everywhere(channels, groups):
    weight = torch.zeros(channels, channels // groups, 3, 3)
    weight[:, :, 1, 1] = 1
    return weight


def ignores_groups(channels, groups):
    weight = torch.zeros(channels, channels // groups, 3, 3)
    for i in range(channels):
        weight[i, min(i, channels // groups - 1), 1, 1] = 1
    return weight


def owns(add_up=False, deep=False, touch=False, twice=False):
    """Own times, with a mistake switched on."""

    def f(calls):
        own, stack = {}, []
        for name, start, end in calls:
            while stack and (stack[-1][2] < start if touch else stack[-1][2] <= start):
                stack.pop()
            if not add_up:
                for above in stack if deep else stack[-1:]:
                    own[above[0]] -= end - start
            own[name] = (0 if twice else own.get(name, 0)) + end - start
            stack.append((name, start, end))
        return own

    return f


def loops_over_images(images, mean, std):
    return torch.stack([((image / 255 - mean) / std).permute(2, 0, 1) for image in images])


def forgets_overlap(kernels, start, end):
    return 1 - sum(min(e, end) - max(s, start) for s, e in kernels if s < end and e > start) / (
        end - start
    )


def merges_unsorted(kernels, start, end):
    busy, reached = 0, start
    for s, e in kernels:
        busy += max(0, min(e, end) - max(s, reached, start))
        reached = max(reached, e)
    return 1 - busy / (end - start)


def merges_unclipped(kernels, start, end):
    busy, reached = 0, float("-inf")
    for s, e in sorted(kernels):
        busy += max(0, e - max(s, reached))
        reached = max(reached, e)
    return 1 - busy / (end - start)


MISTAKES = [
    ("08.1", lambda calls: {name: end for name, _, end in calls}, "one call"),
    ("08.1", owns(add_up=True), "a call inside"),
    ("08.1", owns(deep=True), "three deep"),
    ("08.1", owns(twice=True), "the same name twice"),
    ("08.1", owns(touch=True), "calls that touch"),
    ("08.2", lambda parts, factors: sum(parts.values()) * max(factors.values()), "one part"),
    ("08.2", lambda parts, factors: sum(parts.values()) / max(factors.values()), "the rest stays"),
    ("08.2", lambda p, f: sum(ms / f[name] for name, ms in p.items()), "a part without a factor"),
    (
        "08.2",
        lambda p, f: sum(ms / (max(f.values()) if f.get(n, 1) > 1 else 1) for n, ms in p.items()),
        "two factors",
    ),
    ("08.2", lambda p, f: sum(ms / max(1, f.get(n, 1)) for n, ms in p.items()), "slower"),
    ("08.3", lambda images, mean, std: (images / 255 - mean) / std, "one image"),
    (
        "08.3",
        lambda images, mean, std: (
            (images.permute(0, 3, 1, 2) - mean[:, None, None]) / std[:, None, None]
        ),
        "one image",
    ),
    (
        "08.3",
        lambda images, mean, std: (
            ((images / 255 - mean) / std).permute(0, 3, 1, 2)
            if images.shape[2] != 3
            else (images.permute(0, 3, 1, 2) / 255 - mean) / std
        ),
        "three rows and three channels",
    ),
    ("08.3", loops_over_images, "no loop"),
    ("08.4", lambda k, s, e: sum(b - a for a, b in k) / (e - s), "one kernel"),
    ("08.4", lambda k, s, e: 1 - sum(b - a for a, b in k) / e, "a window that begins later"),
    ("08.4", forgets_overlap, "two streams at a time"),
    ("08.4", merges_unsorted, "one inside another, out of order"),
    ("08.4", merges_unclipped, "past the ends"),
    ("08.5", lambda load, compute, workers, cores: max(load, compute), "no workers"),
    ("08.5", lambda load, compute, workers, cores: load + compute, "hidden"),
    ("08.5", lambda load, compute, w, cores: compute if w else load + compute, "not hidden"),
    ("08.5", lambda l_, c, w, cores: max(l_, c) / w if w else l_ + c, "three workers"),
    ("08.5", lambda l_, c, w, cores: max(c, l_ / w) if w else l_ + c, "more workers than cores"),
    (
        "08.5",
        lambda l_, c, w, cores: max(c, l_ / max(1, min(w, cores - 1))) if w else l_ + c,
        "one core",
    ),
    ("07.1", grids(steps=lambda b: 2**b), "from zero"),
    ("07.1", grids(zero=lambda low, s: 0), "both signs"),
    ("07.1", grids(zero=lambda low, s: -low / s), "both signs"),
    ("07.1", grids(steps=lambda b: 255), "fewer bits"),
    ("07.1", grids(widened=False), "a range without zero"),
    ("07.1", grids(widened="up"), "negative values alone"),
    ("07.2", lambda x, w, a, b: sum(x) * sum(w), "no zero points"),
    ("07.2", dots(0, 1, 1), "of the inputs"),
    ("07.2", dots(1, 0, 1), "of the weights"),
    ("07.2", dots(1, 1, 0), "of both"),
    ("07.3", lambda m: (round(m * 2**31), 0), "one quarter"),
    ("07.3", lambda m: (2**30, 1 - math.frexp(m)[1] - 1), "no power of two"),
    ("07.3", lambda m: (int(math.frexp(m)[0] * 2**31), -math.frexp(m)[1]), "no power of two"),
    ("07.3", lambda m: (round(math.frexp(m)[0] * 2**31), abs(math.frexp(m)[1])), "above one"),
    (
        "07.3",
        lambda m: (round(math.frexp(m)[0] * 2**31), -math.frexp(m)[1]),
        "rounded up to the next power",
    ),
    ("07.4", histograms(p=lambda c, i: c[:i]), "P"),
    ("07.4", histograms(folded=True), "two bins a level"),
    ("07.4", histograms(all_bins=True), "empty bins"),
    ("07.4", histograms(equal=True), "levels of unequal width"),
    ("07.5", lambda n: 7, "one product"),
    ("07.5", lambda n: 8, "two products"),
    ("07.5", lambda n: 9 - n, "four products"),
    ("07.5", lambda n: 8 - int(math.log2(n)), "five and seventeen"),
    ("07.5", lambda n: 8 - math.ceil(math.log2(n)), "five and seventeen"),
    ("07.4", histograms(not_zero="p"), "the last kept bin is empty"),
    ("07.4", histograms(divides_by_zero=True), "an empty level"),
    ("07.3", mantissas_cut, "rounded up to the next power"),
    ("07.3", lambda m: (mantissas(m)[0], math.frexp(m)[1]), "one quarter"),
    ("06.1", folds(s=lambda g, v, e: g / (v + e)), "only scaled"),
    ("06.1", folds(b=lambda s, b, m, t: t + 0 * b), "only shifted"),
    ("06.1", folds(b=lambda s, b, m, t: s * b + m + t), "only shifted"),
    ("06.1", folds(b=lambda s, b, m, t: b - s * m + t), "old bias"),
    ("06.1", folds(s=lambda g, v, e: g / (torch.sqrt(v) + e)), "tiny variance"),
    ("06.1", folds(s=lambda g, v, e: g / torch.sqrt(v)), "tiny variance"),
    ("06.1", folds(s=lambda g, v, e: g / torch.sqrt(v + e.__class__(1e-5))), "no bias"),
    ("06.1", needs_a_bias, "no bias"),
    ("06.2", lambda w, s, g: w, "equal channels"),
    ("06.2", scales_inputs, "equal channels"),
    ("06.2", scales_inputs_where_they_fit, "equal channels"),
    ("06.2", lambda w, s, g: w * s[: w.shape[1]].view(1, -1, 1, 1), "groups"),
    ("06.2", scales_outputs_where_counts_agree, "one group"),
    ("06.2", forgets_groups, "groups"),
    ("06.3", lambda w, b, s, t: (w * s[: len(w)].view(-1, 1), b), "only scaled"),
    ("06.3", lambda w, b, s, t: (w * s, b), "shifted"),
    ("06.3", lambda w, b, s, t: (w * s, b + (w * s) @ t), "shifted"),
    ("06.3", lambda w, b, s, t: (w * s, w @ t), "old bias"),
    (
        "06.4",
        lambda modules: [isinstance(m, nn.BatchNorm2d) for m in modules],
        "an activation between",
    ),
    ("06.4", lambda modules: [False] * len(modules), "after a convolution"),
    ("06.4", sees_only_before, "in front"),
    ("06.4", sees_both_sides, "zeros of padding"),
    ("06.4", sees_any_padding, "padding by reflection"),
    ("06.4", fears_any_padding_after, "between two convolutions"),
    ("06.4", needs_no_convolution, "nothing to fold into"),
    ("06.4", forgets_statistics, "no running statistics"),
    ("06.5", lambda c, g: torch.ones(c, c // g, 3, 3), "one channel"),
    ("06.5", ones_everywhere, "four channels"),
    ("06.5", ignores_groups, "groups"),
    ("05.1", two_flops, "1x1"),
    ("05.1", side_not_square, "3x3"),
    ("05.1", no_division, "groups"),
    ("05.1", divides_twice, "groups"),
    ("05.1", lambda a, b, k, hw, g: hw * k * k * a * a // g, "1x1"),
    ("05.1", takes_inputs_for_outputs_in_groups, "groups that change the channels"),
    ("05.2", lambda c1, c2, hw, g: hw * (c1 + c2), "equal channels"),
    ("05.2", lambda c1, c2, hw, g: 2 * hw * c1 + c1 * c2 // g, "unequal channels"),
    ("05.2", lambda c1, c2, hw, g: hw * (c1 + c2) + c1 * c2, "groups"),
    ("05.2", lambda c1, c2, hw, g: (hw * (c1 + c2) + c1 * c2) // g, "groups"),
    (
        "05.2",
        lambda a, b, hw, g: hw * (a + b) + (a * a // g if g > 1 else a * b),
        "groups that change the channels",
    ),
    ("05.3", lambda x, groups: x, "two groups of two"),
    ("05.3", lambda x, groups: x.flip(1), "two groups of two"),
    ("05.3", shuffles_back, "three groups of two"),
    ("05.3", shuffles_images_alone, "sequences"),
    ("05.3", lambda x, groups: shuffles_back(x, x.shape[1] // 2), "three groups of two"),
    ("05.3", shuffles_pixels, "two groups of two"),
    (
        "05.3",
        lambda x, groups: torch.stack(x.chunk(groups, 1), 2).flatten(1, 2)[..., :3],
        "unequal height and width",
    ),
    ("05.4", lambda c, g: c * g, "four groups"),
    ("05.4", lambda c, g: g * round(2 * c / g), "one group"),
    (
        "05.4",
        lambda c, g: int(c * math.sqrt(g)) // g * g if g > 2 else round(c * math.sqrt(g)),
        "no whole root",
    ),
    ("05.4", lambda c, g: int(c * math.sqrt(g)), "a multiple of the groups"),
    ("05.5", lambda f, b, p, w: f / p / 1e9 + b / w / 1e9, "side by side"),
    ("05.5", lambda f, b, p, w: f / p / 1e9, "memory decides"),
    ("05.5", lambda f, b, p, w: max(f / p, b / w), "units"),
    (
        "05.5",
        sums_what_is_close,
        "side by side",
    ),
    ("02.1", lambda s, r: s / r, "equal shares"),
    ("02.1", lambda s, r: s / (s + r), "equal shares"),
    ("02.1", lambda s, r: 1 + min(s / r, 1) ** 2 if r else 1.0, "decoding dominates"),
    ("02.1", lambda s, r: (s + r) / r, "nothing but the store"),
    ("02.2", str, "bytes"),
    ("02.2", bytes, "bytes"),
    ("02.2", unpadded, "nine before ten"),
    ("02.2", padded_to_four, "a million images"),
    ("02.3", starts_at_its_own_end, "the second image"),
    ("02.3", wraps_around, "the first image"),
    ("02.3", needs_a_next_one, "the last image"),
    ("02.3", skips_the_empty, "an empty image"),
    ("02.4", crc_of_the_whole, "an intact record"),
    ("02.4", big_endian, "an intact record"),
    ("02.4", lambda record: 1, "an intact record"),
    ("02.4", lambda record: True, "one bit of the data flipped"),
    ("02.4", looks_at_three_bytes, "one bit of the checksum flipped"),
    ("02.4", adds_up, "two bytes swapped"),
    ("02.5", lambda state: dict(state), "the environment"),
    ("02.5", lambda state: {}, "all the rest"),
    ("02.5", removes_in_place, "the parent"),
    ("02.6", lambda count, rank, world: range(count), "ten images, two ranks"),
    ("02.6", rounds_down, "seven images, three ranks"),
    ("02.6", every_third, "neighbours stay together"),
    ("02.6", rounds_down_with_the_rest_at_the_end, "equal work"),
    ("02.6", rounds_up, "equal work"),
    ("03.1", lambda times, n, overlap: sum(times), "one after the other"),
    ("03.1", lambda times, n, overlap: n * sum(times), "the slowest stage is the first"),
    ("03.1", lambda t, n, overlap: n * (max(t) if overlap else sum(t)), "a single batch"),
    ("03.1", first_decides, "the slowest stage is the last"),
    ("03.2", lambda count, size, drop: count // size + 1, "an even number"),
    ("03.2", lambda count, size, drop: count // size, "a rest"),
    ("03.2", lambda count, size, drop: -(-count // size), "a rest is dropped"),
    ("03.2", lambda count, size, drop: round(count / size), "a rest"),
    (
        "03.2",
        lambda c, size, drop: max(1, c // size if drop else -(-c // size)),
        "fewer than a batch",
    ),
    ("03.3", lambda mean, std: (1 / std, -mean / std), "white"),
    ("03.3", lambda mean, std: (1 / (255 * std), -mean / (255 * std)), "black"),
    ("03.3", lambda mean, std: (1 / (255 * std), -mean), "black"),
    ("03.3", lambda mean, std: (1 / (255 * 0.229), -0.485 / 0.229), "another channel"),
    ("03.4", lambda images, flags: images.flip(-1), "some"),
    ("03.4", lambda images, flags: images.flip(-1) if flags.any() else images, "some"),
    ("03.4", lambda images, flags: images.flip(-2), "all"),
    ("03.4", flips_in_place, "the batch that was given"),
    ("03.5", lambda h, w, shorter: (shorter, shorter), "wider than high"),
    (
        "03.5",
        lambda h, w, s: (round(h * s / min(h, w)), round(w * s / min(h, w))),
        "wider than high",
    ),
    ("03.5", lambda h, w, s: (s, w * s // h), "higher than wide"),
    (
        "03.5",
        lambda h, w, s: tuple(sorted((h * s // min(h, w), w * s // min(h, w)))),
        "higher than wide",
    ),
    (
        "03.5",
        lambda h, w, s: (h * min(s, h, w) // min(h, w), w * min(s, h, w) // min(h, w)),
        "scaled up",
    ),
    (
        "04.1",
        lambda n, a, o: (4 + {"sgd": 0, "momentum": 4, "adamw": 8}[o]) * n + a,
        "no activations",
    ),
    (
        "04.1",
        lambda n, a, o: (2 + {"sgd": 0, "momentum": 1, "adamw": 2}[o]) * n + a,
        "no activations",
    ),
    (
        "04.1",
        lambda n, a, o: 4 * ((2 + {"sgd": 0, "momentum": 1, "adamw": 2}[o]) * n + a),
        "plain SGD",
    ),
    ("04.1", lambda n, a, o: 4 * n + max(4 * n, a), "plain SGD"),
    ("04.1", lambda n, a, o: (8 + {"sgd": 0, "momentum": 0, "adamw": 8}[o]) * n + a, "momentum"),
    ("04.1", lambda n, a, o: (8 + 4 * (o != "sgd")) * n + a, "AdamW"),
    ("04.2", lambda blocks: blocks // 2, "a square"),
    ("04.2", math.sqrt, "no square"),
    ("04.2", lambda blocks: 4 if blocks == 16 else blocks // 3, "one block"),
    ("04.2", lambda blocks: math.ceil(math.sqrt(blocks)), "no square"),
    ("04.2", lambda b: min(range(b, 0, -1), key=lambda k: k + -(-b // k)), "no square"),
    ("04.2", lambda b: min(range(1, b + 1), key=lambda k: k + b / k), "a longest segment"),
    ("04.2", lambda b: min(range(1, b + 1), key=lambda k: k + b // k), "a square"),
    ("04.2", lambda blocks: round(math.sqrt(blocks)), "a longest segment"),
    ("04.2", lambda blocks: math.isqrt(blocks), "three equals"),
    ("04.2", lambda b: min(range(1, min(10, b + 1)), key=lambda k: k + -(-b // k)), "a long chain"),
    ("04.3", lambda counts: [1.0] * len(counts), "equal parts"),
    ("04.3", lambda counts: [n / max(counts) for n in counts], "equal parts"),
    ("04.3", lambda counts: [1 / sum(counts)] * len(counts), "equal parts"),
    ("04.3", lambda c: [n / max(c) / len(c) for n in c], "they sum to 1"),
    ("04.3", lambda counts: [1 / len(counts)] * len(counts), "a smaller last one"),
    ("04.3", lambda c: [n / sum(c) for n in c if n], "no token in one"),
    ("04.3", lambda c: [max(n, 1) / sum(max(n, 1) for n in c) for n in c], "no token in one"),
    ("04.4", lambda losses: sum(loss.item() for loss in losses), "the mean"),
    ("04.4", last_loss, "the mean"),
    ("04.4", lambda losses: sum(loss.item() for loss in losses) / len(losses), "a generator"),
    ("04.4", sums_twice, "a generator"),
    ("04.4", lambda losses: torch.stack(list(losses)).mean(), "a number"),
    ("04.4", mean_of_numbers_as_tensor, "a number"),
    ("04.4", lambda losses: torch.stack(list(losses)).mean().item(), "one graph at a time"),
    ("04.4", sums_tensors, "one graph at a time"),
    ("04.4", adds_tensors, "one graph at a time"),
    ("04.4", goes_backward, "no backward pass"),
    ("04.5", one_too_many, "not even one"),
    ("04.5", at_least_one, "not even one"),
    ("04.5", divides, "met exactly"),
    ("04.5", strictly_below, "met exactly"),
    ("04.5", doubles_only, "between powers of two"),
    ("04.5", straight_line, "the peak moves"),
    ("04.5", forgets_buffers, "buffers inside of kernels"),
    ("04.5", expands, "a real step"),
    ("01.1", no_mean, "four samples"),
    ("01.1", no_reduction, "one number"),
    ("01.1", overflows, "huge logits"),
    ("01.1", log_of_softmax, "huge logits"),
    ("01.1", wrong_sign, "one sample"),
    ("01.1", over_the_batch, "one sample"),
    ("01.1", picks_the_largest, "one sample"),
    ("01.2", lambda c: 0.0, "2 classes"),
    ("01.2", math.log, "2 classes"),
    ("01.2", lambda c: math.log(1 + c / math.e), "2 classes"),
    ("01.2", lambda c: math.log(1 + 1 / math.e), "10 classes"),
    ("01.2", lambda c: math.log(1 + min(c - 1, 9) / math.e), "1000 classes"),
    ("01.3", drops_the_last_layer_always, "a sound model"),
    ("01.3", keeps_the_softmax, "what the loss sees"),
    ("01.3", drops_the_relu, "what the loss sees"),
    ("01.3", changes_in_place, "the original"),
    ("01.4", chooses(several=nn.CrossEntropyLoss()), "several labels at once, raw logits"),
    ("01.4", chooses(yes=nn.BCEWithLogitsLoss()), "yes or no, probability"),
    ("01.4", chooses(a=nn.CrossEntropyLoss()), "a house's price, no activation"),
    ("01.4", chooses(raw=nn.NLLLoss()), "one of ten classes, raw logits"),
    ("01.5", lambda z: z > 0.5, "a small positive logit"),
    ("01.5", lambda z: z.sigmoid().sigmoid() > 0.5, "clear cases"),
    ("01.5", lambda z: z < 0, "clear cases"),
    ("01.5", lambda z: (z > 0).float(), "truth values"),
]


@pytest.mark.parametrize("id", ALL)
def test_the_solution_passes(id):
    result = check(id, typed(id))
    assert result.passed, str(result)


@pytest.mark.parametrize(
    ("id", "answer", "case"),
    [pytest.param(*row, marks=[pytest.mark.slow] * (row[1] is expands)) for row in MISTAKES],
)
def test_the_mistake_is_named(id, answer, case):
    result = check(id, answer)
    assert result.failed == case
    assert len(result.message) > 30
    assert case in str(result)


@pytest.mark.parametrize(
    ("id", "answer"),
    [
        ("04.3", lambda counts: torch.tensor(counts) / sum(counts)),
        ("04.4", lambda losses: statistics.fmean(map(torch.Tensor.item, losses))),
        ("04.4", lambda losses: statistics.fmean([loss.detach().item() for loss in losses])),
        pytest.param("04.5", bisects, marks=pytest.mark.slow),
    ],
)
def test_another_right_answer_passes(id, answer):
    result = check(id, answer)
    assert result.passed, str(result)


@pytest.mark.parametrize("id", ALL)
def test_at_least_three_mistakes_of_each_exercise_are_told_apart(id):
    cases = {case for exercise, _, case in MISTAKES if exercise == id}
    assert len(cases) >= 3


@pytest.mark.parametrize("id", ALL)
@pytest.mark.parametrize("blank", [None, ..., lambda *a: None, lambda *a: ...])
def test_a_blank_is_no_mistake(id, blank):
    result = check(id, blank)
    assert not result.attempted
    assert not result.passed
    assert "not attempted yet" in str(result)


def test_an_answer_that_raises_is_told_so():
    def broken(logits, targets):
        raise KeyError("oops")

    result = check("01.1", broken)
    assert "it raised KeyError: 'oops'" in result.message
    assert check("01.1", 42).failed == "one number"
    assert check("01.3", lambda model: "a string").failed == "what the loss sees"


def test_mutating_the_arguments_spoils_no_other_case():
    def mutating(logits, targets):
        result = of_each(logits, targets).mean()
        logits.zero_()
        targets.zero_()
        return result

    assert check("01.1", mutating).passed
    assert check("01.1", typed("01.1")).passed


def test_log_softmax_in_place_of_softmax_is_right_too():
    def swap(model):
        last = (
            nn.LogSoftmax(dim=1) if isinstance(model[-1], nn.Softmax) else copy.deepcopy(model[-1])
        )
        return nn.Sequential(*copy.deepcopy(list(model))[:-1], last)

    assert check("01.3", swap).passed


def test_hints_are_counted_and_grow_no_solution():
    assert hint("01.1").startswith("1 of 3")
    with pytest.raises(ValueError, match="hints 1 to 3, got 4"):
        hint("01.1", 4)
    with pytest.raises(ValueError, match=r"no exercise '09.9'; there are 01.1"):
        hint("09.9")


def test_checking_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    check("01.3", typed("01.3"))
    assert torch.rand(1) == expected
