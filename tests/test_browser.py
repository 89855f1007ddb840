"""The notebooks in JupyterLab, in a real browser: run them as a person does and look at what is shown.

Screenshots are kept in build/screenshots. Needs Chromium on the machine; skipped where there is none.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from playwright import sync_api

from lmlib.config import PROJECT_ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
SCREENSHOTS = PROJECT_ROOT / "build" / "screenshots"
VIEWPORT = {"width": 1300, "height": 3500}  # JupyterLab draws only what is in view
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def lab(trained, tmp_path_factory):
    """JupyterLab on copies of the notebooks, with the one or two lines changed that a user changes."""
    folder = tmp_path_factory.mktemp("lab")
    for path in (PROJECT_ROOT / "notebooks").glob("*.ipynb"):
        text = path.read_text()
        run_name = "browser" if path.stem == "train" else "trained"
        text = text.replace('recipe = \\"params/quickstart.yaml\\"', 'recipe = \\"params/smoke.yaml\\"')
        text = text.replace('output_dir = \\"outputs\\"', f'output_dir = \\"{trained.output_dir}\\"')
        text = text.replace('run_name = \\"quickstart\\"', f'run_name = \\"{run_name}\\"')
        for name, value in (("total_steps", 3000), ("checkpoint_every", 3000), ("eval_every", 500), ("log_every", 20)):
            text = re.sub(rf'"{name} = \d+ ', f'"{name} = {value} ', text)
        (folder / path.name).write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1"]
    command += ["--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}"]
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(folder / ".config"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".ws")}
    server = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=t", timeout=1).close()
            break
        except OSError:
            time.sleep(0.3)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(20)


@pytest.fixture(scope="module")
def browser():
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def opened(browser, lab, name):
    page = browser.new_page(viewport=VIEWPORT)
    page.goto(f"{lab}/lab/tree/{name}.ipynb?token=t&reset")
    page.wait_for_selector(".jp-NotebookPanel-toolbar", timeout=60_000)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=60_000)
    page.add_style_tag(content=".Toastify { display: none }")  # JupyterLab offers its news
    return page


def run_all(page):
    """By the menu, again if the kernel was not listening yet."""
    for _ in range(5):
        for dialog in page.locator(".jp-Dialog").all():  # a workspace that another page still holds, say
            print(dialog.inner_text())
            dialog.locator(".jp-mod-accept").click()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        try:
            page.wait_for_selector(".jp-CodeCell .jp-InputArea-prompt:text-matches('\\\\[(\\\\*|1)\\\\]:')", timeout=8000)
            return
        except sync_api.TimeoutError:
            continue


def all_ran(page, cells):
    """Until the last code cell has its number."""
    page.wait_for_function(
        "n => [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].filter(e => /\\[\\d+\\]:/.test(e.textContent))"
        ".length >= n",
        arg=cells,
        timeout=180_000,
    )


def photographed(page, name):
    """The whole notebook in one tall picture."""
    bottom = page.evaluate("[...document.querySelectorAll('.jp-Cell')].at(-1).getBoundingClientRect().bottom")
    page.set_viewport_size({"width": 1300, "height": int(bottom) + 60})
    page.wait_for_timeout(1500)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def chart(page):
    """The one saved chart: an image that becomes interactive under the mouse."""
    page.wait_for_selector("img.plot-img", timeout=60_000)
    page.hover("img.plot-img", force=True, no_wait_after=True)
    page.wait_for_selector(".js-plotly-plot .trace", state="attached")
    assert page.locator(".js-plotly-plot").count() == 1


def cell_count(name):
    return len(re.findall(r'"cell_type": "code"', (PROJECT_ROOT / "notebooks" / f"{name}.ipynb").read_text()))


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
