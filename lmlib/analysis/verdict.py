"""A computed sentence that stands on top of a page or notebook."""

import html

from lmlib.text import printable


class Verdict(str):
    """A sentence, plain in a terminal and bold in a notebook."""

    def _repr_html_(self) -> str:
        return (f"<p style='font-size: 1.2em; max-width: 52em'><b>{html.escape(printable(self))}"
                "</b></p>")

    def _repr_pretty_(self, printer, cycle: bool):  # IPython would show the quotes of a str
        printer.text(printable(self))
