"""What is this machine, and how fast can it be at best?

The roofline bounds every operation: a kernel that moves B bytes and does F floating-point
operations takes at least max(B / bandwidth, F / peak) seconds.

Source: Williams, Waterman & Patterson 2009, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Machine", "Roofline", "describe", "roofline"]

_EXTRAS = {
    "dali": ("nvidia-dali-cuda130",),
    "engines": ("onnx", "onnxruntime", "onnxscript", "openvino"),
    "quant": ("torchao",),
    "codecs": ("simplejpeg", "opencv-python-headless", "torchcodec"),
    "profiling": ("line_profiler", "pyinstrument"),
}
# what the operating systems call the instruction sets that matter here -> one name each
_SIMD = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "asimddp": "neon_dotprod",
    "sve": "sve",
    "i8mm": "i8mm",
    "bf16": "neon_bf16",
}
_LLC_DEFAULT = 32 << 20
_SYSFS_CACHE = "/sys/devices/system/cpu/cpu0/cache"


@dataclass(frozen=True)
class Machine:
    """Facts about this machine; None where the system does not tell.

    Attributes:
        cpu: the processor's name.
        cores: logical cores that this process may use.
        logical_cores, physical_cores: of the machine; a physical core may be several logical ones.
        simd: instruction sets that matter to deep learning, by one name each.
        ram_bytes: main memory.
        cache_bytes: level (``L1d``, ``L2``, ``L3``) -> bytes of one instance.
        system: operating system and architecture.
        python, torch, torchvision: versions; torch's names its build (``+cu132``, ``+cpu``).
        torch_capability: the widest instruction set that torch's kernels use here.
        cuda_devices: names of the CUDA devices.
        compiler: path of a C++ compiler.
        extras: extra -> {package -> version, or None where it is missing}.
    """

    cpu: str | None
    cores: int
    logical_cores: int | None
    physical_cores: int | None
    simd: tuple[str, ...]
    ram_bytes: int | None
    cache_bytes: dict[str, int]
    system: str
    python: str
    torch: str | None
    torchvision: str | None
    torch_capability: str | None
    cuda_devices: tuple[str, ...]
    compiler: str | None
    extras: dict[str, dict[str, str | None]]

    @property
    def llc_bytes(self) -> int:
        """Size of the last-level cache in bytes; 32 MiB where the system does not tell."""
        return max(self.cache_bytes.values(), default=_LLC_DEFAULT)

    @property
    def key(self) -> str:
        """A stable name: of the processor, its instruction sets and cores, system and devices."""
        facts = (self.cpu, self.simd, self.logical_cores, self.system, self.cuda_devices)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]

    @property
    def line(self) -> str:
        """The machine in one line."""
        parts = [
            f"{self.cpu or 'unknown CPU'}, {self.cores} cores",
            "/".join(s for s in self.simd if s.startswith(("avx", "amx", "neon"))) or None,
            f"{self.ram_bytes / 2**30:.0f} GiB" if self.ram_bytes else None,
            f"torch {self.torch}" if self.torch else "no torch",
            ", ".join(self.cuda_devices) or "no GPU",
        ]
        return " · ".join(filter(None, parts))

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it, with ``key`` and ``line``."""
        return {"key": self.key, "line": self.line} | json.loads(json.dumps(asdict(self)))

    def _rows(self) -> list[tuple[str, str]]:
        missing = [p for extra in self.extras.values() for p, v in extra.items() if v is None]
        caches = ", ".join(f"{k} {v / 2**10:.0f} KiB" for k, v in self.cache_bytes.items())
        cores = f"{self.logical_cores or '?'} logical, {self.physical_cores or '?'} physical"
        return [
            ("processor", self.cpu or "unknown"),
            ("cores", f"{self.cores} usable of {cores}"),
            ("instruction sets", ", ".join(self.simd) or "unknown"),
            ("memory", f"{self.ram_bytes / 2**30:.1f} GiB" if self.ram_bytes else "unknown"),
            ("caches", caches or "unknown"),
            ("system", f"{self.system}, Python {self.python}"),
            ("torch", f"{self.torch or 'missing'}, torchvision {self.torchvision or 'missing'}"),
            ("torch's kernels use", self.torch_capability or "unknown"),
            ("CUDA devices", ", ".join(self.cuda_devices) or "none"),
            ("C++ compiler", self.compiler or "none (torch.compile needs one)"),
            ("extras missing", ", ".join(missing) or "none"),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name:20} {value}" for name, value in self._rows())

    def _repr_html_(self) -> str:
        return _table(self._rows())


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
        return _table(self._rows())


@cache
def describe() -> Machine:
    """Return what this machine is; never raises, unknown facts are None or empty."""
    flags = _cpu_flags()
    torch = _torch_facts()
    return Machine(
        cpu=_cpu_name(),
        cores=_usable_cores(),
        logical_cores=os.cpu_count(),
        physical_cores=_physical_cores(),
        simd=tuple(name for flag, name in _SIMD.items() if flag in flags),
        ram_bytes=_ram_bytes(),
        cache_bytes=_cache_bytes(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torchvision=_version("torchvision"),
        compiler=next(filter(None, map(shutil.which, ("c++", "g++", "clang++", "cl"))), None),
        extras={extra: {p: _version(p) for p in names} for extra, names in _EXTRAS.items()},
        **torch,
    )


def roofline(*, refresh: bool = False) -> Roofline:
    """Measure this machine's peaks in a few seconds; later calls read them from a cache.

    Args:
        refresh: measure again.
    """
    import torch

    from dlhelpers.data import cache_dir

    threads = torch.get_num_threads()
    name = f"roofline-{describe().key}-{threads}-{torch.__version__}.json"
    path = cache_dir() / name
    if not refresh:
        try:
            return Roofline(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            pass  # none yet, or of another version: measure
    result = Roofline(_bandwidth_gb_s(), _matmul_gflops(), threads)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_text(json.dumps(asdict(result)))
        partial.replace(path)
    except OSError:
        pass  # a read-only home costs the next call a few seconds, no more
    return result


def _bandwidth_gb_s() -> float:
    import torch

    here = describe()
    # a server has a last-level cache for each group of cores: 32 MiB a core are beyond them all
    size = max(8 * here.llc_bytes, 64 << 20, here.cores * (32 << 20))
    n = min(size, (here.ram_bytes or 4 << 30) // 8) // 4 // 3
    a, b, c = torch.ones(n), torch.ones(n), torch.zeros(n)
    return 3 * 4 * n / _best_seconds(lambda: torch.add(a, b, out=c)) / 1e9


def _matmul_gflops() -> dict[str, float | None]:
    import torch

    n = 1024
    own = torch.Generator().manual_seed(0)  # the caller's random state stays where it is
    a = torch.randn(n, n, generator=own)
    half = a.bfloat16()
    small = torch.randint(-8, 8, (n, n), dtype=torch.int8, generator=own)
    products: dict[str, Callable[[], Any]] = {
        "fp32": lambda: a @ a,
        "bf16": lambda: half @ half,
        "int8": lambda: torch._int_mm(small, small),
    }
    peaks: dict[str, float | None] = {}
    for name, product in products.items():
        try:
            peaks[name] = 2 * n**3 / _best_seconds(product) / 1e9
        except (RuntimeError, AttributeError, NotImplementedError):
            peaks[name] = None
    return peaks


def _best_seconds(function: Callable[[], Any], budget_s: float = 0.8) -> float:
    function()
    best, until = float("inf"), time.perf_counter() + budget_s
    while time.perf_counter() < until:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def _torch_facts() -> dict[str, Any]:
    try:
        import torch

        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        return {
            "torch": torch.__version__,
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "cuda_devices": tuple(torch.cuda.get_device_name(i) for i in devices),
        }
    except (ImportError, RuntimeError, AttributeError, OSError):
        return {"torch": _version("torch"), "torch_capability": None, "cuda_devices": ()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _physical_cores() -> int | None:
    if sys.platform == "darwin":
        text = _sysctl("hw.physicalcpu")
        return int(text) if text.isdigit() else None
    blocks = _read("/proc/cpuinfo").split("\n\n")
    ids = [dict(re.findall(r"^(physical id|core id)\s*:\s*(\d+)$", b, re.M)) for b in blocks]
    return len({(i.get("physical id"), i["core id"]) for i in ids if "core id" in i}) or None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(
            ["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cpu_name() -> str | None:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or None
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.M)
    return found[1].strip() if found else platform.processor() or None


def _cpu_flags() -> set[str]:
    if sys.platform == "darwin":
        words = f"{_sysctl('machdep.cpu.features')} {_sysctl('machdep.cpu.leaf7_features')}"
        arm = {"asimd"} if platform.machine() == "arm64" else set()
        named = {"FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16"}
        arm |= {flag for name, flag in named.items() if _sysctl(f"hw.optional.arm.{name}") == "1"}
        return set(words.lower().split()) | arm
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.M)
    return set(found[1].split()) if found else set()


def _ram_bytes() -> int | None:
    if sys.platform == "darwin":
        text = _sysctl("hw.memsize")
        return int(text) if text.isdigit() else None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _cache_bytes() -> dict[str, int]:
    if sys.platform == "darwin":
        names = {"L1d": "hw.l1dcachesize", "L2": "hw.l2cachesize", "L3": "hw.l3cachesize"}
        found = {level: _sysctl(name) for level, name in names.items()}
        return {level: int(text) for level, text in found.items() if text.isdigit() and int(text)}
    caches = {}
    for folder in sorted(Path(_SYSFS_CACHE).glob("index*")):
        kind, level = _read(f"{folder}/type").strip(), _read(f"{folder}/level").strip()
        size = re.fullmatch(r"(\d+)([KMG])", _read(f"{folder}/size").strip())
        if kind in ("Data", "Unified") and level and size:
            scale = {"K": 2**10, "M": 2**20, "G": 2**30}[size[2]]
            caches[f"L{level}{'d' if kind == 'Data' else ''}"] = int(size[1]) * scale
    return caches


def _table(rows: list[tuple[str, str]]) -> str:
    import html

    body = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table><tbody>{body}</tbody></table>"
