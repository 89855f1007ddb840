"""The error for people: a sentence that says what is wrong, why, and what to write instead."""

from lmlib.text import printable


class UserError(ValueError):
    """What a user can put right. A notebook shows its sentence alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython shows in place of a traceback."""
        return [printable(str(self))]
