"""Which road is the fastest for three networks at batch 1 and 16, and does "auto" find it?

For each network and batch: every road that `quantize_static` builds (eager float32 folded and in
channels_last, bfloat16, compiled with freezing, ONNX Runtime and OpenVINO in float32, bfloat16 and
int8, PT2E, torch.ao's engines), and beside them eager float32 as it comes and torch.compile without
freezing; speed against the fastest float32 road with its interval, size, SQNR. Then all roads near
the top race once more, in a run of their own: is the one that was taken within 5 % of the fastest?

Prints tables and writes benchmarks/results/inference.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model

from dlhelpers import machine
from dlhelpers.measure import compare, compare_many
from dlhelpers.quantization import quantize_static
from dlhelpers.quantization.report import RoadRow

NETWORKS = ("resnet18", "mobilenet_v2", "shufflenet_v2_x1_0")


def network(name: str, side: int) -> nn.Module:
    """The network with BatchNorm statistics of real inputs, so that outputs mean something."""
    torch.manual_seed(0)
    model = get_model(name).train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.rand(8, 3, side, side))
    return model.eval()


def run_of(model: Any, x: torch.Tensor) -> Any:
    def run() -> Any:
        with torch.no_grad():
            return model(x)

    return run


def speed_of(row: RoadRow) -> float:
    return row.speed.speedup if row.speed else 1.0  # the baseline itself has none


def column(name: str, batch: int, side: int, budget_s: float) -> dict[str, Any]:
    model = network(name, side)
    inputs = [torch.rand(batch, 3, side, side) for _ in range(2)]
    fast = quantize_static(model, inputs, budget_s=budget_s, keep_roads=True)
    report = fast.report()
    print(f"\n{name}, batch {batch}\n{report}", flush=True)

    kept = {row.name: fast.on(row.name) for row in report.rows if not row.dropped}
    baseline = run_of(kept[report.baseline], inputs[0])
    extra = {"eager float32, not folded": run_of(model, inputs[0])}
    if machine.describe().compiler:
        extra["torch.compile float32, not frozen"] = run_of(
            torch.compile(copy.deepcopy(model)), inputs[0]
        )
    for title, run in extra.items():
        run()  # compiles
        print(f"{title:36} {compare(baseline, run, budget_s=budget_s)}", flush=True)

    taken = report[report.chosen].speed
    top = taken.speedup if taken else 1.0
    near = [n for n in kept if n == report.chosen or speed_of(report[n]) > top / 1.3]
    others = {n: partial(kept[n], inputs[0]) for n in near}
    behind = 1.0
    if len(others) > 1:
        race = compare_many(others, baseline=report.chosen, budget_s=3 * budget_s, negligible=0.01)
        behind = max(1.0, *(row.speedup for row in race.values()))
        for title, row in race.items():
            print(f"  against {report.chosen}: {title:30} {row}")
    int8 = [r.speed for r in report.rows if r.precision == "int8" and r.speed]
    best = max((speed.speedup for speed in int8), default=float("nan"))
    print(f"  taken: {report.chosen}, {behind:.3f} times behind the fastest; best int8 {best:.2f}")
    return {
        "network": name,
        "batch": batch,
        "chosen": report.chosen,
        "behind": behind,
        "int8": best,
        "rows": [
            {
                "road": row.name,
                "speedup": None if row.speed is None else row.speed.speedup,
                "low": None if row.speed is None else row.speed.low,
                "high": None if row.speed is None else row.speed.high,
                "sqnr_db": row.sqnr_db,
                "nbytes": row.nbytes,
                "int8_kernels": row.int8_kernels,
                "dropped": row.dropped,
            }
            for row in report.rows
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one network, small images")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    print(machine.describe().line, f"· {options.threads} threads")
    names, batches, side = (("resnet18",), (1,), 96) if options.quick else (NETWORKS, (1, 16), 224)
    columns = [
        column(name, batch, side, 0.5 if options.quick else 2.0)
        for name in names
        for batch in batches
    ]
    worst = max(column["behind"] for column in columns)
    print(f"\nworst column: {worst:.3f} times behind the fastest road; the goal is 1.05")
    result = {"machine": machine.describe().as_dict(), "columns": columns}
    path = Path(__file__).parent / "results" / "inference.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
