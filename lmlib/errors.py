"""Errors for people: a sentence that says what is wrong, why, and what to write instead."""

from lmlib.text import printable


class _Sentence:
    """A notebook shows such an error's sentence alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython shows in place of a traceback."""
        return [printable(str(self))]


class UserError(_Sentence, ValueError):
    """What a user can put right."""


class Stopped(_Sentence, KeyboardInterrupt):
    """A run was asked to stop; what it had is saved."""


class Held(UserError):
    """Another process writes to the run."""
