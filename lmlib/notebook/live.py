"""The live chart of a training notebook."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ipywidgets
import plotly.graph_objects as go
from IPython.display import display

from lmlib.analysis import figures, frames
from lmlib.notebook import token_html
from lmlib.run.records import Record

INTERVAL = 1.0  # least seconds between two drawings
CREDIT, SHARE = 0.5, 0.01  # drawing may take CREDIT seconds, plus this fraction of the run's time


def watch(records: Iterator[Record], run_dir: str | Path) -> Iterator[Record]:
    """Yield a run's records and draw its curves: `for record in watch(train(config), run_dir)`.

    In JupyterLab the chart is a widget whose lines move; elsewhere (papermill, nbval) an image is
    replaced. At the end, or when stopped, either leaves a static chart in the notebook, which needs
    no kernel and no widget.
    """
    chart = _LiveChart() if is_live() else _StillChart()
    start, spent, last = time.monotonic(), 0.0, -math.inf
    try:
        for record in records:
            now = time.monotonic()
            if now - last >= INTERVAL and spent <= CREDIT + SHARE * (now - start):
                chart.draw(frames.read_runs(run_dir))
                is_first, last = last < 0, time.monotonic()
                # The first drawing is free: it pays for imports, which later ones do not repeat.
                spent += 0.0 if is_first else last - now
            yield record
    finally:
        if Path(run_dir).is_dir():
            chart.finish(frames.read_runs(run_dir))


def is_live() -> bool:
    """Check whether a browser runs this cell, so that widgets can be seen and moved.

    JupyterLab sends a cell's id with its code; papermill and nbval do not.
    """
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    parent = kernel.get_parent() if kernel else {}
    return "cellId" in parent.get("metadata", {})


class _StillChart:
    """One output whose image is replaced."""

    def __init__(self):
        self.handle = None

    def draw(self, frame: Any):
        bundle = figures.chart_bundle(frame)
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)

    finish = draw


class _LiveChart(_StillChart):
    """A widget: a status line, the curves, and the newest sample; at the end a still chart."""

    def __init__(self):
        super().__init__()
        self.chart, self.status, self.text = None, ipywidgets.Label(), ipywidgets.HTML()

    def draw(self, frame: Any):
        self.status.value = " ".join(frames.headline(frame, run) for run in frame.attrs["runs"])
        self.text.value = token_html.cards(frames.texts_at(frame)[:1])
        if self.chart is None:
            curves = figures.training_curves(frame).update_layout(width=850)
            self.chart = go.FigureWidget(curves)
            box = ipywidgets.VBox([self.status, self.chart, self.text])
            self.handle = display(box, display_id=True)
            return
        [folder] = frame.attrs["runs"].values()
        panels = figures.panel_lines(frame, folder=folder)
        lines = [line for panel in panels for line in panel]  # in the order of the chart's traces
        with self.chart.batch_update():
            for trace, line in zip(self.chart.data, lines, strict=True):
                trace.x, trace.y, trace.error_y.array = line["x"], line["y"], line["error"]
                trace.showlegend = trace.xaxis == "x" and bool(line["x"])

    def finish(self, frame: Any):
        super().draw(frame)
        if self.chart is not None:
            self.chart.close()
