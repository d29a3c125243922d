"""What is this machine? Its processor, memory, builds, devices and what is installed."""

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
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dlhelpers.extras import EXTRAS
from dlhelpers.tables import facts_table

__all__ = ["Machine", "describe", "last_level_cache_bytes"]

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
_BEYOND = {  # what oneDNN may use at most -> the beginnings of names that lie beyond it
    "SSE41": ("avx", "amx"),
    "AVX": ("avx2", "avx512", "avx_vnni", "amx"),
    "AVX2": ("avx512", "avx_vnni", "amx"),
    "AVX2_VNNI": ("avx512", "amx"),
    "AVX512_CORE": ("avx512_", "avx_vnni", "amx"),
    "AVX512_CORE_VNNI": ("avx512_bf16", "avx512_fp16", "amx"),
    "AVX512_CORE_BF16": ("avx512_fp16", "amx"),
    "AVX512_CORE_FP16": ("amx",),
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
        simd: instruction sets that matter to deep learning, by one name each; without those that
            ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA forbid torch.
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
        missing = {p: None for extra in self.extras.values() for p, v in extra.items() if v is None}
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
        return facts_table(self._rows())


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
        simd=_allowed(
            [name for flag, name in _SIMD.items() if flag in flags], torch["torch_capability"]
        ),
        ram_bytes=_ram_bytes(),
        cache_bytes=_cache_bytes(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torchvision=_version("torchvision"),
        compiler=next(filter(None, map(shutil.which, ("c++", "g++", "clang++", "cl"))), None),
        extras={extra: {p: _version(p) for p in names} for extra, names in EXTRAS.items()},
        **torch,
    )


def last_level_cache_bytes() -> int:
    """Return the size of the last-level cache, 32 MiB where unknown; loads nothing, torch least."""
    return max(_cache_bytes().values(), default=_LLC_DEFAULT)


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


def _allowed(simd: list[str], capability: str | None) -> tuple[str, ...]:
    """Return the instruction sets that torch's kernels and oneDNN's may use.

    >>> _allowed(["avx2", "avx512", "avx512_vnni"], "AVX2")
    ('avx2',)
    """
    forbidden = ("avx512", "amx") if capability in ("DEFAULT", "AVX2") else ()
    forbidden += _BEYOND.get(os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper(), ())
    return tuple(name for name in simd if not name.startswith(forbidden))


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
