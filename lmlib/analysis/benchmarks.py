"""The scores that `lmlib benchmark` keeps in the folders of runs: as a frame and as a figure."""

import html
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmlib.analysis import figures, render
from lmlib.analysis.panels import half_intervals
from lmlib.files import read_mapping
from lmlib.text import printable

NUMBERS = ["step", "score", "stderr", "chance", "items", "clusters"]


def read_benchmarks(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a row per score of the runs in a frame of `read_runs`: run, task, metric, NUMBERS."""
    files = [(run, read_mapping(file)) for run, folder in frame.attrs["runs"].items()
             for file in Path(folder).glob("benchmarks/step_*.json")]
    rows = [{**score, "run": run, "step": content.get("step")} for run, content in files
            if isinstance(scores := content.get("scores"), list)
            for score in scores if isinstance(score, dict)]
    table = pd.DataFrame(rows).reindex(columns=["run", "task", "metric", *NUMBERS])
    table[NUMBERS] = table[NUMBERS].apply(pd.to_numeric, errors="coerce").astype(float)
    table[["task", "metric"]] = table[["task", "metric"]].map(lambda name: printable(str(name)))
    return table.dropna(subset=["step", "score"]).sort_values("step", kind="stable")


def benchmark_curves(frame: pd.DataFrame) -> go.Figure:
    """Draw each task's scores over steps, with 95 % intervals and the chance level (dotted)."""
    panels = list(read_benchmarks(frame).groupby(["task", "metric"]))
    columns, rows = min(3, max(1, len(panels))), max(1, -(-len(panels) // 3))
    figure = make_subplots(rows, columns, vertical_spacing=0.25 / rows, subplot_titles=[
        figures.titled(html.escape(task), html.escape(f"{metric}, chance {of['chance'].max():.3g}"))
        for (task, metric), of in panels])
    for panel, ((_, metric), scores) in enumerate(panels):
        place = {"row": panel // 3 + 1, "col": panel % 3 + 1, "showlegend": not panel}
        known = scores.rename(columns={"stderr": "val_loss_stderr", "clusters": "val_documents"})
        for number, run in enumerate(frame.attrs["runs"]):
            own = known[known["run"] == run]
            figures.add_line(figure, number, own["step"].tolist(), own["score"].tolist(), run,
                             error=half_intervals(own), legendgroup=run, **place)
        if metric != "bits_per_byte":  # its 8 bits would flatten the curves
            figure.add_scatter(x=scores["step"].tolist(), y=scores["chance"].tolist(),
                               mode="lines", name="chance", marker={"size": 5}, **place,
                               line={"color": render.GRAY, "dash": "dot", "width": 1})
    figure.update_xaxes(title_text="step", row=rows).update_yaxes(hoverformat=".3f")
    return figures.styled(figure, 120 + 240 * rows)
