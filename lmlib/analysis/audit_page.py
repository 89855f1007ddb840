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


def figure(reports: list[Report]) -> go.Figure:
    """Draw which logits depend on which tokens (red: a leak), and the scores by position."""
    numbers = {report.check: report.numbers for report in reports}
    causality, profile = numbers.get("causality", {}), numbers.get("profile", {})
    length, pairs = max(2, causality.get("longest", 2)), causality.get("pairs")
    leaks = np.zeros((length, length)) if pairs is None else (pairs > TOLERANCE).numpy()
    starts = np.arange(0, len(leaks), -(-len(leaks) // 64))  # at most 64 x 64 squares
    leaks = np.maximum.reduceat(np.maximum.reduceat(leaks, starts, 0), starts, 1)
    # Red (0) is a leak, white (1) no dependency, blue (2) one that the causal mask allows.
    colors = np.where(leaks, 0, np.tril(np.ones(leaks.shape, int)) + 1)
    drawn = make_subplots(1, 3, subplot_titles=["Logits at t that depend on token s (red: leak)",
                                                "Loss by position (nats)", "Accuracy by position"])
    drawn.add_heatmap(x=starts.tolist(), y=starts.tolist(), z=colors.tolist(), row=1, col=1,
                      coloraxis="coloraxis", name="t depends on s")
    for col, key in enumerate(("losses", "accuracies"), 2):
        values = profile.get(key, [])
        # The last position stays alone: a missing causal mask can show there only.
        positions, means = figures.mean_by_position(values[:-1])
        figures.add_line(drawn, 0, [*positions, len(values)] if values else [],
                         [*means, *values[-1:]], key, size=4, width=1.5, showlegend=False,
                         row=1, col=col)
        drawn.update_xaxes(type="log", title_text="position", row=1, col=col)
    return figures.styled(drawn, height=360, xaxis_title_text="s", yaxis_title_text="t",
                          yaxis_autorange="reversed", coloraxis=figures.RED_BLUE,
                          coloraxis_showscale=False)


def scores(series: dict[str, Any]) -> go.Figure:
    """Draw loss and accuracy over steps; `series` maps names to rows of step, val_loss, ..."""
    drawn = make_subplots(1, 2, subplot_titles=["Loss (nats per token)", "Accuracy (top-1)"])
    for number, (name, rows) in enumerate(series.items()):
        rows, symbol = pd.DataFrame(rows), figures.SHAPES[number % len(figures.SHAPES)]
        for col, column in enumerate(("val_loss", "val_accuracy"), 1):
            figures.add_line(drawn, number, rows["step"].tolist(), rows[column].tolist(), name,
                             symbol=symbol, legendgroup=name, showlegend=col == 1, row=1, col=col)
    drawn.update_yaxes(type="log", row=1, col=1)  # a leak brings the loss near 0
    return figures.styled(drawn.update_xaxes(title_text="step"), height=430, top=90)


def save(reports: list[Report], source: str | Path, path: str | Path):
    """Save an audit as a page: a row per verdict, and the figures."""
    render.save(figure(reports), path, f"Audit of {source}", table(reports, source))


def table(reports: list[Report], source: str | Path) -> str:
    """Return an audit's verdicts as an HTML table, failed ones in orange."""
    failed = sum(report.passed is False for report in reports)
    made = f"all {len(reports)} checks passed or could not be made"
    verdict = f"{failed} of {len(reports)} checks failed" if failed else made
    cell = "<td style='padding: 2px 12px; vertical-align: top'>"  # inline: notebooks drop <style>
    rows = [f"<tr style='color: {figures.COLORS[1] if report.passed is False else render.GRAY}'>"
            f"{cell}<b>{report.verdict}</b></td>{cell}{report.check}</td>"
            f"{cell}{html.escape(printable(report.summary))}</td></tr>" for report in reports]
    return (f"<div style='font-family: sans-serif; max-width: 1000px'>"
            f"<h1>Audit of {html.escape(printable(str(source)))}</h1><p>{verdict}.</p>"
            f"<table>{''.join(rows)}</table></div>")
