"""Can everything that is shown be read: on GitHub, on a narrow page, by pale and by dark eyes?"""

import base64
import re

import numpy as np
import pytest
from github import Sanitizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text

from dlhelpers import measure
from dlhelpers.course import claims, plots
from dlhelpers.course.report import document, picture
from dlhelpers.drawing import contrast, panel, style
from dlhelpers.roofline import Roofline
from dlhelpers.stages import predict_stages

LABELS = {"title": "The answer", "xlabel": "x (s)", "ylabel": "y (m)"}


def comparison(speedup, low, high, outcome="faster"):
    numbers = (50, 2e-3, 1e-3, 0.95, 0.03, 1.05, (speedup,), "cpu", 2, 1.0)
    return measure.Comparison(speedup, low, high, outcome, *numbers)


@pytest.fixture
def verdict(tmp_path, monkeypatch):
    """A claim of the course, judged: one condition does not pay."""
    monkeypatch.setenv("DLHELPERS_LEDGER", str(tmp_path / "ledger.json"))
    claim = next(c for c in claims.all_claims() if c.id == "fusion.speeds-up")
    found = {c.name: comparison(1.5, 1.4, 1.6) for c in claim.conditions}
    found[claim.conditions[-1].name] = comparison(0.99, 0.98, 1.01)
    return claim.judge(found | {"control": comparison(1.0, 0.99, 1.01, "no difference")})


def test_the_strips_of_a_card_survive_githubs_sanitizer_with_what_they_show(verdict):
    kept = Sanitizer(verdict._repr_html_())
    axis, *strips = kept.pictures
    assert len(strips) == len(verdict.conditions) + 1
    assert axis["alt"] == "the lines below mark 1, 1.05"
    first, *_, last, control = (drawn["alt"] for drawn in strips)
    assert first == "1.5, interval 1.4 to 1.6; threshold >= 1.05; holds"
    assert last == "0.99, interval 0.98 to 1.01; threshold >= 1.05; fails"
    assert control == "1, interval 0.99 to 1.01"
    for drawn in strips:
        svg = base64.b64decode(drawn["src"].split(",")[1]).decode()
        assert '<rect width="220" height="24" fill="#ffffff"/>' in svg  # whatever the theme is
        assert "currentColor" not in svg
    assert verdict.sentence in kept.text


def test_a_narrow_table_leaves_a_strip_its_width(verdict):
    wide = [kept["width"] for tag, kept in Sanitizer(verdict._repr_html_()).kept if "width" in kept]
    assert set(wide) == {"220"}
    assert len(wide) == 2 * (len(verdict.conditions) + 2)  # cells, for where styles are stripped
    assert verdict._repr_html_().count('style="min-width:220px"') == len(verdict.conditions) + 2


def test_ratios_and_figures_survive_githubs_sanitizer():
    (strip,) = Sanitizer(comparison(1.5, 1.4, 1.6)._repr_html_()).pictures
    assert strip["alt"] == "paired ratios, speedup 1.5, interval 1.4 to 1.6; threshold 1.05"
    (drawn,) = Sanitizer(style.picture(plots.describe(timeline(), 'an "alt"'))).pictures
    assert drawn["alt"] == 'an "alt"'


def test_what_github_strips_is_stripped():
    kept = Sanitizer("<svg><text>x</text></svg><script>1</script><b style='a'>left</b><img src=a>")
    assert kept.page == "<b>left</b><img>"
    assert kept.pictures == []
    assert Sanitizer("<img src='javascript:1' onload='x'>").page == "<img>"


def test_a_figure_has_two_pixels_for_each_one_on_the_page():
    html = style.picture(curves())
    data = base64.b64decode(re.search('base64,([^"]*)', html)[1])
    assert round(int.from_bytes(data[16:20]) / 2) == int(re.search('width="(\\d+)"', html)[1])
    assert 500 < int.from_bytes(data[16:20]) // 2 < 800  # of a page of 900 pixels
    assert len(data) < 40_000


def curves():
    x = np.linspace(0, 10, 30)
    return plots.curves({name: (x, np.sin(x) + 2 * k) for k, name in enumerate("abcdef")}, **LABELS)


def shares(names):
    return plots.shares({"one": dict.fromkeys(names, 1.0) | {"idle": 2.0}}, title="t")


def heatmap():
    rows = [[0.0, 4.0, 4.9], [5.1, 7.0, 10.0]]
    return plots.heatmap(rows, ["a", "b"], ["c", "d", "e"], title="t", unit="%")


def timeline():
    line = predict_stages({"prepare": 0.03, "train": 0.01}, batches=3, depth=2)
    return plots.timeline(line, title="t")


def clipping():
    marks = {name: 1.0 + k / 2 for k, name in enumerate("abcde")}
    return plots.clipping(
        [900, 50, 9, 4, 1], range(6), low=0, high=3, title="t", xlabel="x", marks=marks
    )


def roofline(points=None):
    points = points or {name: (4.0**k, 3.0) for k, name in enumerate("abcdef")}
    return plots.roofline(Roofline(12.0, {"fp32": 60.0}, 1), points, title="T")


FIGURES = {
    "curves": curves,
    "shares": lambda: shares("abcdef"),
    "phases": lambda: shares(["data loading", "forward", "backward", "optimizer", "copies"]),
    "timeline": timeline,
    "chain": lambda: plots.chain([("a", "left"), ("b", "gone"), ("c", "")], title="t"),
    "heatmap": heatmap,
    "roofline": roofline,
    "clipping": clipping,
}


def ratio(one, other):
    """WCAG 2.2, from the definition, for arrays of RGB between 0 and 1."""
    both = np.array([one[:3], other[:3]])
    linear = np.where(both <= 0.04045, both / 12.92, ((both + 0.055) / 1.055) ** 2.4)
    dark, light = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return (light + 0.05) / (dark + 0.05)


def rgb(colour):
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def pale_texts(figure):
    """Draw a figure without its texts and compare each with what is behind it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    boxes = [t.get_window_extent() for t in texts]
    colours = [rgb(to_hex(t.get_color())) for t in texts]
    for text in texts:
        text.set_alpha(0)
    figure.set_layout_engine("none")  # it is laid out
    canvas.draw()
    pixels, found = np.asarray(canvas.buffer_rgba()), []
    for text, box, colour in zip(texts, boxes, colours, strict=True):
        top, bottom = (round(len(pixels) - y) for y in (box.y1, box.y0))
        behind = pixels[max(top, 0) : bottom, max(round(box.x0), 0) : round(box.x1)]
        if behind.size:
            ground = np.median(behind.reshape(-1, 4), axis=0) / 255
            found += [text.get_text()] * int(ratio(colour, ground) < 4.5)
    return found


@pytest.mark.parametrize("name", FIGURES)
def test_texts_of_figures_reach_a_contrast_of_4_5(name):
    assert pale_texts(FIGURES[name]()) == []


def test_pale_texts_are_found():
    drawn = curves()
    drawn.axes[0].text(5, 5, "pale", color=style.COLOURS[3])
    assert pale_texts(drawn) == ["pale"]


PAGE = dict(re.findall(r"(--[\w-]+): (#\w{6})", document._STYLE.split("@media")[0]))
DARK = dict(re.findall(r"(--[\w-]+): (#\w{6})", document._STYLE.split("@media")[1]))
PAIRS = [
    *picture._TONES.values(),
    *(
        (page[ground], page[ink])
        for page in (PAGE, DARK)
        for ground in ("--page", "--jp-layout-color2")
        for ink in ("--jp-ui-font-color1", "--link")
    ),
    *(
        (ground, ink)
        for ground in (panel.BLUE, panel.ORANGE, panel.GREY, "#ffffff")
        for ink in (panel.INK, panel.RUST)
    ),
    *((colour, contrast.text_on(colour)) for colour in style.COLOURS),
    *(("#ffffff", contrast.as_text(colour)) for colour in style.COLOURS),
]


@pytest.mark.parametrize(("ground", "ink"), PAIRS)
def test_every_pair_of_ground_and_text_reaches_a_contrast_of_4_5(ground, ink):
    assert ratio(rgb(ground), rgb(ink)) >= 4.5
    assert contrast.contrast(ground, ink) == pytest.approx(ratio(rgb(ground), rgb(ink)))


@pytest.mark.parametrize("colour", [style.BASELINE, style.TREATMENT, style.FAILING, "#8c8c8c"])
def test_marks_of_strips_reach_a_contrast_of_3_on_their_panel(colour):
    assert ratio(rgb(colour), rgb("#ffffff")) >= 3  # WCAG 1.4.11, of graphics


def test_the_alt_text_of_a_roofline_says_which_points_lie_above_it():
    points = {"dense": (30, 48), "ReLU": (0.125, 3.0), "depthwise": (1.0, 6.0)}
    alt = style.alt_text(roofline(points))
    assert "dense 48 GFLOP/s at 30 FLOP per byte, below it (80%)" in alt
    assert "ReLU 3 GFLOP/s at 0.12 FLOP per byte, above it (200%)" in alt
    assert "depthwise 6 GFLOP/s at 1 FLOP per byte, below it (50%)" in alt


def test_the_legend_of_several_rows_gives_no_number_that_is_one_rows():
    rows = {"a": {"forward": 95.0, "copies": 5.0}, "b": {"forward": 98.0, "copies": 2.0}}
    drawn = plots.shares(rows, title="T")
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["copies"]
    assert style.alt_text(drawn) == "T. a: forward 95 %, copies 5 %; b: forward 98 %, copies 2 %."


def test_names_in_a_roofline_cover_no_point_and_no_other_name():
    points = {"1x1, 128 to 128": (29.6, 58.0), "1x1, 36 to 432": (15.9, 50.0)}
    points |= {"1x1, 360 in 8 groups": (10.9, 40.0), "ReLU": (0.1, 4.0)}
    figure = roofline(points)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    boxes = {t.get_text(): t.get_window_extent() for t in axes.texts if t.get_text() in points}
    assert len(boxes) == 4
    for name, box in boxes.items():
        assert not any(box.overlaps(other) for key, other in boxes.items() if key != name)
        assert not any(box.contains(*axes.transData.transform(xy)) for xy in points.values())
