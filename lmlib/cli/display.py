"""Print so that an error of the display never ends what it shows."""

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import TextIO

from lmlib.leaks import known_leaks
from lmlib.text import printable

# A closed pipe, a full disk, a terminal that is gone; a character that the encoding lacks.
PRINT_ERRORS = (OSError, ValueError)
COLORS = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "blue": 34}
# What a line of a run's log looks like, and its color; the first pattern that matches counts.
HIGHLIGHTS = [(r".*⚠", "yellow"), (r"Error:", "red"), (r" *Val Loss:|Done:", "bold"),
              (r"Audit:.*passed$", "green"), (r"💾| *Sample:", "dim")]


def show(text: str, end: str = "\n", stream: str = "stdout"):
    """Print to "stdout" or "stderr"; the first error is reported on stderr, the rest are silent."""
    try:
        print(highlight(text, stream), end=end, file=getattr(sys, stream), flush=True)
    except RuntimeError:
        pass  # a signal's handler prints while the same stream is being written
    except PRINT_ERRORS as error:
        silence(getattr(sys, stream))
        if stream == "stdout":
            show(f"Nothing more is printed, since the output cannot be written ({error}).",
                 stream="stderr")


def paint(text: str, color: str, stream: str = "stdout") -> str:
    """Color a text for a terminal; elsewhere, or where NO_COLOR is set, return it as it is."""
    if os.environ.get("NO_COLOR") or not getattr(sys, stream).isatty():
        return text
    return f"\x1b[{COLORS[color]}m{text}\x1b[0m"


def highlight(text: str, stream: str = "stdout") -> str:
    """Color each line of a run's log by what it says."""
    def color(line: str) -> str:
        found = next((name for pattern, name in HIGHLIGHTS if re.match(pattern, line)), None)
        return paint(line, found, stream) if found else line

    return "\n".join(map(color, text.split("\n")))


def warn_of_leaks(folder: Path):
    """Say on stderr if the model in a run or checkpoint folder is known to leak."""
    if leaks := known_leaks(folder):
        show(f"This model LEAKS ({printable(leaks)}): its scores and texts are not those of a "
             "language model.", stream="stderr")


def confirm(question: str) -> bool:
    """Ask a question, and return whether the answer is yes."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


def format_size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def silence(stream: TextIO):
    """Send what a stream still holds, and all that follows, to nowhere."""
    with contextlib.suppress(*PRINT_ERRORS):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def accept_every_character():
    """Let stdout and stderr show a character that their encoding lacks as its escape."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what replaces a stream may lack it
            stream.reconfigure(errors="backslashreplace")


class Output:
    """A file for a library that prints: it writes as `show` does."""

    def __init__(self, stream: str):
        self.stream = stream

    def write(self, text: str):
        show(text, end="", stream=self.stream)

    def flush(self):
        """Do nothing: `show` has flushed."""
