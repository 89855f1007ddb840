"""Figures of runs: Plotly to explore, and the same figure as a PNG to print. Both read on light and on dark pages."""

import html
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmlib.analysis import frames, render
from lmlib.files import resolve_path
from lmlib.leaks import LEAKY_NAME

# Okabe and Ito's colors, which color-blind readers can tell apart, on white and on black; beyond the seventh run dashes help.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C"]


DASHES = ["solid", "dash", "dot", "dashdot"]


FAINT = "rgba(128, 128, 128, 0.25)"


POINTS = 1000  # of a line are drawn, at most


# (title, value of held-out evaluations, value of training steps, scale)
PANELS = [
    ("Loss (nats a token)", "val_loss", "loss", "linear"),
    ("Held-out accuracy (top-1)", "val_accuracy", None, "linear"),
    ("Held-out perplexity", "val_perplexity", None, "log"),
    ("Learning rate", None, "learning_rate", "linear"),
    ("Gradient norm", None, "grad_norm", "linear"),
    ("Tokens a second", None, "tokens_per_second", "linear"),
]


def training_curves(frame: pd.DataFrame, x: str = "step", smoothing: int | None = None, log_x: bool = False) -> go.Figure:
    """Six panels over steps, tokens, minutes or flops (`x`), a color a run.

    The raw training loss stands faint under the one smoothed over `smoothing` records (None: a fifteenth of the run);
    diamonds are checkpoints, triangles are resumes. A button turns the loss's axis from linear to logarithmic.
    """
    figure = make_subplots(2, 3, subplot_titles=[panel[0] for panel in PANELS], vertical_spacing=0.16)
    runs = names_of(frame)
    for number, run in enumerate(runs):
        folder, mark = frame.attrs.get("runs", {}).get(run), LEAKY_NAME if run.endswith(LEAKY_NAME) else ""
        for place, lines in enumerate(panel_lines(frame[frame["run"] == run], x, smoothing, folder)):
            for line in lines:
                # one run alone has a color for held-out and one for training text
                color = color_of(number if len(runs) > 1 else int(line["name"].startswith("training")))
                figure.add_scatter(
                    x=[value if value > 0 else None for value in line["x"]] if log_x else line["x"],  # no logarithm of step 0
                    y=line["y"],
                    mode=line["mode"],
                    line={"color": color, "width": 2 if line["bold"] else 1, "dash": dash_of(number)},
                    marker={
                        "size": 9 if line["symbol"] else 5,
                        "symbol": line["symbol"],
                        "color": color,
                    },
                    error_y={"array": line["error"], "thickness": 1, "width": 0} if line["error"] else None,
                    opacity=1 if line["bold"] else 0.35,
                    name=html.escape(f"{run}, {line['name']}" if len(runs) > 1 else line["name"] + mark),
                    legendgroup=run,
                    showlegend=place == 0 and bool(line["x"]) and (len(runs) == 1 or line["name"] == "held-out"),
                    row=place // 3 + 1,
                    col=place % 3 + 1,
                )
    for place, (_, _, _, scale) in enumerate(PANELS):
        figure.update_yaxes(type=scale, row=place // 3 + 1, col=place % 3 + 1)
    figure.update_xaxes(title_text=frames.AXES[x], row=2)
    figure.update_xaxes(type="log" if log_x else "linear")
    buttons = [{"label": f"{s} loss", "method": "relayout", "args": [{"yaxis.type": s}]} for s in ("linear", "log")]
    menu = {"type": "buttons", "direction": "right", "buttons": buttons, "x": 0, "y": 1.2, "xanchor": "left"}
    menu |= {"bgcolor": "rgba(128, 128, 128, 0.15)", "bordercolor": FAINT}
    return on_any_page(figure, height=560, top=90).update_layout(updatemenus=[menu])


def panel_lines(
    frame: pd.DataFrame, x: str = "step", smoothing: int | None = None, folder: str | None = None
) -> list[list[dict[str, Any]]]:
    """The lines of each panel for one run: x, y, error (or None), name, whether bold, mode and symbol."""
    steps, evals, saved = (frame[frame["kind"] == kind] for kind in ("step", "eval", "checkpoint"))
    panels = []
    for place, (_, held_out, training, _) in enumerate(PANELS):
        lines = []
        if training is not None:
            lines.append(_line(steps, x, training, "training", bold=held_out is None))
        if training == "loss":
            span = smoothing or max(2, len(steps) // 15)
            smooth = steps.assign(loss=steps["loss"].ewm(span=max(1, span)).mean()) if training in steps else steps
            lines.append(_line(smooth, x, "loss", "training, smoothed", bold=True))
        if held_out is not None:
            lines.append(_line(evals, x, held_out, "held-out", bold=True, error=f"{held_out}_stderr", mode="lines+markers"))
        if place == 0:
            lines.append(_line(saved, x, "val_loss", "checkpoints", bold=True, mode="markers", symbol="diamond-open"))
            started = frames.resumes(folder) if folder else []
            again = pd.DataFrame(
                {"step": started, **{name: _at(evals, started, name) for name in (*frames.AXES, "val_loss") if name != "step"}}
            )
            lines.append(_line(again, x, "val_loss", "resumed here", bold=True, mode="markers", symbol="triangle-up"))
        panels.append(lines)
    return panels


def _line(
    rows: pd.DataFrame,
    x: str,
    column: str,
    name: str,
    bold: bool,
    error: str | None = None,
    mode: str = "lines",
    symbol: str | None = None,
) -> dict[str, Any]:
    """One line, without points where the rows have no such column, so that a chart keeps its lines from the start."""
    rows = rows[rows[x].notna()] if column in rows and x in rows else rows.iloc[:0]
    rows = rows.iloc[_kept(rows[column].to_numpy(float))] if len(rows) > POINTS else rows
    return {
        **{"x": rows[x].tolist() if len(rows) else [], "y": rows[column].tolist() if len(rows) else [], "name": name},
        **{"error": rows[error].clip(lower=0).tolist() if error in rows else None, "bold": bold, "mode": mode, "symbol": symbol},
    }


def _kept(values: np.ndarray) -> np.ndarray:
    """Which of many points are drawn: the lowest and the highest of each of POINTS / 2 stretches, so that no spike is lost."""
    edges = np.linspace(0, len(values), POINTS // 2 + 1).astype(int)
    shown = np.nan_to_num(values, nan=np.inf)
    low = [start + shown[start:end].argmin() for start, end in zip(edges, edges[1:], strict=False)]
    high = [start + np.nan_to_num(values[start:end], nan=-np.inf).argmax() for start, end in zip(edges, edges[1:], strict=False)]
    return np.unique([*low, *high, len(values) - 1])


def _at(rows: pd.DataFrame, steps: list[int], column: str) -> list[float]:
    """A column's values at steps between its records."""
    known = rows[rows[column].notna()] if column in rows else rows.iloc[:0]
    return np.interp(steps, known["step"], known[column]).tolist() if len(known) else [np.nan] * len(steps)


def names_of(frame: pd.DataFrame) -> list[str]:
    """The runs of a frame in the order in which they were asked for, which decides their colors in every figure."""
    return list(frame.attrs.get("runs") or frame["run"].unique())


def color_of(number: int) -> str:
    """Of the run or model with this number, in every figure."""
    return COLORS[number % len(COLORS)]


def dash_of(number: int) -> str:
    return DASHES[number // len(COLORS) % len(DASHES)]


def symbols(number: int) -> list[str]:
    """Filled and open, of one shape a round of the colors."""
    shape = ["circle", "square", "diamond", "triangle-up"][number // len(COLORS) % 4]
    return [shape, f"{shape}-open"]


def on_any_page(figure: go.Figure, height: int, top: int = 60) -> go.Figure:
    """Without a background and in greys that read on white and on black; `top` pixels are left for titles and legend."""
    figure.update_xaxes(gridcolor=FAINT, zeroline=False, linecolor=FAINT)
    figure.update_yaxes(gridcolor=FAINT, zeroline=False, linecolor=FAINT)
    figure.update_annotations(font={"size": 14})
    return figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"color": render.GREY},
        height=height,
        margin={"l": 60, "r": 20, "t": top, "b": 50},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.13, "yanchor": "bottom"},
    )


def loss_by_position(frame: pd.DataFrame) -> go.Figure:
    """Held-out loss and accuracy by position in the window, as the finished runs among these recorded them."""
    titles = ["Held-out loss by position in the window (nats)", "Held-out accuracy by position"]
    figure, runs = make_subplots(1, 2, subplot_titles=titles), names_of(frame)
    profiles = frame[frame["kind"] == "profile"]
    for number, run in enumerate(runs):
        last = profiles[profiles["run"] == run].tail(1).to_dict("records")
        for place, column in enumerate(("val_loss_by_position", "val_accuracy_by_position")):
            values = last[0].get(column) if last else None
            positions, means = stretches(values if isinstance(values, list) else [])
            figure.add_scatter(
                x=positions,
                y=means,
                mode="lines+markers",
                marker={"size": 4, "color": color_of(number)},
                line={"color": color_of(number), "dash": dash_of(number), "width": 1.5},
                name=html.escape(run),
                legendgroup=run,
                showlegend=place == 0,
                row=1,
                col=place + 1,
            )
    figure.update_xaxes(type="log", title_text="position")
    return on_any_page(figure, height=380)


def stretches(values: list[float]) -> tuple[list[float], list[float]]:
    """Means of values over stretches that grow with the position (1, 2, 3, ... then four to each doubling), and their middles."""
    values = pd.to_numeric(pd.Series(values, dtype=object), errors="coerce").tolist()
    edges = np.unique(np.geomspace(1, len(values) + 1, 4 * len(values).bit_length() + 1).round().astype(int)) if values else []
    pairs = list(zip(edges, edges[1:], strict=False))
    return [(a + b - 1) / 2 for a, b in pairs], [float(np.mean(values[a - 1 : b - 1])) for a, b in pairs]


def cost(table: pd.DataFrame) -> go.Figure:
    """The held-out loss of each row of a `results_table` or `ranking` against parameters, minutes and operations."""
    columns = {"parameters": "parameters (open: active)", "minutes": "minutes of training", "FLOPs": "floating-point operations"}
    figure = make_subplots(1, 3, subplot_titles=[f"Held-out loss by {name}" for name in columns.values()])
    for number, (name, row) in enumerate(table.iterrows()):
        for place, column in enumerate(columns):
            values = [row.get(column), row.get("active")] if column == "parameters" else [row.get(column)]
            shown = [value for value in values if pd.notna(value)]
            figure.add_scatter(
                x=shown,
                y=[row.get("held-out loss")] * len(shown),
                mode="markers",
                marker={"color": color_of(number), "size": 11, "symbol": symbols(number)[: len(shown)]},
                name=html.escape(str(name)),
                legendgroup=str(name),
                showlegend=place == 0,
                row=1,
                col=place + 1,
            )
    for axis, column in zip(("xaxis", "xaxis2", "xaxis3"), columns, strict=True):
        known = pd.to_numeric(table.get(column, pd.Series(dtype=float)), errors="coerce").dropna()
        figure.layout[axis].type = "log" if len(known) and known.min() > 0 and known.max() > 10 * known.min() else "linear"
    return on_any_page(figure, height=380)


def expert_load(frame: pd.DataFrame) -> go.Figure:
    """How evenly the routers of each run spread the tokens: an expert's share of a step's choices over an even share, a row
    an expert, layer above layer; 1 is even."""
    known = frame[frame["expert_load"].map(_is_load)] if "expert_load" in frame else frame.iloc[:0]
    runs = [run for run in names_of(frame) if run in set(known["run"])]
    columns = min(3, max(1, len(runs)))
    rows_of_charts = -(-len(runs) // columns) or 1
    titles = [html.escape(run) for run in runs] or ["No run has experts"]
    figure = make_subplots(rows_of_charts, columns, subplot_titles=titles, vertical_spacing=0.25 / rows_of_charts)
    for place, run in enumerate(runs):
        rows = known[known["run"] == run]
        load = rows["expert_load"].iloc[0]
        rows = rows[rows["expert_load"].map(lambda other, load=load: [*map(len, other)] == [*map(len, load)])]
        shares = [[share * len(layer) for layer in load for share in layer] for load in rows["expert_load"]]
        figure.add_heatmap(
            x=rows["step"].tolist(),
            y=[f"{n}.{e}" for n, layer in enumerate(load) for e in range(len(layer))],
            z=np.array(shares).T.tolist(),
            coloraxis="coloraxis",
            name=html.escape(run),
            row=place // columns + 1,
            col=place % columns + 1,
        )
    figure.update_xaxes(title_text="step", row=rows_of_charts)
    figure.update_yaxes(type="category", tickfont={"size": 9}, nticks=24)
    figure.update_yaxes(title_text="layer.expert", col=1)
    scale = {"colorscale": "RdBu", "cmin": 0, "cmid": 1, "cmax": 2, "colorbar": {"title": {"text": "share"}}}
    return on_any_page(figure, height=120 + 260 * rows_of_charts if runs else 100).update_layout(coloraxis=scale)


def _is_load(load: Any) -> bool:
    layers = load if isinstance(load, list) else []
    return bool(layers) and all(
        row and isinstance(row, list) and all(isinstance(share, int | float) for share in row) for row in layers
    )


def learning_rates(found: Any) -> go.Figure:
    """A range test's losses over its rates, and its suggestion (see `sweep.find_learning_rate`)."""
    name, figure = "muon_learning_rate" if found.config.optimizer == "muon" else "learning_rate", go.Figure()
    peak = getattr(found.config, name)
    figure.add_scatter(
        x=[peak * f for f in found.factors], y=found.losses, mode="lines", line={"color": COLORS[0]}, name="loss, smoothed"
    )
    marks = {"suggestion": (found.factor, "diamond-open", COLORS[1]), "the recipe's": (1.0, "triangle-up", COLORS[2])}
    for label, (factor, symbol, color) in marks.items():
        inside = factor is not None and found.factors and found.factors[0] <= factor <= found.factors[-1]
        figure.add_scatter(
            x=[peak * factor] if inside else [],
            y=[float(np.interp(factor, found.factors, found.losses))] if inside else [],
            mode="markers",
            marker={"size": 13, "symbol": symbol, "color": color},
            name=label,
        )
    figure.update_xaxes(type="log", title_text=name)
    figure.update_yaxes(title_text="loss (nats)")
    return on_any_page(figure, height=360)


def chart_bundle(frame: pd.DataFrame) -> dict[str, Any]:
    """The training curves in every form."""
    return render.bundle(training_curves(frame), f"Training curves of {', '.join(map(str, names_of(frame))) or 'no run'}")


def save_curves(run_dir: str | Path):
    """Write training_curves.png and training_curves.html (interactive, self-contained) into the run's folder."""
    folder = resolve_path(run_dir)
    figure = training_curves(frames.read_runs(folder))
    for name in ("training_curves.png", "training_curves.html"):
        render.save(figure, folder / name)
