"""JupyterLab in a real browser: started, opened, run and photographed as a person does it, by Playwright.

Needs Chromium on the machine. Used by the tests and by survival.py.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nbformat
from playwright import sync_api

from lmlib.files import PROJECT_ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = PROJECT_ROOT / "build" / "screenshots"
VIEWPORT = {"width": 1300, "height": 3500}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """JupyterLab on `folder`, with none of the user's settings; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1"]
    command += ["--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}"]
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(folder / ".config"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".ws")}
    settings = folder / ".config" / "lab" / "user-settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text('{"windowingMode": "none"}')  # else cells out of view are not in the page, and cannot be counted
    log = folder / ".jupyterlab.log"
    with open(log, "w") as file:
        server = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=t", timeout=1).close()
            break
        except OSError:
            time.sleep(0.3)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)
        print(log.read_text("utf-8", "replace"))  # shown where a test fails


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def copy_notebook(name: str, folder: Path, copy: str | None = None, **parameters: Any):
    """A notebook, under the name `copy`, with lines of its parameters cell changed as a user changes them, and no outputs."""
    book = nbformat.read(PROJECT_ROOT / "notebooks" / f"{name}.ipynb", 4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    for parameter, value in parameters.items():
        cells[0].source, count = re.subn(
            rf"^{parameter} = .*$", lambda _, p=parameter, v=value: f"{p} = {v!r}", cells[0].source, flags=re.MULTILINE
        )
        assert count == 1, parameter
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    nbformat.write(book, folder / f"{copy or name}.ipynb")


def opened(browser: Any, address: str, name: str) -> Any:
    """A page of a browser or context with the notebook, its kernel idle."""
    page = browser.new_page()
    page.set_viewport_size(VIEWPORT)
    for _ in range(3):
        page.goto(f"{address}/lab/tree/{name}.ipynb?token=t&reset")
        page.wait_for_selector(".jp-NotebookPanel-toolbar", timeout=60_000)
        if _settled(page):
            break
    else:
        raise sync_api.TimeoutError(f"{name}.ipynb has no idle kernel after three tries")
    page.add_locator_handler(page.locator(".jp-Dialog"), lambda _: answer_dialogs(page), no_wait_after=True)
    page.add_style_tag(content=".Toastify { display: none }")  # JupyterLab offers its news
    return page


def _settled(page: Any, seconds: float = 40) -> bool:
    """Whether the kernel became idle, and stayed so for two seconds without a question. JupyterLab has been seen to ask for
    a kernel again and again, whatever it is answered."""
    idle, deadline, since = '.jp-Notebook-ExecutionIndicator[data-status="idle"]', time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        asks = answer_dialogs(page)
        since = (since or time.monotonic()) if not asks and page.locator(idle).count() else None
        if since and time.monotonic() - since > 2:
            return True
        page.wait_for_timeout(300)
    return False


def answer_dialogs(page: Any) -> int:
    """Accept what JupyterLab asks when it is slow: which kernel, or a workspace that another page still holds. How many."""
    dialogs = page.locator(".jp-Dialog").all()
    for dialog in dialogs:
        with suppress(sync_api.TimeoutError):  # it went by itself
            print(" ".join(dialog.inner_text(timeout=2000).split()))
            dialog.locator(".jp-mod-accept").click(timeout=2000)
    return len(dialogs)


def run_all(page: Any):
    """By the menu, again if the kernel was not listening yet."""
    for _ in range(5):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        try:
            page.wait_for_selector(".jp-CodeCell .jp-InputArea-prompt:text-matches('\\\\[(\\\\*|1)\\\\]:')", timeout=8000)
            return
        except sync_api.TimeoutError:
            continue
    raise sync_api.TimeoutError("JupyterLab did not start to run the cells")


def all_ran(page: Any, cells: int, seconds: float = 180):
    """Wait until so many code cells have their number; AssertionError if one of them fails."""
    prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')]"
    count = f"{prompts}.filter(e => /\\[\\d+\\]:/.test(e.textContent)).length"
    failures = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
    deadline = time.monotonic() + seconds
    while page.evaluate(count) < cells:
        answer_dialogs(page)
        assert failures.count() == 0, failures.first.inner_text()
        if time.monotonic() > deadline:
            raise sync_api.TimeoutError(f"{page.evaluate(count)} of {cells} cells have run after {seconds} s")
        page.wait_for_timeout(300)
    assert failures.count() == 0, failures.first.inner_text()


def ran(browser: Any, address: str, name: str, copy: str | None = None) -> Any:
    """The page of a notebook, or of its copy under another name, with all cells run.

    Once more, with a word about it, if JupyterLab itself lost the kernel on the way.
    """
    page = opened(browser, address, copy or name)
    try:
        run_all(page)
        all_ran(page, cell_count(name))
    except sync_api.TimeoutError as error:
        print(f"JupyterLab is stuck at {name}: {error}\n{page.inner_text('.jp-Notebook')[-2000:]}")
        page.screenshot(path=SCREENSHOTS / f"stuck_{name}.png")
        page.close()
        page = opened(browser, address, copy or name)
        run_all(page)
        all_ran(page, cell_count(name))
    return page


def photographed(page: Any, name: str):
    """The whole notebook in one tall picture."""
    bottom = page.evaluate("[...document.querySelectorAll('.jp-Cell')].at(-1).getBoundingClientRect().bottom")
    page.set_viewport_size({"width": 1300, "height": int(bottom) + 60})
    page.wait_for_timeout(1500)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def settled(page: Any):
    """Wait until the kernel has had what was done to the widgets: a slider's last value travels behind a button's click."""
    page.wait_for_timeout(400)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=60_000)


def cell_count(name: str) -> int:
    book = nbformat.read(PROJECT_ROOT / "notebooks" / f"{name}.ipynb", 4)
    return sum(cell.cell_type == "code" for cell in book.cells)


# ---------------------------------------------------------------------------------------------------
# Hostile texts in every display

HOSTILE = [0, 1, 2, 3, 4]  # of hostile.TEXTS: script, image, broken script, frame, link


def play(page: Any):
    """Write the playground's prompt in each of its four ways."""
    page.get_by_role("button", name="Generate", exact=True).click()
    page.wait_for_selector(".lmlib-text .token")
    for tab, button, shown in (
        ("Side by side", "Write all", "div > b + .lmlib-text, div > b + style + .lmlib-text"),
        ("Grid", "Fill the grid", "td .lmlib-text"),
        ("Difference", "Compare", "[role=status]:text('likelier')"),
    ):
        page.get_by_role("tab", name=tab).click()
        page.get_by_role("button", name=button, exact=True).click()
        page.wait_for_selector(shown)
        page.get_by_role("button", name="Generate", exact=True).click(trial=True)  # waits for the end


def texts_that_ran(folder: Path, browser: Any) -> set[int]:
    """Which of the texts HOSTILE ran as script, once they stood in every display of every notebook: a corpus made of
    them, prompts, a run's name and records, notebooks live, reopened and exported, and the saved page of curves."""
    import nbconvert
    from hostile import TEXTS, hostile_run

    corpus = folder / "hostile.txt"
    corpus.write_text("\n\n".join(f"{TEXTS[n]} and so on. " * 30 for n in HOSTILE for _ in range(8)))
    run = {"output_dir": str(folder / "outputs"), "run_name": "hostile"}
    others = [hostile_run(TEXTS[n], folder / "outputs").name for n in HOSTILE]
    changes = {"corpus": str(corpus), "validation_fraction": 0.4, "vocab_size": 300, "total_steps": 20, "validation_windows": 4}
    copy_notebook("train", folder, recipe="params/smoke.yaml", **run, **changes)
    copy_notebook("curves", folder, others=others, **run)
    copy_notebook("generate", folder, prompts=[TEXTS[n] for n in HOSTILE], **run)
    short = {"rate_recipe": "params/smoke.yaml", "rate_steps": 20, "confirm_steps": 0}
    copy_notebook("compare", folder, output_dir=run["output_dir"], **short)
    copy_notebook("audit", folder, leaky_dir=str(folder / "none"), **run)
    acted: set[int] = set()

    def watched(page: Any) -> Any:
        page.on("console", lambda message: acted.add(int(message.text[6:])) if message.text.startswith("owned ") else None)
        page.on("dialog", lambda dialog: dialog.dismiss())
        return page

    with jupyterlab(folder) as address:
        context = browser.new_context()
        context.add_init_script("window.owned = n => console.log('owned ' + n)")
        context.on("page", watched)
        for name in ("train", "curves", "generate", "compare", "audit"):
            page = ran(context, address, name)
            text = page.inner_text(".jp-Notebook")
            assert "owned(" in text and "Traceback" not in text, text[-3000:]
            if name == "generate":
                play(page)
            if name == "curves":
                for tab in ("By position", "Cost", "Experts", "Texts"):
                    page.get_by_role("tab", name=tab).click()
                    page.wait_for_timeout(500)
            page.wait_for_timeout(1000)
            photographed(page, f"hostile_{name}")
            page.keyboard.press("Control+s")
            page.wait_for_timeout(2000)
            page.close()
            page = opened(context, address, name)  # as saved
            page.wait_for_timeout(1500)
            page.close()
            saved = nbformat.read(folder / f"{name}.ipynb", 4)
            assert "owned(" in json.dumps([cell.get("outputs") for cell in saved.cells])
            (folder / f"{name}.html").write_text(nbconvert.HTMLExporter().from_notebook_node(saved)[0])
        for file in [*folder.glob("*.html"), *folder.glob("outputs/*/*.html")]:
            page = context.new_page()
            page.goto(file.as_uri())
            page.wait_for_timeout(1500)
            page.close()
        page = context.new_page()
        page.set_content("<img src=x onerror=owned(99)>")  # the alarm itself works
        page.wait_for_timeout(500)
    assert 99 in acted
    return acted - {99}
