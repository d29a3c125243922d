"""Which tool tells 0, 2, 5 and 10 % less work apart on a noisy machine, in the same time?

`dlhelpers.measure.compare` beside torch.utils.benchmark (Compare's table), timeit and pyperf's
comparison: the same callables, the same second process loading one of two cores on and off, the
same seconds. Each tool's answer is what its own output tells a reader:

torch    the two medians, rounded to the figures that Compare prints (`trim_significant_figures`),
         differ by more than the negligible 3 %
timeit   the smallest of the repeats differ by more than 3 %, as its documentation advises
pyperf   the t test behind `pyperf compare_to` calls the difference of the means significant, and
         it is more than 3 %

Prints a table and writes benchmarks/results/measure.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import timeit
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from dlhelpers import machine
from dlhelpers.measure import compare
from dlhelpers.measure.selftest import busy_neighbour, workload

NEGLIGIBLE = 0.03
Work = Callable[[], Any]


def judge(ratio: float, significant: bool = True) -> str:
    if not significant or abs(math.log(ratio)) <= math.log(1 + NEGLIGIBLE):
        return "no difference"
    return "faster" if ratio > 1 else "slower"


def ours(baseline: Work, candidate: Work, budget_s: float) -> str:
    return compare(baseline, candidate, budget_s=budget_s, negligible=NEGLIGIBLE).outcome


def torch_compare(baseline: Work, candidate: Work, budget_s: float) -> str:
    from torch.utils.benchmark import Timer
    from torch.utils.benchmark.utils.common import trim_sigfig

    printed = []
    for work in (baseline, candidate):
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        result = timer.blocked_autorange(min_run_time=0.4 * budget_s)
        printed.append(trim_sigfig(result.median, result.significant_figures))
    return judge(printed[0] / printed[1])


def timeit_repeat(baseline: Work, candidate: Work, budget_s: float) -> str:
    best = []
    for work in (baseline, candidate):
        timer = timeit.Timer(work)
        number = max(1, round(0.4 * budget_s / 5 / (timer.timeit(3) / 3)))
        best.append(min(timer.repeat(5, number)) / number)
    return judge(best[0] / best[1])


def pyperf_compare(baseline: Work, candidate: Work, budget_s: float) -> str:
    from pyperf._utils import is_significant

    values = []
    for work in (baseline, candidate):
        work()
        until, samples = time.perf_counter() + 0.45 * budget_s, []
        while time.perf_counter() < until or len(samples) < 3:
            samples.append(timeit.timeit(work, number=5) / 5)
        values.append(samples)
    shortest = min(map(len, values))  # its t test wants equally many
    significant, _ = is_significant(*(samples[:shortest] for samples in values))
    means = [sum(samples) / len(samples) for samples in values]
    return judge(means[0] / means[1], significant)


TOOLS = {
    "dlhelpers.measure": ours,
    "torch.utils.benchmark": torch_compare,
    "timeit": timeit_repeat,
    "pyperf": pyperf_compare,
}
TRIALS = [  # share of work spared, loaded, seconds
    (0.0, True, 1.0),
    (0.0, False, 1.0),
    (0.02, True, 2.0),
    (0.05, False, 2.0),
    (0.05, True, 2.0),
    (0.1, True, 2.0),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30, help="for each tool and row (%(default)s)")
    runs = parser.parse_args().runs
    results = []
    print(machine.describe().line)
    print(f"{'answered right, of ' + str(runs):<34}" + "".join(f"{t:>23}" for t in TOOLS))
    for spared, loaded, budget_s in TRIALS:
        is_real = spared > NEGLIGIBLE  # 2 % lies inside the negligible band: `faster` is false
        baseline, candidate = workload(1.0), workload(1 - spared)
        counts = dict.fromkeys(TOOLS, 0)
        seconds = dict.fromkeys(TOOLS, 0.0)
        with busy_neighbour() if loaded else nullcontext():
            for _ in tqdm(range(runs), leave=False, disable=None):
                for name, tool in TOOLS.items():  # in turn: all see the same noise
                    start = time.perf_counter()
                    outcome = tool(baseline, candidate, budget_s)
                    seconds[name] += time.perf_counter() - start
                    good = (outcome == "faster") if is_real else outcome not in ("faster", "slower")
                    counts[name] += good
        label = f"{spared:.0%} less, {'loaded' if loaded else 'quiet'}, {budget_s:g} s"
        cells = [f"{counts[t]} ({seconds[t] / runs:.2f} s)" for t in TOOLS]
        print(f"{label:<34}" + "".join(f"{c:>23}" for c in cells), flush=True)
        results.append(
            {"less_work": spared, "loaded": loaded, "budget_s": budget_s, "runs": runs}
            | {"right": counts, "seconds_each": {t: s / runs for t, s in seconds.items()}}
        )
    output = Path(__file__).parent / "results" / "measure.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps({"machine": machine.describe().as_dict(), "rows": results}))


if __name__ == "__main__":
    main()
