"""What an audit found, for people: its verdicts as a table, its pictures, and both as a page."""

import html
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmlib.analysis import figures, render
from lmlib.audit.report import TOLERANCE, Report
from lmlib.text import printable


def picture(reports: list[Report]) -> go.Figure:
    """What an audit's reports have to show: which logits depend on which tokens (a leak is red), and loss and accuracy by
    position in a window."""
    numbers = {report.check: report.numbers for report in reports}
    titles = ["Logits at t that see token s (red: a leak)", "Loss by position (nats)", "Accuracy by position"]
    figure = make_subplots(1, 3, subplot_titles=titles)
    length = max(2, int(numbers.get("causality", {}).get("longest", 2)))
    pairs = numbers.get("causality", {}).get("pairs")
    leaking = np.zeros((length, length)) if pairs is None else (pairs > TOLERANCE).numpy().astype(int)
    starts = np.arange(0, len(leaking), -(-len(leaking) // 64))  # at most 64 squares a side
    leaking = np.maximum.reduceat(np.maximum.reduceat(leaking, starts, 0), starts, 1)
    shown = np.where(leaking > 0, 0, np.tril(np.ones_like(leaking)) + 1)  # red what may not be seen and is, blue what may be
    places = starts.tolist()
    figure.add_heatmap(x=places, y=places, z=shown.astype(int).tolist(), coloraxis="coloraxis", name="t sees s", row=1, col=1)
    for place, key in ((2, "losses"), (3, "accuracies")):
        values = numbers.get("profile", {}).get(key, [])
        positions, means = figures.stretches(values[:-1])  # the last position, which may tell a missing mask, stands by itself
        figure.add_scatter(
            x=[*positions, len(values)] if values else [],
            y=[*means, *values[-1:]],
            mode="lines+markers",
            line={"color": figures.COLORS[0], "width": 1.5},
            marker={"size": 4, "color": figures.COLORS[0]},
            name=key,
            showlegend=False,
            row=1,
            col=place,
        )
        figure.update_xaxes(type="log", title_text="position", row=1, col=place)
    figure.update_xaxes(title_text="s", row=1, col=1)
    figure.update_yaxes(title_text="t", autorange="reversed", row=1, col=1)
    scale = {"colorscale": "RdBu", "cmin": 0, "cmid": 1, "cmax": 2, "showscale": False}
    return figures.on_any_page(figure, height=360).update_layout(coloraxis=scale)


def scores(series: dict[str, Any]) -> go.Figure:
    """Loss (on a logarithmic axis) and accuracy over steps of several series of evaluations: a name and its rows each, with
    step, val_loss and val_accuracy."""
    figure = make_subplots(1, 2, subplot_titles=["Loss (nats a token)", "Accuracy (top-1)"])
    for number, (name, rows) in enumerate(series.items()):
        rows = pd.DataFrame(rows)
        for place, column in enumerate(("val_loss", "val_accuracy"), 1):
            figure.add_scatter(
                x=rows["step"].tolist(),
                y=rows[column].tolist(),
                mode="lines+markers",
                line={"color": figures.color_of(number), "width": 2, "dash": figures.dash_of(number)},
                marker={
                    "size": 5,
                    "color": figures.color_of(number),
                    "symbol": ["circle", "square", "diamond", "triangle-up"][number % 4],
                },
                name=html.escape(name),
                legendgroup=name,
                showlegend=place == 1,
                row=1,
                col=place,
            )
    figure.update_yaxes(type="log", row=1, col=1)
    figure.update_xaxes(title_text="step")
    return figures.on_any_page(figure, height=430, top=90)


def save(reports: list[Report], source: str | Path, path: str | Path):
    """Write an audit as a page: a verdict a line, and the pictures."""
    render.save(picture(reports), path, f"Audit of {source}", table(reports, source))


def table(reports: list[Report], source: str | Path) -> str:
    """An audit's verdicts as a table in HTML."""
    cell = "<td style='padding: 2px 12px; vertical-align: top'>"
    rows = "".join(
        f"<tr style='color: {figures.COLORS[1] if report.passed is False else render.GREY}'>{cell}<b>{report.verdict}</b></td>"
        f"{cell}{report.check}</td>{cell}{html.escape(printable(report.summary))}</td></tr>"
        for report in reports
    )
    failed = sum(report.passed is False for report in reports)
    verdict = f"{failed} of {len(reports)} checks failed" if failed else f"all {len(reports)} checks passed or could not be made"
    shown = f"<h1>Audit of {html.escape(printable(str(source)))}</h1><p>{verdict}.</p><table>{rows}</table>"
    return f"<div style='font-family: sans-serif; max-width: 1000px'>{shown}</div>"
