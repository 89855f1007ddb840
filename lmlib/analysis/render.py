"""A Plotly figure in the other forms that a reader may show: a PNG drawn by matplotlib, and a notebook's bundle."""

import base64
import html
import io
import json
import warnings
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

GREY = "#7A7A7A"  # reads on white and on black


def bundle(figure: go.Figure, text: str) -> dict[str, Any]:
    """A figure as Plotly's JSON, as a PNG, and as a word, for `display(..., raw=True)`."""
    return {
        "application/vnd.plotly.v1+json": json.loads(figure.to_json()),
        "image/png": base64.b64encode(png(figure)).decode(),
        "text/plain": text,
    }


def show(figure: go.Figure, text: str = "A figure"):
    """Display a figure so that it is there for every reader: JupyterLab, GitHub, a saved or exported notebook."""
    from IPython.display import display

    display(bundle(figure, text), raw=True)


def save(figure: go.Figure, path: str | Path, title: str = "", above: str = ""):
    """Write a figure, whole or not at all, as a .png or as an .html page that is interactive and needs no network.

    Args:
        title, above: of the page; see `page`. Without a title it has the file's name.

    Raises:
        ValueError: the name has another ending.
    """
    path = Path(path)
    if path.suffix not in (".png", ".html"):
        raise ValueError(f"{path.name} must end in .png or .html.")
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(png(figure) if path.suffix == ".png" else page(figure, title or path.stem, above).encode())
    draft.replace(path)


def page(figure: go.Figure, title: str, above: str = "") -> str:
    """A whole HTML page that follows the reader's light or dark; `above` is HTML that stands before the figure."""
    head = '<!doctype html><html><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    content = figure.to_html(include_plotlyjs=True, full_html=False)
    return f"{head}<title>{html.escape(title)}</title></head><body>{above}{content}</body></html>"


def png(figure: go.Figure, width: int = 864) -> bytes:
    """A figure of lines, marks and heat maps, drawn by matplotlib on a transparent ground."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    layout = figure.layout
    page = Figure(figsize=(width / 80, layout.height / 80), dpi=80)
    FigureCanvasAgg(page)
    has_map = any(trace.type == "heatmap" for trace in figure.data) and layout.coloraxis.showscale is not False
    left, right = max(0.07, layout.margin.l / width), 0.9 if has_map else 0.985
    top, bottom = 1 - layout.margin.t / layout.height, 55 / layout.height

    def place(x: float, y: float) -> tuple[float, float]:  # a point of Plotly's paper on the page
        return left + x * (right - left), bottom + y * (top - bottom)

    axes, named = {}, {}
    for trace in figure.data:
        key = (trace.xaxis or "x", trace.yaxis or "y")
        if key not in axes:
            x, y = (layout[f"{name[0]}axis{name[1:]}"] for name in key)
            (x0, y0), (x1, y1) = (place((x.domain or (0, 1))[end], (y.domain or (0, 1))[end]) for end in (0, 1))
            axis = axes[key] = page.add_axes((x0, y0, x1 - x0, y1 - y0))
            axis.set_xscale(x.type if x.type == "log" else "linear")
            axis.set_yscale(y.type if y.type == "log" else "linear")
            if x.type == "log":
                axis.xaxis.set_minor_formatter(NullFormatter())
            elif trace.type != "heatmap":
                axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.set_xlabel(x.title.text or "", parse_math=False)
            axis.set_ylabel(y.title.text or "", parse_math=False, color=GREY)
        axis = axes[key]
        if trace.type == "heatmap":
            mesh = axis.pcolormesh(trace.x, range(len(trace.y)), trace.z, cmap="RdBu", vmin=0, vmax=2, shading="nearest")
            every = -(-len(trace.y) // 24)
            axis.set_yticks(range(0, len(trace.y), every), trace.y[::every])
            if layout[f"{key[1][0]}axis{key[1][1:]}"].autorange == "reversed":
                axis.invert_yaxis()
            continue
        _draw(axis, trace)
        if layout.showlegend is not False and trace.showlegend is not False and trace.name and len(trace.x):
            named.setdefault(html.unescape(trace.name), axis.lines[-1] if axis.lines else axis.collections[-1])
    if has_map:
        bar = page.colorbar(mesh, cax=page.add_axes((0.92, bottom, 0.015, top - bottom)))
        bar.ax.tick_params(colors=GREY, labelsize=8)
    for note in layout.annotations:
        page.text(
            *place(note.x, note.y), html.unescape(note.text), ha="center", va="bottom", color=GREY, fontsize=9, parse_math=False
        )
    for axis in axes.values():
        if axis.get_yscale() == "log":  # as 0.01 and 100, not as powers
            low, high = axis.get_ylim()
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter() if high > 10 * low else FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(alpha=0.3)
        axis.patch.set_alpha(0)
        axis.tick_params(colors=GREY, labelsize=8, which="both")
        for label in axis.get_yticklabels():
            label.set_parse_math(False)
        axis.xaxis.label.set_color(GREY)
        for spine in axis.spines.values():
            spine.set_color(GREY)
    if named:
        legend = page.legend(named.values(), named.keys(), loc="upper right", ncols=4, fontsize=8, frameon=False, labelcolor=GREY)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a run's name may hold dollars
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        page.savefig(content, transparent=True)
    return content.getvalue()


def _draw(axis: Any, trace: go.Scatter):
    """One Plotly line on a matplotlib axis; its marks one by one where each has its own symbol."""
    x, y = ([] if values is None else list(values) for values in (trace.x, trace.y))
    if isinstance(trace.marker.symbol, tuple):
        for place, symbol in enumerate(trace.marker.symbol):
            _draw(axis, go.Scatter(trace).update(x=x[place : place + 1], y=y[place : place + 1], marker_symbol=symbol))
        return
    shapes = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "line-ns": "|"}
    dashes = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", None: "-"}
    has_line, symbol = "lines" in (trace.mode or "lines"), trace.marker.symbol or "circle"
    color = trace.line.color if has_line else trace.marker.color
    axis.errorbar(
        x,
        [html.unescape(value) if isinstance(value, str) else value for value in y],
        yerr=trace.error_y.array,
        elinewidth=1,
        color=color,
        alpha=trace.opacity,
        linewidth=(trace.line.width or 1.5) if has_line else 0,
        linestyle=dashes[trace.line.dash],
        marker=shapes[symbol.removesuffix("-open")] if "markers" in (trace.mode or "") else None,
        markersize=(trace.marker.size or 6) * 0.6,
        markerfacecolor="none" if symbol.endswith("-open") else color,
    )
