"""Runs read as data frames, and figures drawn from them: Plotly to explore, PNG to print."""

import base64
import html
import io
import json
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmlib.config import resolve_path

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]

# (title, value of held-out evaluations, value of training steps, scale)
PANELS = [
    ("Loss (nats a token)", "val_loss", "loss", "linear"),
    ("Held-out accuracy (top-1)", "val_accuracy", None, "linear"),
    ("Held-out perplexity", "val_perplexity", None, "log"),
    ("Learning rate", None, "learning_rate", "linear"),
    ("Gradient norm", None, "grad_norm", "linear"),
    ("Tokens a second", None, "tokens_per_second", "linear"),
]


# ---------------------------------------------------------------------------------------------------
# Reading


def read_runs(run_dirs: list[str | Path] | str | Path) -> pd.DataFrame:
    """Every record of the runs as rows: run, kind, step, and a column for each value and time.

    A run being written, a torn last line or no records at all are shown as far as they go.

    Raises:
        ValueError: a folder is not there.
    """
    rows = []
    for run_dir in [run_dirs] if isinstance(run_dirs, str | Path) else run_dirs:
        folder = resolve_path(run_dir)
        if not folder.is_dir():
            raise ValueError(f"There is no run {run_dir}. `python -m lmlib runs` lists the runs.")
        file = folder / "metrics.jsonl"
        for line in file.read_text("utf-8", "replace").splitlines() if file.exists() else []:
            try:
                record = json.loads(line)
                rows.append({"run": folder.name, **record, **record.pop("timing", {})})
            except (ValueError, TypeError, AttributeError):
                continue
    frame = pd.DataFrame(rows).drop(columns="timing", errors="ignore")
    for column in ("run", "kind", "step"):
        if column not in frame:
            frame[column] = pd.Series(dtype="float64" if column == "step" else "object")
    return frame


def results_table(run_dirs: list[str | Path]) -> pd.DataFrame:
    """A row a run: its last and best held-out scores, size and cost. All scores are on held-out text."""
    frame, rows = read_runs(run_dirs), {}
    for run in frame["run"].unique():
        of_run = frame[frame["run"] == run]
        evals = of_run[of_run["kind"] == "eval"]
        if evals.empty:
            rows[run] = {"steps": int(of_run["step"].max())}
            continue
        last, best = evals.iloc[-1], evals.loc[evals["val_loss"].idxmin()]
        rows[run] = {
            "steps": int(of_run["step"].max()),
            "held-out loss": last["val_loss"],
            "± standard error": last["val_loss_stderr"],
            "best": best["val_loss"],
            "at step": int(best["step"]),
            "accuracy": last["val_accuracy"],
            "perplexity": last["val_perplexity"],
            "bits per byte": last["val_bits_per_byte"],
            "minutes": of_run["seconds"].max() / 60,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def describe(record: Any, total_steps: int) -> str:
    """A record as a line of plain text."""
    if record.kind == "step":
        left = int(record.seconds_left)
        return (
            f"Step {record.step}/{total_steps}: Loss={record.loss:.4f} | {record.tokens_per_second:,.0f} tokens/s"
            f" | {record.utilisation:.0%} of peak | {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
    if record.kind == "eval":
        return (
            f"   Val Loss: {record.val_loss:.4f}, Val Acc: {record.val_accuracy:.4f},"
            f" Perplexity: {record.val_perplexity:.2f}, Bits per byte: {record.val_bits_per_byte:.4f}"
        )
    if record.kind == "checkpoint":
        return f"💾 Checkpoint saved: {record.path}"
    if record.kind == "done":
        return f"Done: {record.step} steps, held-out loss {record.val_loss:.4f}, bits per byte {record.val_bits_per_byte:.4f}"
    if record.kind == "spike":
        return f"Step {record.step}/{total_steps}: ⚠ the loss leapt to {record.loss:.4f} from about {record.usual_loss:.4f}"
    return f"Step {record.step}/{total_steps}: ⚠ {record.kind} {record.values}"


# ---------------------------------------------------------------------------------------------------
# Drawing


def training_curves(frame: pd.DataFrame) -> go.Figure:
    """Six panels over the steps, a colour a run; a button turns the loss's axis from linear to logarithmic."""
    figure = make_subplots(2, 3, subplot_titles=[panel[0] for panel in PANELS], vertical_spacing=0.16)
    runs = list(frame["run"].unique())
    for number, run in enumerate(runs):
        for place, lines in enumerate(panel_lines(frame[frame["run"] == run])):
            for line in lines:
                figure.add_scatter(
                    x=line["x"],
                    y=line["y"],
                    mode="lines+markers" if line["held_out"] else "lines",
                    line={"color": colour(number, line, len(runs)), "width": 2 if line["bold"] else 1},
                    marker={"size": 5},
                    error_y={"array": line["error"], "thickness": 1, "width": 0} if line["error"] else None,
                    opacity=1 if line["bold"] else 0.35,
                    name=html.escape(f"{run}, {line['name']}" if len(runs) > 1 else line["name"]),
                    legendgroup=run,
                    showlegend=place == 0,
                    row=place // 3 + 1,
                    col=place % 3 + 1,
                )
    for place, (_, _, _, scale) in enumerate(PANELS):
        figure.update_yaxes(type=scale, row=place // 3 + 1, col=place % 3 + 1)
    figure.update_xaxes(title_text="step", row=2)
    buttons = [{"label": f"{s} loss", "method": "relayout", "args": [{"yaxis.type": s}]} for s in ("linear", "log")]
    menu = {"type": "buttons", "direction": "right", "buttons": buttons, "x": 0, "y": 1.2, "xanchor": "left"}
    return figure.update_layout(
        template="plotly_white",
        height=560,
        margin={"l": 50, "r": 20, "t": 90, "b": 50},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.13, "yanchor": "bottom"},
        updatemenus=[menu],
    )


def panel_lines(frame: pd.DataFrame) -> list[list[dict[str, Any]]]:
    """The lines of each panel for one run: x, y, error (or None), name, whether bold, whether held-out."""
    steps, evals = frame[frame["kind"] == "step"], frame[frame["kind"] == "eval"]
    panels = []
    for _, held_out, training, _ in PANELS:
        lines = []
        if training is not None:
            lines.append(_line(steps, training, "training", bold=held_out is None))
        if training == "loss":
            smooth = steps.assign(loss=steps["loss"].ewm(span=max(2, len(steps) // 15)).mean()) if training in steps else steps
            lines.append(_line(smooth, "loss", "training, smoothed", bold=True))
        if held_out is not None:
            lines.append(_line(evals, held_out, "held-out", bold=True, error=f"{held_out}_stderr"))
        panels.append(lines)
    return panels


def _line(rows: pd.DataFrame, column: str, name: str, bold: bool, error: str | None = None) -> dict[str, Any]:
    """One line, without points where the rows have no such column, so that a chart keeps its lines from the start."""
    rows = rows if column in rows else rows.iloc[:0]
    values = pd.to_numeric(rows[column], errors="coerce").tolist() if len(rows) else []
    return {
        **{"name": name, "x": rows["step"].tolist(), "y": values, "bold": bold},
        **{"error": rows[error].tolist() if error in rows else None, "held_out": name == "held-out"},
    }


def colour(number: int, line: dict[str, Any], runs: int) -> str:
    """A colour a run; with one run alone, training and held-out text have one each."""
    return COLOURS[(number if runs > 1 else int(line["name"].startswith("training,") or line["name"] == "training")) % 7]


def curves_png(frame: pd.DataFrame) -> bytes:
    """The same six panels as a PNG, drawn by matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.8, 6), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    runs = list(frame["run"].unique())
    for number, run in enumerate(runs):
        for place, lines in enumerate(panel_lines(frame[frame["run"] == run])):
            for line in lines:
                axes.flat[place].errorbar(
                    line["x"],
                    line["y"],
                    yerr=line["error"],
                    elinewidth=1,
                    color=colour(number, line, len(runs)),
                    linewidth=2 if line["bold"] else 1.2,
                    alpha=1 if line["bold"] else 0.45,
                    marker="o" if line["held_out"] else None,
                    markersize=3,
                    label=f"{run}, {line['name']}" if len(runs) > 1 else line["name"],
                )
    for axis, (title, _, _, scale) in zip(axes.flat, PANELS, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_yscale(scale)
        axis.grid(alpha=0.3)
        axis.set_xlabel("step")
    if runs:
        for text in axes.flat[0].legend(fontsize=8, frameon=False).get_texts():
            text.set_parse_math(False)  # a run's name may hold dollars
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(png)
    return png.getvalue()


def chart_bundle(frame: pd.DataFrame) -> dict[str, Any]:
    """The curves in every form that a notebook's reader may show: Plotly's JSON, a PNG, and a word."""
    return {
        "application/vnd.plotly.v1+json": json.loads(training_curves(frame).to_json()),
        "image/png": base64.b64encode(curves_png(frame)).decode(),
        "text/plain": f"Training curves of {', '.join(map(str, frame['run'].unique())) or 'no run'}",
    }


def save_curves(run_dir: str | Path):
    """Write training_curves.png and training_curves.html (interactive, self-contained) into the run's folder."""
    folder, frame = resolve_path(run_dir), read_runs(run_dir)
    for name, content in (
        ("training_curves.png", curves_png(frame)),
        ("training_curves.html", training_curves(frame).to_html(include_plotlyjs=True).encode()),
    ):
        draft = folder / f".{name}.draft"
        draft.write_bytes(content)
        draft.replace(folder / name)
