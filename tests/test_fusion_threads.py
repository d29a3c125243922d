"""Fusion beside other threads, and where no gradients are kept."""

import sys
import threading

import pytest
import torch
from test_fusion import conv, image, lived, norm
from torch import nn

from dlhelpers.fusion import fuse_conv_bn


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Scaled(nn.Module):
    """Its parameter is read in the forward: a trace puts a proxy in its place."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.scale = conv(), norm(), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.norm(self.conv(x)) * self.scale


@pytest.fixture
def _hasty():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_hasty")
def test_other_threads_see_no_trace():
    served, x = lived(Scaled()).eval(), image(4)
    with torch.inference_mode():
        wanted = served(x)
    stops, faults, runs = threading.Event(), [], 0

    def serve():
        nonlocal runs
        while not stops.is_set():
            try:
                with torch.inference_mode():
                    if not torch.equal(served(x), wanted):
                        faults.append("another number")
            except Exception as fault:
                faults.append(repr(fault))
            runs += 1

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(3):
            _, report = fuse_conv_bn(lived(nn.Sequential(*[Scaled() for _ in range(4)])))
    finally:
        stops.set()
        thread.join()
    assert report.folded == 4
    assert runs > 10
    assert faults == []


@pytest.mark.usefixtures("_hasty")
def test_fusions_at_once_leave_nothing_behind():
    before = nn.Module.__call__, nn.Module.__getattr__
    reports, model = [], lived(nn.Sequential(*[Scaled() for _ in range(4)]))
    threads = [
        threading.Thread(target=lambda: reports.append(fuse_conv_bn(model)[1])) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.folded for report in reports] == [4, 4, 4]
    assert (nn.Module.__call__, nn.Module.__getattr__) == before


def test_inference_mode_inside_and_outside():
    model, x = lived(nn.Sequential(conv(), norm(), nn.ReLU(), conv())).eval(), image(4)
    with torch.inference_mode():
        built, made = lived(nn.Sequential(conv(), norm())).eval(), image(4)
        inside = [fuse_conv_bn(model, x), fuse_conv_bn(built, made), fuse_conv_bn(built)]
    outside = [fuse_conv_bn(built, made), fuse_conv_bn(model, made)]
    for fused, report in (*inside, *outside):
        assert (report.folded, report.found) == (1, 1)
        assert not any(tensor.is_inference() for tensor in fused.parameters())
        fused(x).sum().backward()  # an ordinary model, which can be trained
