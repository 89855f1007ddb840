"""The live chart of a training notebook."""

import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import ipywidgets
import plotly.graph_objects as go
from IPython import get_ipython
from IPython.display import display

from lmlib.analysis import figures, frames
from lmlib.notebook import token_html
from lmlib.run.records import Record
from lmlib.text import printable

INTERVAL = 1.0  # least seconds between two drawings
CREDIT, SHARE = 0.5, 0.01  # drawing may take CREDIT seconds, plus this fraction of the run's time


def watch(records: Iterator[Record], run_dir: str | Path) -> Iterator[Record]:
    """Yield a run's records and draw its curves: `for record in watch(train(config), run_dir)`.

    In JupyterLab the chart is a widget whose lines move; elsewhere (papermill, nbval) an image is
    replaced. At the end, or when stopped, either leaves a static chart, which needs no kernel. An
    error in drawing is reported once, and training continues without the chart.
    """
    chart = _Chart(run_dir)
    start, spent, last = time.monotonic(), 0.0, None
    try:
        for record in records:
            now = time.monotonic()
            if last is None or (now - last >= INTERVAL and spent <= CREDIT + SHARE * (now - start)):
                chart.draw(as_widget=is_live())
                if last is not None:  # the first drawing is free: it pays for imports
                    spent += time.monotonic() - now
                last = time.monotonic()
            yield record
    finally:
        if isinstance(records, Generator):
            records.close()  # a consumer that leaves early: the run is saved before it is drawn
        if Path(run_dir).is_dir():
            chart.draw(as_widget=False)


def is_live() -> bool:
    """Check whether a browser runs this cell, so that widgets can be seen and moved.

    JupyterLab, Notebook and VS Code send a cell's id with its code, and Voila names its kernel;
    papermill and nbval do neither.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and ("VOILA_KERNEL_ID" in os.environ
                                   or "cellId" in kernel.get_parent().get("metadata", {}))


class _Chart:
    """One output: an image that is replaced, or a widget that an image replaces at the end."""

    def __init__(self, run_dir: str | Path):
        self.run_dir = run_dir
        self.handle = self.widget = None
        self.has_failed = False

    def draw(self, as_widget: bool):
        """Draw the run's records; after an error, which is reported, do nothing."""
        if self.has_failed:
            return
        try:
            frame = frames.read_runs(self.run_dir)
            if as_widget:
                self.draw_widget(frame)
            else:
                self.draw_image(frame)
        except Exception as error:  # of any kind: none may end training
            self.has_failed = True
            print(printable(f"⚠ The chart is left out, since it cannot be drawn "
                            f"({type(error).__name__}: {error}); training continues."))

    def draw_image(self, frame: Any):
        bundle = figures.chart_bundle(frame)
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)
        if self.widget is not None:
            self.widget.close()

    def draw_widget(self, frame: Any):
        """Show a status line, the curves, and the newest sample."""
        if self.widget is None:
            self.widget = go.FigureWidget(figures.training_curves(frame).update_layout(width=850))
            self.status, self.text = ipywidgets.Label(), ipywidgets.HTML()
            box = ipywidgets.VBox([self.status, self.widget, self.text])
            self.handle = display(box, display_id=True)
        self.status.value = " ".join(frames.headline(frame, run) for run in frame.attrs["runs"])
        self.text.value = token_html.cards(frames.samples_at(frame)[:1])
        [folder] = frame.attrs["runs"].values()
        lines = sum(figures.panel_lines(frame, folder=folder), [])  # in the order of the traces
        with self.widget.batch_update():
            for trace, line in zip(self.widget.data, lines, strict=True):
                trace.x, trace.y, trace.error_y.array = line["x"], line["y"], line["error"]
                trace.showlegend = trace.xaxis == "x" and bool(line["x"])
