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


def test_the_playground_writes_stops_continues_and_compares(browser, lab):
    """Sliders by keyboard and mouse, every button, and what goes wrong said where the person is looking."""
    page = opened(browser, lab, "generate")
    run_all(page)
    all_ran(page, cell_count("generate"))
    status, text = page.locator("[role=status]"), page.locator(".lmlib-text").first
    button = lambda name: page.get_by_role("button", name=name, exact=True)  # noqa: E731

    def slider(name):
        return page.locator(".widget-inline-hbox", has=page.get_by_text(name, exact=True)).first

    def done():
        page.wait_for_function(
            "/reached|ended it|stop string|full|likelier/.test(document.querySelector('[role=status]').textContent)"
        )

    button("Generate").click()
    done()
    assert "100 tokens" in status.inner_text() and text.inner_text().startswith("**HAMLET**")
    first = text.inner_text()
    assert page.locator(".lmlib-text .token").count() == 32  # those with half the window of 64 before them
    page.locator(".lmlib-text .token").nth(3).hover()
    assert "rank" in page.locator(".lmlib-text .token").nth(3).get_attribute("data-tip")
    page.screenshot(path=SCREENSHOTS / "playground_hover.png")

    handle = slider("temperature").locator(".noUi-handle")
    handle.focus()
    for _ in range(40):
        page.keyboard.press("ArrowLeft")
    assert slider("temperature").locator(".widget-readout").inner_text() == "0.00"
    box = slider("length").locator(".noUi-handle").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 30, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    length = int(slider("length").locator(".widget-readout").inner_text())
    assert length < 100
    button("Generate").click()
    page.wait_for_function(f"document.querySelector('[role=status]').textContent.includes('{length} tokens')")
    assert text.inner_text() != first
    shaded = text.inner_html()

    checkpoints = slider("checkpoint")
    assert checkpoints.locator(".widget-readout").inner_text() == "step 20"
    checkpoints.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("[...document.querySelectorAll('.widget-readout')].some(e => e.textContent === 'step 15')")
    button("Generate").click()
    changed = (
        "before => document.querySelector('.lmlib-text').innerHTML !== before && document.querySelector('.lmlib-text .token')"
    )
    page.wait_for_function(changed, arg=shaded)  # another checkpoint thinks something else
    page.wait_for_timeout(500)
    before = len(text.inner_text())
    button("Continue").click()
    page.wait_for_function(f"document.querySelector('.lmlib-text').innerText.length > {before + length // 2}")
    page.wait_for_timeout(500)
    shaded = text.inner_html()
    button("Another seed").click()
    page.wait_for_function(changed, arg=shaded)

    slider("length").locator(".noUi-handle").focus()
    page.keyboard.press("End")
    for _ in range(5):  # the model is so quick that Stop may come too late
        button("Generate").click()
        page.evaluate(
            """() => { const stop = [...document.querySelectorAll('button')].find(b => b.textContent === 'Stop')
            const timer = setInterval(() => { if (!stop.disabled) { stop.click(); clearInterval(timer) } }, 5) }"""
        )
        page.wait_for_function("!/^…|^$/.test(document.querySelector('[role=status]').textContent)")
        button("Generate").click(trial=True)  # waits until it is enabled again
        if "500 tokens" not in status.inner_text():
            break
    assert "500 tokens" not in status.inner_text() and "reached" not in status.inner_text()
    slider("length").locator(".noUi-handle").focus()
    page.keyboard.press("Home")

    area = page.locator(".jp-OutputArea textarea").first
    area.fill("x " * 60000)
    button("Generate").click()
    page.wait_for_function("document.querySelector('[role=status]').textContent.includes('shorten the prompt')")
    area.fill("<img src=x onerror=alert(1)>")
    button("Generate").click()
    done()
    assert "<img src=x" in text.inner_text()

    page.get_by_role("tab", name="Side by side").click()
    button("Add these settings").click()
    button("Add these settings").click()
    button("Write all").click()
    done()
    page.wait_for_timeout(1500)
    page.screenshot(path=SCREENSHOTS / "playground_beside.png")
    page.get_by_role("tab", name="Grid").click()
    button("Fill the grid").click()
    page.wait_for_function("document.querySelectorAll('td .lmlib-text').length === 8")
    done()
    page.wait_for_timeout(1500)
    page.screenshot(path=SCREENSHOTS / "playground_grid.png")
    page.get_by_role("tab", name="Difference").click()
    button("Compare").click()
    page.wait_for_function("document.querySelector('[role=status]').textContent.includes('likelier')")
    page.screenshot(path=SCREENSHOTS / "playground_difference.png")
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
