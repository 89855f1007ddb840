"""The page of a training run: its state and numbers, its chart, and the end of its log."""

import html
import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ipywidgets
from IPython import get_ipython
from IPython.display import display

from lmlib.analysis import figures, frames, render
from lmlib.checkpoint import checkpoint_steps
from lmlib.errors import Stopped
from lmlib.files import read_mapping
from lmlib.notebook import token_html
from lmlib.notebook.chart import Figure, Fit
from lmlib.notebook.header import header, next_steps, notebook_link
from lmlib.run.records import Record, describe, read_records
from lmlib.text import printable

INTERVAL = 1.0  # least seconds between two drawings
CREDIT, SHARE = 0.5, 0.02  # drawing may take CREDIT seconds, plus this fraction of the run's time
STILL = 60.0  # most seconds between the images that a closed page keeps
LINES, KEPT = 6, 500  # of the log: in view during training, and kept below the chart


def watch(records: Iterator[Record], run_dir: str | Path) -> Iterator[Record]:
    """Yield a run's records and show them: `for record in watch(train(config), run_dir)`.

    In JupyterLab the chart is a widget whose lines move, and a run that is stopped ends the loop
    with a line that says so. Elsewhere (papermill, nbval, scripts) an image is replaced, the log
    is printed, and `Stopped` is raised. At the end either leaves a static page, which needs no
    kernel. An error in drawing is reported once, and training continues without the page.
    """
    page, state = _Page(Path(run_dir)), "died"
    try:
        for record in records:
            page.add(record)
            yield record
        state = "finished"
    except GeneratorExit:
        state = "stopped"
        raise
    except KeyboardInterrupt as stopped:
        state = "stopped"
        if not page.is_live:
            raise
        if not page.latest:
            print(stopped if isinstance(stopped, Stopped) else "Stopped before the first step.")
    finally:
        if isinstance(records, Generator):
            records.close()  # a consumer that leaves early: the run is saved before it is drawn
        page.end(state)


def is_live() -> bool:
    """Check whether a browser runs this cell, so that widgets can be seen and moved.

    JupyterLab, Notebook and VS Code send a cell's id with its code, and Voila names its kernel;
    papermill and nbval do neither.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and ("VOILA_KERNEL_ID" in os.environ
                                   or "cellId" in kernel.get_parent().get("metadata", {}))


class _Page:
    """Three outputs: the head, the chart's image, and what stands below it, the live widget first.

    The widget hides the image (see `header.STYLE`). On a page that was closed during the run, whose
    widget is lost, the image is seen again.
    """
    def __init__(self, run_dir: Path):
        self.run_dir, self.is_live = run_dir, is_live()
        self.handles: dict[str, Any] = {}
        self.latest: dict[str, dict[str, Any]] = {}  # the newest record of each kind
        self.lines: deque[str] = deque(maxlen=KEPT)
        self.widget = None
        self.has_failed = False
        self.began = self.drawn = self.imaged = time.monotonic()
        self.spent = 0.0

    def add(self, record: Record):
        """Take in the next record, and draw if it is time."""
        is_first = not self.latest
        if is_first:
            self.latest = {r["kind"]: r | r["timing"] for r in read_records(self.run_dir)
                           if isinstance(r.get("kind"), str) and isinstance(r.get("timing"), dict)}
            self.total = read_mapping(self.run_dir / "config.json").get("total_steps")
        self.latest[record.kind] = {**record.timing, **record.values, "step": record.step}
        line, now = describe(record, self.total), time.monotonic()
        self.lines.append(line)
        if is_first or now - self.drawn >= INTERVAL:
            self.try_to(self.draw, is_first)
            self.drawn = time.monotonic()
        if not self.is_live or self.has_failed:
            print(line)

    def end(self, state: str):
        """Draw the last state, unless nothing was recorded."""
        if not self.latest or not self.run_dir.is_dir():
            return
        steps, note = checkpoint_steps(self.run_dir), ""
        if state == "stopped":
            self.latest["checkpoint"] = {"step": max(steps, default=0)}  # none tells of this one
            note = (f"Stopped at step {steps[-1]:,} of {self.total:,}. Saved. Run the cells again "
                    "to resume." if steps else "Stopped before the first checkpoint. Nothing is "
                    "saved; running the cells again starts anew.")
        with suppress(Exception):  # the last step's speed says little of the run
            steps_taken = frames.read_runs(self.run_dir).query("kind == 'step'")
            self.latest["step"] |= {"tokens_per_second": steps_taken["tokens_per_second"].median()}
        with suppress(Exception):  # where the chart has failed, the state is said all the same
            self.put("head", header(self.run_dir, state, self.latest, self.total, note))
        self.try_to(self.draw_end, bool(steps))

    def try_to(self, draw: Any, *arguments: Any):
        """Draw; after an error, which is reported, do nothing."""
        if self.has_failed:
            return
        try:
            draw(*arguments)
        except Exception as error:  # of any kind: none may end training
            self.has_failed = True
            print(printable(f"⚠ The chart is left out, since it cannot be drawn "
                            f"({type(error).__name__}: {error}); training continues."))

    def draw(self, is_first: bool):
        """Draw the head and the log, and the chart unless the time for drawing is used up."""
        note = ""
        if self.is_live:
            link, now = notebook_link("curves.ipynb", self.folder), time.strftime("%H:%M:%S")
            note = (f"<small>Closed this page? {link} follows this run (this page shows it as of "
                    f"{now}).</small>")
        self.put("head", header(self.run_dir, "running", self.latest, self.total, note))
        start = time.monotonic()
        age = self.imaged - self.began
        if is_first or (self.is_live and start - self.imaged >= min(STILL, 10 + age)):
            self.draw_image()
            self.imaged = start = time.monotonic()
        if is_first or self.spent <= CREDIT + SHARE * (start - self.began):
            if self.is_live:
                self.draw_widget()
            elif not is_first:
                self.draw_image()
            if not is_first:  # the first drawing is free: it pays for imports
                self.spent += time.monotonic() - start
        self.draw_texts()

    def draw_image(self):
        self.put("image", figures.chart_bundle(frames.read_runs(self.run_dir)))

    def draw_widget(self):
        """Show the curves as a widget, or move its lines."""
        frame = frames.read_runs(self.run_dir)
        if self.widget is None:
            self.widget = Figure(figures.training_curves(frame))
            self.texts = ipywidgets.HTML()
            width = {"max_width": f"{render.WIDTH}px"}  # that of the image
            box = ipywidgets.VBox([self.widget, Fit(), self.texts], layout=width)
            box.add_class("lmlib-live")
            plain = f"The live chart of {printable(self.run_dir.name)}"
            self.put("below", {**box._repr_mimebundle_(), "text/plain": plain})
        figures.update(self.widget, frame)

    def draw_texts(self):
        """Show the end of the log, and the newest sample."""
        if self.widget is None:
            return
        sample = self.latest.get("sample", {})
        cards = [(f"Sample at step {sample['step']}", sample["prompts"][0], sample["texts"][0])
                 ] if sample else []
        self.texts.value = _log(list(self.lines)[-LINES:]) + token_html.cards(cards)

    def draw_end(self, has_checkpoint: bool):
        """Draw the rest of the page that stays, which needs no kernel."""
        self.draw_image()
        below = f"<p>{next_steps(self.run_dir, self.folder)}</p>" if has_checkpoint else ""
        if self.is_live:
            below += (f"<details><summary>Log: the last {len(self.lines)} lines</summary>"
                      f"{_log(self.lines)}</details>")
        self.put("below", {"text/html": below, "text/plain": ""})
        if self.widget is not None:
            self.widget.close()

    @property
    def folder(self) -> Path:
        """The folder of the notebook: papermill writes it into the run's."""
        return Path.cwd() if self.is_live else self.run_dir

    def put(self, name: str, bundle: dict[str, Any]):
        """Show an output, or replace it; without IPython there is nowhere to show it."""
        if get_ipython() is None:
            return
        if name in self.handles:
            self.handles[name].update(bundle, raw=True)
        else:
            self.handles[name] = display(bundle, raw=True, display_id=True)


def _log(lines: Iterable[str]) -> str:
    """Show lines of the log as HTML."""
    text = html.escape(printable("\n".join(lines)))
    return (f"<pre style='max-height: 20em; overflow: auto; font-size: 12px; line-height: 1.4'>"
            f"{text}</pre>")
