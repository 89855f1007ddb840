"""Draw runs with Plotly. Every figure reads on light and on dark pages; `render` makes it a PNG."""

import html
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmlib.analysis import frames, render
from lmlib.files import resolve_path
from lmlib.intervals import FEW, student_t
from lmlib.leaks import LEAKY_NAME

# Okabe and Ito's palette, which color-blind readers can tell apart. From the eighth run on it
# repeats, with another dash and another marker.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C"]
DASHES = ["solid", "dash", "dot", "dashdot"]
SHAPES = ["circle", "square", "diamond", "triangle-up"]
FAINT = "rgba(128, 128, 128, 0.25)"
MAX_POINTS = 1000  # per line: a browser stays quick, and a page small
RED_BLUE = {"colorscale": "RdBu", "cmin": 0, "cmid": 1, "cmax": 2}

# How a line is drawn: arguments of `add_line`.
THIN, LINE = {"mode": "lines", "width": 1, "opacity": 0.35}, {"mode": "lines"}
POINTS, MARKS = {"mode": "lines+markers"}, {"mode": "markers", "size": 9}
# Title, scale of the y axis, and lines: kind of record, column, name and style.
PANELS = [
    ("Loss (nats per token)", "linear", [
        ("step", "loss", "training", THIN),
        ("smooth", "loss", "training, smoothed", LINE),
        ("eval", "val_loss", "validation", POINTS),
        ("checkpoint", "val_loss", "checkpoints", {**MARKS, "symbol": "diamond-open"}),
        ("resume", "val_loss", "resumed here", {**MARKS, "symbol": "triangle-up"})]),
    ("Validation accuracy (top-1)", "linear", [("eval", "val_accuracy", "validation", POINTS)]),
    ("Validation perplexity", "log", [("eval", "val_perplexity", "validation", POINTS)]),
    ("Learning rate", "linear", [("step", "learning_rate", "training", LINE)]),
    ("Gradient norm", "linear", [("step", "grad_norm", "training", LINE)]),
    ("Tokens per second", "linear", [("step", "tokens_per_second", "training", LINE)])]


def add_line(figure: go.Figure, number: int, x: list, y: list, name: str, *,
             mode: str = "lines+markers", symbol: Any = None, size: float = 5, width: float = 2,
             error: list | None = None, **options: Any):
    """Add a line, or markers, in the color and dash of a run or model; see `add_scatter`."""
    color, dash = color_of(number), DASHES[number // len(COLORS) % len(DASHES)]
    figure.add_scatter(x=x, y=y, mode=mode, name=html.escape(name),  # Plotly shows HTML in names
                       line={"color": color, "dash": dash, "width": width},
                       marker={"color": color, "symbol": symbol, "size": size},
                       error_y={"array": error, "thickness": 1, "width": 0} if error else None,
                       **options)


def training_curves(frame: pd.DataFrame, x: str = "step", smoothing: int | None = None,
                    log_x: bool = False) -> go.Figure:
    """Draw PANELS over steps, tokens, minutes or FLOPs (`x`), with one color per run.

    `smoothing` is the span of the running mean of the loss, in records (None: 1/15 of the run).
    """
    figure = make_subplots(2, 3, subplot_titles=[panel[0] for panel in PANELS],
                           vertical_spacing=0.16)
    single = len(frame.attrs["runs"]) == 1
    for number, (run, folder) in enumerate(frame.attrs["runs"].items()):
        panels = panel_lines(frame[frame["run"] == run], x, smoothing, folder=folder)
        for panel, line in ((n, line) for n, lines in enumerate(panels) for line in lines):
            name = line.pop("name")
            shown = panel == 0 and bool(line["x"]) and (single or name == "validation")
            if log_x:  # step 0 has no logarithm
                line["x"] = [value if value > 0 else None for value in line["x"]]
            if single:  # one color for validation and one for training
                number = int(name.startswith("training"))
                name += LEAKY_NAME if run.endswith(LEAKY_NAME) else ""
            add_line(figure, number, **line, name=name if single else f"{run}, {name}",
                     legendgroup=run, showlegend=shown, row=1 + panel // 3, col=1 + panel % 3)
    for panel, (_, scale, _) in enumerate(PANELS):
        figure.update_yaxes(type=scale, row=1 + panel // 3, col=1 + panel % 3)
    figure.update_yaxes(title_text="bars: 95 % over documents", row=1, col=1)
    figure.update_xaxes(type="log" if log_x else "linear")
    figure.update_xaxes(title_text=frames.AXES[x], row=2)
    buttons = [{"label": f"{scale} loss", "method": "relayout", "args": [{"yaxis.type": scale}]}
               for scale in ("linear", "log")]
    menu = {"type": "buttons", "direction": "right", "buttons": buttons, "x": 0, "y": 1.2,
            "xanchor": "left", "bgcolor": "rgba(128, 128, 128, 0.15)", "bordercolor": FAINT}
    return styled(figure, height=560, top=90, updatemenus=[menu])


def panel_lines(frame: pd.DataFrame, x: str = "step", smoothing: int | None = None, *,
                folder: str) -> list[list[dict[str, Any]]]:
    """Return the lines of each of PANELS for one run, as arguments of `add_line`."""
    rows = {kind: frame[frame["kind"] == kind] for kind in ("step", "eval", "checkpoint")}
    rows["smooth"] = steps = rows["step"]
    if "loss" in steps:
        span = smoothing or max(2, len(steps) // 15)  # explorer's "auto" is 0
        rows["smooth"] = steps.assign(loss=steps["loss"].ewm(span=span).mean())
    # A run resumes between two evaluations: its mark lies on the line that connects them.
    evals = rows["eval"].dropna(subset="val_loss") if "val_loss" in frame else frame.iloc[:0]
    resumed = frames.resumes(folder) if len(evals) else []
    marks = {column: np.interp(resumed, evals["step"], evals[column])
             for column in (*frames.AXES, "val_loss") if resumed}
    rows["resume"] = pd.DataFrame({**marks, "step": resumed})
    return [[_line(rows[kind], x, column, name, style) for kind, column, name, style in lines]
            for _, _, lines in PANELS]


def _line(rows: pd.DataFrame, x: str, column: str, name: str, style: dict) -> dict[str, Any]:
    """Return a line as arguments of `add_line`, without points where the column is missing."""
    if not {x, column} <= set(rows):
        rows = pd.DataFrame(columns=[x, column])
    rows = rows[rows[x].notna()]
    if len(rows) > MAX_POINTS:  # each interval's lowest and highest; means would hide spikes
        edges = np.linspace(0, len(rows), MAX_POINTS // 2 + 1).astype(int)
        intervals, values = np.digitize(np.arange(len(rows)), edges), rows[column]
        low = values.fillna(np.inf).groupby(intervals).idxmin()
        high = values.fillna(-np.inf).groupby(intervals).idxmax()
        rows = rows.loc[sorted({*low, *high, rows.index[-1]})]
    errors = half_intervals(rows) if column == "val_loss" else []
    return {"x": rows[x].tolist(), "y": rows[column].tolist(), "name": name, **style,
            "error": errors if np.isfinite(errors).any() else None}


def half_intervals(evals: pd.DataFrame) -> list[float]:
    """Return half the 95 % interval over documents of each validation loss, NaN where unknown.

    Fewer than FEW documents give no bar, as it would say nothing and hide the curve.
    """
    if not {"val_loss_stderr", "val_documents"} <= set(evals):
        return []
    documents = evals["val_documents"].where(evals["val_documents"].between(FEW, 2**53))
    quantiles = {count: student_t(0.975, int(count) - 1) for count in documents.dropna().unique()}
    errors = evals["val_loss_stderr"].where(evals["val_loss_stderr"] >= 0)
    return (errors * documents.map(quantiles)).tolist()


def color_of(number: int) -> str:
    """Return the color of a run or model, the same in every figure."""
    return COLORS[number % len(COLORS)]


def shape_of(number: int) -> str:
    """Return the marker of a run or model: another one from the eighth on."""
    return SHAPES[number // len(COLORS) % len(SHAPES)]


def styled(figure: go.Figure, height: int, top: int = 60, **layout: Any) -> go.Figure:
    """Style a figure for light and dark pages: `top` pixels for titles, `layout` on top of that."""
    lines = {"gridcolor": FAINT, "zeroline": False, "linecolor": FAINT}
    figure.update_xaxes(**lines).update_yaxes(**lines).update_annotations(font_size=14)
    return figure.update_layout(
        template="none", paper_bgcolor="rgba(0, 0, 0, 0)", plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"color": render.GRAY}, height=height, margin={"l": 60, "r": 20, "t": top, "b": 50},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.13, "yanchor": "bottom"},
        **layout)


def loss_by_position(frame: pd.DataFrame) -> go.Figure:
    """Draw validation loss and accuracy by position in the context window, for finished runs."""
    figure = make_subplots(1, 2, subplot_titles=["Validation loss by position (nats)",
                                                 "Validation accuracy by position"])
    profiles = frame[frame["kind"] == "profile"].drop_duplicates("run", keep="last")
    profiles = profiles.set_index("run").to_dict("index")
    for number, run in enumerate(frame.attrs["runs"]):
        for col, column in enumerate(("val_loss_by_position", "val_accuracy_by_position"), 1):
            values = profiles.get(run, {}).get(column)
            positions, means = mean_by_position(values if isinstance(values, list) else [])
            add_line(figure, number, positions, means, run, size=4, width=1.5, legendgroup=run,
                     showlegend=col == 1, row=1, col=col)
    figure.update_xaxes(type="log", title_text="position")
    return styled(figure, height=380)


def mean_by_position(values: list[float]) -> tuple[list[float], list[float]]:
    """Return centers and means of intervals of positions that grow: 4 intervals per doubling."""
    values = pd.to_numeric(pd.Series(values, dtype=object), errors="coerce").to_numpy(float)
    edges = np.geomspace(1, len(values) + 1, 4 * len(values).bit_length() + 1)
    edges = np.unique(edges.round().astype(int))
    pairs = list(zip(edges, edges[1:], strict=False))
    return ([(a + b - 1) / 2 for a, b in pairs],
            [float(np.mean(values[a - 1 : b - 1])) for a, b in pairs])


def cost(table: pd.DataFrame) -> go.Figure:
    """Draw the validation loss of a `results_table` or `ranking` over size, time and FLOPs."""
    panels = {"parameters (open: active)": ["parameters", "active"],
              frames.AXES["minutes"]: ["minutes"], frames.AXES["flops"]: ["FLOPs"]}
    figure = make_subplots(1, 3, subplot_titles=[f"Validation loss by {size}" for size in panels])
    for col, columns in enumerate(panels.values(), 1):
        for number, (name, row) in enumerate(table.iterrows()):
            known, shape = row[columns].dropna().tolist(), shape_of(number)
            add_line(figure, number, known, [row["validation loss"]] * len(known), name,
                     mode="markers", symbol=[shape, f"{shape}-open"][: len(known)], size=11,
                     legendgroup=name, showlegend=col == 1, row=1, col=col)
        known = table[columns[0]].dropna()
        wide = len(known) and known.max() > 10 * known.min() > 0  # else log ticks would be few
        figure.update_xaxes(type="log" if wide else "linear", row=1, col=col)
    return styled(figure, height=380)


def expert_load(frame: pd.DataFrame) -> go.Figure:
    """Draw each expert's share of its layer's tokens over steps, 1 being even; a map per run."""
    known = frame[frame["expert_load"].map(_is_load)] if "expert_load" in frame else frame.iloc[:0]
    runs = dict(list(known.groupby("run", sort=False)))
    columns, rows = min(3, max(1, len(runs))), max(1, -(-len(runs) // 3))
    figure = make_subplots(rows, columns, vertical_spacing=0.25 / rows,
                           subplot_titles=list(map(html.escape, runs)) or ["No run has experts"])
    for number, (run, records) in enumerate(runs.items()):
        sizes = records["expert_load"].map(lambda load: tuple(map(len, load)))
        records = records[sizes == sizes.iloc[0]]  # the columns of a heat map have one length
        loads = [[share * len(layer) for layer in load for share in layer]
                 for load in records["expert_load"]]
        experts = [f"{layer}.{e}" for layer, size in enumerate(sizes.iloc[0]) for e in range(size)]
        figure.add_heatmap(x=records["step"].tolist(), y=experts, z=np.array(loads).T.tolist(),
                           name=html.escape(run), coloraxis="coloraxis",
                           row=number // columns + 1, col=number % columns + 1)
    figure.update_xaxes(title_text="step", row=rows)
    figure.update_yaxes(type="category", tickfont_size=9, nticks=24)
    figure.update_yaxes(title_text="layer.expert", col=1)
    return styled(figure, height=120 + 260 * rows if runs else 100, coloraxis=RED_BLUE,
                  coloraxis_colorbar_title_text="share")


def _is_load(value: Any) -> bool:
    """Check whether a value is a list of layers, each a list of numbers."""
    return bool(value) and isinstance(value, list) and all(
        layer and isinstance(layer, list) and all(isinstance(share, int | float) for share in layer)
        for layer in value)


def learning_rates(search: Any) -> go.Figure:
    """Draw the losses of a learning-rate search and its suggestion (`find_learning_rate`)."""
    name = "muon_learning_rate" if search.config.optimizer == "muon" else "learning_rate"
    peak, factors, figure = getattr(search.config, name), search.factors, go.Figure()
    add_line(figure, 0, [peak * factor for factor in factors], search.losses, "loss, smoothed",
             mode="lines")
    marks = [("suggestion", search.factor, "diamond-open"), ("recipe", 1.0, "triangle-up")]
    for number, (label, factor, symbol) in enumerate(marks, 1):
        tested = factor is not None and factors and factors[0] <= factor <= factors[-1]
        x, y = ([factor], np.interp([factor], factors, search.losses)) if tested else ([], [])
        add_line(figure, number, [peak * factor for factor in x], list(y), label, mode="markers",
                 symbol=symbol, size=13)
    return styled(figure, height=360, xaxis_type="log", xaxis_title_text=name,
                  yaxis_title_text="loss (nats per token)")


def chart_bundle(frame: pd.DataFrame) -> dict[str, Any]:
    """Return the training curves as a notebook's output (see `render.bundle`)."""
    runs = ", ".join(frame.attrs["runs"]) or "no run"
    return render.bundle(training_curves(frame), f"Training curves of {runs}")


def save_curves(run_dir: str | Path):
    """Save training_curves.png and the interactive training_curves.html into the run's folder."""
    figure = training_curves(frames.read_runs(run_dir))
    for name in ("training_curves.png", "training_curves.html"):
        render.save(figure, resolve_path(run_dir) / name)
