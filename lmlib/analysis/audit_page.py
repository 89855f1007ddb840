"""Show what an audit found: its verdicts as a table, its figures, and both as a page."""

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lmlib.analysis import figures, render
from lmlib.analysis.verdict import Verdict
from lmlib.audit.report import TOLERANCE, Report
from lmlib.run.run_audit import Audit
from lmlib.text import printable

# These doubt a score without a leak.
NO_LEAK = {"record", "sample", "evaluation"}
COLORS = {True: "#00795A", False: "#C4420B", None: "#8A6500"}  # white text reads on them


def watch(audit: Audit, source: str | Path) -> Iterator[Report]:
    """Yield the reports of an audit; show each in a notebook as its check is finished."""
    from IPython.display import display

    reports, names = [], list(audit.checks)
    def bundle() -> dict[str, str]:
        n = len(reports)
        now = f"{n} of {len(names)} checks made; now: {names[n]} …" if n < len(names) else ""
        text = "\n".join([*map(str, reports), now or verdict(reports, source)])
        return {"text/html": table(reports, source, now), "text/plain": text}

    shown = display(bundle(), raw=True, display_id=True)
    for report in audit:
        reports.append(report)
        shown.update(bundle(), raw=True)
        yield report


def verdict(reports: list[Report], source: str | Path) -> Verdict:
    """Return in one sentence what an audit found: leaks, what passed, what could not be made."""
    name = Path(source).name
    failed = [report.check for report in reports if report.passed is False]
    unknown = [report.check for report in reports if report.passed is None]
    passed = len(reports) - len(failed) - len(unknown)
    found = "no leak found" if set(failed) <= NO_LEAK else "LEAKS"
    parts = [f"all {passed} checks passed" if passed == len(reports) else
             f"{passed} of {len(reports)} checks passed"]
    parts += [f"{len(failed)} failed ({', '.join(failed)})"] * bool(failed)
    parts += [f"{len(unknown)} could not be made ({', '.join(unknown)})"] * bool(unknown)
    return Verdict(printable(f"{name}: {found}; {', '.join(parts)}."))


def figure(reports: list[Report], name: str = "") -> go.Figure:
    """Draw which logits depend on which tokens (red: a leak), and the scores by position."""
    numbers = {report.check: report.numbers for report in reports}
    causality, profile = numbers.get("causality", {}), numbers.get("profile", {})
    length, pairs = max(2, causality.get("longest", 2)), causality.get("pairs")
    leaks = np.zeros((length, length)) if pairs is None else (pairs > TOLERANCE).numpy()
    starts = np.arange(0, len(leaks), -(-len(leaks) // 64))  # at most 64 x 64 squares
    leaks = np.maximum.reduceat(np.maximum.reduceat(leaks, starts, 0), starts, 1)
    # Red (0) is a leak, gray (1) no dependency, blue (2) one that the causal mask allows.
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
    figures.styled(drawn, 400 if name else 360, 100 if name else 60, xaxis_title_text="s",
                   yaxis_title_text="t", yaxis_autorange="reversed", coloraxis=figures.RED_BLUE,
                   coloraxis_showscale=False)
    if name:
        drawn.add_annotation(text=f"<b>{html.escape(printable(name))}</b>", x=0, y=1.16,
                             xref="paper", yref="paper", xanchor="left", yanchor="bottom",
                             showarrow=False, font_size=16)
    return drawn


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
    name = str(source)
    above = f"<h1>Audit of {html.escape(printable(name))}</h1>{table(reports, source)}"
    render.save(figure(reports, Path(source).name), path, f"Audit of {name}",
                f"<div style='font-family: system-ui, sans-serif'>{above}</div>")


def table(reports: list[Report], source: str | Path, progress: str = "") -> str:
    """Return an audit as HTML: the sentence, or the progress of one that runs, then its lines."""
    cell = "<td style='padding: 3px 12px; text-align: left; vertical-align: top"  # no <style> here
    badge = "color: white; border-radius: 9px; padding: 1px 9px; background:"
    rows = [f"<tr>{cell}; white-space: nowrap'><b style='{badge} {COLORS[report.passed]}'>"
            f"{report.verdict}</b></td>{cell}; white-space: nowrap'>{report.check}</td>"
            f"{cell}'>{html.escape(printable(report.summary))}</td></tr>" for report in reports]
    top = f"<p>{html.escape(progress)}</p>" if progress else verdict(reports, source)._repr_html_()
    return f"<div style='max-width: 1000px'>{top}<table>{''.join(rows)}</table></div>"
