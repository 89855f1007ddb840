"""How a run that leaks is refused, or marked where `allow_leaks` lets it train."""

from pathlib import Path

from lmlib.errors import UserError
from lmlib.files import read_mapping

LEAKY = "lmlib_leaky"  # key in every config, result and record of a leaky run: the failed checks
LEAKY_NAME = " (LEAKY)"  # suffix of its name in every table and figure


class Leaky(UserError):
    """A model or a split that leaks; nothing was trained."""


def known_leaks(folder: Path) -> str:
    """Return the checks that the model in a run or checkpoint folder failed; "" if none."""
    return str(read_mapping(folder / "config.json").get(LEAKY, ""))
