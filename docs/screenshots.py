"""Take pictures of playground and explorer into build/screenshots: `python docs/screenshots.py`.

Needs outputs/quickstart (`make train`) and what `make test` sets up.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from lmlib.files import PROJECT_ROOT

sys.path.insert(0, str(PROJECT_ROOT / "tests" / "support"))
import browser as jupyter  # noqa: E402


def main():
    outputs = str(PROJECT_ROOT / "outputs")
    with tempfile.TemporaryDirectory() as folder, jupyter.chromium() as chromium:
        jupyter.copy_notebook("generate", Path(folder), output_dir=outputs)
        jupyter.copy_notebook("curves", Path(folder), output_dir=outputs)
        with jupyter.jupyterlab(Path(folder)) as address:
            page, box = opened(chromium, address, "generate", ".lmlib-playground")
            page.locator(".lmlib-text .token").first.wait_for()
            page.locator(".lmlib-text .token").nth(5).hover()
            photograph(page, box, "playground")
            page, box = opened(chromium, address, "curves", ".lmlib-explorer")
            box.locator(".js-plotly-plot .trace").first.wait_for(state="attached")
            photograph(page, box, "explorer")


def opened(chromium: Any, address: str, notebook: str, place: str) -> tuple[Any, Any]:
    """Run a notebook and scroll to a part of it; returns the page and that part."""
    page = jupyter.ran(chromium, address, notebook)
    page.set_viewport_size({"width": 1400, "height": 1500})
    page.keyboard.press("Control+b")  # closes the list of files
    page.locator(".jp-FileBrowser").wait_for(state="hidden")
    box = page.locator(place)
    box.evaluate("box => box.scrollIntoView({ block: 'center' })")
    return page, box


def photograph(page: Any, box: Any, name: str):
    """Save a picture of a part of a page, with a small margin."""
    page.evaluate(jupyter.PAINTED)
    where = box.bounding_box()
    clip = {"x": where["x"] - 5, "y": max(0, where["y"] - 5)}
    clip |= {side: where[side] + 10 for side in ("width", "height")}
    page.screenshot(path=jupyter.SCREENSHOTS / f"{name}.png", clip=clip)


if __name__ == "__main__":
    main()
