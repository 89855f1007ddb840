"""A Plotly figure as a widget that fills its place, and that a reloaded page shows as it is now."""

from copy import deepcopy

import anywidget
import ipywidgets as w
import plotly.graph_objects as go


class Fit(anywidget.AnyWidget):
    """Say "resize" when its own width changes: a tab is opened, a sidebar, a window.

    Plotly alone listens to the window, and draws a figure that is not attached yet 700 pixels wide.
    """
    _esm = """export default { render({ el }) {
        let box = null  // it grows once the figure beside is drawn, and hears of its size
        const seen = new ResizeObserver(() => {
            const around = el.parentElement
            if (around && around !== box) seen.observe(box = around)
            window.dispatchEvent(new Event("resize"))
        })
        seen.observe(el)
        return () => seen.disconnect()
    } }"""


class Chart:
    """A figure that can be replaced; its widget is `box`."""

    def __init__(self, figure: go.Figure):
        self.box = w.VBox([go.FigureWidget(), Fit()], layout={"width": "100%"})
        self.show(figure)

    @property
    def figure(self) -> go.FigureWidget:
        return self.box.children[0]

    def show(self, figure: go.Figure):
        """Draw another figure; where it has the same lines they move, and a zoom stays."""
        shown, new = self.figure, figure.to_plotly_json()
        # Plotly freezes the width of a figure whose height is changed.
        same_height = shown.layout.height == figure.layout.height
        types = [[trace.type for trace in drawn.data] for drawn in (shown, figure)]
        if same_height and types[0] == types[1]:
            layout = new["layout"]  # a list is replaced, since it may have become shorter
            lists = {name: layout.pop(name, ()) for name in ("annotations", "shapes")}
            with shown.batch_update():
                shown.update(new)
                shown.layout.update(lists, overwrite=True)
        else:
            widget = go.FigureWidget(figure)
            widget._config = {"responsive": True, "displaylogo": False}
            self.box.children = [widget, self.box.children[1]]
            shown.close()
        # A page that is loaded again asks for these two, which Plotly sets at the beginning only.
        # Changed in place, they are not sent to pages that follow the changes.
        self.figure._widget_data[:] = deepcopy(self.figure._data)
        self.figure._widget_layout.clear()
        self.figure._widget_layout.update(deepcopy(self.figure._layout))
