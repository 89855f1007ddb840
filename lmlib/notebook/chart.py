"""A Plotly figure as a widget that fills its place, and that a reloaded page shows as it is now."""

from copy import deepcopy
from functools import cache

import anywidget
import ipywidgets as w
import plotly.graph_objects as go
import traitlets

from lmlib.analysis import render


class Code(anywidget.AnyWidget):
    """Plotly's code for the browser: 5 MB, which every go.FigureWidget brings along."""
    _esm = "export default {}"
    text = traitlets.Unicode(str(go.FigureWidget._esm)).tag(sync=True)


class Figure(go.FigureWidget):
    """A figure as a widget that is as wide as its place.

    The figures of a page share Plotly's code. Several copies take a slow machine more than the two
    seconds after which anywidget gives up a widget; it would be drawn, but follow no change.
    """
    _esm = """
    async function load(manager, id) {
        const code = (await manager.get_model(id)).get("text")
        const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }))
        return (await import(url)).default
    }
    export default () => {
        let widget, loaded
        return {
            async initialize({ model }) {
                window.lmlibPlotly ??= load(model.widget_manager, model.get("_code"))
                loaded = window.lmlibPlotly.then(create => {
                    widget = create()
                    widget.initialize({ model })
                })
                loaded.catch(() => delete window.lmlibPlotly)  // the next figure tries again
                await Promise.race([loaded, new Promise(later => setTimeout(later, 1000))])
            },
            async render(context) {
                await loaded
                return widget.render(context)
            }
        }
    }"""
    _code = traitlets.Unicode().tag(sync=True)  # the id of the widget that holds Plotly's code

    def __init__(self, figure: go.Figure):
        super().__init__(figure)
        self._config = render.CONFIG

    @traitlets.default("_code")
    def _shared_code(self) -> str:
        return shared_code().model_id


@cache
def shared_code() -> Code:
    """Return the one widget of this kernel that holds Plotly's code."""
    return Code()


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
        self.box = w.VBox([Figure(go.Figure()), Fit()], layout={"width": "100%"})
        self.show(figure)

    @property
    def figure(self) -> Figure:
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
            self.box.children = [Figure(figure), self.box.children[1]]
            shown.close()
        # A page that is loaded again asks for these two, which Plotly sets at the beginning only.
        # Changed in place, they are not sent to pages that follow the changes.
        self.figure._widget_data[:] = deepcopy(self.figure._data)
        self.figure._widget_layout.clear()
        self.figure._widget_layout.update(deepcopy(self.figure._layout))
