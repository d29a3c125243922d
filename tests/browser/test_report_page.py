"""The report of a real ledger in a real browser, light and dark: read, filtered, looked at."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import lab_session

from dlhelpers.course import ledger
from dlhelpers.course.report.machines import compare
from dlhelpers.course.report.page import render

LEDGERS = sorted((lab_session.ROOT / "data" / "ledgers").glob("*.json"))
SCREENSHOTS = lab_session.ROOT / ".pytest_cache" / "screenshots"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        lab_session.chromium() is None,
        reason="no Chromium: `make chromium` installs it on Debian and Ubuntu",
    ),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(render(ledger.read(LEDGERS[0]), notebooks="notebooks"), encoding="utf-8")
    return file


def brightness(colour):
    """Mean of the three channels of ``rgb(…)``."""
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_is_legible_and_its_filters_filter(browser, report, scheme):
    page = browser.new_page(viewport={"width": 1280, "height": 1600}, color_scheme=scheme)
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(report.as_uri())
    style = "getComputedStyle(document.body)"
    paper, ink = (brightness(page.evaluate(f"{style}.{n}")) for n in ("backgroundColor", "color"))
    assert (paper > ink) == (scheme == "light")
    assert abs(paper - ink) > 150  # far apart
    rows = page.locator("#claims > tbody > tr")
    every = rows.count()
    assert every >= len(ledger.read(LEDGERS[0])["rows"])
    page.locator("select[data-filter='topic']").select_option("profiling")
    page.locator("select[data-filter='condition']").select_option("agrees")
    shown = page.locator("#claims > tbody > tr:visible").count()
    assert 0 < shown < every
    assert page.locator("#shown").inner_text() == f"{shown} of {every} claims shown"
    assert page.locator("#claims img").count() > 0  # effects with intervals
    heights = page.locator("#claims .number:visible").evaluate_all(
        "all => all.map(span => span.getClientRects().length)"
    )
    assert set(heights) == {1}, "a number with its interval stands in one line"
    hidden = page.locator("#tips a[href^='#']").first
    target = hidden.get_attribute("href").removeprefix("#")
    assert not page.locator(f"[id='{target}']").is_visible()
    hidden.click()
    assert page.locator(f"[id='{target}']").is_visible(), "a link shows what a filter hid"
    page.evaluate("window.scrollTo(0, 0)")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"report_{scheme}.png")
    assert said == []
    assert [url for url in asked if url.startswith("http")] == []  # nothing from outside
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_of_several_machines_sorts_and_tells_more_where_one_points(
    browser, tmp_path, scheme
):
    file = tmp_path / "compare.html"
    file.write_text(compare([ledger.read(path) for path in LEDGERS]), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1280, "height": 1600}, color_scheme=scheme)
    page.goto(file.as_uri())
    lines = page.locator("#picture tbody tr.line")
    before = lines.all_inner_texts()
    for key in ("gap", "effect"):
        page.locator("#sort").select_option(key)
        values = lines.evaluate_all(f"rows => rows.map(r => r.dataset.{key})")
        known = [float(v) for v in values if v]
        assert known == sorted(known, reverse=True)
        assert all(values[: len(known)]), "what has no number comes last"
        assert page.locator("#picture tr.tip:visible").count() == 0
    square = page.locator("#picture td.sq").first
    square.hover()
    more = square.locator(".more").bounding_box()
    assert more["width"] > 50
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"machines_{scheme}.png")
    page.locator("#sort").select_option("tip")
    assert lines.all_inner_texts() == before
    assert page.evaluate("document.querySelector('.wide').scrollWidth") <= 1280
    page.close()
