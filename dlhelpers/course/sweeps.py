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

from dlhelpers.measure import Estimate, estimate_difference

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

    @property
    def is_bracketed(self) -> bool:
        """Does the grid go on beyond the best rate on both sides? If not, a better may follow."""
        return min(self.rates) < self.best_rate < max(self.rates)

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

    def lost(self, against: Sweep, *, rate: float | None = None) -> Estimate:
        """Return how many percentage points this side's test accuracy is below ``against``'s.

        Paired seed by seed, at one rate of the grid; each side at its best where rate is None.

        Raises:
            ValueError: the grid lacks the rate, or the sides have different seeds.
        """
        own, other = (s.at_best if rate is None else s.at(rate) for s in (self, against))
        return estimate_difference(own, other, unit="points")

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
        make: seed -> model; without buffers, dropout, and frozen or shared parameters.
        loss: (outputs, targets) -> scalar.
        train: (inputs [N, ...], targets [N, ...]), 5 samples or more; every fifth is held out.
        test: the same, looked at once at the end.
        rates: the grid of learning rates.
        seeds: 0 to seeds - 1, of weights and order of batches.
        optimizer: ``sgd`` or ``adam``.
        right: (outputs [N, ...], targets [N, ...]) -> truth values [N]; largest output where None.

    Raises:
        ValueError: an empty or not positive grid, or a rate twice; an unknown optimizer; seeds,
            epochs or batch_size below 1; inputs without their targets; a model that cannot be
            stacked; a loss that is not one number, or ``right`` not one truth value a sample.
    """
    _check_grid(rates, optimizer, seeds=seeds, epochs=epochs, batch_size=batch_size)
    _check_samples("train", train, 5)
    _check_samples("test", test, 1)
    models = [make(seed) for seed in range(seeds)]
    _check_model(models[0])
    right = right or (lambda outputs, targets: outputs.argmax(-1) == targets)
    held_out = torch.arange(len(train[0])) % 5 == 4
    own, kept = ([part[mask] for part in train] for mask in (~held_out, held_out))
    stacked, _ = stack_module_state(models)
    params = {  # [R * S, ...], the seeds of the first rate first
        name: p.detach().repeat(len(rates), *[1] * (p.dim() - 1)).requires_grad_()
        for name, p in stacked.items()
    }

    def loss_of(own_params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        value = loss(functional_call(models[0], own_params, (x,)), y)
        if value.numel() != 1:
            raise ValueError(
                f"the loss must be one number a batch, got shape {tuple(value.shape)}: "
                'take its mean, or reduction="mean"'
            )
        return value

    losses, names = vmap(loss_of), list(params)
    step = _Steps(params, [rate for rate in rates for _ in range(seeds)], optimizer)
    for order in _orders(len(own[0]), seeds, epochs):
        for batch in order.repeat(len(rates), 1).split(batch_size, dim=1):
            total = losses(params, own[0][batch], own[1][batch]).sum()
            step(dict(zip(names, torch.autograd.grad(total, params.values()), strict=True)))

    def percent(part: Sequence[Tensor]) -> tuple[tuple[float, ...], ...]:
        inputs, targets = part

        def outputs(own_params: dict[str, Tensor]) -> Tensor:
            return functional_call(models[0], own_params, (inputs,))

        with torch.no_grad():
            hits = [right(o, targets) for o in vmap(outputs)(params)]
        if hits[0].shape != inputs.shape[:1]:
            raise ValueError(
                f"right must give one truth value for each of {len(inputs)} samples, got shape "
                f"{tuple(hits[0].shape)} for outputs and targets {tuple(targets.shape)}"
            )
        found = [100 * hit.double().mean().item() for hit in hits]
        return tuple(tuple(found[i : i + seeds]) for i in range(0, len(found), seeds))

    return Sweep(tuple(rates), percent(kept), percent(test))


def _check_grid(rates: Sequence[float], optimizer: str, **counts: int) -> None:
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"rates must be positive numbers, at least one, got {list(rates)}")
    if len(set(rates)) < len(rates):
        raise ValueError(f"each rate is trained once: {list(rates)} names one twice")
    if optimizer not in ("sgd", "adam"):
        raise ValueError(f"optimizer {optimizer!r} is not one of 'adam', 'sgd'")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be 1 or more, got {count}")


def _check_samples(name: str, samples: tuple[Tensor, Tensor], least: int) -> None:
    inputs, targets = samples
    if len(inputs) != len(targets) or len(inputs) < least:
        raise ValueError(
            f"{name} must have the same number of inputs and targets, {least} or more: got "
            f"{len(inputs)} and {len(targets)}"
        )


def _check_model(model: nn.Module) -> None:
    """Refuse what one vmapped step over stacked parameters would get wrong without a word."""
    found = {
        "buffers, such as BatchNorm's,": any(True for _ in model.buffers()),
        "dropout": any(isinstance(m, nn.modules.dropout._DropoutNd) for m in model.modules()),
        "frozen parameters": not all(p.requires_grad for p in model.parameters()),
        "shared parameters": len(list(model.parameters()))
        < len(list(model.named_parameters(remove_duplicate=False))),
    }
    for what, is_there in found.items():
        if is_there:
            raise ValueError(f"a model with {what} cannot be stacked here: make one without")


class _Steps:
    """Moves stacked parameters [M, ...], each model's by its own rate, as torch.optim does."""

    def __init__(self, params: dict[str, Tensor], rates: list[float], optimizer: str) -> None:
        self.params, self.is_adam, self.count = params, optimizer == "adam", 0
        self.rates = {n: _column(rates, p) for n, p in params.items()}
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


def _column(rates: list[float], like: Tensor) -> Tensor:
    """Return the rates [M, 1, ...] on the device of ``like``, in float32 or its wider dtype."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.tensor(rates, dtype=dtype, device=like.device).view(-1, *[1] * (like.dim() - 1))


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
