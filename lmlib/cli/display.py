"""Print so that an error of the display never ends what it shows."""

import contextlib
import os
import sys
from typing import TextIO

# A closed pipe, a full disk, a terminal that is gone; a character that the encoding lacks.
PRINT_ERRORS = (OSError, ValueError)


def show(text: str, end: str = "\n", stream: str = "stdout"):
    """Print to "stdout" or "stderr"; the first error is reported on stderr, the rest are silent."""
    try:
        print(text, end=end, file=getattr(sys, stream), flush=True)
    except RuntimeError:
        pass  # a signal's handler prints while the same stream is being written
    except PRINT_ERRORS as error:
        silence(getattr(sys, stream))
        if stream == "stdout":
            show(f"Nothing more is printed, since the output cannot be written ({error}).",
                 stream="stderr")


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
