"""What a comparison supports: the outcome, its interval and how it is shown."""

from __future__ import annotations

import html
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dlhelpers.measure.intervals import is_typical, min_pairs
from dlhelpers.tables import duration, figures

__all__ = ["Comparison", "Comparisons", "Outcome", "intra_op_threads", "single_pair"]

Outcome = Literal["faster", "slower", "no difference", "undecided"]


@dataclass(frozen=True)
class Comparison:
    """What paired measurements of two callables support.

    ``speedup`` and ``outcome`` are those of the typical call. Where a few calls take far longer
    than the others, all calls together may say otherwise: that is ``total_ratio``. Where no call
    is typical, as when every second one takes far longer, the interval holds both ratios.

    Attributes:
        speedup: baseline time / candidate time; 1.25 means that the candidate needs 1/1.25 of
            the time.
        low, high: confidence interval of ``speedup``; 0 and infinity when the budget allowed too
            few pairs for any interval, or the ratio was still changing.
        outcome: ``faster`` or ``slower`` where the whole interval lies beyond the negligible
            band [1/(1+negligible), 1+negligible], ``no difference`` where it lies within,
            ``undecided`` otherwise.
        pairs: number of measured pairs that the interval rests on.
        baseline_s, candidate_s: median time of one call in these pairs, in seconds.
        confidence, negligible, threshold: as asked for.
        ratios: the ratios of these pairs, in order of measurement.
        device: ``cpu``, or ``cuda`` when CUDA was in use and its events timed the calls.
        threads: torch's intra-op threads, left as the caller had set them; None without torch.
        elapsed_s: seconds used, warm-up and calibration included.
        is_first: one call of each took so long that the budget had no room for another: the only
            pair are the first calls, in which something may be made ready.
        dropped: pairs that were left out because the ratio changed after them, as when something
            warms up.
        still_changing: the ratio changed up to the end, or so late that fewer pairs came after
            the change than before it, so the outcome is ``undecided``.
        total_ratio: all baseline time / all candidate time in these pairs, which answers for
            throughput; None where it was not computed.
        total_low, total_high: its confidence interval, which a few long calls make wide.
    """

    speedup: float
    low: float
    high: float
    outcome: Outcome
    pairs: int
    baseline_s: float
    candidate_s: float
    confidence: float
    negligible: float
    threshold: float | tuple[float, ...] | None
    ratios: tuple[float, ...]
    device: str
    threads: int | None
    elapsed_s: float
    is_first: bool = False
    dropped: int = 0
    still_changing: bool = False
    total_ratio: float | None = None
    total_low: float = 0.0
    total_high: float = math.inf

    def __str__(self) -> str:
        outcome = f"{self.outcome}{': still warming up' * self.still_changing}"
        left_out = f", without {self.dropped:,} from before a change," * bool(self.dropped)
        facts = [
            f"{outcome} · speedup {_told(self.speedup, self.low, self.high)}"
            f" at {self.confidence:.3g} confidence",
            f"{duration(self.baseline_s)} -> {duration(self.candidate_s)} a call",
            f"{_pairs(self.pairs)}{left_out} in {duration(self.elapsed_s, 2)}",
            self.device + (f", {self.threads} threads" if self.threads else ""),
        ]
        return "\n".join(filter(None, (" · ".join(facts), self.advice, self.throughput)))

    __repr__ = __str__

    @property
    def advice(self) -> str:
        """How to get an interval when the budget was too small for one, else empty."""
        if self.still_changing:
            return (
                "the ratio was still changing when the budget ended: call both until their times "
                "are steady, or give a larger budget_s; times that never become steady have no "
                "one ratio"
            )
        if math.isfinite(self.high):
            return ""
        need = min_pairs(1 - self.confidence)
        # half of the budget may go into warming up, calibrating and an unfinished pair
        budget = 2 * (need + 1) * self.elapsed_s / self.pairs
        if self.is_first:
            return (
                "one call of each spent the budget: these are the first calls, warm-up included; "
                f"call both once beforehand, or give budget_s={_round_up(budget)} or more"
            )
        return (
            f"{_pairs(self.pairs)} cannot give an interval, {need} are needed: "
            f"give budget_s={_round_up(budget)} or more"
        )

    @property
    def throughput(self) -> str:
        """What all calls together say where that is not what the typical call says, else empty."""
        ratio = self.total_ratio
        if ratio is None or not ratio > 0 or self.still_changing or math.isinf(self.total_high):
            return ""
        if abs(math.log(ratio / self.speedup)) <= math.log1p(self.negligible):
            return ""
        if not is_typical(np.log(self.ratios), self.speedup):
            return (
                "no call is typical, as the times have levels far apart: the speedup is the middle "
                "of the pairs' ratios; all calls together (throughput): "
                f"{_told(ratio, self.total_low, self.total_high)} times as fast"
            )
        if self.total_low <= self.high and self.low <= self.total_high:
            return ""
        return (
            f"typical call: {_told(self.speedup, self.low, self.high)} times as fast; all calls "
            f"together (throughput): {_told(ratio, self.total_low, self.total_high)} times, as "
            "some calls take far longer than the others"
        )

    def _repr_html_(self) -> str:
        from dlhelpers.drawing import strip

        line = html.escape(str(self)).replace("\n", "<br>")
        if not math.isfinite(self.high):
            return f"<div>{line}</div>"
        drawn = strip(
            self.ratios,
            self.low,
            self.high,
            negligible=self.negligible,
            estimate=self.speedup,
            threshold=self.threshold,
        )
        return f"<div>{line}<br>{drawn._repr_html_()}</div>"


class Comparisons(Mapping[str, Comparison]):
    """Comparisons of several candidates against one baseline, by name; displays as a table."""

    def __init__(self, baseline: str, rows: Mapping[str, Comparison]) -> None:
        self.baseline = baseline
        self._rows = dict(rows)

    def __getitem__(self, name: str) -> Comparison:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        width = max((len(name) for name in self._rows), default=0)
        lines = [f"against {self.baseline}:"]
        lines += [f"  {name:<{width}}  {row}" for name, row in self._rows.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left'>{html.escape(name)}</td>"
            f"<td style='text-align:left'>{row._repr_html_()}</td></tr>"
            for name, row in self._rows.items()
        )
        head = f"<tr><th></th><th>against {html.escape(self.baseline)}</th></tr>"
        return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def single_pair(baseline_s: float, candidate_s: float) -> Comparison:
    """Return what one call of each supports, where more of them would take too long: no interval.

    For callers that have timed both themselves, on the CPU.
    """
    ratio = baseline_s / candidate_s
    return Comparison(
        speedup=ratio,
        low=0.0,
        high=math.inf,
        outcome="undecided",
        pairs=1,
        baseline_s=baseline_s,
        candidate_s=candidate_s,
        confidence=0.95,
        negligible=0.03,
        threshold=None,
        ratios=(ratio,),
        device="cpu",
        threads=intra_op_threads(),
        elapsed_s=baseline_s + candidate_s,
        is_first=True,
    )


def intra_op_threads() -> int | None:
    """Return torch's intra-op threads; None where torch is not loaded."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


def _told(value: float, low: float, high: float) -> str:
    return f"{figures(value)} [{figures(low)}, {figures(high)}]"


def _pairs(count: int) -> str:
    return f"{count:,} {'pair' if count == 1 else 'pairs'}"


def _round_up(seconds: float) -> float:
    scale = 10 ** math.floor(math.log10(seconds))
    return round(math.ceil(seconds / scale) * scale, 9)
