"""What many functions share: checks of arguments, files that appear whole, bars."""

import functools
import sys

import numpy as np
import pytest
import torch
from torch import nn

from dlhelpers.arguments import (
    model_inputs,
    need_callable,
    need_seconds,
    shard_of,
    whole_number,
)
from dlhelpers.files import write_whole
from dlhelpers.fusion import fuse_conv_bn
from dlhelpers.memory import estimate
from dlhelpers.pairing.probe import run_model
from dlhelpers.progress import bar
from dlhelpers.roofline import Roofline
from dlhelpers.shufflenet import layer_costs


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_a_whole_number_comes_back_as_an_int(value):
    found = whole_number("steps", value, 1)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize("value", [True, 2.0, "3", None, 0, -1, 2**63])
def test_what_is_none_is_named(value):
    with pytest.raises(ValueError, match=r"^steps must be a whole number, 1 or more, got "):
        whole_number("steps", value, 1)


def test_a_range_has_both_its_ends():
    assert [whole_number("q", value, 1, 95) for value in (1, 95)] == [1, 95]
    with pytest.raises(ValueError, match="q must be a whole number from 1 to 95, got 96"):
        whole_number("q", 96, 1, 95)


def test_a_shard_is_a_rank_below_the_number_of_processes():
    assert shard_of([np.int64(1), 2]) == (1, 2)
    for wrong in ((2, 2), (0,), (0, 1, 2), 1, (0, True), (-1, 2), ("0", "2")):
        with pytest.raises(ValueError, match=r"0 <= rank < world, got "):
            shard_of(wrong)


def lazy(n=1):
    yield n


async def later():
    return 1


async def stream():
    yield 1


class Begins:
    def __call__(self):
        yield 1


@pytest.mark.parametrize(
    ("fn", "mend"),
    [
        (lazy, r"lazy only begins it: write lambda: list\(fn\(\)\)"),
        (functools.partial(lazy, 3), r"lazy only begins it: write lambda: list\(fn\(\)\)"),
        (Begins(), r"write lambda: list\(fn\(\)\)"),
        (later, r"write lambda: asyncio.run\(fn\(\)\)"),
        (stream, r"asyncio.run\(...\) of what goes through fn\(\)"),
        (3, r"got int: write lambda: train\(model\)"),
    ],
)
def test_what_does_no_work_when_it_is_called_is_refused(fn, mend):
    with pytest.raises(TypeError, match=mend):
        need_callable(fn)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    def half(name):
        with open(name, "w") as file:
            file.write("half")
        raise OSError("no space left")

    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, (".txt",), half)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]
    with pytest.raises(ValueError, match=r"path must end in .html or .txt, got 'a.md'"):
        write_whole(tmp_path / "a.md", (".html", ".txt"), half)
    with pytest.raises(FileNotFoundError, match="make it first"):
        write_whole(tmp_path / "none" / "a", (), half)


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [(True, False, True), (False, True, False), (None, True, True), (None, False, False)],
)
def test_a_bar_is_shown_where_somebody_looks_or_asks(progress, terminal, shown, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with bar(range(3), progress=progress) as moved:
        assert moved.disable is not shown
        assert list(moved) == [0, 1, 2]


PEAKS = Roofline(10.0, {"fp32": 100.0}, 1)


class Summed(nn.Module):
    """Two inputs, one with a name."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, image, other):
        return (self.bn(self.conv(image)) - other.mean()).mean((2, 3))


def _costs(model, inputs):
    return str(layer_costs(model, inputs, peaks=PEAKS))


def _folded(model, inputs):
    fused, report = fuse_conv_bn(model, inputs)
    return report.folded, report.max_rel_error, run_model(fused, inputs).tolist()


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(_costs, id="layer_costs"),
        pytest.param(_folded, id="fuse_conv_bn"),
        pytest.param(lambda m, x: str(estimate(m, x, torch.optim.SGD)), id="estimate"),
        pytest.param(lambda m, x: run_model(m.eval(), x).tolist(), id="run_model"),
    ],
)
def test_keyword_arguments_are_worth_as_much_as_positional_ones(use):
    torch.manual_seed(0)
    image, other = torch.rand(2, 2, 3, 8, 8)
    model = Summed()
    by_place = use(model, (image, other))
    assert by_place == use(model, {"other": other, "image": image})
    assert by_place != use(model, (image[:1], other[:1]))


def test_a_list_is_one_argument_but_for_a_batch_of_a_loader():
    images = [torch.rand(3, 8, 8), torch.rand(3, 8, 8)]
    (only,), kwargs = model_inputs(images)
    assert only is images
    assert kwargs == {}
    assert run_model(lambda one, two: one + two, images).shape == (3, 8, 8)


def test_a_packed_sequence_is_one_argument_and_a_mapping_may_be():
    packed = nn.utils.rnn.pack_sequence([torch.rand(3, 4), torch.rand(2, 4)])
    assert model_inputs(packed) == ((packed,), {})
    assert run_model(nn.LSTM(4, 5), packed)[0].data.shape == (5, 5)

    class OfMapping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, batch):
            return self.layer(batch["x"])

    costs = layer_costs(OfMapping(), ({"x": torch.rand(2, 4)},), peaks=PEAKS)
    assert costs.multiply_adds == 2 * 4 * 3


@pytest.mark.parametrize("budget_s", [0, -1, float("inf"), float("nan"), "2", None])
@pytest.mark.parametrize("run", ["compare", "overhead", "quantize_static", "quantize_dynamic"])
def test_a_budget_that_is_no_time_is_refused_before_anything_runs(run, budget_s):
    from dlhelpers.measure import compare
    from dlhelpers.profiling import overhead
    from dlhelpers.quantization import quantize_dynamic, quantize_static

    called = []

    class Model(nn.Linear):
        def forward(self, x):
            called.append(1)
            return super().forward(x)

    model, x = Model(4, 4), torch.ones(2, 4)
    measured = {
        "compare": lambda: compare(lambda: model(x), lambda: model(x), budget_s=budget_s),
        "overhead": lambda: overhead(lambda: model(x), budget_s=budget_s),
        "quantize_static": lambda: quantize_static(model, [x], budget_s=budget_s),
        "quantize_dynamic": lambda: quantize_dynamic(model, x, budget_s=budget_s),
    }
    with pytest.raises(ValueError, match="budget_s must be a positive number of seconds, got"):
        measured[run]()
    assert called == []


def test_a_budget_may_be_a_number_of_numpys():
    need_seconds("budget_s", np.float32(0.2))
