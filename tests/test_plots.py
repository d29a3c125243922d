import html
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from dlhelpers import memory
from dlhelpers.course import plots
from dlhelpers.drawing import style
from dlhelpers.drawing.contrast import as_text
from dlhelpers.measure import Estimate
from dlhelpers.roofline import Roofline
from dlhelpers.stages import predict_stages

positive = st.floats(1e-3, 1e3)


@given(
    st.lists(positive, min_size=1, max_size=400),
    positive,
    positive,
    st.none() | st.floats(0.5, 2),
)
def test_the_strip_is_well_formed_and_stays_inside(ratios, a, b, threshold):
    panel = plots.strip(
        ratios, min(a, b), max(a, b), negligible=0.03, estimate=a, threshold=threshold
    )
    root = ET.fromstring(panel.svg)
    (cloud,) = [e.get("d") for e in root.iter() if e.tag.endswith("path")]
    places = [float(x) for x in re.findall(r"M(\S+) ", cloud)]
    assert 1 <= len(places) <= 200
    for x in [*places, *(float(e.get("cx")) for e in root.iter() if e.get("cx"))]:
        assert 0 <= x <= panel.width
    assert "speedup" in panel.alt
    assert ("threshold" in panel.alt) == (threshold is not None)


def test_the_strip_is_the_same_each_time_and_puts_one_in_the_middle():
    options = {"negligible": 0.03, "estimate": 1.0}
    strip = plots.strip([1.0], 0.99, 1.01, **options).svg
    assert strip == plots.strip([1.0], 0.99, 1.01, **options).svg
    assert 'cx="180.0"' in strip


def test_a_faster_candidate_lies_on_the_right():
    strip = plots.strip([1.5], 1.4, 1.6, negligible=0.03, estimate=1.5).svg
    assert float(re.findall(r'cx="([\d.]+)"', strip)[-1]) > 180


def figure():
    return plots.curves({"a": ([0, 1, 2], [1, 2, 3])}, title="t", xlabel="x (s)", ylabel="y (m)")


def test_what_a_range_clips_is_drawn_in_another_colour():
    counts, edges = [1, 5, 9, 4, 1], [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]
    marks = {"min-max": 2.5, "mse": 1.5}
    drawn = plots.clipping(
        counts, edges, low=-1.6, high=1.4, title="t", xlabel="x", alt="a", marks=marks
    )
    axes = drawn.axes[0]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] == colours[4] != colours[1] == colours[2] == colours[3]
    assert [bar.get_height() for bar in axes.patches] == counts


def test_the_name_of_a_mark_is_beside_its_own_line_in_its_colour_above_the_bars():
    counts, edges = [900, 50, 9, 4, 1], [0, 1, 2, 3, 4, 5]
    marks = {"mse": 1.5, "min-max": 4.9, "aciq": 1.6}
    drawn = plots.clipping(counts, edges, low=0, high=4, title="t", xlabel="x", marks=marks)
    axes = drawn.axes[0]
    styles = set()
    for text in axes.texts:
        own = [m for m in axes.lines if m.get_color() == text.get_color()]
        assert {x for m in own for x in m.get_xdata()} == {marks[text.get_text()]}
        dot = axes.transData.inverted().transform(axes.transAxes.transform((0, text.xy[1])))
        assert dot[1] > max(counts)
        styles |= {m.get_linestyle() for m in own if m.get_marker() == "None"}
    assert [text.get_text() for text in axes.texts] == ["min-max", "aciq", "mse"]
    assert len(styles) == 3


def test_a_ranking_has_a_row_for_each_name_in_order():
    axes = plots.ranking({"b": 3.0, "a": 7.0}, title="t", xlabel="x", threshold=5.0).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]
    (dots,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert list(dots.get_xdata()) == [3.0, 7.0]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first one on top


def test_a_picture_carries_its_alt_text_escaped():
    alt = 'a "quoted" <text> & more'
    picture = style.picture(plots.describe(figure(), alt))
    assert f'alt="{html.escape(alt)}"' in picture
    assert picture.count("<img") == 1
    assert len(picture) < 40_000


def test_without_alt_text_title_and_axes_serve():
    assert style.alt_text(figure()) == "t; x (s); y (m)"


def test_figures_are_unknown_to_pyplot_so_that_nothing_is_drawn_twice():
    import matplotlib.pyplot as plt

    figure()
    assert plt.get_fignums() == []


def test_faces_are_white_and_opaque_so_that_either_theme_shows_them():
    assert figure().get_facecolor() == (1, 1, 1, 1)


def test_a_heatmap_writes_every_number_and_says_what_was_refused():
    drawn = plots.heatmap(
        [[1.0, math.nan], [3.0, 4.0]], ["a", "b"], ["c", "d"], title="t", unit="%"
    )
    texts = [t.get_text() for t in drawn.axes[0].texts]
    assert texts == ["1", "refused", "3", "4"]


def test_intervals_are_drawn_from_low_to_high():
    drawn = plots.intervals(
        {"a": Estimate(1.0, 0.5, 2.0, 3), "b": Estimate(4.0, 3.0, 5.0, 3)},
        title="t",
        xlabel="points",
        threshold=2.5,
    )
    spans = [tuple(line.get_xdata()) for line in drawn.axes[0].lines]
    assert (2.5, 2.5) in spans  # the threshold
    assert (0.5, 2.0) in spans
    assert (3.0, 5.0) in spans


def test_the_pair_panel_says_loss_and_pull_of_both():
    panel = plots.pair_panel(2.0, F.cross_entropy, lambda z, y: F.cross_entropy(z.softmax(1), y))
    # by hand: ln(1 + e^-2) and e^-2 / (1 + e^-2)
    assert f"right pair: loss {math.log1p(math.exp(-2)):.3f}, pull {1 / (1 + math.e**2):.3f}" in (
        style.alt_text(panel)
    )


def test_importing_plots_loads_no_matplotlib():
    code = "import dlhelpers.course.plots, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


anything = st.floats(0, allow_nan=False) | st.just(math.inf)


@given(st.lists(anything, max_size=20), anything, anything, anything, st.floats(0, 1))
def test_no_ratio_or_interval_breaks_the_strip(ratios, low, high, estimate, negligible):
    panel = plots.strip(ratios, low, high, negligible=negligible, estimate=estimate)
    for element in ET.fromstring(panel.svg).iter():
        points = [point.split(",")[0] for point in element.get("points", "").split()]
        for number in [element.get("x", 0), element.get("cx", 0), *points]:
            assert 0 <= float(number) <= panel.width


def test_an_interval_without_an_end_still_leaves_a_picture():
    drawn = plots.intervals(
        {"too few pairs": Estimate(1.0, 0.0, math.inf, 3)}, title="t", xlabel="ratio", baseline=1.0
    )
    assert "<img" in style.picture(drawn)
    left, right = drawn.axes[0].get_xlim()
    low, high = drawn.axes[0].lines[1].get_xdata()
    assert 0 < low < left < right < high < math.inf


def test_a_seventh_curve_is_refused_not_dropped():
    line = ([0, 1], [0, 1])
    assert len(plots.curves(dict.fromkeys("abcdef", line), **LABELS).axes[0].lines) == 6
    with pytest.raises(ValueError, match="7 curves are more than the 6 colours"):
        plots.curves(dict.fromkeys("abcdefg", line), **LABELS)


def test_a_curve_may_carry_an_interval_and_be_of_its_own_length():
    drawn = plots.curves(
        {"a": ([0, 1, 2], [1, 2, 3], [0, 1, 2], [2, 3, 4]), "b": ([0, 1], [5, 6])}, **LABELS
    )
    band = drawn.axes[0].collections[0].get_paths()[0].vertices
    assert {(0.0, 0.0), (2.0, 4.0)} <= set(map(tuple, band))
    with pytest.raises(ValueError, match=r"curve 'a' must be .* got lengths \[2, 3\]"):
        plots.curves({"a": ([0, 1], [1, 2, 3])}, **LABELS)


def test_every_curve_is_labelled_at_itself_in_its_colour():
    drawn = plots.curves({"a": ([0, 1, 2], [1, 2, 3]), "b": ([0, 1, 2], [3, 3, 0])}, **LABELS)
    axes = drawn.axes[0]
    for line, label in zip(axes.lines, axes.texts, strict=True):
        assert label.xy in set(zip(*line.get_data(), strict=True))
        assert label.get_color() == as_text(line.get_color())


def test_numbers_in_a_heatmap_stand_out_from_their_cell():
    drawn = plots.heatmap([[0.0, 10.0]], ["a"], ["b", "c"], title="t", unit="%")
    assert [t.get_color() for t in drawn.axes[0].texts] == ["#ffffff", "#000000"]
    even = plots.heatmap([[5.0, 5.0]], ["a"], ["b", "c"], title="t", unit="%")
    assert {t.get_color() for t in even.axes[0].texts} == {"#ffffff"}  # all in the darkest colour


@pytest.mark.parametrize("location", ["left", "center", "right"])
def test_a_title_anywhere_serves_as_alt_text(location):
    from matplotlib.figure import Figure

    drawn = Figure()
    assert len(style.alt_text(drawn)) > 20
    drawn.subplots().set_title("the answer", loc=location)
    assert style.alt_text(drawn) == "the answer"


LABELS = {"title": "t", "xlabel": "x (s)", "ylabel": "y (m)"}


def test_stacked_parts_lie_end_to_end_in_their_colours():
    rows = {"files": {"open": 5.0, "read": 6.0}, "packed": {"open": 1.0, "read": 7.0}}
    drawn = plots.splits(rows, title="t", xlabel="time (us)", marks={"files": 20.0})
    axes = drawn.axes[0]
    bars = [(b.get_x(), b.get_width(), round(b.get_y() + 0.31, 6)) for b in axes.patches]
    assert bars[:4] == [(0.0, 5.0, 0.0), (5.0, 6.0, 0.0), (0.0, 1.0, 1.0), (1.0, 7.0, 1.0)]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["open", "read"]
    assert axes.lines[0].get_xdata().tolist() == [20.0, 20.0]


def test_a_mark_without_a_row_is_refused():
    with pytest.raises(ValueError, match=r"marks \['b'\] belong to no row of \['a'\]"):
        plots.splits({"a": {"x": 1.0}}, title="t", xlabel="x", marks={"b": 1.0})
    with pytest.raises(ValueError, match="more than 6 colours"):
        plots.splits({"a": dict.fromkeys("abcdefg", 1.0)}, title="t", xlabel="x")


def test_a_timeline_has_a_box_for_each_batch_where_it_was_worked_on():
    line = predict_stages({"prepare": 0.03, "train": 0.01}, batches=3, depth=2)
    axes = plots.timeline(line, title="t").axes[0]
    boxes = [(b.get_x(), b.get_width(), b.get_y() + 0.35) for b in axes.patches]
    wanted = [(0, 30, 0), (30, 30, 0), (60, 30, 0), (30, 10, 1), (60, 10, 1), (90, 10, 1)]
    assert boxes == [pytest.approx(box) for box in wanted]
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "prepare, 100% busy",
        "train, 43% busy",
    ]
    assert axes.get_xlabel() == "time (ms)"


def test_pictures_keep_black_black_and_white_white():
    dark = np.full((4, 5), 3, np.uint8)
    coloured = torch.zeros(3, 4, 5, dtype=torch.uint8)
    coloured[0] = 200
    drawn = plots.pictures({"dark": dark, "red": coloured}, title="t", alt="two")
    first, second = (axes.images[0] for axes in drawn.axes)
    assert (first.norm.vmin, first.norm.vmax) == (0, 255)
    assert second.get_array()[0, 0].tolist() == [200, 0, 0]
    assert [axes.get_title() for axes in drawn.axes] == ["dark", "red"]
    assert re.match('<img alt="two" width="[0-9]+" src="data:image/jpeg', style.picture(drawn))


def test_a_measured_point_lies_beside_the_curves():
    drawn = plots.curves(
        {"a": ([0, 1], [1, 2])}, title="t", xlabel="x", ylabel="y", measured={"here": (0.5, 1.7)}
    )
    point = drawn.axes[0].lines[-1]
    assert (point.get_xdata().tolist(), point.get_ydata().tolist()) == ([0.5], [1.7])
    assert "here" in [text.get_text() for text in drawn.axes[0].texts]


def a_step(blocks=2):
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(blocks)))
    x = torch.ones(4, 16)
    return memory.measure_peak(lambda: model(x).sum().backward())


def test_memory_stacks_the_kinds_up_to_the_peak():
    report = a_step()
    axes = plots.memory(report, title="t", alt="a").axes[0]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in axes.collections]
    drawn = [area.get_label() for area in axes.collections]
    assert drawn == [kind for kind in memory.KINDS if max(report.timeline[kind])]
    assert max(tops) == pytest.approx(report.peak_bytes / 2**20)
    mark = axes.lines[-1]
    totals = [sum(at) for at in zip(*report.timeline.values(), strict=True)]
    assert totals[int(mark.get_xdata()[0])] == report.peak_bytes
    assert mark.get_ydata()[0] == pytest.approx(report.peak_bytes / 2**20)


def test_memory_of_a_long_run_still_shows_its_peak():
    report = a_step(blocks=400)
    assert len(report.phases) > 800
    axes = plots.memory(report, title="t").axes[0]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in axes.collections]
    assert max(tops) == pytest.approx(report.peak_bytes / 2**20)


def test_memory_bars_end_at_each_peak_and_mark_what_was_measured():
    reports = {"small": a_step(1), "large": a_step(3)}
    axes = plots.memory_bars(
        reports, title="t", limit_bytes=3 * 2**20, measured={"large": 2 * 2**20}
    ).axes[0]
    for place, report in enumerate(reports.values()):
        bars = [bar for bar in axes.patches if abs(bar.get_y() + 0.31 - place) < 1e-6]
        end = max(bar.get_x() + bar.get_width() for bar in bars)
        assert end == pytest.approx(report.peak_bytes / 2**20)
    point, limit = axes.lines
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (2, 1)
    assert set(limit.get_xdata()) == {3}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["small", "large"]


def test_a_scatter_draws_every_group_and_names_its_points():
    drawn = plots.scatter(
        {"a": ([1, 10], [2, 20]), "b": ([3], [4])},
        names={"here": (3, 4)},
        diagonal=True,
        title="t",
        xlabel="x",
        ylabel="y",
        alt="what is seen",
    )
    (axes,) = drawn.axes
    assert [points.get_offsets().tolist() for points in axes.collections] == [
        [[1, 2], [10, 20]],
        [[3, 4]],
    ]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    line = axes.lines[0]
    assert list(line.get_xdata()) == list(line.get_ydata())
    assert "here" in [text.get_text() for text in axes.texts]
    assert style.alt_text(drawn).startswith("what is seen")
    with pytest.raises(ValueError, match="99 groups"):
        plots.scatter({str(i): ([1], [1]) for i in range(99)}, title="t", xlabel="x", ylabel="y")


def test_the_roof_bends_at_the_ridge_and_layers_lie_where_they_are():
    peaks = Roofline(10.0, {"fp32": 100.0}, 1)
    axes = plots.roofline(peaks, {"layer": (2.0, 15.0), "far": (1e4, 99.0)}, title="t").axes[0]
    roof, *points = axes.lines
    x, y = roof.get_xdata(), roof.get_ydata()
    assert (x[1], y[1]) == (10, 100)  # 100 GFLOP/s over 10 GB/s
    assert y[0] == pytest.approx(10 * x[0])
    assert y[2] == 100
    assert x[2] > 1e4
    assert [(p.get_xdata()[0], p.get_ydata()[0]) for p in points] == [(2.0, 15.0), (1e4, 99.0)]


def test_a_chain_has_a_box_for_each_module_in_order():
    boxes = [(f"m{i}", ("", "gone", "left")[i % 3]) for i in range(14)]
    axes = plots.chain(boxes, title="t", alt="a").axes[0]
    drawn = [text for text in axes.texts if text.get_text()]
    assert [text.get_text() for text in drawn] == [label for label, _ in boxes]
    assert [text.get_position() for text in drawn][11:13] == [(11, 0), (0, -1)]
    with pytest.raises(ValueError, match="got 'odd'"):
        plots.chain([("m", "odd")], title="t")
