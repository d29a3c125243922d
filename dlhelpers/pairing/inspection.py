"""``check``: look at one call of a loss, or at a model and the loss that it is trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dlhelpers.findings import Findings
from dlhelpers.models import unwrapped

from .activations import activation_hits
from .calls import Inside, LossCall, describe_call
from .catalog import Hit, finding
from .causes import missing
from .forms import form_hits
from .probe import as_tensor, first_tensor, restored, run_model
from .static import head_of_model, softmax_without_dim
from .tape import Tape
from .trace import UNKNOWN, Head, head_of_tensor
from .trial import call_own, option_hits, own_hits, said, trial_hits
from .unseen import NO_RULE, formula_hits
from .values import Values
from .weights import weight_hits

__all__ = ["check", "look"]

_GIVE = "call pairing.check(model, loss, targets, inputs)"


def check(
    model_or_outputs: object, loss: object, targets: object, inputs: object = None
) -> Findings:
    """Find what does not fit between a model's last layer, a loss and its targets.

    Args:
        model_or_outputs: the outputs [N, ...] that go into the loss (of a tuple the first tensor,
            of a mapping ``logits`` or ``out``), or a model (any callable). A module is run on
            ``inputs`` where they are given, else its torch.fx graph and module list are read.
        loss: module of ``torch.nn``, function of ``torch.nn.functional``, partial of one; any
            other callable is called with the whole outputs and targets (with the first tensor,
            with a tuple's parts, where that fails), and the torch losses inside are looked at,
            then what its recorded operations give for other outputs. What the loss raises, and a
            value that is nan or inf, is a finding.
        targets: as the loss takes them; arrays and lists of numbers become tensors. A
            tuple holds all that follows the prediction:
            ``(targets, input_lengths, target_lengths)`` for CTC, ``(target, var)`` for
            GaussianNLL, ``(input2, target)`` for CosineEmbedding and MarginRanking.
        inputs: the model's argument, a tuple of arguments or a mapping of keyword arguments.

    Returns:
        Findings, errors first; where there are none they print "nothing found", or "not looked
        at" and why: no rule for this loss, no inputs to run the model on. Never raises on odd
        arguments, never runs backward. A loss of torch's is called once on detached tensors,
        another one on a deep copy. Afterwards modes, parameters, gradients, buffers, random
        states, generators, attributes, and the tensors in closures and globals are as before;
        what a function writes elsewhere (a list of its closure, a file) stays. A note below the
        findings says where the loss has no deep copy, and with what it was called where it
        raises for the outputs or targets as given.

    >>> import torch
    >>> from torch import nn
    >>> labels = torch.tensor([0, 2, 1])
    >>> print(check(torch.randn(3, 4).softmax(1), nn.CrossEntropyLoss(), labels)[0].name)
    softmax-into-cross-entropy
    >>> check(torch.tensor([[2.0, -1.0], [0.5, 3.0]]), nn.CrossEntropyLoss(), labels[:2] % 2)
    nothing found
    """
    hits: list[Hit] = []
    scope: list[str] = []
    notes: list[str] = []
    try:
        hits.extend(_check(model_or_outputs, loss, targets, inputs, scope, notes))
    except Exception as error:  # odd arguments have errors of every kind
        hits.append(_failed(error))
    found = _worded(hits)
    if scope:
        found.scope = scope[-1]
        notes += [scope[-1]] if found and scope[-1].startswith("not looked at") else []
    found.note = "; ".join(notes)
    return found


def _failed(error: BaseException) -> Hit:
    return Hit("check-failed", "suspicion", f"{type(error).__name__}: {str(error)[:200]}", "rule")


def _worded(hits: list[Hit]) -> Findings:
    ordered = sorted(hits, key=lambda hit: hit.severity != "error")
    unique = {hit.name: hit for hit in reversed(ordered)}
    ordered = [hit for hit in ordered if unique[hit.name] is hit]
    return Findings(finding(hit) for hit in ordered)


def _check(
    model: object,
    loss: object,
    targets: object,
    inputs: object,
    scope: list[str],
    notes: list[str],
) -> Iterator[Hit]:
    head = UNKNOWN
    if not callable(loss) or isinstance(loss, type):
        yield Hit("not-a-loss", "error", f"the loss is {loss!r:.60}", "rule")
        return
    try:
        describe_call(loss, None, targets)
    except TypeError as error:  # more arguments than the loss takes
        why = "The tuple of targets is too long: options are given to the loss when it is made."
        remedy = "pairing.check(outputs, loss, targets)"
        yield Hit("loss-raised", "error", said(error), "rule", why=why, remedy=remedy)
        return
    if callable(model) and not isinstance(model, Tensor):
        model = unwrapped(model)
        static = _head_without_a_run(model)
        if inputs is None:
            call = describe_call(loss, None, as_tensor(targets))
            if call is not None:
                yield from option_hits(call)
            if call is not None and static.is_known:
                hidden = Values(None)
                yield from activation_hits(call, static, hidden, Values(call.target))
            if call is None:
                scope.append(f"{NO_RULE}, and no outputs: {_GIVE}")
            elif static.kind in ("unknown", "other") and static.before is None:
                scope.append(f"not looked at: what the model ends with is not seen: {_GIVE}")
            yield from _guessed_axes(model)
            return
        try:
            outputs = run_model(model, inputs)
        except Exception as error:  # a finding, not a crash
            what = f"{type(error).__name__}: {str(error)[:200]}"
            yield Hit("model-raised", "error", what, "rule")
            outputs = None
            call = describe_call(loss, None, targets)
            if call is not None and static.is_known:
                yield from activation_hits(call, static, Values(None), Values(call.target))
            return
        tensor = first_tensor(outputs)
        head = head_of_tensor(tensor) if tensor is not None else UNKNOWN
        if not head.is_known or (head.kind == "other" and static.kind == "linear"):
            head = static  # a frozen layer shows no parameter in the graph
        elif head.kind == static.kind:
            head = replace(head, where=static.where)
        yield from _guessed_axes(model)
    else:
        outputs = model
        tensor = first_tensor(outputs)
        tensor = tensor if tensor is not None else as_tensor(outputs)
        head = head_of_tensor(tensor) if isinstance(tensor, Tensor) else UNKNOWN
    tensor = tensor if tensor is not None else as_tensor(outputs)
    numbers = tuple(map(as_tensor, targets)) if type(targets) is tuple else as_tensor(targets)
    call = describe_call(loss, tensor, numbers)
    if call is not None:
        hits = list(look(call, head))
        if missing(call):  # what there is stands in the wrong place
            hits = [hit for hit in hits if hit.name != "not-a-tensor"]
        yield from hits
        yield from trial_hits(call, hits)
    else:
        inside = call_own(loss, ((outputs, targets), (tensor, numbers)))
        notes += inside.notes
        with restored(loss):  # its call is played again, which may write into its buffers
            hits = list(_look_inside(loss, inside, head, scope))
        yield from hits


def _guessed_axes(model: object) -> Iterator[Hit]:
    for path in softmax_without_dim(model) if isinstance(model, nn.Module) else ():
        yield Hit("softmax-without-dim", "suspicion", f"module {path}", "rule", path)


def _head_without_a_run(model: object) -> Head:
    if not isinstance(model, nn.Module):
        return UNKNOWN
    if all(map(_is_plain, model.modules())):
        return head_of_model(model)
    with restored(model):  # torch.fx runs the Python code of forward
        return head_of_model(model)


def _is_plain(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module).__module__.startswith("torch.nn.") and not hooked


def look(call: LossCall, head: Head | None = None, limit: int | None = None) -> Iterator[Hit]:
    """Yield every hit of one call; a rule that fails on odd values is said, not raised.

    Args:
        call: what the loss was called with.
        head: the traced activation; read from the prediction's graph where it is None.
        limit: look at this many elements at most (a sample), None for all.
    """
    if head is None:
        is_tensor = isinstance(call.prediction, Tensor)
        head = head_of_tensor(call.prediction) if is_tensor else UNKNOWN
    with torch.no_grad():
        prediction, target = Values(call.prediction, limit), Values(call.target, limit)
        rules: tuple[Callable[[], Iterator[Hit]], ...] = (
            lambda: form_hits(call, prediction, target),
            lambda: activation_hits(call, head, prediction, target),
            lambda: weight_hits(call),
        )
        broken: list[Hit] = []
        for rule in rules:
            try:
                broken.extend(rule())
            except Exception as error:  # see check
                broken.append(_failed(error))
    yield from _without_contradictions(call, head, prediction, broken)


def _without_contradictions(
    call: LossCall, head: Head, prediction: Values, hits: list[Hit]
) -> Iterator[Hit]:
    names = {hit.name for hit in hits}
    for hit in hits:
        if hit.name == "class-axis-ambiguous":
            sure = head.axis == 1 or prediction.sums_to_one(1, log=True)
            if sure or "softmax-over-wrong-axis" in names:
                continue
        if "swapped-arguments" in names and hit.evidence == "values" and "into" in hit.name:
            continue
        yield hit


def _look_inside(
    loss: Callable[..., Any], inside: Inside, head: Head, scope: list[str]
) -> Iterator[Hit]:
    """Look at the call of a loss of the reader's own, and at the torch losses that it called."""
    known: list[Hit] = []
    for call in _with_graph(inside):
        known.extend(look(call))
    yield from known
    raised = list(own_hits(loss, inside, known))
    if inside.error is None and not any(hit.severity == "error" for hit in known):
        hits, seen = formula_hits(inside, head)
        scope.append(seen)
        yield from hits
        if any(hit.severity == "error" for hit in hits):
            raised = []  # its nan is what comes of it
    yield from raised


def _with_graph(inside: Inside) -> list[LossCall]:
    """Return the torch losses called inside; where the outputs had no graph, with one from them."""
    output = first_tensor(inside.arguments[0])
    if not inside.calls or output is None or output.requires_grad:
        return inside.calls
    with torch.enable_grad():
        try:
            leaf = output.detach().requires_grad_()
        except RuntimeError:  # integers
            return inside.calls
        made = Tape(inside).play([(output, leaf)])
    if made is None:
        return inside.calls
    predictions = [made.get(id(call.prediction), call.prediction) for call in inside.calls]
    pairs = zip(inside.calls, predictions, strict=True)
    return [replace(call, prediction=prediction) for call, prediction in pairs]
