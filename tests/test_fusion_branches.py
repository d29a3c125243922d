"""Fusion of models whose forward branches: every branch counts, and so does the next call."""

import copy

import pytest
import torch
from test_fusion import conv, image, lived, norm
from torch import nn
from torch.nn import functional as F

from dlhelpers.fusion import fuse_conv_bn
from dlhelpers.trees import tensors_in


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Pair(nn.Module):
    """A convolution and its norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.calls = conv(), norm(), 0

    def both(self, x):
        return self.norm(self.conv(x))


class ByValues(Pair):
    def forward(self, x):
        return self.both(x + 1 if x.sum() > 0 else x)


class ByFlag(Pair):
    def forward(self, x, features=False):
        y = self.both(x)
        if features:
            return y, y.mean((2, 3))
        return y.mean((2, 3))


class ByText(Pair):
    def forward(self, x, mode="full", scale=1.0, extra=None, flag=True):
        if mode not in ("full", "half"):
            raise ValueError(mode)
        y = self.both(x)
        if flag and extra is not None:
            y = y + extra
        return y * scale if mode == "full" else y / 2


class BySize(Pair):
    def forward(self, x):
        if x.ndim != 4:
            raise AssertionError("images wanted")
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            x = F.pad(x, (0, width % 2, 0, height % 2))
        return self.both(x) * max(height, width)


class Checks(Pair):
    def forward(self, x):
        y = self.both(x)
        if torch.isnan(y).any():
            raise RuntimeError("NaN")
        return y


class CountsCalls(Pair):
    def forward(self, x):
        self.calls += 1
        return self.both(x)


class Cloned(Pair):
    def forward(self, x):
        return self.norm(torch.clone(self.conv(x).clone()))


class Slices(Pair):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(self.conv, self.norm, nn.ReLU(), conv())

    def forward(self, x):
        y = self.features[:2](x)
        return y, self.features[2:](y), nn.Sequential(*self.features.children())(x)


class Operator(Pair):
    def forward(self, x):
        n = self.norm
        tensors = n.weight, n.bias, n.running_mean, n.running_var
        return torch.batch_norm(self.conv(x), *tensors, False, 0.1, n.eps, True)


GOES = [ByValues, ByFlag, ByText, BySize, Checks, CountsCalls, Cloned, Slices, Operator]


@pytest.mark.parametrize("kind", GOES)
def test_a_pair_that_is_whole_on_every_branch_is_folded(kind):
    model = lived(kind()).eval()
    fused, report = fuse_conv_bn(model, image(4))
    assert (report.folded, report.found) == (1, 1), report
    exact, folded = copy.deepcopy(model).double(), copy.deepcopy(fused).double()
    for x in (image(4).double(), -image(4).double() - 5):
        with torch.no_grad():
            pairs = zip(tensors_in(exact(x)), tensors_in(folded(x)), strict=True)
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


# ---- one branch, or a later call, uses the convolution alone ----


class RawIfNegative(Pair):
    def forward(self, x):
        return self.both(x) if x.sum() > 0 else self.conv(x)


class RawIfTrue(Pair):
    def forward(self, x, raw=False):
        return self.conv(x) if raw is True else self.both(x)


class RawByText(Pair):
    def forward(self, x, mode="full"):
        return self.conv(x) if mode == "raw" else self.both(x)


class RawNextTime(Pair):
    def forward(self, x):
        if self.calls:
            return self.conv(x)
        self.calls = 1
        return self.both(x)


class RawAfterANegative(Pair):
    def forward(self, x):
        if self.calls:
            return self.conv(x)
        if x.sum() < 0:
            self.calls = 1
        return self.both(x)


class RawWhereCaught(Pair):
    def forward(self, x):
        try:
            if x.sum() < 0:
                raise ValueError("negative")
            return self.both(x)
        except ValueError:
            return self.conv(x)


class RawSlice(Slices):
    def forward(self, x):
        return self.features[:1](x), self.features(x)


STAYS = [RawIfNegative, RawIfTrue, RawByText, RawNextTime, RawAfterANegative, RawWhereCaught]


@pytest.mark.parametrize("kind", [*STAYS, RawSlice])
def test_a_convolution_that_is_used_alone_on_a_branch_or_later_stays(kind):
    model = lived(kind()).eval()
    before = dict(vars(model))
    _, report = fuse_conv_bn(model, image(4).abs(), verify=False)
    assert report.folded == 0
    assert "is called again without it" in next(iter(report.left.values()))
    assert vars(model) == before


class Loops(Pair):
    def forward(self, x):
        while not x.abs().max() < 1:
            x = x / 2
        return self.both(x)


class Walks(Pair):
    """Hides from a trace that the other way was taken: over what has no length it gives up."""

    def forward(self, x):
        try:
            for one in x:
                return self.both(one[None])
        except Exception:
            return self.conv(x)


@pytest.mark.parametrize("kind", [Loops, Walks])
def test_what_goes_on_without_end_is_not_traced(kind):
    _, report = fuse_conv_bn(lived(kind()), image(4), verify=False)
    assert "cannot be traced" in report.left["norm"]


def test_too_many_branches_are_entered_part_by_part():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Sequential(conv(), norm()) for _ in range(20)])

        def forward(self, x):
            for part in self.parts:
                if x.mean() < 1:
                    x = part(x)
            return x

    _, report = fuse_conv_bn(lived(Many()), image(4))
    assert (report.folded, report.found) == (20, 20)


# ---- norms that look at their input ----


class Statistics(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.eps = 1e-5
        self.register_buffer("weight", torch.rand(channels) + 0.5)
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def scale_and_shift(self):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


class AnyDimensions(Statistics):
    def forward(self, x):
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale, shift = self.scale_and_shift()
        return x * scale.view(shape) + shift.view(*shape)


class FourDimensions(Statistics):
    def forward(self, x):
        if x.ndim != 4:
            raise ValueError(f"images wanted, got {x.ndim} dimensions")
        scale, shift = self.scale_and_shift()
        return x * scale[:, None, None] + shift[:, None, None]


class OnTheDevice(Statistics):
    def forward(self, x):
        scale, shift = self.scale_and_shift()
        return scale[:, None, None].to(x) * x + shift[:, None, None].to(x.device, x.dtype)


class ByTheOperator(Statistics):
    def forward(self, x):
        tensors = self.weight, self.bias, self.running_mean, self.running_var
        return torch.batch_norm(x, *tensors, False, 0.1, self.eps, False)


@pytest.mark.parametrize("kind", [AnyDimensions, FourDimensions, OnTheDevice, ByTheOperator])
@pytest.mark.parametrize("dimensions", [2, 1, 3])
def test_a_norm_that_looks_at_its_input_is_folded(kind, dimensions):
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](4, 4, 3)
    x = torch.randn(2, 4, *[6] * dimensions)
    if dimensions != 2 and kind in (FourDimensions, OnTheDevice):
        return  # these are for images
    model = nn.Sequential(layer, kind(), nn.ReLU()).eval()
    fused, report = fuse_conv_bn(model, x)
    assert (report.folded, report.found) == (1, 1), report
    assert report.algebra_error < 1e-12
    assert isinstance(fused[1], nn.Identity)


def test_a_norm_that_cannot_be_read_is_counted_and_named():
    class Clipped(Statistics):
        def forward(self, x):
            scale, shift = self.scale_and_shift()
            return (x * scale[:, None, None]).clamp(-3, 3) + shift[:, None, None] * x.mean()

    _, report = fuse_conv_bn(nn.Sequential(conv(), Clipped()), image(4))
    assert report.found == 1
    assert report.left["1"].startswith("Clipped has a forward of its own")
