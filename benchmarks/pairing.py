"""What does `pairing.guard` cost a training step, while it looks and after it has stopped?

Blocks of 500 and 100 steps with and without the guard, in pairs, on two small networks: the
smaller the network, the dearer each watched call. The promise is at most 5 % once the guard has
stopped; the one step that it looks at, entering and leaving are in the figure.
Prints a table and writes benchmarks/results/pairing.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from dlhelpers import machine, pairing
from dlhelpers.course.data import digits
from dlhelpers.course.training import digits_mlp
from dlhelpers.measure import compare


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def main() -> None:
    images, labels = (tensor[:64] for tensor in digits("train"))
    rows = []
    print(machine.describe().line)
    networks = (("multilayer perceptron", digits_mlp(100), 500), ("convnet", convnet(), 100))
    for name, model, count in networks:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def steps(model=model, optimizer=optimizer, count=count) -> None:
            for _ in range(count):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()

        def guarded(look: int, steps=steps) -> None:
            with pairing.guard(steps=look):
                steps()

        for label, look in ((f"stopped after 1 of {count}", 1), (f"looking at all {count}", count)):
            row = compare(steps, lambda look=look: guarded(look), budget_s=20, threshold=1 / 1.05)
            cost = [100 * (1 / ratio - 1) for ratio in (row.speedup, row.high, row.low)]
            verdict = "kept" if cost[2] <= 5 else "NOT KEPT" if cost[1] > 5 else "undecided"
            kept = "" if look > 1 else f"  {verdict}"
            print(
                f"{name:22} {label:23} costs {cost[0]:5.1f} % [{cost[1]:.1f}, {cost[2]:.1f}]{kept}"
            )
            rows.append({"network": name, "guard": label, "cost_percent": cost})
    output = Path(__file__).parent / "results" / "pairing.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps({"machine": machine.describe().as_dict(), "rows": rows}))


if __name__ == "__main__":
    main()
