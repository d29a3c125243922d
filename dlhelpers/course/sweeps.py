"""How well does a network learn at each learning rate, and at its best one?

Which of two ways to train is better depends on the learning rate, and the best rate of one is not
that of the other. So each side is trained over the same grid, picks its rate on data held out from
training, and is compared at its own. All rates and seeds are trained at once: their parameters are
stacked, and one vmapped step moves all of them, as ``training.fit`` would move each by itself.

Source: Choi et al. 2019, On Empirical Comparisons of Optimizers, arXiv:1910.05446, section 4: what
comes out first depends on the grid that each side may search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

__all__ = ["Sweep", "sweep"]

_BETAS, _EPS = (0.9, 0.999), 1e-8  # Adam's, torch's own defaults


@dataclass(frozen=True)
class Sweep:
    """Accuracy over learning rates.

    Attributes:
        rates: in the order of the grid.
        validation: rate -> seed -> percent right of the samples held out from training.
        test: the same of the test samples; nothing is chosen by it.
    """

    rates: tuple[float, ...]
    validation: tuple[tuple[float, ...], ...]
    test: tuple[tuple[float, ...], ...]

    @property
    def best_rate(self) -> float:
        """The rate with the highest mean accuracy on the held-out samples; of equals the first."""
        return max(self.rates, key=lambda rate: _mean(self.validation[self.rates.index(rate)]))

    def at(self, rate: float) -> tuple[float, ...]:
        """Return the test accuracies at a rate of the grid, one a seed, in percent.

        Raises:
            ValueError: the grid lacks the rate.
        """
        if rate not in self.rates:
            raise ValueError(f"the grid is {self.rates}, got {rate}")
        return self.test[self.rates.index(rate)]

    @property
    def at_best(self) -> tuple[float, ...]:
        """Test accuracies at the best rate, one a seed, in percent."""
        return self.at(self.best_rate)

    def curve(self) -> tuple[tuple[float, ...], ...]:
        """Return log10 of the rates, mean, lowest and highest test accuracy, for a figure."""
        ends = (_mean, min, max)
        return tuple(map(math.log10, self.rates)), *(tuple(map(end, self.test)) for end in ends)

    def best_point(self) -> tuple[float, float]:
        """Return log10 of the best rate, and the mean test accuracy there."""
        return math.log10(self.best_rate), _mean(self.at_best)


def sweep(
    make: Callable[[int], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    rates: Sequence[float],
    seeds: int = 5,
    epochs: int = 30,
    optimizer: str = "sgd",
    batch_size: int = 64,
    right: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Sweep:
    """Train a network at every rate and for every seed; return the accuracies.

    Args:
        make: seed -> model; without buffers, dropout and shared parameters.
        loss: (outputs, targets) -> scalar.
        train: (inputs [N, ...], targets [N, ...]); every fifth sample is held out.
        test: the same, looked at once at the end.
        rates: the grid of learning rates.
        seeds: 0 to seeds - 1, of weights and order of batches.
        optimizer: ``sgd`` or ``adam``.
        right: (outputs [N, ...], targets [N, ...]) -> truth values [N]; largest output where None.

    Raises:
        ValueError: an empty or not positive grid, an unknown optimizer, or a model with buffers.
    """
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"rates must be positive numbers, at least one, got {list(rates)}")
    if optimizer not in ("sgd", "adam"):
        raise ValueError(f"optimizer {optimizer!r} is not one of 'adam', 'sgd'")
    models = [make(seed) for seed in range(seeds)]
    if any(True for model in models for _ in model.buffers()):
        raise ValueError("a model with buffers, such as BatchNorm's, cannot be stacked here")
    right = right or (lambda outputs, targets: outputs.argmax(-1) == targets)
    held_out = torch.arange(len(train[0])) % 5 == 4
    own, kept = ([part[mask] for part in train] for mask in (~held_out, held_out))
    stacked, _ = stack_module_state(models)
    params = {  # [R * S, ...], the seeds of the first rate first
        name: p.detach().repeat(len(rates), *[1] * (p.dim() - 1)).requires_grad_()
        for name, p in stacked.items()
    }

    def loss_of(own_params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(models[0], own_params, (x,)), y)

    losses, names = vmap(loss_of), list(params)
    step = _Steps(params, torch.tensor(list(rates)).repeat_interleave(seeds), optimizer)
    for order in _orders(len(own[0]), seeds, epochs):
        for batch in order.repeat(len(rates), 1).split(batch_size, dim=1):
            total = losses(params, own[0][batch], own[1][batch]).sum()
            step(dict(zip(names, torch.autograd.grad(total, params.values()), strict=True)))

    def percent(part: Sequence[Tensor]) -> tuple[tuple[float, ...], ...]:
        inputs, targets = part

        def outputs(own_params: dict[str, Tensor]) -> Tensor:
            return functional_call(models[0], own_params, (inputs,))

        with torch.no_grad():
            found = [100 * right(o, targets).double().mean().item() for o in vmap(outputs)(params)]
        return tuple(tuple(found[i : i + seeds]) for i in range(0, len(found), seeds))

    return Sweep(tuple(rates), percent(kept), percent(test))


class _Steps:
    """Moves stacked parameters [M, ...], each model's by its own rate, as torch.optim does."""

    def __init__(self, params: dict[str, Tensor], rates: Tensor, optimizer: str) -> None:
        self.params, self.is_adam, self.count = params, optimizer == "adam", 0
        self.rates = {n: rates.view(-1, *[1] * (p.dim() - 1)) for n, p in params.items()}
        self.moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in params.items()}

    @torch.no_grad()
    def __call__(self, gradients: dict[str, Tensor]) -> None:
        self.count += 1
        for name, g in gradients.items():
            move = self._scaled(name, g) if self.is_adam else g
            self.params[name].sub_(self.rates[name] * move)

    def _scaled(self, name: str, g: Tensor) -> Tensor:
        first, second = self.moments[name]
        first.lerp_(g, 1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(g, g, value=1 - _BETAS[1])
        corrected = (1 - beta**self.count for beta in _BETAS)
        scale, root = next(corrected), math.sqrt(next(corrected))
        return first / scale / (second.sqrt() / root + _EPS)


def _orders(count: int, seeds: int, epochs: int) -> list[Tensor]:
    """Return an order of samples [S, N] an epoch, each seed's as ``training.fit`` draws it."""
    drawn = []
    for seed in range(seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn.append([torch.randperm(count) for _ in range(epochs)])
    return [torch.stack(epoch) for epoch in zip(*drawn, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
