"""What moves in a notebook: the live chart."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from IPython.display import display

from lmlib import figures
from lmlib.run_folder import Record

SHARE = 0.01  # of the run's time that drawing may take


def watch(records: Iterator[Record], run_dir: str | Path) -> Iterator[Record]:
    """Pass on the records of a run and draw its curves under way: `for record in watch(train(config), run_dir)`.

    In JupyterLab the chart moves; elsewhere (papermill, nbval) an image is renewed. Either way the notebook
    keeps, at the end or when stopped, a chart that needs no running kernel and no widget to be seen.
    """
    chart = _LiveChart() if is_live() else _StillChart()
    due = 0.0
    try:
        for record in records:
            if time.monotonic() >= due:
                began = time.monotonic()
                chart.draw(figures.read_runs(run_dir))
                due = began + max(0.5, (time.monotonic() - began) / SHARE)
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

        figure = figures.training_curves(frame)
        if self.widget is None or len(self.widget.data) != len(figure.data):
            self.widget = go.FigureWidget(figure)
            self.handle = self.handle or display(self.widget, display_id=True)
            return
        with self.widget.batch_update():
            for old, new in zip(self.widget.data, figure.data, strict=True):
                old.x, old.y = new.x, new.y

    def finish(self, frame: Any):
        bundle = figures.chart_bundle(frame)
        if self.handle is None:
            display(bundle, raw=True)
        else:
            self.handle.update(bundle, raw=True)
        if self.widget is not None:
            self.widget.close()
