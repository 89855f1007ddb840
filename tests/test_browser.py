"""The notebooks in JupyterLab, in a real browser: run them as a person does and look at what is shown.

Screenshots are kept in build/screenshots. Needs Chromium on the machine; skipped where there is none.
"""

import shutil

import browser as jupyter
import pytest
from browser import SCREENSHOTS, VIEWPORT, all_ran, cell_count, opened, photographed, run_all

pytestmark = [pytest.mark.slow, pytest.mark.skipif(jupyter.CHROMIUM is None, reason="no Chromium on this machine")]


@pytest.fixture(scope="module")
def lab(trained, tmp_path_factory):
    """JupyterLab on copies of the notebooks, with the lines changed that a user changes."""
    folder = tmp_path_factory.mktemp("lab")
    steps = {"total_steps": 3000, "checkpoint_every": 3000, "eval_every": 500, "log_every": 20}
    run = {"output_dir": str(trained.output_dir)}
    jupyter.copy_notebook("train", folder, recipe="params/smoke.yaml", run_name="browser", **run, **steps)
    for name in ("curves", "generate"):
        jupyter.copy_notebook(name, folder, run_name="trained", **run)
    with jupyter.jupyterlab(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with jupyter.chromium() as chromium:
        yield chromium


def chart(page):
    """The one saved chart: an image that becomes interactive under the mouse."""
    page.wait_for_selector("img.plot-img", timeout=60_000)
    page.hover("img.plot-img", force=True, no_wait_after=True)
    page.wait_for_selector(".js-plotly-plot .trace", state="attached")
    assert page.locator(".js-plotly-plot").count() == 1


def test_train_shows_a_live_chart_that_moves_and_stays(browser, lab):
    page = opened(browser, lab, "train")
    run_all(page)
    page.wait_for_selector(".jp-OutputArea .js-plotly-plot", timeout=120_000)

    longest = "Math.max(0, ...[...document.querySelectorAll('.js-plotly-plot')].flatMap(p => p.calcdata.map(d => d.length)))"
    first = page.evaluate(longest)
    page.wait_for_function(f"{longest} > {first}", timeout=60_000)
    page.screenshot(path=SCREENSHOTS / "train_live.png")
    all_ran(page, cell_count("train"))
    chart(page)
    assert page.evaluate(longest) == 150
    text = page.inner_text(".jp-Notebook")
    assert "Step 3000/3000: Loss=" in text and "held-out loss" in text and "Once upon a time" in text
    assert "Traceback" not in text
    photographed(page, "train")

    page.keyboard.press("Control+s")
    page.wait_for_timeout(2000)
    page.close()
    again = browser.new_page(viewport=VIEWPORT)  # reopened without running: the chart is there
    again.goto(f"{lab}/lab/tree/train.ipynb?token=t&reset")
    chart(again)
    again.close()


@pytest.mark.parametrize(("name", "words"), [("curves", "held-out loss"), ("generate", "Once upon a time")])
def test_the_others_show_what_they_are_for(browser, lab, name, words):
    page = opened(browser, lab, name)
    run_all(page)
    all_ran(page, cell_count(name))
    page.wait_for_timeout(1000)
    photographed(page, name)
    text = page.inner_text(".jp-Notebook")
    assert words in text and "Traceback" not in text
    if name == "curves":
        chart(page)
        page.get_by_text("log loss").click()
        page.wait_for_function("document.querySelector('.js-plotly-plot').layout.yaxis.type === 'log'")
    page.close()


def test_the_saved_page_of_curves_opens_without_a_network(browser, trained):
    from lmlib.figures import save_curves

    copy = trained.run_dir.parent / "page"
    shutil.copytree(trained.run_dir, copy, ignore=shutil.ignore_patterns("checkpoints"))
    save_curves(copy)
    page = browser.new_page()
    page.context.set_offline(True)
    page.goto((copy / "training_curves.html").as_uri())
    page.wait_for_selector(".js-plotly-plot .trace", state="attached")
    page.screenshot(path=SCREENSHOTS / "page.png")
    shutil.rmtree(copy)
    page.close()


def test_hostile_texts_stay_text_in_every_display(browser, tmp_path):
    """A corpus, prompts, names and records that are script: live, reopened, exported."""
    assert jupyter.texts_that_ran(tmp_path, browser) == set()
