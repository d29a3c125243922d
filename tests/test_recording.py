"""What a program writes to file descriptor 2 is its own business, above all when it crashes."""

import os

import fresh
import pytest
import torch
from torch import nn

from dlhelpers.memory import measure_peak
from dlhelpers.profiling import profile_torch
from dlhelpers.quantization import quantize_dynamic

pytestmark = pytest.mark.usefixtures("little_to_collect")

CRASH = """
import faulthandler, os, torch
from dlhelpers.memory import measure_peak
from dlhelpers.profiling import profile_torch
faulthandler.enable()
def crash_here():
    torch.ones(3) + 1
    if torch._C._autograd._profiler_enabled():  # profile_torch calls it without, first
        os.abort()
"""


@pytest.mark.parametrize(
    "record", [measure_peak, pytest.param(profile_torch, marks=pytest.mark.slow)]
)
def test_a_crash_inside_a_recording_tells_where_it_was(record):
    code = f"{CRASH}{record.__name__}(crash_here)"
    done = fresh.run(code)
    assert done.returncode != 0
    assert "Fatal Python error: Aborted" in done.stderr
    assert "in crash_here" in done.stderr


class Writes(nn.Linear):
    """A layer that writes to descriptor 2 and notes what could be read of it at once."""

    read = None

    def forward(self, x):
        os.write(2, b"straight to the descriptor")
        try:
            said = os.read(Writes.read, 1 << 16)
        except BlockingIOError:
            said = b"not there"
        os.write(Writes.log, said + b"\0")  # what a class holds is put back
        return super().forward(x)


@pytest.mark.parametrize(
    "run",
    [
        lambda model, x: measure_peak(lambda: model(x)),
        lambda model, x: profile_torch(lambda: model(x), steps=1, warmup=0),
        lambda model, x: quantize_dynamic(
            nn.Sequential(nn.Linear(8, 8), model), x, budget_s=0.05, progress=False
        ),
    ],
    ids=["measure_peak", "profile_torch", "quantize_dynamic"],
)
def test_descriptor_2_stays_the_callers(run, tmp_path):
    kept = os.dup(2)
    Writes.log = os.open(tmp_path / "seen", os.O_CREAT | os.O_WRONLY)
    Writes.read, writing = os.pipe()
    os.set_blocking(Writes.read, False)
    os.dup2(writing, 2)
    os.close(writing)
    try:
        run(Writes(8, 8), torch.ones(2, 8))
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(Writes.read)
        os.close(Writes.log)
    seen = (tmp_path / "seen").read_bytes().split(b"\0")[:-1]
    assert seen
    assert all(said.endswith(b"straight to the descriptor") for said in seen)


def test_descriptor_2_is_the_callers_while_the_profiler_starts_and_stops(monkeypatch):
    seen, before = [], os.fstat(2)

    class Profile(torch.profiler.profile):
        def start(self):
            seen.append(os.fstat(2))
            super().start()

        def stop(self):
            seen.append(os.fstat(2))
            super().stop()

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    measure_peak(lambda: torch.ones(3) + 1)
    assert len(seen) >= 2
    assert all(os.path.samestat(before, one) for one in seen)
