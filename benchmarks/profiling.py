"""What do profilers cost, and do the phases of a step add up to the time that it took?

A  cProfile, profile, line_profiler, pyinstrument and torch.profiler on three programs: many small
   Python calls, a training step of a small network, one large operator; time with / without, in
   pairs
B  the sum of the phases against a clock of its own around the steps, with 0, 1 and 2 workers, the
   loader slow and fast; and the wait for data as torch's own table and as this package tells it

Prints tables and writes benchmarks/results/profiling.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as G

from dlhelpers import machine
from dlhelpers.course import data
from dlhelpers.profiling import overhead, profile_torch


class Photos(Dataset):
    def __init__(self, files: list[Path], times: int, side: int) -> None:
        self.files, self.times, self.side = files, times, side

    def __len__(self) -> int:
        return len(self.files) * self.times

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.open(self.files[index % len(self.files)]).convert("RGB")
        image = image.resize((self.side, self.side))
        return G.to_dtype(G.pil_to_tensor(image), scale=True), index % 2


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, 2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def small_calls() -> int:
    def add(a: int, b: int) -> int:
        return a + b

    total = 0
    for number in range(20_000):
        total = add(total, number)
    return total


def training(batches: Any) -> Any:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        images, labels = next(batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def costs(budget_s: float) -> dict[str, Any]:
    def same_batch() -> Any:
        batch = torch.rand(16, 3, 32, 32), torch.randint(0, 10, (16,))
        while True:
            yield batch

    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    programs = {
        "20,000 small calls": small_calls,
        "a training step": training(same_batch()),
        "one large product": lambda: a @ b,
    }
    found = {}
    for name, program in programs.items():
        report = overhead(program, budget_s=budget_s)
        print(f"\n{name}\n{report}")
        found[name] = {key: [row.speedup, row.low, row.high] for key, row in report.items()}
    return found


def sums(folder: Path) -> list[dict[str, Any]]:
    files = sorted(data.photos(folder / "photos", count=64, size=400).rglob("*.jpg"))
    rows = []
    print("\nworkers   side  clock ms  phases ms  differ  data loading  in torch's table")
    for side in (16, 64):  # the loader decodes as much for both, the network computes less
        for workers in (0, 1, 2):
            loader = DataLoader(Photos(files, 40, side), 16, num_workers=workers)
            report = profile_torch(training(iter(loader)), steps=15)
            clock = sum(report.step_ms) / len(report.step_ms)
            phases = sum(report.phases.values())
            wait = report.phases["data loading"]
            # what its summary is read for: the operators, without the labels
            table = sum(
                row.self_cpu_time_total
                for row in report.session.key_averages()
                if "DataLoader" in row.key
            )
            row = {
                "workers": workers, "side": side, "clock_ms": clock, "phases_ms": phases,
                "loading_ms": wait, "label_own_ms": table / 1e3 / len(report.step_ms),
            }  # fmt: skip
            rows.append(row)
            print(
                f"{workers:7} {side:6} {clock:9.2f} {phases:10.2f} {phases / clock - 1:7.2%}"
                f" {wait:11.2f} ms {row['label_own_ms']:13.2f} ms"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=8.0, help="seconds for each comparison")
    budget_s = parser.parse_args().budget
    torch.set_num_threads(1)
    print(machine.describe().line)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        results = {"overhead": costs(budget_s), "phases": sums(Path(folder))}
    output = Path(__file__).parent / "results" / "profiling.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps({"machine": machine.describe().as_dict(), **results}))


if __name__ == "__main__":
    main()
