"""Show what an audit found: its verdicts as a table, its figures, and both as a page."""

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
    """Draw which logits depend on which tokens (red: a leak), and the scores by position."""
    numbers = {report.check: report.numbers for report in reports}
    titles = ["Logits at t that depend on token s (red: leak)", "Loss by position (nats)",
              "Accuracy by position"]
    figure = make_subplots(1, 3, subplot_titles=titles)
    causality, profile = numbers.get("causality", {}), numbers.get("profile", {})
    length, pairs = max(2, int(causality.get("longest", 2))), causality.get("pairs")
    leaks = np.zeros((length, length)) if pairs is None else (pairs > TOLERANCE).numpy()
    starts = np.arange(0, len(leaks), -(-len(leaks) // 64))  # at most 64 x 64 squares
    leaks = np.maximum.reduceat(np.maximum.reduceat(leaks, starts, 0), starts, 1)
    # Red (0) is a leak, white (1) no dependency, blue (2) one that the causal mask allows.
    colors = np.where(leaks, 0, np.tril(np.ones(leaks.shape, int)) + 1)
    figure.add_heatmap(x=starts.tolist(), y=starts.tolist(), z=colors.tolist(), row=1, col=1,
                       coloraxis="coloraxis", name="t depends on s")
    figure.update_xaxes(title_text="s", row=1, col=1)
    figure.update_yaxes(title_text="t", autorange="reversed", row=1, col=1)
    for col, key in enumerate(("losses", "accuracies"), 2):
        values = profile.get(key, [])
        # The last position stays alone: a missing causal mask can show there only.
        positions, means = figures.mean_by_position(values[:-1])
        figures.add_line(figure, 0, [*positions, len(values)] if values else [],
                         [*means, *values[-1:]], key, size=4, width=1.5, showlegend=False,
                         row=1, col=col)
        figure.update_xaxes(type="log", title_text="position", row=1, col=col)
    figure.update_layout(coloraxis={**figures.RED_BLUE, "showscale": False})
    return figures.styled(figure, height=360)


def scores(series: dict[str, Any]) -> go.Figure:
    """Draw loss and accuracy over steps; `series` maps names to rows of step, val_loss, ..."""
    figure = make_subplots(1, 2, subplot_titles=["Loss (nats per token)", "Accuracy (top-1)"])
    for number, (name, rows) in enumerate(series.items()):
        rows, symbol = pd.DataFrame(rows), figures.SHAPES[number % len(figures.SHAPES)]
        for col, column in enumerate(("val_loss", "val_accuracy"), 1):
            figures.add_line(figure, number, rows["step"].tolist(), rows[column].tolist(), name,
                             symbol=symbol, legendgroup=name, showlegend=col == 1, row=1, col=col)
    figure.update_yaxes(type="log", row=1, col=1)  # a leak brings the loss near 0
    figure.update_xaxes(title_text="step")
    return figures.styled(figure, height=430, top=90)


def save(reports: list[Report], source: str | Path, path: str | Path):
    """Save an audit as a page: a row per verdict, and the figures."""
    render.save(picture(reports), path, f"Audit of {source}", table(reports, source))


def table(reports: list[Report], source: str | Path) -> str:
    """Return an audit's verdicts as an HTML table, failed ones in orange."""
    cell = "<td style='padding: 2px 12px; vertical-align: top'>"  # inline: notebooks drop <style>
    rows = []
    for report in reports:
        color = figures.COLORS[1] if report.passed is False else render.GRAY
        summary = html.escape(printable(report.summary))
        rows.append(f"<tr style='color: {color}'>{cell}<b>{report.verdict}</b></td>"
                    f"{cell}{report.check}</td>{cell}{summary}</td></tr>")
    failed = sum(report.passed is False for report in reports)
    made = f"all {len(reports)} checks passed or could not be made"
    verdict = f"{failed} of {len(reports)} checks failed" if failed else made
    return (f"<div style='font-family: sans-serif; max-width: 1000px'>"
            f"<h1>Audit of {html.escape(printable(str(source)))}</h1><p>{verdict}.</p>"
            f"<table>{''.join(rows)}</table></div>")
