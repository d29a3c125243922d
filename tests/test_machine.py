import dataclasses
import importlib
import json
import math
import os
import platform
import shutil
import subprocess

import fresh
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
    is_capped = here.torch_capability in ("DEFAULT", "AVX2")
    assert ("avx512_vnni" in here.simd) == ("avx512_vnni" in flags and not is_capped)
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
    assert fresh.run(code).stdout.strip() == describe().key


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


@pytest.fixture
def peaks_of(tmp_path, monkeypatch):
    """Give roofline() rates of a quiet or a loaded machine; count how often it measures."""
    monkeypatch.setattr("dlhelpers.roofline.cache_dir", lambda: tmp_path)
    monkeypatch.setattr(PEAKS, "_others_s", lambda: 0.0)
    measured = []

    def call(bandwidth, peaks, *, is_loaded=False, **options):
        monkeypatch.setattr(PEAKS, "_is_loaded", lambda: is_loaded)
        monkeypatch.setattr(PEAKS, "_bandwidth_gb_s", lambda end: measured.append(1) or bandwidth)
        monkeypatch.setattr(PEAKS, "_matmul_gflops", lambda end: peaks)
        return roofline(**options)

    call.measured = measured
    return call


def test_the_roofline_is_kept_for_the_machine(tmp_path, peaks_of):
    given = 40.0, {"fp32": 160.0, "bf16": None, "int8": 700.0}
    first = peaks_of(*given)
    assert peaks_of(*given) == first
    assert len(peaks_of.measured) == 1
    peaks_of(*given, refresh=True)
    assert len(peaks_of.measured) == 2
    assert first.ridge_flop_per_byte == pytest.approx(4.0)
    assert "not available" in str(first)
    (kept,) = tmp_path.iterdir()
    kept.write_text("{broken")
    assert peaks_of(*given) == first


def test_peaks_of_a_loaded_machine_are_kept_and_marked_until_it_is_quiet(peaks_of):
    loaded = peaks_of(40.0, {"fp32": 90.0, "int8": None}, is_loaded=True)
    assert loaded.loaded
    assert "other processes were busy" in str(loaded)
    assert "other processes were busy" in loaded._repr_html_()
    assert peaks_of(99.0, {}, is_loaded=True) == loaded  # a second process does not pay again
    assert len(peaks_of.measured) == 1
    quiet = peaks_of(30.0, {"fp32": 160.0, "int8": 700.0})
    assert quiet == Roofline(40.0, {"fp32": 160.0, "int8": 700.0}, torch.get_num_threads())
    assert "busy" not in str(quiet)
    assert peaks_of(99.0, {}) == peaks_of(99.0, {}, is_loaded=True) == quiet
    assert len(peaks_of.measured) == 2
    assert peaks_of(20.0, {"fp32": 1.0}, is_loaded=True, refresh=True) == quiet


def test_who_began_a_second_ago_is_noticed_while_measuring(peaks_of, monkeypatch):
    cores, seconds = describe().cores, iter([0.0, 1e9])
    monkeypatch.setattr(PEAKS, "_others_s", lambda: next(seconds))
    assert peaks_of(40.0, {"fp32": 1.0}).loaded
    now = iter([0.0, 2.0])
    monkeypatch.setattr(PEAKS, "_clock", lambda: next(now))
    seconds = iter([5.0, 5.0 + 0.2 * 2.0 * cores])
    assert not peaks_of(40.0, {"fp32": 1.0}).loaded


def test_a_cache_from_before_the_mark_opens_as_quiet(tmp_path, peaks_of):
    peaks_of(40.0, {"fp32": 160.0})
    (kept,) = tmp_path.iterdir()
    kept.write_text('{"bandwidth_gb_s": 7.0, "gflops": {"fp32": 9.0}, "threads": 2}')
    assert peaks_of(40.0, {"fp32": 160.0}) == Roofline(7.0, {"fp32": 9.0}, 2)


def test_peaks_are_counted_operations_over_seconds(monkeypatch):
    monkeypatch.setattr(PEAKS, "_best_seconds", lambda function, until, grown=0: 0.5)
    peaks = PEAKS._matmul_gflops(PEAKS._clock() + 1e6)
    assert peaks["fp32"] == pytest.approx(2 * 2048**3 / 0.5 / 1e9)  # the larger product's rate
    sizes = []
    monkeypatch.setattr(torch, "add", lambda a, b, out: sizes.append((a, b, out)))
    best = lambda function, until, grown=0: (function(), 0.5)[1]  # noqa: E731
    monkeypatch.setattr(PEAKS, "_best_seconds", best)
    bandwidth = PEAKS._bandwidth_gb_s(PEAKS._clock() + 1e6)
    moved = sum(array.nbytes for array in sizes[-1])
    assert bandwidth == pytest.approx(moved / 0.5 / 1e9)
    assert moved >= min(4 * describe().llc_bytes, (describe().ram_bytes or 4 << 30) // 8) - 12


@pytest.fixture
def products(monkeypatch):
    """Let products and arrays take seconds of a fake clock, by type and size, and run none."""

    class Clock:
        def __init__(self):
            self.now, self.calls = 1000.0, []

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(PEAKS, "_clock", clock)
    monkeypatch.setattr(PEAKS, "_others_s", lambda: 0.0)
    monkeypatch.setattr(PEAKS, "_is_loaded", lambda: False)

    def take(seconds, first=1.0):
        """seconds: type's name, n -> seconds of a product; a type's first call takes more."""

        def gflops(end):
            found = {}
            for i, name in enumerate(("fp32", "bf16", "int8")):

                def product(n, name=name):
                    def multiply():
                        is_first = name not in {known for known, _ in clock.calls}
                        clock.now += seconds(name, n) * (first if is_first else 1.0)
                        clock.calls.append((name, n))

                    return multiply

                until = clock.now + (end - clock.now) / (4 - i)
                found[name] = PEAKS._product_gflops(product, until, 8 if name == "fp32" else 24)
            return found

        begin = clock.now
        peaks = gflops(begin + PEAKS._BUDGET_S)
        return peaks, clock.now - begin, dict(clock.calls)

    return take


def _fast(name, n):
    return 2 * n**3 / 150e9


def _without_kernels(name, n):  # as reference kernels on AVX2: worse once out of the caches
    return _fast(name, n) if name == "fp32" else 2 * n**3 / 1e9 * (1 if n < 1024 else 3)


@pytest.mark.parametrize(
    ("seconds", "first", "largest"),
    [
        pytest.param(_fast, 1, {"fp32": 2048, "bf16": 2048, "int8": 2048}, id="fast"),
        pytest.param(_without_kernels, 1, {"fp32": 2048, "bf16": 256, "int8": 256}, id="no kernel"),
        pytest.param(
            lambda name, n: 2 * n**3 / 0.15e9, 1, dict.fromkeys(("fp32", "bf16", "int8"), 256),
            id="1000 times slower",
        ),
        pytest.param(_fast, 100, {"fp32": 2048, "bf16": 2048, "int8": 2048}, id="slow first call"),
        pytest.param(
            _without_kernels, 30, {"fp32": 2048, "bf16": 256, "int8": 256}, id="both",
        ),
    ],
)  # fmt: skip
def test_no_type_takes_more_than_its_share(products, seconds, first, largest):
    peaks, took, last = products(seconds, first)
    assert took < 2.5
    assert last == largest
    for name, n in largest.items():
        rate = 2 * n**3 / seconds(name, n) / 1e9
        assert rate / first * 0.99 < peaks[name] < rate * 1.01  # a first call may be the only one


def test_arrays_grow_only_as_far_as_the_time_goes(monkeypatch):
    sizes, now = [], [0.0]

    def add(a, b, out):
        sizes.append(len(a))
        now[0] += 0.4  # as the first touch of pages on a busy machine

    monkeypatch.setattr(torch, "add", add)
    monkeypatch.setattr(PEAKS, "_clock", lambda: now[0])
    assert PEAKS._bandwidth_gb_s(0.5) == pytest.approx(12 * sizes[0] / 0.4 / 1e9)
    assert now[0] == pytest.approx(0.8)
    assert len(set(sizes)) == 1


def test_a_rate_carries_its_unit():
    text = str(Roofline(40.0, {"fp32": 160.0, "int8": 700.0}, 2))
    for unit in ("GB/s", "GFLOP/s", "GOP/s", "FLOP/byte"):
        assert unit in text
    assert math.isfinite(Roofline(40.0, {"fp32": None}, 2).ridge_flop_per_byte)


def test_measuring_peaks_leaves_the_callers_random_state(monkeypatch):
    monkeypatch.setattr(PEAKS, "_best_seconds", lambda function, until, grown=0: 0.5)
    before = torch.get_rng_state()
    PEAKS._matmul_gflops(0.0)
    PEAKS._bandwidth_gb_s(0.0)
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
    facts = {"torch": "2", "cuda_devices": ()}
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(machine, "_torch_facts", lambda: facts | {"torch_capability": "AVX512"})
    assert describe.__wrapped__().simd == ("avx2", "avx512", "avx_vnni", "amx", "amx_int8")
    monkeypatch.setattr(machine, "_torch_facts", lambda: facts | {"torch_capability": "AVX2"})
    assert describe.__wrapped__().simd == ("avx2", "avx_vnni")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert describe.__wrapped__().simd == ("avx2",)


@pytest.mark.parametrize(
    ("cap", "left"),
    [
        ("", ["avx2", "avx512", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16"]),
        (
            "AVX512_CORE_AMX",
            ["avx2", "avx512", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16"],
        ),
        ("AVX512_CORE_BF16", ["avx2", "avx512", "avx512_vnni", "avx512_bf16", "avx_vnni"]),
        ("avx512_core_vnni", ["avx2", "avx512", "avx512_vnni", "avx_vnni"]),
        ("AVX512_CORE", ["avx2", "avx512"]),
        ("AVX2_VNNI", ["avx2", "avx_vnni"]),
        ("AVX2", ["avx2"]),
        ("SSE41", []),
    ],
)
def test_what_onednn_may_not_use_is_no_instruction_set_of_this_machine(monkeypatch, cap, left):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    every = ["avx2", "avx512", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16"]
    assert list(machine._allowed(every, "AVX512")) == left


def test_peaks_are_the_cpus_in_float32_whatever_the_program_has_set(monkeypatch, tmp_path):
    seen = []

    def product(a, b):
        seen.append((a.device.type, a.dtype, torch.is_autocast_enabled("cpu")))
        return a

    monkeypatch.setattr(PEAKS, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(PEAKS, "_bandwidth_gb_s", lambda end: 1.0)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu"):
            roofline(refresh=True)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert {one for one in seen if one[1] != torch.bfloat16} == {("cpu", torch.float32, False)}


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

    monkeypatch.setattr(torch, "_int_mm", missing)
    peaks = PEAKS._matmul_gflops(0.0)
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
    assert fresh.run(code).stdout.strip() == "[]"
