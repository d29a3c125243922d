"""The lessons in a real JupyterLab, driven as a learner drives them."""

import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import lab_session

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        lab_session.chromium() is None,
        reason="no Chromium: `make chromium` installs it on Debian and Ubuntu",
    ),
]
SCREENSHOTS = lab_session.ROOT / ".pytest_cache" / "screenshots"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with lab_session.server(tmp_path_factory.mktemp("lab")) as address:
        yield address


@pytest.fixture
def page(browser):
    page = new_page(browser)
    yield page
    page.close()


def new_page(browser):
    return browser.new_page(viewport={"width": 1280, "height": 1600})


def keep_screenshot(page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def wait_until_redrawn(page, attribute, before):
    """Wait until the last figure's alt or src is another one."""
    page.wait_for_function(
        "([attribute, before]) => [...document.querySelectorAll('.jp-OutputArea-output img')]"
        ".at(-1)[attribute] !== before",
        arg=[attribute, before],
        timeout=60_000,
    )


def test_start_here_runs_as_the_lab_opens_it(page, address):
    page.goto(f"{address}/?token={lab_session.TOKEN}")
    page.wait_for_url("**/lab/tree/work/00_start_here.ipynb*", timeout=60_000)
    lab_session.wait_until_ready(page)
    assert page.locator(".jp-OutputArea-output").count() == 0  # no answer before the question
    lab_session.run_all(page)
    assert lab_session.errors(page) == []
    keep_screenshot(page, "00_start_here")


def run_and_move(page, address, name, move, timeout_s=900):
    """Run a lesson, move its widget, and see its last figure drawn again, without an error."""
    lab_session.open_notebook(page, address, f"{name}.ipynb")
    lab_session.run_all(page, timeout_s=timeout_s)
    see_it_move(page, name, move)


def see_it_move(page, name, move):
    assert lab_session.errors(page) == []
    panel = page.locator(".jp-OutputArea-output img").last
    before = panel.get_attribute("src")
    move(page)
    wait_until_redrawn(page, "src", before)
    assert lab_session.errors(page) == []
    keep_screenshot(page, f"{name[:2]}_widget")


def press(key, which):
    """Press a key on the first (0) or last (-1) slider."""

    def move(page):
        slider = page.locator(".widget-slider .noUi-handle").nth(which)
        slider.scroll_into_view_if_needed()
        slider.focus()
        page.keyboard.press(key)

    return move


def select(option, which):
    """Choose an option of the first (0) or last (-1) menu that has it."""

    def move(page):
        menus = page.locator(".widget-dropdown select")
        choice = menus.filter(has=page.locator(f'option:text-is("{option}")')).nth(which)
        choice.scroll_into_view_if_needed()
        choice.select_option(option)

    return move


def move_and_read(page):
    panel = page.locator(".jp-OutputArea-output img").last
    alt, readout = panel.get_attribute("alt"), page.locator(".widget-readout").last
    value = readout.inner_text()
    press("ArrowRight", -1)(page)
    wait_until_redrawn(page, "alt", alt)  # who does not see it is told as well
    assert readout.inner_text() != value


@pytest.fixture(scope="module")
def pairing(browser, address):
    """Notebook 01, opened and set up, for those tests that run cells of their own."""
    page = new_page(browser)
    lab_session.open_notebook(page, address, "01_pairing.ipynb")
    lab_session.run_cell(page, "import warnings")
    lab_session.run_cell(page, "notebook.setup(")
    yield page
    page.close()


def test_a_slider_redraws_its_figure_and_tells_its_number(pairing):
    figure = lab_session.run_cell(pairing, "FloatSlider(").locator(".jp-OutputArea-output img")
    figure.wait_for(timeout=60_000)
    see_it_move(pairing, "01_pairing", move_and_read)


WIDGETS = {
    "01_pairing": move_and_read,  # the logit
    "02_lmdb_io": select("memmap", 0),  # the store
    "03_dali_io": press("ArrowLeft", 0),  # the time to prepare a batch
    "04_memory": select("SGD", -1),  # the optimizer
    "05_shufflenet": select("16", -1),  # the groups
    "06_fusion": press("ArrowRight", -1),  # the variance
    "07_quantization": press("ArrowLeft", 0),  # the threshold
}


def test_every_lesson_has_its_widget_moved():
    stems = {path.stem for path in (lab_session.ROOT / "notebooks").glob("*.ipynb")}
    stems = {stem for stem in stems if not stem.endswith("b_more")}  # no widgets there
    assert {*WIDGETS, "00_start_here", "08_profiling"} == stems


@pytest.mark.slow  # nbval runs them all as well
@pytest.mark.parametrize("name", WIDGETS)
def test_a_lesson_runs_and_its_figure_follows_the_widget(page, address, name):
    run_and_move(page, address, name, WIDGETS[name])


@pytest.mark.slow  # tests/test_profiling_python.py clicks on the view alone
def test_the_flame_view_of_notebook_08_zooms(page, address):
    run_and_move(page, address, "08_profiling", select("timeline", 0))
    overview = page.locator(".jp-OutputArea-output img[alt*='largest part of a step']").first
    overview.scroll_into_view_if_needed()
    assert overview.is_visible()
    keep_screenshot(page, "08_overview")
    select("calls (snakeviz)", 0)(page)
    frame = page.frame_locator("iframe[title*='interactive view']")
    boxes = frame.locator("#chart rect")
    boxes.nth(2).wait_for(timeout=60_000)
    before = boxes.count()
    boxes.nth(1).dispatch_event("click")  # below the root, wherever it is drawn
    frame.locator("#resetbutton-zoom:enabled").wait_for(timeout=30_000)
    assert boxes.count() != before
    page.locator("iframe[title*='interactive view']").scroll_into_view_if_needed()
    keep_screenshot(page, "08_flame")


def test_a_prediction_is_noted_and_shown_with_the_verdict(pairing):
    run = partial(lab_session.run_cell, pairing)
    run("from dlhelpers.course import claims")
    asked = run('claims.card("pairing.logsoftmax-nll-is-ce")')
    button = asked.locator("button.widget-button").last  # surely, of the last condition
    button.wait_for(timeout=30_000)
    button.click()
    asked.get_by_text("noted: holds (sure)").wait_for(timeout=30_000)
    keep_screenshot(pairing, "01_prediction")
    run("def two_steps(z, y):\n    return F.nll_loss")
    judged = run("pairing.largest_difference(F.cross_entropy, two_steps, logits, y)")
    card = judged.locator(".jp-OutputArea-output").last
    card.wait_for(timeout=30_000)
    assert "holds (sure)" in card.inner_text()
    assert "Your predictions: 1 of 1 right." in card.inner_text()
    keep_screenshot(pairing, "01_verdict")
    button.click()
    asked.get_by_text("the verdict is on the screen").wait_for(timeout=30_000)
    assert lab_session.errors(pairing) == []


def test_a_size_is_noted_by_the_slider_under_the_card(pairing):
    lab_session.run_cell(pairing, "from dlhelpers.course import claims")
    asked = lab_session.run_cell(pairing, 'claims.card("pairing.softmax-ce-gradient")')
    handle = asked.locator(".widget-slider .noUi-handle")
    handle.wait_for(timeout=30_000)
    assert asked.get_by_text("noted: ").count() == 0
    asked.get_by_role("button", name="note it").click()  # at 1, without moving the slider
    asked.get_by_text("noted: 1", exact=True).wait_for(timeout=30_000)
    handle.focus()
    pairing.keyboard.press("ArrowRight")
    asked.get_by_text("noted: 1.05", exact=True).wait_for(timeout=30_000)
    keep_screenshot(pairing, "01_size")
    assert lab_session.errors(pairing) == []
