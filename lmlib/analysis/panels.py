"""What the panels of the training curves show: lines, smoothed and thinned out, without Plotly."""

from typing import Any

import numpy as np
import pandas as pd

from lmlib.analysis.forecasting import forecast_from
from lmlib.intervals import FEW, student_t

MAX_POINTS = 1000  # per line: a browser stays quick, and a page small
MAX_MARKERS = 50  # more than that hide the line

# How a line is drawn: arguments of `add_line`.
THIN, LINE = {"mode": "lines", "width": 1, "opacity": 0.35}, {"mode": "lines"}
POINTS = {"mode": "lines+markers"}
BAND = {"mode": "lines", "width": 0, "opacity": 0.25, "fill": "toself", "hoverinfo": "skip"}
# Title, unit, y axis, and lines: kind of record, column, name and style.
NATS = "nats per token"
SHARES = {"tickformat": ".3~p", "hoverformat": ".1%"}  # of a y axis
PANELS = [
    ("Loss", NATS, {"hoverformat": ".3f"}, [
        ("step", "loss", "training", THIN),
        ("smooth", "loss", "training, smoothed", LINE),
        ("eval", "val_loss", "validation", POINTS)]),
    ("Accuracy", "validation", SHARES | {"rangemode": "tozero"}, [
        ("eval", "val_accuracy", "validation", POINTS)]),
    ("Bits per byte", "validation", {"hoverformat": ".3f"}, [
        ("eval", "val_bits_per_byte", "validation", POINTS)]),
    ("Learning rate", "", {"hoverformat": ".3~r", "rangemode": "tozero"}, [
        ("step", "learning_rate", "training", LINE)]),
    ("Gradient norm", "", {"hoverformat": ".3f", "rangemode": "tozero"}, [
        ("step", "grad_norm", "training", LINE)]),
    ("Tokens per second", "", {"hoverformat": ",.0f", "rangemode": "tozero"}, [
        ("step", "tokens_per_second", "training", LINE)])]
LOSS, ACCURACY, BITS = 0, 1, 2  # panels
FALLING = (0, 2, 4)  # their first values would dwarf the others


def panel_lines(frame: pd.DataFrame, x: str = "step", smoothing: int | None = None, *,
                folder: str) -> list[list[dict[str, Any]]]:
    """Return the lines of each of PANELS for one run, as arguments of `add_line`."""
    rows = {kind: frame[frame["kind"] == kind] for kind in ("step", "eval")}
    rows["smooth"] = steps = rows["step"]
    if "loss" in steps:
        span = smoothing or max(2, len(steps) // 15)  # explorer's "auto" is 0
        rows["smooth"] = steps.assign(loss=smoothed(steps["loss"], span))
    panels = [[_line(rows[kind], x, column, name, style) for kind, column, name, style in lines]
              for _, _, _, lines in PANELS]
    panels[LOSS].append(_forecast_band(frame, x, folder))
    return panels


def _forecast_band(frame: pd.DataFrame, x: str, folder: str) -> dict[str, Any]:
    """Return the outline of the forecast's interval as a line; without points where there is none.

    The minutes that are left are not known, and the band is then left out.
    """
    expected, xs, ys = forecast_from(frame, folder) if x != "minutes" else None, [], []
    if expected is not None:
        newest, curve = frame.loc[frame["step"].idxmax()], expected.curve
        steps = curve["step"] * (newest[x] / newest["step"])  # tokens and FLOPs grow with steps
        if np.isfinite(steps).all():
            xs, ys = [*steps, *steps[::-1]], [*curve["high"], *curve["low"][::-1]]
    return {"x": xs, "y": ys, "name": "forecast of validation, 90 %", **BAND, "error": None}


def smoothed(values: pd.Series, span: int) -> np.ndarray:
    """Return the mean of the `span` values around each, of fewer at the start and at the end.

    At the start, where curves fall, the window stays centered: a running mean would lag behind.
    """
    index = np.arange(len(values))
    reach = np.minimum(span // 2, index)
    first, last = index - reach, np.minimum(index + reach + 1, len(values))
    sums, counts = (np.concatenate([[0.0], part.cumsum()])
                    for part in (values.fillna(0).to_numpy(), values.notna().to_numpy()))
    counts = counts[last] - counts[first]
    return np.where(counts > 0, (sums[last] - sums[first]) / np.maximum(counts, 1), np.nan)


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
    mode = "lines" if len(rows) > MAX_MARKERS else style["mode"]
    return {"x": rows[x].tolist(), "y": rows[column].tolist(), "name": name, **style, "mode": mode,
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


def top_of(x: list, y: list) -> float:
    """Return the top of a y axis that leaves out the first 5 % of a run; NaN without values."""
    points = pd.DataFrame({"x": x, "y": y}, dtype=float).dropna()
    late = points.loc[points["x"] >= 0.05 * points["x"].max(), "y"]
    return late.max() + 0.05 * (late.max() - late.min()) if len(late) > 1 else np.nan
