import dataclasses
from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from dlhelpers.fakes import fake_of
from dlhelpers.tables import duration, figures, html_table, text_table
from dlhelpers.trees import tensors_in


@dataclasses.dataclass
class Answer:
    logits: object
    loss: object = None


Pair = namedtuple("Pair", "left right")


def test_tensors_are_found_in_whatever_holds_them_and_in_order():
    a, b, c, d, e = (torch.tensor(i) for i in range(5))
    value = [a, (b, {"x": Answer(OrderedDict(y=c), d), "z": "text"}), Pair(None, e), Answer]
    assert [int(tensor) for tensor in tensors_in(value)] == [0, 1, 2, 3, 4]
    assert list(tensors_in(3)) == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_fake_is_like_the_tensor_and_of_a_device_that_has_operators(device):
    real = torch.empty(3, 4, 5, dtype=torch.float16, device=device).permute(2, 0, 1)
    fake = fake_of(FakeTensorMode(), real)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert fake.device.type == "cpu"


def test_tables_align_and_escape():
    head, rows = ("name", "n"), [["a<b", "10"], ["c", "2"]]
    assert text_table(head, rows, names=1).splitlines() == ["name   n", "a<b   10", "c      2"]
    assert text_table(head, rows).splitlines()[1] == " a<b  10"
    page = html_table(head, rows, names=1)
    assert "<td style='text-align:left'>a&lt;b</td><td>10</td>" in page
    assert page.count("<tr>") == 3


@given(st.floats(1e-9, 1e5), st.integers(1, 4))
def test_a_duration_is_within_its_digits_and_in_the_largest_unit(seconds, digits):
    number, unit = duration(seconds, digits).split()
    value = float(number.replace(",", ""))
    scale = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}[unit]
    assert "e" not in number
    assert value * scale == pytest.approx(seconds, rel=0.5 * 10 ** (1 - digits) + 1e-9)
    assert value >= 1
    assert value < 1000 or unit == "s"


@given(st.floats(1e-4, 1e12))
def test_figures_have_no_exponent(value):
    assert "e" not in figures(value)
    assert float(figures(value).replace(",", "")) == pytest.approx(value, rel=0.005)
