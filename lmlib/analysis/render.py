"""Show a Plotly figure where Plotly does not run: as a PNG, a notebook's output, or a file.

Plotly's own PNG export needs a browser, so matplotlib draws the lines, markers and heat maps.
"""

import base64
import html
import io
import json
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib import ticker
from matplotlib.artist import setp
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox, BboxTransformTo

from lmlib.errors import UserError
from lmlib.files import atomic_write

WIDTH = 820  # pixels of a PNG; on a narrow page LAB_STYLE makes it smaller
GRAY = "#7A7A7A"  # the same contrast, 4.3 : 1, on white and on JupyterLab's dark background
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "line-ns": "|"}
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", None: "-"}
CONFIG = {"displaylogo": False, "responsive": True}  # Plotly's
# A page knows the reader's theme, so its text has full contrast.
STYLE = """<style>
body { margin: 1em auto; max-width: 1200px; padding: 0 1em; font: 14px system-ui, sans-serif }
.plotly .spikeline { stroke: #7A7A7A !important; stroke-width: 1px !important }
.plotly .infolayer text, .plotly .cartesianlayer text { fill: CanvasText !important }
</style>"""

# JupyterLab shows the PNG as it is, cut off where a window has 1000 pixels; and titles in gray.
LAB_STYLE = """<style>
.jp-RenderedPlotly .plot-img { max-width: 100% }
.js-plotly-plot .annotation-text tspan[style*=bold] { fill: var(--jp-ui-font-color1, inherit) }
</style>"""


def bundle(figure: go.Figure, text: str) -> dict[str, Any]:
    """Return a figure as Plotly's JSON, a PNG and plain text, for `display(..., raw=True)`."""
    content = json.loads(figure.to_json(), parse_float=_as_javascript)
    return {"application/vnd.plotly.v1+json": {**content, "config": CONFIG},
            "image/png": base64.b64encode(png(figure)).decode(), "text/plain": text}


def _as_javascript(text: str) -> int | float:
    """Read a number as JavaScript writes it, so that JupyterLab's save leaves a file as it is."""
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < 1e21 else number


def show(figure: go.Figure, text: str = "A figure"):
    """Display a figure so that JupyterLab, GitHub and exported notebooks all show it."""
    put(bundle(figure, text))


def put(content: dict[str, Any]):
    """Display a figure's `bundle`, and before it what makes it fit JupyterLab."""
    from IPython.display import display
    display({"text/html": LAB_STYLE, "text/plain": ""}, raw=True)
    display(content, raw=True)


def save(figure: go.Figure, path: str | Path, title: str = "", above: str = ""):
    """Save a figure as a .png, or as an interactive .html page that needs no network.

    A page has a title (by default the file's name) and the HTML `above` the figure.
    """
    path = Path(path)
    if path.suffix == ".png":
        content = png(figure)
    elif path.suffix == ".html":
        content = (
            '<!doctype html><html><head><meta charset="utf-8">'
            '<meta name="color-scheme" content="light dark">'  # follows the reader's dark mode
            f"<title>{html.escape(title or path.stem)}</title>{STYLE}</head><body>{above}"
            f"{figure.to_html(CONFIG, include_plotlyjs=True, full_html=False)}"
            "</body></html>").encode()
    else:
        raise UserError(f"{path.name} must end in .png or .html.")
    with atomic_write(path) as draft:
        draft.write_bytes(content)


def png(figure: go.Figure) -> bytes:
    """Return a figure as a PNG with a transparent background, WIDTH pixels wide."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names in any script
        image(figure).savefig(content, transparent=True)
    return content.getvalue()


def image(figure: go.Figure) -> Figure:
    """Return a figure as matplotlib's, WIDTH pixels wide. Its text is never read as TeX."""
    layout, axes, legend = figure.layout, {}, legend_of(figure)
    height, margin = layout.height, layout.margin
    drawn = Figure(figsize=(WIDTH / 80, height / 80), dpi=80)
    has_scale = (layout.coloraxis.showscale is not False
                 and any(trace.type == "heatmap" for trace in figure.data))
    # Plotly places axes and titles on its "paper", from (0, 0) to (1, 1).
    left, right = margin.l / WIDTH, 0.9 if has_scale else 1 - 12 / WIDTH
    bottom, top = margin.b / height, 1 - margin.t / height
    paper = BboxTransformTo(Bbox.from_extents(left, bottom, right, top))
    for name in {(t.xaxis or "x", t.yaxis or "y"): 0 for t in figure.data}:
        axes[name] = _add_axes(drawn, paper, *(layout[f"{a[0]}axis{a[1:]}"] for a in name))
    for trace in figure.data:
        axis = axes[trace.xaxis or "x", trace.yaxis or "y"]
        if trace.type == "heatmap":
            rows, every = range(len(trace.y)), -(-len(trace.y) // 24)  # at most 24 labels
            scale = LinearSegmentedColormap.from_list("", layout.coloraxis.colorscale)
            colors = axis.pcolormesh(trace.x, rows, trace.z, cmap=scale, vmin=0, vmax=2,
                                     shading="nearest")
            axis.yaxis.set_major_locator(ticker.FixedLocator(rows[::every]))
            axis.set_yticks(rows[::every], trace.y[::every])
        else:
            _draw_line(axis, trace)
    _set_ranges(figure, axes)
    for shape in layout.shapes:  # vertical lines, as `figures.marks` makes them
        axis = axes.get((shape.xref, shape.yref.removesuffix(" domain")))
        if axis is not None:
            axis.axvline(shape.x0, shape.y0, shape.y1, color=shape.line.color, zorder=1,
                         linewidth=shape.line.width * 0.8, linestyle=DASHES[shape.line.dash])
    if has_scale:
        bar = drawn.colorbar(colors, cax=drawn.add_axes((0.92, bottom, 0.015, top - bottom)))
        bar.ax.tick_params(colors=GRAY, labelsize=8)
    for note in layout.annotations:
        _write(drawn, note, *paper.transform((note.x, note.y)))
    if legend:
        drawn.legend(legend.values(), legend.keys(), ncols=legend_columns(legend), fontsize=8.5,
                     loc="lower left", bbox_to_anchor=(left, top + 24 / height), frameon=False,
                     borderaxespad=0, borderpad=0, labelcolor=GRAY, columnspacing=1.4)
    setp(drawn.findobj(Text), parse_math=False)  # a run's name may contain dollars
    return drawn


def legend_of(figure: go.Figure) -> dict[str, Line2D]:
    """Return the names in a figure's legend and their lines."""
    found: dict[str, Line2D] = {}
    if figure.layout.showlegend is False:
        return found
    for trace in figure.data:
        hidden = trace.type != "scatter" or trace.showlegend is False
        if trace.name and not hidden and len(trace.x):
            symbol = trace.marker.symbol
            symbol = symbol[0] if isinstance(symbol, tuple) and symbol else symbol or "circle"
            found.setdefault(html.unescape(trace.name), Line2D(
                [], [], color=trace.line.color, alpha=trace.opacity,
                linestyle=DASHES[trace.line.dash] if "lines" in trace.mode else "none",
                marker=MARKERS[symbol.removesuffix("-open")] if "markers" in trace.mode else None,
                markersize=5, markerfacecolor="none" if symbol.endswith("-open") else None))
    for shape in figure.layout.shapes:
        if shape.showlegend:
            is_tick = shape.y1 != 1
            found.setdefault(shape.name, Line2D(
                [], [], color=shape.line.color, marker="|" if is_tick else None,
                linestyle="none" if is_tick else DASHES[shape.line.dash]))
    return found


def legend_columns(names: Collection[str]) -> int:
    """Return how many names fit beside each other where a page is narrow."""
    return max(1, min(len(names), int(110 / (7 + max(map(len, names), default=0)))))


def _write(drawn: Figure, note: Any, x: float, y: float):
    """Write one of Plotly's annotations: a title, the start of which may be bold, or a sentence."""
    bold, rest = re.fullmatch(r"(?:<b>(.*?)</b>)?(.*)", note.text, re.DOTALL).groups()
    rest = html.unescape(rest.replace("<br>", "\n"))
    style = {"va": note.yanchor or "bottom", "color": note.font.color or GRAY,
             "fontsize": 9.5, "parse_math": False}
    x_shift, y = 0.0, y + (3 / drawn.bbox.height if note.yanchor != "top" else 0)
    if bold:
        title = drawn.text(x, y, html.unescape(bold), weight="bold", **style)
        x_shift = title.get_window_extent().width / drawn.bbox.width
    drawn.text(x + x_shift, y, rest, **style)


def _add_axes(drawn: Figure, paper: BboxTransformTo, x: Any, y: Any) -> Any:
    """Add matplotlib's axes for Plotly's axes `x` and `y` to an image."""
    (x0, x1), (y0, y1) = x.domain or (0, 1), y.domain or (0, 1)
    axis = drawn.add_axes(paper.transform_bbox(Bbox.from_extents(x0, y0, x1, y1)).bounds)
    axis.set_xlabel(x.title.text or "", color=GRAY)
    axis.set_ylabel(y.title.text or "", color=GRAY)
    for scale, side, set_scale in ((x, axis.xaxis, axis.set_xscale),
                                   (y, axis.yaxis, axis.set_yscale)):
        if scale.type == "log":
            set_scale("log")
        elif scale.type != "category":  # more labels of large steps would overlap
            side.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if scale.type != "category":
            is_share = (scale.tickformat or "").endswith("p")
            side.set_major_formatter(ticker.FuncFormatter(_percent if is_share else _tick))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())  # labels between powers would overlap
    if y.autorange == "reversed":
        axis.invert_yaxis()
    axis.grid(alpha=0.25, linewidth=0.7)
    axis.patch.set_alpha(0)
    axis.tick_params(colors=GRAY, labelsize=8.5, which="both", length=0,
                     labelbottom=x.showticklabels is not False)
    axis.spines[:].set_visible(False)
    return axis


def _tick(value: float, position: int | None = None) -> str:
    """Return a number on an axis: 0.001, 250, 20k or 3M, without e-notation and without TeX."""
    if abs(value) >= 1e4:
        return ticker.EngFormatter(sep="").format_eng(value)
    return np.format_float_positional(float(f"{value:.6g}"), trim="-")


def _percent(value: float, position: int | None = None) -> str:
    return f"{_tick(100 * value)}%"


def _set_ranges(figure: go.Figure, axes: dict[tuple[str, str], Any]):
    """Give axes the ranges that Plotly would: matched, from 0 on, or cut at the top."""
    matched = [axis for (x, _), axis in axes.items() if figure.layout[f"xaxis{x[1:]}"].matches]
    limits = [axis.get_xlim() for axis in matched if axis.has_data()]
    for axis in matched if limits else []:
        axis.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
    for (_, y), axis in axes.items():
        if axis.get_xscale() == "log" and axis.get_xlim()[1] < 100 * axis.get_xlim()[0]:
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        plotly, (low, high) = figure.layout[f"yaxis{y[1:]}"], axis.get_ylim()
        if plotly.rangemode == "tozero" and axis.get_yscale() != "log":
            axis.set_ylim(bottom=0)
        clip = plotly.autorangeoptions.clipmax
        if clip is not None and low < clip < high:
            axis.set_ylim(top=clip)
        low, high = axis.get_ylim()
        if axis.get_yscale() == "log":
            axis.yaxis.set_minor_formatter(
                ticker.NullFormatter() if high > 10 * low else ticker.FuncFormatter(_tick))


def _draw_line(axis: Any, trace: go.Scatter):
    x, y = ([] if values is None else list(values) for values in (trace.x, trace.y))
    if isinstance(trace.marker.symbol, tuple):  # a line of matplotlib has one marker
        for a, b, symbol in zip(x, y, trace.marker.symbol, strict=True):
            _draw_line(axis, go.Scatter(trace).update(x=[a], y=[b], marker_symbol=symbol))
        return
    if trace.fill == "toself":
        axis.fill(x, y, color=trace.line.color, alpha=trace.opacity, linewidth=0)
        return
    symbol, mode = trace.marker.symbol or "circle", trace.mode
    names = [html.unescape(value) if isinstance(value, str) else value for value in y]
    axis.errorbar(
        x, names, yerr=trace.error_y.array, elinewidth=1, color=trace.line.color,
        alpha=trace.opacity, linewidth=trace.line.width * 0.8 if "lines" in mode else 0,
        linestyle=DASHES[trace.line.dash],
        marker=MARKERS[symbol.removesuffix("-open")] if "markers" in mode else None,
        markerfacecolor="none" if symbol.endswith("-open") else trace.line.color,
        markersize=trace.marker.size * 0.6)
