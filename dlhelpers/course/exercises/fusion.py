"""Exercises of notebook 06: BatchNorm after and before a layer, transposed layers, the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlhelpers.course.exercises import Case, Exercise
from dlhelpers.course.exercises.watching import unchanged, unseen

__all__ = ["EXERCISES"]


def fold(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of one convolution that does both: s W and s b + beta - s mean."""
    s = gamma / torch.sqrt(var + eps)
    old = 0.0 if bias is None else bias
    return weight * s.view(-1, 1, 1, 1), s * (old - mean) + beta


def _folds(
    eps: float = 1e-5,
    bias: bool = True,
    shape: tuple[int, ...] = (4, 3, 3, 3),
    **given: float,
) -> Callable[[Any], bool]:
    """Compare with the convolution and BatchNorm one after the other, in float64."""

    def test(f: Any) -> bool:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        n = shape[0]
        x, weight, old = draw(2, shape[1], 6, 6), draw(*shape), draw(n) if bias else None
        tensors = {"gamma": draw(n), "beta": draw(n), "mean": draw(n), "var": draw(n).abs() + 0.1}
        for name, value in given.items():
            tensors[name] = torch.full((n,), value, dtype=torch.float64)
        z = F.conv2d(x, weight, old)
        gamma, beta, mean, var = tensors.values()
        gamma, beta, mean, var = (t.view(-1, 1, 1) for t in (gamma, beta, mean, var))
        wanted = gamma * (z - mean) / torch.sqrt(var + eps) + beta  # torch 2.11 refuses an eps of 0
        new_weight, new_bias = f(weight.clone(), old, *tensors.values(), eps)
        found = F.conv2d(x, new_weight, new_bias)
        return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)

    return test


def scale_transposed(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """Return the weight [C_in, C_out / groups, ...] with each output channel scaled."""
    grouped = weight.unflatten(0, (groups, -1))
    by_output = scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (grouped * by_output).flatten(0, 1)


def _scales(c1: int, c2: int, groups: int) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(c1, c2 // groups, 3, 3, generator=generator, dtype=torch.float64)
        scale = torch.rand(c2, generator=generator, dtype=torch.float64) + 0.5
        x = torch.randn(2, c1, 5, 5, generator=generator, dtype=torch.float64)
        wanted = F.conv_transpose2d(x, weight, groups=groups) * scale.view(1, -1, 1, 1)
        found = F.conv_transpose2d(x, f(weight.clone(), scale, groups), groups=groups)
        return torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)

    return test


def fold_front(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear layer equal to ``W (s z + t) + b``."""
    return weight * scale, bias + weight @ shift


def _folds_front(
    shift_by: float, bias_by: float, outs: int = 3, ins: int = 5
) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(outs, ins, generator=generator, dtype=torch.float64)
        bias = bias_by * torch.randn(outs, generator=generator, dtype=torch.float64)
        scale = torch.rand(ins, generator=generator, dtype=torch.float64) + 0.5
        shift = shift_by * torch.randn(ins, generator=generator, dtype=torch.float64)
        z = torch.randn(4, ins, generator=generator, dtype=torch.float64)
        new_weight, new_bias = f(weight.clone(), bias, scale, shift)
        wanted = F.linear(scale * z + shift, weight, bias)
        found = F.linear(z, new_weight, new_bias)
        is_bias = new_bias.shape == bias.shape  # [1, O] would be added just the same
        return is_bias and torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)

    return test


def can_fold(modules: list[nn.Module]) -> list[bool]:
    """Say of each module in an eval-mode chain whether it is a BatchNorm2d that can be folded.

    After a convolution it can, whatever comes next; in front of one it can if that pads with no
    zeros; without running statistics it cannot.
    """
    found = []
    for i, module in enumerate(modules):
        before = modules[i - 1] if i else None
        after = modules[i + 1] if i + 1 < len(modules) else None
        follows = isinstance(before, nn.Conv2d)
        front = isinstance(after, nn.Conv2d) and (
            after.padding_mode != "zeros" or after.padding in ((0, 0), "valid")
        )
        is_fixed = isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
        found.append(is_fixed and (follows or front))
    return found


def _says(make: Callable[[], list[nn.Module]], wanted: list[bool]) -> Callable[[Any], bool]:
    return lambda f: [bool(answer) for answer in f([m.eval() for m in make()])] == wanted


def identity_kernel(channels: int, groups: int) -> Tensor:
    """Return the weight [C, C / groups, 3, 3] of a 3x3 convolution that changes nothing."""
    weight = torch.zeros(channels, channels // groups, 3, 3)
    rows = torch.arange(channels)
    weight[rows, rows % (channels // groups), 1, 1] = 1
    return weight


def _changes_nothing(channels: int, groups: int) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        x = torch.arange(2.0 * channels * 20).sin().view(2, channels, 4, 5)
        weight = f(channels, groups).to(x.dtype)
        return torch.equal(F.conv2d(x, weight, padding=1, groups=groups), x)

    return test


def _long_chain() -> list[nn.Module]:
    return [
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 4, 3, padding=(0, 1)),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 5, padding=2),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
    ]


EXERCISES = (
    Exercise(
        id="06.1",
        title="Fold BatchNorm into a convolution",
        task="Write fold(weight, bias, gamma, beta, mean, var, eps) -> (weight, bias): weight "
        "[O, I, kH, kW], the rest [O]; bias may be None.",
        cases=(
            Case(
                "no bias",
                "bias is None: the result has one all the same, here of zeros",
                _folds(eps=0.0, bias=False, gamma=1.0, beta=0.0, mean=0.0, var=1.0),
            ),
            Case(
                "only scaled",
                "beta 0, mean 0 and no bias: each output channel is scaled by gamma / sqrt(var + "
                "eps), which is dimension 0 of the weight",
                _folds(eps=0.0, bias=False, beta=0.0, mean=0.0),
            ),
            Case(
                "only shifted",
                "gamma 1 and var 1, no bias: the mean is subtracted and beta added",
                _folds(bias=False, gamma=1.0, var=1.0, eps=0.0),
            ),
            Case(
                "old bias",
                "a bias of its own: it goes through BatchNorm as well, is centred and scaled",
                _folds(eps=0.0),
            ),
            Case(
                "tiny variance",
                "var 0 and eps 1e-3: eps is added under the root, not outside it, and nothing is "
                "divided by zero",
                _folds(eps=1e-3, var=0.0),
            ),
            unseen(_folds(shape=(3, 5, 1, 3)), _folds(eps=1e-2, bias=False, shape=(6, 2, 2, 6))),
            unchanged(lambda: (torch.ones(2, 3, 3, 3), *torch.arange(1.0, 11).view(5, 2), 0.1)),
        ),
        hints=(
            "Write BatchNorm as s z + t. What are s and t?",
            "Put z = W x + b into it. What is multiplied by x, and what is not?",
        ),
        solution=fold,
        by_hand=("dlhelpers.*", "torch.nn.utils.fusion.*"),
    ),
    Exercise(
        id="06.2",
        title="The axis of a transposed convolution",
        task="Write scale_transposed(weight, scale, groups): weight [C_in, C_out / groups, kH, kW] "
        "with each of the C_out output channels scaled.",
        cases=(
            Case(
                "equal channels",
                "4 to 4 channels: scaling dimension 0 has the right shape and is wrong, which is "
                "why nobody notices; outputs lie on dimension 1",
                _scales(4, 4, 1),
            ),
            Case(
                "one group",
                "3 to 5 channels: dimension 1 of the weight has the 5 outputs",
                _scales(3, 5, 1),
            ),
            Case(
                "groups",
                "4 to 6 channels in 2 groups: dimension 1 has 3 entries, the first group's for the "
                "first two inputs, the second group's for the others",
                _scales(4, 6, 2),
            ),
            unseen(_scales(6, 3, 3), _scales(4, 8, 4), _scales(2, 2, 1)),
            unchanged(lambda: (torch.ones(4, 3, 3, 3), torch.arange(1.0, 7), 2)),
        ),
        hints=(
            "Which inputs does output channel 4 of 6 see, in 2 groups?",
            "unflatten dimension 0 into (groups, C_in / groups): each group has its scales.",
        ),
        solution=scale_transposed,
        by_hand=("dlhelpers.*", "torch.nn.utils.fusion.*"),
    ),
    Exercise(
        id="06.3",
        title="BatchNorm in front",
        task="Write fold_front(weight, bias, scale, shift) -> (weight, bias) of a linear layer "
        "equal to W (scale * z + shift) + b.",
        cases=(
            Case(
                "only scaled",
                "shift 0: each input is scaled, so each column of the weight; the bias stays [O]",
                _folds_front(0.0, 0.0),
            ),
            Case(
                "shifted",
                "a shift: it goes through all weights, W times shift, to the bias",
                _folds_front(1.0, 0.0),
            ),
            Case(
                "old bias", "the old bias stays as it is, and is not scaled", _folds_front(1.0, 1.0)
            ),
            unseen(_folds_front(1.0, 1.0, 4, 4), _folds_front(2.0, -1.0, 1, 7)),
            unchanged(lambda: (torch.ones(2, 3), torch.ones(2), torch.arange(3.0), torch.ones(3))),
        ),
        hints=(
            "Multiply W (s z + t) + b out. Which part has no z?",
            "Which dimension of the weight belongs to the inputs?",
        ),
        solution=fold_front,
        by_hand=("dlhelpers.*", "torch.nn.utils.fusion.*"),
    ),
    Exercise(
        id="06.4",
        title="Which BatchNorm can go? (predict, then write)",
        task="Write can_fold(modules): for each module of a chain in eval mode, whether it is a "
        "BatchNorm2d that can be folded into a Conv2d beside it.",
        cases=(
            Case(
                "after a convolution",
                "convolution, BatchNorm, ReLU: the BatchNorm can",
                _says(
                    lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()], [False, True, False]
                ),
            ),
            Case(
                "an activation between",
                "convolution, ReLU, BatchNorm: ReLU is not linear, nothing passes through it",
                _says(lambda: [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)], [False] * 3),
            ),
            Case(
                "in front",
                "BatchNorm, convolution without padding: it can",
                _says(lambda: [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)], [True, False]),
            ),
            Case(
                "nothing to fold into",
                "MaxPool2d, BatchNorm, ReLU: no convolution beside it",
                _says(lambda: [nn.MaxPool2d(2), nn.BatchNorm2d(3), nn.ReLU()], [False] * 3),
            ),
            Case(
                "zeros of padding",
                "BatchNorm, convolution that pads with zeros: those zeros come after the "
                "BatchNorm, and must stay zeros (conv.padding is a tuple, such as (1, 1))",
                _says(lambda: [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)], [False, False]),
            ),
            Case(
                "padding by reflection",
                "the same with padding_mode='reflect': what is padded has been through BatchNorm",
                _says(
                    lambda: [
                        nn.BatchNorm2d(3),
                        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
                    ],
                    [True, False],
                ),
            ),
            Case(
                "between two convolutions",
                "convolution, BatchNorm, convolution that pads with zeros: it is folded into the "
                "first one, and the second does not matter",
                _says(
                    lambda: [
                        nn.Conv2d(3, 4, 3),
                        nn.BatchNorm2d(4),
                        nn.Conv2d(4, 4, 3, padding=1),
                    ],
                    [False, True, False],
                ),
            ),
            Case(
                "no running statistics",
                "track_running_stats=False: it uses the batch's mean in eval mode too, which no "
                "weight knows",
                _says(
                    lambda: [
                        nn.Conv2d(3, 4, 3),
                        nn.BatchNorm2d(4, track_running_stats=False),
                    ],
                    [False, False],
                ),
            ),
            unseen(
                _says(_long_chain, [i in (2, 7, 9) for i in range(10)]),
                _says(lambda: [nn.BatchNorm2d(2), nn.Conv2d(2, 2, 5, padding=2)], [False] * 2),
            ),
        ),
        hints=(
            "Look at what comes before a BatchNorm, then at what comes after it.",
            "When does a convolution see a number that did not come out of the BatchNorm?",
        ),
        solution=can_fold,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="06.5",
        title="The convolution that does nothing",
        task="Write identity_kernel(channels, groups): the weight [C, C / groups, 3, 3] of a "
        "convolution with padding 1 that gives back its input.",
        cases=(
            Case(
                "one channel",
                "1 channel: a one in the centre of nine",
                _changes_nothing(1, 1),
            ),
            Case(
                "four channels",
                "4 channels: output i takes input i and no other",
                _changes_nothing(4, 1),
            ),
            Case(
                "groups",
                "6 channels in 2 groups: output 4 sees inputs 3, 4, 5 only, so its own is number 1",
                _changes_nothing(6, 2),
            ),
            unseen(_changes_nothing(6, 3), _changes_nothing(5, 5), _changes_nothing(12, 2)),
        ),
        hints=(
            "What must the 3x3 kernel from input j to output i be, for i = j and for others?",
            "In groups the second dimension counts the channels of the group: i modulo C / groups.",
        ),
        solution=identity_kernel,
        by_hand=("dlhelpers.*", "torch.nn.init.dirac_"),
    ),
)
