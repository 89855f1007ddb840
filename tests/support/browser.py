"""JupyterLab in a real browser, started, opened and run as a person does it, by Playwright.

Needs Chromium on the machine. The tests and survival.py use it.
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

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
SCREENSHOTS = PROJECT_ROOT / "build" / "screenshots"
VIEWPORT = {"width": 1300, "height": 3500}
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
IDLE = '.jp-Notebook-ExecutionIndicator[data-status="idle"]'
ERROR = '[data-mime-type="application/vnd.jupyter.error"]'
# Two frames: layout and paint of everything before have happened.
PAINTED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


@contextmanager
def jupyterlab(folder: Path, app: str = "lab") -> Iterator[str]:
    """Serve `folder` with JupyterLab, or with Notebook if `app` is "notebook"; yields its address.

    The user's settings are left out.
    """
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyter", app, "--no-browser", "--allow-root"]
    command += [f"--port={port}", "--ip=127.0.0.1", "--IdentityProvider.token=t"]
    command += [f"--ServerApp.root_dir={folder}"]
    config, workspaces = folder / ".config", folder / ".workspaces"
    env = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(config),
        "JUPYTERLAB_WORKSPACES_DIR": str(workspaces),
    }
    plugin = config / "lab" / "user-settings" / "@jupyterlab" / "notebook-extension"
    plugin.mkdir(parents=True, exist_ok=True)
    # Otherwise cells out of view are not in the page, and cannot be counted.
    (plugin / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    log = folder / ".jupyterlab.log"
    with open(log, "w") as file:
        server = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for_server(f"{address}/api?token=t")
        yield address
    finally:
        server.terminate()
        server.wait(20)
        print(log.read_text("utf-8", "replace"))  # shown where a test fails


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for_server(url: str, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a headless browser."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def copy_notebook(name: str, folder: Path, copy: str | None = None, **parameters: Any):
    """Copy a notebook without its outputs, with lines of its parameters cell changed.

    Args:
        copy: another name for the copy.
    """
    book = nbformat.read(PROJECT_ROOT / "notebooks" / f"{name}.ipynb", 4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    for parameter, value in parameters.items():
        line, pattern = f"{parameter} = {value!r}", re.compile(rf"^{parameter} = .*$", re.MULTILINE)
        cells[0].source, count = pattern.subn(lambda _, line=line: line, cells[0].source)
        assert count == 1, parameter
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    nbformat.write(book, folder / f"{copy or name}.ipynb")


def opened(browser: Any, address: str, name: str) -> Any:
    """Open a notebook in a new page of a browser or context, and wait until its kernel is idle."""
    page = browser.new_page()
    page.set_viewport_size(VIEWPORT)
    for _ in range(3):
        page.goto(f"{address}/lab/tree/{name}.ipynb?token=t&reset")
        page.wait_for_selector(".jp-NotebookPanel-toolbar", timeout=60_000)
        if kernel_is_ready(page):
            break
    else:
        raise sync_api.TimeoutError(f"{name}.ipynb has no idle kernel after three tries")
    dialogs = page.locator(".jp-Dialog")
    page.add_locator_handler(dialogs, lambda _: answer_dialogs(page), no_wait_after=True)
    page.add_style_tag(content=".Toastify { display: none }")  # JupyterLab offers its news
    return page


def kernel_is_ready(page: Any, seconds: float = 40) -> bool:
    """Wait until the kernel is idle and stays so for two seconds without a dialog.

    Time is part of this state: JupyterLab may ask for a kernel again after it was answered.
    """
    deadline, idle_since = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        is_idle = not answer_dialogs(page) and page.locator(IDLE).count()
        idle_since = (idle_since or time.monotonic()) if is_idle else None
        if idle_since and time.monotonic() - idle_since > 2:
            return True
        page.wait_for_timeout(300)
    return False


def answer_dialogs(page: Any) -> int:
    """Accept JupyterLab's dialogs: which kernel, or a workspace in use. Returns their number."""
    dialogs = page.locator(".jp-Dialog").all()
    for dialog in dialogs:
        with suppress(sync_api.TimeoutError):  # it has closed in the meantime
            print(" ".join(dialog.inner_text(timeout=2000).split()))
            dialog.locator(".jp-mod-accept").click(timeout=2000)
    return len(dialogs)


def run_all(page: Any):
    """Run all cells from the menu, again if the kernel was not listening yet."""
    started = ".jp-CodeCell .jp-InputArea-prompt:text-matches('\\\\[(\\\\*|1)\\\\]:')"
    for _ in range(5):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        with suppress(sync_api.TimeoutError):
            page.wait_for_selector(started, timeout=8000)
            return
    raise sync_api.TimeoutError("JupyterLab did not start to run the cells")


def all_ran(page: Any, cells: int, seconds: float = 180):
    """Wait until `cells` code cells have run; AssertionError if one of them fails."""
    prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')]"
    count = f"{prompts}.filter(e => /\\[\\d+\\]:/.test(e.textContent)).length"
    failures = page.locator(ERROR)
    deadline = time.monotonic() + seconds
    while page.evaluate(count) < cells:
        answer_dialogs(page)
        assert failures.count() == 0, failures.first.inner_text()
        if time.monotonic() > deadline:
            done = page.evaluate(count)
            raise sync_api.TimeoutError(f"{done} of {cells} cells have run after {seconds} s")
        page.wait_for_timeout(300)
    assert failures.count() == 0, failures.first.inner_text()


def ran(browser: Any, address: str, name: str, copy: str | None = None) -> Any:
    """Open a notebook, or its copy under another name, and run all cells; returns the page.

    Tries once more, and prints why, if JupyterLab itself lost the kernel on the way.
    """
    page = opened(browser, address, copy or name)
    try:
        run_all(page)
        all_ran(page, cell_count(name))
    except sync_api.TimeoutError as error:
        text = page.inner_text(".jp-Notebook")[-2000:]
        print(f"JupyterLab is stuck at {name}: {error}\n{text}")
        page.screenshot(path=SCREENSHOTS / f"stuck_{name}.png")
        page.close()
        page = opened(browser, address, copy or name)
        run_all(page)
        all_ran(page, cell_count(name))
    return page


def photographed(page: Any, name: str):
    """Take one tall screenshot of the whole notebook."""
    last = "[...document.querySelectorAll('.jp-Cell')].at(-1)"
    bottom = page.evaluate(f"{last}.getBoundingClientRect().bottom")
    page.set_viewport_size({"width": VIEWPORT["width"], "height": int(bottom) + 60})
    page.evaluate(PAINTED)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def settled(page: Any):
    """Wait until the kernel has received all changes of the widgets: idle for 400 ms on end.

    A single idle moment is not enough. JupyterLab sends a slider's last value only once the kernel
    has answered the one before, and nothing on the page shows that a value is waiting.
    """
    page.evaluate(
        """async idle => {
        const pause = () => new Promise(done => setTimeout(done, 20))
        const isIdle = () => document.querySelector(idle) !== null
        for (let since = Date.now(); Date.now() - since < 400; await pause()) {
            if (!isIdle()) since = Date.now()
        } }""",
        IDLE,
    )


def saved(page: Any):
    """Save the notebook, and wait until the server has it."""
    with page.expect_response(lambda r: r.request.method == "PUT" and "/api/contents/" in r.url):
        page.keyboard.press("Control+s")


def cell_count(name: str) -> int:
    book = nbformat.read(PROJECT_ROOT / "notebooks" / f"{name}.ipynb", 4)
    return sum(cell.cell_type == "code" for cell in book.cells)


# ---------------------------------------------------------------------------------------------
# Hostile texts in every display

HOSTILE = [0, 1, 2, 3, 4]  # of hostile.TEXTS: script, image, broken script, frame, link
ALARM = 99  # a number of no text: planted as the last script of each page, and it must run


def use_playground(page: Any):
    """Generate from the playground's prompt in each of its four ways."""
    page.get_by_role("button", name="Generate", exact=True).click()
    page.wait_for_selector(".lmlib-text .token")
    for tab, button, shown in (
        ("Side by side", "Generate all", "div > b + .lmlib-text, div > b + style + .lmlib-text"),
        ("Grid", "Fill the grid", "td .lmlib-text"),
        ("Difference", "Compare", "[role=status]:text('likelier')"),
    ):
        page.get_by_role("tab", name=tab).click()
        page.get_by_role("button", name=button, exact=True).click()
        page.wait_for_selector(shown)
        page.get_by_role("button", name="Generate", exact=True).click(trial=True)  # it has ended


def use_explorer(page: Any):
    """Open each tab of the explorer."""
    for tab in ("By position", "Cost", "Experts"):  # of hostile runs, which have experts
        page.get_by_role("tab", name=tab).click()
        page.locator(".js-plotly-plot:visible .main-svg").first.wait_for()
    page.get_by_role("tab", name="Texts").click()
    page.locator(".lmlib-text:visible").first.wait_for()


def sound_alarm(page: Any):
    """Wait until every script in the page has had its chance to run.

    Images and frames are loaded first. Then a script is planted and must be heard, which also shows
    that this page would let the hostile texts act.
    """
    page.wait_for_function("[...document.images].every(image => image.complete)")
    for frame in page.frames:
        frame.wait_for_load_state()
    plant = f"document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=owned({ALARM})>')"
    with page.expect_console_message(lambda message: message.text == f"owned {ALARM}"):
        page.evaluate(plant)


def copy_hostile_notebooks(folder: Path):
    """Copy all notebooks, with hostile texts as corpus, prompts, names and records of runs."""
    from hostile import TEXTS, hostile_run

    corpus = folder / "hostile.txt"
    texts = [f"{TEXTS[n]} and so on. " * 30 for n in HOSTILE for _ in range(8)]
    corpus.write_text("\n\n".join(texts))
    outputs = folder / "outputs"
    others = [hostile_run(TEXTS[n], outputs).name for n in HOSTILE]
    run = {"output_dir": str(outputs), "run_name": "hostile"}
    copy_notebook(
        "train",
        folder,
        recipe="params/smoke.yaml",
        corpus=str(corpus),
        validation_fraction=0.4,
        vocab_size=300,
        total_steps=20,
        validation_windows=5,  # so that a prompt of 16 tokens holds a whole script
        **run,
    )
    copy_notebook("curves", folder, others=others, **run)
    copy_notebook("generate", folder, prompts=[TEXTS[n] for n in HOSTILE], **run)
    copy_notebook("compare", folder, output_dir=str(outputs))
    copy_notebook("audit", folder, leaky_dir=str(folder / "none"), **run)


def texts_that_ran(folder: Path, browser: Any) -> set[int]:
    """Return which of the texts HOSTILE ran as script in any display of any notebook.

    They stand in a corpus, in prompts, in the names and records of runs. The notebooks are shown
    live, reopened and exported, and so is the saved page of curves.
    """
    copy_hostile_notebooks(folder)
    executed: set[int] = set()

    def on_console(message: Any):
        if message.text.startswith("owned "):
            executed.add(int(message.text.removeprefix("owned ")))

    def watch(page: Any):
        page.on("console", on_console)
        page.on("dialog", lambda dialog: dialog.dismiss())

    with jupyterlab(folder) as address:
        context = browser.new_context()
        context.add_init_script("window.owned = n => console.log('owned ' + n)")
        context.on("page", watch)
        for name in ("train", "curves", "generate", "compare", "audit"):
            show_and_export(context, address, folder, name)
        for file in [*folder.glob("*.html"), *folder.glob("outputs/*/*.html")]:
            page = context.new_page()
            page.goto(file.as_uri())
            if file.name == "training_curves.html":
                page.wait_for_selector(".js-plotly-plot .trace", state="attached")
            sound_alarm(page)
            page.close()
    return executed - {ALARM}


def show_and_export(context: Any, address: str, folder: Path, name: str):
    """Run a notebook and use its widgets; then save, reopen and export it to HTML."""
    import nbconvert

    page = ran(context, address, name)
    text = page.inner_text(".jp-Notebook")
    assert "owned(" in text and "Traceback" not in text, text[-3000:]
    if name == "generate":
        use_playground(page)
    if name == "curves":
        use_explorer(page)
    photographed(page, f"hostile_{name}")
    sound_alarm(page)
    saved(page)
    page.close()
    page = opened(context, address, name)
    sound_alarm(page)
    page.close()
    book = nbformat.read(folder / f"{name}.ipynb", 4)
    assert "owned(" in json.dumps([cell.get("outputs") for cell in book.cells])
    html, _ = nbconvert.HTMLExporter().from_notebook_node(book)
    (folder / f"{name}.html").write_text(html)
