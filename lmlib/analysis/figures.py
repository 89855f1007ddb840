"""Draw runs with Plotly. Every figure reads on light and on dark pages; `render` makes it a PNG."""

import html
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmlib.analysis import frames, render
from lmlib.analysis.panels import (
    ACCURACY,
    BITS,
    FALLING,
    LOSS,
    NATS,
    PANELS,
    SHARES,
    half_intervals,
    panel_lines,
    top_of,
)
from lmlib.files import resolve_path
from lmlib.leaks import LEAKY_NAME

# Okabe and Ito's palette, which color-blind readers can tell apart. From the eighth run on it
# repeats, with another dash and another marker.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C"]
DASHES = ["solid", "dash", "dot", "dashdot"]
SHAPES = ["circle", "square", "diamond", "triangle-up"]
FAINT = "rgba(128, 128, 128, 0.25)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# Its middle is gray: white would shine on a dark page.
RED_BLUE = {"colorscale": [[0, "#C0392B"], [0.5, "#999999"], [1, "#0072B2"]], "cmin": 0, "cmid": 1,
            "cmax": 2}
# Zoom, pan, reset and download stay; in a column of its own at the right, clear of the legend.
MODEBAR = {"orientation": "v", "bgcolor": "rgba(0, 0, 0, 0)", "color": render.GRAY,
           "activecolor": "#0072B2",
           "remove": ["zoomin", "zoomout", "autoscale", "select", "lasso", "sendcharttocloud"]}

# The first panel is four times as large as the others. Rows and columns, in the order of PANELS.
GRID = [[{"rowspan": 2, "colspan": 2}, None, {}], [None, None, {}], [{}, {}, {}]]
PLACES = [(1, 1), (1, 3), (2, 3), (3, 1), (3, 2), (3, 3)]
HOVER_X = {"step": ",d", "tokens": ",d", "minutes": ",.1f", "flops": ".3~s"}


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

    `smoothing` is the span of the mean of the loss, in records (None: 1/15 of the run). Runs whose
    losses cannot be compared change places: bits per byte are drawn large, and a warning says why.
    """
    runs = frame.attrs["runs"]
    column, warning = frames.loss_column(runs.values())
    places = list(PLACES)
    if warning:
        places[LOSS], places[BITS] = places[BITS], places[LOSS]
    lead, single = places.index(PLACES[0]), len(runs) == 1
    figure = make_subplots(3, 3, specs=GRID, horizontal_spacing=0.07, vertical_spacing=0.115,
                           subplot_titles=[_title(places.index(place), warning, frame)
                                           for place in PLACES])
    tops: dict[int, list[float]] = {}
    for number, (run, folder) in enumerate(runs.items()):
        panels = panel_lines(frame[frame["run"] == run], x, smoothing, folder=folder)
        for panel, line in ((n, line) for n, lines in enumerate(panels) for line in lines):
            name, (row, col) = line.pop("name"), places[panel]
            shown = panel == lead and bool(line["x"]) and (single or name == "validation")
            tops.setdefault(panel, []).append(top_of(line["x"], line["y"]))
            if log_x:  # step 0 has no logarithm
                line["x"] = [value if value > 0 else None for value in line["x"]]
            if single:  # one color for validation and one for training
                number = int(name.startswith("training"))
                name += LEAKY_NAME if run.endswith(LEAKY_NAME) else ""
            add_line(figure, number, **line, name=name if single else f"{run}, {name}",
                     legendgroup=run, showlegend=shown, row=row, col=col)
    for panel, (_, _, axis, _) in enumerate(PANELS):
        row, col = places[panel]
        figure.update_yaxes(type="linear", **axis, row=row, col=col)
        if panel in FALLING and np.isfinite(top := max(tops.get(panel, [np.nan]))):
            figure.update_yaxes(autorangeoptions={"clipmax": top}, row=row, col=col)
    figure.update_xaxes(type="log" if log_x else "linear", matches="x", hoverformat=HOVER_X[x],
                        unifiedhovertitle={"text": frames.AXES[x] + " %{x}"})
    figure.update_xaxes(title_text=frames.AXES[x], row=3)
    return styled(figure, 620, warning=warning, hovermode="x unified",
                  shapes=marks(frame, x, log_x))


def _title(panel: int, warning: str, frame: pd.DataFrame) -> str:
    """Return a panel's title with its unit; as short as a narrow page needs."""
    title, unit, *_ = PANELS[panel]
    if warning and panel in (LOSS, ACCURACY):
        unit = "not comparable"
    elif panel == LOSS and np.isfinite(half_intervals(frame[frame["kind"] == "eval"])).any():
        unit += ", 95 % bars"
    return titled(title, unit)


def titled(title: str, unit: str = "") -> str:
    """Return a panel's title in bold, with its unit."""
    return f"<b>{title}</b>" + (f"  {unit}" if unit else "")


def update(widget: go.FigureWidget, frame: pd.DataFrame):
    """Move the training curves of one run, shown as a widget, to newer records; its zoom stays."""
    [folder] = frame.attrs["runs"].values()
    panels, traces = panel_lines(frame, folder=folder), iter(widget.data)
    with widget.batch_update():
        for panel, lines in enumerate(panels):
            for line, trace in zip(lines, traces, strict=False):
                trace.x, trace.y, trace.error_y.array = line["x"], line["y"], line["error"]
                trace.mode = line["mode"]
                trace.showlegend = panel == LOSS and bool(line["x"])
            axis = widget.layout[f"yaxis{panel + 1 if panel else ''}"]
            top = max(top_of(line["x"], line["y"]) for line in lines)
            if panel in FALLING and np.isfinite(top) and axis.range is None:  # not zoomed
                axis.autorangeoptions.clipmax = top
        widget.layout.shapes = marks(frame)


def marks(frame: pd.DataFrame, x: str = "step", log_x: bool = False) -> list[dict[str, Any]]:
    """Return where runs were resumed, as dashed lines through all panels, as Plotly's shapes.

    Where one run is drawn its checkpoints are ticks at the bottom of the first panel.
    """
    shapes, single = [], len(frame.attrs["runs"]) == 1
    for number, (run, folder) in enumerate(frame.attrs["runs"].items()):
        rows = frame[frame["run"] == run].dropna(subset=["step", x]).sort_values("step")
        resumed = np.interp(frames.resumes(folder), rows["step"], rows[x]) if len(rows) else []
        saved = rows.loc[rows["kind"] == "checkpoint", x] if single else []
        drawn = [("checkpoint", "solid", saved, 1, 0.035), ("resumed", "dash", resumed, 6, 1)]
        for name, dash, positions, panels, height in drawn:
            positions = [float(value) for value in positions if value > 0 or not log_x]
            shapes += [{"type": "line", "x0": at, "x1": at, "y0": 0, "y1": height, "name": name,
                        "xref": f"x{panel}", "yref": f"y{panel} domain", "legendgroup": run,
                        "showlegend": single and at == positions[0] and not panel,
                        "line": {"color": render.GRAY if single else color_of(number),
                                 "width": 1.5, "dash": dash}}
                       for at in positions for panel in ["", *range(2, panels + 1)]]
    return shapes


def color_of(number: int) -> str:
    """Return the color of a run or model, the same in every figure."""
    return COLORS[number % len(COLORS)]


def shape_of(number: int) -> str:
    """Return the marker of a run or model: another one from the eighth on."""
    return SHAPES[number // len(COLORS) % len(SHAPES)]


def styled(figure: go.Figure, height: int, top: int = 56, warning: str = "",
           **layout: Any) -> go.Figure:
    """Style a figure for light and dark pages: titles at the left above their panels.

    `top` pixels hold titles and one row of the legend; more rows, and `warning`, a sentence above
    them, get their own. `layout` is set on top of that.
    """
    lines = {"gridcolor": FAINT, "gridwidth": 1, "zeroline": False,
             "automargin": True, "title_font_size": 12, "title_standoff": 8}
    figure.update_xaxes(**lines, spikecolor=render.GRAY, spikethickness=1, spikedash="solid",
                        showspikes=layout.get("hovermode") == "x unified").update_yaxes(**lines)
    domains = [axis.domain or (0, 1) for axis in figure.select_xaxes()]
    for note in figure.layout.annotations:  # subplot titles stand in the middle of their panels
        start = min(domains, key=lambda domain: abs(sum(domain) / 2 - note.x))[0]
        note.update(x=start, xanchor="left", font_size=12, yshift=2)
    names = render.legend_of(figure)
    said, rows = textwrap.wrap(warning, 100), -(-len(names) // render.legend_columns(names))
    more = 18 * max(0, rows - 1)
    top, bottom = top + more + 17 * len(said), 50
    inner = (height := height + more + 17 * len(said)) - top - bottom  # pixels
    if said:
        figure.add_annotation(text="<br>".join(map(html.escape, said)), x=0, xanchor="left",
                              y=1 + (top - 4) / inner, yanchor="top", xref="paper", yref="paper",
                              showarrow=False, align="left", font_color=COLORS[1])
    return figure.update_layout(
        template="none", paper_bgcolor="rgba(0, 0, 0, 0)", plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"color": render.GRAY, "family": FONT, "size": 12}, height=height, autosize=True,
        margin={"l": 60, "r": 44, "t": top, "b": bottom}, modebar=MODEBAR, uirevision="same",
        hoverlabel={"bgcolor": "rgba(34, 34, 34, 0.92)", "font_color": "#fff", "namelength": -1},
        hoverdistance=40,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1 + 24 / inner,
                "yanchor": "bottom", "traceorder": "normal"}, **layout)


def loss_by_position(frame: pd.DataFrame) -> go.Figure:
    """Draw validation loss and accuracy by position in the context window, for finished runs.

    Losses of runs that cannot be compared are drawn in bits per byte, as if each position had the
    run's mean number of bytes per token.
    """
    column, warning = frames.loss_column(frame.attrs["runs"].values())
    unit = "bits per byte" if warning else "nats"
    figure = make_subplots(1, 2, subplot_titles=[
        titled("Loss by position", f"validation, {unit}"),
        titled("Accuracy by position", "not comparable" if warning else "validation, top-1")])
    profiles = frame[frame["kind"] == "profile"].drop_duplicates("run", keep="last")
    profiles = profiles.set_index("run").to_dict("index")
    for number, run in enumerate(frame.attrs["runs"]):
        evals = frame[(frame["run"] == run) & (frame["kind"] == "eval")]
        scale = (evals["val_bits_per_byte"] / evals["val_loss"]).iloc[-1] if (
            warning and len(evals) and {"val_bits_per_byte", "val_loss"} <= set(evals)) else 1.0
        for col, column in enumerate(("val_loss_by_position", "val_accuracy_by_position"), 1):
            values = profiles.get(run, {}).get(column)
            positions, means = mean_by_position(values if isinstance(values, list) else [])
            means = [mean * scale for mean in means] if col == 1 else means
            add_line(figure, number, positions, means, run, size=4, width=1.5, legendgroup=run,
                     showlegend=col == 1, row=1, col=col)
    figure.update_xaxes(type="log", title_text="position in the window", hoverformat=",d",
                        unifiedhovertitle={"text": "position %{x}"})
    figure.update_yaxes(hoverformat=".3f", col=1).update_yaxes(**SHARES, col=2)
    return styled(figure, 380, warning=warning, hovermode="x unified")


def mean_by_position(values: list[float]) -> tuple[list[float], list[float]]:
    """Return centers and means of intervals of positions that grow: 4 intervals per doubling."""
    values = pd.to_numeric(pd.Series(values, dtype=object), errors="coerce").to_numpy(float)
    edges = np.geomspace(1, len(values) + 1, 4 * len(values).bit_length() + 1)
    edges = np.unique(edges.round().astype(int))
    pairs = list(zip(edges, edges[1:], strict=False))
    return ([(a + b - 1) / 2 for a, b in pairs],
            [float(np.mean(values[a - 1 : b - 1])) for a, b in pairs])


def cost(table: pd.DataFrame) -> go.Figure:
    """Draw the validation loss of a `results_table` or `ranking` over size, time and FLOPs.

    Runs whose losses cannot be compared are drawn in bits per byte.
    """
    column, warning = frames.loss_column(table.attrs.get("runs", {}).values())
    score = "bits per byte" if warning and "bits per byte" in table else "validation loss"
    if "verdict" in table and not warning:
        table = table[table["verdict"] != "other text"]  # another scale
    panels = {("Parameters", "open: active"): ["parameters", "active"],
              ("Minutes", "of training"): ["minutes"],
              ("FLOPs", "of training"): ["FLOPs"]}
    figure = make_subplots(1, 3, subplot_titles=[titled(*title) for title in panels])
    for col, columns in enumerate(panels.values(), 1):
        for number, (name, row) in enumerate(table.iterrows()):
            known, shape = row[columns].dropna().tolist(), shape_of(number)
            add_line(figure, number, known, [row[score]] * len(known), name,
                     mode="markers", symbol=[shape, f"{shape}-open"][: len(known)], size=11,
                     legendgroup=name, showlegend=col == 1, row=1, col=col)
        known = table[columns[0]].dropna()
        wide = len(known) and known.max() > 10 * known.min() > 0  # else log ticks would be few
        figure.update_xaxes(type="log" if wide else "linear", hoverformat=".4~s", row=1, col=col)
    unit = "" if score == "bits per byte" else f" ({NATS})"
    figure.update_yaxes(hoverformat=".3f").update_yaxes(title_text=score + unit, col=1)
    return styled(figure, 380, warning=warning)


def expert_load(frame: pd.DataFrame) -> go.Figure:
    """Draw each expert's share of its layer's tokens over steps, 1 being even; a map per run."""
    known = frame[frame["expert_load"].map(_is_load)] if "expert_load" in frame else frame.iloc[:0]
    runs = dict(list(known.groupby("run", sort=False)))
    columns, rows = min(3, max(1, len(runs))), max(1, -(-len(runs) // 3))
    figure = make_subplots(rows, columns, vertical_spacing=0.25 / rows,
                           subplot_titles=[titled(html.escape(run)) for run in runs]
                           or ["No run has experts"])
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
