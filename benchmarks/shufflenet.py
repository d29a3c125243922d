"""Do the paper's tables come out here, and how do counters of FLOPs differ?

A  the paper's Tables 1 to 4 (arXiv:1807.11164) measured on this machine, one thread, beside the
   paper's figures: both sets of channels, times 1, 2 and 4
B  multiply-adds of torchvision's models by `layer_costs`, by torch.utils.flop_counter and by thop,
   and thop's difference explained by the kind of layer
C  what `audit` finds in five of torchvision's models

Prints tables and writes benchmarks/results/shufflenet.json.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dlhelpers import machine
from dlhelpers.shufflenet import audit, guideline_table, layer_costs
from dlhelpers.shufflenet.paper import TABLES

COUNTED = (
    *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "mobilenet_v2"),
    *("resnet18", "mnasnet1_0", "efficientnet_b0", "vit_b_16"),
)
AUDITED = ("shufflenet_v2_x1_0", "mobilenet_v2", "resnet18", "mnasnet1_0", "efficientnet_b0")
# why thop's figure of a kind of layer is another one
WHY = {
    "BatchNorm2d": "thop: 2 for each element, 4 with scale and shift; left out here",
    "LayerNorm": "thop: 4 for each element; left out here",
    "AdaptiveAvgPool2d": "thop: a sum for each input and a division; no products here",
    "AvgPool2d": "as AdaptiveAvgPool2d",
    "MultiheadAttention": "thop: has no rule and counts its inner Linear as never called",
    "SiLU": "thop: no rule",
    "Sigmoid": "thop: no rule",
    "Hardswish": "thop: no rule",
    "Hardsigmoid": "thop: no rule",
}


def tables(scales: list[int], budget_s: float) -> list[dict[str, Any]]:
    rows = []
    for guideline in TABLES:
        for channels in ("gpu", "arm"):
            for scale in scales:
                found = guideline_table(
                    guideline, channels=channels, scale=scale, budget_s=budget_s
                )
                print(f"\n{found}", flush=True)
                for row in found.rows:
                    rows.append(
                        {
                            "guideline": guideline,
                            "channels": channels,
                            "scale": scale,
                            "row": row.name,
                            "multiply_adds": row.multiply_adds,
                            "speed": row.speed,
                            "at equal multiply-adds": found.per_multiply_add(row.name),
                            "paper": row.paper,
                            "rank correlation": found.rank_correlation,
                        }
                    )
    return rows


def by_kind(model: nn.Module, x: torch.Tensor) -> tuple[Counter[str], Counter[str]]:
    """Return kind of layer -> multiply-adds by thop and here."""
    from thop import profile

    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    ours: Counter[str] = Counter()
    for layer in layer_costs(model, x).layers:
        ours[kinds[layer.module]] += layer.multiply_adds
    *_, layers = profile(model, inputs=(x,), verbose=False, ret_layer_info=True)
    theirs: Counter[str] = Counter()

    def walk(module: nn.Module, layers: Any) -> None:
        for name, (operations, _, inner) in layers.items():
            child = getattr(module, name)
            if inner:
                walk(child, inner)
            else:
                theirs[type(child).__name__] += int(operations)

    walk(model, layers)
    return theirs, ours


def counters() -> list[dict[str, Any]]:
    print("\nmillions of multiply-adds, one image of 224 px, eval mode")
    print(
        f"{'model':20} {'layer_costs':>11} {'flop_counter':>12} {'thop':>9}  of thop's difference"
    )
    rows, x = [], torch.zeros(1, 3, 224, 224)
    for name in COUNTED:
        model = torchvision.models.get_model(name).eval()
        costs = layer_costs(model, x)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        row = {
            "model": name,
            "layer_costs": costs.multiply_adds,
            "flop_counter": counter.get_total_flops() // 2,
            "left out": dict(costs.left_out),
        }
        try:
            theirs, ours = by_kind(model, x)
        except ImportError:
            print("thop is not installed: pip install thop")
            return rows
        row["thop"] = theirs.total()
        differing = {k: theirs[k] - ours[k] for k in theirs | ours if theirs[k] != ours[k]}
        largest = sorted(differing.items(), key=lambda pair: -abs(pair[1]))[:3]
        print(
            f"{name:20} {costs.multiply_adds / 1e6:11,.1f} {row['flop_counter'] / 1e6:12,.1f} "
            f"{row['thop'] / 1e6:9,.1f} ",
            "; ".join(f"{kind} {n / 1e6:+,.1f} ({WHY.get(kind, '?')})" for kind, n in largest),
            flush=True,
        )
        rows.append(row)
    return rows


def audits() -> dict[str, list[str]]:
    found = {}
    for name in AUDITED:
        model = torchvision.models.get_model(name).eval()
        findings = audit(model, torch.zeros(1, 3, 224, 224))
        kinds = Counter(finding.name for finding in findings)
        print(f"\n{name}: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
        firsts = {finding.name: finding for finding in reversed(findings)}
        for finding in sorted(firsts.values(), key=findings.index):
            print(f"  {finding.name:22} {finding.where[:44]:44} {finding.what}")
        found[name] = [str(finding) for finding in findings]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the tables' first columns alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine.describe().line)
    result = {
        "machine": machine.describe().as_dict(),
        "A": tables([1] if options.quick else [1, 2, 4], 0.7 if options.quick else 3.0),
        "B": counters(),
        "C": audits(),
    }
    path = Path(__file__).parent / "results" / "shufflenet.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
