"""Which backend is the fastest for three networks at batch 1 and 16, and does "auto" find it?

For each network and batch: every backend that `quantize_static` builds (eager float32 folded and in
channels_last, bfloat16, compiled with freezing, ONNX Runtime and OpenVINO in float32, bfloat16 and
int8, PT2E, torch.ao's engines), and beside them eager float32 as it comes and torch.compile without
freezing; speed against the fastest float32 backend with its interval, size, SQNR. Then all backends
near the top race again, in a run of their own: is the chosen one within 5 % of the fastest?

Compiling may take minutes on a small or busy machine: there is a limit for each compiled backend
and one in all, and what was not run is named.

Prints tables and writes benchmarks/results/inference.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model

from dlhelpers import machine
from dlhelpers.measure import compare, compare_many
from dlhelpers.quantization import quantize_static, torch_backends
from dlhelpers.quantization.backends import Backend, BackendError, Task
from dlhelpers.quantization.report import BackendRow

NETWORKS = ("resnet18", "mobilenet_v2", "shufflenet_v2_x1_0")
LEAST_S = 20.0  # below this no column is begun
NOT_BUILT = "not built within"


class TooLong(BaseException):
    """Time is up; no ``except Exception`` on the way may swallow it."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TooLong in the block after so many seconds, or when an outer block's are over."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    outer, _ = signal.getitimer(signal.ITIMER_REAL)
    seconds = max(min(seconds, outer or seconds), 0.01)
    start = monotonic()
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # again, should a callback swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            left = outer - (monotonic() - start)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.01), 5)


def limited(build: Callable[[Task], Backend], seconds: float) -> Callable[[Task], Backend]:
    """Return a builder whose backend is dropped where it takes longer."""

    @wraps(build)
    def built(task: Task) -> Backend:
        until = monotonic() + seconds
        try:
            with within(seconds):
                return build(task)
        except TooLong:
            if monotonic() < until:  # it was the time in all
                raise
            raise BackendError(f"{NOT_BUILT} {seconds:.0f} s") from None

    return built


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


def speed_of(row: BackendRow) -> float:
    return row.speed.speedup if row.speed else 1.0  # the baseline itself has none


def column(
    name: str, batch: int, side: int, budget_s: float, backend_s: float, columns: list[Any]
) -> None:
    """Race the backends and append what was found, then race those near the top once more."""
    model = network(name, side)
    inputs = [torch.rand(batch, 3, side, side) for _ in range(2)]
    fast = quantize_static(model, inputs, budget_s=budget_s, keep_backends=True)
    report = fast.report()
    print(f"\n{name}, batch {batch}\n{report}", flush=True)

    int8 = [r.speed for r in report.rows if r.precision == "int8" and r.speed]
    best = max((speed.speedup for speed in int8), default=float("nan"))
    result = {
        "network": name,
        "batch": batch,
        "chosen": report.chosen,
        "behind": None,
        "not_built": [row.name for row in report.rows if row.dropped.startswith(NOT_BUILT)],
        "int8": best,
        "rows": [
            {
                "backend": row.name,
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
    columns.append(result)

    kept = {row.name: fast.on(row.name) for row in report.rows if not row.dropped}
    baseline = run_of(kept[report.baseline], inputs[0])
    extra = {"eager float32, not folded": run_of(model, inputs[0])}
    if machine.describe().compiler:
        extra["torch.compile float32, not frozen"] = run_of(
            torch.compile(copy.deepcopy(model)), inputs[0]
        )
    for title, run in extra.items():
        try:
            limited(lambda _, run=run: run(), backend_s)(None)  # compiles
        except BackendError as error:
            print(f"{title:36} {error}", flush=True)
            result["not_built"].append(title)
            continue
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
    print(f"  taken: {report.chosen}, {behind:.3f} times behind the fastest; best int8 {best:.2f}")
    result["behind"] = behind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one network, small images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all columns together")
    parser.add_argument("--backend-s", type=float, default=60.0, help="to build a compiled backend")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    torch._inductor.config.compile_threads = 1  # no compiler goes on after its time
    for builder in ("compiled", "pt2e"):
        setattr(
            torch_backends, builder, limited(getattr(torch_backends, builder), options.backend_s)
        )
    print(machine.describe().line, f"· {options.threads} threads")
    print(
        f"budget: {options.minutes:g} minutes in all, {options.backend_s:g} s to build each "
        "compiled backend"
    )
    names, batches, side = (("resnet18",), (1,), 96) if options.quick else (NETWORKS, (1, 16), 224)
    budget_s = 0.5 if options.quick else 2.0
    until = monotonic() + 60 * options.minutes
    columns: list[dict[str, Any]] = []
    not_run: list[str] = []
    for batch in batches:
        for name in names:
            left_s = until - monotonic()
            try:
                if left_s < LEAST_S:
                    raise TooLong
                with within(left_s):
                    column(name, batch, side, budget_s, options.backend_s, columns)
            except TooLong:
                is_raced = columns and (columns[-1]["network"], columns[-1]["batch"]) == (
                    name,
                    batch,
                )
                not_run.append(f"{name}, batch {batch}" + ": the last race" * bool(is_raced))
    for found in columns:
        not_run += [
            f"{found['network']}, batch {found['batch']}: {title}" for title in found["not_built"]
        ]
    print(f"\nnot run within the budget: {'; '.join(not_run) or 'nothing'}")
    if behind := [found["behind"] for found in columns if found["behind"] is not None]:
        worst = max(behind)
        print(f"worst column: {worst:.3f} times behind the fastest backend; the goal is 1.05")
    result = {
        "machine": machine.describe().as_dict(),
        "minutes": options.minutes,
        "not_run": not_run,
        "columns": columns,
    }
    path = Path(__file__).parent / "results" / "inference.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
