"""The live chart of a training notebook."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ipywidgets
from IPython.display import display

from lmlib.analysis import figures, frames
from lmlib.notebook import token_html
from lmlib.run.records import Record

INTERVAL = 1.0  # seconds between drawings, at least


CREDIT = 0.5  # seconds that drawing may take whatever the run's length,


SHARE = 0.01  # and the share of the run's time beyond that


def watch(records: Iterator[Record], run_dir: str | Path) -> Iterator[Record]:
    """Pass on the records of a run and draw its curves under way: `for record in watch(train(config), run_dir)`.

    In JupyterLab the chart moves; elsewhere (papermill, nbval) an image is renewed. Either way the notebook
    keeps, at the end or when stopped, a chart that needs no running kernel and no widget to be seen.
    """
    chart = _LiveChart() if is_live() else _StillChart()
    began, spent, last = time.monotonic(), 0.0, -math.inf
    try:
        for record in records:
            now = time.monotonic()
            if now - last >= INTERVAL and spent <= CREDIT + SHARE * (now - began):
                chart.draw(frames.read_runs(run_dir))
                first, last = last < 0, time.monotonic()
                spent += 0.0 if first else last - now  # the first imports and sets up
            yield record
    finally:
        if Path(run_dir).is_dir():
            chart.finish(frames.read_runs(run_dir))


def is_live() -> bool:
    """Whether a person's browser runs this cell: JupyterLab says which cell it sends, papermill and nbval do not."""
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    parent = kernel.get_parent() if kernel else {}
    return "cellId" in parent.get("metadata", {})


class _StillChart:
    """One display whose image is replaced."""

    def __init__(self):
        self.handle = None

    def draw(self, frame: Any):
        bundle = figures.chart_bundle(frame)
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)

    finish = draw


class _LiveChart:
    """A FigureWidget whose lines are moved, a line of figures above it and the newest text below; it gives way to a
    still chart at the end."""

    def __init__(self):
        self.chart = self.handle = None
        self.status, self.text = ipywidgets.Label(), ipywidgets.HTML()

    def draw(self, frame: Any):
        import plotly.graph_objects as go

        self.status.value = " ".join(frames.headline(frame, run) for run in frame.attrs["runs"])
        self.text.value = token_html.cards(frames.texts_at(frame)[:1])
        if self.chart is None:
            self.chart = go.FigureWidget(figures.training_curves(frame).update_layout(width=850))
            self.handle = display(ipywidgets.VBox([self.status, self.chart, self.text]), display_id=True)
            return
        [folder] = frame.attrs["runs"].values()
        lines = [line for panel in figures.panel_lines(frame, folder=folder) for line in panel]  # in the order of the chart's
        with self.chart.batch_update():
            for trace, line in zip(self.chart.data, lines, strict=True):
                trace.x, trace.y, trace.error_y.array = line["x"], line["y"], line["error"]
                trace.showlegend = trace.xaxis == "x" and bool(line["x"])

    def finish(self, frame: Any):
        bundle = figures.chart_bundle(frame)
        if self.handle is None:
            display(bundle, raw=True)
        else:
            self.handle.update(bundle, raw=True)
        if self.chart is not None:
            self.chart.close()
