"""What do profilers cost, and do the phases of a step add up to the time that it took?

A  cProfile, profile, line_profiler, pyinstrument and torch.profiler on three programs: many small
   Python calls, a training step of a small network, one large operator; time with / without, in
   pairs
B  the sum of the phases against a clock of its own around the steps, with 0, 1 and 2 workers, the
   loader slow and fast; and the wait for data as torch's own table and as this package tells it
C  what diagnose expects of a remedy, and what the remedy brings: losses by loops, a model by
   sample, a loop over an LSTM's cell

Prints tables and writes benchmarks/results/profiling.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as G

from dlhelpers import machine
from dlhelpers.course import data
from dlhelpers.measure import compare
from dlhelpers.profiling import diagnose, overhead, profile_torch


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


def wasteful() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Return name -> (a step as people write it, the same with the remedy)."""
    x, y = torch.randn(64, 64), torch.randint(0, 10, (64,))
    few, classes = x[:24], y[:24] % 4
    first, second = torch.tril_indices(24, 24, -1)

    def step_of(model: nn.Module, loss_of: Callable[[nn.Module], Any]) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

        def step() -> None:
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

        return step

    def pairs_by_loop(model: nn.Module) -> Any:
        rows, loss = model(few), 0
        for i in range(24):
            for j in range(i):
                apart = (rows[i] - rows[j]).pow(2).sum()
                loss = loss + (apart if classes[i] == classes[j] else F.relu(1 - apart))
        return loss

    def pairs(model: nn.Module) -> Any:
        rows = model(few)
        apart = (rows[first] - rows[second]).pow(2).sum(1)
        return torch.where(classes[first] == classes[second], apart, F.relu(1 - apart)).sum()

    def loss_by_sample(model: nn.Module) -> Any:
        outputs = model(x)
        return sum(F.cross_entropy(outputs[i : i + 1], y[i : i + 1]) for i in range(64))

    def model_by_sample(model: nn.Module) -> Any:
        return F.cross_entropy(torch.cat([model(row[None]) for row in x]), y, reduction="sum")

    def batch(model: nn.Module) -> Any:
        return F.cross_entropy(model(x), y, reduction="sum")

    words = torch.randn(60, 16, 32)
    cell, layer = nn.LSTMCell(32, 64), nn.LSTM(32, 64)

    def by_cell(model: nn.Module) -> Any:
        state = None
        for word in words:
            state = model(word, state)
        return state[0].sum()

    classifier = [nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)) for _ in "1234"]
    embedding = [nn.Linear(64, 32) for _ in "12"]
    return {
        "a loss of pairs, by two loops": (
            step_of(embedding[0], pairs_by_loop),
            step_of(embedding[1], pairs),
        ),
        "a loss by sample": (step_of(classifier[0], loss_by_sample), step_of(classifier[1], batch)),
        "a model by sample": (
            step_of(classifier[2], model_by_sample),
            step_of(classifier[3], batch),
        ),
        "a loop over LSTMCell": (
            step_of(cell, by_cell),
            step_of(layer, lambda model: model(words)[1][0].sum()),
        ),
    }


def gains(budget_s: float) -> dict[str, Any]:
    found = {}
    print("\nexpected of the remedy, and measured with it")
    for name, (slow, fast) in wasteful().items():
        first = next(iter(diagnose(slow, progress=False)), None)
        result = compare(slow, fast, budget_s=budget_s)
        told = f"{first.name}: {first.gain}" if first else "nothing"
        print(f"{name:30} {told:75} measured {result.speedup:.2f} times as fast")
        found[name] = {
            "finding": first.name if first else "",
            "expected": first.speedup if first else 1.0,
            "tried": bool(first and not first.is_estimated),
            "measured": result.speedup,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=8.0, help="seconds for each comparison")
    budget_s = parser.parse_args().budget
    torch.set_num_threads(1)
    print(machine.describe().line)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        results = {"overhead": costs(budget_s), "phases": sums(Path(folder))}
    results["gains"] = gains(budget_s)
    output = Path(__file__).parent / "results" / "profiling.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps({"machine": machine.describe().as_dict(), **results}))


if __name__ == "__main__":
    main()
