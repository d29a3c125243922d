"""How fast can this machine be at best? Its roofline, measured.

A kernel that moves B bytes and does F operations takes at least max(B / bandwidth, F / peak)
seconds.

Source: Williams, Waterman & Patterson 2009, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlhelpers.files import cache_dir, write_whole
from dlhelpers.machine import describe
from dlhelpers.tables import facts_table

__all__ = ["Roofline", "roofline"]


@dataclass(frozen=True)
class Roofline:
    """Measured peaks of this machine with the present number of threads.

    Attributes:
        bandwidth_gb_s: 10^9 bytes moved a second by c = a + b over arrays beyond the caches
            (two read, one written; what the cache reads before it writes is not counted).
        gflops: ``fp32``, ``bf16``, ``int8`` -> 10^9 operations a second of a matrix product
            (2 n^3 each; int8's are integer operations); None where torch has no such product here.
        threads: torch's intra-op threads while measuring.
    """

    bandwidth_gb_s: float
    gflops: dict[str, float | None]
    threads: int

    @property
    def ridge_flop_per_byte(self) -> float:
        """Operations per byte above which float32 is bound by arithmetic, not by memory."""
        return (self.gflops["fp32"] or 0.0) / self.bandwidth_gb_s

    def _rows(self) -> list[tuple[str, str]]:
        peaks = [
            (f"{name} matrix product", f"{peak:,.0f} G{'OP' if name == 'int8' else 'FLOP'}/s")
            if peak
            else (f"{name} matrix product", "not available in this build of torch")
            for name, peak in self.gflops.items()
        ]
        return [
            ("memory bandwidth", f"{self.bandwidth_gb_s:.1f} GB/s"),
            *peaks,
            ("ridge, float32", f"{self.ridge_flop_per_byte:.1f} FLOP/byte"),
            ("threads", str(self.threads)),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name:20} {value}" for name, value in self._rows())

    def _repr_html_(self) -> str:
        return facts_table(self._rows())


def roofline(*, refresh: bool = False) -> Roofline:
    """Measure this machine's peaks in a few seconds; later calls read them from a cache.

    What was measured while other processes kept the cores busy is returned and not kept.

    Args:
        refresh: measure again, and keep the larger of the old and the new peaks.
    """
    import torch

    threads = torch.get_num_threads()
    path = cache_dir() / f"roofline-{describe().key}-{threads}-{torch.__version__}.json"
    try:
        kept = Roofline(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        kept = None  # none yet, or of another version
    if kept and not refresh:
        return kept
    was_loaded = _is_loaded()  # before the measuring, which is a load itself
    result = Roofline(_bandwidth_gb_s(), _matmul_gflops(), threads)
    if kept:  # a peak is the best that was ever seen
        best = {
            name: max(peak or 0, kept.gflops.get(name) or 0) for name, peak in result.gflops.items()
        }
        peaks = {name: peak or None for name, peak in best.items()}
        result = Roofline(max(result.bandwidth_gb_s, kept.bandwidth_gb_s), peaks, threads)
    if not was_loaded:
        _keep(path, result)
    return result


def _is_loaded() -> bool:
    """Whether other processes keep more than half of the cores busy: then a peak is none."""
    try:
        return os.getloadavg()[0] > max(1.0, describe().cores / 2)
    except (AttributeError, OSError):
        return False


def _keep(path: Path, result: Roofline) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (), lambda name: Path(name).write_text(json.dumps(asdict(result))))
    except OSError:
        pass  # a read-only home costs the next call a few seconds, no more


def _bandwidth_gb_s() -> float:
    import torch

    here = describe()
    # a server has a last-level cache for each group of cores: 32 MiB a core are beyond them all
    size = max(8 * here.llc_bytes, 64 << 20, here.cores * (32 << 20))
    n = min(size, (here.ram_bytes or 4 << 30) // 8) // 4 // 3
    a, b, c = torch.ones(n), torch.ones(n), torch.zeros(n)
    bytes_moved = {  # by operation: arrays of 4-byte numbers read and written
        (lambda: torch.add(a, b, out=c)): 3 * 4 * n,
        (lambda: c.copy_(a)): 2 * 4 * n,
        (lambda: a.sum()): 1 * 4 * n,
    }
    return max(moved / _best_seconds(run, 0.4) / 1e9 for run, moved in bytes_moved.items())


def _matmul_gflops() -> dict[str, float | None]:
    import torch

    own = torch.Generator().manual_seed(0)  # the caller's random state stays where it is
    peaks: dict[str, float | None] = dict.fromkeys(("fp32", "bf16", "int8"))
    for n in (1024, 2048):
        a = torch.randn(n, n, generator=own)
        half = a.bfloat16()
        small = torch.randint(-8, 8, (n, n), dtype=torch.int8, generator=own)
        products: dict[str, Callable[[], Any]] = {
            "fp32": lambda a=a: a @ a,
            "bf16": lambda half=half: half @ half,
            "int8": lambda small=small: torch._int_mm(small, small),
        }
        for name, product in products.items():
            try:
                rate = 2 * n**3 / _best_seconds(product, 0.4) / 1e9
            except (RuntimeError, AttributeError):
                continue  # torch has no such product here
            peaks[name] = max(rate, peaks[name] or 0.0)
    return peaks


def _best_seconds(function: Callable[[], Any], budget_s: float) -> float:
    function()
    best, until = float("inf"), time.perf_counter() + budget_s
    while time.perf_counter() < until:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best
