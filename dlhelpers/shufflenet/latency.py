"""Can a model's time be told from its multiply-adds, activations and parameters?

Each costs its own time, and the times add up:

    t = a G + b A + c P + d + e G sqrt(G / A)

with G multiply-adds (10^9), A activations (10^6 elements that convolutions and matrix products
write) and P parameters (10^6), all coefficients 0 or more. The last term lets multiply-adds cost
more where few activations share many of them.

Source of the data: huggingface/pytorch-image-models, folder ``results``, Apache-2.0: two CPUs,
batch 1, float32, compiled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

__all__ = [
    "CPUS",
    "LatencyFormula",
    "fit_latency",
    "fit_power_law",
    "held_out_error",
    "predict_latency",
]


@dataclass(frozen=True)
class LatencyFormula:
    """The coefficients of a sum of times; its text is the formula.

    Attributes:
        multiply_adds_ms: milliseconds for each 10^9.
        activations_ms: for each 10^6 elements.
        params_ms: for each 10^6.
        fixed_ms: for each call.
        reuse_ms: for 10^9 multiply-adds on 10^6 activations, growing as sqrt(G / A) beyond.

    >>> formula = LatencyFormula(2.0, 0.5, 0.2, 1.0)
    >>> print(formula)
    t/ms = 2 G + 0.5 A + 0.2 P + 1
    >>> round(formula.predict_s(3e9, 2e6, 5e6), 6)
    0.009
    """

    multiply_adds_ms: float
    activations_ms: float
    params_ms: float
    fixed_ms: float
    reuse_ms: float = 0.0

    def __str__(self) -> str:
        terms = (
            (self.multiply_adds_ms, " G"),
            (self.activations_ms, " A"),
            (self.params_ms, " P"),
            (self.reuse_ms, " G sqrt(G/A)"),
            (self.fixed_ms, ""),
        )
        return "t/ms = " + " + ".join(f"{c:.3g}{name}" for c, name in terms if c > 0)

    def predict_s(self, multiply_adds: Any, activations: Any, params: Any) -> Any:
        """Return seconds of one call; numbers or arrays.

        Raises:
            ValueError: one of them is negative or not a number.
        """
        columns = _columns(multiply_adds, activations, params)
        found = columns @ np.array(astuple(self))
        return found / 1e3 if np.ndim(multiply_adds) else float(found[0]) / 1e3


def _columns(multiply_adds: Any, activations: Any, params: Any) -> np.ndarray:
    g, a, p = (
        np.atleast_1d(np.asarray(values, dtype=float)) / unit
        for values, unit in ((multiply_adds, 1e9), (activations, 1e6), (params, 1e6))
    )
    for name, values in (("multiply_adds", g), ("activations", a), ("params", p)):
        if not np.all(values >= 0):
            raise ValueError(f"{name} must be numbers, 0 or more; got {values[~(values >= 0)][:3]}")
    reuse = g * np.sqrt(np.divide(g, a, out=np.zeros_like(g), where=a > 0))
    return np.stack([g, a, p, np.ones_like(g), reuse], axis=1)


def fit_latency(
    multiply_adds: Sequence[float],
    activations: Sequence[float],
    params: Sequence[float],
    seconds: Sequence[float],
    *,
    reuse: bool = True,
) -> LatencyFormula:
    """Return the formula with the smallest mean relative error: sum of ``|predicted / t - 1|``.

    Args:
        multiply_adds, activations, params, seconds: one number for each model, all as counted.
        reuse: with the term that grows as sqrt(G / A).

    Raises:
        ValueError: fewer models than coefficients, or a time that is not positive.
    """
    from scipy.optimize import linprog

    columns = _columns(multiply_adds, activations, params)[:, : 5 if reuse else 4]
    t = np.asarray(seconds, dtype=float) * 1e3
    if len(t) != len(columns) or len(t) < columns.shape[1] or not np.all(t > 0):
        raise ValueError(
            f"{columns.shape[1]} models or more with one positive time each are needed, "
            f"got {len(columns)} models and {len(t)} times"
        )
    relative, one = columns / t[:, None], np.ones(len(t))
    bounds = np.block([[relative, -np.eye(len(t))], [-relative, -np.eye(len(t))]])
    cost = np.concatenate([np.zeros(columns.shape[1]), one])  # |relative c - 1| <= slack
    found = linprog(cost, bounds, np.concatenate([one, -one]))
    return LatencyFormula(*found.x[: columns.shape[1]].tolist())


def fit_power_law(features: Mapping[str, Sequence[float]], seconds: Sequence[float]) -> Any:
    """Return a function that predicts ``exp(sum of w_i log x_i + w_0)``, fitted by least squares.

    This is what a straight line on log axes assumes: costs multiply instead of adding up.

    Args:
        features: name -> one positive number for each model.
        seconds: one for each model.

    Raises:
        ValueError: a feature or a time is not a positive number, which has no logarithm.
    """
    for name, values in (*features.items(), ("seconds", seconds)):
        column = np.asarray(values, float)
        if wrong := column[~((column > 0) & np.isfinite(column))][:1].tolist():
            raise ValueError(f"{name} must be positive numbers, got {wrong[0]!r}")

    def logs(values: Mapping[str, Sequence[float]]) -> np.ndarray:
        columns = [np.log(np.asarray(values[name], float)) for name in features]
        return np.stack([*columns, np.ones_like(columns[0])], axis=1)

    weights, *_ = np.linalg.lstsq(logs(features), np.log(np.asarray(seconds, float)), rcond=None)
    return lambda values: np.exp(logs(values) @ weights)


def held_out_error(
    table: Mapping[str, Any],
    fit: Callable[[Mapping[str, Any]], Callable[[Mapping[str, Any]], np.ndarray]],
    *,
    splits: int = 20,
) -> float:
    """Return the median relative error of a prediction on families that it was not fitted to.

    A family is the letters that a model's name begins with. Half of the families are drawn and
    fitted, the error is the median ``|predicted / t - 1|`` over the models of the other half; of
    the splits the median is returned. Split number i is drawn with seed i.

    Args:
        table: name -> column; ``model`` and ``seconds`` among them.
        fit: takes the table of the drawn half, returns what predicts seconds from a table.
        splits: how often to draw.

    Raises:
        ValueError: fewer than two families.
    """
    family = np.array([re.match("[a-z]*", name, re.IGNORECASE)[0] for name in table["model"]])
    families, errors = sorted(set(family.tolist())), []
    if len(families) < 2:
        raise ValueError(f"two families of models or more are needed, got {families}")
    for seed in range(splits):
        drawn = np.random.default_rng(seed).permutation(families)[: len(families) // 2]
        is_fitted = np.isin(family, drawn)
        half, rest = (
            {name: np.asarray(column)[rows] for name, column in table.items()}
            for rows in (is_fitted, ~is_fitted)
        )
        errors.append(np.median(abs(fit(half)(rest) / rest["seconds"] - 1)))
    return float(np.median(errors))


# fitted to all rows of the two published tables; a test fits them again
CPUS = {
    "i9-10940X": LatencyFormula(0.0, 0.474, 0.203, 2.90, 0.722),
    "i7-12700H": LatencyFormula(3.52, 0.841, 0.275, 1.01, 1.30),
}


def predict_latency(
    multiply_adds: float, activations: float, params: float, *, cpu: str = "i7-12700H"
) -> float:
    """Return the seconds that a compiled image model takes for one image on a published CPU.

    Half of the models lie within some 10 % (i7) or 20 % (i9) of it; notebook 05 measures that.

    Args:
        multiply_adds, activations, params: of the model, as ``layer_costs`` counts them.
        cpu: ``i9-10940X`` or ``i7-12700H``; for another one measure some models and
            ``fit_latency``.

    Raises:
        ValueError: another CPU; or a negative number.

    >>> 0.004 < predict_latency(1.8e9, 2.5e6, 11.7e6) < 0.02  # ResNet-18
    True
    """
    if cpu not in CPUS:
        raise ValueError(f"cpu must be one of {sorted(CPUS)}, got {cpu!r}: or use fit_latency")
    return CPUS[cpu].predict_s(multiply_adds, activations, params)
