"""The playground in each front end: JupyterLab, Notebook 7, Voila, and a client as VS Code is.

The browser's tests open it with the windows that people have: 1400 and 1000 pixels wide.
"""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import browser as jupyter
import nbformat
import pytest
from PIL import Image, ImageChops

from lmlib.files import PROJECT_ROOT

needs_chromium = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(jupyter.CHROMIUM is None, reason="no Chromium on this machine"),
]
TOKEN = ".lmlib-text .token"
WAITS = "The kernel is busy with another cell"


@pytest.fixture(scope="module")
def chromium():
    with jupyter.chromium() as browser:
        yield browser


def heard(page) -> list[str]:
    """Return a list that gets the page's console errors and the errors of its scripts."""
    errors = []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    return errors


def changed_box(page, act) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of what `act` changes in the window."""
    before, _ = page.screenshot(), act()
    page.evaluate(jupyter.PAINTED)
    images = (Image.open(io.BytesIO(shot)).convert("RGB") for shot in (before, page.screenshot()))
    return ImageChops.difference(*images).getbbox()


def check_details_are_whole(page):
    """Check that a token's details show all 12 lines, below it or, near the window's end, above."""
    tall = 12 * 12 * 1.45  # lines of 12 pixels with their leading, without the border
    token = page.locator(TOKEN).nth(1)
    token.scroll_into_view_if_needed()
    where = token.bounding_box()
    for height in (int(where["y"]) + 400, int(where["y"]) + 60):
        page.mouse.move(3, 3)
        page.set_viewport_size({"width": 1400, "height": max(height, 420)})
        token.scroll_into_view_if_needed()
        if height == int(where["y"]) + 60:  # the token at the lower end of the window
            token.evaluate("element => element.scrollIntoView({ block: 'end' })")
        page.evaluate(jupyter.PAINTED)
        left, top, right, bottom = changed_box(page, token.hover)
        assert bottom - top >= tall and right - left >= 100, (left, top, right, bottom)
    page.mouse.move(3, 3)


def check_layout(page, width: int):
    """Check that sliders are long enough, and that nothing is clipped at the window's right."""
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate(jupyter.PAINTED)
    sliders = page.locator(".lmlib-playground .noUi-base").filter(visible=True)
    assert sliders.count() == 5
    assert min(slider.bounding_box()["width"] for slider in sliders.all()) >= 120
    overflows = """() => { const box = document.querySelector('.lmlib-playground')
        const right = box.getBoundingClientRect().right
        return [...box.querySelectorAll('button, input, select, textarea, .widget-readout')]
            .filter(e => e.offsetParent && e.getBoundingClientRect().right > right + 1)
            .map(e => e.outerHTML) }"""
    assert page.evaluate(overflows) == []
    menu = page.get_by_label("run", exact=True).bounding_box()
    text = page.locator(TOKEN).first.bounding_box()
    if width == 1400:  # text at the left, controls at the right, all in one window
        assert text["x"] < menu["x"] - 300
        page.locator(".lmlib-playground").evaluate("box => box.scrollIntoView()")
        assert page.get_by_role("button", name="More").bounding_box()["y"] < 900


def opened(chromium, address: str, app: str):
    """Open generate.ipynb in JupyterLab or Notebook."""
    if app == "lab":
        return jupyter.opened(chromium, address, "generate")
    page = chromium.new_page(viewport=jupyter.VIEWPORT)
    page.goto(f"{address}/notebooks/generate.ipynb?token=t")
    assert jupyter.kernel_is_ready(page, 90)
    return page


@pytest.mark.parametrize("app", ["lab", "notebook"])
@pytest.mark.usefixtures("chromium")
class TestJupyter:
    pytestmark = needs_chromium

    def test_the_playground_opens_answers_and_says_when_it_cannot(
        self, chromium, trained, tmp_path, app
    ):
        run = {"output_dir": str(trained.output_dir), "run_name": "trained"}
        jupyter.copy_notebook("generate", tmp_path, max_new_tokens=4, **run)
        file, go = tmp_path / "generate.ipynb", tmp_path / "go"
        book = nbformat.read(file, 4)
        wait = f"import time, pathlib\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(.1)"
        book.cells.append(nbformat.v4.new_code_cell(wait))
        nbformat.write(book, file)
        with jupyter.jupyterlab(tmp_path, app) as address:
            settings = tmp_path / ".config/lab/user-settings/@jupyterlab/notebook-extension"
            shutil.rmtree(settings)  # cells as people have them: each clips what leaves it
            page = opened(chromium, address, app)
            errors = heard(page)  # Notebook 7.6 has one of its own while it starts
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_text("Run All Cells", exact=True).click()
            page.locator(TOKEN).first.wait_for(timeout=90_000)  # while the last cell still runs
            page.get_by_role("button", name="Generate", exact=True).click()
            page.get_by_text(WAITS).wait_for()
            page.get_by_role("button", name="Generate (waiting)").wait_for()
            page.evaluate("document.querySelector('[role=status]').setAttribute('data-old', '')")
            go.touch()
            page.locator("[role=status]:not([data-old])", has_text="4 tokens").wait_for()
            page.get_by_role("button", name="Generate", exact=True).wait_for()
            assert page.get_by_text(WAITS).count() == 0
            for width in (1000, 1400):
                check_layout(page, width)
            check_details_are_whole(page)
            assert errors == []
            page.close()


@pytest.mark.usefixtures("chromium")
class TestNarrow:
    pytestmark = needs_chromium

    def test_figures_and_tables_fit_a_window_of_1000_pixels(self, chromium, trained, tmp_path):
        runs = tmp_path / "outputs"
        shutil.copytree(trained.run_dir, runs / ("a_long_name_" * 5))
        run = {"run_name": "a_long_name_" * 5, "output_dir": str(runs)}
        jupyter.copy_notebook("index", tmp_path, output_dir=str(runs))
        jupyter.copy_notebook("curves", tmp_path, **run)
        wide = """() => [...document.querySelectorAll('.jp-OutputArea-output')]
            .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 300))"""
        with jupyter.jupyterlab(tmp_path) as address:
            for name, shown in (("index", "a:text-is('curves')"), ("curves", "img.plot-img")):
                page = jupyter.ran(chromium, address, name)
                page.set_viewport_size({"width": 1000, "height": 900})
                page.locator(shown).first.wait_for()
                page.evaluate(jupyter.PAINTED)
                assert page.evaluate(wide) == []
                page.close()


@pytest.fixture
def app(trained, tmp_path):
    """`make app` on a copy of its files, with the trained run under outputs/; yields its log."""
    notebooks = tmp_path / "notebooks"
    shutil.copytree(PROJECT_ROOT / "notebooks" / "voila", notebooks / "voila")
    shutil.copy(PROJECT_ROOT / "notebooks" / "app.ipynb", notebooks)
    shutil.copytree(trained.run_dir, notebooks / "outputs" / "trained")
    shutil.copy(PROJECT_ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    for name in ("requirements.txt", "pyproject.toml", ".venv/ready"):
        (tmp_path / name).touch()
    arguments = f"ARGS=--no-browser --port={jupyter.free_port()}"
    command = ["make", "app", f"RUN={sys.executable}", arguments]
    log = tmp_path / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=file, stderr=file, start_new_session=True
        )
    yield log
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(20)


class TestVoila:
    pytestmark = needs_chromium

    def test_make_app_serves_the_playground_alone(self, chromium, app):
        address = None
        while address is None:
            time.sleep(0.1)
            address = re.search(r"http://127\.0\.0\.1:\d+/\?token=\w+", app.read_text())
        with urllib.request.urlopen(address[0].partition("?")[0]) as answer:
            assert "/login" in answer.url  # as anybody without the token
        page = chromium.new_page(viewport={"width": 1400, "height": 900})
        errors, requests = heard(page), []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address[0])
        page.locator(TOKEN).first.wait_for(timeout=90_000)
        assert page.title() == "Playground" and "import" not in page.inner_text("body")
        page.locator("textarea").first.fill("My lord")
        page.locator("textarea").first.press("Control+Enter")
        page.locator(".lmlib-text .given", has_text="My lord").wait_for()
        page.get_by_role("button", name="Generate", exact=True).wait_for()
        page.screenshot(path=jupyter.SCREENSHOTS / "app.png")
        background = "getComputedStyle(document.body).getPropertyValue('--jp-layout-color1')"
        light = page.evaluate(background)
        page.emulate_media(color_scheme="dark")  # as the reader's system asks for it
        assert page.evaluate(background) != light in ("white", "#fff", "#ffffff")
        page.emulate_media(color_scheme="light")
        for width in (1000, 1400):
            check_layout(page, width)
        assert errors == [] and all("//127.0.0.1:" in url for url in requests if "//" in url)
        page.close()


def test_a_client_that_sends_cell_ids_gets_widgets_and_a_line_for_later(trained):
    """As VS Code: `cellId` stands in the request's metadata; without it there is the line alone."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")

    def shown(**metadata) -> list[dict]:
        """Run the playground's cell; return what the kernel sends until the text is there."""
        code = (
            "from lmlib.notebook.playground import playground\n"
            f"playground({str(trained.run_dir)!r}, 'To be', {str(trained.output_dir)!r})"
        )
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False}
        request = client.session.msg("execute_request", content)
        request["metadata"] = metadata
        client.shell_channel.send(request)
        messages = []
        while True:
            message = client.get_iopub_msg(timeout=60)
            messages.append(message)
            content = message["content"]
            assert message["msg_type"] != "error", content
            text = content.get("data", {}).get("state", {}).get("value", "")
            if "class='token'" in str(text) or message["msg_type"] == "stream":
                return messages

    try:
        messages = shown(cellId="a1b2")
        [bundle] = [m["content"]["data"] for m in messages if m["msg_type"] == "display_data"]
        opened = {m["content"]["comm_id"] for m in messages if m["msg_type"] == "comm_open"}
        assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] in opened
        assert "run this cell" in bundle["text/plain"]
        assert "open this notebook in JupyterLab" in shown()[-1]["content"]["text"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_the_playground_is_the_last_cell():
    """Run All ends with it: a cell below would keep the kernel from answering its buttons."""
    book = nbformat.read(PROJECT_ROOT / "notebooks" / "generate.ipynb", 4)
    assert [cell.source.startswith("playground(") for cell in book.cells[-2:]] == [False, True]
