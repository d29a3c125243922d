"""Exercises of notebook 04: a step's bytes, segments, weights, the mean loss, the largest batch."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.course.exercises import Case, Exercise
from dlhelpers.course.exercises.memory_budget import LARGEST_BATCH
from dlhelpers.course.exercises.watching import unseen, whole

__all__ = ["EXERCISES"]


def step_bytes(parameters: int, activation_bytes: int, optimizer: str) -> int:
    """Return the bytes of float32 weights, gradients, optimizer's state and saved activations.

    All of them at once. The true peak is another: backward frees activations while it makes
    gradients, and temporaries come on top. Ten million parameters, AdamW and 200 million bytes of
    activations: 160 + 200 = 360 million.
    """
    state_bytes = {"sgd": 0, "momentum": 4, "adamw": 8}[optimizer]
    return (4 + 4 + state_bytes) * parameters + activation_bytes


_OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1),
    "momentum": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.1),
}


def _adds_up(parameters: int, activation_bytes: int, optimizer: str) -> Callable[[Any], bool]:
    """Compare with what a real optimizer has made after a step."""

    def test(f: Any) -> bool:
        weight = nn.Parameter(torch.zeros(parameters))
        weight.grad = torch.zeros(parameters)
        stepped = _OPTIMIZERS[optimizer]([weight])
        stepped.step()
        state = [
            value
            for value in stepped.state[weight].values()
            if isinstance(value, Tensor) and value.shape == weight.shape  # not the step's number
        ]
        wanted = sum(tensor.nbytes for tensor in (weight, weight.grad, *state))
        return f(parameters, activation_bytes, optimizer) == wanted + activation_bytes

    return test


def segments(blocks: int) -> int:
    """Return the k with the smallest ``k + ceil(blocks / k)``; of equals the smaller."""
    return min(range(1, blocks + 1), key=lambda k: k + math.ceil(blocks / k))


def _are(rows: dict[int, int]) -> Callable[[Any], bool]:
    return lambda f: all(f(blocks) == k for blocks, k in rows.items())


def weights(counts: Sequence[int]) -> list[float]:
    """Return what the mean loss of each micro-batch is multiplied by: its share of the whole."""
    total = sum(counts)
    return [count / total for count in counts]


def _floats(found: Iterable[Any]) -> list[float]:
    return [float(weight) for weight in found]


def _sum_to_one(*counts: int) -> Callable[[Any], bool]:
    return lambda f: math.isclose(sum(_floats(f(list(counts)))), 1, rel_tol=1e-5)


def _give_the_gradient(*counts: int) -> Callable[[Any], bool]:
    """Compare the weighted sum of real gradients with the gradient of the whole batch."""

    def gradient(samples: Tensor) -> Tensor:
        parameter = torch.ones(3, dtype=torch.float64, requires_grad=True)
        (samples @ parameter).square().mean().backward()
        return parameter.grad

    def test(f: Any) -> bool:
        samples = torch.arange(3 * sum(counts), dtype=torch.float64).sin().reshape(-1, 3)
        found = _floats(f(list(counts)))
        if len(found) != len(counts):
            return False
        total = torch.zeros(3, dtype=torch.float64)
        for part, weight in zip(samples.split(counts), found, strict=True):
            if len(part):
                total += weight * gradient(part)
            elif weight:
                return False
        return torch.allclose(total, gradient(samples), rtol=1e-5)

    return test


def mean_loss(losses: Iterable[Tensor]) -> float:
    """Return the mean of the batches' losses, each of which may lose its graph at once."""
    total, count = 0.0, 0
    for loss in losses:
        total += loss.item()
        count += 1
    return total / count


class _Kept:
    """A tensor that a graph keeps for its backward pass; alive as long as the graph is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Losses:
    """Give losses with graphs, once, and count the graphs alive when the next one is asked for."""

    def __init__(self, *values: float) -> None:
        self._values = values
        self._graphs: weakref.WeakSet[_Kept] = weakref.WeakSet()
        self.leaves: list[Tensor] = []
        self.most_alive = 0

    def __iter__(self) -> Iterator[Tensor]:
        values, self._values = self._values, ()
        for value in values:
            yield self._loss(value)
            self.most_alive = max(self.most_alive, len(self._graphs))

    def _loss(self, value: float) -> Tensor:
        def pack(tensor: Tensor) -> _Kept:
            kept = _Kept(tensor)
            self._graphs.add(kept)
            return kept

        leaf = torch.ones((), requires_grad=True)
        self.leaves.append(leaf)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            return leaf * torch.tensor(value)  # keeps the factor


def _is_the_mean(make: Callable[[Iterable[Tensor]], Any], *values: float) -> Callable[[Any], bool]:
    wanted = sum(values) / len(values)

    def test(f: Any) -> bool:
        found = torch.as_tensor(f(make(_Losses(*values)))).item()
        return math.isclose(found, wanted, rel_tol=1e-6)

    return test


def _one_graph_at_a_time(f: Any) -> bool:
    losses = _Losses(4.0, 3.0, 2.0, 1.0)
    f(iter(losses))
    return losses.most_alive <= 1


def _no_backward(f: Any) -> bool:
    losses = _Losses(2.0, 1.0)
    f(iter(losses))
    return all(leaf.grad is None for leaf in losses.leaves)


EXERCISES = (
    Exercise(
        id="04.1",
        title="Bytes of a training step (predict, then write)",
        task='Write step_bytes(parameters, activation_bytes, optimizer), "sgd", "momentum" or '
        '"adamw": bytes of float32 weights, gradients, optimizer\'s state and activations, in all.',
        cases=(
            Case(
                "no activations",
                "1,000 parameters, plain SGD and nothing saved: a weight has 4 bytes, and its "
                "gradient has 4 as well, 8,000 bytes together",
                _adds_up(1000, 0, "sgd"),
            ),
            Case(
                "plain SGD",
                "1,000 parameters and 500 bytes of activations: SGD without momentum keeps no "
                "state, and the activations are bytes already, 8,000 + 500",
                _adds_up(1000, 500, "sgd"),
            ),
            Case(
                "momentum",
                "2,000 parameters and 300 bytes of activations: momentum keeps one number per "
                "parameter, its velocity, so that 12 bytes a parameter are alive: 24,000 + 300",
                _adds_up(2000, 300, "momentum"),
            ),
            Case(
                "AdamW",
                "3,000 parameters and 100 bytes of activations: AdamW keeps two numbers per "
                "parameter, a mean of its gradients and one of their squares: 16 bytes a "
                "parameter, 48,000 + 100",
                _adds_up(3000, 100, "adamw"),
            ),
            whole(1000, 500, "sgd"),
            unseen(
                _adds_up(7, 13, "sgd"), _adds_up(4321, 77, "momentum"), _adds_up(999, 1, "adamw")
            ),
        ),
        hints=(
            "How many numbers does a parameter have beside itself: in backward, and in the "
            "optimizer? A float32 number has 4 bytes.",
            "After one step of each, print the shapes in optimizer.state: which of its tensors are "
            "as large as the weight?",
        ),
        solution=step_bytes,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="04.2",
        title="The best number of segments",
        task="Write segments(blocks): the k with the smallest k + ceil(blocks / k), the smaller k "
        "on a tie.",
        cases=(
            Case(
                "a square",
                "16 blocks: 4 segments keep 4 + 4 = 8, whereas 8 segments keep 8 + 2 = 10 and 3 "
                "keep 3 + 6 = 9, as 16 / 3 is rounded up; in the same way 9 blocks are best in 3",
                _are({16: 4, 9: 3}),
            ),
            Case("one block", "1 block can only be 1 segment: 1 + 1", _are({1: 1})),
            Case(
                "no square",
                "12 blocks: 3 segments of 4 and 4 segments of 3 both keep 7; on a tie the smaller "
                "k is wanted, 3",
                _are({12: 3}),
            ),
            Case(
                "a longest segment",
                "7 blocks: 2 segments keep 2 + 4 = 6, as the longer one has 4 blocks, and 3 keep "
                "3 + 3 = 6 as well; the smaller k is 2. A rounded square root says 3, "
                "and so does n / k that is not rounded up",
                _are({7: 2, 8: 2}),
            ),
            Case(
                "three equals",
                "50 blocks: 5 + 10, 6 + 9 and 7 + 8 are all 15; the smallest k is 5, two less "
                "than the square root rounded down",
                _are({50: 5}),
            ),
            Case(
                "a long chain",
                "100 blocks: 10 + 10 = 20 is the smallest sum, and no smaller k has it "
                "(9 + 12 = 21); 400 blocks are best in 20",
                _are({100: 10, 400: 20}),
            ),
            whole(12),
            unseen(_are({blocks: segments(blocks) for blocks in (*range(1, 80), 1000)})),
        ),
        hints=(
            "Write the sums of 12 blocks down, for k = 1 to 12. Which is the smallest?",
            "No formula is needed: there are only `blocks` values of k, and min takes a key. "
            "Which of two equals does min return?",
        ),
        solution=segments,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="04.3",
        title="Weights for uneven micro-batches",
        task="Write weights(counts): what the mean loss of each micro-batch is multiplied by, so "
        "that the gradients add up to the whole batch's.",
        cases=(
            Case(
                "equal parts",
                "12 samples in 3 micro-batches of 4: each mean counts one third",
                lambda f: all(abs(w - 1 / 3) < 1e-6 for w in _floats(f([4, 4, 4]))),
            ),
            Case(
                "they sum to 1",
                "counts 4, 4 and 2: if all losses were equal, the whole batch's mean would be "
                "that same loss, so the weights must sum to 1",
                _sum_to_one(4, 4, 2),
            ),
            Case(
                "a smaller last one",
                "counts 4, 4 and 2: the gradients do not add up to the whole batch's; each sample "
                "counts 1/10 there, so the mean over the last two counts 2/10, not 1/3",
                _give_the_gradient(4, 4, 2),
            ),
            Case(
                "no token in one",
                "counts 5, 0 and 3, as tokens that are not padding: a weight for each of the three "
                "micro-batches, 0 for the empty one, and the others in parts of 8",
                _give_the_gradient(5, 0, 3),
            ),
            unseen(_give_the_gradient(2, 7, 3), _give_the_gradient(1, 1, 6, 0, 4)),
        ),
        hints=(
            "What does one sample count in the mean over the whole batch? And how many samples "
            "are inside a micro-batch's mean?",
            "A mean over n samples is their sum over n. By what must it be multiplied to become "
            "their sum over N?",
        ),
        solution=weights,
        by_hand=("dlhelpers.*",),
    ),
    Exercise(
        id="04.4",
        title="Add the loss up",
        task="Write mean_loss(losses): the mean of the losses, a Python float, with at most one "
        "batch's graph alive.",
        cases=(
            Case(
                "the mean",
                "losses of 1, 2 and 6, in a list: their mean is 3",
                _is_the_mean(list, 1.0, 2.0, 6.0),
            ),
            Case(
                "a generator",
                "losses of 2 and 5 from a generator, as a training loop gives them: it has no "
                "len() and can be read only once, so count as you go",
                _is_the_mean(iter, 2.0, 5.0),
            ),
            Case(
                "a number",
                "the result is no Python float: a tensor may keep its graph, and a list of them "
                "every epoch's; loss.item() takes the number out",
                lambda f: isinstance(f(list(_Losses(1.0, 2.0))), float),
            ),
            Case(
                "one graph at a time",
                "while the next batch was computed, graphs of earlier ones were still alive: a sum "
                "or a list of losses keeps them all, with the activations inside; take the number "
                "out of each loss before you ask for the next",
                _one_graph_at_a_time,
            ),
            Case(
                "no backward pass",
                "backward() frees the graphs, and leaves gradients in the parameters that the next "
                "training step would add to: validation has no backward pass",
                _no_backward,
            ),
            unseen(_is_the_mean(iter, 0.5, 2.5, 9.0, 4.0, 1.0), _is_the_mean(iter, 7.0)),
        ),
        hints=(
            "What does total + loss return while loss has a grad_fn? What does that one refer to?",
            "Add numbers, not tensors. When must a tensor become a number, so that its graph can "
            "go?",
        ),
        solution=mean_loss,
        by_hand=("dlhelpers.*",),
    ),
    LARGEST_BATCH,
)
