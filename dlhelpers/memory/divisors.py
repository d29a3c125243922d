"""By what does a loss divide? Its autograd graph says so, from the number back to the samples.

A mean is S / d with S a sum over samples. d is the total weight that ``nll_loss`` keeps (class
weights, without the targets ignored), the number of elements of a mean, or the number that a sum is
divided by. Terms of the parameters alone (weight decay in the loss) are the same in each batch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dlhelpers.trees import tensors_in

__all__ = ["Term", "terms_of"]

_SAME = ("Neg", "ToCopy", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Clone")
_SAME += ("Alias", "Select")
_ADDED = ("Add", "Sub", "Rsub")
_ELEMENTWISE = (*_SAME, *_ADDED, "Mul", "Div", "Pow", "Sqrt", "Log", "Exp", "Relu", "Clamp", "Abs")
_ELEMENTWISE += ("ClampMin", "ClampMax")
_MIXING = ("Topk", "Kthvalue", "Median", "Max", "Min", "Amax", "Amin", "Var", "Std", "Logsumexp")
_OF_PARAMETERS = (*_SAME, *_ADDED, "Mul", "Pow", "Abs", "Norm", "LinalgVectorNorm", "Sum", "Mean")
_OF_PARAMETERS += ("Sqrt", "Stack", "Cat", "Exp", "Log", "T", "Transpose", "Permute", "Div", "Mm")
_OF_PARAMETERS += ("Softplus", "Sigmoid", "Tanh", "Log1P", "Expm1", "Reciprocal", "Rsqrt", "Relu")
_OF_PARAMETERS += ("Clamp", "ClampMin", "ClampMax", "Trace", "Diagonal", "Logsumexp", "Lgamma")
_READ_THROUGH = {*_OF_PARAMETERS, "Mul", "Div"}
_MOST_TERMS = 10_000  # a number added to itself again and again has 2, 4, 8 ... of them


@dataclass(frozen=True)
class Term:
    """One addend of a loss.

    Attributes:
        kind: mean, sum, parameters (of these alone), or unknown.
        name: of the node that says so.
        divisor: what a mean divides its sum by.
        scale: what the term is multiplied by.
        is_certain: a criterion of torch or a mean says so, not a sum or quotient of the user's own.
        over: the numbers that a term of the parameters is divided by.
        mixes: it is a mean of what compares samples with each other: the largest ones, a variance.
    """

    kind: str
    name: str
    divisor: float = 1.0
    scale: float = 1.0
    is_certain: bool = True
    over: tuple[float, ...] = ()
    mixes: bool = False


def terms_of(loss: Tensor) -> list[Term]:
    """Return the terms of a loss, but for those times 0.

    Of what a hook for saved tensors keeps, numbers that it keeps as they are can be read, as
    ``save_on_cpu`` and ``measure_peak`` do; no hook is called: a checkpoint would be recomputed.

    >>> import torch
    >>> z, y = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, -100, 1])
    >>> [term.divisor for term in terms_of(torch.nn.functional.cross_entropy(z, y))]
    [3.0]
    """
    read = _Read({}, {})
    for node in _sources_first(loss.grad_fn):
        read.of_parameters[node] = _is_of_parameters(node, read)
        read.terms[node] = _terms(node, read)
    terms = read.terms.get(loss.grad_fn, [])
    if sum(term.mixes for term in terms) == 1:  # of many, each is of a sample
        terms = [replace(term, kind="unknown") if term.mixes else term for term in terms]
    return terms


@dataclass(frozen=True)
class _Read:
    """What is known of nodes: the terms of each, and whether it depends on parameters alone."""

    terms: dict[Any, list[Term]]
    of_parameters: dict[Any, bool]

    def of(self, node: Any) -> list[Term]:
        return self.terms.get(node) or (
            [] if node is None or node in self.terms else _unknown(node)
        )


def _sources_first(loss: Any) -> Iterator[Any]:
    """Give each node that a loss is added up from, after those that it is made of."""
    seen, stack = {loss}, [(loss, iter(loss.next_functions))] if loss is not None else []
    while stack:
        node, sources = stack[-1]
        for source, _ in sources if _kind(node) in _READ_THROUGH else ():
            if source is not None and source not in seen:
                seen.add(source)
                stack.append((source, iter(source.next_functions)))
                break
        else:
            stack.pop()
            yield node


def _terms(node: Any, read: _Read) -> list[Term]:
    name, kind = node.name(), _kind(node)
    sources = [source for source, _ in node.next_functions]
    if read.of_parameters[node]:
        return _of_parameters(node, kind, sources, read)
    if kind in _SAME:
        return read.of(sources[0])
    if kind in _ADDED:
        found = [term for source in sources for term in read.of(source)]
        return found if len(found) <= _MOST_TERMS else _unknown(node)
    reduction = getattr(node, "_saved_reduction", None)
    if reduction == 2:
        return [Term("sum", name)]
    if reduction == 1:
        is_nll = hasattr(node, "_raw_saved_total_weight")
        divisor = _saved(node, "total_weight") if is_nll else _elements(node)
        return _unknown(node) if divisor is None else [Term("mean", name, divisor)]
    if kind in ("Mean", "Sum"):
        return _reduced(node, kind, sources[0], read)
    if kind in ("Mul", "Div"):
        return _scaled(
            node, kind, [*sources, None][:2], read
        )  # one where the other is C++'s number
    if kind in ("Clamp", "ClampMin", "ClampMax") and _is_within(node):
        return read.of(sources[0])
    return _unknown(node)


def _unknown(node: Any) -> list[Term]:
    saved = (getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_"))
    hidden = any(getattr(raw, "unpack_hook", None) is not None for raw in saved)
    return [Term("unknown", node.name() + ", hidden by a saved-tensor hook" * hidden)]


def _is_within(clamp: Any) -> bool:
    """Whether the bounds leave the number as it is."""
    value = _saved(clamp, "self")
    least, most = _saved(clamp, "min"), _saved(clamp, "max")
    return value is not None and not (
        (least is not None and value < least) or (most is not None and value > most)
    )


def _of_parameters(node: Any, kind: str, sources: Sequence[Any], read: _Read) -> list[Term]:
    if kind in (*_SAME, *_ADDED, "Sum"):
        found = [term for source in sources for term in read.of(source)]
        return found if len(found) <= _MOST_TERMS else [Term("parameters", node.name())]
    if kind in ("Mul", "Div") and [*sources, None].index(None) < 2:  # one is a number
        at = 0 if sources[0] is not None else 1
        factor = _saved(node, "other" if at == 0 else "self")
        if kind == "Mul":
            return read.of(sources[at]) if factor != 0 else []
        if at == 0 and factor is not None:
            return [replace(t, over=(*t.over, factor)) for t in read.of(sources[0])]
    return [Term("parameters", node.name())]


def _reduced(node: Any, kind: str, source: Any, read: _Read) -> list[Term]:
    inner = source.next_functions if source and _kind(source) in ("Stack", "Cat") else ()
    if inner and all(_size(*number) == 1 for number in inner):
        share = 1 / len(inner) if kind == "Mean" else 1.0
        found = [term for number, _ in inner for term in read.of(number)]
        return [replace(term, scale=term.scale * share) for term in found]
    if kind == "Mean":  # of everything, as one number comes out
        mixing = _mixing(source)
        name = node.name() if mixing is None else mixing.name()
        return [Term("mean", name, float(_elements(node)), mixes=mixing is not None)]
    while source is not None and _kind(source) in ("Neg", "Mul", "Div", "ToCopy"):
        has_number = _kind(source) == "Div" and [*source.next_functions, (None, 0)][1][0] is None
        divisor = _saved(source, "other") if has_number else None
        if divisor is not None:
            return [Term("mean", source.name(), divisor, is_certain=False)]
        source = source.next_functions[0][0]
    if source is not None and _kind(source) == "Mean" and hasattr(source, "_saved_dim"):
        sizes = source._saved_self_sym_sizes
        dims = _dims(source._saved_dim, len(sizes))
        if 0 in dims:
            count = 1
            for dim in dims:
                count *= int(sizes[dim])
            return [Term("mean", source.name(), float(count), is_certain=False)]
    return [Term("sum", node.name(), is_certain=False)]


def _mixing(node: Any) -> Any:
    """Return the node that reduces dimension 0, from which a mean's elements are computed."""
    while node is not None and _kind(node) in _ELEMENTWISE:
        sources = [source for source, _ in node.next_functions if source is not None]
        node = sources[0] if len(sources) == 1 else None
    if node is None or _kind(node) not in _MIXING or not hasattr(node, "_saved_dim"):
        return None
    rank = len(_shape(*node.next_functions[0]))
    dims = node._saved_dim
    return node if (not dims and dims != 0) or 0 in _dims(dims, rank) else None


def _dims(dims: Any, rank: int) -> list[int]:
    """Return dimensions from 0; nodes keep them as unsigned."""
    listed = dims if isinstance(dims, (tuple, list)) else [dims]
    return [(dim - 2**64 if dim >= 2**63 else dim) % max(rank, 1) for dim in listed]


def _scaled(node: Any, kind: str, sources: Sequence[Any], read: _Read) -> list[Term]:
    """One of the two is a number without a gradient, or made of parameters alone."""
    found = [read.of(source) for source in sources]
    of_batch = [any(term.kind != "parameters" for term in terms) for terms in found]
    if all(of_batch) or (kind == "Div" and not of_batch[0]):
        return _unknown(node)
    at = 0 if of_batch[0] or sources[1] is None else 1
    if sources[1 - at] is not None:  # a learnt factor: the same number for all micro-batches
        return found[at]
    factor = _saved(node, "other" if at == 0 else "self")
    if factor is None:
        return _unknown(node)
    if kind == "Mul":
        return [replace(t, scale=t.scale * factor) for t in found[at] if factor]
    return [
        replace(term, kind="mean", divisor=factor, is_certain=False)
        if term.kind == "sum"
        else replace(term, scale=term.scale / factor if factor else math.inf)
        for term in found[at]
    ]


def _kind(node: Any) -> str:
    """Mean of MeanBackward0 and MeanBackward1."""
    return node.name().rstrip("0123456789").removesuffix("Backward")


def _is_of_parameters(node: Any, read: _Read) -> bool:
    if hasattr(node, "variable"):
        return True
    if _kind(node) not in _OF_PARAMETERS:
        return False
    sources = [source for source, _ in node.next_functions]
    if not all(source is None or read.of_parameters[source] for source in sources):
        return False
    is_number = _numel(node._input_metadata[0].shape) == 1
    # else times or plus a tensor that may be the batch
    return None not in sources or is_number or _is_plus_constant(node)


def _is_plus_constant(node: Any) -> bool:
    """Whether its other operand, which has no graph, is one number or of the shape of the first."""
    if _saved(node, "other") is not None or _saved(node, "self") is not None:
        return True
    shape = node._input_metadata[0].shape
    sources = [(source, index) for source, index in node.next_functions if source is not None]
    return _kind(node) in _ADDED and all(_shape(*source) == shape for source in sources)


def _saved(node: Any, name: str) -> float | None:
    """Return a saved tensor of one number."""
    raw = getattr(node, f"_raw_saved_{name}", None)
    if raw is not None and getattr(raw, "unpack_hook", None) is not None:
        kept = [*tensors_in(getattr(raw, "data", None))]  # what its hook has packed
        if len(kept) != 1 or kept[0].numel() != 1:
            return None
        whole = (node._input_metadata[0].dtype, torch.int64, torch.int32)  # not compressed
        return _number(kept[0]) if kept[0].dtype in whole else None
    try:
        value = getattr(node, f"_saved_{name}", None)
    except RuntimeError:  # freed
        return None
    if isinstance(value, Tensor) and value.numel() == 1:
        return _number(value)
    return float(value) if isinstance(value, (int, float)) else None


def _number(value: Tensor) -> float:
    try:
        return float(value.detach() if value.requires_grad else value)
    except RuntimeError:  # under a dispatch mode a number of Python's has no item()
        data = bytearray(ctypes.string_at(value.data_ptr(), value.element_size()))
        return float(torch.frombuffer(data, dtype=value.dtype))


def _elements(node: Any) -> float | None:
    if (numel := getattr(node, "_saved_self_sym_numel", None)) is not None:
        return float(numel)
    if (sizes := getattr(node, "_saved_self_sym_sizes", None)) is not None:
        return float(_numel(sizes))
    source, index = next((s for s in node.next_functions if s[0] is not None), (None, 0))
    return None if source is None else float(_size(source, index))


def _size(source: Any, index: int) -> int:
    return 1 if source is None else _numel(_shape(source, index))


def _shape(source: Any, index: int) -> Any:
    leaf = getattr(source, "variable", None)
    return source._input_metadata[index].shape if leaf is None else leaf.shape


def _numel(shape: Any) -> int:
    count = 1
    for size in shape:
        count *= int(size)
    return count
