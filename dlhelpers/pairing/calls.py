"""What was a loss called with? One description of a call, whoever made it.

A module (``nn.CrossEntropyLoss(ignore_index=0)``), a function (``F.cross_entropy``) and a
``functools.partial`` of one all become a :class:`LossCall`: the function's name, the prediction,
the target, the other tensors and the options that matter. The names of arguments are read from
the functions themselves, so a release that adds one needs no change here.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .values import all_finite

__all__ = [
    "LOSSES",
    "NAME_OF",
    "Inside",
    "LossCall",
    "bind",
    "calls_inside",
    "describe_call",
    "with_forgotten",
]

_MODULES = {
    "binary_cross_entropy": nn.BCELoss,
    "binary_cross_entropy_with_logits": nn.BCEWithLogitsLoss,
    "cosine_embedding_loss": nn.CosineEmbeddingLoss,
    "cross_entropy": nn.CrossEntropyLoss,
    "ctc_loss": nn.CTCLoss,
    "gaussian_nll_loss": nn.GaussianNLLLoss,
    "hinge_embedding_loss": nn.HingeEmbeddingLoss,
    "huber_loss": nn.HuberLoss,
    "kl_div": nn.KLDivLoss,
    "l1_loss": nn.L1Loss,
    "margin_ranking_loss": nn.MarginRankingLoss,
    "mse_loss": nn.MSELoss,
    "multi_margin_loss": nn.MultiMarginLoss,
    "multilabel_margin_loss": nn.MultiLabelMarginLoss,
    "multilabel_soft_margin_loss": nn.MultiLabelSoftMarginLoss,
    "nll_loss": nn.NLLLoss,
    "poisson_nll_loss": nn.PoissonNLLLoss,
    "smooth_l1_loss": nn.SmoothL1Loss,
    "soft_margin_loss": nn.SoftMarginLoss,
}

LOSSES: dict[str, Callable[..., Tensor]] = {name: getattr(F, name) for name in _MODULES}
"""The losses that are looked at, by the name of their function in ``torch.nn.functional``."""

NAME_OF = {function: name for name, function in LOSSES.items()}

_PREDICTION = ("input", "log_probs", "input1")
_TARGET = ("target", "targets")
_NAMES_BY_FUNCTION = {
    name: tuple(inspect.signature(function).parameters) for name, function in LOSSES.items()
}


@dataclass(frozen=True)
class LossCall:
    """One call of a loss.

    Attributes:
        name: the function's name in ``torch.nn.functional``, such as ``cross_entropy``.
        prediction: first tensor, as it was given; None where only a model is known.
        target: the tensor that it is compared with.
        options: every other argument that was given, by name: ``input2``, ``var``,
            ``input_lengths``, ``reduction``, ``ignore_index``, ``log_target`` and so on.
    """

    name: str
    prediction: Any
    target: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reduction(self) -> str:
        """``mean``, ``sum``, ``none`` or ``batchmean``."""
        return self.options.get("reduction", "mean")

    @property
    def arguments(self) -> dict[str, Any]:
        """Everything that ``LOSSES[name]`` is called with, by the function's own names."""
        names = _NAMES_BY_FUNCTION[self.name]
        target = next(name for name in names if name in _TARGET)
        return {names[0]: self.prediction, target: self.target, **self.options}


@dataclass
class Inside:
    """What happened inside of one call of a loss.

    Attributes:
        calls: the torch losses that it called, in order.
        value: what it returned.
        error: what it raised.
        raised: the one of ``calls`` that raised, None where it was another line.
        not_finite: the first of ``calls`` whose value holds nan or inf.
        arguments: what it was called with.
        steps: every call of a torch function: (function, args, kwargs, result), in order.
        is_random: whether it drew from torch's generator, or from one of its own.
        notes: how it was called, where that is not as the reader would.
    """

    calls: list[LossCall] = field(default_factory=list)
    value: Any = None
    error: Exception | None = None
    raised: LossCall | None = None
    not_finite: LossCall | None = None
    arguments: tuple = ()
    steps: list[tuple[Callable, tuple, Mapping[str, Any], Any]] = field(default_factory=list)
    is_random: bool = False
    notes: list[str] = field(default_factory=list)


def bind(name: str, args: tuple, kwargs: Mapping[str, Any]) -> LossCall:
    """Name the arguments of a call of ``LOSSES[name]``.

    Raises:
        TypeError: more arguments than the function has.
    """
    names = _NAMES_BY_FUNCTION[name]
    if len(args) > len(names):
        raise TypeError(f"{name} takes {len(names)} arguments, not {len(args)}")
    options = {**dict(zip(names, args, strict=False)), **kwargs}
    prediction = _take(options, _PREDICTION)
    target = _take(options, _TARGET)
    return LossCall(name, prediction, target, options)


def _take(options: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((options.pop(name) for name in names if name in options), None)


def describe_call(loss: object, prediction: object, targets: object) -> LossCall | None:
    """Describe ``loss(prediction, targets)``, or return None for a loss that is not torch's.

    Args:
        loss: module of ``torch.nn``, function of ``torch.nn.functional`` or a partial of one.
        prediction: first argument.
        targets: second argument. A tuple holds what follows the prediction in the order of the
            loss: ``(targets, input_lengths, target_lengths)`` for CTC, ``(target, var)`` for
            GaussianNLL, ``(input2, target)`` for CosineEmbedding and MarginRanking.

    Raises:
        TypeError: more arguments than the loss takes.
    """
    rest = tuple(targets) if isinstance(targets, tuple) else (targets,)
    if isinstance(loss, nn.Module):
        name = _name_of_module(loss)
        if name is None:
            return None
        takes = len(inspect.signature(type(loss).forward).parameters) - 1
        if len(rest) + 1 > takes:
            raise TypeError(f"{type(loss).__name__} takes {takes} arguments, not {len(rest) + 1}")
        options = {
            key: getattr(loss, key)
            for key in _NAMES_BY_FUNCTION[name]
            if key not in ("size_average", "reduce") and hasattr(loss, key)
        }
        return bind(name, (prediction, *rest), options)
    args, kwargs = (), {}
    while isinstance(loss, functools.partial):
        args, kwargs, loss = (*loss.args, *args), {**loss.keywords, **kwargs}, loss.func
    if isinstance(loss, nn.Module):
        return None if args or kwargs else describe_call(loss, prediction, targets)
    name = NAME_OF.get(loss)
    return None if name is None else bind(name, (*args, prediction, *rest), kwargs)


def _name_of_module(loss: nn.Module) -> str | None:
    """Return the function that a loss module stands for; None where forward is overridden."""
    for name, kind in _MODULES.items():
        if isinstance(loss, kind) and type(loss).forward is kind.forward:
            return name
    return None


def with_forgotten(
    function: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return ``kwargs`` and what torch leaves out on the way to a mode: the weight of ``l1_loss``.

    ``F.l1_loss`` (torch 2.14) passes no weight on, so that under any mode it is another function.
    To be called by ``__torch_function__`` itself: the frame of ``function`` is close.
    """
    names = _NAMES_BY_FUNCTION[NAME_OF[function]]
    absent = [name for name in names[len(args) :] if name not in kwargs]
    frame, code = sys._getframe(1), getattr(function, "__code__", None)
    for _ in range(4):
        if not absent or code is None or frame is None:
            break
        if frame.f_code is code:
            return {**kwargs, **{name: frame.f_locals[name] for name in absent}}
        frame = frame.f_back
    return dict(kwargs)


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.inside = Inside()

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        value = self._call(func, args, kwargs)
        self.inside.steps.append((func, args, kwargs, value))
        return value

    def _call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func not in NAME_OF:
            return func(*args, **kwargs)
        kwargs = with_forgotten(func, args, kwargs)
        try:
            call = bind(NAME_OF[func], args, kwargs)
        except TypeError:  # more arguments than it takes: it raises by itself
            return func(*args, **kwargs)
        self.inside.calls.append(call)
        try:
            value = func(*args, **kwargs)
        except Exception:
            self.inside.raised = call
            raise
        if self.inside.not_finite is None and not all_finite(value):
            self.inside.not_finite = call
        return value


def calls_inside(loss: Callable, *args: object) -> Inside:
    """Call ``loss(*args)`` once and return what happened; what it raises is kept, not raised."""
    before = torch.get_rng_state()
    with _Recorder() as recorder:
        inside = recorder.inside
        inside.arguments = args
        try:
            inside.value = loss(*args)
        except Exception as error:
            inside.error = error
    own = any(kwargs.get("generator") is not None for _, _, kwargs, _ in inside.steps)
    inside.is_random = own or not torch.equal(before, torch.get_rng_state())
    return inside
