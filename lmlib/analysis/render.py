"""Show a Plotly figure where Plotly does not run: as a PNG, a notebook's output, or a file.

Plotly's own PNG export needs a browser, so matplotlib draws the lines, markers and heat maps.
"""

import base64
import html
import io
import json
import warnings
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from matplotlib.artist import setp
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox, BboxTransformTo

from lmlib.errors import UserError
from lmlib.files import atomic_write

WIDTH = 864  # pixels of a PNG
GRAY = "#7A7A7A"  # reads on white and on black
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "line-ns": "|"}
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", None: "-"}


def bundle(figure: go.Figure, text: str) -> dict[str, Any]:
    """Return a figure as Plotly's JSON, a PNG and plain text, for `display(..., raw=True)`."""
    return {"application/vnd.plotly.v1+json": json.loads(figure.to_json()),
            "image/png": base64.b64encode(png(figure)).decode(), "text/plain": text}


def show(figure: go.Figure, text: str = "A figure"):
    """Display a figure so that JupyterLab, GitHub and exported notebooks all show it."""
    from IPython.display import display
    display(bundle(figure, text), raw=True)


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
            f"<title>{html.escape(title or path.stem)}</title></head><body>{above}"
            f"{figure.to_html(include_plotlyjs=True, full_html=False)}</body></html>").encode()
    else:
        raise UserError(f"{path.name} must end in .png or .html.")
    with atomic_write(path) as draft:
        draft.write_bytes(content)


def png(figure: go.Figure) -> bytes:
    """Return a figure as a PNG with a transparent background, WIDTH pixels wide."""
    layout, axes, legend = figure.layout, {}, {}
    image = Figure(figsize=(WIDTH / 80, layout.height / 80), dpi=80)
    has_scale = (layout.coloraxis.showscale is not False
                 and any(trace.type == "heatmap" for trace in figure.data))
    left, right = max(0.07, layout.margin.l / WIDTH), 0.9 if has_scale else 0.985
    bottom, top = 55 / layout.height, 1 - layout.margin.t / layout.height
    # Plotly places axes and titles on its "paper", from (0, 0) to (1, 1).
    paper = BboxTransformTo(Bbox.from_extents(left, bottom, right, top))
    for trace in figure.data:
        names = (trace.xaxis or "x", trace.yaxis or "y")
        if names not in axes:
            x, y = (layout[f"{name[0]}axis{name[1:]}"] for name in names)
            axes[names] = _add_axes(image, paper, x, y)
        axis = axes[names]
        if trace.type == "heatmap":
            rows, every = range(len(trace.y)), -(-len(trace.y) // 24)  # at most 24 labels
            colors = axis.pcolormesh(trace.x, rows, trace.z, cmap="RdBu", vmin=0, vmax=2,
                                     shading="nearest")
            axis.set_yticks(rows[::every], trace.y[::every])
            continue
        _draw_line(axis, trace)
        hidden = layout.showlegend is False or trace.showlegend is False
        if trace.name and len(trace.x) and not hidden:
            legend.setdefault(html.unescape(trace.name), axis.lines[-1])
    if has_scale:
        bar = image.colorbar(colors, cax=image.add_axes((0.92, bottom, 0.015, top - bottom)))
        bar.ax.tick_params(colors=GRAY, labelsize=8)
    for note in layout.annotations:
        image.text(*paper.transform((note.x, note.y)), html.unescape(note.text), ha="center",
                   va="bottom", color=GRAY, fontsize=9, parse_math=False)
    for axis in axes.values():
        if axis.get_yscale() == "log":  # 0.01 and 100 instead of powers
            low, high = axis.get_ylim()
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("" if high > 10 * low else "{x:g}")
        setp(axis.get_yticklabels(), parse_math=False)
    if legend:
        box = image.legend(legend.values(), legend.keys(), loc="upper right", ncols=4, fontsize=8,
                           frameon=False, labelcolor=GRAY)
        setp(box.get_texts(), parse_math=False)  # a run's name may contain dollars
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names in any script
        image.savefig(content, transparent=True)
    return content.getvalue()


def _add_axes(image: Figure, paper: BboxTransformTo, x: Any, y: Any) -> Any:
    """Add matplotlib's axes for Plotly's axes `x` and `y` to an image."""
    (x0, x1), (y0, y1) = x.domain or (0, 1), y.domain or (0, 1)
    axis = image.add_axes(paper.transform_bbox(Bbox.from_extents(x0, y0, x1, y1)).bounds)
    axis.set_xlabel(x.title.text or "", parse_math=False, color=GRAY)
    axis.set_ylabel(y.title.text or "", parse_math=False, color=GRAY)
    axis.set_ylabel(y.title.text or "", parse_math=False, color=GRAY)
    if y.type == "log":
        axis.set_yscale("log")
    if x.type == "log":
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter("")  # labels between powers would overlap
    if y.autorange == "reversed":
        axis.invert_yaxis()
    axis.grid(alpha=0.3)
    axis.patch.set_alpha(0)
    axis.tick_params(colors=GRAY, labelsize=8, which="both",
                     labelbottom=x.showticklabels is not False)
    axis.spines[:].set_color(GRAY)
    return axis


def _draw_line(axis: Any, trace: go.Scatter):
    x, y = ([] if values is None else list(values) for values in (trace.x, trace.y))
    if isinstance(trace.marker.symbol, tuple):  # a line of matplotlib has one marker
        for a, b, symbol in zip(x, y, trace.marker.symbol, strict=True):
            _draw_line(axis, go.Scatter(trace).update(x=[a], y=[b], marker_symbol=symbol))
        return
    symbol, mode = trace.marker.symbol or "circle", trace.mode
    if axis.get_xscale() == "linear":
        axis.xaxis.set_major_locator(MaxNLocator(5))  # more labels of large steps would overlap
    axis.errorbar(
        x, [html.unescape(value) if isinstance(value, str) else value for value in y],
        yerr=trace.error_y.array, elinewidth=1, color=trace.line.color, alpha=trace.opacity,
        linewidth=trace.line.width if "lines" in mode else 0, linestyle=DASHES[trace.line.dash],
        marker=MARKERS[symbol.removesuffix("-open")] if "markers" in mode else None,
        markerfacecolor="none" if symbol.endswith("-open") else trace.line.color,
        markersize=trace.marker.size * 0.6)
