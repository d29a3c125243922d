"""What does a run of the script take, and what does it give?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from dlhelpers.memory.report import mib
from dlhelpers.tables import duration, facts_table

__all__ = ["ScriptRun", "Training"]


class Training(NamedTuple):
    """A trained network, and what training took.

    Attributes:
        model: trained.
        epochs: that it needed to reach the target, or its limit.
        accuracy: on the validation photographs, at the end.
        train_s, validate_s: seconds.
    """

    model: nn.Sequential
    epochs: int
    accuracy: float
    train_s: float
    validate_s: float


@dataclass(frozen=True, repr=False)
class ScriptRun:
    """What a run of the script took and gave.

    Attributes:
        train_s, validate_s, score_s: seconds of its three parts.
        epochs: that training needed to reach the target, or its limit.
        accuracy: on the validation photographs, at the end.
        labels: class of each photograph that was scored.
        peak_bytes: of tensors, of a training step or of validation, whichever is larger.
    """

    train_s: float
    validate_s: float
    score_s: float
    epochs: int
    accuracy: float
    labels: tuple[int, ...]
    peak_bytes: int = 0

    @property
    def total_s(self) -> float:
        """All three parts."""
        return self.train_s + self.validate_s + self.score_s

    def _facts(self) -> list[tuple[str, str]]:
        return [
            ("training", f"{duration(self.train_s)} in {self.epochs} epochs"),
            ("validation", duration(self.validate_s)),
            ("scoring", duration(self.score_s)),
            ("in all", duration(self.total_s)),
            ("accuracy of validation", f"{self.accuracy:.0%}"),
            ("peak memory of its tensors", mib(self.peak_bytes)),
        ]

    def __repr__(self) -> str:
        return " · ".join(f"{name} {value}" for name, value in self._facts())

    def _repr_html_(self) -> str:
        return facts_table(self._facts())

    def agreement(self, other: ScriptRun) -> float:
        """Return the share of photographs to which both give the same class."""
        same = sum(one == two for one, two in zip(self.labels, other.labels, strict=True))
        return same / len(self.labels)
