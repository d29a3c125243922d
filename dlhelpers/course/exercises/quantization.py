"""Exercises of notebook 07: the grid, zero points, the multiplier, P and Q, what fits 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dlhelpers.course.exercises import Case, Exercise
from dlhelpers.course.exercises.traced import subtracts_inside
from dlhelpers.course.exercises.watching import unchanged, unseen, whole
from dlhelpers.quantization.entropy import LEVELS, distributions
from dlhelpers.quantization.kernels import fixed_point

__all__ = ["EXERCISES"]


def scale_and_zero(low: float, high: float, bits: int) -> tuple[float, int]:
    """Return scale and zero point of the unsigned grid over a range that is widened to hold 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)


def _is_grid(
    low: float, high: float, bits: int, wanted: tuple[float, int]
) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        scale, zero = f(low, high, bits)
        is_whole = float(zero) == int(zero)
        return is_whole and abs(float(scale) / wanted[0] - 1) < 1e-5 and int(zero) == wanted[1]

    return test


def dot(qx: list[int], qw: list[int], x_zero: int, w_zero: int) -> int:
    """Return sum of (qx - Zx)(qw - Zw) from sums over the integers as they are."""
    n = len(qx)
    products = sum(x * w for x, w in zip(qx, qw, strict=True))
    return products - w_zero * sum(qx) - x_zero * sum(qw) + n * x_zero * w_zero


def _is_dot(qx: list[int], qw: list[int], x_zero: int, w_zero: int) -> Callable[[Any], bool]:
    wanted = sum((x - x_zero) * (w - w_zero) for x, w in zip(qx, qw, strict=True))
    return lambda f: f(list(qx), list(qw), x_zero, w_zero) == wanted


def _has(multiplier: float) -> Callable[[Any], bool]:
    """Judge by the definition: M = 2^-n M0 / 2^31, M0 of 31 bits, as near as it can be."""

    def test(f: Any) -> bool:
        m0, n = f(multiplier)
        if int(m0) != m0 or not 2**30 <= m0 < 2**31:
            return False
        return abs(int(m0) / 2.0**31 * 2.0**-n / multiplier - 1) <= 2.0**-31

    return test


def _are(counts: np.ndarray, i: int, which: slice) -> Callable[[Any], bool]:
    def test(f: Any) -> bool:
        found = f(counts.copy(), i)[which]
        wanted = _by_hand(counts, i)[which]
        return all(
            len(a) == len(b) and np.allclose(a, b) for a, b in zip(found, wanted, strict=True)
        )

    return test


def _by_hand(counts: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
    p = np.array(counts[:i], dtype=float)
    p[-1] += counts[i:].sum()
    q = np.zeros(i)
    for level in range(LEVELS):
        bins = range(level * i // LEVELS, (level + 1) * i // LEVELS)
        filled = [j for j in bins if counts[j]]
        for j in filled:
            q[j] = sum(counts[k] for k in filled) / len(filled)
    return p, q


def most_bits(products: int) -> int:
    """Return the most bits of weights whose sum of u8 times s8 products always fits 16 bits.

    The largest activation is 255, the largest weight of b bits 2^(b-1) - 1: two products of 8-bit
    weights reach 2 * 255 * 127 = 64,770, beyond 32,767; of 7-bit weights 32,130.
    """
    return max(b for b in range(1, 9) if products * 255 * (2 ** (b - 1) - 1) <= 2**15 - 1)


_FULL = np.arange(1.0, 301.0)
_GAPS = np.where(np.arange(300) % 3 == 1, 0.0, _FULL)
_HOLLOW = np.where(np.arange(300) < 4, 0.0, _FULL)
_LAST = np.where(np.arange(300) == 255, 0.0, _FULL)


EXERCISES = (
    Exercise(
        id="07.1",
        title="Scale and zero point (predict, then write)",
        task="Write scale_and_zero(low, high, bits) of the unsigned asymmetric grid from 0 to "
        "2^bits - 1 over the range, widened to hold 0.",
        cases=(
            Case(
                "from zero",
                "0 to 6 on 8 bits: 255 steps of 6 / 255, and zero is the integer 0",
                _is_grid(0.0, 6.0, 8, (6 / 255, 0)),
            ),
            Case(
                "both signs",
                "-1 to 3 on 8 bits: 255 steps of 4 / 255; -1 is the integer 0, so 0 is "
                "round(1 / scale) = 64, a whole number",
                _is_grid(-1.0, 3.0, 8, (4 / 255, 64)),
            ),
            Case(
                "fewer bits",
                "-1 to 3 on 4 bits: 15 steps of 4 / 15, as the greatest integer is 15",
                _is_grid(-1.0, 3.0, 4, (4 / 15, 4)),
            ),
            Case(
                "a range without zero",
                "2 to 5: padding adds zeros, which must be exact, so the range becomes 0 to 5",
                _is_grid(2.0, 5.0, 8, (5 / 255, 0)),
            ),
            Case(
                "negative values alone",
                "-4 to -1: the range becomes -4 to 0, and zero is the greatest integer",
                _is_grid(-4.0, -1.0, 8, (4 / 255, 255)),
            ),
            unseen(
                *(
                    _is_grid(low, high, bits, scale_and_zero(low, high, bits))
                    for low, high, bits in (
                        (-2.5, 1.5, 8),
                        (-0.3, 0.9, 3),
                        (0.5, 0.75, 5),
                        (-9, -8, 2),
                    )
                )
            ),
        ),
        hints=(
            "How many steps lie between the least and the greatest integer? Not 2^bits.",
            "low is the integer 0. How many steps above it lies the number 0?",
            "Before all that: low = min(low, 0), high = max(high, 0).",
        ),
        solution=scale_and_zero,
        by_hand=("dlhelpers.*", "torch.ao.*", "torchao.*"),
    ),
    Exercise(
        id="07.2",
        title="A dot product with zero points",
        task="Write dot(qx, qw, x_zero, w_zero): the sum of (qx - x_zero) * (qw - w_zero), from "
        "the sums of qx, of qw and of qx * qw, so that nothing is subtracted inside the loop.",
        cases=(
            Case(
                "no zero points",
                "inputs 1, 2, 3 and weights 4, 5, 6: 1 * 4 + 2 * 5 + 3 * 6 = 32",
                _is_dot([1, 2, 3], [4, 5, 6], 0, 0),
            ),
            Case(
                "of the inputs",
                "x_zero = 2 and w_zero = 0: each weight loses 2 of its input, 32 - 2 * 15 = 2",
                _is_dot([1, 2, 3], [4, 5, 6], 2, 0),
            ),
            Case(
                "of the weights",
                "w_zero = 5 and x_zero = 0: 32 - 5 * 6 = 2",
                _is_dot([1, 2, 3], [4, 5, 6], 0, 5),
            ),
            Case(
                "of both",
                "the product of the zero points was subtracted twice for each of the pairs: add "
                "n * x_zero * w_zero",
                _is_dot([1, 2, 3, 9], [4, 5, 6, -7], 2, 5),
            ),
            whole([1, 2, 3], [4, 5, 6], 2, 5),
            unseen(_is_dot([255, 0, 17, 3, 128], [-128, 127, 0, -3, 9], 128, -4)),
            Case(
                "nothing subtracted inside",
                "the result is right, but a zero point is subtracted inside the loop, from single "
                "elements or products (x - x_zero, or a whole array of them). The task wants sums "
                "of the integers as they are: sum qx * qw, qx and qw first, and use the zero "
                "points once, after the loop",
                lambda f: not subtracts_inside(f, [1, 2, 3, 9], [4, 5, 6, -7], 2, 5),
            ),
        ),
        hints=(
            "Multiply (qx - x_zero) * (qw - w_zero) out: four terms.",
            "Which of the four terms do not depend on qx? They can be computed before inference.",
        ),
        solution=dot,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="07.3",
        title="A multiplier of integers",
        task="Write fixed_point(multiplier) -> (m0, n) with multiplier = m0 / 2^31 / 2^n and "
        "2^30 <= m0 < 2^31.",
        cases=(
            Case("one half", "0.5 = 2^30 / 2^31 / 2^0", _has(0.5)),
            Case(
                "one quarter",
                "0.25 = 2^30 / 2^31 / 2^1: shift until the mantissa is one half at least; n counts "
                "the shifts to the right, so it is minus the exponent of math.frexp",
                _has(0.25),
            ),
            Case(
                "no power of two",
                "0.3 = 0.6 / 2: m0 is 0.6 * 2^31 rounded to the nearest integer, 1,288,490,189",
                _has(0.3),
            ),
            Case("above one", "3.0 = 0.75 * 2^2: n is negative, -2", _has(3.0)),
            Case(
                "rounded up to the next power",
                "1 - 2^-40: 0.999... * 2^31 rounds to 2^31, which has one bit too many; it is "
                "2^30 with n = -1",
                lambda f: tuple(map(int, f(1 - 2.0**-40))) == (2**30, -1),
            ),
            whole(0.3),
            unseen(*map(_has, (0.0007, 123.456, 1 / 3, 1.5 * 2.0**-40, 0.999, 1.0))),
        ),
        hints=(
            "math.frexp gives a mantissa between one half and one, and an exponent.",
            "mantissa * 2^31, rounded, is m0; n is minus the exponent.",
            "What if rounding reaches 2^31?",
        ),
        solution=fixed_point,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="07.4",
        title="P and Q of the entropy method",
        task="Write distributions(counts, i) -> (P, Q): P is the first i counts with all that lies "
        "beyond added to the last; Q is the first i counts as they were, merged into 128 levels "
        "(level j holds bins j * i // 128 to (j + 1) * i // 128), each spread evenly over its bins "
        "that are not empty.",
        cases=(
            Case(
                "P",
                "300 counts, 256 kept: P has 256 entries, and the last holds the other 44 as well",
                _are(_FULL, 256, slice(0, 1)),
            ),
            Case(
                "two bins a level",
                "256 kept: each level is the mean of two bins. Made from P, its last level would "
                "hold the outliers too: Q is made of the bins as they were",
                _are(_FULL, 256, slice(1, 2)),
            ),
            Case(
                "empty bins",
                "every third bin is empty: it stays 0 in Q, and its level's count is spread over "
                "the others",
                _are(_GAPS, 256, slice(1, 2)),
            ),
            Case(
                "an empty level",
                "256 kept, the first four bins empty: their two levels have nothing to spread, and "
                "nothing is divided by zero",
                _are(_HOLLOW, 256, slice(1, 2)),
            ),
            Case(
                "the last kept bin is empty",
                "P has the outliers there, Q nothing: a bin is empty if its count is 0, whatever P "
                "has",
                _are(_LAST, 256, slice(0, 2)),
            ),
            Case(
                "levels of unequal width",
                "200 kept: some levels have one bin, some two; level j starts at j * 200 // 128",
                _are(_FULL, 200, slice(0, 2)),
            ),
            unseen(
                _are(_FULL, 128, slice(0, 2)),
                _are(_GAPS, 137, slice(0, 2)),
                _are(_HOLLOW, 300, slice(0, 2)),
            ),
            unchanged(lambda: (_FULL.copy(), 256)),
        ),
        hints=(
            "P: counts[:i], then its last entry plus counts[i:].sum().",
            "Q: for each level, the sum of its counts divided by how many of them are not 0.",
            "Which of the two arrays do the levels' counts come from, P or counts[:i]?",
        ),
        solution=distributions,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="07.5",
        title="What fits into 16 bits",
        task="Write most_bits(products): the most bits b of signed weights, from -(2^(b-1) - 1) to "
        "2^(b-1) - 1, whose sum of that many products with 8-bit unsigned activations fits a "
        "signed 16-bit integer.",
        cases=(
            Case(
                "one product",
                "255 * 127 = 32,385 fits below 32,768: 8 bits",
                lambda f: f(1) == most_bits(1) == 8,
            ),
            Case(
                "two products",
                "2 * 255 * 127 = 64,770 does not fit, 2 * 255 * 63 = 32,130 does: 7 bits. That is "
                "what a reduced range is for",
                lambda f: f(2) == 7,
            ),
            Case(
                "four products",
                "4 * 255 * 31 = 31,620 fits: 6 bits; not one bit per product",
                lambda f: f(4) == 6,
            ),
            Case(
                "five and seventeen",
                "5 * 255 * 31 = 39,525 does not fit, so 5 bits; 17 * 255 * 7 = 30,345 fits: 4 bits",
                lambda f: f(5) == 5 and f(17) == 4,
            ),
            whole(2),
            unseen(lambda f: all(f(n) == most_bits(n) for n in range(1, 129))),
        ),
        hints=(
            "What is the largest product of an activation and a weight of b bits?",
            "Try b = 8, 7, 6, ... until the sum of the largest products fits 32,767.",
        ),
        solution=most_bits,
        by_hand=("dlhelpers.*",),
    ),
)
