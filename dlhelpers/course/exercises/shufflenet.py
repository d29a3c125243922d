"""Exercises of notebook 05: multiply-adds, memory access, shuffling, equal FLOPs, the roofline."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.course.exercises import Case, Exercise
from dlhelpers.course.exercises.watching import Operators, has_loop, unseen, whole
from dlhelpers.shufflenet import channel_shuffle

__all__ = ["EXERCISES"]


def multiply_adds(c1: int, c2: int, kernel: int, hw: int, groups: int) -> int:
    """Return what a convolution does: each of hw c2 outputs sums kernel^2 c1 / groups products.

    So in 64 groups 64 times fewer than dense, whatever kernel and pixels.
    """
    return hw * c2 * kernel**2 * c1 // groups


def _counts(c1: int, c2: int, kernel: int, side: int, groups: int) -> Callable[[Any], bool]:
    """Compare with torch's counter, which counts two FLOPs for a multiply-add."""

    def test(f: Any) -> bool:
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"):
            conv = nn.Conv2d(c1, c2, kernel, padding=kernel // 2, groups=groups)
            x = torch.empty(1, c1, side, side)
        with FlopCounterMode(display=False) as counter:
            conv(x)
        return f(c1, c2, kernel, side * side, groups) == counter.get_total_flops() // 2

    return test


def memory_access(c1: int, c2: int, hw: int, groups: int) -> int:
    """Return the elements that a 1x1 convolution reads and writes, each once."""
    return hw * (c1 + c2) + c1 * c2 // groups


def _moves(c1: int, c2: int, side: int, groups: int) -> Callable[[Any], bool]:
    """Compare with the tensors of a real convolution."""

    def test(f: Any) -> bool:
        with torch.device("meta"):
            conv = nn.Conv2d(c1, c2, 1, groups=groups, bias=False)
            x = torch.empty(1, c1, side, side)
            tensors = (x, conv.weight, conv(x))
        return f(c1, c2, side * side, groups) == sum(tensor.numel() for tensor in tensors)

    return test


def _shuffles(channels: int, groups: int, *rest: int) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        x = torch.arange(2 * channels * math.prod(rest)).view(2, channels, *rest)
        found = f(x, groups)
        order = [
            g * (channels // groups) + i for i in range(channels // groups) for g in range(groups)
        ]
        return isinstance(found, Tensor) and torch.equal(found, x[:, order])

    return test


def _has_no_loop(f: Any) -> bool:
    seen: list[list[str]] = [[], []]
    for names, (channels, groups) in zip(seen, ((4, 2), (32, 8)), strict=True):
        with Operators(names.append):
            f(torch.zeros(2, channels, 3, 3), groups)
    return len(seen[0]) == len(seen[1]) and not has_loop(f)


def widened(channels: int, groups: int) -> int:
    """Return the multiple of groups whose grouped convolution does about the same multiply-adds.

    A dense 1x1 convolution of c channels does c^2 per pixel, one of C in g groups C^2 / g.
    """
    return groups * round(channels * math.sqrt(groups) / groups)


def _widens(rows: dict[tuple[int, int], int]) -> Callable[[Any], bool]:
    return lambda f: all(f(*arguments) == wanted for arguments, wanted in rows.items())


def least_seconds(flops: float, nbytes: float, gflops: float, gb_s: float) -> float:
    """Return the roofline's time: what takes longer, arithmetic or memory."""
    return max(flops / (gflops * 1e9), nbytes / (gb_s * 1e9))


def _takes(
    flops: float, nbytes: float, gflops: float, gb_s: float, s: float
) -> Callable[[Any], bool]:
    return lambda f: math.isclose(f(flops, nbytes, gflops, gb_s), s, rel_tol=1e-6)


EXERCISES = (
    Exercise(
        id="05.1",
        title="Multiply-adds of a convolution (predict, then write)",
        task="Write multiply_adds(c1, c2, kernel, hw, groups) of a convolution with c1 channels "
        "in, c2 out, a square kernel, hw output pixels.",
        cases=(
            Case(
                "1x1",
                "64 to 128 channels, 1x1, 14 x 14 pixels: each of the 196 * 128 outputs sums 64 "
                "products, 1,605,632 in all",
                _counts(64, 128, 1, 14, 1),
            ),
            Case(
                "3x3",
                "8 to 16 channels, 3x3, 10 x 10 pixels: each output sums 9 * 8 products",
                _counts(8, 16, 3, 10, 1),
            ),
            Case(
                "groups",
                "32 to 32 channels, 1x1, in 4 groups: an output sees the 8 channels of its group "
                "alone",
                _counts(32, 32, 1, 7, 4),
            ),
            Case(
                "groups that change the channels",
                "32 to 64 channels, 1x1, in 4 groups: each of the 64 outputs sums 8 products",
                _counts(32, 64, 1, 7, 4),
            ),
            Case(
                "depthwise",
                "24 channels, 3x3, in 24 groups: 9 products an output",
                _counts(24, 24, 3, 9, 24),
            ),
            whole(32, 32, 1, 49, 4),
            unseen(_counts(10, 15, 5, 6, 5), _counts(3, 7, 7, 4, 1), _counts(48, 12, 3, 3, 12)),
        ),
        hints=(
            "How many numbers does the output have? How many products is each one the sum of?",
            "In groups, an output sees c1 / groups channels: divide the product by groups.",
        ),
        solution=multiply_adds,
        by_hand=("dlhelpers.*", "torch.utils.flop_counter.*"),
    ),
    Exercise(
        id="05.2",
        title="Memory access of a 1x1 convolution",
        task="Write memory_access(c1, c2, hw, groups): elements read and written, each once: "
        "input, weights, output.",
        cases=(
            Case(
                "equal channels",
                "128 to 128 channels at 56 x 56: 3136 * 256 elements of input and output, and "
                "16,384 weights, 819,200 in all",
                _moves(128, 128, 56, 1),
            ),
            Case(
                "unequal channels",
                "36 to 432 channels at 56 x 56: the output is twelve times the input",
                _moves(36, 432, 56, 1),
            ),
            Case(
                "groups",
                "64 to 64 channels in 4 groups: only a quarter of the weights exists; input and "
                "output stay whole",
                _moves(64, 64, 14, 4),
            ),
            Case(
                "groups that change the channels",
                "32 to 64 channels in 4 groups: 64 rows of 8 weights",
                _moves(32, 64, 14, 4),
            ),
            whole(64, 64, 196, 4),
            unseen(_moves(10, 15, 6, 5), _moves(3, 7, 4, 1), _moves(48, 12, 3, 12)),
        ),
        hints=(
            "Three tensors take part. How many elements has each?",
            "Equation 2 of the paper: hw (c1 + c2) + c1 c2 / g.",
        ),
        solution=memory_access,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="05.3",
        title="Channel shuffle",
        task="Write shuffle(x, groups), x [N, C, ...]: the channels in the order that takes one "
        "from each group in turn.",
        cases=(
            Case(
                "two groups of two",
                "channels 0 1 | 2 3 become 0 2 1 3",
                _shuffles(4, 2, 2, 2),
            ),
            Case(
                "three groups of two",
                "channels 0 1 | 2 3 | 4 5 become 0 2 4 1 3 5; splitting into C / groups groups "
                "instead would be the way back",
                _shuffles(6, 3, 2, 3),
            ),
            Case(
                "unequal height and width",
                "images of 2 by 5 keep their pixels where they are: only channels move",
                _shuffles(8, 2, 2, 5),
            ),
            Case(
                "nothing to mix",
                "one group stays as it is",
                _shuffles(4, 1, 3, 3),
            ),
            Case(
                "sequences",
                "x may have one dimension after the channels, or three: [N, C, ...]",
                _shuffles(6, 2, 5),
            ),
            unseen(_shuffles(12, 4, 3, 2), _shuffles(15, 5, 1, 4)),
            Case(
                "no loop",
                "the channels are right, but there is a loop (or a comprehension) over them: the "
                "task wants none. Split the channels' dimension into two, swap these, and flatten "
                "them again",
                _has_no_loop,
            ),
        ),
        hints=(
            "Write the six channels into a table, one row per group. In which order is it read?",
            "unflatten the channels into (groups, C / groups), swap those two, flatten them again.",
        ),
        solution=channel_shuffle,
        by_hand=("dlhelpers.*", "torch.*channel_shuffle*", "torch.*ChannelShuffle*"),
    ),
    Exercise(
        id="05.4",
        title="The same number of multiply-adds in groups",
        task="Write widened(channels, groups): how many channels a 1x1 convolution in groups has "
        "for about the same number of multiply-adds as a dense one; a multiple of groups.",
        cases=(
            Case(
                "four groups",
                "128 channels in 4 groups: 256, as 256^2 / 4 = 128^2",
                _widens({(128, 4): 256, (64, 4): 128}),
            ),
            Case("one group", "128 channels in 1 group stay 128", _widens({(128, 1): 128})),
            Case(
                "no whole root",
                "64 channels in 2 groups: 90.5 is no number of channels; 90 is the multiple of 2 "
                "next to it",
                _widens({(64, 2): 90}),
            ),
            Case(
                "a multiple of the groups",
                "64 channels in 8 groups: 181 cannot be divided by 8; the multiple next to it is "
                "184. The paper prints 180, which no convolution in 8 groups can have",
                _widens({(64, 8): 184}),
            ),
            whole(128, 4),
            unseen(_widens({(96, 9): 288, (100, 3): 174, (24, 16): 96, (50, 5): 110})),
        ),
        hints=(
            "With C channels in g groups each pixel takes C^2 / g. For which C is that c^2?",
            "Divide by groups, round, and multiply again.",
        ),
        solution=widened,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="05.5",
        title="The roofline's time",
        task="Write least_seconds(flops, nbytes, gflops, gb_s): the least time of a layer on a "
        "machine that does gflops 10^9 FLOP and moves gb_s 10^9 bytes a second.",
        cases=(
            Case(
                "units",
                "10^9 FLOP and no bytes at 100 GFLOP/s: 0.01 s. GFLOP/s are 10^9 a second",
                _takes(1e9, 0, 100, 10, 0.01),
            ),
            Case(
                "side by side",
                "2 * 10^9 FLOP and 10^8 bytes: 20 ms and 10 ms, at the same time, 20 ms and not 30",
                _takes(2e9, 1e8, 100, 10, 0.02),
            ),
            Case(
                "memory decides",
                "10^6 FLOP and 10^9 bytes on the same machine: 0.1 s of memory, the longer of the "
                "two",
                _takes(1e6, 1e9, 100, 10, 0.1),
            ),
            unseen(
                _takes(3e9, 4e8, 50, 20, 0.06),
                _takes(3e9, 4e9, 50, 20, 0.2),
                _takes(5e6, 1e3, 1000, 100, 5e-6),
            ),
        ),
        hints=(
            "How long would each of the two take by itself, in seconds?",
            "A processor fetches and computes at the same time. When is it done?",
        ),
        solution=least_seconds,
        by_hand=("dlhelpers.*",),
    ),
)
