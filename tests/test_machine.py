import dataclasses
import importlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch

from dlhelpers import machine
from dlhelpers.machine import describe
from dlhelpers.roofline import Roofline, roofline

PEAKS = importlib.import_module("dlhelpers.roofline")  # the name is the function's elsewhere


def test_facts_agree_with_the_system():
    here = describe()
    assert here.torch == torch.__version__
    assert here.python == platform.python_version()
    assert 1 <= here.cores <= os.cpu_count()
    assert here.cuda_devices == () or torch.cuda.is_available()


@pytest.mark.skipif(not shutil.which("lscpu"), reason="lscpu (Linux) is the reference here")
def test_processor_and_caches_agree_with_lscpu():
    lines = subprocess.check_output(["lscpu", "-J"], text=True)
    fields = {}

    def collect(entries):
        for entry in entries:
            fields[entry["field"].rstrip(":")] = entry["data"]
            collect(entry.get("children", []))

    collect(json.loads(lines)["lscpu"])
    here = describe()
    flags = fields["Flags"].split()
    assert ("avx2" in here.simd) == ("avx2" in flags)
    assert ("avx512_vnni" in here.simd) == ("avx512_vnni" in flags)
    assert here.cpu == fields.get("Model name", here.cpu)
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert here.ram_bytes == pages


def test_the_dictionary_is_json_and_the_line_names_what_matters():
    here = describe()
    assert json.loads(json.dumps(here.as_dict())) == here.as_dict()
    assert torch.__version__ in here.line
    assert "\n" not in here.line
    assert {"key", "line", "simd", "extras"} <= set(here.as_dict())


def test_the_key_does_not_depend_on_threads_or_affinity():
    code = (
        "import torch; torch.set_num_threads(1);"
        "from dlhelpers import machine; print(machine.describe().key)"
    )
    assert (
        subprocess.check_output([sys.executable, "-c", code], text=True).strip() == describe().key
    )


def test_a_system_that_tells_nothing_is_described_all_the_same(monkeypatch):
    monkeypatch.setattr(machine, "_read", lambda path: "")
    monkeypatch.setattr(machine, "_cache_bytes", dict)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    bare = describe.__wrapped__()
    assert bare.simd == ()
    assert bare.llc_bytes == 32 * 2**20
    assert "unknown" in str(bare)
    assert "torch.compile needs one" in bare._repr_html_()


def test_an_extra_that_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(machine, "EXTRAS", {"dali": ("no-such-package-anywhere",)})
    bare = describe.__wrapped__()
    assert bare.extras == {"dali": {"no-such-package-anywhere": None}}
    assert "no-such-package-anywhere" in str(bare)


def test_the_roofline_is_kept_for_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("dlhelpers.roofline.cache_dir", lambda: tmp_path)
    measured = []

    def bandwidth():
        measured.append(1)
        return 40.0

    monkeypatch.setattr(PEAKS, "_bandwidth_gb_s", bandwidth)
    monkeypatch.setattr(PEAKS, "_is_loaded", lambda: False)
    monkeypatch.setattr(
        PEAKS, "_matmul_gflops", lambda: {"fp32": 160.0, "bf16": None, "int8": 700.0}
    )
    first = roofline()
    assert roofline() == first
    assert len(measured) == 1
    roofline(refresh=True)
    assert len(measured) == 2
    assert first.ridge_flop_per_byte == pytest.approx(4.0)
    assert "not available" in str(first)
    (kept,) = tmp_path.iterdir()
    kept.write_text("{broken")
    assert roofline() == first


def test_peaks_are_counted_operations_over_seconds(monkeypatch):
    monkeypatch.setattr(PEAKS, "_best_seconds", lambda function, budget_s: 0.5)
    peaks = PEAKS._matmul_gflops()
    assert peaks["fp32"] == pytest.approx(2 * 2048**3 / 0.5 / 1e9)  # the larger product's rate
    sizes = []
    monkeypatch.setattr(torch, "add", lambda a, b, out: sizes.append((a, b, out)))
    monkeypatch.setattr(PEAKS, "_best_seconds", lambda function, budget_s: (function(), 0.5)[1])
    bandwidth = PEAKS._bandwidth_gb_s()
    moved = sum(array.nbytes for array in sizes[0])
    assert bandwidth == pytest.approx(moved / 0.5 / 1e9)
    assert moved >= min(4 * describe().llc_bytes, (describe().ram_bytes or 4 << 30) // 8) - 12


def test_peaks_only_grow_and_are_not_kept_from_a_loaded_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("dlhelpers.roofline.cache_dir", lambda: tmp_path)
    rates = iter([40.0, 30.0, 20.0])
    monkeypatch.setattr(PEAKS, "_bandwidth_gb_s", lambda: next(rates))
    monkeypatch.setattr(PEAKS, "_matmul_gflops", lambda: {"fp32": 1.0, "int8": None})
    monkeypatch.setattr(PEAKS, "_is_loaded", lambda: True)
    assert roofline().bandwidth_gb_s == 40.0
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(PEAKS, "_is_loaded", lambda: False)
    assert roofline().bandwidth_gb_s == 30.0
    assert roofline(refresh=True).bandwidth_gb_s == 30.0
    assert roofline().gflops == {"fp32": 1.0, "int8": None}


def test_a_rate_carries_its_unit():
    text = str(Roofline(40.0, {"fp32": 160.0, "int8": 700.0}, 2))
    for unit in ("GB/s", "GFLOP/s", "GOP/s", "FLOP/byte"):
        assert unit in text
    assert math.isfinite(Roofline(40.0, {"fp32": None}, 2).ridge_flop_per_byte)


def test_measuring_peaks_leaves_the_callers_random_state(monkeypatch):
    monkeypatch.setattr(PEAKS, "_best_seconds", lambda function, budget_s: 0.5)
    before = torch.get_rng_state()
    PEAKS._matmul_gflops()
    PEAKS._bandwidth_gb_s()
    assert torch.equal(torch.get_rng_state(), before)


CPUINFO = """processor\t: {n}
model name\t: Some CPU @ 2 GHz
physical id\t: {package}
core id\t: {core}
flags\t\t: fpu avx2 avx512f amx_tile amx_int8 avx_vnni
"""


def test_two_threads_of_one_core_are_one_physical_core(monkeypatch):
    places = [(0, 0), (0, 1), (1, 0), (1, 1)] * 2  # two packages of two cores of two threads
    text = "\n".join(
        CPUINFO.format(n=n, package=package, core=core) for n, (package, core) in enumerate(places)
    )
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine, "_read", lambda path: text)
    assert machine._physical_cores() == 4
    assert machine._cpu_name() == "Some CPU @ 2 GHz"
    assert describe.__wrapped__().simd == ("avx2", "avx512", "avx_vnni", "amx", "amx_int8")


def test_arm_features_have_their_names(monkeypatch):
    monkeypatch.setattr(machine.sys, "platform", "linux")
    text = "processor : 0\nFeatures : fp asimd asimddp sve i8mm bf16\n"
    monkeypatch.setattr(machine, "_read", lambda path: text)
    assert describe.__wrapped__().simd == ("neon", "neon_dotprod", "sve", "i8mm", "neon_bf16")


def test_a_mac_is_described_through_sysctl(monkeypatch):
    answers = {
        "machdep.cpu.brand_string": "Apple M9",
        "hw.memsize": str(16 << 30),
        "hw.physicalcpu": "8",
        "hw.l2cachesize": str(4 << 20),
        "hw.l3cachesize": "0",  # what a Mac without one says
        "hw.optional.arm.FEAT_BF16": "1",
    }
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(machine, "_sysctl", lambda name: answers.get(name, ""))
    mac = describe.__wrapped__()
    assert (mac.cpu, mac.ram_bytes, mac.physical_cores) == ("Apple M9", 16 << 30, 8)
    assert mac.cache_bytes == {"L2": 4 << 20}
    assert mac.llc_bytes == 4 << 20
    assert mac.simd == ("neon", "neon_bf16")


def test_caches_are_read_from_the_system(tmp_path, monkeypatch):
    facts = [
        ("Data", "1", "48K"),
        ("Instruction", "1", "32K"),
        ("Unified", "3", "36M"),
        ("", "", ""),
    ]
    for index, (kind, level, size) in enumerate(facts):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine, "_SYSFS_CACHE", str(tmp_path))
    assert machine._cache_bytes() == {"L1d": 48 << 10, "L3": 36 << 20}


def test_a_processor_without_an_int8_product_has_none_and_says_so(monkeypatch):
    def missing(*arguments):
        raise NotImplementedError("no int8 here")

    monkeypatch.setattr(PEAKS, "_best_seconds", lambda function, budget_s: (function(), 0.5)[1])
    monkeypatch.setattr(torch, "_int_mm", missing)
    peaks = PEAKS._matmul_gflops()
    assert peaks["int8"] is None
    assert "int8 matrix product  not available" in str(Roofline(40.0, peaks, 2))


def test_the_key_is_of_the_machine_described_and_not_of_this_one():
    here = describe()
    assert dataclasses.replace(here, logical_cores=here.logical_cores + 1).key != here.key
    assert dataclasses.replace(here, torch="9.9", cores=here.cores + 1).key == here.key


def test_describing_imports_no_extra():
    names = ("onnx", "openvino", "torchao", "cv2", "nvidia.dali", "torchcodec")
    code = (
        "import sys, torch; before = set(sys.modules);"
        "from dlhelpers import machine; machine.describe();"
        f"print(sorted((set(sys.modules) - before) & set({names!r})))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
