"""The explorer: the figures of one or several runs under common controls, for JupyterLab."""

import html
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import ipywidgets as w
import plotly.graph_objects as go
from IPython.display import display

from lmlib.analysis import figures, frames
from lmlib.notebook import token_html
from lmlib.notebook.live import is_live
from lmlib.text import printable

SMOOTHING = [("auto", 0), *((f"{n} records", n) for n in (1, 3, 10, 30, 100, 300))]
NO_TEXT = ("no text yet", -1)


def explore(run_dirs: Iterable[str | Path]):
    """Display curves, positions, cost, experts and samples of runs; without JupyterLab the curves.

    Runs that are still training, in whichever process, are followed.
    """
    if is_live():
        display(Explorer(list(run_dirs)).box)
    else:
        frame = frames.read_runs(run_dirs)
        for run in frame.attrs["runs"]:
            print(printable(f"{run}: {frames.headline(frame, run)}"))
        display(figures.chart_bundle(frame), raw=True)


class Explorer:
    """The controls and their figures. A run has one color and one switch in all figures."""

    def __init__(self, run_dirs: list[str | Path]):
        self.run_dirs, self.frame = run_dirs, frames.read_runs(run_dirs)
        self.lock = threading.RLock()  # a control and the following thread may both redraw
        axes = {name: key for key, name in frames.AXES.items()}
        self.x = w.Dropdown(options=axes, description="over", layout={"width": "260px"})
        self.smoothing = w.SelectionSlider(options=SMOOTHING, description="smoothing",
                                           continuous_update=False)
        self.log_x, self.log_loss, self.follow = (
            w.Checkbox(name == "follow", description=name, indent=False, layout={"width": width})
            for name, width in [("log x", "80px"), ("log loss", "100px"), ("follow", "80px")])
        self.swatches, self.switches, self.states = {}, {}, {}
        fit, wide = {"width": "max-content"}, {"width": "97%"}
        for number, run in enumerate(self.frame.attrs["runs"]):
            # Runs beyond the number of colors reuse them with another mark.
            color = figures.color_of(number)
            mark = "■◆▲●"[number // len(figures.COLORS) % 4]
            self.swatches[run] = w.HTML(f"<span style='color: {color}'>{mark}</span>")
            self.switches[run] = w.Checkbox(True, description=run, indent=False, layout=fit,
                                            style={"description_width": "initial"})
            self.states[run] = w.Label(frames.headline(self.frame, run), layout=fit)
        self.text = w.HTML(layout=wide)
        self.text_step = w.SelectionSlider(options=[NO_TEXT], description="step", layout=wide)
        self.charts = {name: go.FigureWidget(figure) for name, figure in self._figures().items()}
        tabs = {**self.charts, "Texts": w.VBox([self.text_step, self.text])}
        self.tabs = w.Tab(list(tabs.values()), titles=list(tabs))
        redrawing = [self.x, self.smoothing, self.log_x, self.log_loss]
        for control in [*redrawing, *self.switches.values()]:
            control.observe(lambda change: self.draw(), "value")
        self.text_step.observe(lambda change: self._show_texts(), "value")
        rows = [w.HBox([self.swatches[run], switch, self.states[run]])
                for run, switch in self.switches.items()]
        self.box = w.VBox([w.HBox([*redrawing, self.follow]), *rows, self.tabs],
                          layout={"max_width": "860px"})
        self.box._view_count = 0  # else None; JupyterLab counts the places where it is shown
        self._offer_texts()
        threading.Thread(target=self._follow, daemon=True).start()

    def _figures(self) -> dict[str, go.Figure]:
        frame, over = self.frame, self.x.value
        curves = figures.training_curves(frame, over, self.smoothing.value, self.log_x.value)
        curves.update_layout(margin={"t": 60}, showlegend=len(self.switches) == 1)
        curves.layout.updatemenus = ()
        curves.layout.yaxis.type = "log" if self.log_loss.value else "linear"
        views = {"Curves": curves, "By position": figures.loss_by_position(frame),
                 "Cost": figures.cost(frames.results_table(frame)),
                 "Experts": figures.expert_load(frame)}
        for figure in views.values():
            figure.update_layout(width=830)
            for trace in figure.data:
                switch = self.switches.get(trace.legendgroup or html.unescape(trace.name or ""))
                trace.visible = switch.value if switch else True
        return views

    def draw(self):
        """Update the charts in place to the controls and the records."""
        with self.lock:
            for name, figure in self._figures().items():
                if len(self.charts[name].data) != len(figure.data):
                    self.charts[name] = go.FigureWidget(figure)  # at the first record of experts
                elif figure.data:
                    self.charts[name].update(figure.to_plotly_json())
            self.tabs.children = [*self.charts.values(), self.tabs.children[-1]]
            self._show_texts()

    def refresh(self):
        """Read the records again and redraw; a run whose folder was deleted keeps its lines."""
        try:
            self.frame = frames.read_runs(self.run_dirs)
        except ValueError:
            return
        self._show_states()
        self._offer_texts()
        self.draw()

    def _show_states(self):
        for run, label in self.states.items():
            label.value = frames.headline(self.frame, run)

    def _offer_texts(self):
        """Offer each step with samples; keep the selected one, except that the last moves along."""
        slider, samples = self.text_step, self.frame[self.frame["kind"] == "sample"]
        steps = sorted({int(step) for step in samples["step"]})
        options = [(f"step {step}", step) for step in steps] or [NO_TEXT]
        if list(slider.options) != options:
            selected, was_last = slider.value, slider.index == len(slider.options) - 1
            slider.options = options
            slider.value = selected if selected in steps and not was_last else options[-1][1]
        self._show_texts()

    def _show_texts(self):
        """Show each run's samples from its last evaluation up to the selected step."""
        shown = [run for run, switch in self.switches.items() if switch.value]
        texts = frames.samples_at(self.frame[self.frame["run"].isin(shown)], self.text_step.value)
        self.text.value = token_html.cards(texts) if texts else "No text has been recorded yet."

    def _follow(self):
        """Redraw when records arrive, as long as the box is shown."""
        sizes = self._sizes()
        while self.box.comm is not None:  # until the widget is closed
            time.sleep(2)
            if self.box._view_count:
                self._show_states()
                if self.follow.value and (now := self._sizes()) != sizes:
                    sizes = now
                    self.refresh()

    def _sizes(self) -> list[int]:
        files = [Path(folder) / "metrics.jsonl" for folder in self.frame.attrs["runs"].values()]
        return [file.stat().st_size if file.exists() else 0 for file in files]
