"""The explorer: the figures of one or several runs under common controls, for JupyterLab."""

import html
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import ipywidgets as w
import pandas as pd
import plotly.graph_objects as go

from lmlib.analysis import figures, frames, render
from lmlib.analysis.benchmarks import benchmark_curves
from lmlib.files import resolve_path
from lmlib.notebook import picker, token_html
from lmlib.notebook.chart import Chart
from lmlib.notebook.live import is_live
from lmlib.run.lock import run_status
from lmlib.text import printable

SMOOTHING = [("auto", 0), *((f"{n} records", n) for n in (1, 3, 10, 30, 100, 300))]
NO_TEXT = ("no text yet", -1)
MOST = 50  # rows of runs that are not chosen: each is several widgets


def explore(run_dirs: Iterable[str | Path], output_dir: str | Path):
    """Display curves, positions, cost, experts and samples of runs; without JupyterLab the curves.

    More runs under `output_dir` can be chosen. Runs that are still training, in whichever process,
    are followed.
    """
    run_dirs = list(run_dirs)
    frame = frames.read_runs(run_dirs)
    chart = figures.chart_bundle(frame)
    if is_live():  # where widgets are not shown, as in an exported page, the image is
        del chart["application/vnd.plotly.v1+json"]
        render.put(chart | Explorer(run_dirs, output_dir).box._repr_mimebundle_() | {
            "text/plain": chart["text/plain"]})
        return
    for run in frame.attrs["runs"]:
        print(printable(f"{run}: {frames.headline(frame, run)}"))
    if warning := frames.loss_column(frame.attrs["runs"].values())[1]:
        print(printable(warning))
    render.put(chart)


def panels(frame: pd.DataFrame) -> dict[str, go.Figure]:
    """Return the figures beside the curves, by name: those that have something to show."""
    if frame.empty:
        return {}
    views = {"By position": figures.loss_by_position(frame),
             "Cost": figures.cost(frames.results_table(frame)),
             "Experts": figures.expert_load(frame),
             "Benchmarks": benchmark_curves(frame)}
    if frame["run"].nunique() < 2:
        del views["Cost"]
    return {name: figure for name, figure in views.items()
            if any(trace.x is not None and len(trace.x) for trace in figure.data)}


class Explorer:
    """The controls and their figures. A run has one color and one switch in all figures.

    `chosen` are the folders of the runs that were ever switched on: their order decides the colors.
    """

    def __init__(self, run_dirs: Iterable[str | Path], output_dir: str | Path):
        self.output_dir = resolve_path(output_dir).absolute()
        self.frame = frames.read_runs(run_dirs)
        self.chosen = [Path(folder) for folder in self.frame.attrs["runs"].values()]
        self.lock = threading.RLock()  # a control and the following thread may both redraw
        self._make_controls()
        self.swatches, self.switches, self.states = {}, {}, {}  # by folder
        self.charts, self.tabs = {}, w.Tab()
        self._offer_runs()
        self.draw()
        for control in (self.x, self.smoothing, self.log_x, self.log_loss):
            control.observe(lambda change: self.draw(), "value")
        self.filter.observe(lambda change: self._list_runs(), "value")
        self.text_step.observe(lambda change: self._show_texts(), "value")
        switches = w.HBox([self.log_x, self.log_loss, self.follow])
        controls = w.GridBox([self.x, self.smoothing, switches, self.filter], layout={
            "grid_template_columns": "minmax(230px, 2fr) minmax(280px, 3fr)", "width": "100%"})
        self.box = w.VBox([controls, self.rows, self.warning, self.tabs],
                          layout={"width": "100%", "max_width": "1280px"})
        self.box.add_class("lmlib-explorer")
        self.box._view_count = 0  # else None; JupyterLab counts the places where it is shown
        threading.Thread(target=self._follow, daemon=True).start()

    def _make_controls(self):
        wide, axes = {"width": "auto"}, {name: key for key, name in frames.AXES.items()}
        self.x = w.Dropdown(options=axes, description="x axis", layout=wide,
                            style={"description_width": "70px"})
        self.smoothing = w.SelectionSlider(options=SMOOTHING, description="smoothing", layout=wide,
                                           continuous_update=False,
                                           style={"description_width": "70px"})
        self.log_x, self.log_loss, self.follow = (
            w.Checkbox(name == "follow", description=name, indent=False, layout={"width": "auto"})
            for name in ("log x", "log loss", "follow"))
        self.filter = w.Text(placeholder="a part of a name, or a state", description="find runs",
                             layout=wide, style={"description_width": "70px"})
        self.rows = w.VBox(layout={"max_height": "320px", "overflow": "auto", "width": "100%"})
        self.warning, self.text = w.HTML(), w.HTML()
        self.text_step = w.SelectionSlider(options=[NO_TEXT], description="step", layout=wide)
        self.texts = w.VBox([self.text_step, self.text])

    # The list of runs

    def _offer_runs(self):
        """Make a row for each chosen run and each run under the folder, newest first."""
        self.offered = frames.overview(self.output_dir).set_index("folder", drop=False)
        self._list_runs()

    def _list_runs(self):
        """List the chosen runs, and those others that match the words of the filter."""
        words, lines = self.filter.value.lower().split(), {}
        for folder, row in self.offered.iterrows():
            line = f"{self._label(Path(folder))} · {picker.describe(row)}".lower()
            if Path(folder) not in self.chosen and all(word in line for word in words):
                lines[Path(folder)] = picker.describe(row)
        rows = [self._row(folder) for folder in [*self.chosen, *list(lines)[:MOST]]]
        for folder in list(lines)[:MOST]:
            self.states[folder].value = _gray(lines[folder])
        if len(lines) > MOST:
            rows.append(w.HTML(_gray(f"and {len(lines) - MOST} more: find them by a name")))
        self.rows.children = rows

    def _label(self, folder: Path) -> str:
        """Return a run's path inside the folder of the runs, or its whole path."""
        inside = folder.is_relative_to(self.output_dir)
        return printable(str(folder.relative_to(self.output_dir) if inside else folder))

    def _row(self, folder: Path) -> w.HBox:
        """Return a run's color, switch and state, made when they are first listed."""
        if folder not in self.switches:
            self.swatches[folder] = w.HTML(layout={"flex": "none", "width": "1em"})
            self.switches[folder] = w.Checkbox(
                folder in self.chosen, description=self._label(folder), indent=False,
                layout={"width": "auto", "max_width": "calc(100% - 2em)"})
            self.states[folder] = w.HTML(layout={"flex": "1 1 240px", "margin": "0 2px"})
            self.switches[folder].observe(lambda change: self._choose(folder), "value")
        wraps = {"flex_flow": "row wrap", "flex": "1 1 0"}
        said = w.HBox([self.switches[folder], self.states[folder]], layout=wraps)
        return w.HBox([self.swatches[folder], said], layout={"flex": "none"})

    def _choose(self, folder: Path):
        """Draw a run that was switched on or off; what it has to show is read at the first time."""
        with self.lock:
            if folder not in self.chosen:
                kept = [path for path in (*self.chosen, folder) if path.is_dir()]
                self.frame, self.chosen = frames.read_runs(kept), kept
            self.draw()

    # The charts

    def shown(self) -> list[Path]:
        """Return the folders of the runs that are switched on, in the order of their colors."""
        return [folder for folder in self.chosen if self.switches[folder].value]

    def _shown_frame(self) -> pd.DataFrame:
        """Return the records of the runs that are switched on.

        The others keep their names, which hold their colors, but stand for the folder of one that
        is on, so that they do not decide in which unit the losses are drawn.
        """
        shown, runs = self.shown(), self.frame.attrs["runs"]
        on = [run for run, folder in runs.items() if Path(folder) in shown]
        frame = self.frame[self.frame["run"].isin(on)]
        known = {run: folder if run in on else str(shown[0]) if shown else folder
                 for run, folder in runs.items()}
        frame.attrs = self.frame.attrs | {"runs": known, "on": on}
        return frame

    def _figures(self, frame: pd.DataFrame) -> dict[str, go.Figure]:
        """Return the figures that have something to show."""
        curves = figures.training_curves(frame, self.x.value, self.smoothing.value,
                                         self.log_x.value)
        curves.update_layout(margin={"t": 60}, showlegend=len(self.chosen) == 1)
        curves.layout.updatemenus = ()
        curves.layout.yaxis.type = "log" if self.log_loss.value else "linear"
        views = {"Curves": curves, **panels(frame)}
        for figure in views.values():  # the warning stands above the charts, where it can wrap
            figure.layout.annotations = [note for note in figure.layout.annotations
                                         if note.font.color != figures.COLORS[1]]
        for trace in (trace for figure in views.values() for trace in figure.data):
            run = trace.legendgroup or html.unescape(trace.name or "")
            trace.visible = run in frame.attrs["on"] or run not in frame.attrs["runs"]
        return views

    def draw(self):
        """Update the charts to the controls, the switches and the records."""
        with self.lock:
            frame = self._shown_frame()
            shown = self._figures(frame)
            for name, figure in shown.items():
                if name in self.charts:
                    self.charts[name].show(figure)
                else:
                    self.charts[name] = Chart(figure)
            self._offer_texts()
            titles = [*shown, *["Texts"] * (self.text_step.value != NO_TEXT[1])]
            if titles != list(self.tabs.titles):
                index = self.tabs.selected_index
                selected = self.tabs.titles[index] if index is not None else titles[0]
                self.tabs.selected_index = None
                self.tabs.children = [self.charts[name].box if name in shown else self.texts
                                      for name in titles]
                self.tabs.titles = titles
                self.tabs.selected_index = titles.index(selected) if selected in titles else 0
            self._show_states(frame)

    def refresh(self):
        """Read the records again and redraw; a run whose folder was deleted keeps its lines."""
        with self.lock:
            with suppress(ValueError):
                self.frame = frames.read_runs(self.chosen)
            self.draw()

    def _show_states(self, frame: pd.DataFrame):
        """Write each chosen run's color and state, and what is wrong with comparing them."""
        column, warning = frames.loss_column(self.shown())
        color = f"color: {figures.COLORS[1]}"
        self.warning.value = warning and (
            f"<b style='{color}; display: block; line-height: 1.35; padding: 6px 0'>"
            f"{html.escape(printable(warning))}</b>")
        if not self.shown():
            self.warning.value = _gray("No run is chosen: tick one in the list.")
        bits = frames.results_table(self.frame)["bits per byte"]
        for number, (run, folder) in enumerate(self.frame.attrs["runs"].items()):
            parts = frames.headline(self.frame, run).split(" | ")
            if column != "val_loss":  # losses per token would be read as if they could be compared
                parts = [part for part in parts if not part.startswith(("loss", "validation"))]
                parts.insert(2, f"{bits[run]:.3f} bits per byte")
            self.states[Path(folder)].value = _gray(" | ".join(parts))
            # Runs beyond the number of colors reuse them with another mark.
            mark = "■◆▲●"[number // len(figures.COLORS) % 4]
            color = f"color: {figures.color_of(number)}"
            self.swatches[Path(folder)].value = f"<span style='{color}'>{mark}</span>"

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
        texts = frames.samples_at(self._shown_frame(), self.text_step.value)
        self.text.value = token_html.cards(texts) if texts else "No text has been recorded yet."

    def _follow(self):
        """Redraw when records arrive, as long as the box is shown."""
        sizes, states = self._sizes(), self._states()
        while self.box.comm is not None:  # until the widget is closed
            time.sleep(2)
            if not self.box._view_count or not self.follow.value:
                continue
            if (now := self._states()) != states:  # a run started or ended
                states = now
                self._offer_runs()
                self._show_states(self.frame)
            if (now := self._sizes()) != sizes:
                sizes = now
                self.refresh()

    def _states(self) -> dict[Path, str]:
        runs = {*frames.find_runs(self.output_dir, nested=True), *self.chosen}
        return {folder: run_status(folder) for folder in runs}

    def _sizes(self) -> list[int]:
        files = [folder / "metrics.jsonl" for folder in self.chosen]
        return [file.stat().st_size if file.exists() else 0 for file in files]


def _gray(text: str) -> str:
    """Return untrusted text as gray HTML that wraps."""
    style = "display: block; opacity: 0.75; font-size: 12px; line-height: 1.35; padding: 6px 0 2px"
    return f"<span style='{style}'>{html.escape(printable(text))}</span>"
