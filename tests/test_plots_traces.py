"""The figures show the numbers that they are given: widths, order, colours, labels."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from dlhelpers.course import plots
from dlhelpers.drawing.style import COLOURS, alt_text
from dlhelpers.drawing.traces import _merged


def boxes(figure):
    return [patch for patch in figure.axes[0].patches if patch.get_width() > 0]


def test_shares_are_those_of_the_whole_and_named_where_they_are_wide():
    rows = {"CPU": {"forward": 3.0, "backward": 6.0, "copies": 1.0, "optimizer": 0.2}}
    figure = plots.shares(rows, title="T")
    wide = pytest.approx([3000 / 102, 6000 / 102, 1000 / 102, 200 / 102])
    assert [box.get_width() for box in boxes(figure)] == wide
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["forward\n29 %", "backward\n59 %", "copies\n10 %"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["optimizer 2 %"]
    assert "backward 59 %" in alt_text(figure)


def test_a_phase_has_its_colour_whatever_stands_beside_it():
    one = plots.shares({"CPU": {"data loading": 1.0, "forward": 1.0}}, title="T")
    other = plots.shares({"CPU": {"forward": 1.0, "backward": 1.0}}, title="T")
    assert to_hex(boxes(one)[1].get_facecolor()) == to_hex(boxes(other)[0].get_facecolor())


def test_waiting_is_grey_and_takes_no_colour():
    row = {f"part {n}": 1.0 for n in range(len(COLOURS))} | {"idle": 6.0}
    figure = plots.shares({"GPU": row}, title="T")
    assert to_hex(boxes(figure)[-1].get_facecolor()) not in COLOURS
    with pytest.raises(ValueError, match="7 kinds are more than 6 colours"):
        plots.shares({"GPU": row | {"one more": 1.0}}, title="T")


@pytest.mark.parametrize("rows", [{}, {"CPU": {}}, {"CPU": {"a": 0.0}}, {"CPU": {"a": -1, "b": 2}}])
def test_shares_of_nothing_are_refused(rows):
    with pytest.raises(ValueError, match=r"nothing to draw|sizes of 0 or more"):
        plots.shares(rows, title="T")


def test_lanes_hold_their_spans_and_marks():
    rows = {"CPU": [(0.0, 4.0, "forward"), (4.0, 9.0, "backward")], "GPU": [(1.0, 8.0, "kernels")]}
    figure = plots.lanes(rows, title="T", marks=[9.0])
    axes = figure.axes[0]
    spans = [
        tuple(path.get_extents().intervalx)
        for collection in axes.collections
        for path in collection.get_paths()
    ]
    assert sorted(spans) == [(0.0, 4.0), (1.0, 8.0), (4.0, 9.0)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["CPU", "GPU"]
    assert [line.get_xdata()[0] for line in axes.lines] == [9.0]
    assert "kernels" in alt_text(figure)


def test_a_span_that_ends_before_it_starts_is_named():
    with pytest.raises(ValueError, match="'forward' ends at 1, before it starts at 2"):
        plots.lanes({"CPU": [(2.0, 1.0, "forward")]}, title="T")
    with pytest.raises(ValueError, match="no span"):
        plots.lanes({"CPU": []}, title="T")


spans = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda t: (min(t), max(t))), max_size=12
)


@settings(deadline=None)
@given(spans, st.integers(0, 5))
def test_merging_covers_the_same_moments_and_gaps_that_are_too_small(found, gap):
    merged = _merged(found, gap)
    for (_, end), (start, _) in itertools.pairwise(merged):
        assert start - end > gap
    for start, end in found:
        assert any(first <= start and end <= last for first, last in merged)
    covered = {t for start, end in merged for t in range(start, end)}
    closed = {t for start, end in found for t in range(start, end)}
    assert closed <= covered
    if gap == 0:
        assert closed == covered


def test_a_waterfall_falls_from_the_first_to_the_last():
    times = {"as found": 8.0, "one": 4.0, "two": 5.0, "three": 4.99}
    figure = plots.waterfall(times, title="T", notes={"three": "skipped"})
    bars = [(p.get_x(), p.get_width()) for p in figure.axes[0].patches]
    wanted = [(0, 8.0), (4.0, 4.0), (4.0, 1.0), (4.99, 0.01), (0, 4.99)]
    for bar, (left, width) in zip(bars, wanted, strict=True):
        assert bar == pytest.approx((left, width))
    texts = [text.get_text().strip() for text in figure.axes[0].texts]
    assert texts == ["8", "2×", "0.80×", "skipped", "4.99"]
    assert to_hex(figure.axes[0].patches[2].get_facecolor()) == plots.FAILING
    assert "one: 2×" in alt_text(figure)
    assert "three: no gain" in alt_text(figure)


def test_a_waterfall_of_one_time_or_of_none_is_refused():
    with pytest.raises(ValueError, match="two times or more, got 1"):
        plots.waterfall({"as found": 1.0}, title="T")
    with pytest.raises(ValueError, match="above 0, got 0"):
        plots.waterfall({"as found": 1.0, "one": 0.0}, title="T")
