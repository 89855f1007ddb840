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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox, BboxTransformTo, TransformedBbox

from lmlib.files import atomic_write

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

    Raises:
        ValueError: the name does not end in .png or .html.
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
        raise ValueError(f"{path.name} must end in .png or .html.")
    with atomic_write(path) as draft:
        draft.write_bytes(content)


def png(figure: go.Figure, width: int = 864) -> bytes:
    """Return a figure as a PNG with a transparent background, `width` pixels wide."""
    layout, axes, legend, colors = figure.layout, {}, {}, None
    image = Figure(figsize=(width / 80, layout.height / 80), dpi=80)
    FigureCanvasAgg(image)  # instead of pyplot, which would keep every figure in memory
    has_scale = (layout.coloraxis.showscale is not False
                 and any(trace.type == "heatmap" for trace in figure.data))
    left, right = max(0.07, layout.margin.l / width), 0.9 if has_scale else 0.985
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
        _style(axis)
    if legend:
        box = image.legend(legend.values(), legend.keys(), loc="upper right", ncols=4, fontsize=8,
                           frameon=False, labelcolor=GRAY)
        for text in box.get_texts():
            text.set_parse_math(False)  # a run's name may contain dollars
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names in any script
        image.savefig(content, transparent=True)
    return content.getvalue()


def _add_axes(image: Figure, paper: BboxTransformTo, x: Any, y: Any) -> Any:
    """Add matplotlib's axes for Plotly's axes `x` and `y` to an image."""
    (x0, x1), (y0, y1) = x.domain or (0, 1), y.domain or (0, 1)
    axis = image.add_axes(TransformedBbox(Bbox.from_extents(x0, y0, x1, y1), paper).bounds)
    axis.set(xscale="log" if x.type == "log" else "linear",
             yscale="log" if y.type == "log" else "linear")
    if x.type == "log":
        axis.xaxis.set_minor_formatter(NullFormatter())  # labels between powers would overlap
    axis.set_xlabel(x.title.text or "", parse_math=False, color=GRAY)
    axis.set_ylabel(y.title.text or "", parse_math=False, color=GRAY)
    if y.autorange == "reversed":
        axis.invert_yaxis()
    return axis


def _draw_line(axis: Any, trace: go.Scatter):
    x, y = ([] if values is None else list(values) for values in (trace.x, trace.y))
    symbol, mode = trace.marker.symbol or "circle", trace.mode or "lines"
    if isinstance(trace.marker.symbol, tuple):  # a line of matplotlib has one marker
        for point, symbol in enumerate(trace.marker.symbol):
            one = slice(point, point + 1)
            _draw_line(axis, go.Scatter(trace).update(x=x[one], y=y[one], marker_symbol=symbol))
        return
    if axis.get_xscale() == "linear":
        axis.xaxis.set_major_locator(MaxNLocator(5))  # more labels of large steps would overlap
    color = trace.line.color if "lines" in mode else trace.marker.color
    axis.errorbar(
        x, [html.unescape(value) if isinstance(value, str) else value for value in y],
        yerr=trace.error_y.array, elinewidth=1, color=color, alpha=trace.opacity,
        linewidth=(trace.line.width or 1.5) if "lines" in mode else 0,
        linestyle=DASHES[trace.line.dash], markersize=(trace.marker.size or 6) * 0.6,
        marker=MARKERS[symbol.removesuffix("-open")] if "markers" in mode else None,
        markerfacecolor="none" if symbol.endswith("-open") else color)


def _style(axis: Any):
    """Style axes in gray, and label a logarithmic one with 0.01 and 100 instead of powers."""
    if axis.get_yscale() == "log":
        low, high = axis.get_ylim()
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_major_formatter(plain)
        axis.yaxis.set_minor_formatter(NullFormatter() if high > 10 * low else plain)
    axis.grid(alpha=0.3)
    axis.patch.set_alpha(0)
    axis.tick_params(colors=GRAY, labelsize=8, which="both")
    for label in axis.get_yticklabels():
        label.set_parse_math(False)
    axis.spines[:].set_color(GRAY)
