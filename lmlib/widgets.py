"""What moves in a notebook: the live chart."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from IPython.display import display

from lmlib import figures
from lmlib.run_folder import Record

INTERVAL = 1.0  # seconds between drawings, at least
CREDIT = 2.0  # seconds that drawing may take whatever the run's length,
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
                chart.draw(figures.read_runs(run_dir))
                first, last = last < 0, time.monotonic()
                spent += 0.0 if first else last - now  # the first imports and sets up
            yield record
    finally:
        if Path(run_dir).is_dir():
            chart.finish(figures.read_runs(run_dir))


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
    """A FigureWidget whose lines are moved; it gives way to a still chart at the end."""

    def __init__(self):
        self.widget = self.handle = None

    def draw(self, frame: Any):
        import plotly.graph_objects as go

        figure = figures.training_curves(frame).update_layout(width=860)
        if self.widget is None:
            self.widget = go.FigureWidget(figure)
            self.handle = display(self.widget, display_id=True)
            return
        with self.widget.batch_update():
            for old, new in zip(self.widget.data, figure.data, strict=True):
                old.update(x=new.x, y=new.y, error_y=new.error_y.to_plotly_json())

    def finish(self, frame: Any):
        bundle = figures.chart_bundle(frame)
        if self.handle is None:
            display(bundle, raw=True)
        else:
            self.handle.update(bundle, raw=True)
        if self.widget is not None:
            self.widget.close()
