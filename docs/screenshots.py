"""Take the playground's picture into build/screenshots: `python docs/screenshots.py`.

Needs outputs/quickstart (`make train`) and what `make test` sets up.
"""

import sys
import tempfile
from pathlib import Path

from lmlib.files import PROJECT_ROOT

sys.path.insert(0, str(PROJECT_ROOT / "tests" / "support"))
import browser as jupyter  # noqa: E402


def main():
    outputs = str(PROJECT_ROOT / "outputs")
    with tempfile.TemporaryDirectory() as folder, jupyter.chromium() as chromium:
        jupyter.copy_notebook("generate", Path(folder), output_dir=outputs)
        with jupyter.jupyterlab(Path(folder)) as address:
            page = jupyter.ran(chromium, address, "generate")
            page.set_viewport_size({"width": 1400, "height": 900})
            page.keyboard.press("Control+b")  # closes the list of files
            page.locator(".jp-FileBrowser").wait_for(state="hidden")
            box = page.locator(".lmlib-playground")
            page.locator(".lmlib-text .token").first.wait_for()
            box.evaluate("box => box.scrollIntoView({ block: 'center' })")
            page.locator(".lmlib-text .token").nth(5).hover()
            page.evaluate(jupyter.PAINTED)
            where = box.bounding_box()
            clip = {"x": where["x"] - 5, "y": where["y"] - 5}
            clip |= {side: where[side] + 10 for side in ("width", "height")}
            page.screenshot(path=jupyter.SCREENSHOTS / "playground.png", clip=clip)


if __name__ == "__main__":
    main()
