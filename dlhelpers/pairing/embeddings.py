"""Does a loss of embeddings depend on their length, and on a temperature? Its values say so.

A contrastive loss sees embeddings only through their dot products or distances: it stays the same
where their axes are permuted and mirrored. Where it changes with their length, nothing was
normalised. Cosines lie in [-1, 1], so without a temperature InfoNCE of N pairs stays above
ln(1 + (N-1) exp(-2)).
Source: van den Oord et al. 2018 (InfoNCE), Chen et al. 2020 (NT-Xent), Schroff et al. 2015
(triplets of normalised embeddings).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .catalog import Hit
from .reach import class_floor
from .tape import Tape

__all__ = ["embedding_hits"]

# functions whose argument is the score of one pair; a softmax over all pairs is InfoNCE's as well
_OF_SCORES = {
    "binary_cross_entropy_with_logits",
    "log_sigmoid",
    "logsigmoid",
    "sigmoid",
    "softplus",
}
_Loss = Callable[[Sequence[Tensor]], float]


def embedding_hits(tape: Tape, floating: Sequence[Tensor]) -> tuple[list[Hit], str] | None:
    """Return the hits of a loss of embeddings, and how it compares them.

    None where its values do not show that it compares embeddings.

    Args:
        tape: the recorded call.
        floating: the floating tensors among its arguments, the first of them embeddings
            [N, ..., D]; those with as many axes and the same D are taken for embeddings too.
    """
    first = floating[0]
    if first.ndim < 2 or min(len(first), first.shape[-1]) < 2 or not _is_small(first):
        return None
    given = [x for x in floating if x.ndim == first.ndim and x.shape[-1] == first.shape[-1]]

    def loss(embeddings: Sequence[Tensor]) -> float:
        pairs = zip(given, embeddings, strict=True)
        value = tape.value([(x, other.to(x)) for x, other in pairs])
        return math.nan if value is None else value

    probes = [_units(given, seed) for seed in (0, 1)]
    plain = loss(probes[0])
    if not _is_of_pairs(loss, probes, plain):
        return None
    scaled = [loss([c * x for x in probes[0]]) for c in (0.5, 3.0)]
    lengths = torch.cat([x.detach().double().norm(dim=-1).flatten() for x in given])
    are_units = bool(((lengths - 1).abs() < 1e-2).all())
    is_free = all(_alike(plain, value) for value in scaled)
    if is_free or are_units:
        candidates = _candidates_at_one(loss, probes)
        if candidates is None:
            return [], "and does not depend on their length" if is_free else "of length 1"
        what = (
            f"on unit vectors it is InfoNCE of their cosines, not divided by a temperature: over "
            f"{candidates} candidates it cannot fall below {class_floor(2.0, candidates):.3g}"
        )
        return [Hit("cosine-without-temperature", "suspicion", what, "values")], ""
    if _is_power(plain, scaled) and not loss([probes[0][0]] * len(given)) < 0:
        return None  # a distance; a similarity falls without limit as embeddings grow
    if _is_of_plain_products(tape, given):
        return [], "by their dot products, without a temperature"
    what = (
        f"the embeddings are {lengths.min():.3g} to {lengths.max():.3g} long; the loss of unit "
        f"vectors is {plain:.3g}, of the same 3 times as long {scaled[1]:.3g}"
    )
    return [Hit("embeddings-not-normalised", "suspicion", what, "values")], ""


def _is_small(first: Tensor) -> bool:
    """Whether a loss over all pairs of rows is played in a moment."""
    return first.shape[:-1].numel() <= 2048 and first.numel() <= 2**20


def _units(given: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in given]
    return [F.normalize(x, dim=-1) for x in draw]


def _is_of_pairs(loss: _Loss, probes: list[list[Tensor]], plain: float) -> bool:
    """Whether a loss compares embeddings with each other, and not each with what it should be.

    It does not change where the axes of all are permuted and mirrored alike. Two tensors whose
    best answer is that they are equal, however short, are a regression or a divergence; one
    tensor whose rows may each be mirrored differently is under a penalty on lengths.
    """
    units = probes[0]
    long = [math.sqrt(units[0].shape[-1]) * x for x in units]  # elements of size 1
    seen = loss(long)
    if not math.isfinite(seen):
        long, seen = units, plain
    generator = torch.Generator().manual_seed(2)
    for shift in (1, 2, 3):
        signs = _signs(generator, long[0].shape[-1])
        if not _alike(seen, loss([x.roll(shift, -1) * signs for x in long])):
            return False
    if len(units) == 1:
        shape = (len(units[0]), *[1] * (units[0].ndim - 2), units[0].shape[-1])
        return not _alike(plain, loss([units[0] * _signs(generator, *shape)]))
    if len(units) == 2 and units[0].shape == units[1].shape:
        return any(abs(loss([c * units[0]] * 2)) > 1e-3 for c in (0.1, 1.0))
    return True


def _signs(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator) * 2 - 1


def _is_of_plain_products(tape: Tape, given: Sequence[Tensor]) -> bool:
    """Whether dot products or their differences, unscaled, are the scores of a sigmoid.

    Recommenders are trained so: where length stands for popularity, normalising loses it. Of rows
    that are a unit vector or its opposite each dot product is -1 or 1, a difference of two up to
    2; those of rows twice as long are 4 times that.
    """
    generator = torch.Generator().manual_seed(3)
    draws = [[_signs(generator, *x.shape[:-1], 1) for x in given] for _ in range(3)]
    axis = torch.eye(given[0].shape[-1])[0]
    played = [_scores(tape, given, [s * axis for s in signs]) for signs in draws]
    longer = _scores(tape, given, [2 * s * axis for s in draws[0]])
    without = _scores(tape, given, [0 * s * axis for s in draws[0]])
    seen = False
    if any([x.shape for x in other] != [x.shape for x in longer] for other in (*played, without)):
        return False
    for *some, long, zero in zip(*played, longer, without, strict=True):
        moved = torch.stack([x - zero for x in some])
        counts = moved.isfinite().all(0) & (moved != 0).any(0)
        if not counts.any() or not torch.allclose((long - zero)[counts], 4 * moved[0][counts]):
            continue  # not of products: what an earlier one of these functions gave
        sizes = moved[:, counts].abs()
        most, least = sizes.max().item(), sizes.min().item()
        if not 0.99 < most < 2.01 or (most > 1.01 and least > 1.5):
            return False
        seen = True
    return seen


def _scores(tape: Tape, given: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    """Return what goes into each sigmoid of the loss, for these rows."""
    steps: list[tuple] = []
    with torch.no_grad():
        tape.play([(x, y.to(x)) for x, y in zip(given, rows, strict=True)], steps)
    scores = (
        next(iter((*args, *kwargs.values())), None)
        for func, args, kwargs, _ in steps
        if getattr(func, "__name__", "") in _OF_SCORES
    )
    return [x.clone() for x in scores if isinstance(x, Tensor)]


def _candidates_at_one(loss: _Loss, probes: list[list[Tensor]]) -> int | None:
    """Return among how many candidates InfoNCE picks if that is the formula, without division."""
    shape = probes[0][0].shape
    if any(x.shape != shape for x in probes[0]) or len(probes[0]) > 2 or len(shape) > 2:
        return None
    found = [loss(units) for units in probes]
    for name, formula in _FORMULAS.items():
        values = [formula(units) for units in probes]
        if None not in values and all(map(_alike, found, values)):
            return shape[0] if name[0] == "pairs" else len(probes[0]) * shape[0] - 1
    return None


def _both_ways(units: list[Tensor], weights: tuple[float, float]) -> float | None:
    if len(units) != 2:
        return None
    scores, places = units[0] @ units[1].T, torch.arange(len(units[0]))
    one, other = F.cross_entropy(scores, places), F.cross_entropy(scores.T, places)
    return (weights[0] * one + weights[1] * other).item()


def _nt_xent(units: list[Tensor], *, interleaved: bool) -> float | None:
    rows = torch.cat(units)
    places = torch.arange(len(rows))
    if len(rows) % 2:
        return None
    positive = places ^ 1 if interleaved else (places + len(rows) // 2) % len(rows)
    scores = (rows @ rows.T).fill_diagonal_(-math.inf)
    return F.cross_entropy(scores, positive).item()


_FORMULAS: dict[tuple[str, int], Callable[[list[Tensor]], float | None]] = {
    **{
        ("pairs", i): partial(_both_ways, weights=weights)
        for i, weights in enumerate([(1, 0), (0, 1), (0.5, 0.5), (1, 1)])
    },
    ("all", 0): partial(_nt_xent, interleaved=False),
    ("all", 1): partial(_nt_xent, interleaved=True),
}


def _is_power(plain: float, scaled: list[float]) -> bool:
    """Whether c times as long embeddings give c**k times the loss: it has no margin."""
    if plain == 0 or any(value / plain <= 0 for value in scaled):
        return plain == 0
    half, triple = (math.log(value / plain) for value in scaled)
    return math.isclose(half / math.log(0.5), triple / math.log(3), rel_tol=1e-3, abs_tol=1e-3)


def _alike(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)
