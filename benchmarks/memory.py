"""How near is `memory.estimate` to the allocator, and what does `checkpoint_blocks` cost?

A  a later training step (optimizer's state exists, gradients are None) of every torchvision
   classification model: the allocator's own record (torch.profiler's events of memory, summed, and
   what was there before), and beside it `estimate`, torch's private MemTracker on fake tensors, and
   torchinfo's "Estimated Total Size". A model whose step would not fit into this machine is left
   out, by name. One more row: a layer applied a hundred times (TylerYep/torchinfo#144)
B  `checkpoint_blocks` against torch.utils.checkpoint.checkpoint_sequential at equal segments on
   16 blocks of convolution, BatchNorm and ReLU: bytes of the step, time in pairs, and how often
   BatchNorm counted a batch

Prints tables and writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint_sequential

from dlhelpers import machine
from dlhelpers.measure import compare
from dlhelpers.memory import checkpoint_blocks, checkpoint_plan, estimate, measure_peak, mib

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1),
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": torch.optim.AdamW,
}
QUICK = (
    *(
        "alexnet",
        "densenet121",
        "efficientnet_b0",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "resnet18",
    ),
    *("resnet50", "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "vit_b_16", "convnext_tiny"),
)
SIDES = {"inception_v3": 299}
PEERS = ("estimate", "MemTracker", "torchinfo")


class HundredTimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(256, 256), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(100):
            x = torch.relu(self.layer(x))
        return self.head(x)


def loss_of(output: Any) -> Tensor:
    main = output if isinstance(output, Tensor) else output[0]
    return F.cross_entropy(main, torch.zeros(len(main), dtype=torch.long))


def allocators_record(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> int:
    def step() -> None:
        loss_of(model(x)).backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    there = [*model.parameters(), *model.buffers(), *state, x]
    return most + sum(
        {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in there}.values()
    )


def by_estimate(make: Callable[[], nn.Module], shape: tuple[int, ...], optimizer: str) -> int:
    x = torch.empty(shape, device="meta")
    return estimate(make(), x, OPTIMIZERS[optimizer]).peak_bytes


def by_tracker(make: Callable[[], nn.Module], shape: tuple[int, ...], optimizer: str) -> int:
    from torch._subclasses import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode():
        model, x, tracker = make(), torch.zeros(shape), MemTracker()
        stepper = OPTIMIZERS[optimizer](model.parameters())
        tracker.track_external(model, stepper, x)
        for number in range(2):
            with tracker:
                loss_of(model(x)).backward()
                stepper.step()
                stepper.zero_grad()
            if not number:
                tracker.reset_mod_stats()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def by_torchinfo(make: Callable[[], nn.Module], shape: tuple[int, ...], optimizer: str) -> int:
    from torchinfo import summary

    found = summary(make(), input_size=shape, verbose=0, mode="train", device="cpu")
    return found.total_input + found.total_output_bytes + found.total_param_bytes


PREDICTORS = dict(zip(PEERS, (by_estimate, by_tracker, by_torchinfo), strict=True))


def row_of(
    name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], optimizer: str
) -> dict[str, Any] | None:
    row: dict[str, Any] = {"model": name, "optimizer": optimizer}
    for peer, predict in PREDICTORS.items():
        start = time.perf_counter()
        try:
            row[peer] = predict(make, shape, optimizer)
        except Exception as error:  # a peer's, to be told beside the others' figures
            row[peer] = f"raises {type(error).__name__}"
        row[f"{peer} s"] = time.perf_counter() - start
        gc.collect()
        too_large = isinstance(row[peer], int) and 1.3 * row[peer] > free_bytes()
        if peer == "estimate" and too_large:
            print(f"{name:22} {optimizer:9} left out: it needs {mib(row[peer])}", flush=True)
            return None
    model = make()
    row["allocator"] = allocators_record(
        model, torch.zeros(shape), OPTIMIZERS[optimizer](model.parameters())
    )
    cells = []
    for peer in PEERS:
        if isinstance(row[peer], str):
            cells.append(f"{row[peer]:>26}")
        else:
            row[f"{peer} error"] = row[peer] / row["allocator"] - 1
            cells.append(f"{row[f'{peer} error']:+12.2%} in {row[f'{peer} s']:8.1f} s")
    print(f"{name:22} {optimizer:9} {mib(row['allocator']):>14}", *cells, flush=True)
    return row


def free_bytes() -> int:
    import psutil

    return psutil.virtual_memory().available


def table_a(models: list[str], optimizers: list[str], batch: int) -> list[dict[str, Any]]:
    print(f"\nA  peak of a training step, batch {batch}: the allocator, errors of predictions")
    print(f"{'model':22} {'optimizer':9} {'allocator':>14}", *(f"{p:>26}" for p in PEERS))
    rows = []
    for optimizer in optimizers:
        rows.append(row_of("a layer 100 times", HundredTimes, (64, 256), optimizer))
        for name in models:
            side = SIDES.get(name, 224)
            make = functools.partial(torchvision.models.get_model, name)
            rows.append(row_of(name, make, (batch, 3, side, side), optimizer))
            gc.collect()
    rows = [row for row in rows if row]
    for peer in PEERS:
        errors = {f"{r['model']}, {r['optimizer']}": r.get(f"{peer} error") for r in rows}
        known = {name: abs(error) for name, error in errors.items() if error is not None}
        raised = len(errors) - len(known)
        if known:
            worst = max(known, key=known.__getitem__)
            inside = sum(error <= 0.02 for error in known.values())
            print(
                f"{peer:11} within 2 % on {inside} of {len(rows)}, raised on {raised}, "
                f"worst {known[worst]:.1%} ({worst})"
            )
    return rows


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())


class Sequentially(nn.Module):
    """torch's own way: every segment but the last one is checkpointed."""

    def __init__(self, body: nn.Sequential, segments: int) -> None:
        super().__init__()
        self.body, self.segments = body, segments

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.body, self.segments, x, use_reentrant=False)


def table_b(budget_s: float) -> list[dict[str, Any]]:
    print(
        "\nB  checkpointing 16 blocks: bytes, time in pairs, batches that BatchNorm counted in one"
    )
    print(f"{'segments':>9} {'checkpoint_sequential':>22} {'checkpoint_blocks':>18}", end=" ")
    print(f"{'theirs / our time':>24} {'theirs counted':>15} {'ours':>5}")
    x, rows = torch.randn(8, 16, 32, 32), []
    plain = nn.Sequential(*(block() for _ in range(16)))

    def step(model: nn.Module) -> Callable[[], Any]:
        def run() -> None:
            for parameter in model.parameters():
                parameter.grad = None
            model(x).sum().backward()

        return run

    def counted(model: nn.Module) -> int:
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        before = int(norm.num_batches_tracked)
        step(model)()
        return int(norm.num_batches_tracked) - before

    for segments in (1, 2, 4, 8, 16, "auto"):
        ours = checkpoint_blocks(plain, segments, inputs=x, loss=Tensor.sum)
        count = sum(len(part) for _, part in checkpoint_plan(ours))
        theirs = Sequentially(plain, count)
        row: dict[str, Any] = {"segments": segments if segments != "auto" else f"auto: {count}"}
        row["theirs"], row["ours"] = (measure_peak(step(m)).peak_bytes for m in (theirs, ours))
        found = compare(step(theirs), step(ours), budget_s=budget_s)
        row |= {"time": found.speedup, "low": found.low, "high": found.high}
        row["theirs counted"], row["ours counted"] = counted(theirs), counted(ours)
        interval = f"{found.speedup:.2f} [{found.low:.2f}, {found.high:.2f}]"
        print(
            f"{row['segments']:>9} {mib(row['theirs']):>22} {mib(row['ours']):>18} {interval:>24} "
            f"{row['theirs counted']:>15} {row['ours counted']:>5}",
            flush=True,
        )
        rows.append(row)
    print(f"without checkpointing: {mib(measure_peak(step(plain)).peak_bytes)}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", help="names, with commas; all classification models")
    parser.add_argument("--optimizers", default="sgd,momentum,adamw")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--quick", action="store_true", help="a dozen models, momentum, short times"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    everything = torchvision.models.list_models(module=torchvision.models)
    models = options.models.split(",") if options.models else everything
    optimizers = options.optimizers.split(",")
    if options.quick:
        models, optimizers = (
            options.models.split(",") if options.models else list(QUICK),
            ["momentum"],
        )
    print(machine.describe().line)
    result = {
        "machine": machine.describe().as_dict(),
        "A": table_a(models, optimizers, options.batch),
        "B": table_b(1.0 if options.quick else 4.0),
    }
    path = Path(__file__).parent / "results" / "memory.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
