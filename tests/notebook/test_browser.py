"""The notebooks in JupyterLab in a real browser, run as a person runs them.

Screenshots are written to build/screenshots. Skipped on a machine without Chromium.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import browser as jupyter
import pytest
from browser import (
    SCREENSHOTS,
    VIEWPORT,
    all_ran,
    cell_count,
    opened,
    photographed,
    ran,
    run_all,
    saved,
    settled,
)
from playwright import sync_api
from process import processes_of

from lmlib.checkpoint import checkpoint_steps
from lmlib.files import PROJECT_ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(jupyter.CHROMIUM is None, reason="no Chromium on this machine"),
]

# The number of points of the longest curve on the page.
LONGEST = "Math.max(0, ...[...document.querySelectorAll('.js-plotly-plot')].flatMap(p => p.calcdata.map(d => d.length)))"


@pytest.fixture(scope="module")
def lab_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def lab(trained, lab_folder):
    """JupyterLab on copies of the notebooks, with parameters changed as a user changes them."""
    folder = lab_folder
    shutil.copytree(trained.run_dir, folder / "outputs" / "trained")
    jupyter.copy_notebook("index", folder, output_dir=str(folder / "outputs"))
    steps = {"total_steps": 3000, "checkpoint_every": 3000, "eval_every": 500, "log_every": 20}
    run = {"output_dir": str(trained.output_dir)}
    jupyter.copy_notebook(
        "train", folder, recipe="params/smoke.yaml", run_name="browser", **run, **steps
    )
    endless = {**steps, "total_steps": 1_000_000, "checkpoint_every": 1_000_000}
    jupyter.copy_notebook(
        "train", folder, "stop", recipe="params/smoke.yaml", run_name="stop", **run, **endless
    )
    endless["processes"] = 2
    jupyter.copy_notebook(
        "train",
        folder,
        "together",
        recipe="params/smoke.yaml",
        run_name="together",
        **run,
        **endless,
    )
    for name in ("curves", "generate"):
        jupyter.copy_notebook(name, folder, run_name="trained", **run)
    jupyter.copy_notebook(
        "curves", folder, "follow", run_name="trained", others=["followed"], **run
    )
    short = {"rate_recipe": "params/smoke.yaml", "rate_steps": 20, "confirm_steps": 0}
    jupyter.copy_notebook("compare", folder, output_dir=str(folder / "outputs"))
    jupyter.copy_notebook("compare", folder, "no_sweep", output_dir=str(folder / "none"))
    jupyter.copy_notebook("learning_rate", folder, output_dir=str(trained.output_dir), **short)
    jupyter.copy_notebook(
        "audit", folder, run_name="trained", leaky_dir=str(folder / "none"), **run
    )
    with jupyter.jupyterlab(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with jupyter.chromium() as chromium:
        yield chromium


@pytest.fixture
def other_run(trained):
    """A run beside the trained one, with the checkpoints of steps 5 and 10."""
    other = shutil.copytree(trained.run_dir, trained.run_dir.parent / "other")
    for step in (15, 20):
        shutil.rmtree(other / "checkpoints" / f"checkpoint_step_{step}")
    yield other
    shutil.rmtree(other)


def check_chart(page):
    """Check the one saved chart: an image that becomes interactive when the mouse hovers over it."""
    page.wait_for_selector("img.plot-img", timeout=60_000)
    page.hover("img.plot-img", force=True, no_wait_after=True)
    page.wait_for_selector(".js-plotly-plot .trace", state="attached")
    assert page.locator(".js-plotly-plot").count() == 1


def test_train_shows_a_live_chart_that_grows_and_stays(browser, lab):
    page = opened(browser, lab, "train")
    run_all(page)
    live = page.locator(".lmlib-live .js-plotly-plot .main-svg").first
    live.wait_for(timeout=120_000)
    sync_api.expect(page.locator(".lmlib-head .state")).to_have_text("running")
    assert "Closed this page? curves.ipynb follows this run" in page.inner_text(".lmlib-head")
    size = live.bounding_box()

    first = page.evaluate(LONGEST)
    page.wait_for_function(f"{LONGEST} > {first}", timeout=60_000)
    page.screenshot(path=SCREENSHOTS / "train_live.png")
    all_ran(page, cell_count("train"))
    image = page.locator("img.plot-img").bounding_box()
    assert (image["width"], image["height"]) == (size["width"], size["height"])
    sync_api.expect(page.locator(".lmlib-head .state")).to_have_text("finished")
    assert "3,000 / 3,000" in page.inner_text(".lmlib-head")
    assert "Next: curves.ipynb" in page.inner_text(".jp-Notebook")
    check_chart(page)
    assert page.evaluate(LONGEST) == 150
    page.get_by_text("Log: the last").click()
    text = page.inner_text(".jp-Notebook")
    assert (
        "Step 3000/3000: Loss=" in text and "validation loss" in text and "Once upon a time" in text
    )
    assert "Traceback" not in text
    photographed(page, "train")

    with page.expect_response(lambda r: r.request.method == "PUT" and "/api/contents/" in r.url):
        page.keyboard.press("Control+s")
    page.close()
    again = browser.new_page(viewport=VIEWPORT)  # reopened without running: the chart is there
    again.goto(f"{lab}/lab/tree/train.ipynb?token=t&reset")
    check_chart(again)
    sync_api.expect(again.locator(".lmlib-head .state")).to_have_text("finished")
    again.close()


def test_a_stop_is_calm_and_a_page_closed_during_the_run_shows_its_chart(browser, lab):
    page = opened(browser, lab, "stop")
    run_all(page)
    page.locator(".lmlib-live .js-plotly-plot .main-svg").first.wait_for(timeout=120_000)
    saved(page)
    again = browser.new_page(viewport=VIEWPORT)  # the kernel is busy, so the widget is lost
    again.goto(f"{lab}/lab/tree/stop.ipynb?token=t&reset")
    again.locator("img.plot-img").wait_for(timeout=60_000)
    sync_api.expect(again.get_by_text("Loading widget...")).to_have_count(1)
    sync_api.expect(again.get_by_text("Loading widget...")).to_be_hidden()
    again.screenshot(path=SCREENSHOTS / "train_reopened.png")
    again.close()

    page.locator('.jp-NotebookPanel-toolbar [data-command="notebook:interrupt-kernel"]').click()
    head = page.locator(".lmlib-head")
    sync_api.expect(head.locator(".state")).to_have_text("stopped", timeout=60_000)
    line = r"Stopped at step [\d,]+ of 1,000,000\. Saved\. Run the cells again to resume\."
    assert re.search(line, head.inner_text())
    all_ran(page, cell_count("train"))  # no cell shows an error: they run on what is saved
    page.locator("img.plot-img").wait_for()
    text = page.inner_text(".jp-Notebook")
    assert "Traceback" not in text and "Once upon a time" in text
    page.screenshot(path=SCREENSHOTS / "train_stopped.png")
    page.close()


def test_a_chart_follows_two_processes_and_stopping_it_stops_both(browser, lab, trained):
    page = opened(browser, lab, "together")
    run_all(page)
    page.locator(".lmlib-live .js-plotly-plot .main-svg").first.wait_for(timeout=120_000)
    first = page.evaluate(LONGEST)
    page.wait_for_function(f"{LONGEST} > {first}", timeout=60_000)
    sync_api.expect(page.locator(".lmlib-head .state")).to_have_text("running")
    assert "2 processes train, all on the CPU." in page.inner_text(".jp-Notebook")
    page.screenshot(path=SCREENSHOTS / "train_together.png")
    page.locator('.jp-NotebookPanel-toolbar [data-command="notebook:interrupt-kernel"]').click()
    head = page.locator(".lmlib-head")
    sync_api.expect(head.locator(".state")).to_have_text("stopped", timeout=60_000)
    assert checkpoint_steps(Path(trained.output_dir) / "together")
    all_ran(page, cell_count("train"))
    assert "Traceback" not in page.inner_text(".jp-Notebook")
    assert not [line for line in processes_of(trained.output_dir) if "lmlib train" in line]
    page.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("curves", "validation loss"),
        ("generate", "Once upon a time"),
        ("compare", "There is nothing to compare: trained"),
        ("learning_rate", "Suggested:"),
        ("audit", "trained: no leak found; all 11 checks passed."),
    ],
)
def test_the_other_notebooks_show_their_results(browser, lab, name, words):
    page = ran(browser, lab, name)
    shown = "words => document.querySelector('.jp-Notebook').innerText.includes(words)"
    page.wait_for_function(shown, arg=words)
    photographed(page, name)
    assert "Traceback" not in page.inner_text(".jp-Notebook")
    page.close()


def test_the_playground_generates_stops_continues_and_compares(browser, lab, other_run):
    """Sliders by keyboard and mouse, every button, and errors in the status line."""
    page = ran(browser, lab, "generate")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    status, text = page.locator("[role=status]"), page.locator(".lmlib-text").first
    button = lambda name: page.get_by_role("button", name=name, exact=True)  # noqa: E731

    def slider(name):
        return page.locator(".widget-inline-hbox", has=page.get_by_text(name, exact=True)).first

    def press(name):
        """Click a button that starts a job, and wait until the job has ended."""
        page.evaluate("document.querySelector('[role=status]')?.setAttribute('data-old', '')")
        button(name).click()
        page.wait_for_function(
            """() => {
            const line = document.querySelector('[role=status]:not([data-old])')
            const buttons = [...document.querySelectorAll('button')]
            const generate = buttons.find(button => button.textContent === 'Generate')
            return line && line.textContent !== '…' && generate }"""
        )

    button("Generate").wait_for()  # a first text is there without a click
    page.locator(".lmlib-text .token").first.wait_for()
    assert "100 tokens" in status.inner_text() and text.inner_text().startswith("**HAMLET**")
    first = text.inner_text()
    press("Generate")
    assert text.inner_text() == first
    button("Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == first.replace("↵\n", "\n").removesuffix("↵") and len(copied) > 100
    # Only tokens with half of the context window of 64 before them are scored.
    assert page.locator(".lmlib-text .token").count() == 32
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
    settled(page)
    length = int(slider("length").locator(".widget-readout").inner_text())
    assert length < 100
    press("Generate")
    assert f"{length} tokens" in status.inner_text() and text.inner_text() != first
    shaded = text.inner_html()

    checkpoints = slider("checkpoint")
    assert checkpoints.locator(".widget-readout").inner_text() == "step 20"
    checkpoints.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        "[...document.querySelectorAll('.widget-readout')].some(e => e.textContent === 'step 15')"
    )
    settled(page)
    press("Generate")
    assert text.inner_html() != shaded  # another checkpoint, other probabilities
    before = len(text.inner_text())
    press("Continue")
    assert len(text.inner_text()) > before + length // 2
    shaded = text.inner_html()
    press("Another seed")
    assert text.inner_html() != shaded and page.locator(".lmlib-text .token").count()

    slider("length").locator(".noUi-handle").focus()
    page.keyboard.press("End")
    settled(page)
    assert slider("length").locator(".widget-readout").inner_text() == "500"
    for _ in range(5):  # this model is so fast that Stop may come too late
        page.evaluate(
            """async () => { const button = name => [...document.querySelectorAll('button')].find(b => b.textContent === name)
            const until = async holds => { while (!holds()) await new Promise(done => setTimeout(done, 5)) }
            button('Generate').click()
            await until(() => button('Stop'))
            button('Stop').click()
            await until(() => button('Generate')) }"""
        )
        if "500 tokens" not in status.inner_text():
            break
    line = status.inner_text()
    assert "; stopped" in line and "500 tokens" not in line and "reached" not in line
    slider("length").locator(".noUi-handle").focus()
    page.keyboard.press("Home")
    settled(page)

    area = page.locator(".jp-OutputArea textarea").first
    area.fill("x " * 60000)
    settled(page)
    press("Generate")
    assert "shorten the prompt" in status.inner_text()
    area.fill("<img src=x onerror=alert(1)>")
    settled(page)
    executions = page.locator(".jp-CodeCell .jp-InputArea-prompt").all_inner_texts()
    area.press("Control+Enter")
    text.get_by_text("<img src=x").first.wait_for()
    button("Generate").wait_for()
    assert page.locator(".jp-CodeCell .jp-InputArea-prompt").all_inner_texts() == executions

    assert page.get_by_text("min-p", exact=True).is_hidden()
    button("More").click()
    page.get_by_text("min-p", exact=True).wait_for()
    page.get_by_role("tab", name="Side by side").click()
    page.get_by_text("Compare settings: add the checkpoint").wait_for()
    button("Add these settings").click()
    button("Add these settings").click()
    press("Generate all")
    assert page.locator(".lmlib-text").filter(visible=True).count() == 2
    page.screenshot(path=SCREENSHOTS / "playground_side_by_side.png")
    page.get_by_role("tab", name="Grid").click()
    press("Fill the grid")
    assert page.locator("td .lmlib-text").count() == 8
    page.screenshot(path=SCREENSHOTS / "playground_grid.png")
    page.get_by_role("tab", name="Difference").click()
    press("Compare")
    assert "likelier" in status.inner_text()
    page.screenshot(path=SCREENSHOTS / "playground_difference.png")
    page.get_by_role("tab", name="Tokens").click()
    area.fill("My lord")
    menu = page.get_by_label("run", exact=True)
    menu.select_option(menu.locator("option", has_text="other ·").get_attribute("value"))
    text.get_by_text("My lord").first.wait_for()
    assert checkpoints.locator(".widget-readout").inner_text() == "step 10"
    page.close()


def test_the_explorer_controls_curves_and_follows_a_run_until_it_is_killed(
    browser, lab, trained, tmp_path
):
    """Every control of the explorer, on a run that another process trains and that is killed."""
    pairs = {
        "output_dir": trained.output_dir,
        "run_name": "followed",
        "total_steps": 10**6,
        "eval_every": 200,
        "checkpoint_every": 10**6,
    }
    command = [
        sys.executable,
        "-m",
        "lmlib",
        "train",
        str(PROJECT_ROOT / "params" / "smoke.yaml"),
        "-p",
        "log_every",
        "50",
    ]
    command += [word for name, value in pairs.items() for word in ("-p", name, str(value))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while "Val Loss" not in process.stdout.readline():
            pass
        page = ran(browser, lab, "curves", copy="follow")
        explorer = page.locator(
            ".jp-OutputArea", has=page.get_by_text("smoothing", exact=True)
        ).first
        explorer.get_by_text("running | step ").wait_for()
        points = "document.querySelector('.js-plotly-plot').data.find(t => t.name.startsWith('followed, validation')).x.length"
        before = page.evaluate(points)
        page.wait_for_function(f"{points} > {before}", timeout=60_000)
        process.kill()
    explorer.get_by_text("died | step ").wait_for(timeout=60_000)
    page.screenshot(path=SCREENSHOTS / "explorer.png")
    assert process.returncode == -signal.SIGKILL

    page.get_by_label("log loss").click()
    page.wait_for_function("document.querySelector('.js-plotly-plot').layout.yaxis.type === 'log'")
    explorer.get_by_label("followed").click()
    page.wait_for_function(
        "document.querySelector('.js-plotly-plot').data.some(t => t.visible === false)"
    )
    hidden = "document.querySelector('.js-plotly-plot').data.filter(t => t.visible === false).map(t => t.legendgroup)"
    assert set(page.evaluate(hidden)) == {"followed"}
    explorer.locator("select").first.select_option("tokens trained")
    page.wait_for_function(
        """Object.values(document.querySelector('.js-plotly-plot').layout)
        .some(axis => axis?.title?.text === 'tokens trained')"""
    )
    explorer.get_by_label("followed").click()  # Cost compares two runs
    page.get_by_role("tab", name="Texts").click()
    page.get_by_text("trained, step 20").first.wait_for()
    page.screenshot(path=SCREENSHOTS / "explorer_texts.png")
    assert page.get_by_role("tab", name="Experts").count() == 0
    for tab in ("By position", "Cost"):
        page.get_by_role("tab", name=tab).click()
        explorer.locator(".js-plotly-plot:visible .main-svg").first.wait_for()
        page.screenshot(path=SCREENSHOTS / f"explorer_{tab.replace(' ', '_').lower()}.png")
    page.close()


def reloaded(page, selector):
    """Reload a page until it has an element; JupyterLab may stay at its splash on a busy machine."""
    for _ in range(3):
        page.reload()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            jupyter.answer_dialogs(page)
            if page.locator(selector).count():
                return
            page.wait_for_timeout(200)
    page.screenshot(path=SCREENSHOTS / "reload_failed.png")
    raise AssertionError(f"no {selector} after three reloads")


def test_the_explorer_fits_a_narrow_page_and_survives_a_reload(browser, lab, trained):
    """Runs are chosen from the list; the charts of a reloaded page agree with its controls."""
    for name in ("second", "third"):
        copy = trained.run_dir.parent / "more" / name
        shutil.copytree(trained.run_dir, copy, ignore=shutil.ignore_patterns("checkpoints"))
    environment = trained.run_dir.parent / "more" / "third" / "environment.json"
    found = json.loads(environment.read_text())
    found["data"]["tokenizer"] = "another"
    environment.write_text(json.dumps(found))
    page = ran(browser, lab, "curves")  # again, in the kernel of another test
    page.set_viewport_size({"width": 1000, "height": 900})
    chart = "document.querySelector('.js-plotly-plot')"
    runs = f"{chart}.data.filter(t => t.visible !== false).map(t => t.legendgroup)"

    page.get_by_placeholder("a part of a name").fill("MORE finished")
    page.get_by_label("more/second").click()
    page.wait_for_function(f"{runs}.includes('second')")
    page.get_by_label("more/third").click()
    warning = page.locator(".jp-OutputArea b", has_text="These runs differ in tokenizer")
    warning.wait_for()
    page.wait_for_function(f"{runs}.includes('third')")
    page.get_by_label("more/third").click()
    page.wait_for_function(f"!{runs}.includes('third')")
    warning.wait_for(state="detached")
    page.get_by_label("log loss").click()
    page.wait_for_function(f"{chart}.layout.yaxis.type === 'log'")
    page.screenshot(path=SCREENSHOTS / "explorer_narrow.png")
    too_wide = """[...document.querySelectorAll('.jp-OutputArea-output')].filter(
        e => e.querySelector('.noUi-handle')).flatMap(output => [output, ...output.querySelectorAll('*')]
        .filter(e => !e.closest('svg, .noUi-target') && e.clientWidth && e.scrollWidth > e.clientWidth + 1
            && !['INPUT', 'SELECT'].includes(e.tagName)).map(e => e.className + ' ' + e.scrollWidth))"""
    assert page.evaluate(too_wide) == []
    page.wait_for_function(f"{chart}._fullLayout.width <= {chart}.parentElement.clientWidth")
    assert page.locator(".noUi-target").first.bounding_box()["width"] >= 120
    page.get_by_role("tab", name="Cost").click()  # drawn while it was hidden
    page.wait_for_function(
        """[...document.querySelectorAll('.widget-tab .js-plotly-plot')].filter(p => p.clientWidth)
        .every(p => Math.abs(p._fullLayout.width - p.clientWidth) <= 1)"""
    )

    jupyter.saved(page)
    reloaded(page, ".js-plotly-plot .trace")
    page.wait_for_function(f"{chart}.layout.yaxis.type === 'log'")
    assert set(page.evaluate(runs)) == {"trained", "second"}
    assert page.get_by_label("log loss").is_checked()
    assert page.get_by_label("more/second").is_checked()
    assert not page.get_by_label("more/third").is_checked()
    page.get_by_label("log loss").click()
    page.wait_for_function(f"{chart}.layout.yaxis.type === 'linear'")
    page.close()
    shutil.rmtree(trained.run_dir.parent / "more")


def test_compare_without_a_sweep_says_what_to_run_and_trains_nothing(browser, lab):
    page = opened(browser, lab, "no_sweep")
    run_all(page)
    error = page.locator('[data-mime-type="application/vnd.jupyter.stderr"]')
    error.wait_for()
    shown = error.inner_text().strip()
    assert shown.count("\n") == 0 and "lmlib sweep params/exp8_small/*.yaml" in shown
    assert "about a quarter of an hour" in shown
    settled(page)
    assert page.locator(".jp-OutputArea-output").count() == 1
    page.close()


def test_the_saved_curves_open_without_a_network(browser, trained):
    from lmlib.analysis import figures

    copy = trained.run_dir.parent / "page"
    shutil.copytree(trained.run_dir, copy, ignore=shutil.ignore_patterns("checkpoints"))
    figures.save_curves(copy)
    page = browser.new_page()
    page.context.set_offline(True)
    page.goto((copy / "training_curves.html").as_uri())
    page.wait_for_selector(".js-plotly-plot .trace", state="attached")
    page.screenshot(path=SCREENSHOTS / "page.png")
    shutil.rmtree(copy)
    page.close()


def test_malicious_texts_stay_text_in_every_display(browser, tmp_path):
    """Scripts in a corpus, prompts, names and records: live, reopened and exported."""
    assert jupyter.texts_that_ran(tmp_path, browser) == set()


def test_opening_and_saving_a_notebook_changes_no_byte(browser, lab_folder, lab):
    """Else opening one would show up in `git status`, and conflict with the next `git pull`."""
    committed = PROJECT_ROOT / "notebooks" / "curves.ipynb"
    copy = lab_folder / "kept.ipynb"
    shutil.copy(committed, copy)
    page, before = opened(browser, lab, "kept"), copy.stat().st_mtime_ns
    page.locator("[data-command='docmanager:save']").first.click()
    for _ in range(300):  # until the file is written, to its last byte
        if copy.stat().st_mtime_ns != before and copy.read_bytes().endswith(b"}\n"):
            break
        page.wait_for_timeout(100)
    else:
        raise AssertionError("JupyterLab did not save")
    assert copy.read_bytes() == committed.read_bytes()


def test_the_start_page_opens_a_notebook_on_the_run(browser, lab):
    page = opened(browser, lab, "index")
    run_all(page)
    all_ran(page, cell_count("index"))
    row = page.locator("table tr", has_text="trained").first
    row.get_by_text("curves", exact=True).click()
    page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook >> text=trained")
    page.screenshot(path=SCREENSHOTS / "index_opens_curves.png")
