"""Which layers of a model break the four guidelines, and what does each cost?

Costs are the bytes that keeping the guideline would save, whether or not the operator has
arithmetic to hide them behind; with a machine's peaks, the time that they take at its bandwidth.

Source: Ma et al. 2018, arXiv:1807.11164, section 2.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dlhelpers.findings import Finding, Findings
from dlhelpers.roofline import Roofline
from dlhelpers.shufflenet.costs import LayerCost, LayerCosts, layer_costs
from dlhelpers.shufflenet.formulas import is_element_wise, mac_lower_bound, memory_access_cost

__all__ = ["audit"]

_Broken = tuple[float, int, Finding]  # bytes moved more, calls more, what is said of it
_OVERHEAD_S = 0.2  # seconds for its measurement, which takes milliseconds on a quiet machine


def audit(
    model: nn.Module, inputs: Any, *, at_least: float = 0.0, peaks: Roofline | None = None
) -> Findings:
    """Name what breaks G1 to G4, the most expensive first.

    G1: a pointwise convolution whose channels in and out differ. G2: a convolution in groups, one
    that is not depthwise. G3: a tensor that two convolutions or more work on, each by itself (what
    is cut up in series cannot be told from depth). G4: element-wise operators, normalisation and
    depthwise convolutions, by module.

    Args:
        model: in the mode that is to be audited; ``eval()`` for inference.
        inputs: as for ``layer_costs``.
        at_least: share of the whole cost; a finding that costs less is left out.
        peaks: the findings' cost is the time predicted for this machine, such as
            ``roofline.roofline()``, overheads of fragments included; without it, or where it lacks
            the peak of a type that the model computes in, the bytes moved.

    Returns:
        Findings of severity ``suspicion``: a guideline may be broken for good reasons. Each says
        what it is predicted to cost. Empty if nothing costs that much.

    Raises:
        ValueError: at_least is not between 0 and 1; or as ``layer_costs``.

    >>> peaks = Roofline(10.0, {"fp32": 100.0}, 1)
    >>> wide = nn.Sequential(nn.Conv2d(8, 96, 1), nn.ReLU())
    >>> [finding.name for finding in audit(wide, torch.zeros(1, 8, 32, 32), peaks=peaks)]
    ['element-wise (G4)', 'unequal-channels (G1)']
    """
    if not 0 <= at_least <= 1:
        raise ValueError(f"at_least must be a share between 0 and 1, got {at_least!r}")
    costs = layer_costs(model, inputs, policy="all", peaks=peaks)
    note = "ranked by bytes; with peaks=roofline.roofline() by predicted time"
    if peaks is not None and costs.predicted_s is None:
        lacking = sorted({one.bound for one in costs.layers if one.predicted_s is None})
        note, peaks = f"ranked by bytes: {', '.join(lacking)} among peaks.gflops", None
    whole = costs.nbytes if peaks is None else costs.predicted_s
    total = whole or math.inf
    broken = [
        one
        for rule in (_unequal_channels, _groups, _fragments, _element_wise)
        for one in rule(costs)
    ]
    priced = zip(_costs(broken, peaks), (finding for *_, finding in broken), strict=True)
    found = [(cost, one) for cost, one in priced if cost > 0 and cost >= at_least * total]
    found.sort(key=lambda pair: -pair[0])
    shown, of_what = (_us, "predicted") if peaks else (_mib, "moved")
    findings = Findings(
        Finding(
            name=finding.name,
            severity="suspicion",
            what=f"{finding.what}: {shown(cost)} of {shown(total)} {of_what}, {cost / total:.1%}",
            why=finding.why,
            remedy=finding.remedy,
            where=finding.where,
        )
        for cost, finding in found
    )
    unit = "predicted time" if peaks else "bytes moved"
    findings.scope = f"nothing breaks G1 to G4 for {at_least:.1%} of the {unit} or more"
    if peaks is None:
        findings.note = note
    return findings


def _costs(broken: list[_Broken], peaks: Roofline | None) -> list[float]:
    """Return what each costs, all in one unit: seconds with peaks, bytes without."""
    if peaks is None:
        return [nbytes for nbytes, _, _ in broken]
    overhead_s = _overhead_s() if any(calls for _, calls, _ in broken) else 0.0
    return [
        nbytes / (1e9 * peaks.bandwidth_gb_s) + calls * overhead_s for nbytes, calls, _ in broken
    ]


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f} µs"


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.2f} MiB"


_OF_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed")
_OF_CONVOLUTION += ("output_padding", "groups")


def _convolutions(costs: LayerCosts) -> Iterator[tuple[LayerCost, int, int, int, int, int]]:
    """Give (layer, c1, c2, output pixels with the batch, kernel elements, groups) of each one.

    Transposed ones are left out: the guidelines' counts are of plain convolutions.
    """
    for layer in costs.layers:
        if layer.operator != "convolution":
            continue
        _, args, kwargs = layer.call
        given = dict(zip(_OF_CONVOLUTION, args, strict=False)) | kwargs
        if given["transposed"]:
            continue
        groups = given["groups"]
        x, weight = layer.shapes[0], layer.shapes[1]
        output = layer.shapes[-1]
        pixels = output[0] * math.prod(output[2:])
        yield layer, x[1], output[1], pixels, math.prod(weight[2:]), groups


def _unequal_channels(costs: LayerCosts) -> Iterator[_Broken]:
    for layer, c1, c2, pixels, kernel, groups in _convolutions(costs):
        x = layer.shapes[0]
        if kernel != 1 or groups != 1 or c1 == c2:
            continue
        moved = memory_access_cost(c1, c2, pixels)  # of a strided one, the pixels that it uses
        least = mac_lower_bound(pixels * c1 * c2, pixels)
        equal = round(math.sqrt(c1 * c2))
        yield (
            _nbytes(moved.elements - least, layer),
            0,
            Finding(
                "unequal-channels (G1)",
                "suspicion",
                f"a 1x1 convolution from {c1} to {c2} channels moves at least {moved.elements:,} "
                f"elements, {moved.elements / least:.2f} times the least for its multiply-adds",
                "for equal multiply-adds memory access is least with equal channels in and out",
                f"nn.Conv{len(x) - 2}d({equal}, {equal}, 1)  # the same number of multiply-adds",
                layer.module,
            ),
        )


def _groups(costs: LayerCosts) -> Iterator[_Broken]:
    for layer, c1, c2, pixels, _, groups in _convolutions(costs):
        if groups == 1 or groups == c1:
            continue
        more = pixels * (c2 - c2 / groups)  # elements of equation 2, against g = 1 and the same B
        sizes = tuple(layer.shapes[1][2:])
        side = sizes[0] if len(set(sizes)) == 1 else sizes
        narrow = max(1, c2 // groups)
        yield (
            _nbytes(more, layer),
            0,
            Finding(
                "groups (G2)",
                "suspicion",
                f"a convolution from {c1} to {c2} channels in {groups} groups moves "
                f"{layer.elements:,} elements for {layer.multiply_adds / 1e6:,.1f} M "
                "multiply-adds",
                "for the same multiply-adds and input, memory access grows with groups",
                f"nn.Conv{len(sizes)}d({c1}, {narrow}, {side})  # same multiply-adds, no groups",
                layer.module,
            ),
        )


def _fragments(costs: LayerCosts) -> Iterator[_Broken]:
    sharing: dict[int, list[LayerCost]] = defaultdict(list)
    for layer, *_ in _convolutions(costs):
        sharing[id(layer.call[1][0])].append(layer)
    for layers in sharing.values():
        if len(layers) < 2:
            continue
        c1, pixels = layers[0].shapes[0][1], math.prod(layers[0].shapes[0][2:])
        again = (len(layers) - 1) * math.prod(layers[0].shapes[0])
        names = ", ".join(layer.module for layer in layers)
        yield (
            _nbytes(again, layers[0]),
            len(layers) - 1,
            Finding(
                "fragments (G3)",
                "suspicion",
                f"{len(layers)} convolutions work on the same {c1} channels of {pixels:,} pixels",
                "each reads the input again and is launched by itself; small ones leave a parallel "
                "device idle",
                f"nn.Conv2d({c1}, ...)  # one convolution for {len(layers)}, split after it",
                names,
            ),
        )


def _element_wise(costs: LayerCosts) -> Iterator[_Broken]:
    by_module: dict[str, list[LayerCost]] = defaultdict(list)
    depthwise = {
        id(layer)
        for layer, c1, _, _, _, groups in _convolutions(costs)
        if groups == c1 and groups > 1
    }
    for layer in costs.layers:
        func = layer.call[0]
        norm = "norm" in layer.operator
        if norm or is_element_wise(func) or id(layer) in depthwise:
            by_module[layer.module].append(layer)
    for module, layers in by_module.items():
        flops = sum(layer.flops for layer in layers) / max(1, costs.flops)
        moved = sum(layer.nbytes for layer in layers)
        names = ", ".join(dict.fromkeys(layer.operator for layer in layers))
        is_depthwise = any(id(layer) in depthwise for layer in layers)
        yield (
            sum(_nbytes(layer.elements, layer) for layer in layers),
            0,
            Finding(
                "depthwise (G4)" if is_depthwise else "element-wise (G4)",
                "suspicion",
                f"{names} {'(depthwise) ' if is_depthwise else ''}moves {moved / 2**20:,.2f} MiB "
                f"for {flops:.1%} of the FLOPs",
                "it reads and writes every element for next to no arithmetic, so memory decides",
                _remedy(layers, is_depthwise),
                module,
            ),
        )


def _remedy(layers: list[LayerCost], is_depthwise: bool) -> str:
    if is_depthwise:
        return "# fewer channels here: expand less before the depthwise convolution"
    if any("batch_norm" in layer.operator for layer in layers):
        return "dlhelpers.fusion.fuse_conv_bn(model, inputs)  # folds it away for inference"
    if any(layer.operator.startswith("add") for layer in layers):
        return "y = torch.cat((kept, branch(rest)), 1)  # a split and a concatenation, no sum"
    return "nn.Identity()  # where two follow each other, or after a depthwise convolution"


def _nbytes(elements: float, layer: LayerCost) -> float:
    """Return the bytes of so many of a layer's elements."""
    return max(0.0, elements) * layer.nbytes / max(1, layer.elements)


def _overhead_s() -> float:
    """Return the least time of a call of a convolution, whatever it computes."""
    convolution, x = nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 1, 1)
    best, until = math.inf, time.perf_counter() + _OVERHEAD_S
    with torch.inference_mode():
        for _ in range(100):
            start = time.perf_counter()
            convolution(x)
            now = time.perf_counter()
            best = min(best, now - start)
            if now > until:
                break
    return best
