"""How often is a known difference found? Draw docs/selftest.png from comparisons made here.

Keep the machine quiet while it runs: some minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from dlhelpers import machine
from dlhelpers.course import plots
from dlhelpers.measure.selftest import Trial, run

DIFFERENCES = (0.0, 0.01, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.06, 0.08)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="comparisons a point (%(default)s)")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds each (%(default)s)")
    options = parser.parse_args()
    from dlhelpers.drawing.style import new_axes

    figure, axes = new_axes(
        "How often a known difference is found",
        f"work that is spared (%); {options.runs} comparisons a point, {options.budget:g} s each",
        "found faster (%)",
        "",
    )
    axes.axvspan(0, 100 * (1 - 1 / 1.03), color="#d5d5d5", label="negligible")
    axes.axhline(5, color=plots.BASELINE, linestyle="--", label="at most, in the band")
    for loaded, mark, colour in ((False, "o", plots.TREATMENT), (True, "s", plots.FAILING)):
        plan = tuple(
            Trial(d, options.budget, loaded, options.runs, 0.05, at_most=True) for d in DIFFERENCES
        )
        rates = []
        for result in tqdm(run(plan=plan, progress=False), total=len(plan)):
            print(f"{name_of(loaded)}, {result.trial.less_work:.1%} less work: {result.rate:.0%}")
            rates.append(100 * result.rate)
        x = [100 * difference for difference in DIFFERENCES]
        axes.plot(x, rates, marker=mark, color=colour, alpha=0.8, label=name_of(loaded))
    axes.legend(frameon=False, loc="center right")
    path = Path(__file__).parent.parent / "docs" / "selftest.png"
    figure.savefig(path, bbox_inches="tight", pad_inches=0.1)
    print(f"wrote {path} on {machine.describe().line}")


def name_of(loaded: bool) -> str:
    return "beside a busy process" if loaded else "quiet"


if __name__ == "__main__":
    main()
