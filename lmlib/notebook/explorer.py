"""Runs explored in JupyterLab: their curves over each other, and followed while they are being written."""

import html
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import ipywidgets
import plotly.graph_objects as go
from IPython.display import display

from lmlib.analysis import figures, frames
from lmlib.notebook import token_html
from lmlib.notebook.live import is_live
from lmlib.text import printable

POLL = 2.0  # seconds between two looks at the files


SMOOTHING = [("auto", 0), *((f"{n} records", n) for n in (1, 3, 10, 30, 100, 300))]


def explore(run_dirs: Iterable[str | Path]):
    """The runs' curves, positions, cost, experts and texts under common controls; outside JupyterLab the curves alone.

    Runs that are still being written are followed, whoever trains them.
    """
    folders = list(run_dirs)
    if is_live():
        display(Explorer(folders).box)
    else:
        frame = frames.read_runs(folders)
        print(*(printable(f"{run}: {frames.headline(frame, run)}") for run in figures.names_of(frame)), sep="\n")
        display(figures.chart_bundle(frame), raw=True)


class Explorer:
    """The controls, and the figures that they change. A run has one color and one switch for all of them."""

    def __init__(self, run_dirs: list[str | Path]):
        self.run_dirs, self.lock = run_dirs, threading.RLock()  # the reader's hand and the follower draw in turn
        self.frame = frames.read_runs(run_dirs)
        w, runs = ipywidgets, figures.names_of(self.frame)
        narrow, fit = {"description_width": "initial"}, {"width": "max-content"}
        self.x = w.Dropdown(
            options=[(name, key) for key, name in frames.AXES.items()], description="over", layout={"width": "260px"}
        )
        self.smoothing = w.SelectionSlider(options=SMOOTHING, description="smoothing", continuous_update=False)
        self.log_x = w.Checkbox(description="log x", indent=False, layout={"width": "80px"})
        self.log_loss = w.Checkbox(description="log loss", indent=False, layout={"width": "100px"})
        self.follow = w.Checkbox(value=True, description="follow", indent=False, layout={"width": "80px"})
        self.switches, self.states, self.swatches = {}, {}, {}
        for number, run in enumerate(runs):
            color, mark = figures.color_of(number), "■◆▲●"[number // len(figures.COLORS) % 4]
            self.swatches[run] = w.HTML(f"<span style='color: {color}'>{mark}</span>")
            self.switches[run] = w.Checkbox(value=True, description=run, indent=False, style=narrow, layout=fit)
            self.states[run] = w.Label(frames.headline(self.frame, run), layout=fit)
        self.text_step = w.SelectionSlider(options=[("no text yet", -1)], description="step", layout={"width": "97%"})
        self.text = w.HTML(layout={"width": "97%"})
        self.charts = {name: go.FigureWidget(figure.update_layout(width=830)) for name, figure in self._figures().items()}
        tabs = {**self.charts, "Texts": w.VBox([self.text_step, self.text])}
        for control in (self.x, self.smoothing, self.log_x, self.log_loss, *self.switches.values()):
            control.observe(lambda change: self.draw(), "value")
        self.text_step.observe(lambda change: self._show_texts(), "value")
        rows = [w.HBox([self.swatches[run], self.switches[run], self.states[run]]) for run in runs]
        controls = w.HBox([self.x, self.smoothing, self.log_x, self.log_loss, self.follow])
        self.tabs = w.Tab(list(tabs.values()), titles=list(tabs))
        self.box = w.VBox([controls, *rows, self.tabs], layout={"max_width": "860px"})
        self.box._view_count = 0  # JupyterLab counts those who look at it
        self._offer_texts()
        threading.Thread(target=self._follow, daemon=True).start()

    def _figures(self) -> dict[str, go.Figure]:
        curves = figures.training_curves(self.frame, self.x.value, self.smoothing.value, self.log_x.value)
        curves.update_layout(margin={"t": 60}, showlegend=len(self.switches) == 1)
        curves.layout.updatemenus = ()
        curves.layout.yaxis.type = "log" if self.log_loss.value else "linear"
        views = {
            "Curves": curves,
            "By position": figures.loss_by_position(self.frame),
            "Cost": figures.cost(frames.results_table(self.frame)),
            "Experts": figures.expert_load(self.frame),
        }
        for figure in views.values():
            for trace in figure.data:
                switch = self.switches.get(trace.legendgroup or html.unescape(trace.name or ""))
                trace.visible = switch.value if switch else True
        return views

    def draw(self):
        """Bring the charts up to the controls and the records, moving their lines."""
        with self.lock:
            self._draw()

    def _draw(self):
        for number, (name, figure) in enumerate(self._figures().items()):
            chart = self.charts[name]
            if len(chart.data) != len(figure.data):  # the first record of experts, say
                self.charts[name] = go.FigureWidget(figure.update_layout(width=830))
                shown = list(self.tabs.children)
                shown[number] = self.charts[name]
                self.tabs.children = shown
                continue
            with chart.batch_update():
                for old, new in zip(chart.data, figure.data, strict=True):
                    old.update(new.to_plotly_json())
                for axis in (key for key in figure.layout if key.startswith(("xaxis", "yaxis"))):
                    chart.layout[axis].update(type=figure.layout[axis].type, title=figure.layout[axis].title)
        self._show_texts()

    def refresh(self):
        """Read the records again; a run whose folder has gone keeps its lines."""
        try:
            frame = frames.read_runs(self.run_dirs)
        except ValueError:
            return
        with self.lock:
            self.frame = frame
        for run, label in self.states.items():
            label.value = frames.headline(self.frame, run)
        self._offer_texts()
        self.draw()

    def _offer_texts(self):
        steps = sorted({int(step) for step in self.frame[self.frame["kind"] == "sample"]["step"]})
        options = [(f"step {step}", step) for step in steps] or [("no text yet", -1)]
        if list(self.text_step.options) != options:
            at_end = self.text_step.index == len(self.text_step.options) - 1
            kept = self.text_step.value
            self.text_step.options = options
            self.text_step.value = kept if kept in steps and not at_end else options[-1][1]
        self._show_texts()

    def _show_texts(self):
        """What each run wrote at the evaluation before or at the step chosen."""
        shown = self.frame[self.frame["run"].isin([run for run, switch in self.switches.items() if switch.value])]
        texts = frames.texts_at(shown, self.text_step.value)
        self.text.value = token_html.cards(texts) if texts else "No text has been recorded yet."

    def _follow(self):
        """Look whether records have come, as long as somebody looks at the charts."""

        def sizes() -> list[int]:
            files = [Path(folder) / "metrics.jsonl" for folder in self.frame.attrs["runs"].values()]
            return [file.stat().st_size if file.exists() else 0 for file in files]

        known = sizes()
        while self.box.comm is not None:
            time.sleep(POLL)
            if not self.box._view_count:
                continue
            for run, label in self.states.items():
                label.value = frames.headline(self.frame, run)
            if self.follow.value and (now := sizes()) != known:
                known = now
                self.refresh()
