"""Which share of its group's gradient is a micro-batch's?

    share_i = d_i / D,   D = sum_i d_i

d_i is what the loss of micro-batch i divides by, known after its forward. Until D is known, the
first d_i and the samples n_i stand for it, E = N d_1 / n_1; before the last backward the gradients
there are multiplied by E / D. Before, not after: a wrapped model averages them over the ranks in
that backward, and each rank has a D of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlhelpers.memory.divisors import Term, terms_of

__all__ = ["Shares", "nothing_in", "synchronized_in", "unsynchronized"]

_HOW = (
    "where its terms are means over one thing, count that in a micro-batch, as in accumulate(..., "
    "count=lambda batch: (batch[1] != -100).sum()); else divide sums by what the whole batch has, "
    "as in F.cross_entropy(z, y, reduction='sum') / total, with accumulate(..., reduction='sum')"
)


class Shares:
    """Weights of the micro-batches of one group after another.

    Args:
        optimizer: whose gradients are corrected.
        kind: mean or sum, "counted mean" or "counted sum" where the counts are the user's.
        synchronizes: modules that average gradients over ranks, see ``synchronized_in``.
    """

    def __init__(self, optimizer: Optimizer, kind: str, synchronizes: Sequence[nn.Module]) -> None:
        self._optimizer, self._kind, self.synchronizes = optimizer, kind, synchronizes
        self._has_warned = False

    def begin(self, counts: Sequence[float]) -> None:
        """Start a group; counts: samples of its micro-batches, or what the user counts."""
        self._counts, self._total = list(counts), float(sum(counts))
        self._divisors: list[float] = list(counts)  # of the samples until the loss is seen
        self._first: tuple[float, list[Term]] | None = None  # samples and terms
        self._is_sum = self._kind == "sum"
        self._sum: Any = 0.0

    def weight(self, index: int) -> float:
        """Return what the loss is multiplied by, as far as is known."""
        if self._is_sum:
            return 1.0
        if self._kind == "counted sum":
            return 1 / self._total
        if index == len(self._counts) - 1 and sum(self._divisors) and not self._is_expected():
            return self._divisors[index] / sum(self._divisors)
        return self._divisors[index] / self._expected()

    def look(self, loss: Tensor, index: int) -> str | None:
        """Read what the loss of a micro-batch divides by; say, once, why it cannot be known."""
        if self._kind == "counted mean" or len(self._counts) == 1:
            return None
        terms = _together(terms_of(loss), self._counts[index])
        is_one = [(t.kind, t.divisor, t.is_certain) for t in terms] == [("mean", 1.0, False)]
        if is_one and float(loss.detach()) == 0:  # a count of 0, clamped to 1
            terms = [replace(terms[0], divisor=0.0)]
        problem = self._learn(terms, index)
        if self._has_warned or problem is None:
            return None
        self._has_warned = True
        return problem

    def _learn(self, terms: Sequence[Term], index: int) -> str | None:
        of_parameters = [term for term in terms if term.kind == "parameters"]
        terms = [term for term in terms if term.kind != "parameters"]
        if self._kind == "counted sum":
            return self._repeats(of_parameters)
        names = " and ".join(dict.fromkeys(term.name for term in terms))
        kinds = {term.kind for term in terms}
        if self._kind == "sum":
            self._first = self._first or (1.0, list(terms))
            is_mean = kinds == {"mean"} and all(term.is_certain for term in terms)
            divides = [(term.divisor, term.scale) for term in terms]
            if is_mean or divides != [(term.divisor, term.scale) for term in self._first[1]]:
                return f"reduction='sum', but the loss is a mean ({names}): leave reduction out"
            return self._repeats(of_parameters)
        if not terms:
            if not of_parameters:  # times 0: of no sample
                self._divisors[index] = 0.0
            return None
        if kinds == {"sum"} and all(term.is_certain and term.scale == 1 for term in terms):
            self._is_sum = True
            return self._repeats(of_parameters)
        inexact = "the accumulated gradient may not be that of the whole batch: "
        if kinds == {"sum"}:
            return f"{inexact}the loss is a sum ({names}), and reduction is 'mean': give 'sum'"
        if any(term.mixes and term.kind == "unknown" for term in terms):
            return (
                f"{inexact}the loss compares samples of a micro-batch with each other ({names}): "
                "give it the whole batch, or take it over each sample; count= does not help"
            )
        if kinds != {"mean"}:
            return f"{inexact}what the loss divides by cannot be known ({names}): {_HOW}"
        samples = self._counts[index]
        if self._first is None and all(term.divisor for term in terms):
            self._first = samples, list(terms)
            factor = terms[0].divisor / samples if samples else 1.0
            self._divisors[index + 1 :] = [n * factor for n in self._counts[index + 1 :]]
        is_mixed = len({bool(term.divisor) for term in terms}) > 1
        if is_mixed or (self._first is not None and not _is_alike(terms, self._first[1])):
            what = f"its {len(terms)} terms are means over different things ({names})"
            if len(terms) == 1:
                what = f"micro-batches multiply its mean by different numbers ({names})"
            return f"{inexact}{what}: {_HOW}"
        self._divisors[index] = terms[0].divisor
        return None

    def _repeats(self, of_parameters: Sequence[Term]) -> str | None:
        """Say what a sum of losses adds more than once."""
        of = len(self._counts)
        repeated = [term for term in of_parameters if of not in term.over]
        if not repeated:
            return None
        names = " and ".join(dict.fromkeys(term.name for term in repeated))
        return (
            f"the accumulated gradient is not that of the whole batch: the loss is a sum, and a "
            f"term of the parameters alone ({names}) is added once per micro-batch, {of} times: "
            "divide it by micro.of, as in loss + penalty / micro.of"
        )

    def _expected(self) -> float:
        if self._first is None or not self._first[0]:
            return self._total
        samples, terms = self._first
        return self._total * (terms[0].divisor / samples or 1.0)

    def _is_expected(self) -> bool:
        return math.isclose(sum(self._divisors), self._expected(), rel_tol=1e-12)

    def correct(self) -> Any:
        """Correct the gradients so far; return what corrects the sum of the losses so far.

        Raises:
            ValueError: nothing to take a mean over.
            RuntimeError: the gradients are sharded.
        """
        if self._is_sum or self._kind.startswith("counted"):
            return 0.0
        if not (total := sum(self._divisors)):
            raise ValueError(nothing_in(len(self._counts)))
        if self._is_expected():
            return 0.0
        if any(
            hasattr(module, "reshard") or hasattr(module, "_fsdp_wrapped_module")
            for module in self.synchronizes
        ):
            raise RuntimeError(
                "the micro-batches' losses divide by other numbers than their samples, and the "
                "gradients of a sharded model cannot be corrected for that: give accumulate "
                "count=, which counts what a micro-batch's loss is a mean over"
            )
        factor = self._expected() / total
        with torch.no_grad():
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
        return self._sum * (factor - 1)

    def returned(self, value: Tensor) -> Tensor:
        """Add a weighted loss to the group's, and give it back."""
        self._sum = self._sum + value
        return value


def nothing_in(count: int) -> str:
    """Return the message for a group that has nothing to take a mean over."""
    return f"{count} micro-batches count 0 in all: leave that group out"


def _together(terms: Sequence[Term], samples: float) -> list[Term]:
    """Take as one term the losses of single samples that a Python loop has made and averaged."""
    kept: dict[Any, list[Term]] = {}
    for term in terms:
        kept.setdefault((term.kind, term.name, term.scale), []).append(term)
    result: list[Term] = []
    for (kind, name, scale), alike in kept.items():
        count = len(alike)
        if kind == "mean" and count == samples > 1 and scale != 1:
            result.append(Term("mean", name, float(count), scale * count, is_certain=False))
        elif kind == "mean" and count == samples > 1 and {t.divisor for t in alike} == {1.0}:
            result.append(Term("sum", name, is_certain=False))
        else:
            result += alike
    return result


def _is_alike(terms: Sequence[Term], first: Sequence[Term]) -> bool:
    """Whether all divisors are the same multiple of the first ones, and the scales the same."""
    if len(terms) != len(first):
        return False
    pairs = list(zip(terms, first, strict=True))
    ratio = terms[0].divisor / first[0].divisor if first[0].divisor else 0.0
    return all(
        math.isclose(term.divisor, ratio * old.divisor, rel_tol=1e-5)
        # an overflow (inf, nan) is the scaler's to see
        and (
            not math.isfinite(term.scale * old.scale)
            or math.isclose(term.scale, old.scale, rel_tol=1e-5)
        )
        for term, old in pairs
    )


def synchronized_in(model: nn.Module | None) -> list[nn.Module]:
    """Return the outermost modules that average gradients over ranks (DDP, FSDP)."""
    found: dict[str, nn.Module] = {}
    for name, module in () if model is None else model.named_modules():
        kinds = ("no_sync", "set_requires_gradient_sync")
        is_inner = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if not is_inner and any(hasattr(type(module), kind) for kind in kinds):
            found[name] = module
    return list(found.values())


@contextmanager
def unsynchronized(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Keep gradients on their ranks for a forward and backward."""
    with ExitStack() as stack:
        for module in modules:
            if hasattr(type(module), "no_sync"):
                stack.enter_context(module.no_sync())
            else:
                module.set_requires_gradient_sync(False)
                stack.callback(module.set_requires_gradient_sync, True)
        yield
