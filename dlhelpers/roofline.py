"""How fast can this machine be at best? Its roofline, measured.

A kernel that moves B bytes and does F operations takes at least max(B / bandwidth, F / peak)
seconds.

A type without a fast kernel takes minutes for a product that others finish in milliseconds, so
products start small and each type stops where the next size might not fit into its share of time.

Source: Williams, Waterman & Patterson 2009, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlhelpers.files import cache_dir, write_whole
from dlhelpers.machine import describe
from dlhelpers.tables import facts_table

if TYPE_CHECKING:
    import torch

__all__ = ["Roofline", "roofline"]

_BUDGET_S = 1.7  # for everything that is timed; the call in flight ends
_SIZES = (256, 512, 1024, 2048)
_GROWTH = {"fp32": 8}  # twice the size is 8 times the work, and float32 is fast everywhere
_GROWTH_ELSE = 24  # of a kernel without instructions for its type, once out of the caches
_KEYS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
_KEYS |= {"int8": "int8", "uint8": "int8"}
_clock = time.perf_counter  # tests put a fake clock here


@dataclass(frozen=True)
class Roofline:
    """Measured peaks of this machine with the present number of threads.

    Attributes:
        bandwidth_gb_s: 10^9 bytes moved a second by c = a + b over arrays beyond the caches
            (two read, one written; what the cache reads before it writes is not counted).
        gflops: ``fp32``, ``bf16``, ``int8`` -> 10^9 operations a second of a matrix product
            (2 n^3 each; int8's are integer operations); None where torch has no such product here.
            A type without a fast kernel has the rate of a small product. Peaks of ``fp16`` and
            ``fp64`` are not measured; whoever knows them may add them.
        threads: torch's intra-op threads while measuring.
        loaded: whether other processes were busy while measuring, so that peaks are too low.
    """

    bandwidth_gb_s: float
    gflops: dict[str, float | None]
    threads: int
    loaded: bool = False

    @property
    def ridge_flop_per_byte(self) -> float:
        """Operations per byte above which float32 is bound by arithmetic, not by memory."""
        return (self.gflops["fp32"] or 0.0) / self.bandwidth_gb_s

    def peak_gflops(self, dtype: torch.dtype) -> float | None:
        """Return the peak of a type, 10^9 operations a second; None where it is not known.

        >>> import torch
        >>> peaks = Roofline(10.0, {"fp32": 100.0, "bf16": 200.0}, 1)
        >>> peaks.peak_gflops(torch.bfloat16), peaks.peak_gflops(torch.float64)
        (200.0, None)
        """
        return self.gflops.get(_KEYS.get(str(dtype).removeprefix("torch."), ""))

    def _rows(self) -> list[tuple[str, str]]:
        peaks = [
            (f"{name} matrix product", f"{_short(peak)} G{'OP' if name == 'int8' else 'FLOP'}/s")
            if peak
            else (f"{name} matrix product", "not available in this build of torch")
            for name, peak in self.gflops.items()
        ]
        return [
            ("memory bandwidth", f"{self.bandwidth_gb_s:.1f} GB/s"),
            *peaks,
            ("ridge, float32", f"{self.ridge_flop_per_byte:.1f} FLOP/byte"),
            ("threads", str(self.threads)),
            *[("loaded", "other processes were busy: the peaks may be higher")] * self.loaded,
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name:20} {value}" for name, value in self._rows())

    def _repr_html_(self) -> str:
        return facts_table(self._rows())


def _short(peak: float) -> str:
    return f"{peak:,.0f}" if peak >= 10 else f"{peak:.2g}"


def roofline(*, refresh: bool = False) -> Roofline:
    """Measure this machine's peaks in less than 3 seconds; later calls read them from a cache.

    What was measured while other processes were busy is kept with the mark ``loaded``. A later call
    on a quiet machine measures again, keeps the larger of the old and the new peaks and takes the
    mark away; while the machine is still loaded, a later call returns what is kept.

    Args:
        refresh: measure again in any case, and keep the larger of the old and the new peaks.

    Returns:
        The peaks; ``loaded`` where they have never been measured on a quiet machine.
    """
    import torch

    threads = torch.get_num_threads()
    path = cache_dir() / f"roofline-{describe().key}-{threads}-{torch.__version__}.json"
    try:
        kept = Roofline(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        kept = None  # none yet, or of another version
    was_loaded = _is_loaded()  # before the measuring, which is a load itself
    if kept and not refresh and (was_loaded or not kept.loaded):
        return kept
    begin, others_s = _clock(), _others_s()
    end = begin + _BUDGET_S
    # the peaks are the CPU's, whatever the program has set for itself
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.inference_mode():
        peaks = _matmul_gflops(end)
        bandwidth = _bandwidth_gb_s(end)
    others = (_others_s() - others_s) / max(_clock() - begin, 1e-9)
    was_loaded = was_loaded or others > describe().cores / 4
    result = Roofline(bandwidth, peaks, threads, was_loaded)
    if kept:
        result = _better(kept, result)
    _keep(path, result)
    return result


def _better(old: Roofline, new: Roofline) -> Roofline:
    """Return the larger of each peak: it is the best that was ever seen."""
    peaks = {
        name: max(new.gflops.get(name) or 0, old.gflops.get(name) or 0) or None
        for name in old.gflops | new.gflops
    }
    bandwidth = max(old.bandwidth_gb_s, new.bandwidth_gb_s)
    return Roofline(bandwidth, peaks, new.threads, old.loaded and new.loaded)


def _is_loaded() -> bool:
    """Whether other processes keep more than half of the cores busy: then a peak is none."""
    try:
        return os.getloadavg()[0] > max(1.0, describe().cores / 2)
    except (AttributeError, OSError):
        return False


def _others_s() -> float:
    """Return the seconds that all cores have worked for others; 0 where Linux does not tell.

    The load average takes a minute to notice a process that has just begun.
    """
    try:
        fields = Path("/proc/stat").read_text().split(None, 9)[1:9]
        user, nice, system, _, _, irq, softirq, stolen = map(int, fields)
        busy = user + nice + system + irq + softirq + stolen
        return busy / os.sysconf("SC_CLK_TCK") - time.process_time()
    except (OSError, ValueError, AttributeError):
        return 0.0


def _keep(path: Path, result: Roofline) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (), lambda name: Path(name).write_text(json.dumps(asdict(result))))
    except OSError:
        pass  # a read-only home costs the next call a few seconds, no more


def _matmul_gflops(end: float) -> dict[str, float | None]:
    """Return each type's peak; it has an equal share of the time that is left for what follows."""
    import torch

    own = torch.Generator().manual_seed(0)  # the caller's random state stays where it is
    tile = torch.randn(_SIZES[0], _SIZES[0], generator=own, dtype=torch.float32)

    def operand(n: int, dtype: torch.dtype) -> torch.Tensor:
        return (3 * tile).to(dtype).repeat(n // len(tile), n // len(tile))

    def product(dtype: torch.dtype, n: int) -> Callable[[], Any]:
        a = operand(n, dtype)
        return lambda: torch._int_mm(a, a) if dtype == torch.int8 else a @ a

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    peaks: dict[str, float | None] = {}
    for i, (name, dtype) in enumerate(types.items()):
        share = (end - _clock()) / (len(types) + 1 - i)  # the last one is the bandwidth's
        growth = _GROWTH.get(name, _GROWTH_ELSE)
        of_type = partial(product, dtype)
        peaks[name] = _product_gflops(of_type, _clock() + share, growth)
    return peaks


def _product_gflops(
    product: Callable[[int], Callable[[], Any]], until: float, growth: float
) -> float | None:
    """Return the best rate of products of growing size; None where torch has no such product."""
    best = 0.0
    for n in _SIZES:
        try:
            multiply = product(n)
            seconds = _best_seconds(multiply, until, grown=0 if n == _SIZES[-1] else growth)
        except (RuntimeError, AttributeError):
            break  # torch has no such product here
        best = max(best, 2 * n**3 / seconds / 1e9)
        if _clock() + growth * seconds > until:
            break
    return best or None


def _bandwidth_gb_s(end: float) -> float:
    import torch

    here = describe()
    # a server has a last-level cache for each group of cores: 32 MiB a core are beyond them all
    size = max(8 * here.llc_bytes, 64 << 20, here.cores * (32 << 20))
    wanted = min(size, (here.ram_bytes or 4 << 30) // 8) // 4 // 3
    whole = [
        torch.empty(wanted, dtype=torch.float32) for _ in range(3)
    ]  # costs nothing until it is touched
    n, touched = min(wanted, 4 * here.llc_bytes // 4 // 3), 0
    until = _clock() + 2 / 3 * (end - _clock())
    while True:
        begin = _clock()
        for array in whole:
            array[touched:n].fill_(1.0)
        a, b, c = (array[:n] for array in whole)
        torch.add(a, b, out=c)
        if n == wanted or _clock() + 4 * (_clock() - begin) > until:
            break
        n, touched = min(wanted, 4 * n), n
    bytes_moved = {  # by operation: arrays of 4-byte numbers read and written
        (lambda: torch.add(a, b, out=c)): 3 * 4 * n,
        (lambda: c.copy_(a)): 2 * 4 * n,
        (lambda: a.sum()): 1 * 4 * n,
    }
    if n < wanted:  # no time to fill more: fewer arrays might stay in the caches
        bytes_moved = dict([*bytes_moved.items()][:1])
    best = 0.0
    for i, (run, moved) in enumerate(bytes_moved.items()):
        until = _clock() + (end - _clock()) / (len(bytes_moved) - i)
        best = max(best, moved / _best_seconds(run, until) / 1e9)
    return best


def _best_seconds(function: Callable[[], Any], until: float, grown: float = 0) -> float:
    """Return the least time of a call: of one at least, and of no further one that would be late.

    With ``grown``, three calls suffice once that many times the least time is left: a first call
    may be a slow one.
    """
    best, calls = math.inf, 0
    while True:
        start = _clock()
        function()
        now, calls = _clock(), calls + 1
        best = max(1e-9, min(best, now - start))
        if now + best > until or (grown and calls >= 3 and now + grown * best <= until):
            return best
